"""From `config.data.source` to labelled images: TFDS, a folder, or what is built in."""

import os

from vit_jax.data.builtin import Digits, Synthetic
from vit_jax.data.folder import Folder
from vit_jax.data.records import DataSet, Record, Source
from vit_jax.data.tfds import Tfds
from vit_jax.errors import UserError, did_you_mean

__all__ = ["Record", "Source", "open_eval", "open_splits"]

_FORMS = ("tfds:NAME", "folder:PATH", "digits", "synthetic")


def open_splits(
    source: str,
    *,
    dir: str | None,
    train_split: str | None,
    eval_split: str | None,
    image_size: tuple[int, int],
) -> tuple[Source, Source]:
    """The training and the evaluation split of a source.

    Args:
      source: `tfds:NAME`, `tfds:NAME/CONFIG:VERSION`, `folder:PATH`, `digits` or `synthetic`.
      dir: where TFDS data sets are; None: $TFDS_DATA_DIR, else ~/tensorflow_datasets. The other
        sources have no use for it.
      train_split: None: 'train'. For TFDS also slices, such as 'train[:98%]'.
      eval_split: None: 'validation' else 'test' (TFDS), the first of
        `folder.EVAL_SPLITS` (folder), 'test'.
      image_size: (height, width) of the images that `synthetic` makes.

    Raises:
      UserError: the source or a split does not exist or cannot be used, and what to do.
    """
    data_set = _open(source, dir, image_size)
    train = data_set.open(train_split or "train")
    return train, data_set.open(eval_split or data_set.default_eval_split())


def open_eval(
    source: str, *, dir: str | None, eval_split: str | None, image_size: tuple[int, int]
) -> Source:
    """The evaluation split alone, as `open_splits` gives it; a training split need not exist."""
    data_set = _open(source, dir, image_size)
    return data_set.open(eval_split or data_set.default_eval_split())


def _open(source: str, dir: str | None, image_size: tuple[int, int]) -> DataSet:
    kind, colon, rest = source.partition(":")
    if kind == "tfds" and colon:
        return Tfds(rest, dir)
    if kind == "folder" and colon:
        return Folder(rest)
    if source == "digits":
        return Digits()
    if source == "synthetic":
        return Synthetic(image_size)
    raise UserError(
        f"config.data.source={source!r} is not a data source; it must be one of "
        f"{', '.join(_FORMS)}{_nearest(source)}"
    )


def _nearest(source: str) -> str:
    if os.path.isdir(os.path.expanduser(source)):
        return f"; did you mean {'folder:' + source!r}?"
    forms = {form.partition(":")[0]: form for form in _FORMS}
    hint = did_you_mean(source.partition(":")[0], forms)
    for kind, form in forms.items():
        hint = hint.replace(repr(kind), repr(form))
    return hint
