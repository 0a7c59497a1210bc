"""The number in which timm's hybrids differ most from Google's: the epsilon of a standardised
convolution, (w - mean) / (std + 1e-5) there and (w - mean) / sqrt(var + 1e-8) in timm. (That of
GroupNorm, 1e-6 there and 1e-5 in timm, shows in images of next to no contrast alone.)

Standardisation ignores the scale of a kernel except for its epsilon, so either side can reproduce
the other's numbers by scaling each output channel.
"""

from collections.abc import Callable

import numpy as np

Params = dict[str, np.ndarray]  # by path

# In config.json, of kernels `for_timm`: `as_timm` undoes it. timm itself ignores the key.
MATCHED = "vit_jax_match_eps"


def standardised(params: Params) -> list[str]:
    """Paths of the kernels of standardised convolutions."""
    return [path for path in params
            if path.endswith("/kernel") and path.split("/")[-2].startswith("conv")]


def for_timm(params: Params) -> Params:
    """Parameters with which timm computes what our model does with `params`."""
    return _scaled(params, lambda std: np.sqrt(1e-8 / ((std + 1e-5) ** 2 - std**2)))


def as_timm(params: Params) -> Params:
    """Parameters with which our model computes what timm does with `params`."""
    return _scaled(params, lambda std: 1e3 * (np.sqrt(std**2 + 1e-8) + std))


def _scaled(params, factor: Callable[[np.ndarray], np.ndarray]):
    result = dict(params)
    for path in standardised(params):
        kernel = params[path].astype(np.float64)
        centred = kernel - kernel.mean((0, 1, 2))
        result[path] = (centred * factor(centred.std((0, 1, 2)))).astype(np.float32)
    return result
