"""The models of timm, transformers and torchvision, loaded from what was written, as functions; and
what timm knows about one by its name."""

import dataclasses
import functools
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from vit_jax.checkpoints import targets

BATCH = 4
Function = Callable[[np.ndarray], np.ndarray]  # images [B, H, W, C] -> logits [B, K]


@dataclasses.dataclass(frozen=True)
class Theirs:
    """A library's model, loaded from what was written."""

    function: Function
    state: dict[str, np.ndarray] | None  # its tensors by their names; None where it renames them
    set_head: Callable[[np.ndarray, np.ndarray], None]  # kernel [D, K] and bias [K]
    library: str


class Unavailable(Exception):
    """The library is missing or does not work here; the message says why."""


def in_batches(run: Function, images: np.ndarray) -> np.ndarray:
    """`run` on all images, a few at once; the last batch is padded: one shape is compiled."""
    results = []
    for start in range(0, len(images), BATCH):
        batch = images[start:start + BATCH]
        padding = [(0, BATCH - len(batch))] + [(0, 0)] * 3
        results.append(run(np.pad(batch, padding))[:len(batch)])
    return np.concatenate(results)


def _import(*names):
    modules = []
    for name in names:
        try:
            modules.append(_import_one(name))
        except ImportError as error:
            missing = getattr(error, "name", None)
            raise Unavailable(f"{missing} is not installed" if missing in names else
                              f"{name} cannot be imported ({first_line(error)})") from error
        except Exception as error:  # torchvision built for another PyTorch: RuntimeError
            raise Unavailable(f"{name} cannot be imported ({first_line(error)})") from error
    return modules


_declared = []  # a torch.library.Library drops its operators with its last reference


def _import_one(name):
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        # A torchvision built for another PyTorch cannot load its compiled operators and refuses to
        # be imported, and timm and transformers with it. No Vision Transformer runs one of them,
        # so it is enough that their names exist.
        if "operator torchvision::" not in str(error) or _declared:
            raise
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(
                f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        for module in [m for m in sys.modules if m.partition(".")[0] in (name, "torchvision")]:
            del sys.modules[module]  # what the failed import left behind
        return importlib.import_module(name)


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@functools.cache
def timm_fields(architecture: str) -> dict[str, Any]:
    """num_heads and activation of a Vision Transformer that timm knows by this name, whose weights
    are neither made nor downloaded; `other`, its class, if that is no Vision Transformer's; {}
    without timm, or where it knows none."""
    if re.search("_rope_|dinov3", architecture):  # those that have the same tensors, without timm
        return {"other": "Eva"}
    try:
        torch, timm = _import("torch", "timm")
    except Unavailable:
        return {}
    name = architecture.split(".")[0]  # its tag says which weights
    if not timm.is_model(name):
        return {}
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    if not isinstance(model, timm.models.VisionTransformer):
        return {"other": type(model).__name__}
    block = next(iter(model.blocks), None)
    heads = getattr(getattr(block, "attn", None), "num_heads", None)
    function = getattr(getattr(block, "mlp", None), "act", None)
    if heads is None or function is None:
        return {}
    kind = type(function).__name__
    tanh = kind == "GELUTanh" or getattr(function, "approximate", None) == "tanh"
    return {"num_heads": heads,
            "activation": "gelu_tanh" if tanh else {"GELU": "gelu"}.get(kind, kind)}


def _theirs(torch, module, head, library, *, output=lambda x: x, compare_names=True):
    module = module.float().eval()

    def run(images):
        with torch.no_grad():
            return in_batches(lambda batch: output(module(
                torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))))).numpy(),
                images)

    def set_head(kernel, bias):
        layer = module.get_submodule(head)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(kernel.T)))
            layer.bias.copy_(torch.from_numpy(np.ascontiguousarray(bias)))

    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    return Theirs(run, state if compare_names else None, set_head, library)


def _load_timm(path, model, shape):
    torch, timm = _import("torch", "timm")
    module = timm.create_model(f"local-dir:{path}", pretrained=True)
    return _theirs(torch, module, "head", f"timm {timm.__version__}")


def _load_npz(path, model, shape):
    if not hasattr(model, "classifier"):
        raise Unavailable("no other library reads a ResNet under these names")
    for part, there in (("a representation layer", model.representation_size is not None),
                        ("register tokens", model.register_tokens),
                        ("LayerScale", model.layer_scale is not None)):
        if there:
            raise Unavailable(f"timm's npz loader leaves out {part}")
    torch, timm = _import("torch", "timm")
    name, args = targets.timm_architecture(
        model.clone(position_embedding="learned_1d"), shape[:2], shape[2])
    module = timm.create_model(name, pretrained=False, num_classes=model.num_classes, **args)
    module.load_pretrained(str(path))
    return _theirs(torch, module, "head", f"timm {timm.__version__}'s npz loader")


def _load_hf(path, model, shape):
    # transformers imports torchvision late and where it is installed, so that comes before it.
    torch, *_, transformers = _import(
        "torch", *(["torchvision"] if importlib.util.find_spec("torchvision") else []),
        "transformers")
    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    options, output = {}, lambda result: result.logits
    if architecture == "ViTModel":
        pooled = model.representation_size is not None
        options = {"add_pooling_layer": pooled}
        output = (lambda result: result.pooler_output) if pooled else (
            lambda result: result.last_hidden_state[:, 0])
    try:
        kind = getattr(transformers, architecture)
    except Exception as error:  # imported only now
        raise Unavailable(f"transformers cannot be imported ({first_line(error)})") from error
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        module, info = kind.from_pretrained(path, output_loading_info=True, **options)
    finally:
        if shown:
            bars.enable_progress_bar()
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            raise ValueError(f"{what.replace('_', ' ')} {sorted(map(str, info[what]))[:3]}")
    return _theirs(torch, module, "classifier", f"transformers {transformers.__version__}",
                   output=output, compare_names=False)


def _load_torchvision(path, model, shape):
    torch, torchvision = _import("torch", "torchvision")
    (safetensors_torch,) = _import("safetensors.torch")
    config = json.loads((path / "config.json").read_text())
    module = torchvision.models.VisionTransformer(**config["model_args"])
    if not model.num_classes:
        module.heads.head = torch.nn.Identity()
    module.load_state_dict(safetensors_torch.load_file(path / "model.safetensors"), strict=True)
    return _theirs(torch, module, "heads.head", f"torchvision {torchvision.__version__}")


LOADERS = {"timm": _load_timm, "npz": _load_npz, "hf": _load_hf,
           "torchvision": _load_torchvision}
