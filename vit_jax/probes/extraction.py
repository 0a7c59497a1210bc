"""The features of a split's images: what the probes work on."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from vit_jax.data.pipeline import BadImages
from vit_jax.data.records import Record, Source
from vit_jax.errors import UserError
from vit_jax.per_image import make_per_image
from vit_jax.training.step import Pixels, normalize


class Features(NamedTuple):
    """Of N images of a split, in its order."""

    features: np.ndarray  # float32 [N, D]: what the model's head would get
    labels: np.ndarray  # int32 [N]
    index: np.ndarray  # int [N], ascending: their places in the split


class Subset:
    """Some records of a source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.name = source.name
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Record:
        return self._source[int(self._indices[position])]


def make_extractor(
    model: nn.Module,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    bad_images: BadImages,
    pixels: Pixels = Pixels(),  # noqa: B008
) -> Callable[..., Features]:
    """Returns extract(params, source, indices=None) -> Features.

    Only the records `indices` (ascending) are read; None for all. Images are preprocessed as in
    evaluation.

    Args:
      model: of any number of classes; its head is left out.
      config: read are data, eval_batch_size and batch_size.
      mesh: the devices.
      bad_images: what to do about images that cannot be decoded.
      pixels: what images are normalised with.

    Raises:
      UserError: the model's output is not one vector per image.
    """
    if "unpooled" in getattr(model, "classifier", ""):
        raise UserError(f"A model with classifier={model.classifier!r} gives features of every "
                        "patch; probes need one vector per image.")
    body = model.clone(num_classes=0)

    def step(params, batch):
        features = body.apply({"params": params}, normalize(batch["image"], pixels), train=False)
        return {"features": features.astype(jnp.float32)}

    per_image = make_per_image(step, config, mesh, bad_images)

    def extract(params, source, indices=None):
        rows = per_image(params, source if indices is None else Subset(source, indices))
        index = rows["index"] if indices is None else indices[rows["index"]]
        return Features(rows["features"], rows["label"], index)

    return extract
