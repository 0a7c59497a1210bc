"""All probes of a model on one data set, for the command and during training."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import ml_collections
import numpy as np
from jax.sharding import Mesh

from vit_jax.data.pipeline import BadImages
from vit_jax.data.records import Source
from vit_jax.probes import PROBES
from vit_jax.probes.extraction import Features, make_extractor
from vit_jax.probes.fewshot import draw_all, fewshot_accuracies
from vit_jax.probes.knn import knn_accuracy
from vit_jax.probes.linear import LinearProbe, linear_probe
from vit_jax.training.step import Pixels


@dataclasses.dataclass(frozen=True)
class ProbeResults:
    """Accuracies on the test images; what was not asked for is empty or None."""

    fewshot: dict[int, list[float]]  # by shots, one for each seed
    knn: float | None
    linear: LinearProbe | None
    width: int  # of the features
    train_images: int  # that were read
    test_images: int

    def scalars(self) -> dict[str, float]:
        """`probe/5shot` (the mean of the seeds), `probe/knn`, `probe/linear`."""
        result = {f"probe/{shots}shot": float(np.mean(accuracies))
                  for shots, accuracies in self.fewshot.items()}
        if self.knn is not None:
            result["probe/knn"] = self.knn
        if self.linear is not None:
            result["probe/linear"] = self.linear.accuracy
        return result


def make_probes(
    model: nn.Module,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    train_source: Source,
    test_source: Source,
    bad_images: BadImages,
    pixels: Pixels = Pixels(),  # noqa: B008
    *,
    names: Sequence[str] = PROBES,
    shots: Sequence[int],
) -> Callable[[Any], ProbeResults]:
    """Returns probe(params) -> ProbeResults.

    Training images are seen as in evaluation, without augmentation. Few-shot probes alone read only
    the images that are chosen; the others read the whole split.

    Args:
      model: of any number of classes; its head is left out.
      config: read are data, eval_batch_size and batch_size.
      mesh: the devices.
      train_source: what the probes learn from.
      test_source: what they classify, in the same classes.
      bad_images: what to do about images that cannot be decoded.
      pixels: what images are normalised with.
      names: of PROBES.
      shots: images per class of the few-shot probes.
    """
    extract = make_extractor(model, config, mesh, bad_images, pixels)
    classes = len(train_source.class_names)
    draws = draw_all(train_source, max(shots)) if "fewshot" in names else []
    chosen = None
    if set(names) == {"fewshot"}:
        chosen = np.unique(np.concatenate([np.concatenate(draw) for draw in draws]))

    def probe(params):
        train: Features = extract(params, train_source, chosen)
        test: Features = extract(params, test_source)
        return ProbeResults(
            fewshot=fewshot_accuracies(train, test, draws, shots) if draws else {},
            knn=knn_accuracy(train, test, classes) if "knn" in names else None,
            linear=linear_probe(train, test, classes) if "linear" in names else None,
            width=train.features.shape[1],
            train_images=len(train.labels),
            test_images=len(test.labels),
        )

    return probe
