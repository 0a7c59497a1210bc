"""A folder of images, one subfolder per class."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from vit_jax.data.folder import EVAL_SPLITS, Folder, FolderSplit, list_images, subfolders
from vit_jax.data.preparing.inputs import Item, digest, make_example, write_features
from vit_jax.errors import UserError


class FolderInput:
    """A folder of images, as `folder:PATH` reads it: the same classes, splits and order.

    Where the user made no split, a tenth of every class becomes the split `validation`, the same
    images that `folder:PATH` evaluates on. Folders beside the splits that hold no images by class
    are left out.
    """

    version = "1.0.0"
    shuffled = False

    def __init__(self, path: str, beside: Sequence[str] = ()):
        """`beside`: names of what is left out as well.

        Raises:
          UserError: `path` is no folder of classes, or a split has others than `train`.
        """
        self.where = self._root = os.path.abspath(path)  # which all paths begin with
        self.data_set = os.path.basename(self._root)
        folder = Folder(path)
        opened, without_classes = self._open(folder)
        self.left_out = (*without_classes, *beside)
        if without_classes and list(opened) == ["train"]:
            folder = Folder(os.path.join(path, "train"))
            opened = {name: folder.open(name) for name in folder.split_names()}
        for name in opened:
            if not re.fullmatch(r"[\w\-]+", name) or name == "all":
                raise UserError(f"{self.where}: TFDS does not allow a split called {name!r}; "
                                "rename the folder.")
        called = [name for name in EVAL_SPLITS if name in opened and name != "test"][:1]
        renamed = {name: "validation" for name in called if "validation" not in opened}  # as TFDS
        self._splits = {renamed.get(name, name): split for name, split in opened.items()}
        self.class_names = next(iter(self._splits.values())).class_names
        self.splits = {name: len(split) for name, split in self._splits.items()}

    def _open(self, folder: Folder) -> tuple[dict[str, FolderSplit], list[str]]:
        """Splits, and the names of folders that are none, which training does not open."""
        names = folder.split_names()
        needed = ("train", folder.eval_split())
        splits, others = {}, []
        for name in names:
            try:
                splits[name] = folder.open(name)
            except UserError:
                if name in needed or _holds_classes(os.path.join(self._root, name)):
                    raise
                others.append(name)
        return splits, others

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


def _holds_classes(folder: str) -> bool:
    """Whether images lie in its subfolders, of whatever names."""
    return any(list_images(os.path.join(folder, name)) for name in subfolders(folder))
