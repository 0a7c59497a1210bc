"""Sizes of public data sets, to plan a run on a machine that does not have them."""

import re

# TFDS name: (images of each split, classes), as in www.tensorflow.org/datasets/catalog/NAME; the
# test split of imagenet2012 is left out, since it has no labels. imagenet21k is not in the catalog:
# these are the counts that en.wikipedia.org/wiki/ImageNet gives for the whole, those of the Fall
# 2011 release. Google's own copy has 21,843 classes (big_vision/configs/vit_i21k.py).
_DATA_SETS = {
    "cifar10": ({"train": 50_000, "test": 10_000}, 10),
    "cifar100": ({"train": 50_000, "test": 10_000}, 100),
    "imagenet2012": ({"train": 1_281_167, "validation": 50_000}, 1000),
    "imagenet21k": ({"full": 14_197_122}, 21_841),
    "oxford_flowers102": ({"train": 1_020, "validation": 1_020, "test": 6_149}, 102),
    "oxford_iiit_pet": ({"train": 3_680, "test": 3_669}, 37),
}
_SPLIT = re.compile(r"(?P<name>\w+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


def known_size(source: str, split: str) -> tuple[int, int] | None:
    """(images, classes) of a split of `tfds:NAME`; None where it is not known here.

    Args:
      source: `config.data.source`.
      split: a split or slices of splits, as TFDS writes them: 'train', 'train[:99%]',
        'full[51200:]', 'train+test'.
    """
    name = source.removeprefix("tfds:").split(":")[0].split("/")[0]
    if not source.startswith("tfds:") or name not in _DATA_SETS:
        return None
    splits, classes = _DATA_SETS[name]
    images = 0
    for part in split.split("+"):
        match = _SPLIT.fullmatch(part.strip())
        if not match or match["name"] not in splits:
            return None
        total = splits[match["name"]]
        start, stop = _position(match["start"] or "0", total), _position(
            match["stop"] or str(total), total)
        images += max(0, stop - start)
    return images, classes


def _position(text, total):
    number = int(text.rstrip("%"))
    if text.endswith("%"):
        number = round(number * total / 100)
    return min(total, number + total if number < 0 else number)
