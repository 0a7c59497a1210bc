"""A prepared data set on its way: which record goes where, and files that appear when complete.

    FOLDER/prepare.json                                     what is being prepared, with which flags
    FOLDER/NAME-SPLIT.array_record-00000-of-00012           records; there once it is complete
    FOLDER/progress/SPLIT-00000-of-00012.json               what went into it, after it
    FOLDER/features.json, label.labels.txt, bad_files.txt   when all of these are there
    FOLDER/dataset_info.json                                last: from here on TFDS sees a data set

What is in a file depends on the input and the flags alone. So any number of processes may write at
once, in any order and interrupted anywhere: the same file written twice is the same file.
"""

import collections
import contextlib
import dataclasses
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from vit_jax.data.decode import BadImageError
from vit_jax.data.preparing.inputs import Input
from vit_jax.data.preparing.shrinking import fit_image
from vit_jax.errors import UserError

# A reader decompresses a whole group to get at one record, so random access wants groups of one;
# compression finds nothing in JPEGs (0.1% of their bytes).
_WRITER_OPTIONS = "group_size:1,uncompressed"
# A file is written by one thread and begun again when interrupted: small data sets have small ones.
_FEWEST_RECORDS = 128  # in a file, unless the split is smaller
_ENOUGH_FILES = 64  # of a split, from which on they grow
_ENOUGH_RECORDS = 4096  # in a file, from which on there are more of them
_MOST_FILES = 512  # of a split: a training process holds them all open, and 1024 is a usual limit


class Interrupted(Exception):
    """`stop` was set; the file that was being written is gone."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What determines the contents of the files, besides the input."""

    resize: int | None = None  # pixels of the short side
    quality: int = 95
    records_per_file: int | None = None  # None: see `divide`


@dataclasses.dataclass(frozen=True)
class OutputFile:
    """A file of records: those at [start, stop) of a split's order."""

    split: str
    number: int
    count: int
    start: int
    stop: int

    @property
    def suffix(self) -> str:
        return f"{self.number:05d}-of-{self.count:05d}"


@dataclasses.dataclass
class Tally:
    """What went into a file, or into several."""

    images: int = 0
    bytes_in: int = 0  # of images, those left out included
    bytes_out: int = 0  # of serialized records
    file_bytes: int = 0
    labels: dict[int, int] = dataclasses.field(default_factory=collections.Counter)
    bad: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # where, why

    def add(self, other: "Tally") -> None:
        for field in ("images", "bytes_in", "bytes_out", "file_bytes"):
            setattr(self, field, getattr(self, field) + getattr(other, field))
        self.labels.update(other.labels)
        self.bad += other.bad

    def to_json(self) -> str:
        return json.dumps({**vars(self), "labels": list(self.labels.items())})

    @classmethod
    def from_json(cls, text: str) -> "Tally":
        values = json.loads(text)
        return cls(**values | {"labels": collections.Counter(dict(values["labels"])),
                               "bad": [tuple(entry) for entry in values["bad"]]})


class Preparation:
    """One data set in the making."""

    def __init__(self, source: Input, out: Path, data_set: str, options: Options):
        """`data_set` is NAME or NAME/CONFIG, of which the files are named after NAME.

        Raises:
          UserError: TFDS could not store the names of the classes.
        """
        check_class_names(source.class_names)
        self.source = source
        self.options = options
        self.out = out
        self.data_set = data_set
        self.name = data_set.partition("/")[0]
        self.folder = out / data_set / source.version
        self.files = [file for split, images in source.splits.items()
                      for file in divide(split, images, options.records_per_file)]
        self._orders = {split: order(images, source.shuffled)
                        for split, images in source.splits.items()}
        # Two processes, also on two machines, never write to the same temporary file.
        self._mark = f"{socket.gethostname()}.{os.getpid()}"

    def claim(self) -> None:
        """Makes the folder this preparation's.

        Raises:
          UserError: it holds something else, or cannot be written.
        """
        manifest = {"name": self.name, "data": self.source.digest(),
                    **dataclasses.asdict(self.options)}
        path = self.folder / "prepare.json"
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "progress").mkdir(exist_ok=True)
            if (self.folder / "dataset_info.json").exists() and not path.exists():
                raise UserError(f"{self.folder} holds a data set that this command did not make; "
                                "choose another --out or --name.")
            if not path.exists():
                self._write(path, json.dumps(manifest, indent=2) + "\n")
            try:
                before = dict(json.loads(path.read_text("utf-8")))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{path}, which describes what {self.folder} holds, is damaged; delete the "
                    "folder to start over, or choose another --out or --name.") from error
        for key in manifest:
            if before.get(key) != manifest[key]:
                change = "from other files" if key == "data" else (
                    f"with --{key}={before.get(key)}, not {manifest[key]}")
                raise UserError(
                    f"{self.folder} was begun {change}; give the same input and flags to continue "
                    "it, or choose another --out or --name, or delete it.")

    def done(self, file: OutputFile) -> Tally | None:
        """What is in a file; None while it is not complete."""
        try:
            tally = Tally.from_json(self._tally_path(file).read_text("utf-8"))
            if self._path(file).stat().st_size == tally.file_bytes:
                return tally
        except (FileNotFoundError, ValueError):
            pass
        return None

    def write(self, file: OutputFile, stop: threading.Event, advance: Callable[[], None]) -> None:
        """Writes one file, then its tally.

        Args:
          file: one of `files`.
          stop: ends the work between two images.
          advance: is called after every image.

        Raises:
          Interrupted: `stop` was set.
          UserError: an input cannot be read, or the output cannot be written.
        """
        path = self._path(file)
        temporary = self._temporary(path)
        tally = Tally()
        try:
            with _writing(path):
                writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
                for index in self._orders[file.split][file.start:file.stop].tolist():
                    if stop.is_set():
                        raise Interrupted
                    record = self._record(file.split, index, tally)
                    if record is not None:
                        writer.write(record)
                        tally.bytes_out += len(record)
                    advance()
                writer.close()
                with temporary.open("rb") as written:
                    os.fsync(written.fileno())
                tally.file_bytes = temporary.stat().st_size
                temporary.replace(path)
                self._write(self._tally_path(file), tally.to_json())
        except UserError:
            # Another process may have written the same, ended, and removed what it left.
            if self.done(file) is None:
                raise
        finally:
            temporary.unlink(missing_ok=True)

    def _record(self, split: str, index: int, tally: Tally) -> bytes | None:
        """A serialized example, counted; None for an image that was left out."""
        origin = f"{split} record {index}"
        try:
            item = self.source.read(split, index)
            origin = item.origin
            tally.bytes_in += len(item.image)
            image = fit_image(
                item.image, resize=self.options.resize, quality=self.options.quality)
        except BadImageError as error:
            tally.bad.append((origin, str(error)))
            return None
        except OSError as error:
            raise UserError(
                f"{error.filename or self.source.where} cannot be read ({error.strerror}); fix "
                "this and run the command again: completed files are kept.") from error
        tally.images += 1
        tally.labels[item.label] += 1
        if image is item.image and item.serialized:
            return item.serialized
        item.example.features.feature["image"].bytes_list.value[0] = image
        return item.example.SerializeToString(deterministic=True)

    def finish(self, tallies: dict[OutputFile, Tally]) -> None:
        """Writes the metadata that turn the files into a data set.

        Raises:
          UserError: a split has no images.
        """
        splits = []
        for name in self.source.splits:
            parts = [tallies[file] for file in self.files if file.split == name]
            bad = [entry for part in parts for entry in part.bad]
            if not any(part.images for part in parts):
                raise UserError(f"split {name!r} would be empty: none of its images can be used; "
                                f"{bad[0][0]}: {bad[0][1]}.")
            splits.append({
                "name": name,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "shardLengths": [str(part.images) for part in parts],
                "numBytes": str(sum(part.bytes_out for part in parts)),
            })
        bad = [entry for file in self.files for entry in tallies[file].bad]
        path = self.folder / "dataset_info.json"
        with _writing(self.folder):
            scratch = self._temporary(self.folder / "metadata")
            shutil.rmtree(scratch, ignore_errors=True)  # of a killed process with the same number
            scratch.mkdir()
            try:
                info = self.source.write_features(
                    scratch, any_size=self.options.resize is not None)
                if bad:
                    (scratch / "bad_files.txt").write_text(
                        "".join(f"{where}\t{why}\n" for where, why in bad),
                        encoding="utf-8", errors="surrogateescape")
                for written in scratch.iterdir():
                    written.replace(self.folder / written.name)
            except FileNotFoundError:
                # Another process may have written the same, ended, and removed what it left.
                if not path.exists():
                    raise
                return
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            self._write(path, json.dumps(info | {
                "name": self.name,
                "version": self.source.version,
                "fileFormat": "array_record",
                "splits": splits,
            }, indent=2, sort_keys=True))
            for pattern in (f".{self.name}-*.array_record-*", "progress/.*"):
                for left in self.folder.glob(pattern):  # by processes that were killed
                    left.unlink(missing_ok=True)
            for left in self.folder.glob(".metadata.*"):
                shutil.rmtree(left, ignore_errors=True)

    def _path(self, file: OutputFile) -> Path:
        return self.folder / f"{self.name}-{file.split}.array_record-{file.suffix}"

    def _tally_path(self, file: OutputFile) -> Path:
        return self.folder / "progress" / f"{file.split}-{file.suffix}.json"

    def _temporary(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.{self._mark}")

    def _write(self, path: Path, text: str) -> None:
        """The file is whole or not there."""
        temporary = self._temporary(path)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def divide(split: str, images: int, records_per_file: int | None) -> list[OutputFile]:
    """The files of a split, which are equal in size, save for one record.

    Unless it is given, they have 128 records up to 64 files, then up to 4096, and more only where
    there would be over 512 files.
    """
    records_per_file = records_per_file or max(
        _FEWEST_RECORDS, min(-(-images // _ENOUGH_FILES), _ENOUGH_RECORDS),
        -(-images // _MOST_FILES))
    count = -(-images // records_per_file)
    bounds = [number * images // count for number in range(count + 1)]
    return [OutputFile(split, number, count, bounds[number], bounds[number + 1])
            for number in range(count)]


def check_class_names(names: tuple[str, ...]) -> None:
    """Raises UserError for a name that is not a line of text, since they are stored one a line, or
    that two classes have."""
    for name, count in collections.Counter(names).items():
        try:
            name.encode()
            storable = name == name.strip() and len(name.splitlines()) == 1
        except UnicodeEncodeError:  # what the file system holds is not UTF-8
            storable = False
        if not storable:
            raise UserError(f"the class {name!r} has leading or trailing spaces, several lines, or "
                            "bytes that are not text; rename it.")
        if count > 1:
            raise UserError(f"{count} classes are called {name!r}; give each a name of its own.")


def order(images: int, shuffled: bool) -> np.ndarray:
    """int64 [images]: the order in which the images of a split are written.

    Shuffled, so that a file, and a slice such as train[:1%], has all classes. RandomState, because
    NumPy promises that its numbers stay the same in all versions.
    """
    return np.arange(images) if shuffled else np.random.RandomState(0).permutation(images)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns a full disk and the like into a UserError, whether the OS or ArrayRecord reports it."""
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error.strerror or error) from error
    except RuntimeError as error:  # "write() failed: No space left on device; writing ...; at ..."
        raise _unwritable(path, str(error).partition("; ")[0]) from error


def _unwritable(path, reason):
    return UserError(f"{path} cannot be written ({reason}); fix this and run the command again: "
                     "completed files are kept.")
