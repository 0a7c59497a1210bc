"""Features of a split against a forward pass without the pipeline."""

import jax
import numpy as np
import pytest
from tiny import make_tiny_config

from vit_jax.config import validate
from vit_jax.data.builtin import Digits
from vit_jax.data.pipeline import BadImages
from vit_jax.errors import UserError
from vit_jax.models.variants import create_model
from vit_jax.probes.extraction import make_extractor
from vit_jax.training import partition
from vit_jax.training.step import Pixels

TINY = dict(patch_size=4, hidden_size=16, mlp_dim=24, num_heads=2, num_layers=1)


@pytest.fixture(scope="module")
def model():
    return create_model("B/16", num_classes=10, **TINY)


@pytest.fixture(scope="module")
def params(model):
    images = np.zeros((1, 8, 8, 3), np.float32)
    return jax.jit(lambda: model.init(jax.random.key(0), images, train=False))()["params"]


def extractor(model):
    config = make_tiny_config()
    config.eval_batch_size = 100
    config = validate(config)
    mesh = partition.make_mesh(config)
    return make_extractor(model, config, mesh, BadImages("error"), Pixels(0.4, 0.2))


def test_features_of_all_images(model, params):
    source = Digits().open("test")
    got = extractor(model)(params, source)
    images = np.stack([source[i].image for i in range(360)])
    expected = model.clone(num_classes=0).apply(
        {"params": params}, ((images / 255 - 0.4) / 0.2).astype(np.float32), train=False)
    np.testing.assert_allclose(got.features, expected, atol=1e-5)
    assert got.features.dtype == np.float32
    assert got.labels.tolist() == source.labels().tolist()
    assert got.index.tolist() == list(range(360))


def test_features_of_some_images(model, params):
    source = Digits().open("test")
    extract = extractor(model)
    chosen = np.array([3, 4, 200, 359])
    whole, some = extract(params, source), extract(params, source, chosen)
    assert some.index.tolist() == chosen.tolist()
    assert some.labels.tolist() == whole.labels[chosen].tolist()
    np.testing.assert_allclose(some.features, whole.features[chosen], atol=1e-5)


def test_features_of_every_patch_are_refused(model):
    with pytest.raises(UserError, match="probes need one vector per image"):
        extractor(model.clone(classifier="unpooled"))
