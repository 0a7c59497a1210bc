"""What every source has in common: records, splits, and a fair way to hold some images out."""

import os
import resource
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np

from vit_jax.errors import UserError, did_you_mean


class Record(NamedTuple):
    """One labelled image."""

    image: bytes | np.ndarray  # an encoded file, or uint8 [H, W, 3]
    label: int
    origin: str  # for messages: the file, or the record of the data set


_OTHER_OPEN_FILES = 512  # another split's among them


def read_file(path: str) -> bytes:
    """All of a file, in four system calls where `open` takes nine: at each of them, a decoding
    thread may have to wait for the global interpreter lock. Raises OSError."""
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        data = os.read(file, size)
        while len(data) < size and (more := os.read(file, size - len(data))):  # 2 GiB at a time
            data += more
        return data
    finally:
        os.close(file)


def allow_open_files(count: int, what: str, advice: str) -> None:
    """Allows this process to have `count` files (or sockets) open, besides some others.

    The usual limit of 1024 is a soft limit, which a process may raise up to the hard limit.

    Args:
      count: how many.
      what: needs them, for the message.
      advice: another way, for the message.

    Raises:
      UserError: the hard limit is too low as well.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_OPEN_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if allowed <= count:
        raise UserError(f"{what} needs {count} open files at once, but only {allowed} are allowed; "
                        f"raise the limit (ulimit -n {wanted}), or {advice}.")
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


class Source(Protocol):
    """Random access to one split. Can be pickled; `__getitem__` is called from many threads."""

    name: str  # for messages: "folder:/data/cats split 'train'"
    split: str
    class_names: tuple[str, ...]  # the same for every split

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def labels(self) -> np.ndarray | None:
        """int32 [len]; None where that would mean reading a very large data set."""
        ...

    def identity(self) -> str:
        """Identifies the images, their order and their labels, independent of where they are
        stored. A run that resumed with a different one might train on images it was tested on."""
        ...


class DataSet(Protocol):
    """What a source string names, before a split is chosen."""

    def default_eval_split(self) -> str:
        """The split to evaluate on where the user names none; UserError where there is none."""
        ...

    def open(self, split: str) -> Source:
        """One split; UserError where it does not exist or cannot be used."""
        ...


def missing_split(where: str, split: str, splits: Iterable[str], *, slices: bool = False):
    """The UserError for a split that `where` does not have."""
    splits = list(splits)
    hint = did_you_mean(split, splits)
    if "[" in split and not slices:
        hint = "; slices such as 'train[:90%]' are for tfds: sources only."
    return UserError(f"{where} has no split {split!r}, only {', '.join(map(repr, splits))}{hint}")


def stratified_split(
    labels: np.ndarray, one_in: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Holds out one image in `one_in`, of every class in proportion.

    `ceil(n / one_in)` images are held out: of each class the whole part of its share, and one more
    of the classes with the largest remainders. A class with one image keeps it, so where most
    classes have only one, fewer are held out.

    Args:
      labels: int [n], classes counted from 0.
      one_in: 10 holds out a tenth.
      seed: chooses the images.

    Returns:
      The indices kept and the indices held out, both ascending; together every index once.
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels)
    quota, remainder = counts // one_in, counts % one_in
    wanted = -(-len(labels) // one_in) - quota.sum()
    by_remainder = np.argsort(-remainder, kind="stable")
    quota[by_remainder[counts[by_remainder] > 1][:wanted]] += 1

    rng = np.random.default_rng(seed)
    held_out = [
        rng.permutation(np.flatnonzero(labels == label))[:quota[label]]
        for label in range(len(counts))
    ]
    held_out = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out
