"""Sources that need no files: handwritten digits, and made-up images for benchmarks."""

import functools
import importlib.util
from pathlib import Path

import numpy as np

from vit_jax.data.records import Record, missing_split, stratified_split


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8: 1,437 to train on and 360 to test."""

    def default_eval_split(self) -> str:
        return "test"

    def open(self, split: str) -> "DigitsSplit":
        images, labels = _digits()
        indices = dict(zip(("train", "test"), stratified_split(labels, one_in=5), strict=True))
        if split not in indices:
            raise missing_split("digits", split, indices)
        chosen = indices[split]
        return DigitsSplit(split, images[chosen], labels[chosen])


class DigitsSplit:
    """One split of the digits, in memory."""

    class_names = tuple("0123456789")

    def __init__(self, split: str, images: np.ndarray, labels: np.ndarray):
        """`images` uint8 [n, 8, 8, 3], `labels` int32 [n]."""
        self.name = f"digits split {split!r}"
        self.split = split
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        return Record(
            self._images[index], int(self._labels[index]), f"{self.name} record {index}"
        )

    def labels(self) -> np.ndarray:
        return self._labels

    def identity(self) -> str:
        return self.name


@functools.lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [1797, 8, 8, 3] and int32 [1797]."""
    # What `sklearn.datasets.load_digits` reads, without the second that importing it takes.
    package = Path(importlib.util.find_spec("sklearn").origin).parent
    rows = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images, labels = rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
    grey = np.rint(images * (255 / 16)).astype(np.uint8)  # the grey levels are 0..16
    return np.repeat(grey[..., None], 3, axis=-1), labels.astype(np.int32)


class Synthetic:
    """As many random images as ImageNet has, in its 1,000 classes: for benchmarks."""

    _LENGTHS = {"train": 1_281_167, "test": 50_000}

    def __init__(self, image_size: tuple[int, int]):
        self._image_size = tuple(image_size)

    def default_eval_split(self) -> str:
        return "test"

    def open(self, split: str) -> "SyntheticSplit":
        if split not in self._LENGTHS:
            raise missing_split("synthetic", split, self._LENGTHS)
        return SyntheticSplit(split, self._LENGTHS[split], self._image_size)


class SyntheticSplit:
    """One split of random images [*image_size, 3]; they repeat, and are the same in every run."""

    class_names = tuple(str(label) for label in range(1000))

    def __init__(self, split: str, length: int, image_size: tuple[int, int]):
        self.name = f"synthetic split {split!r}"
        self.split = split
        self._length = length
        self._image_size = image_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._length:
            raise IndexError(f"{self.name} has no record {index}")
        pool = _noise(self._image_size)
        label = int(index) % len(self.class_names)
        return Record(pool[index % len(pool)], label, f"{self.name} record {index}")

    def labels(self) -> np.ndarray:
        return np.arange(self._length, dtype=np.int32) % len(self.class_names)

    def identity(self) -> str:
        return self.name


# Outside the source, so that a pickled source stays small.
@functools.lru_cache(maxsize=2)
def _noise(image_size: tuple[int, int]) -> np.ndarray:
    """uint8 [64, *image_size, 3], read-only because every record shares it."""
    noise = np.random.default_rng(0).integers(0, 256, (64, *image_size, 3), np.uint8)
    noise.setflags(write=False)
    return noise
