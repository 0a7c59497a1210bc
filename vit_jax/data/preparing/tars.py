"""Tar archives of images, read in place: ImageNet's, and one archive per class.

Members are found from their headers alone and read by seeking, so nothing is unpacked to disk.
"""

import concurrent.futures
import os
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from vit_jax.data.decode import BadImageError
from vit_jax.data.folder import EXTENSIONS, is_visible
from vit_jax.data.preparing.inputs import Item, digest, make_example, write_features
from vit_jax.errors import UserError

_PACKED = re.compile(r"\.(tar\.\w+|tgz|zip)$")  # archives that cannot be read in place

_BLOCK = 512  # POSIX.1-1988 (ustar): headers fill one block, and data are filled up to whole ones
_REGULAR, _LINKS = b"0\0", b"12"
_CHECKSUM = slice(148, 156)
_LONGEST_END = 2**21  # bytes of zeros; of 10,240 unless GNU tar was told otherwise
_EXTENSIONS = tuple(extension.encode() for extension in EXTENSIONS)
_READERS = 16  # threads that list archives, for file systems that answer late


class Archive(NamedTuple):
    """A tar file, or one that lies in another."""

    path: str
    start: int = 0  # bytes
    end: int | None = None  # None: that of the file
    name: str = ""  # of the inner one


class Members(NamedTuple):
    """Images in archives."""

    paths: list[str]  # of the archives
    archive: np.ndarray  # int32 [n], index into `paths`
    offset: np.ndarray  # int64 [n], bytes, of the header
    label: np.ndarray  # int32 [n]


class TarInput:
    """Images in tar files."""

    version = "1.0.0"
    shuffled = False
    left_out = ()

    def __init__(self, where: str, data_set: str, class_names: Sequence[str],
                 members: dict[str, Members]):
        """`members` by split."""
        self.where = where
        self.data_set = data_set
        self.class_names = tuple(class_names)
        self.splits = {split: len(part.label) for split, part in members.items()}
        self._members = members

    def digest(self) -> str:
        def entries():
            for split, members in self._members.items():
                yield split
                yield [(os.path.basename(path), os.path.getsize(path)) for path in members.paths]
                yield from (array.tobytes() for array in members[1:])

        return digest(entries())

    def read(self, split: str, index: int) -> Item:
        members = self._members[split]
        path = members.paths[members.archive[index]]
        offset = int(members.offset[index])
        with open(path, "rb") as file:
            file.seek(offset)
            try:
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    member = archive.next()
                    data = archive.extractfile(member).read()
            except (tarfile.TarError, AttributeError) as error:
                raise BadImageError(f"the archive is damaged at byte {offset} ({error})") from error
        name = os.path.basename(member.name)
        return Item(make_example(data, int(members.label[index]), name),
                    f"{os.path.basename(path)}: {member.name}")

    def write_features(self, folder: Path, *, any_size: bool) -> dict:
        return write_features(folder, self.class_names)


def open_class_tars(path: str) -> TarInput:
    """A folder of archives, or an archive of archives, one for each class and named after it.

    All images go into the split `train`.
    """
    archives = class_archives(path)
    if len(archives) < 2:
        raise UserError(f"{path} holds {len(archives)} tar files; one is needed for each of at "
                        "least two classes.")
    name = os.path.basename(path).removesuffix(".tar")
    return TarInput(path, name, [archive.name for archive in archives],
                    {"train": list_classes(archives)})


def class_archives(path: str) -> list[Archive]:
    """The archives `CLASS.tar` in a folder or an archive, sorted by class."""
    if os.path.isdir(path):
        found = [Archive(entry.path, name=entry.name) for entry in list_folder(path)]
    else:
        with open_archive(path) as file:
            found = [Archive(path, start, start + size, os.path.basename(os.fsdecode(name)))
                     for name, _, start, size in members(file, Archive(path))]
    found = [archive for archive in found if is_visible(archive.name)]
    packed = [archive.name for archive in found if _PACKED.search(archive.name.lower())]
    found = [archive._replace(name=archive.name[:-4]) for archive in found
             if archive.name.lower().endswith(".tar")]
    if found and packed:
        raise UserError(f"{path} holds {packed[0]} beside the archives of other classes; "
                        "decompress it, or leave it out.")
    return sorted(found, key=lambda archive: archive.name)


def list_classes(archives: list[Archive]) -> Members:
    """The images in archives, those of the first with label 0, and so on."""
    def list_one(archive):
        with open_archive(archive.path) as file:
            offsets = [offset for name, offset, _, _ in members(file, archive)
                       if name.lower().endswith(_EXTENSIONS)
                       and not name.rpartition(b"/")[2].startswith(b".")]  # macOS adds ._NAME
        if not offsets:
            raise UserError(f"class {archive.name!r} is empty: there is no {', '.join(EXTENSIONS)} "
                            f"file in {archive.path}; remove the archive or get it again.")
        return np.array(offsets, np.int64)

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        offsets = list(pool.map(list_one, archives))
    paths = sorted({archive.path for archive in archives})
    number = {path: index for index, path in enumerate(paths)}
    counts = [len(part) for part in offsets]
    return Members(
        paths,
        np.repeat(np.array([number[a.path] for a in archives], np.int32), counts),
        np.concatenate(offsets),
        np.repeat(np.arange(len(archives), dtype=np.int32), counts),
    )


def members(file: BinaryIO, archive: Archive) -> list[tuple[bytes, int, int, int]]:
    """(name, offset of the header, offset of the data, size) of every file in an archive.

    Written out because `tarfile` takes ten times as long, and ImageNet-21k has 14 million members.
    Only what is neither a file nor a folder is left to it, such as headers of long names.

    Raises:
      UserError: the archive is damaged or incomplete, or holds a link in place of an image.
    """
    found = []
    file_size = os.fstat(file.fileno()).st_size
    end = file_size if archive.end is None else archive.end
    position = archive.start
    damaged = UserError(f"{archive.path} is not a tar file, or is damaged or incomplete; download "
                        "it again.")
    # Two blocks of zeros end an archive (POSIX.1-1988, 10.1.1); here one will do. Where there is
    # none, or more than zeros after it, members are missing: of a download that broke off, or has
    # holes.
    while True:
        file.seek(position)
        header = file.read(min(_BLOCK, end - position))
        if not header:
            raise damaged
        if not header.strip(b"\0"):
            if end - position > _LONGEST_END or file.read(end - file.tell()).strip(b"\0"):
                raise damaged
            return found
        kind = header[156:157]
        try:
            if (header[257:262] == b"ustar" and kind in b"05\0" and not header[124] & 0x80
                    and _sum(header) == int(header[_CHECKSUM].rstrip(b" \0"), 8)):
                name = header[:100].rstrip(b"\0")
                data = position + _BLOCK
                size = int(header[124:136].rstrip(b" \0") or b"0", 8)
            else:
                file.seek(position)
                with tarfile.open(fileobj=file, mode="r:") as rest:
                    member = rest.next()
                name, data, size = os.fsencode(member.name), member.offset_data, member.size
                kind = b"0" if member.isreg() else member.type
        except (tarfile.TarError, ValueError, AttributeError) as error:
            raise damaged from error
        if data + size > min(end, file_size):
            raise damaged
        if kind in _REGULAR:
            found.append((name, position, data, size))
        elif kind in _LINKS and name.lower().endswith(_EXTENSIONS):
            raise UserError(f"{archive.path}: {os.fsdecode(name)} is a link, not an image; create "
                            "the archive again with tar --dereference --hard-dereference.")
        position = min(data + -(-size // _BLOCK) * _BLOCK, end)


def _sum(header: bytes) -> int:
    """The sum of the bytes of a header, with its checksum field as spaces, if at most 65,519.

    The lower half of Adler-32 is 1 more than that (RFC 1950, 8.2), in 0.4 microseconds where `sum`
    takes 3. A larger sum comes out wrong, and is left to `tarfile`.
    """
    blank = header[:_CHECKSUM.start] + b" " * 8 + header[_CHECKSUM.stop:]
    return (zlib.adler32(blank) & 0xFFFF) - 1


def open_archive(path: str) -> BinaryIO:
    """A file to seek in; UserError where it cannot be read."""
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from error


def list_folder(path: str) -> list[os.DirEntry]:
    """What is in a folder, by name; UserError where it cannot be read."""
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path, error):
    return UserError(f"{path} cannot be read ({error.strerror}); check its permissions.")
