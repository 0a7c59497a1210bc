"""A folder of images, one subfolder per class."""

import os
import re
from pathlib import Path

from vit_jax.data.folder import Folder
from vit_jax.data.preparing.inputs import Item, digest, make_example, write_features
from vit_jax.errors import UserError


class FolderInput:
    """A folder of images, as `folder:PATH` reads it: the same classes, splits and order.

    Where the user made no split, a tenth of every class becomes the split `validation`, the same
    images that `folder:PATH` evaluates on.
    """

    version = "1.0.0"
    shuffled = False

    def __init__(self, path: str):
        """Raises UserError where `path` is no folder of classes."""
        folder = Folder(path)
        self.where = self._root = os.path.abspath(path)  # which all paths begin with
        self.data_set = os.path.basename(self._root)
        names = folder.split_names()
        for name in names:
            if not re.fullmatch(r"[\w\-]+", name) or name == "all":
                raise UserError(f"{self.where}: TFDS cannot have a split called {name!r}; rename "
                                "the folder.")
        renamed = {} if "validation" in names else {"val": "validation"}  # as TFDS calls it
        self._splits = {renamed.get(name, name): folder.open(name) for name in names}
        self.class_names = next(iter(self._splits.values())).class_names
        self.splits = {name: len(split) for name, split in self._splits.items()}

    def digest(self) -> str:
        return digest(
            (name, label, self._name(path))
            for name, split in self._splits.items()
            for path, label in zip(split.paths, split.labels().tolist(), strict=True))

    def read(self, split: str, index: int) -> Item:
        source = self._splits[split]
        path = source.paths[index]
        with open(path, "rb") as file:
            data = file.read()
        name = self._name(path)
        return Item(make_example(data, int(source.labels()[index]), name), name)

    def write_features(self, folder: Path, *, any_size: bool) -> dict:
        return write_features(folder, self.class_names)

    def _name(self, path: str) -> str:
        return path[len(self._root) + 1:]
