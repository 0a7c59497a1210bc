"""Records are read as array_record's own data source reads them."""

import concurrent.futures
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from vit_jax.data.array_record import Records
from vit_jax.errors import UserError

pytestmark = pytest.mark.core
LENGTHS = (5, 1, 40)


@pytest.fixture(params=["group_size:1", "group_size:1,uncompressed", "group_size:7"])
def paths(request, tmp_path):
    """Files of records of 0 to 3000 bytes."""
    generator = np.random.default_rng(0)
    found = []
    for number, length in enumerate(LENGTHS):
        found.append(str(tmp_path / f"{number}.array_record"))
        writer = ArrayRecordWriter(found[-1], request.param)
        for _ in range(length):
            writer.write(generator.bytes(generator.integers(3000)))
        writer.close()
    return found


def test_all_and_ranges(paths):
    records = Records([(path, 0, length) for path, length in zip(paths, LENGTHS, strict=True)])
    expected = list(ArrayRecordDataSource(paths))
    assert len(records) == len(expected) == sum(LENGTHS)
    assert [records.read(i, i + 1) for i in range(len(records))] == [[one] for one in expected]
    for start, stop in [(0, 46), (3, 7), (4, 5), (5, 6), (6, 46), (5, 7), (9, 9), (46, 46)]:
        assert records.read(start, stop) == expected[start:stop]


def test_parts_of_files(paths):
    """Of one file several, in any order, as slices of a split are."""
    whole = list(ArrayRecordDataSource(paths[2]))
    records = Records([(paths[2], 30, 10), (paths[0], 1, 0), (paths[2], 0, 3), (paths[2], 39, 1)])
    expected = whole[30:] + whole[:3] + whole[39:]
    assert len(records) == 14
    assert records.read(0, 14) == [records.read(i, i + 1)[0] for i in range(14)] == expected


def test_threads_and_pickles(paths):
    records = Records([(path, 0, length) for path, length in zip(paths, LENGTHS, strict=True)])
    order = np.random.default_rng(1).integers(len(records), size=500).tolist()
    alone = [records.read(i, i + 1) for i in order]
    copy = pickle.loads(pickle.dumps(records))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: copy.read(i, i + 1), order)) == alone


def test_files_that_cannot_be_read(paths, tmp_path):
    def refusal(path, count, index):
        with pytest.raises(UserError) as error:
            Records([(str(path), 0, count)]).read(index, index + 1)
        return str(error.value)

    content = Path(paths[2]).read_bytes()
    (tmp_path / "cut").write_bytes(content[:-100])
    (tmp_path / "damaged").write_bytes(content[:20_000] + b"damage" + content[20_006:])
    assert refusal(paths[0], 6, 5).endswith(
        "0.array_record cannot be read (it holds only 5 records); copy or prepare the data set "
        "again.")
    assert "none cannot be read (No such file or directory); copy" in refusal(
        tmp_path / "none", 40, 0)
    assert "cut cannot be read (it is not a complete ArrayRecord file); copy" in refusal(
        tmp_path / "cut", 40, 0)
    records = Records([(str(tmp_path / "damaged"), 0, 40)])
    assert records.read(0, 1) == Records([(paths[2], 0, 40)]).read(0, 1)
    with pytest.raises(UserError, match="damaged cannot be read .*; copy or prepare"):
        records.read(0, 40)


def test_the_digest_is_of_the_records_and_not_of_the_place(paths, tmp_path):
    def digest(path, first=0, count=40):
        return Records([(str(path), first, count)]).digest()

    def written(folder, records):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / Path(paths[2]).name
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        return path

    (tmp_path / "copy").mkdir()
    assert digest(shutil.copy(paths[2], tmp_path / "copy")) == digest(paths[2])
    assert digest(paths[2], 1, 39) != digest(paths[2]) != digest(paths[2], 0, 39)
    # A megabyte, of which only the ends are read; all files have the same size.
    a, b, c = (bytes([letter]) * 99 for letter in b"abc")
    middle = [np.random.default_rng(number).bytes(3000) for number in range(333)]
    files = [written("1", [a, *middle, b]), written("2", [c, *middle, b]),
             written("3", [a, *middle, b + b]), written("4", [a, b, *middle])]
    assert len({path.stat().st_size for path in files}) == 1
    assert len(set(map(digest, files))) == 4
    files[0].unlink()
    with pytest.raises(UserError, match="cannot be read .No such file or directory.; copy"):
        digest(files[0])
