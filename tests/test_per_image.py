"""A pass over a split gives every image once, whatever the batch size."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_tiny_config

from vit_jax.config import validate
from vit_jax.data.pipeline import BadImages
from vit_jax.data.records import Record
from vit_jax.errors import UserError
from vit_jax.per_image import make_per_image
from vit_jax.training import partition

pytestmark = pytest.mark.core


class Numbers:
    """Image i is of one colour, i; those in `bad` cannot be decoded."""

    name = "numbers"

    def __init__(self, count, bad=()):
        self._count = count
        self._bad = bad

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        image = b"" if index in self._bad else np.full((8, 8, 3), index, np.uint8)
        return Record(image, 100 + index, f"number {index}")


def run(source, batch_size):
    config = make_tiny_config()
    config.eval_batch_size = batch_size
    config = validate(config)

    def step(params, batch):
        pixel = batch["image"][:, 0, 0, 0].astype(jnp.float32)
        return {"twice": params * pixel, "seen_at": batch["index"]}

    per_image = make_per_image(step, config, partition.make_mesh(config), BadImages("skip"))
    return per_image(jnp.float32(2), source)


@pytest.mark.parametrize("batch_size", [1, 8, 20, 100])
def test_every_image_once_and_in_order(batch_size):
    rows = run(Numbers(27), batch_size)
    assert rows["twice"].tolist() == [2.0 * i for i in range(27)]
    assert rows["label"].tolist() == [100 + i for i in range(27)]
    assert rows["index"].tolist() == rows["seen_at"].tolist() == list(range(27))
    assert set(rows) == {"twice", "seen_at", "label", "index"}


def test_skipped_images_are_left_out():
    rows = run(Numbers(20, bad=(0, 13)), 8)
    assert rows["index"].tolist() == [i for i in range(20) if i not in (0, 13)]
    assert (rows["twice"] == 2 * rows["index"]).all()


def test_nothing_left():
    with pytest.raises(UserError, match="numbers has no image that can be evaluated"):
        run(Numbers(3, bad=(0, 1, 2)), 8)
