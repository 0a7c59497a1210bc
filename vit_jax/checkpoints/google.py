"""Google's npz files in all their dialects, to and from our parameter paths.

The published files differ in four ways, which this module removes one after the other: a prefix
(training states, two-tower models), the numbering of submodules before and after Flax Linen, blocks
stacked for a scan, and the place and length of the position embedding.
"""

import re
from collections.abc import Mapping

import numpy as np

from vit_jax.checkpoints.layouts import POSITIONS

_PREFIXES = ("opt/target/", "params/img/", "params/")
# Before Linen, submodules were counted over all classes of a module; since then, by class.
_CLASSIC = {
    "LayerNorm_2": "LayerNorm_1",
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "MlpBlock_3": "MlpBlock_0",
}
_BLOCK = re.compile(r"(Transformer/encoderblock_\d+/)(\w+)(/.*)")
_GROUP_NORM = re.compile(r"(^|/)(gn\d|gn_root|gn_proj)/(scale|bias)$")


def is_google(names) -> bool:
    """Whether these are the names of a ViT (or its ResNet) in one of Google's dialects."""
    return any(name.endswith(("embedding/kernel", "conv_root/kernel")) for name in names)


def to_ours(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str],
                                                        list[str]]:
    """Brings any dialect to our paths.

    Args:
      tensors: as they are in the file.

    Returns:
      (our path -> array, our path -> name in the file, names that belong to something else than
      the model: optimizer state, a text tower).

    Raises:
      ValueError: two tensors of the file are the same parameter.
    """
    prefix = next((p for p in _PREFIXES if any(
        name.startswith((f"{p}embedding/", f"{p}conv_root/")) for name in tensors)), "")
    dropped = [name for name in tensors if not name.startswith(prefix)]
    ours, origin = {}, {}
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            continue
        for path, part in _unstack(name.removeprefix(prefix), tensor):
            path = _linen_path(path)
            if path in ("pos_embedding", "Transformer/pos_embedding"):
                path = POSITIONS
            if _GROUP_NORM.search(path):
                part = part.reshape(-1)  # (1, 1, 1, C) in old files
            if path in ours:
                raise ValueError(f"{name} and {origin[path]} are both {path}")
            ours[path], origin[path] = part, name
    return ours, origin, dropped


def _unstack(path, tensor):
    stacked = "Transformer/encoderblock/"
    if not path.startswith(stacked):
        return [(path, tensor)]
    return [(path.replace("encoderblock/", f"encoderblock_{i}/", 1), layer)
            for i, layer in enumerate(tensor)]


def _linen_path(path):
    match = _BLOCK.fullmatch(path)
    # LayerNorm_2 exists in no Linen file, so its renaming can be decided name by name.
    if not match or match[2] not in _CLASSIC:
        return path
    return match[1] + _CLASSIC[match[2]] + match[3]


def classic(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our paths in the numbering of the published files, which timm's npz loader expects."""
    names = {linen: old for old, linen in _CLASSIC.items()}
    result = {}
    for path, tensor in params.items():
        match = _BLOCK.fullmatch(path)
        if match and match[2] in names:
            path = match[1] + names[match[2]] + match[3]
        result[path] = tensor
    return result
