"""Exact evaluation: every image of the split counts once, on any number of devices."""

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
from vit_jax.checkpoints.adapt import first_difference
from vit_jax.checkpoints.load import fit, read
from vit_jax.data.imagenet import same_classes
from vit_jax.data.pipeline import BadImages
from vit_jax.data.sources import Source, open_eval
from vit_jax.errors import UserError
from vit_jax.models.masked import MaskedPatchModel
from vit_jax.per_image import make_per_image
from vit_jax.training import distributed, masked_patches, partition
from vit_jax.training.state import group_blocks
from vit_jax.training.step import Pixels, make_eval_step


class Scores:
    """What a model does on a split of N images, padding and skipped images left out."""

    losses: np.ndarray  # float64 [N]
    accuracy: float

    @property
    def images(self) -> int:
        """Images that were evaluated, N."""
        return len(self.losses)

    def scalars(self, prefix: str = "eval") -> dict[str, float]:
        """Accuracy, loss, count."""
        return {
            f"{prefix}/accuracy": self.accuracy,
            f"{prefix}/loss": float(np.mean(self.losses)),
            f"{prefix}/images": self.images,
        }

    def __str__(self) -> str:
        return "  ".join(
            f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value:,}"
            for key, value in self.scalars().items())

    def final_line(self) -> str:
        """The line that a run ends with."""
        return f"eval/accuracy={self.accuracy:.4f} eval/images={self.images}"


@dataclasses.dataclass(frozen=True)
class Evaluation(Scores):
    """Of a classifier."""

    labels: np.ndarray  # int32 [N]
    predictions: np.ndarray  # int32 [N]
    losses: np.ndarray  # float64 [N]
    in_top5: np.ndarray  # bool [N]
    num_classes: int

    @property
    def accuracy(self) -> float:
        """Share of images whose most likely class is right."""
        return float(np.mean(self.predictions == self.labels))

    def scalars(self, prefix: str = "eval") -> dict[str, float]:
        """The same, and the top-5 accuracy where there are more than five classes."""
        result = super().scalars(prefix)
        if self.num_classes > 5:
            result[f"{prefix}/top5_accuracy"] = float(np.mean(self.in_top5))
        return result


@dataclasses.dataclass(frozen=True)
class MaskedEvaluation(Scores):
    """Of a model that predicts masked patches."""

    losses: np.ndarray  # float64 [N]
    right: np.ndarray  # float32 [N]: share of an image's corrupted patches

    @property
    def accuracy(self) -> float:
        """Share of the corrupted patches whose 3-bit mean colour is right."""
        return float(np.mean(self.right, dtype=np.float64))


def make_evaluator(
    model: nn.Module,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    source: Source,
    bad_images: BadImages,
    pixels: Pixels = Pixels(),  # noqa: B008
) -> Callable[[Any], Scores]:
    """Returns evaluate(params) -> Evaluation (MaskedEvaluation of a masked patch model) on all
    images of the source.

    Results are kept per image and averaged in float64 on the host, so neither the batch size nor
    the number of devices enters.
    """
    masked = isinstance(model, MaskedPatchModel)
    if masked:
        step = masked_patches.make_eval_step(model, config.masked.rate, config.seed, pixels)
    else:
        step = make_eval_step(model, config, pixels)
    per_image = make_per_image(step, config, mesh, bad_images)

    def evaluate(params):
        rows = per_image(params, source)
        losses = rows["loss"].astype(np.float64)
        if masked:
            return MaskedEvaluation(losses, rows["accuracy"])
        return Evaluation(
            labels=rows["label"],
            predictions=rows["prediction"],
            losses=losses,
            in_top5=rows["in_top5"],
            num_classes=len(source.class_names),
        )

    return evaluate


def evaluate_checkpoint(
    config: ml_collections.ConfigDict, path: str | Path, which: str = "last", ema: bool = False
) -> Evaluation:
    """Evaluates a checkpoint without training, at the config's image size and preprocessing.

    Args:
      config: read are data, eval_batch_size, dtype, mesh, loss, init_position_resize,
        model.num_heads, model.activation and, where it has no parameters, model.position_embedding
        (for a file that does not tell), and what `group_blocks` reads.
      path: a run's workdir, or anything that `load_model` reads.
      which: 'last' or 'best' checkpoint of a workdir.
      ema: its averaged weights.

    Raises:
      UserError: no checkpoint, one without a head, or data with other classes than its own.
    """
    contents = read(path, num_heads=config.model.num_heads, checkpoint=which, ema=ema)
    if not contents.fields["num_classes"]:
        raise UserError(
            f"{contents.report.source} has no classes to evaluate; probe its features with "
            "python -m vit_jax.probe, or fine-tune it with --config.init."
        )
    size = config_lib.image_size(config)
    source = open_eval(
        config.data.source, dir=config.data.dir, eval_split=config.data.eval_split,
        image_size=size)
    known, names = contents.class_names or source.class_names, source.class_names
    if not same_classes(known, names) or contents.fields["num_classes"] != len(names):
        as_many = contents.fields["num_classes"] == len(known) == len(names)
        difference = first_difference(known, names) if as_many else (
            f"{len(names)} against {contents.fields['num_classes']}")
        raise UserError(
            f"{source.name} has other classes than {contents.report.source}: {difference}.")
    mesh = partition.make_mesh(config)
    fields = contents.fields | {"dtype": jnp.dtype(config.dtype)} | _told(config, contents.fields)
    model = group_blocks(contents.module(**fields), config, mesh)
    params = jax.device_put(fit(contents, model, size, config), partition.replicated(mesh))
    bad_images = BadImages(config.data.on_bad_image)
    pixels = pixel_statistics(config, contents.preprocessing)
    evaluation = make_evaluator(model, config, mesh, source, bad_images, pixels)(params)
    print(contents.report)
    print(f"On {source.name}, {config.data.eval_crop} to {size[0]}x{size[1]}:")
    print(evaluation)
    if skipped := distributed.distinct(bad_images.origins):
        print(f"{skipped} images could not be decoded and were skipped.")
    return evaluation


def _told(config, fields):
    """What the config says of a model whose tensors cannot show it."""
    keys = ["activation"] if "activation" in fields else []
    if fields.get("position_embedding") in ("none", "sincos_2d"):
        keys.append("position_embedding")
    return {key: config.model[key] for key in keys if config.model[key] is not None}


def pixel_statistics(config: ml_collections.ConfigDict, told: dict[str, Any]) -> Pixels:
    """Mean and std by the config's word, else by that of a checkpoint's preprocessing, else 0.5."""
    mean, std = (
        config.data[key] if config.data[key] is not None else told.get(key, 0.5)
        for key in ("mean", "std"))
    return Pixels(mean, std)
