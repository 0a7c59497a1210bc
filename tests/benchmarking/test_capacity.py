"""Whether a batch fits: the search with a stand-in, and a real try in a process of its own."""

import json

import pytest

from vit_jax import benchmark
from vit_jax.benchmarking import capacity
from vit_jax.config import to_json
from vit_jax.errors import UserError

MEMORY, OTHER = "RESOURCE_EXHAUSTED: Out of memory while trying to", "CUDA error: invalid argument"


@pytest.mark.parametrize("fits, shards", [(100, 1), (5, 1), (10**6, 1), (10**6, 8), (0, 1)])
def test_the_largest_is_found(fits, shards):
    found = capacity.search("a", lambda number: MEMORY if number > fits else "", shards)
    real = min(fits, 32_768 // shards)
    assert real - real // 16 <= found <= real


def test_other_failures_count_once_something_has_fitted(capsys):
    """Before, they are said."""
    assert capacity.search("timm", lambda number: OTHER if number > 128 else "") == 128
    assert f"timm with 256 images: {OTHER}" in capsys.readouterr().err
    with pytest.raises(UserError, match="timm does not run with 64 images: CUDA error"):
        capacity.search("timm", lambda number: OTHER)


def test_tries(tmp_path):
    """A step of a few neurons fits; ten billion images, two terabytes of pixels, do not."""
    sizes = {"data.image_size": 8, "model.patch_size": 4, "model.hidden_size": 16,
             "model.mlp_dim": 24, "model.num_heads": 2, "model.num_layers": 1}
    overrides = {key: str(value) for key, value in sizes.items()}

    def attempt(batch_size):
        config = to_json(benchmark._config(overrides, "S/16", batch_size))
        return capacity.attempt("train", json.dumps(config), str(tmp_path / "cache"))

    platform, number = capacity.devices()
    assert platform == "cpu" and number >= 1
    assert attempt(8 * number) == capacity.Try("", 0)
    assert "allocate" in attempt(number * 10**10).failure
