"""From a source to batches: every batch is a pure function of the seed and the step.

The order is a global shuffle of each epoch and the augmentation of a record depends only on the
seed and its position in the stream, so a run can resume at any step, with any number of workers,
without any stored state. Workers decode ahead of the training step, see
`vit_jax.data.assembly`.
"""

import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import cv2
import grain.python as grain
import ml_collections
import numpy as np

from vit_jax.data import augment, workers
from vit_jax.data.assembly import Batch, Example, Maker, Threads, assemble
from vit_jax.data.decode import BadImageError, decode_image, open_image
from vit_jax.data.randaugment import randaugment
from vit_jax.data.sources import Source
from vit_jax.errors import UserError


class BadImages:
    """What happens to images that cannot be decoded: stop the run, or leave out and count."""

    def __init__(self, policy: str):
        self.policy = policy
        self.last = ""  # for messages
        self.origins: set[str] = set()  # of the images that were skipped
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Different images that were skipped."""
        return len(self.origins)

    def report(self, origin: str, reason: str) -> None:
        """Raises UserError, or counts the image and logs a warning once per image."""
        if self.policy == "error":
            raise UserError(
                f"{origin} cannot be decoded: {reason}. Replace it, or leave out such images with "
                "--config.data.on_bad_image=skip."
            )
        with self._lock:
            new = origin not in self.origins
            self.origins.add(origin)
            self.last = f"{origin} ({reason})"
        if new:
            logging.getLogger(__name__).warning("skipped %s: %s", origin, reason)


def train_batches(
    source: Source,
    config: ml_collections.ConfigDict,
    size: tuple[int, int],
    bad_images: BadImages,
    *,
    first_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Endless training batches, from the one of step `first_step` on.

    Args:
      source: the training split.
      config: the run's config; read are seed, batch_size and data.
      size: (height, width) of the model's input.
      bad_images: what to do about images that cannot be decoded.
      first_step: updates that were already made.
      rows: which rows of every batch, in this order; None for all. This is how processes split a
        batch.

    Yields:
      image uint8 [rows, H, W, 3], label int32 [rows], mask bool [rows], flip bool [rows]: whether
      the image is still to be mirrored (never with RandAugment, which comes after the flip).
    """
    share = np.arange(config.batch_size) if rows is None else np.asarray(rows)
    positions = ((step * config.batch_size + share).tolist()
                 for step in itertools.count(first_step))
    make = functools.partial(_train_examples, source, config.data, size, config.seed)
    return _batches(make, positions, source, size, config.data, bad_images)


def _train_examples(source, settings, size, seed) -> Callable[[int], Example]:
    """Returns a function that makes the example at a position of the stream."""
    view = train_view(size, settings)
    flips, operations = settings.flip, settings.randaugment

    def example(index, rng):
        flip = flips and bool(rng.random() < 0.5)
        record = source[index]
        try:
            image = view(record.image, rng)
        except BadImageError as error:
            return _bad(record, error, size)
        if operations:
            # The flip cannot wait for the device: Google's shears are not symmetric under it.
            if flip:
                image, flip = cv2.flip(image, 1), False
            number, magnitude = operations
            image = randaugment(image, rng, operations=number, magnitude=magnitude)
        return Example(image, record.label, flip=flip)

    # An independent generator for every position in the stream of records, without state.
    return record_order(len(source), seed).random_map(example).__getitem__


def record_order(records: int, seed: int) -> grain.MapDataset:
    """The stream of record numbers that a run trains on: one global shuffle after another.

    It is computed by position, without state or a table, so any number of records takes the same
    time and memory. Row r of the batch of step s (from 0) is position `s * batch_size + r`.
    """
    return grain.MapDataset.range(records).seed(seed).shuffle().repeat()


def eval_batches(
    source: Source,
    config: ml_collections.ConfigDict,
    size: tuple[int, int],
    bad_images: BadImages,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """One pass over a split in order; the last batch is padded with images whose mask is False.

    `rows` as in `train_batches`.
    """
    share = np.arange(batch_size) if rows is None else np.asarray(rows)
    positions = ((start + share).tolist() for start in range(0, len(source), batch_size))
    make = functools.partial(_eval_examples, source, config.data, size)
    return _batches(make, positions, source, size, config.data, bad_images)


def _eval_examples(source, settings, size) -> Callable[[int], Example]:
    """Returns a function that makes the example of a record, or padding after the last one."""
    def example(index):
        if index >= len(source):
            return Example(np.zeros((*size, 3), np.uint8), 0, valid=False)
        record = source[index]
        try:
            image = decode_image(record.image, max_pixels=settings.max_pixels)
        except BadImageError as error:
            return _bad(record, error, size)
        return Example(eval_crop(image, size, settings), record.label)

    return example


def _bad(record, error, size):
    return Example(np.zeros((*size, 3), np.uint8), record.label, valid=False,
                   problem=(record.origin, str(error)))


def _batches(make: Maker, positions, source, size, settings, bad_images) -> Iterator[Batch]:
    """The batches of a stream, made by threads or processes as `settings` (config.data) says."""
    count = available_cores() if settings.workers is None else settings.workers
    crew = workers.Processes(make, count) if _by_processes(
        settings.worker_kind, count, source) else Threads(make)
    yield from assemble(crew, positions, size, count, bad_images.report)


def _by_processes(kind, count, source) -> bool:
    if kind == "process" and not workers.AVAILABLE:
        raise UserError("config.data.worker_kind='process' needs Linux; set it to 'thread'.")
    if kind == "auto":  # a single worker has no contention, and pixels in memory take no time
        return (workers.AVAILABLE and count > 1 and len(source) > 0
                and isinstance(source[0].image, bytes))
    return kind == "process" and count > 0


def train_view(
    size: tuple[int, int], settings: ml_collections.ConfigDict
) -> Callable[[bytes | np.ndarray, np.random.Generator], np.ndarray]:
    """A function that decodes a record's image and crops it as `train_crop` of `settings`, the
    config's section `data`, names; uint8 [H, W, 3]. It raises BadImageError where an image cannot
    be decoded."""
    # Read here and not for every image: ConfigDict takes microseconds to find an attribute.
    max_pixels, resizing = settings.max_pixels, _resizing(settings)
    if settings.train_crop == "inception":
        cropping = {"area": settings.crop_area, "aspect": settings.crop_aspect,
                    "scaled_decode": settings.scaled_decode}
        return lambda data, rng: augment.inception_crop(
            open_image(data, max_pixels=max_pixels), size, rng, **cropping, **resizing)
    if settings.train_crop == "pad":
        padding = settings.crop_padding
        return lambda data, rng: augment.pad_crop(
            decode_image(data, max_pixels=max_pixels), size, rng, padding=padding, **resizing)
    return lambda data, rng: augment.squash(
        decode_image(data, max_pixels=max_pixels), size, **resizing)


def eval_crop(image, size, data: ml_collections.ConfigDict) -> np.ndarray:
    """The evaluation's view that `data.eval_crop` names; uint8 [h, w, 3] to [H, W, 3]."""
    if data.eval_crop == "squash":
        return augment.squash(image, size, **_resizing(data))
    resize_to = data.eval_resize or round(min(size) * 8 / 7)
    return augment.center_crop(image, size, resize_to=resize_to, **_resizing(data))


def _resizing(data):
    return {"antialias": data.antialias, "interpolation": data.interpolation}


def available_cores() -> int:
    """Cores this process may use, which in a container or job are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
