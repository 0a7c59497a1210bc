import os
import pickle

import numpy as np
import pytest

from vit_jax.data import folder as folder_module
from vit_jax.data.sources import open_eval, open_splits
from vit_jax.errors import UserError

pytestmark = pytest.mark.core


def fill(root, **counts):
    """`fill(root, cat=3)` writes three files cat/0.jpg ...; their content is their path."""
    for name, count in counts.items():
        for i in range(count):
            put(root / name / f"{i}.jpg")


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(str(path).encode())


def both(path, train_split=None, eval_split=None):
    return open_splits(f"folder:{path}", dir=None, train_split=train_split, eval_split=eval_split,
                       image_size=(8, 8))


def evaluation(path, eval_split=None):
    return open_eval(f"folder:{path}", dir=None, eval_split=eval_split, image_size=(8, 8))


def refusal(path, **splits):
    with pytest.raises(UserError) as error:
        both(path, **splits)
    return str(error.value)


def origins(source):
    return [record.origin for record in source]


def test_stratified_split(tmp_path):
    fill(tmp_path, dog=34, cat=20, bird=1)
    train, val = both(tmp_path)
    assert (train.split, val.split) == ("train", "val")
    assert train.class_names == val.class_names == ("bird", "cat", "dog")
    assert np.bincount(val.labels()).tolist() == [0, 2, 4]  # ceil(55 / 10), the single bird kept
    assert np.bincount(train.labels()).tolist() == [1, 18, 30]
    assert not set(origins(train)) & set(origins(val))
    assert len(set(origins(train)) | set(origins(val))) == 55
    assert origins(both(tmp_path)[1]) == origins(val)
    assert origins(evaluation(tmp_path)) == origins(val)


def test_records(tmp_path):
    fill(tmp_path, cat=12, dog=12)
    train, _ = both(tmp_path)
    image, label, origin = train[0]
    assert image == origin.encode() and label == 0 and os.path.dirname(origin).endswith("cat")
    assert train.name == f"folder:{tmp_path} split 'train'"
    assert train.labels().dtype == np.int32
    assert [record.label for record in train] == train.labels().tolist()


def test_the_split_depends_on_names_only(tmp_path, monkeypatch):
    for place in ("one", "two"):
        fill(tmp_path / place, cat=20, dog=25)
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            self.entries = list(scandir(path))[::-1]

        def __enter__(self):
            return self.entries

        def __exit__(self, *_):
            pass

    first = [os.path.relpath(path, tmp_path / "one") for path in origins(both(tmp_path / "one")[1])]
    monkeypatch.setattr(os, "scandir", Reversed)
    second = both(tmp_path / "two")[1]
    assert first == [os.path.relpath(path, tmp_path / "two") for path in origins(second)]


def test_identity(tmp_path):
    """The same wherever the folder is; another where an image got another name or another class."""
    found = []
    for place in ("here", "moved", "renamed", "relabelled"):
        fill(tmp_path / place, cat=20, dog=20)
        cat, dog = tmp_path / place / "cat", tmp_path / place / "dog"
        image = sorted(cat.iterdir())[0]
        if place == "renamed":
            image.rename(cat / f"aa{image.suffix}")
        if place == "relabelled":
            image.rename(dog / f"zz{image.suffix}")
        train, _ = both(tmp_path / place)
        assert len(train) == 36
        found.append(train.identity())
    assert found[0] == found[1] and len(set(found)) == 3


def test_extensions_nested_folders_and_hidden_files(tmp_path):
    wanted = ["a.jpg", "b.JPEG", "c.Png", "d.webp", "e.BMP", "deep/er/f.JPG"]
    for name in wanted:
        put(tmp_path / "train" / "cat" / name)
    for name in ("notes.txt", ".hidden.jpg", ".thumbnails/a.jpg", "g.tif", "jpg"):
        put(tmp_path / "train" / "cat" / name)
    put(tmp_path / "train" / ".cache" / "x.jpg")
    put(tmp_path / "__MACOSX" / "train" / "x.jpg")
    put(tmp_path / ".git" / "x.jpg")
    fill(tmp_path / "train", dog=1)
    fill(tmp_path / "val", cat=1)
    train, _ = both(tmp_path)
    assert train.class_names == ("cat", "dog")
    assert [os.path.relpath(path, tmp_path / "train" / "cat") for path in origins(train)[:-1]] == (
        sorted(wanted))


def test_split_folders(tmp_path):
    fill(tmp_path / "train", cat=3, dog=4)
    fill(tmp_path / "val", dog=2)
    fill(tmp_path / "test", cat=5)
    train, val = both(tmp_path)
    assert (len(train), len(val), val.split) == (7, 2, "val")
    assert val.class_names == ("cat", "dog") and val.labels().tolist() == [1, 1]
    assert len(both(tmp_path, eval_split="test")[1]) == 5
    assert len(both(tmp_path, eval_split="train")[1]) == 7
    assert len(both(tmp_path, train_split="test")[0]) == 5


def test_test_is_the_second_choice(tmp_path):
    fill(tmp_path / "train", cat=3, dog=4)
    fill(tmp_path / "test", cat=1, dog=1)
    assert both(tmp_path)[1].split == "test"


def test_only_train_is_split_by_class(tmp_path):
    fill(tmp_path / "train", cat=20, dog=20)
    train, val = both(tmp_path)
    assert (len(train), len(val), val.split) == (36, 4, "val")
    assert np.bincount(val.labels()).tolist() == [2, 2]


def test_evaluation_needs_no_training_images(tmp_path):
    fill(tmp_path / "train", cat=3, dog=4, eel=2)
    fill(tmp_path / "test", dog=2)
    source = evaluation(tmp_path)
    assert source.class_names == ("cat", "dog", "eel") and source.labels().tolist() == [1, 1]

    fill(tmp_path / "alone" / "test", cat=1, dog=2)
    source = evaluation(tmp_path / "alone")
    assert source.class_names == ("cat", "dog") and len(source) == 3
    assert "no split 'train', only 'test'" in refusal(tmp_path / "alone")


def test_a_class_called_train(tmp_path):
    fill(tmp_path, train=10, plane=10)
    assert both(tmp_path)[0].class_names == ("plane", "train")


def test_paths(tmp_path, monkeypatch):
    fill(tmp_path / "my photos", cat=10, dog=10)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    absolute = origins(both(tmp_path / "my photos")[1])
    assert origins(both("~/my photos")[1]) == absolute
    relative = both("my photos")[1]
    monkeypatch.chdir("/")
    assert origins(relative) == absolute  # a later chdir does not matter


def test_links_are_followed_but_not_in_circles(tmp_path):
    fill(tmp_path / "elsewhere", cat=10)
    fill(tmp_path / "data", dog=10)
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "data" / "dog" / "again").symlink_to(tmp_path / "data" / "dog")
    train, val = both(tmp_path / "data")
    assert len(train) + len(val) == 20


def test_pickles(tmp_path):
    fill(tmp_path, cat=10, dog=10)
    train, _ = both(tmp_path)
    assert origins(pickle.loads(pickle.dumps(train))) == origins(train)


def test_missing_or_not_a_folder(tmp_path):
    assert refusal(tmp_path / "nowhere").startswith(f"folder:{tmp_path}/nowhere does not exist; ")
    put(tmp_path / "file.jpg")
    assert "file.jpg is not a folder; " in refusal(tmp_path / "file.jpg")
    assert refusal("") == "config.data.source='folder:' needs a path: folder:PATH."


def test_no_classes(tmp_path):
    assert f"no classes in {tmp_path}: it has no subfolders" in refusal(tmp_path)
    put(tmp_path / "a.jpg")
    put(tmp_path / "b.jpg")
    message = refusal(tmp_path)
    assert "2 images lie directly in it; move the images of each class into a subfolder" in message


def test_no_classes_in_a_split(tmp_path):
    fill(tmp_path / "train", cat=3, dog=4)
    put(tmp_path / "test" / "a.jpg")
    assert f"no classes in {tmp_path}/test: 1 images lie directly in it" in refusal(tmp_path)
    put(tmp_path / "other" / "train" / "a.jpg")
    assert f"no classes in {tmp_path}/other/train: 1 images" in refusal(tmp_path / "other")


@pytest.mark.parametrize("split", [None, "train", "val"])
def test_empty_class(tmp_path, split):
    fill(tmp_path / "train", cat=3, dog=4)
    fill(tmp_path / "val", cat=3, dog=4)
    fill(tmp_path / "flat", cat=3, dog=4)
    root = tmp_path / split if split else tmp_path / "flat"
    (root / "dog" / "more").mkdir()
    for i in range(4):
        (root / "dog" / f"{i}.jpg").rename(root / "dog" / f"{i}.txt")
    message = refusal(tmp_path if split else root)
    assert f"class 'dog' is empty: {root}/dog holds no .jpg, .jpeg, .jfif, .png" in message
    assert "add images or remove the folder" in message


def test_only_one_class(tmp_path):
    fill(tmp_path, cat=30)
    assert "only one class, 'cat'" in refusal(tmp_path)
    fill(tmp_path / "split" / "train", cat=30)
    fill(tmp_path / "split" / "val", cat=3)
    assert f"{tmp_path}/split/train has only one class, 'cat'" in refusal(tmp_path / "split")


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_that_is_not_trained_on(tmp_path, split):
    fill(tmp_path / "train", cat=3, dog=4)
    fill(tmp_path / "val", cat=1)
    fill(tmp_path / split, eel=1)
    message = refusal(tmp_path)
    assert f"class 'eel' is in {tmp_path}/{split} but not in {tmp_path}/train" in message
    with pytest.raises(UserError, match="class 'eel'"):
        evaluation(tmp_path, eval_split="train")


def test_missing_split(tmp_path):
    fill(tmp_path / "train", cat=3, dog=4)
    fill(tmp_path / "val", cat=1)
    message = refusal(tmp_path, eval_split="vall")
    assert message.endswith("has no split 'vall', only 'train', 'val'; did you mean 'val'?")
    fill(tmp_path / "flat", cat=10, dog=10)
    assert "no split 'test', only 'train', 'val'" in refusal(tmp_path / "flat", eval_split="test")
    assert "slices" in refusal(tmp_path / "flat", train_split="train[:50%]")


def test_split_folder_of_another_name_is_not_passed_over(tmp_path):
    """Holding out a tenth of `train` would leave the user's own validation images unused."""
    fill(tmp_path / "train", cat=30, dog=40)
    fill(tmp_path / "dev", cat=3, dog=4)
    message = refusal(tmp_path)
    assert "no folder of classes 'val', 'valid', 'validation', 'test' beside 'dev', 't" in message
    assert len(both(tmp_path, eval_split="dev")[1]) == 7
    for split, images in (("test", 2), ("validation", 3), ("valid", 4), ("val", 5)):
        if split == "valid":  # without classes it is something else
            put(tmp_path / split / "0.jpg")
            assert both(tmp_path)[1].split == "validation"
        fill(tmp_path / split, cat=images)  # each before those that came earlier
        assert both(tmp_path)[1].split == split and len(both(tmp_path)[1]) == images
    fill(tmp_path / "validation", eel=1)
    assert "class 'eel'" in refusal(tmp_path, eval_split="validation")


def test_split_folders_are_not_taken_for_classes(tmp_path):
    fill(tmp_path / "Training", cat=30, dog=40)
    fill(tmp_path / "Validation", cat=3, dog=4)
    message = refusal(tmp_path)
    assert "'Training', 'Validation' look like splits" in message
    assert "call them 'train', 'val' and 'test'" in message
    fill(tmp_path, Meta=5)  # nor beside other folders
    assert "'Training', 'Validation' look like splits" in refusal(tmp_path)
    fill(tmp_path / "classes", Test=5, Train=5, Walk=5)
    assert both(tmp_path / "classes")[0].class_names == ("Test", "Train", "Walk")
    fill(tmp_path / "nested" / "test", blood=5, dna=5)
    fill(tmp_path / "nested", exam=5)
    assert both(tmp_path / "nested")[0].class_names == ("exam", "test")


def test_images_in_other_formats_are_named(tmp_path, caplog):
    fill(tmp_path, cat=3, dog=3)
    for name in ("cat/a.heic", "cat/b.HEIC", "dog/c.tiff", "dog/notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "cat" / "0.jpg").rename(tmp_path / "cat" / "0.JFIF")
    assert sum(len(split) for split in both(tmp_path)) == 6
    assert set(caplog.messages) == {
        f"folder:{tmp_path}: images in formats that are not read are left out (2 .heic, 1 .tiff); "
        "convert them to JPEG or PNG to use them"}


def test_too_few_images_to_hold_any_out(tmp_path):
    fill(tmp_path, cat=1, dog=1)
    assert "no class has a second image that could be held out for evaluation" in refusal(tmp_path)


def test_unreadable_folder(tmp_path, monkeypatch):
    fill(tmp_path, cat=3, dog=3)
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folder_module.os, "scandir", denied)
    assert refusal(tmp_path) == (
        f"{tmp_path}/dog cannot be read (Permission denied); check its permissions and the disk.")


def test_unreadable_image(tmp_path):
    fill(tmp_path, cat=10, dog=10)
    train, _ = both(tmp_path)
    os.remove(train[3].origin)
    with pytest.raises(UserError, match="cat/.*jpg cannot be read .No such file"):
        train[3]


def test_a_link_to_itself(tmp_path):
    fill(tmp_path, cat=10, dog=10)
    (tmp_path / "cat" / "loop.jpg").symlink_to("loop.jpg")
    with pytest.raises(UserError, match="cat/loop.jpg cannot be read .Too many levels of symbolic"):
        both(tmp_path)


def test_broken_link_is_not_passed_over(tmp_path):
    fill(tmp_path / "train", cat=1, dog=1)
    (tmp_path / "train" / "cat" / "0.jpg").unlink()
    (tmp_path / "train" / "cat" / "0.jpg").symlink_to(tmp_path / "gone.jpg")
    fill(tmp_path / "val", cat=1)
    train, _ = both(tmp_path)
    with pytest.raises(UserError, match="cat/0.jpg cannot be read"):
        train[0]
