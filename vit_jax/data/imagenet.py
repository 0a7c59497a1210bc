"""The classes of ImageNet (ILSVRC 2012), and how others spell them."""

import functools
from collections.abc import Sequence
from importlib import resources


@functools.cache
def class_names() -> tuple[str, ...]:
    """The 1000 classes in English; the file says where they come from."""
    text = resources.files("vit_jax.data").joinpath("imagenet_classes.txt").read_text("utf-8")
    return tuple(line for line in text.splitlines() if not line.startswith("#"))


def same_classes(some: Sequence[str], others: Sequence[str]) -> bool:
    """Whether these are the same classes in the same order: by their names, or because both lists
    are ImageNet's, in whatever spelling."""
    return tuple(some) == tuple(others) or _are_imagenets(some) and _are_imagenets(others)


def _are_imagenets(names):
    """By English names (Hugging Face: 'tench, Tinca tinca'), or by WordNet ids in their order.

    Lists of English names differ in a few classes ('maillot' is one in two of them); lists of
    other data do not agree with ninety percent of these.
    """
    ours = class_names()
    if len(names) != len(ours):
        return False
    if (names[0], names[-1]) == ("n01440764", "n15075141"):
        return list(names) == sorted(names)
    alike = sum(ours[i].lower() in map(str.strip, name.lower().split(","))
                for i, name in enumerate(names))
    return alike >= 0.9 * len(ours)
