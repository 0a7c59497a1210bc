"""Epsilons of standardised convolutions, ours and timm's."""

import numpy as np
import pytest

from vit_jax.checkpoints import epsilon


@pytest.mark.core
def test_either_epsilon():
    kernel = 0.01 * np.random.default_rng(0).standard_normal((3, 3, 4, 6)) * np.arange(6) + 0.3
    params = {"block1/unit1/conv1/kernel": kernel.astype(np.float32), "head/kernel": kernel}

    def ours(params):
        centred = (w := params["block1/unit1/conv1/kernel"].astype(float)) - w.mean((0, 1, 2))
        return centred / (centred.std((0, 1, 2)) + 1e-5)

    def timms(params):
        centred = (w := params["block1/unit1/conv1/kernel"].astype(float)) - w.mean((0, 1, 2))
        return centred / np.sqrt(centred.var((0, 1, 2)) + 1e-8)

    assert abs(ours(params) - timms(params)).max() > 1e-4
    np.testing.assert_allclose(timms(epsilon.for_timm(params)), ours(params), atol=1e-6)
    np.testing.assert_allclose(ours(epsilon.as_timm(params)), timms(params), atol=1e-6)
    assert epsilon.for_timm(params)["head/kernel"] is kernel
