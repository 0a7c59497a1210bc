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
from vit_jax.errors import UserError

# Batches that our pipeline may have prefetched before its clock starts, and that must not count.
_READ_AHEAD = 4


class _DamagedPhotos(BadImages):
    """Stops the measurement."""

    def __init__(self):
        super().__init__("error")

    def report(self, origin: str, reason: str) -> None:
        raise UserError(f"{origin} cannot be decoded: {reason}. Remove it from --images.")


def batches(config: ml_collections.ConfigDict, photos: Photos):
    """Endless training batches of the photos, as `vit_jax.main` reads them."""
    return train_batches(photos, config, image_size(config), _DamagedPhotos())


@contextlib.contextmanager
def decoding(config: ml_collections.ConfigDict, photos: Photos) -> Iterator[Run]:
    """Reads, decodes, crops and resizes batches and does nothing with them."""
    with contextlib.closing(batches(config, photos)) as stream:
        yield reader(stream, _READ_AHEAD)


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

    def fed(times):  # see `reader`
        run(_READ_AHEAD, lambda: trainer.put(next(stream)))
        seconds = run(times, lambda: trainer.put(next(stream)))
        time.sleep(1.5 * _READ_AHEAD * seconds / times)
        return seconds

    with contextlib.closing(stream):
        yield fed, lambda times: run(times, lambda: trainer.batch)
