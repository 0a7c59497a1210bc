"""Image files as the input of a loaded model: finding them, and batches of them."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from vit_jax.config import base_config
from vit_jax.data.folder import EXTENSIONS
from vit_jax.data.pipeline import BadImages, eval_batches
from vit_jax.data.records import Record
from vit_jax.errors import UserError


class Unreadable(BadImages):
    """Names every image that cannot be read once, on stderr."""

    def __init__(self):
        super().__init__("skip")
        self.not_found = 0  # of those that were asked for

    def report(self, origin: str, reason: str | Exception) -> None:
        if isinstance(reason, OSError):
            reason = reason.strerror or reason
        with self._lock:
            new = origin not in self.origins
            self.origins.add(origin)
        if new:
            print(f"{origin} cannot be read: {reason}", file=sys.stderr, flush=True)

    def check(self, paths: list[str]) -> None:
        """Raises UserError if any was reported; `paths` are the files that were found."""
        if self.count:
            images = len(paths) + self.not_found
            raise UserError(f"{self.count} of {images} images could not be read.")


def find_images(arguments: list[str], unreadable: Unreadable) -> list[str]:
    """The files that were given, and those in the given directories (recursively), by name; hidden
    ones are left out.

    Raises:
      UserError: there are none.
    """
    paths = []
    for argument in arguments:
        argument = os.path.expanduser(argument)
        if not os.path.isdir(argument):
            if os.path.exists(argument):
                paths.append(argument)
            else:
                unreadable.not_found += 1
                unreadable.report(argument, FileNotFoundError("it does not exist"))
            continue

        def fail(error):
            unreadable.not_found += 1
            unreadable.report(error.filename, error)

        seen = set()
        for folder, folders, files in os.walk(argument, onerror=fail, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:  # as by a link to one of its parents
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            paths += [os.path.join(folder, name) for name in sorted(files)
                      if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    if not paths and not unreadable.count:
        raise UserError(f"There are no images in {', '.join(arguments)}, that is, no files that "
                        f"end in {', '.join(EXTENSIONS)}.")
    return paths


def eval_config(preprocessing: dict[str, Any]) -> ml_collections.ConfigDict:
    """A config whose evaluation preprocesses images as `preprocessing` of `Loaded.metadata`."""
    config = base_config()
    config.data.image_size = tuple(preprocessing["image_size"])
    config.data.eval_crop = preprocessing["crop"]
    config.data.eval_resize = preprocessing["resize"]
    config.data.antialias = preprocessing["antialias"]
    config.data.interpolation = preprocessing["interpolation"]
    return config


def batches_of(
    paths: list[str], preprocessing: dict[str, Any], unreadable: Unreadable, batch_size: int
) -> Iterator[tuple[np.ndarray, list[tuple[int, str]]]]:
    """The files as a model sees them, before its pixels are normalised.

    Args:
      paths: files.
      preprocessing: of `Loaded.metadata`.
      unreadable: is told of those that cannot be read.
      batch_size: images at once, at most.

    Yields:
      images uint8 [B, H, W, 3] with the same B throughout, and (row, path) of those that could be
      read; the other rows are black.
    """
    config = eval_config(preprocessing)
    config.data.worker_kind = "thread"  # `_Files` tells `unreadable`, which is in this process
    size = tuple(preprocessing["image_size"])
    batch_size = max(1, min(batch_size, len(paths)))
    source = _Files(paths, unreadable)
    batches = eval_batches(source, config, size, unreadable, batch_size=batch_size)
    for number, batch in enumerate(batches):
        rows = np.flatnonzero(batch["mask"])
        yield batch["image"], [(row, paths[number * batch_size + row]) for row in rows]


class _Files:
    """Images without labels, as a source of batches."""

    def __init__(self, paths, unreadable):
        self._paths = paths
        self._unreadable = unreadable

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        path = self._paths[index]
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            self._unreadable.report(path, error)
            data = b""  # will not be decoded, which is no news then
        return Record(data, 0, path)
