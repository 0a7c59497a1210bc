"""The comparison itself, with another function of ours in place of a library's."""

import numpy as np
import pytest
from checkpoint_makers import flat, random_params, tiny

from vit_jax.checkpoints import libraries, verify

pytestmark = pytest.mark.core


def check(path, monkeypatch, params, activation):
    """Of a model with tanh GELU, whose export computes with `activation`."""
    images = verify.random_images((8, 8), 3)
    theirs = dict(params)

    def set_head(kernel, bias):
        theirs.update({"head/kernel": kernel, "head/bias": bias})

    def load(*_):
        return libraries.Theirs(
            lambda batch: verify.function(tiny(activation=activation), theirs)(batch), None,
            set_head, "another library")

    monkeypatch.setitem(verify.LOADERS, "npz", load)
    np.savez(path, **params)
    return verify.verify("npz", path, params, tiny(), params, images)


@pytest.mark.parametrize("bias", [1, 30])  # beside a bias the rest of the logits is still small
def test_small_logits_hide_nothing(tmp_path, monkeypatch, bias):
    params = flat(random_params(tiny(), 8, 8))
    params["head/kernel"] *= np.float32(0.01)
    params["head/bias"] *= np.float32(bias)
    right = check(tmp_path / "a.npz", monkeypatch, params, "gelu_tanh")
    assert right.status == "PASS" and right.spread > 0.1
    assert "small" in str(right) and "all zeros" not in str(right)
    wrong = check(tmp_path / "b.npz", monkeypatch, params, "gelu")
    assert wrong.status == "FAIL" and "more than the tolerance" in wrong.reason


def test_a_head_of_natural_size_is_compared_itself(tmp_path, monkeypatch):
    params = flat(random_params(tiny(), 8, 8))
    result = check(tmp_path / "a.npz", monkeypatch, params, "gelu_tanh")
    assert result.status == "PASS" and not result.notes
