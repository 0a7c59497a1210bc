"""The model card (README.md) of an exported directory."""

from pathlib import Path
from typing import Any

from vit_jax.checkpoints import targets

_LIBRARY = {"timm": "timm", "hf": "transformers", "torchvision": "torchvision"}


def model_card(report, config: dict[str, Any]) -> str:
    """Markdown with the front matter that the Hugging Face Hub reads.

    Args:
      report: the `ExportReport`.
      config: the contents of the directory's `config.json`.
    """
    model = report.model
    task = "image-classification" if model["num_classes"] else "image-feature-extraction"
    height, width = report.preprocessing["image_size"]
    stem = "" if model["resnet_stages"] is None else (
        f" on the features of a ResNet ({', '.join(map(str, model['resnet_stages'])) or 'root'})")
    output = f"{model['num_classes']} classes" if model["num_classes"] else "features"
    changes = list(report.changes)
    changes += [f"{name}: logits move by {e['max_difference']:.1e} at most"
                for name, e in report.effects.items()]
    lines = [
        "---",
        f"library_name: {_LIBRARY[report.target]}",
        f"pipeline_tag: {task}",
        f"tags: [{task}, vision-transformer, vit_jax]",
        "---",
        "",
        f"# Vision Transformer for {height}x{width} images",
        "",
        f"{model['num_layers']} blocks of width {model['hidden_size']} with {model['num_heads']} "
        f"heads and an MLP of {model['mlp_dim']}, patches of {model['patch_size']}x"
        f"{model['patch_size']}{stem}, {output}. Converted with vit_jax from "
        f"`{Path(report.source).name}`.",
        "",
        "## Use",
        "",
        "```python",
        *_usage(report, config),
        "```",
        "",
        "## Images",
        "",
        *_images(report),
        "",
        "## Conversion",
        "",
        f"{report.parameters} parameters in {report.tensors} tensors, "
        f"{report.numbers:,} numbers in {report.dtype}.",
        *_bullets("Changed:", changes),
        *_bullets("To know:", report.warnings),
        "",
        "```",
        str(report.verification),
        "```",
        "",
    ]
    return "\n".join(lines)


def _bullets(title, items):
    return ["", title, "", *(f"- {item}" for item in items)] if items else []


def _usage(report, config):
    if report.target == "timm":
        return ["import timm",
                "model = timm.create_model('local-dir:DIR', pretrained=True).eval()",
                "transform = timm.data.create_transform("
                "**timm.data.resolve_model_data_config(model))"]
    if report.target == "hf":
        kind = config["architectures"][0]
        pooled = kind != "ViTModel" or report.model["representation_size"] is not None
        options = "" if pooled else ", add_pooling_layer=False"
        return [f"from transformers import AutoImageProcessor, {kind}",
                f"model = {kind}.from_pretrained('DIR'{options}).eval()",
                "processor = AutoImageProcessor.from_pretrained('DIR')"]
    without_head = [] if report.model["num_classes"] else [
        "model.heads.head = torch.nn.Identity()"]
    return ["import json, torch, torchvision",
            "from safetensors.torch import load_file",
            "model = torchvision.models.VisionTransformer("
            "**json.load(open('DIR/config.json'))['model_args'])",
            *without_head,
            "model.load_state_dict(load_file('DIR/model.safetensors'), strict=True)",
            "model.eval()"]


def _images(report):
    how = report.preprocessing
    height, width = how["image_size"]
    if how["crop"] == "squash":
        crop = f"The whole image is resized to {height}x{width}, its aspect given up"
    else:
        crop = (f"The short side is resized to {targets.resize_to((height, width), how)} and the "
                f"middle {height}x{width} cut out")
    return [f"{crop} ({how['interpolation']}). Pixels in [0, 1] are normalised with mean "
            f"{how['mean']} and std {how['std']}."]
