"""Checkpoints as others write them, from random parameters, for tests.

The renamings are written out here once more, and not taken from `vit_jax.checkpoints`.
"""

import json
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_models import apply, pixels, random_params, tiny

__all__ = ["apply", "classic_name", "flat", "google_npz", "pixels", "random_params", "tiny",
           "write_json"]

_CLASSIC = (("/LayerNorm_1/", "/LayerNorm_2/"), ("/MlpBlock_0/", "/MlpBlock_3/"),
            ("/MultiHeadDotProductAttention_0/", "/MultiHeadDotProductAttention_1/"))
_POSITIONS = "Transformer/posembed_input/pos_embedding"


def flat(params) -> dict[str, np.ndarray]:
    """{'head/kernel': array, ...}"""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def classic_name(name: str) -> str:
    """With submodules counted as before Flax Linen."""
    for linen, classic in _CLASSIC:
        name = name.replace(linen, classic)
    return name


def google_npz(path, params, *, prefix="", classic=False, place=_POSITIONS, slot=True,
               stacked=False, groupnorm_axes=1, bfloat16=False, beside=None) -> Path:
    """Writes a file in one of Google's dialects.

    Args:
      path: of the file.
      params: nested dictionaries, unstacked.
      prefix: before every name.
      classic: numbers submodules as before Linen.
      place: name of the position embedding.
      slot: False leaves out the class token's row of it.
      stacked: blocks stacked for a scan.
      groupnorm_axes: 4 for [1, 1, 1, C].
      bfloat16: as NumPy stores it, two bytes without a meaning.
      beside: more tensors, without prefix.
    """
    tensors = flat(params)
    if _POSITIONS in tensors:
        positions = tensors.pop(_POSITIONS)
        tensors[place] = positions if slot else positions[:, 1:]
    if stacked:
        first = "Transformer/encoderblock_0/"
        count = len({name.split("/")[1] for name in tensors if "/encoderblock_" in name})
        for name in [name for name in tensors if name.startswith(first)]:
            layers = [tensors.pop(name.replace("_0/", f"_{i}/", 1)) for i in range(count)]
            tensors[name.replace("encoderblock_0", "encoderblock")] = np.stack(layers)
    if classic:
        tensors = {classic_name(name): tensor for name, tensor in tensors.items()}
    if groupnorm_axes == 4:
        tensors = {name: tensor[None, None, None] if "gn" in name.split("/")[-2:][0] else tensor
                   for name, tensor in tensors.items()}
    if bfloat16:
        tensors = {name: tensor.astype(ml_dtypes.bfloat16).view("V2")
                   for name, tensor in tensors.items()}
    np.savez(path, **{prefix + name: tensor for name, tensor in tensors.items()}, **(beside or {}))
    return Path(path)


def write_json(path, value) -> None:
    """A config beside weights."""
    Path(path).write_text(json.dumps(value))
