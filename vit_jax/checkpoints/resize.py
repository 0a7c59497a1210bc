"""Weights for another resolution: position embeddings, patch kernels, input channels.

Every resize is linear and separable, grid' = W_h grid W_w^T, so a mode is one function that gives
the matrix W [new, old] of an axis. All is computed in float64 and rounded once, to float32.
"""

from collections.abc import Callable

import numpy as np

from vit_jax.errors import UserError, did_you_mean


def resize_grid(grid: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Resizes a grid of vectors, as one would an image.

    Args:
      grid: [h, w, D].
      size: (H, W).
      mode: whose convention to follow, one of POSITION_MODES:
        corner_aligned: linear between the corners, which stay where they are. Google's and
          big_vision's; scipy.ndimage.zoom(order=1), PyTorch's bilinear with align_corners=True.
        bilinear: linear between pixel centres. timm's loader of npz files; PyTorch's bilinear with
          align_corners=False, antialias=False.
        bicubic_antialias: timm's default; PyTorch's bicubic with antialias=True, Pillow's BICUBIC.
        bicubic: Hugging Face's and DeiT's; PyTorch's bicubic with antialias=False.

    Returns:
      float32 [H, W, D]; the same bits if the size does not change.

    Raises:
      UserError: `grid`, `size` or `mode` is none of the above.
    """
    grid = np.asarray(grid, np.float32)
    if grid.ndim != 3:
        raise UserError(f"A grid to resize must have the shape [h, w, D], not {list(grid.shape)}.")
    weights = _mode(mode)
    _check_size(grid.shape[:2])
    _check_size(size)
    if grid.shape[:2] == tuple(size):
        return grid
    rows, columns = (weights(old, new) for old, new in zip(grid.shape[:2], size, strict=True))
    return _apply(rows, columns, grid)


def resize_position_embedding(
    embedding: np.ndarray,
    *,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    prefix: int,
    mode: str,
) -> np.ndarray:
    """Resizes a learned position embedding in two dimensions (ViT paper, 3.2).

    Args:
      embedding: [1, P + h*w, D], the grid row by row after the prefix.
      old_grid: (h, w), the patches it was made for.
      new_grid: (H, W), the patches it is resized to.
      prefix: P, leading rows that belong to no patch (class token, registers) and are kept.
      mode: see `resize_grid`.

    Returns:
      float32 [1, P + H*W, D].

    Raises:
      UserError: the embedding does not have P + h*w rows, or as `resize_grid`.
    """
    embedding = np.asarray(embedding, np.float32)
    _check_size(old_grid)
    h, w = old_grid
    if embedding.ndim != 3 or embedding.shape[:2] != (1, prefix + h * w) or prefix < 0:
        raise UserError(
            f"A position embedding for {h} x {w} patches after {prefix} other tokens must have the "
            f"shape [1, {prefix + h * w}, D], not {list(embedding.shape)}."
        )
    tokens, grid = embedding[:, :prefix], embedding[0, prefix:].reshape(h, w, -1)
    grid = resize_grid(grid, new_grid, mode)
    return np.concatenate([tokens, grid.reshape(1, -1, grid.shape[-1])], axis=1)


def resize_patch_kernel(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes the patch embedding so that resized patches embed as the original ones did.

    FlexiViT's pseudo-inverse resize (arXiv 2212.08013, 3.4), equal to timm's `resample_patch_embed`
    with bilinear, antialias=False. With B the resize of a patch, the kernel is pinv(B^T) times the
    old one; B is the Kronecker product of its axes' matrices, and so is the pseudo-inverse.

    Args:
      kernel: [p, q, C, D].
      size: (P, Q).

    Returns:
      float32 [P, Q, C, D]; the same bits if the size does not change.

    Raises:
      UserError: `kernel` or `size` has another form.
    """
    kernel = _as_kernel(kernel)
    _check_size(size)
    if kernel.shape[:2] == tuple(size):
        return kernel
    rows, columns = (
        np.linalg.pinv(_bilinear(old, new).T)
        for old, new in zip(kernel.shape[:2], size, strict=True)
    )
    return _apply(rows, columns, kernel)


def adapt_input_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Makes a first convolution take another number of channels (timm's `adapt_input_conv`).

    One channel gets the sum, as if a grey image were shown as colours. Otherwise the channels are
    repeated in order and scaled by C/channels, which keeps the response to a grey image where
    `channels` is a multiple of C.

    Args:
      kernel: [p, q, C, D].
      channels: the new number of channels.

    Returns:
      float32 [p, q, channels, D]; the same bits if their number does not change.

    Raises:
      UserError: `kernel` is no kernel, or `channels` is less than 1.
    """
    kernel = _as_kernel(kernel)
    if channels < 1:
        raise UserError(f"A model needs at least one input channel, not {channels}.")
    old = kernel.shape[2]
    if channels == old:
        return kernel
    exact = kernel.astype(np.float64)
    if channels == 1:
        return exact.sum(axis=2, keepdims=True).astype(np.float32)
    return (exact[:, :, np.arange(channels) % old] * (old / channels)).astype(np.float32)


def _corner_aligned(old: int, new: int) -> np.ndarray:
    return _triangle(np.linspace(0, old - 1, new), old)


def _bilinear(old: int, new: int) -> np.ndarray:
    return _triangle(np.clip(_centres(old, new), 0, old - 1), old)


def _bicubic(old: int, new: int) -> np.ndarray:
    """Keys' kernel with a = -0.75; beyond the edge, the outermost value is repeated."""
    weights = _cubic(_centres(old, new)[:, None] - np.arange(-2, old + 2), a=-0.75)
    inside = weights[:, 2:-2].copy()
    inside[:, 0] += weights[:, :2].sum(axis=1)
    inside[:, -1] += weights[:, -2:].sum(axis=1)
    return inside


def _bicubic_antialias(old: int, new: int) -> np.ndarray:
    """Keys' kernel with a = -0.5, stretched when shrinking; cut off at the edge and normalised."""
    stretch = max(old / new, 1)
    weights = _cubic((_centres(old, new)[:, None] - np.arange(old)) / stretch, a=-0.5)
    return weights / weights.sum(axis=1, keepdims=True)


_MODES = {
    "corner_aligned": _corner_aligned,
    "bilinear": _bilinear,
    "bicubic_antialias": _bicubic_antialias,
    "bicubic": _bicubic,
}
POSITION_MODES = tuple(_MODES)


def _centres(old: int, new: int) -> np.ndarray:
    """Where the centres of the new pixels lie among the old ones, which lie at 0 to old - 1."""
    return (np.arange(new) + 0.5) * (old / new) - 0.5


def _triangle(positions: np.ndarray, old: int) -> np.ndarray:
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(old)))


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """R. Keys, Cubic convolution interpolation for digital image processing (1981), eq. 15."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _apply(rows: np.ndarray, columns: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """rows [H, h], columns [W, w] and grid [h, w, ...] to float32 [H, W, ...]."""
    grid = np.tensordot(rows, grid.astype(np.float64), axes=1)
    grid = np.moveaxis(np.tensordot(columns, grid, axes=(1, 1)), 0, 1)
    return np.ascontiguousarray(grid, np.float32)


def _mode(name: str) -> Callable[[int, int], np.ndarray]:
    if name not in _MODES:
        raise UserError(f"There is no resize mode {name!r} for position embeddings, only "
                        f"{', '.join(_MODES)}{did_you_mean(name, _MODES)}")
    return _MODES[name]


def _as_kernel(kernel: np.ndarray) -> np.ndarray:
    kernel = np.asarray(kernel, np.float32)
    if kernel.ndim != 4 or 0 in kernel.shape:
        raise UserError(f"A patch kernel must have the shape [p, q, C, D], not "
                        f"{list(kernel.shape)}.")
    return kernel


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or any(n < 1 for n in size):
        raise UserError(f"A grid must have a height and a width of at least 1, not {tuple(size)}.")
