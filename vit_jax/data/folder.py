"""`folder:PATH`: one subfolder of images per class.

    PATH/cat/*.jpg  PATH/dog/*.jpg                     split 90/10, the same way every time
    PATH/train/cat/*.jpg ... PATH/val/cat/*.jpg ...    split by the user: train, and one of
                                                       EVAL_SPLITS
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable

import numpy as np

from vit_jax.buckets import refuse_bucket
from vit_jax.data.records import Record, missing_split, read_file, stratified_split
from vit_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif")

_UNREAD = (".avif", ".heic", ".heif", ".jp2", ".tif", ".tiff")  # images all the same
EVAL_SPLITS = ("val", "valid", "validation", "test")  # the first of them that there is
_SPLITS = ("train", "val", "test")
_LOOKS_LIKE_A_SPLIT = {
    "train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing",
}


class Folder:
    """A folder of labelled images, with split folders or without."""

    def __init__(self, path: str):
        """Raises UserError unless `path` is a readable folder with at least two classes."""
        if not path:
            raise UserError("config.data.source='folder:' needs a path: folder:PATH.")
        refuse_bucket("config.data.source", path)
        self._path = os.path.abspath(os.path.expanduser(path))
        self._where = f"folder:{self._path}"
        if not os.path.isdir(self._path):
            problem = "is not a folder" if os.path.exists(self._path) else "does not exist"
            raise UserError(
                f"{self._where} {problem}; give the folder that holds one subfolder of images per "
                "class."
            )
        self._folders = subfolders(self._path)
        # A class may be called "train" too: its folder holds images, a split's holds classes.
        self._has_splits = bool(self._folders) and (
            set(self._folders) <= set(_SPLITS)
            or ("train" in self._folders and bool(subfolders(self._join("train"))))
        )
        self._class_names = self._find_classes()
        self._splits_by_itself = not self._has_splits or self._folders == ["train"]
        self._parts = None

    def eval_split(self) -> str | None:
        """The split to evaluate on, if one can be told by its name."""
        for split in EVAL_SPLITS:  # of other names than ours it may also be something else
            if split in self.split_names() and (
                    split in _SPLITS or subfolders(self._join(split))):
                return split
        return None

    def default_eval_split(self) -> str:
        """The same; UserError if there is none."""
        if split := self.eval_split():
            return split
        raise UserError(
            f"{self._where} has no folder of classes {', '.join(map(repr, EVAL_SPLITS))} beside "
            f"{', '.join(map(repr, self._folders))}; add one, name the evaluation split with "
            f"config.data.eval_split, or use folder:{self._join('train')} to have a tenth held out."
        )

    def open(self, split: str) -> "FolderSplit":
        if split not in self.split_names():
            raise missing_split(self._where, split, self.split_names())
        if self._splits_by_itself:
            paths, labels = self._stratified()[split]
        else:
            root = self._join(split)
            self._check_classes(split)
            paths, labels = _labelled_images(root, self._class_names, subfolders(root))
        return FolderSplit(self._path, split, self._class_names, paths, labels)

    def _join(self, *names: str) -> str:
        return os.path.join(self._path, *names)

    def split_names(self) -> list[str]:
        """What `open` takes."""
        return ["train", "val"] if self._splits_by_itself else self._folders

    def _find_classes(self) -> tuple[str, ...]:
        """Sorted class names. With split folders these are the classes of `train`: the model is
        trained on them, whichever split is evaluated."""
        if not self._has_splits:
            names, root = self._folders, self._path
            splits = [name for name in names if name.lower() in _LOOKS_LIKE_A_SPLIT]
            # A class may be called so too, but hardly two, with folders inside.
            if splits and (splits == names or len(splits) > 1 and any(
                    map(subfolders, map(self._join, splits)))):
                raise UserError(
                    f"{self._where}: the folders {', '.join(map(repr, splits))} look like splits, "
                    "not like classes; call them 'train', 'val' and 'test'."
                )
        elif "train" in self._folders:
            root = self._join("train")
            names = subfolders(root)
        else:
            root = self._join(self._folders[0])
            names = sorted({name for split in self._folders
                            for name in subfolders(self._join(split))})
        if not names:
            raise _no_classes(self._where, root)
        if len(names) == 1:
            raise UserError(
                f"{self._where}: {root} has only one class, {names[0]!r}; a classifier needs one "
                "subfolder for each of at least two classes."
            )
        if self._has_splits:
            for split in {*EVAL_SPLITS} & {*self._folders}:
                self._check_classes(split, names)
        return tuple(names)

    def _check_classes(self, split: str, names: Iterable[str] | None = None) -> None:
        unknown = sorted(set(subfolders(self._join(split))) - set(names or self._class_names))
        if unknown:
            raise UserError(
                f"{self._where}: class {unknown[0]!r} is in {self._join(split)} but not in "
                f"{self._join('train')}; add training images or remove the folder "
                f"{self._join(split, unknown[0])}."
            )

    def _stratified(self) -> dict[str, tuple[list[str], np.ndarray]]:
        """{'train', 'val'} -> paths and labels, where the user made no split."""
        if self._parts is None:
            root = self._join("train") if self._has_splits else self._path
            paths, labels = _labelled_images(root, self._class_names, self._class_names)
            parts = stratified_split(labels, one_in=10)
            if not len(parts[1]):
                raise UserError(
                    f"{self._where}: no class has a second image that could be held out for "
                    "evaluation; add images, or split them yourself into 'train' and 'val' folders."
                )
            self._parts = {
                split: ([paths[i] for i in indices], labels[indices])
                for split, indices in zip(("train", "val"), parts, strict=True)
            }
        return self._parts


class FolderSplit:
    """The images of one split; files are read when they are asked for."""

    def __init__(self, root: str, split: str, class_names: tuple[str, ...], paths: list[str],
                 labels: np.ndarray):
        """`paths` n files in `root`, `labels` int32 [n] into `class_names`."""
        self.name = f"folder:{root} split {split!r}"
        self._root = root
        self.split = split
        self.class_names = class_names
        self.paths = paths
        self._labels = labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        """Raises UserError for a file that cannot be read: unlike one that cannot be decoded, it
        may be readable tomorrow, and leaving it out would change the run."""
        path = self.paths[index]
        try:
            data = read_file(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        return Record(data, int(self._labels[index]), path)

    def labels(self) -> np.ndarray:
        return self._labels

    def identity(self) -> str:
        names = "\0".join(path[len(self._root):] for path in self.paths)
        listed = hashlib.sha256(names.encode("utf-8", "surrogateescape"))
        listed.update(self._labels.tobytes())
        return listed.hexdigest()


def _labelled_images(
    root: str, class_names: tuple[str, ...], present: Iterable[str]
) -> tuple[list[str], np.ndarray]:
    """Paths [n] and labels int32 [n] of the classes `present` under `root`, class by class."""
    paths, labels, unread = [], [], Counter()
    present = set(present)
    if not present:
        raise _no_classes(f"folder:{root}", root)
    for label, name in enumerate(class_names):
        if name not in present:
            continue
        folder = os.path.join(root, name)
        images = list_images(folder, unread=unread)
        if not images:
            raise UserError(
                f"class {name!r} is empty: {folder} holds no {_extensions()} file; add images or "
                "remove the folder."
            )
        paths += images
        labels += [label] * len(images)
    if unread:
        logging.getLogger(__name__).warning(
            "folder:%s: images in formats that are not read are left out (%s); convert them to "
            "JPEG or PNG to use them", root,
            ", ".join(f"{number:,} {extension}" for extension, number in sorted(unread.items())))
    return paths, np.array(labels, np.int32)


def list_images(folder: str, inside: frozenset[str] = frozenset(),
                unread: Counter | None = None) -> list[str]:
    """The images in a folder and its subfolders, in an order that does not depend on the file
    system.

    Args:
      folder: its path.
      inside: real paths of the folders around it.
      unread: counts files of other image formats, by extension.
    """
    here = os.path.realpath(folder)
    if here in inside:  # a symbolic link to one of its own parents
        return []
    found = []
    for entry in _entries(folder):
        if is_folder(entry):
            found += list_images(entry.path, inside | {here}, unread)
        elif entry.name.lower().endswith(EXTENSIONS):
            found.append(entry.path)
        elif unread is not None and entry.name.lower().endswith(_UNREAD):
            unread[os.path.splitext(entry.name)[1].lower()] += 1
    return found


def is_visible(name: str) -> bool:
    """Whether a name is neither hidden nor left in a zip file by macOS."""
    return not name.startswith(".") and name != "__MACOSX"


def subfolders(folder: str) -> list[str]:
    """The names of the folders in a folder, in order."""
    return [entry.name for entry in _entries(folder) if is_folder(entry)]


def is_folder(entry: os.DirEntry) -> bool:
    """Whether it is one, or a link to one.

    Raises:
      UserError: a link that leads to itself, for example.
    """
    try:
        return entry.is_dir()
    except OSError as error:
        raise _unreadable(entry.path, error) from error


def _entries(folder: str) -> list[os.DirEntry]:
    """What is in a folder, by name, without what is hidden."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if is_visible(entry.name)]
    except OSError as error:
        raise _unreadable(folder, error) from error
    return sorted(visible, key=lambda entry: entry.name)


def _no_classes(where: str, root: str) -> UserError:
    loose = [entry for entry in _entries(root) if entry.name.lower().endswith(EXTENSIONS)]
    what = f"{len(loose)} images lie directly in it" if loose else "it has no subfolders"
    return UserError(
        f"{where}: no classes in {root}: {what}; move the images of each class into a subfolder "
        "named after the class."
    )


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be read ({error.strerror or error}); check its permissions and the disk."
    )


def _extensions() -> str:
    return ", ".join(EXTENSIONS[:-1]) + " or " + EXTENSIONS[-1]
