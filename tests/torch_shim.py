"""PyTorch and timm for tests, or a skip that says why not. Import it before either of them.

timm imports torchvision, whose Python code asks for two of its compiled operators by name. A
torchvision built for CUDA cannot load them beside a CPU build of PyTorch and refuses to be
imported. Nothing here runs them, so declaring their names is enough.
"""

import warnings

import pytest

torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed; the comparisons with it need the extra 'parity'"
)

_library = torch.library.Library("torchvision", "FRAGMENT")  # dropped with its last reference
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of PyTorch's and timm's own, on import
    timm = pytest.importorskip(
        "timm", reason="timm is not installed; the comparisons with it need the extra 'parity'"
    )
