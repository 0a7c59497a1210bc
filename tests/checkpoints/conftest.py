"""What tests of PyTorch's checkpoints share."""

import pytest


@pytest.fixture
def torch():
    """PyTorch, with a torchvision and timm that can be imported; or a skip."""
    from torch_shim import torch

    return torch
