import os

import numpy as np
import pytest

from vit_jax.data.records import missing_split, read_file, stratified_split

pytestmark = pytest.mark.core


@pytest.mark.parametrize("one_in", [5, 10])
@pytest.mark.parametrize("counts", [(10, 20, 30), (7, 8, 9, 11), (1, 40), (333, 3, 33)])
def test_every_image_is_in_one_part_and_every_class_in_proportion(counts, one_in):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    kept, held_out = stratified_split(labels, one_in)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), range(sum(counts)))
    assert len(held_out) == -(-sum(counts) // one_in)
    assert (np.diff(kept) > 0).all() and (np.diff(held_out) > 0).all()
    per_class = np.bincount(labels[held_out], minlength=len(counts))
    assert np.abs(per_class - np.array(counts) / one_in).max() <= 1


def test_largest_remainders_get_one_more():
    labels = np.repeat([0, 1, 2], [14, 19, 16])  # 49: five are held out, three by whole tenths
    _, held_out = stratified_split(labels, 10)
    assert np.bincount(labels[held_out]).tolist() == [1, 2, 2]


def test_a_tenth_of_thirty_is_three():  # ceil(0.1 * 30) is 4 in floating point
    assert len(stratified_split(np.repeat([0, 1], 15), 10)[1]) == 3


def test_a_class_with_one_image_is_trained_on():
    labels = np.array([0, 1, 2, 3, 3, 3, 3])
    kept, held_out = stratified_split(labels, 5)
    assert set(labels[kept]) == {0, 1, 2, 3}
    assert labels[held_out].tolist() == [3]
    assert not len(stratified_split(np.arange(20), 10)[1])


def test_deterministic_and_seeded():
    labels = np.repeat([0, 1], 50)
    first, again, other = (stratified_split(labels, 10, seed=seed)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()
    assert first.tolist() != list(range(5)) + list(range(50, 55))  # not simply the first


def test_missing_split_names_those_that_exist_and_the_nearest():
    assert str(missing_split("digits", "tset", ["train", "test"])) == (
        "digits has no split 'tset', only 'train', 'test'; did you mean 'test'?")
    assert "slices" in str(missing_split("digits", "train[:9%]", ["train", "test"]))


@pytest.mark.parametrize("at_most", [3, 1000])
def test_a_file_is_read_to_its_end(tmp_path, monkeypatch, at_most):
    """Linux gives at most 2 GiB at a time, and a file may shrink before it is read."""
    path, read = tmp_path / "file", os.read
    monkeypatch.setattr(os, "read", lambda file, size: read(file, min(size, at_most)))
    for content in (b"", b"abc", bytes(range(200))):
        path.write_bytes(content)
        assert read_file(str(path)) == content
    status = os.stat_result((0,) * 6 + (len(content) + 5, 0, 0, 0))
    monkeypatch.setattr(os, "fstat", lambda file: status)
    assert read_file(str(path)) == content


def test_a_file_is_closed_when_reading_fails(tmp_path, monkeypatch):
    opened, closed = [], []
    open_file, close_file = os.open, os.close
    monkeypatch.setattr(os, "open", lambda *args: opened.append(open_file(*args)) or opened[-1])
    monkeypatch.setattr(os, "close", lambda file: closed.append(file) or close_file(file))
    with pytest.raises(IsADirectoryError):
        read_file(str(tmp_path))
    assert len(opened) == 1 and opened == closed
