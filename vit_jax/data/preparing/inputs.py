"""The interface of all forms of raw data, and the records that are made from it."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from tensorflow_datasets.proto import tf_example_pb2

from vit_jax.data.tfds import import_tfds


class Item(NamedTuple):
    """One labelled image, as it was found."""

    example: tf_example_pb2.Example  # `image` (a file), `label`, and what else is known of it
    origin: str  # for the report: where it was found
    serialized: bytes | None = None  # the example, where it came in this form

    @property
    def image(self) -> bytes:
        return self.example.features.feature["image"].bytes_list.value[0]

    @property
    def label(self) -> int:
        return self.example.features.feature["label"].int64_list.value[0]


class Input(Protocol):
    """Random access to raw data. Reading is done from many threads."""

    where: str  # for messages
    data_set: str  # the name it would have: NAME, or NAME/CONFIG
    version: str
    class_names: tuple[str, ...]
    splits: dict[str, int]  # images of each
    shuffled: bool  # whether the records are shuffled already, so that they keep their order
    left_out: Sequence[str]  # names of what lies in `where` and is not read

    def digest(self) -> str:
        """Identifies what is read and in which order; a different digest means different data."""
        ...

    def read(self, split: str, index: int) -> Item:
        """One image.

        Raises:
          BadImageError: what is there is damaged.
          OSError: it cannot be read.
        """
        ...

    def write_features(self, folder: Path, *, any_size: bool) -> dict:
        """Writes features.json and label.labels.txt, which say what a record holds.

        Args:
          folder: where to.
          any_size: images were shrunk, so a fixed shape that the input promised does not hold.

        Returns:
          What dataset_info.json should say beside name, version, form and splits.
        """
        ...


def make_example(image: bytes, label: int, file_name: str) -> tf_example_pb2.Example:
    """A record in the form of TFDS's imagenet2012: `image`, `label`, `file_name`."""
    example = tf_example_pb2.Example()
    features = example.features.feature
    features["image"].bytes_list.value.append(image)
    features["label"].int64_list.value.append(label)
    features["file_name"].bytes_list.value.append(os.fsencode(file_name))
    return example


def write_features(folder: Path, class_names: tuple[str, ...]) -> dict:
    """`Input.write_features` for the records of `make_example`."""
    tfds = import_tfds()
    tfds.features.FeaturesDict({
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(names=class_names),
        "file_name": tfds.features.Text(),
    }).save_config(str(folder))
    return {}


def digest(entries: Iterable[object]) -> str:
    """The SHA-256 of a listing."""
    sha256 = hashlib.sha256()
    for entry in entries:
        sha256.update(
            entry if isinstance(entry, bytes) else repr(entry).encode("utf-8", "surrogateescape"))
    return sha256.hexdigest()
