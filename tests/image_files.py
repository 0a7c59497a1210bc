"""Small made images, and files of them."""

import io

import numpy as np
from PIL import Image


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def edged_photo(height=37, width=53, seed=0) -> Image.Image:
    """Smooth colours with an edge, so that chroma upsampling matters and no two sides are alike."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    pixels[: height // 3, : width // 4] = (250, 10, 60)
    return Image.fromarray(pixels)


def encode(
    image: np.ndarray | Image.Image, form: str = "JPEG", mode: str | None = None, **options
) -> bytes:
    """An image file made by Pillow."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, form, **options)
    return file.getvalue()
