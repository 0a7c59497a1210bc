"""Exact evaluation: every image of the split counts once, on any number of devices."""

import collections
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from vit_jax import config as config_lib
from vit_jax.checkpoints.load import Contents, fit, read
from vit_jax.data.pipeline import BadImages, eval_batches
from vit_jax.data.sources import Source, open_eval
from vit_jax.errors import UserError
from vit_jax.training import parallel, partition
from vit_jax.training.step import Pixels, make_eval_step


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model does on a split of N images, padding and skipped images left out."""

    labels: np.ndarray  # int32 [N]
    predictions: np.ndarray  # int32 [N]
    losses: np.ndarray  # float64 [N]
    in_top5: np.ndarray  # bool [N]
    num_classes: int

    @property
    def images(self) -> int:
        """Images that were evaluated, N."""
        return len(self.labels)

    @property
    def accuracy(self) -> float:
        """Share of images whose most likely class is right."""
        return float(np.mean(self.predictions == self.labels))

    def scalars(self, prefix: str = "eval") -> dict[str, float]:
        """Accuracy, loss, count; the top-5 accuracy where there are more than five classes."""
        result = {
            f"{prefix}/accuracy": self.accuracy,
            f"{prefix}/loss": float(np.mean(self.losses)),
            f"{prefix}/images": self.images,
        }
        if self.num_classes > 5:
            result[f"{prefix}/top5_accuracy"] = float(np.mean(self.in_top5))
        return result

    def __str__(self) -> str:
        return "  ".join(
            f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value:,}"
            for key, value in self.scalars().items())

    def final_line(self) -> str:
        """The line that a run ends with."""
        return f"eval/accuracy={self.accuracy:.4f} eval/images={self.images}"


def make_evaluator(
    model: nn.Module,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    source: Source,
    bad_images: BadImages,
    pixels: Pixels = Pixels(),  # noqa: B008
) -> Callable[[Any], Evaluation]:
    """Returns evaluate(params) -> Evaluation on all images of the source.

    Results are kept per image and averaged in float64 on the host, so neither the batch size nor
    the number of devices enters.
    """
    size = config_lib.image_size(config)
    shards = partition.batch_shards(mesh)
    # Any size works: the batch is rounded up to the devices, the surplus masked.
    batch_size = -(-(config.eval_batch_size or config.batch_size) // shards) * shards
    step = parallel.compile_eval_step(make_eval_step(model, config, pixels), mesh, batch_size)
    share = parallel.process_rows(mesh, batch_size)

    def evaluate(params):
        rows = collections.defaultdict(list)
        waiting: collections.deque = collections.deque()

        def collect():
            outputs = jax.device_get(waiting.popleft())
            mask = outputs.pop("mask")
            for key, values in outputs.items():
                rows[key].append(values[mask])

        for batch in eval_batches(
                source, config, size, bad_images, batch_size=batch_size, rows=share):
            waiting.append(step(params, batch))
            if len(waiting) > 1:  # one batch computes while the next is decoded
                collect()
        while waiting:
            collect()

        joined = {key: np.concatenate(values) for key, values in rows.items()}
        if not len(joined["label"]):
            raise UserError(f"{source.name} has no image that can be evaluated.")
        return Evaluation(
            labels=joined["label"],
            predictions=joined["prediction"],
            losses=joined["loss"].astype(np.float64),
            in_top5=joined["in_top5"],
            num_classes=len(source.class_names),
        )

    return evaluate


def evaluate_checkpoint(
    config: ml_collections.ConfigDict, path: str | Path, which: str = "last", ema: bool = False
) -> Evaluation:
    """Evaluates a checkpoint without training, at the config's image size and preprocessing.

    Args:
      config: read are data, eval_batch_size, dtype, mesh, loss and init_position_resize.
      path: a run's workdir, or anything that `load_model` reads.
      which: 'last' or 'best' checkpoint of a workdir.
      ema: its averaged weights.

    Raises:
      UserError: no checkpoint, or data with other classes than the checkpoint's.
    """
    contents = read(path, checkpoint=which, ema=ema)
    size = config_lib.image_size(config)
    source = open_eval(
        config.data.source, dir=config.data.dir, eval_split=config.data.eval_split,
        image_size=size)
    known = contents.class_names
    if (known or source.class_names) != source.class_names or (
            contents.fields["num_classes"] != len(source.class_names)):
        raise UserError(
            f"{source.name} has other classes than {contents.report.source}: "
            f"{len(source.class_names)} against {contents.fields['num_classes']}."
        )
    model = contents.module(**(contents.fields | {"dtype": jnp.dtype(config.dtype)}))
    mesh = partition.make_mesh(config)
    params = jax.device_put(fit(contents, model, size, config), partition.replicated(mesh))
    bad_images = BadImages(config.data.on_bad_image)
    pixels = pixel_statistics(config, contents)
    evaluation = make_evaluator(model, config, mesh, source, bad_images, pixels)(params)
    print(contents.report)
    print(f"On {source.name}, {config.data.eval_crop} to {size[0]}x{size[1]}:")
    print(evaluation)
    if bad_images.count:
        print(f"{bad_images.count} images could not be decoded and were skipped.")
    return evaluation


def pixel_statistics(config: ml_collections.ConfigDict, start: Contents | None) -> Pixels:
    """Mean and std by the config's word, else by that of the checkpoint, else 0.5."""
    told = start.preprocessing if start else {}
    mean, std = (
        config.data[key] if config.data[key] is not None else told.get(key, 0.5)
        for key in ("mean", "std"))
    return Pixels(mean, std)
