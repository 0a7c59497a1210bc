"""Our side of `--what=input`, and training that is fed by it."""

import contextlib
import time
from collections.abc import Iterator

import jax
import ml_collections

from vit_jax.benchmarking.models import Trainer
from vit_jax.benchmarking.peers.serve import reader
from vit_jax.benchmarking.photos import Photos
from vit_jax.benchmarking.timing import Run
from vit_jax.config import image_size
from vit_jax.data.pipeline import BadImages, train_batches

# Batches that a pipeline may have prefetched before its clock starts, and that must not count.
READ_AHEAD = 4


def batches(config: ml_collections.ConfigDict, photos: Photos):
    """Endless training batches of the photos, as `vit_jax.main` reads them."""
    return train_batches(photos, config, image_size(config), BadImages("error"))


@contextlib.contextmanager
def decoding(config: ml_collections.ConfigDict, photos: Photos) -> Iterator[Run]:
    """Reads, decodes, crops and resizes batches and does nothing with them."""
    with contextlib.closing(batches(config, photos)) as stream:
        yield reader(stream, READ_AHEAD)


@contextlib.contextmanager
def fed_training(
    config: ml_collections.ConfigDict, photos: Photos
) -> Iterator[tuple[Run, Run]]:
    """Training steps whose batches come (from the photos, from memory); one compiled step."""
    trainer = Trainer(config)
    step = trainer.compile()
    stream = batches(config, photos)

    def run(times, feed):
        begin = time.perf_counter()
        for _ in range(times):
            trainer.state, metrics = step(trainer.state, feed())
        jax.block_until_ready(metrics)
        return time.perf_counter() - begin

    with contextlib.closing(stream):
        yield (lambda times: run(times, lambda: trainer.put(next(stream))),
               lambda times: run(times, lambda: trainer.batch))
