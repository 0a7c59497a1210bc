import numpy as np
import pytest

from vit_jax.data.preparing.folders import FolderInput
from vit_jax.data.sources import open_splits
from vit_jax.errors import UserError


def fill(root, count, splits=("",), classes=("cat", "big dog", "Übel")):
    for split in splits:
        for name in classes:
            for number in range(count):
                path = root / split / name / f"{number} ☃.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(f"{split} {name} {number}".encode())


def contents(source, split):
    items = [source.read(split, index) for index in range(source.splits[split])]
    return [(item.image, item.label) for item in items]


@pytest.mark.parametrize("splits", [("",), ("train",), ("train", "val"), ("train", "val", "test")])
def test_the_same_images_labels_and_splits_as_the_folder_source(tmp_path, splits):
    fill(tmp_path, 20, splits)
    source = FolderInput(str(tmp_path))
    train, evaluation = open_splits(
        f"folder:{tmp_path}", dir=None, train_split=None, eval_split=None, image_size=(8, 8))
    assert set(source.splits) == {"train", "validation", *splits} - {"", "val"}
    assert source.class_names == train.class_names
    for mine, theirs in (("train", train), ("validation", evaluation)):
        assert contents(source, mine) == [(record.image, record.label) for record in theirs]


def test_file_names(tmp_path):
    fill(tmp_path, 2, ("train", "val"))
    item = FolderInput(str(tmp_path)).read("train", 0)
    assert item.origin == "train/big dog/0 ☃.jpg"
    assert item.example.features.feature["file_name"].bytes_list.value[0] == (
        "train/big dog/0 ☃.jpg".encode())


def test_the_digest_tells_other_data(tmp_path):
    fill(tmp_path / "a", 3)
    first = FolderInput(str(tmp_path / "a")).digest()
    (tmp_path / "a").rename(tmp_path / "b")  # the same data elsewhere
    assert FolderInput(str(tmp_path / "b")).digest() == first
    (tmp_path / "b" / "cat" / "0 ☃.jpg").rename(tmp_path / "b" / "big dog" / "9.jpg")
    assert FolderInput(str(tmp_path / "b")).digest() != first


def test_split_names_that_tfds_cannot_have(tmp_path):
    fill(tmp_path, 2, ("train", "val", "my split"))
    with pytest.raises(UserError, match="TFDS does not allow a split called 'my split'"):
        FolderInput(str(tmp_path))
    (tmp_path / "my split").rename(tmp_path / "all")
    with pytest.raises(UserError, match="'all'"):
        FolderInput(str(tmp_path))
    (tmp_path / "all").rename(tmp_path / "validation")  # beside val
    assert list(FolderInput(str(tmp_path)).splits) == ["train", "val", "validation"]


def test_folders_beside_the_splits_are_left_out_and_named(tmp_path):
    fill(tmp_path, 10, ("train", "val", "real"))
    fill(tmp_path, 1, ("__MACOSX",), ("train",))
    for name in ("test/1.jpg", "docs/figures/.1.jpg", "annotations/cat/1.xml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    source = FolderInput(str(tmp_path))
    assert source.splits == {"real": 30, "train": 30, "validation": 30}
    assert source.left_out == ("annotations", "docs", "test")
    (tmp_path / "docs" / "figures" / "1.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="class 'figures' is in .*docs but not in .*train; add"):
        FolderInput(str(tmp_path))


def test_what_training_evaluates_on_is_not_left_out(tmp_path):
    fill(tmp_path, 10, ("train",))
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "1.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="no classes in .*val: 1 images lie directly in it"):
        FolderInput(str(tmp_path))
    (tmp_path / "val").rename(tmp_path / "unlabelled")
    source = FolderInput(str(tmp_path))  # as of train alone
    assert source.splits == {"train": 27, "validation": 3}
    assert source.read("train", 0).origin.startswith("train/big dog/")


def test_labels_are_the_folders(tmp_path):
    fill(tmp_path, 10)
    source = FolderInput(str(tmp_path))
    counts = np.bincount([label for _, label in contents(source, "train")])
    assert counts.tolist() == [9, 9, 9]
