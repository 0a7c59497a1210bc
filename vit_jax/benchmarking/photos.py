"""JPEG files to decode: a folder of the user's, or synthetic ones of ImageNet's usual size."""

from pathlib import Path

import numpy as np
from PIL import Image

from vit_jax.data.folder import list_images
from vit_jax.data.records import Record, read_file
from vit_jax.errors import UserError

_MADE = 256  # files, 24 MB
_RECORDS = 1_000_000


class Photos:
    """The JPEG files of a folder and the folders in it, again and again, as an unlabelled `Source`
    of a million records: as many as pretraining has, so that what depends on their number (the
    shuffle) takes the time that it takes there."""

    split, class_names = "train", ("photo",)

    def __init__(self, folder: Path):
        """Raises UserError where there are none."""
        self.name = f"photos of {folder}"
        found = list_images(str(folder)) if folder.is_dir() else []
        self.paths = [path for path in found if path.lower().endswith((".jpg", ".jpeg"))]
        if not self.paths:
            raise UserError(f"--images={folder} holds no .jpg or .jpeg files.")

    def __len__(self) -> int:
        return _RECORDS

    def __getitem__(self, index: int) -> Record:
        path = self.paths[index % len(self.paths)]
        return Record(read_file(path), 0, path)

    def labels(self) -> np.ndarray:
        return np.zeros(len(self), np.int32)


def make_photos(folder: Path) -> None:
    """Writes 256 JPEGs of 500x375 pixels, blurred colours with noise. Only their size, about 95 kB,
    is that of ImageNet's photos."""
    generator = np.random.default_rng(0)
    for i in range(_MADE):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
        pixels = np.clip(smooth + generator.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.jpg", quality=92)
