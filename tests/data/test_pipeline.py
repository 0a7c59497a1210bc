"""Batches are a function of seed and step, whoever assembles them."""

import itertools
import threading

import numpy as np
import pytest

from vit_jax.config import validate
from vit_jax.data.pipeline import BadImages, eval_batches, record_order, train_batches
from vit_jax.data.records import Record
from vit_jax.errors import UserError

pytestmark = pytest.mark.core
SIZE = (8, 8)


class Numbered:
    """Record i is a picture of i, so that a batch shows which records it holds."""

    name = "numbered split 'train'"
    split = "train"
    class_names = ("even", "odd")

    def __init__(self, length, bad=(), side=8):
        self.length, self.bad, self.side = length, bad, side

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.bad:
            return Record(b"no image", index % 2, f"file {index}")
        image = np.full((self.side, self.side, 3), index % 256, np.uint8)
        return Record(image, index % 2, f"file {index}")

    def labels(self):
        return np.arange(self.length) % 2


def take(config, source, count, **kwargs):
    stream = train_batches(source, config, SIZE, BadImages("error"), **kwargs)
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def ids(batch):
    return batch["image"][:, 0, 0, 0].tolist()


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.fixture
def config(tiny_config):
    tiny_config.batch_size = 10
    tiny_config.data.workers = 0
    return tiny_config


@pytest.mark.parametrize("workers", [1, 3, None])
def test_same_batches_with_any_number_of_threads(config, workers):
    config.data.train_crop, config.data.flip = "inception", True
    source = Numbered(37, side=20)
    alone = take(validate(config), source, 9)
    config.data.workers = workers
    assert_same(take(validate(config), source, 9), alone)


@pytest.mark.parametrize("first_step", [1, 4, 7])
def test_a_stream_can_start_at_any_step(config, first_step):
    config.data.train_crop, config.data.flip = "inception", True
    config = validate(config)
    source = Numbered(23, side=20)
    whole = take(config, source, 9)
    assert_same(take(config, source, 9 - first_step, first_step=first_step), whole[first_step:])


def test_every_epoch_shows_every_record_once_in_another_order(config):
    source = Numbered(30)
    batches = take(validate(config), source, 9)
    epochs = [sum((ids(b) for b in batches[i : i + 3]), []) for i in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2]
    config.seed = 1
    assert ids(take(validate(config), source, 1)[0]) != ids(batches[0])


def test_an_epoch_that_is_no_multiple_of_the_batch_loses_nothing(config):
    batches = take(validate(config), Numbered(25), 5)  # two epochs
    seen = sum((ids(b) for b in batches), [])
    assert sorted(seen[:25]) == sorted(seen[25:]) == list(range(25))


def test_batch_contents(config):
    config.data.flip = True
    batch = take(validate(config), Numbered(200), 1)[0]
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
        "image": ("uint8", (10, 8, 8, 3)), "label": ("int32", (10,)),
        "mask": ("bool", (10,)), "flip": ("bool", (10,))}
    assert batch["label"].tolist() == [i % 2 for i in ids(batch)]
    assert batch["mask"].all()
    flips = np.concatenate([b["flip"] for b in take(validate(config), Numbered(200), 100)])
    assert 0.45 < flips.mean() < 0.55  # 1000 fair coins: more than three deviations each way
    config.data.flip = False
    assert not any(b["flip"].any() for b in take(validate(config), Numbered(200), 5))


def test_augmentation_differs_between_epochs(config):
    config.data.train_crop = "pad"
    source = Numbered(10)
    source.__class__ = type("Gradient", (Numbered,), {
        "__getitem__": lambda self, i: Record(
            np.arange(192, dtype=np.uint8).reshape(8, 8, 3), 0, "")})
    batches = take(validate(config), source, 2)
    pictures = {image.tobytes() for b in batches for image in b["image"]}
    assert len(pictures) > 10  # 20 draws of 81 positions; without fresh draws an epoch, at most 10


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_the_run_and_is_named(config, workers):
    config.data.workers = workers
    with pytest.raises(UserError, match="file 3 cannot be decoded.*on_bad_image=skip"):
        take(validate(config), Numbered(10, bad={3}), 2)


def test_bad_images_are_masked_and_counted_once(config, caplog):
    bad_images = BadImages("skip")
    stream = train_batches(Numbered(20, bad={3, 7}), validate(config), SIZE, bad_images)
    batches = list(itertools.islice(stream, 6))  # three epochs
    assert sum(int((~b["mask"]).sum()) for b in batches) == 3 * 2
    assert bad_images.count == 2
    assert sum("skipped file 3" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("batch_size", [1, 4, 7, 30])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_shows_every_image_once_in_order(config, batch_size, workers):
    config.data.workers = workers
    batches = list(eval_batches(
        Numbered(7), validate(config), SIZE, BadImages("error"), batch_size=batch_size))
    assert all(len(b["image"]) == batch_size for b in batches)
    assert sum((b["image"][b["mask"], 0, 0, 0].tolist() for b in batches), []) == list(range(7))


def test_nothing_runs_on_after_the_stream_is_closed(config):
    config.data.workers = 2
    stream = train_batches(Numbered(1000), validate(config), SIZE, BadImages("error"))
    next(stream)
    threads = [t for t in threading.enumerate() if t.name.startswith("decode")]
    assert threads
    stream.close()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_real_images_from_tfds(config, cifar10_dir):
    from vit_jax.data.sources import open_splits

    config.data.image_size = 8
    train, test = open_splits(
        "tfds:cifar10", dir=cifar10_dir, train_split=None, eval_split=None, image_size=SIZE)
    one = take(validate(config), train, 2)
    config.data.workers = 3
    assert_same(take(validate(config), train, 2), one)
    assert one[0]["image"].std() > 20
    assert len(test) == 10_000


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_a_batch(config, processes):
    """Together they read what one process would, augmentation included, also from a later step."""
    config.batch_size, config.data.train_crop, config.data.flip = 12, "inception", True
    source = Numbered(40)
    whole = take(config, source, 5, first_step=7)
    rows = [range(12)[12 * p // processes:][:12 // processes] for p in range(processes)]
    shares = [take(config, source, 5, first_step=7, rows=share) for share in rows]
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*shares, strict=True)]
    assert_same(joined, whole)


def test_rows_come_in_the_order_asked_for(config):
    [whole], [part] = take(config, Numbered(40), 1), take(config, Numbered(40), 1, rows=[3, 0, 9])
    assert ids(part) == [ids(whole)[row] for row in (3, 0, 9)]


def test_processes_share_the_evaluation(config):
    source = Numbered(10)
    parts = [
        list(eval_batches(source, config, SIZE, BadImages("error"), batch_size=4, rows=rows))
        for rows in ([0, 1], [2, 3])]
    seen = [[ids(batch) for batch in batches] for batches in parts]
    assert seen == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [0, 0]]]
    assert parts[1][-1]["mask"].tolist() == [False, False]


def test_record_order_is_what_a_run_reads(config):
    """The record ids of any step can be told without reading anything."""
    order = record_order(40, config.seed)
    for step, batch in enumerate(take(config, Numbered(40), 6)):
        assert ids(batch) == [order[10 * step + row] for row in range(10)]
    assert sorted(order[i] for i in range(40)) == list(range(40))
