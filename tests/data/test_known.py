"""Sizes of data sets that are not here."""

import pytest

from vit_jax.data.known import known_size

pytestmark = pytest.mark.core


@pytest.mark.parametrize("source, split, size", [
    ("tfds:imagenet2012", "train", (1_281_167, 1000)),
    ("tfds:imagenet2012:5.1.0", "validation", (50_000, 1000)),
    ("tfds:imagenet2012", "train[:99%]", (1_268_355, 1000)),
    ("tfds:imagenet2012", "train[99%:]", (12_812, 1000)),
    ("tfds:imagenet2012", "train[-1000:]", (1000, 1000)),
    ("tfds:imagenet2012", "train[:10] + validation[5:7]", (12, 1000)),
    ("tfds:imagenet21k", "full[51200:]", (14_145_922, 21_841)),
    ("tfds:cifar10", "train[:98%]", (49_000, 10)),
    ("tfds:cifar10", "train[:999999]", (50_000, 10)),
    ("tfds:cifar10", "validation", None),
    ("tfds:cifar10", "train[:50shards]", None),
    ("tfds:cifar10", "train[%:]", None),
    ("tfds:cifar10", "train[:-]", None),
    ("tfds:cifar10", "train[:]", (50_000, 10)),
    ("tfds:unheard_of", "train", None),
    ("folder:imagenet2012", "train", None),
    ("imagenet2012", "train", None),
])
def test_known_sizes(source, split, size):
    assert known_size(source, split) == size
