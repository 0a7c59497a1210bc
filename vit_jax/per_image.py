"""One pass over a split: what a step says about every image, on any number of devices."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from vit_jax import config as config_lib
from vit_jax.data.pipeline import BadImages, eval_batches
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.training import parallel, partition
from vit_jax.training.step import Batch


def make_per_image(
    step: Callable[[Any, Batch], dict[str, jax.Array]],
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    bad_images: BadImages,
) -> Callable[[Any, Source], dict[str, np.ndarray]]:
    """Returns run(params, source), which collects the step's results image by image.

    Args:
      step: step(params, batch) -> arrays [B, ...]. Beside what `eval_batches` yields the batch has
        `index`, int32 [B]: each image's place in the source.
      config: read are data, eval_batch_size and batch_size.
      mesh: the devices.
      bad_images: what to do about images that cannot be decoded.

    Returns:
      The function; it gives the same arrays for all images, in order, and their `label` and
      `index`, int32 [N]. Padding and skipped images are left out. Every process gets all of it. It
      raises UserError where nothing is left.
    """
    size = config_lib.image_size(config)
    shards = partition.batch_shards(mesh)
    # Any size works: the batch is rounded up to the devices, the surplus masked.
    batch_size = -(-(config.eval_batch_size or config.batch_size) // shards) * shards
    share = parallel.process_rows(mesh, batch_size)

    def step_and_rows(params, batch):
        return step(params, batch) | {key: batch[key] for key in ("label", "index", "mask")}

    compiled = parallel.compile_eval_step(step_and_rows, mesh, batch_size)

    def run(params, source):
        rows = collections.defaultdict(list)
        waiting: collections.deque = collections.deque()

        def collect():
            outputs = jax.device_get(waiting.popleft())
            mask = outputs.pop("mask")
            for key, values in outputs.items():
                rows[key].append(values[mask])

        batches = eval_batches(
            source, config, size, bad_images, batch_size=batch_size, rows=share)
        for number, batch in enumerate(batches):
            index = np.int32(number * batch_size + share)
            waiting.append(compiled(params, batch | {"index": index}))
            if len(waiting) > 1:  # one batch computes while the next is decoded
                collect()
        while waiting:
            collect()
        joined = {key: np.concatenate(values) for key, values in rows.items()}
        if not joined or not len(joined["label"]):
            raise UserError(f"{source.name} has no image that can be evaluated.")
        return joined

    return run
