import collections
import json
import threading

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from image_files import encode, photo
from tensorflow_datasets.proto import tf_example_pb2

from vit_jax.data.preparing.folders import FolderInput
from vit_jax.data.preparing.shards import (
    Interrupted,
    Options,
    Preparation,
    Tally,
    check_class_names,
    divide,
    order,
)
from vit_jax.errors import UserError


@pytest.fixture
def preparation(tmp_path):
    """Of 2 x 10 images, with 4 and 1 of the splits' 18 and 2 a file."""
    for name in ("cat", "dog"):
        (tmp_path / "from" / name).mkdir(parents=True)
        for number in range(10):
            seed = number + 100 * (name == "dog")
            (tmp_path / "from" / name / f"{number}.jpg").write_bytes(encode(photo(9, 9, seed)))
    preparation = Preparation(
        FolderInput(str(tmp_path / "from")), tmp_path / "out", "pets", Options(records_per_file=4))
    preparation.claim()
    return preparation


def write(preparation, file):
    preparation.write(file, threading.Event(), lambda: None)


def labels(path):
    reader = ArrayRecordReader(str(path))
    examples = [tf_example_pb2.Example.FromString(record) for record in reader.read_all()]
    return [example.features.feature["label"].int64_list.value[0] for example in examples]


@pytest.mark.parametrize(("images", "records_per_file"), [
    (1, None), (128, None), (129, None), (10_000, None), (1_281_167, None), (14_000_000, None),
    (5, 1), (5, 3), (6, 3), (7, 3), (2, 3), (1_281_167, 5000)])
def test_divide(images, records_per_file):
    files = divide("train", images, records_per_file)
    sizes = [file.stop - file.start for file in files]
    assert [file.number for file in files] == list(range(len(files)))
    assert {file.count for file in files} == {len(files)}
    assert files[0].start == 0 and files[-1].stop == images
    assert all(a.stop == b.start for a, b in zip(files, files[1:], strict=False))
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= (records_per_file or max(4096, -(-images // 512)))
    assert records_per_file or len(files) <= 512
    if records_per_file is None and images > 128:
        assert min(sizes) >= 64 and len(files) >= min(64, images // 128)  # work for many threads


def test_order():
    assert order(4, shuffled=True).tolist() == [0, 1, 2, 3]
    shuffled = order(1000, shuffled=False)
    assert sorted(shuffled.tolist()) == list(range(1000))
    # The stream that NumPy has frozen: these are the same in every version.
    assert shuffled[:5].tolist() == [993, 859, 298, 553, 672]
    halves = np.bincount(shuffled[:500] // 500)
    assert abs(halves[0] - 250) < 40  # 5 standard deviations


def test_options_that_divide_the_splits(preparation):
    assert [(file.split, file.stop - file.start) for file in preparation.files] == [
        ("train", 3), ("train", 4), ("train", 3), ("train", 4), ("train", 4), ("validation", 2)]


def test_a_file_and_its_tally(preparation):
    assert all(preparation.done(file) is None for file in preparation.files)
    file = preparation.files[1]
    write(preparation, file)
    path = preparation.folder / "pets-train.array_record-00001-of-00005"
    tally = preparation.done(file)
    assert tally.images == 4 and tally.bad == []
    assert tally.file_bytes == path.stat().st_size > tally.bytes_out > tally.bytes_in
    assert tally.labels == collections.Counter(labels(path))
    assert sorted(entry.name for entry in preparation.folder.iterdir()) == [
        path.name, "prepare.json", "progress"]
    content = path.read_bytes()
    path.write_bytes(content[:-1])  # a copy that is not complete
    assert preparation.done(file) is None
    write(preparation, file)
    assert path.read_bytes() == content
    path.unlink()
    assert preparation.done(file) is None


def test_bad_images_are_left_out(preparation):
    root = preparation.source.where
    first = preparation.source.read("validation", 0).origin
    with open(f"{root}/{first}", "wb") as file:
        file.write(b"no image")
    file = preparation.files[-1]
    write(preparation, file)
    tally = preparation.done(file)
    assert tally.images == 1
    assert tally.bad == [(first, "it is not a JPEG, PNG, WEBP, BMP or GIF file")]


def test_a_split_without_images_is_refused(preparation):
    for index in range(2):
        origin = preparation.source.read("validation", index).origin
        with open(f"{preparation.source.where}/{origin}", "wb"):
            pass
    for file in preparation.files:
        write(preparation, file)
    with pytest.raises(UserError, match="'validation' would be empty.*the file is empty"):
        preparation.finish({file: preparation.done(file) for file in preparation.files})
    assert not (preparation.folder / "dataset_info.json").exists()


def test_files_that_cannot_be_read_stop_the_work(preparation, tmp_path):
    origin = preparation.source.read("train", 0).origin
    (tmp_path / "from" / origin).unlink()
    with pytest.raises(UserError, match=f"{origin} cannot be read .No such file or directory.; "):
        for file in preparation.files:
            write(preparation, file)


def test_interrupted_in_the_middle_of_a_file(preparation):
    stop = threading.Event()
    with pytest.raises(Interrupted):
        preparation.write(preparation.files[0], stop, stop.set)
    assert sorted(entry.name for entry in preparation.folder.iterdir()) == [
        "prepare.json", "progress"]


def test_the_same_file_by_two_processes(preparation, tmp_path):
    """The other one completes the data set and removes what it takes for left."""
    file = preparation.files[0]

    def other():
        again = Preparation(preparation.source, tmp_path / "out", "pets", preparation.options)
        again._mark = "elsewhere"
        for each in again.files:
            write(again, each)
        again.finish({each: again.done(each) for each in again.files})

    calls = iter([other])
    preparation.write(file, threading.Event(), lambda: next(calls, lambda: None)())
    assert preparation.done(file).images == 3
    assert not [path for path in preparation.folder.rglob(".*")]


def test_a_folder_that_cannot_be_written_any_more(preparation):
    (preparation.folder / "prepare.json").unlink()
    (preparation.folder / "progress").rmdir()
    preparation.folder.rmdir()
    with pytest.raises(UserError, match="00000-of-00005 cannot be written .*No such file"):
        write(preparation, preparation.files[0])


def test_other_data_or_options_are_refused(preparation, tmp_path):
    def refusal(options, source=preparation.source):
        with pytest.raises(UserError) as error:
            Preparation(source, tmp_path / "out", "pets", options).claim()
        return str(error.value)

    Preparation(preparation.source, tmp_path / "out", "pets", preparation.options).claim()
    assert "was begun with --resize=None, not 64; " in refusal(
        Options(resize=64, records_per_file=4))
    assert "with --quality=95, not 90" in refusal(Options(quality=90, records_per_file=4))
    assert "with --records_per_file=4, not None" in refusal(Options())
    (tmp_path / "from" / "cat" / "0.jpg").rename(tmp_path / "from" / "cat" / "new.jpg")
    assert "was begun from other files; " in refusal(
        preparation.options, FolderInput(str(tmp_path / "from")))


def test_a_data_set_of_others_is_left_alone(preparation):
    (preparation.folder / "prepare.json").unlink()
    (preparation.folder / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="did not make"):
        preparation.claim()


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_damaged_manifest(preparation, content):
    (preparation.folder / "prepare.json").write_text(content)
    with pytest.raises(UserError, match="prepare.json, which .* is damaged; delete the folder"):
        preparation.claim()


def test_the_data_set_is_complete_with_its_last_file(preparation):
    left = preparation.folder / ".pets-train.array_record-00000-of-00005.elsewhere.77"
    half = preparation.folder / "progress" / ".train-00000-of-00005.json.elsewhere.77"
    for path in (left, half):
        path.write_bytes(b"of a process that was killed")
    for file in preparation.files:
        write(preparation, file)
    preparation.finish({file: preparation.done(file) for file in preparation.files})
    info = json.loads((preparation.folder / "dataset_info.json").read_text())
    assert [split["shardLengths"] for split in info["splits"]] == [
        ["3", "4", "3", "4", "4"], ["2"]]
    assert not left.exists() and not half.exists()
    assert not list(preparation.folder.rglob(".*"))


def test_metadata_left_by_processes_that_were_killed(preparation):
    """In a container the next one has the same number."""
    for mark in (preparation._mark, "elsewhere.77"):
        (preparation.folder / f".metadata.{mark}").mkdir()
        (preparation.folder / f".metadata.{mark}" / "features.json").write_text("half")
    for file in preparation.files:
        write(preparation, file)
    preparation.finish({file: preparation.done(file) for file in preparation.files})
    assert json.loads((preparation.folder / "features.json").read_text())
    assert not list(preparation.folder.rglob(".*"))


def test_two_processes_complete_the_data_set(preparation, monkeypatch):
    """The other one removes what it takes for left."""
    for file in preparation.files:
        write(preparation, file)
    tallies = {file: preparation.done(file) for file in preparation.files}
    other = Preparation(preparation.source, preparation.out, "pets", preparation.options)
    other._mark = "elsewhere"
    write_features = preparation.source.write_features

    def slowly(folder, **kwargs):
        monkeypatch.undo()
        other.finish(tallies)
        return write_features(folder, **kwargs)

    monkeypatch.setattr(preparation.source, "write_features", slowly)
    preparation.finish(tallies)
    assert json.loads((preparation.folder / "dataset_info.json").read_text())["name"] == "pets"
    assert not list(preparation.folder.rglob(".*"))


def test_tallies_add_up_and_survive_json():
    tally = Tally(2, 10, 20, 30, collections.Counter({7: 2}), [("a", "why")])
    assert Tally.from_json(tally.to_json()) == tally
    tally.add(Tally(1, 1, 1, 1, collections.Counter({7: 1, 0: 1}), [("b", "how")]))
    assert tally == Tally(
        3, 11, 21, 31, collections.Counter({7: 3, 0: 1}), [("a", "why"), ("b", "how")])


def test_class_names_that_cannot_be_stored():
    check_class_names(("a b", "übel", "د‌د", "👩‍🌾"))
    for name in (" a", "a\n", "a\nb", "", "a\udcff", "a "):
        with pytest.raises(UserError, match="rename it"):
            check_class_names(("fine", name))
    with pytest.raises(UserError, match="2 classes are called 'a'; give each a name of its own"):
        check_class_names(("a", "a", "b"))  # x/a.tar and y/a.tar of an archive
