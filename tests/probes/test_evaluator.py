"""The probes together: what is read, and what comes out."""

import jax
import numpy as np
import pytest
from tiny import make_tiny_config

from vit_jax.config import validate
from vit_jax.data.builtin import Digits
from vit_jax.data.pipeline import BadImages
from vit_jax.models.variants import create_model
from vit_jax.probes.evaluator import make_probes
from vit_jax.training import partition


class Counting:
    """A source that remembers which records were read."""

    def __init__(self, source):
        self._source = source
        self.read = set()

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        self.read.add(index)
        return self._source[index]


@pytest.fixture(scope="module")
def setup():
    model = create_model("B/16", num_classes=10, patch_size=4, hidden_size=16, mlp_dim=24,
                         num_heads=2, num_layers=1)
    images = np.zeros((1, 8, 8, 3), np.float32)
    params = jax.jit(lambda: model.init(jax.random.key(0), images, train=False))()["params"]
    config = make_tiny_config()
    config.eval_batch_size = 128
    return model, params, validate(config)


def test_few_shot_alone_reads_only_what_it_needs(setup):
    model, params, config = setup
    mesh = partition.make_mesh(config)
    test = Digits().open("test")

    def probe(names):
        train = Counting(Digits().open("train"))
        results = make_probes(model, config, mesh, train, test, BadImages("error"), names=names,
                              shots=(1, 5))(params)
        return results, train.read

    few, read = probe(("fewshot",))
    assert 60 < len(read) <= 150 and few.train_images == len(read)
    assert few.knn is None and few.linear is None and few.width == 16
    everything, read = probe(("fewshot", "knn", "linear"))
    assert len(read) == everything.train_images == 1437 and everything.test_images == 360
    # Rounding between batches may move an image or two across a border.
    for shots in (1, 5):
        np.testing.assert_allclose(few.fewshot[shots], everything.fewshot[shots], atol=2 / 360)
    scalars = everything.scalars()
    assert list(scalars) == ["probe/1shot", "probe/5shot", "probe/knn", "probe/linear"]
    assert scalars["probe/5shot"] == np.mean(everything.fewshot[5])
    # Random features of digits already tell much; chance would be 0.1.
    assert 0.2 < scalars["probe/1shot"] < scalars["probe/5shot"] < scalars["probe/linear"]
    assert scalars["probe/knn"] > 0.4
