"""Resizing against scipy, PyTorch and timm, and against values worked out by hand."""

import numpy as np
import pytest
import scipy.ndimage

from vit_jax.checkpoints.resize import (
    POSITION_MODES,
    adapt_input_channels,
    resize_grid,
    resize_patch_kernel,
    resize_position_embedding,
)
from vit_jax.errors import UserError

core = pytest.mark.core

# Up, down, both at once, from and to one row, one axis alone, ViT-B/16 at 224 to 384.
SIZES = [
    ((3, 3), (5, 5)), ((14, 14), (24, 24)), ((24, 24), (14, 14)), ((7, 5), (3, 11)),
    ((4, 6), (9, 2)), ((1, 5), (4, 3)), ((5, 4), (1, 1)), ((1, 1), (3, 2)), ((6, 6), (6, 9)),
    ((37, 37), (16, 16)), ((2, 2), (32, 31)),
]
PATCHES = [((16, 16), (14, 14)), ((14, 14), (16, 16)), ((16, 16), (8, 8)), ((8, 8), (16, 16)),
           ((4, 6), (7, 3)), ((8, 8), (8, 12)), ((3, 3), (1, 2))]


def random(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ramp() -> np.ndarray:
    """[[0 1 2], [3 4 5], [6 7 8]] as a grid [3, 3, 1]."""
    return np.arange(9, dtype=np.float32).reshape(3, 3, 1)


def column(values, mode, size) -> list[float]:
    grid = resize_grid(np.array(values, np.float32).reshape(-1, 1, 1), (size, 1), mode)
    assert grid.shape == (size, 1, 1) and grid.dtype == np.float32
    return grid[:, 0, 0].tolist()


@core
def test_corner_aligned_by_hand():
    expected = 3 * np.linspace(0, 2, 5)[:, None] + np.linspace(0, 2, 5)
    np.testing.assert_array_equal(resize_grid(ramp(), (5, 5), "corner_aligned")[..., 0], expected)
    assert expected[0].tolist() == [0, 0.5, 1, 1.5, 2]
    assert column([0, 1, 2, 3, 4], "corner_aligned", 3) == [0, 2, 4]
    assert column([5, 1, 2], "corner_aligned", 1) == [5]


@core
def test_bilinear_by_hand():
    # New centres 0.25, 0.75 between the old ones; the outer two lie beyond the edge.
    assert column([0, 4], "bilinear", 4) == [0, 1, 3, 4]
    assert column([0, 2, 4, 8], "bilinear", 2) == [1, 6]
    assert column([0, 1, 5], "bilinear", 1) == [1]


@core
def test_bicubic_by_hand():
    # Half way, Keys' weights with a = -3/4 are -3/32, 19/32, 19/32, -3/32.
    assert column([0, 0, 32, 0], "bicubic", 2) == [-3, 19]
    assert column([32, 0, 0, 0], "bicubic", 2) == [19 - 3, 0]  # the edge is repeated
    # With a = -1/2 the kernel is 111, 29 and -9 of 128 at 1/4, 3/4 and 5/4; what lies beyond the
    # edge is left out, and each row divided by its sum.
    np.testing.assert_allclose(
        column([1, 0], "bicubic_antialias", 4), [111 / 102, 111 / 140, 29 / 140, -9 / 102],
        rtol=1e-6)


@core
@pytest.mark.parametrize("mode", POSITION_MODES)
def test_same_size_keeps_every_bit_and_constants_stay(mode):
    grid = random(5, 7, 3)
    np.testing.assert_array_equal(resize_grid(grid, (5, 7), mode), grid)
    embedding = random(1, 36, 3)
    same = resize_position_embedding(
        embedding, old_grid=(5, 7), new_grid=(5, 7), prefix=1, mode=mode)
    np.testing.assert_array_equal(same, embedding)
    for old, new in SIZES:
        constant = resize_grid(np.full((*old, 2), 0.3, np.float32), new, mode)
        np.testing.assert_allclose(constant, np.full((*new, 2), 0.3), rtol=1e-6)


@core
@pytest.mark.parametrize("old, new", SIZES)
def test_corner_aligned_equals_scipy(old, new):
    grid = random(*old, 4)
    zoom = (new[0] / old[0], new[1] / old[1], 1)
    expected = scipy.ndimage.zoom(grid.astype(np.float64), zoom, order=1)
    np.testing.assert_allclose(resize_grid(grid, new, "corner_aligned"), expected, atol=1e-6)


@pytest.mark.parametrize("mode, options", [
    ("corner_aligned", dict(mode="bilinear", align_corners=True)),
    ("bilinear", dict(mode="bilinear", align_corners=False)),
    ("bicubic_antialias", dict(mode="bicubic", align_corners=False, antialias=True)),
    ("bicubic", dict(mode="bicubic", align_corners=False)),
])
def test_modes_equal_pytorch(mode, options):
    from torch_shim import torch

    for old, new in SIZES:
        grid = random(*old, 4)
        image = torch.from_numpy(grid).permute(2, 0, 1)[None].double()
        expected = torch.nn.functional.interpolate(image, size=new, **options)
        np.testing.assert_allclose(
            resize_grid(grid, new, mode), expected[0].permute(1, 2, 0), atol=1e-6,
            err_msg=f"{old} to {new}")


@core
def test_position_embedding_keeps_the_prefix_and_resizes_row_by_row():
    prefix, grid = random(1, 5, 6), random(3, 4, 6, seed=1)
    embedding = np.concatenate([prefix, grid.reshape(1, 12, 6)], axis=1)
    resized = resize_position_embedding(
        embedding, old_grid=(3, 4), new_grid=(6, 2), prefix=5, mode="bicubic")
    assert resized.shape == (1, 17, 6) and resized.dtype == np.float32
    np.testing.assert_array_equal(resized[:, :5], prefix)
    expected = resize_grid(grid, (6, 2), "bicubic").reshape(12, 6)
    np.testing.assert_array_equal(resized[0, 5:], expected)
    none = resize_position_embedding(
        embedding[:, 5:], old_grid=(3, 4), new_grid=(6, 2), prefix=0, mode="bicubic")
    np.testing.assert_array_equal(none[0], expected)


@pytest.mark.parametrize("mode, options", [
    ("bicubic_antialias", {}), ("bilinear", dict(interpolation="bilinear", antialias=False)),
])
def test_position_embedding_equals_timm(mode, options):
    from torch_shim import timm, torch

    for old, new in SIZES:
        embedding = random(1, 1 + old[0] * old[1], 4)
        expected = timm.layers.resample_abs_pos_embed(
            torch.from_numpy(embedding), list(new), old_size=list(old), **options)
        resized = resize_position_embedding(
            embedding, old_grid=old, new_grid=new, prefix=1, mode=mode)
        # timm computes in float32, the positions too.
        np.testing.assert_allclose(resized, expected, atol=2e-5, err_msg=f"{old} to {new}")


@core
@pytest.mark.parametrize("old, new", [((4, 4), (8, 8)), ((5, 4), (7, 9))])
def test_enlarged_patches_embed_as_before(old, new):
    """What the pseudo-inverse is for: <B x, w'> = <x, w> (FlexiViT, 3.4)."""
    patch, kernel = random(*old, 3), random(*old, 3, 8, seed=1)
    enlarged, resized = resize_grid(patch, new, "bilinear"), resize_patch_kernel(kernel, new)
    assert resized.shape == (*new, 3, 8) and resized.dtype == np.float32
    embed = "hwc,hwcd->d"
    np.testing.assert_allclose(
        np.einsum(embed, enlarged, resized), np.einsum(embed, patch, kernel), atol=1e-5)
    np.testing.assert_array_equal(resize_patch_kernel(kernel, old), kernel)


def test_patch_kernel_equals_timm():
    from torch_shim import timm, torch

    for old, new in PATCHES:
        kernel = random(*old, 3, 5)
        expected = timm.layers.resample_patch_embed(
            torch.from_numpy(kernel).permute(3, 2, 0, 1), list(new), interpolation="bilinear",
            antialias=False).permute(2, 3, 1, 0)
        np.testing.assert_allclose(
            resize_patch_kernel(kernel, new), expected, atol=5e-5, err_msg=f"{old} to {new}")


@core
def test_input_channels_by_hand():
    kernel = np.array([1, 2, 6], np.float32).reshape(1, 1, 3, 1)

    def adapted(channels):
        result = adapt_input_channels(kernel, channels)
        assert result.shape == (1, 1, channels, 1) and result.dtype == np.float32
        return result.ravel().tolist()

    assert adapted(1) == [9]
    assert adapted(3) == [1, 2, 6]
    assert adapted(4) == [0.75, 1.5, 4.5, 0.75]
    assert adapted(6) == [0.5, 1, 3, 0.5, 1, 3]
    assert adapted(2) == [1.5, 3]


def test_input_channels_equal_timm():
    from torch_shim import timm, torch

    adapt_input_conv = timm.models.adapt_input_conv
    kernel = random(4, 4, 3, 5)
    for channels in (1, 2, 3, 4, 7):
        expected = adapt_input_conv(channels, torch.from_numpy(kernel).permute(3, 2, 0, 1))
        np.testing.assert_allclose(
            adapt_input_channels(kernel, channels), expected.permute(2, 3, 1, 0), atol=1e-6)


@core
@pytest.mark.parametrize("call, message", [
    (lambda: resize_grid(ramp(), (5, 5), "bicubik"), "did you mean 'bicubic'"),
    (lambda: resize_grid(ramp()[0], (5, 5), "bicubic"), r"\[h, w, D\], not \[3, 1\]"),
    (lambda: resize_grid(ramp(), (5, 0), "bicubic"), r"at least 1, not \(5, 0\)"),
    (lambda: resize_position_embedding(
        random(1, 17, 2), old_grid=(4, 4), new_grid=(2, 2), prefix=0, mode="bicubic"),
     r"4 x 4 patches after 0 other tokens .* \[1, 16, D\], not \[1, 17, 2\]"),
    (lambda: resize_patch_kernel(ramp(), (5, 5)), r"\[p, q, C, D\], not \[3, 3, 1\]"),
    (lambda: adapt_input_channels(random(2, 2, 3, 1), 0), "at least one input channel, not 0"),
])
def test_mistakes_are_sentences(call, message):
    with pytest.raises(UserError, match=message):
        call()
