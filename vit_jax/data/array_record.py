"""Single records of ArrayRecord files.

Why not array_record's own data source: it asks a reader for lists of positions, and for each list
the reader makes a table of all records of the file (130 us where there are 50,000). For a range it
makes none (6 us).
"""

import bisect
import hashlib
import itertools
import os
from collections.abc import Sequence

from array_record.python.array_record_module import ArrayRecordReader

from vit_jax.errors import UserError

# Records are read one at a time in random order: reading ahead would be useless.
_OPTIONS, _BUFFER = "readahead_buffer_size:0", 32_768
# Bytes that identify a file: the first are records, the last an index of their positions (9 bytes
# per record) and 64 KiB that locate it. The file size says little, since it is rounded up.
_START, _END = 65_536, 131_072


class Records:
    """The records of files, or of parts of them, one after another. Can be pickled; threads may
    share it."""

    def __init__(self, parts: Sequence[tuple[str, int, int]]):
        """`parts`: (path, first record, number of records); files are opened when they are read."""
        self._parts = [part for part in parts if part[2]]
        self._ends = list(itertools.accumulate(count for _, _, count in self._parts))
        self._readers: dict[str, ArrayRecordReader] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self):
        return self.__dict__ | {"_readers": {}}

    def digest(self) -> str:
        """Of which records these are, wherever the files lie. Reads only the ends of each.

        Raises:
          UserError: a file cannot be read.
        """
        sha256 = hashlib.sha256()
        for path, first, count in self._parts:
            try:
                with open(path, "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    sha256.update(repr((os.path.basename(path), size, first, count)).encode())
                    sha256.update(file.read(_START))
                    file.seek(max(0, size - _END))
                    sha256.update(file.read())
            except OSError as error:
                raise _unreadable(path, error) from error
        return sha256.hexdigest()[:16]

    def read(self, start: int, stop: int) -> list[bytes]:
        """Those from `start` up to `stop`, which must exist.

        Raises:
          UserError: a file cannot be read.
        """
        records, part = [], bisect.bisect_right(self._ends, start)
        while start < stop:
            path, first, count = self._parts[part]
            here = min(stop, self._ends[part]) - start
            position = first + count - (self._ends[part] - start)
            records += self._read(path, position, position + here)
            start, part = start + here, part + 1
        return records

    def _read(self, path, start, stop):
        try:
            reader = self._reader(path)
            if stop > reader.num_records():
                raise RuntimeError(f"it holds only {reader.num_records()} records")
            return reader.read(start, stop)
        except (OSError, RuntimeError) as error:
            raise _unreadable(path, error) from error

    def _reader(self, path):
        reader = self._readers.get(path)
        if reader is None:  # of two threads that come here at once, one opens it in vain
            reader = ArrayRecordReader(path, options=_OPTIONS, file_reader_buffer_size=_BUFFER)
            if not reader.ok():
                open(path, "rb").close()  # raises if the problem is not the content
                raise RuntimeError("it is not a complete ArrayRecord file")
            self._readers[path] = reader
        return reader


def _unreadable(path, error):
    reason = getattr(error, "strerror", None) or str(error).partition(";")[0]
    return UserError(f"{path} cannot be read ({reason}); copy or prepare the data set again.")
