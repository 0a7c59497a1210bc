import pytest

from vit_jax.data.sources import Record, open_eval, open_splits
from vit_jax.errors import UserError

pytestmark = pytest.mark.core

FORMS = "tfds:NAME, folder:PATH, digits, synthetic"


def both(source, dir=None, train_split=None, eval_split=None):
    return open_splits(source, dir=dir, train_split=train_split, eval_split=eval_split,
                       image_size=(16, 16))


def test_default_splits():
    train, test = both("digits")
    assert (train.name, test.name) == ("digits split 'train'", "digits split 'test'")
    assert isinstance(train[0], Record)
    assert both("synthetic")[1].split == "test"


def test_named_splits():
    train, evaluation = both("digits", train_split="test", eval_split="train")
    assert (train.split, evaluation.split) == ("test", "train")


def test_open_eval_is_the_second_of_open_splits():
    source = open_eval("digits", dir=None, eval_split=None, image_size=(16, 16))
    assert source.name == both("digits")[1].name
    assert open_eval("synthetic", dir=None, eval_split="train", image_size=(16, 12))[0].image.shape
    assert len(open_eval("digits", dir=None, eval_split="train", image_size=(8, 8))) == 1437


def test_synthetic_images_have_the_size_asked_for():
    train, _ = open_splits("synthetic", dir=None, train_split=None, eval_split=None,
                           image_size=(20, 12))
    assert train[0].image.shape == (20, 12, 3)


@pytest.mark.parametrize(("source", "nearest"), [
    ("digit", "'digits'"),
    ("digits:8", "'digits'"),
    ("fodler:/photos", "'folder:PATH'"),
    ("tfds", "'tfds:NAME'"),
    ("tdfs:cifar10", "'tfds:NAME'"),
    ("syntetic", "'synthetic'"),
])
def test_unknown_source_names_the_four_forms_and_the_nearest(source, nearest):
    with pytest.raises(UserError) as error:
        both(source)
    assert repr(source) in str(error.value) and FORMS in str(error.value)
    assert str(error.value).endswith(f"; did you mean {nearest}?")


def test_unknown_source_without_a_near_one():
    for source in ("", "imagenet"):
        with pytest.raises(UserError, match=rf"{FORMS}\.$"):
            both(source)


def test_a_path_alone_is_probably_a_folder(tmp_path):
    with pytest.raises(UserError, match=f"did you mean 'folder:{tmp_path}'"):
        both(str(tmp_path))


def test_folder_and_tfds_are_reached(tmp_path):
    with pytest.raises(UserError, match="^folder:"):
        both(f"folder:{tmp_path / 'no:where'}")  # a path may hold a colon
    with pytest.raises(UserError, match="^tfds:flowers"):
        both("tfds:flowers", dir=str(tmp_path))
