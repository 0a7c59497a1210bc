import pickle

import numpy as np
import pytest
from sklearn.datasets import load_digits

from vit_jax.data.builtin import Digits, Synthetic
from vit_jax.errors import UserError

pytestmark = pytest.mark.core


def test_digits_are_split_80_20_by_class():
    train, test = (Digits().open(split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == test.class_names == tuple("0123456789")
    everything = np.bincount(load_digits().target)
    np.testing.assert_array_equal(
        np.bincount(train.labels()) + np.bincount(test.labels()), everything)
    assert np.abs(np.bincount(test.labels()) - everything / 5).max() < 1
    assert Digits().default_eval_split() == "test"


def test_digits_split_is_the_same_on_every_machine():
    """Results on the 360 test digits can be compared only if they are the same digits."""
    test = Digits().open("test")
    assert test.labels()[:20].tolist() == [
        5, 9, 2, 4, 6, 7, 9, 3, 4, 6, 8, 5, 0, 2, 1, 3, 7, 3, 9, 9]
    assert sum(int(record.image.sum()) * i for i, record in enumerate(test)) == 962928621


def test_digits_pixels():
    digits = load_digits()
    records = [record for split in ("train", "test") for record in Digits().open(split)]
    first = records[0]
    assert first.image.shape == (8, 8, 3) and first.image.dtype == np.uint8
    assert isinstance(first.label, int) and "digits split 'train' record 0" == first.origin
    images = np.stack([record.image for record in records])
    assert images.min() == 0 and images.max() == 255
    assert (images == images[..., :1]).all()
    ours = {(image[..., 0].tobytes(), label) for image, label, _ in records}
    theirs = {(np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
              for image, label in zip(digits.images, digits.target, strict=True)}
    assert ours == theirs


def test_synthetic():
    train, test = (Synthetic((24, 32)).open(split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1_281_167, 50_000)
    assert len(train.class_names) == 1000
    image, label, origin = train[1_281_166]
    assert image.shape == (24, 32, 3) and image.dtype == np.uint8
    assert label == 166 == train.labels()[1_281_166] and "1281166" in origin
    np.testing.assert_array_equal(train[3].image, Synthetic((24, 32)).open("train")[3].image)
    assert (train[0].image != train[1].image).any()
    assert 126 < train[0].image.mean() < 129
    with pytest.raises(IndexError):
        test[50_000]


@pytest.mark.parametrize("data_set", [Digits(), Synthetic((224, 224))])
def test_pickles_small_and_whole(data_set):
    source = data_set.open("test")
    pickled = pickle.dumps(source)
    assert len(pickled) < 400_000
    copy = pickle.loads(pickled)
    assert (copy.name, copy.split, len(copy)) == (source.name, source.split, len(source))
    np.testing.assert_array_equal(copy[7].image, source[7].image)


@pytest.mark.parametrize("data_set", [Digits(), Synthetic((8, 8))])
def test_missing_split(data_set):
    with pytest.raises(UserError, match="no split 'tests', only 'train', 'test'; did you mean"):
        data_set.open("tests")
