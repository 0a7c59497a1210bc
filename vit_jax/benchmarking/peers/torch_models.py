"""PyTorch's side of training and inference: timm, timm with torch.compile, or transformers."""

import contextlib
import functools
import time

from serve import serve


def prepare(kind, task):
    import torch

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as JAX does
    torch.backends.cudnn.benchmark = True  # kernels of convolutions chosen by timing, as XLA does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    declare_torchvision()
    model, library = (hugging_face if kind == "transformers" else timm_model)(task)
    try:
        step = start(model, task, device, compiled=kind == "timm-compiled")

        def run(times):
            begin = time.perf_counter()
            for _ in range(times):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begin

        first = run(1)
        if device.type == "cuda":  # compiling and choosing kernels take memory of their own
            torch.cuda.reset_peak_memory_stats()
        run(1)
    except torch.OutOfMemoryError:
        raise ValueError(
            f"a batch of {task['batch_size']} does not fit into its memory") from None
    about = {"library": f"{library}, torch {torch.__version__}", "first_seconds": first,
             "parameters": sum(p.numel() for p in model.parameters())}
    if device.type == "cuda":
        about["memory_bytes"] = torch.cuda.max_memory_allocated()
    return run, about


def start(model, task, device, compiled):
    """The work as a function without arguments. In bfloat16 it is what PyTorch's users do: training
    by autocast, which leaves the tokens between the layers in float32, and inference with weights
    of that type."""
    import torch

    training, weights = task["what"] == "train", torch.float32
    autocast = contextlib.nullcontext
    if task["dtype"] == "bfloat16":
        if training:
            autocast = functools.partial(torch.autocast, device.type, torch.bfloat16)
        else:
            weights = torch.bfloat16
    batch, (height, width) = task["batch_size"], task["image_size"]
    model = model.to(device, weights).train(training)
    images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, device=device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, task["num_classes"], (batch,), device=device)

    def logits(images):
        with autocast():
            outputs = model((images.float() / 127.5 - 1).to(weights))
        return getattr(outputs, "logits", outputs).float()

    if compiled:
        logits = torch.compile(logits)
    if not training:
        def predict():
            with torch.inference_mode():
                logits(images)
        return predict

    fused = {"fused": True} if device.type == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, **fused)

    def update():
        torch.nn.functional.cross_entropy(logits(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return update


def declare_torchvision():
    """Both libraries import torchvision, whose compiled part may be for another PyTorch. Declared,
    its operators can be imported; no model here calls them."""
    import torch

    with contextlib.suppress(ImportError):
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            global _operators
            _operators = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                _operators.define(
                    f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def timm_model(task):
    import timm

    if not task["timm"]:
        raise ValueError(f"timm has no {task['variant']}; leave it out.")
    model = timm.create_model(
        task["timm"], num_classes=task["num_classes"], img_size=tuple(task["image_size"]))
    return model, f"timm {timm.__version__}"


def hugging_face(task):
    import transformers

    if task["hybrid"]:
        raise ValueError(f"transformers has no {task['variant']}; leave it out.")
    sizes = task["sizes"]
    config = transformers.ViTConfig(
        hidden_size=sizes["hidden_size"], intermediate_size=sizes["mlp_dim"],
        num_hidden_layers=sizes["num_layers"], num_attention_heads=sizes["num_heads"],
        patch_size=sizes["patch_size"], image_size=tuple(task["image_size"]),
        num_labels=task["num_classes"])
    return (transformers.ViTForImageClassification(config),
            f"transformers {transformers.__version__}")


if __name__ == "__main__":
    serve(prepare)
