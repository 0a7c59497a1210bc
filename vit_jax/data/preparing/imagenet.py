"""The official archives of ImageNet (ILSVRC 2012): where labels and class names come from."""

import io
import os
import re
import tarfile

import numpy as np
import scipy.io

from vit_jax.data.imagenet import class_names
from vit_jax.data.preparing.tars import (
    Archive,
    Members,
    TarInput,
    class_archives,
    list_classes,
    members,
    open_archive,
)
from vit_jax.errors import UserError

TRAIN = "ILSVRC2012_img_train.tar"
VALIDATION = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"

_VALIDATION_NAME = re.compile(rb"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG")


def open_imagenet(folder: str) -> TarInput:
    """Whichever of the two image archives a folder holds, as the splits train and validation.

    Classes are numbered as usual, by their sorted WordNet ids.

    Raises:
      UserError: the development kit, which holds the validation labels, is not beside the
        validation images, or an archive is not what its name says.
    """
    splits = {}
    wnids = None
    if os.path.exists(os.path.join(folder, TRAIN)):
        archives = class_archives(os.path.join(folder, TRAIN))
        wnids = [archive.name for archive in archives]
        splits["train"] = list_classes(archives)
    if os.path.exists(os.path.join(folder, VALIDATION)):
        known, truth = read_devkit(os.path.join(folder, DEVKIT))
        if wnids not in (None, known):
            raise UserError(f"{folder}: the {len(wnids)} classes of {TRAIN} are not the "
                            f"{len(known)} of {DEVKIT}; download the archive again.")
        wnids = known
        splits["validation"] = _validation(os.path.join(folder, VALIDATION), truth)
    names = list(class_names()) if len(wnids) == 1000 else wnids
    return TarInput(folder, "imagenet2012", names, splits)


def read_devkit(path: str) -> tuple[list[str], np.ndarray]:
    """The development kit's classes, and the labels of the validation images.

    Args:
      path: of ILSVRC2012_devkit_t12.tar.gz.

    Returns:
      The sorted WordNet ids, and int32 [n], of which entry i - 1 is the class, among these ids, of
      ILSVRC2012_val_{i}.

    Raises:
      UserError: it is not there or cannot be read.
    """
    try:
        with tarfile.open(path) as archive:
            files = {os.path.basename(name): archive.extractfile(name).read()
                     for name in archive.getnames()
                     if name.endswith(("meta.mat", "ILSVRC2012_validation_ground_truth.txt"))}
        synsets = scipy.io.loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"]
        # Inner nodes of the hierarchy are listed too; the classes are its leaves.
        wnid = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"])
                for synset in synsets if synset["num_children"] == 0}
        numbers = files["ILSVRC2012_validation_ground_truth.txt"].split()
        wnids = sorted(wnid.values())
        label = {number: wnids.index(name) for number, name in wnid.items()}
        return wnids, np.array([label[int(number)] for number in numbers], np.int32)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: it holds the labels of {VALIDATION}; download it from where the "
            f"images come from, or move {VALIDATION} away to prepare only the training images."
        ) from error
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError, IndexError, TypeError
            ) as error:
        raise UserError(f"{path} is damaged or not a development kit ({error!r}); download it "
                        "again."
                        ) from error


def _validation(path: str, truth: np.ndarray) -> Members:
    with open_archive(path) as file:
        images = [(match, offset) for name, offset, _, _ in members(file, Archive(path))
                  if (match := _VALIDATION_NAME.fullmatch(name))]
    if len(images) != len(truth):
        raise UserError(f"{path} holds {len(images)} images, but the development kit has labels of "
                        f"{len(truth)}; download the archive again.")
    images.sort(key=lambda image: int(image[0][1]))
    if [int(match[1]) for match, _ in images] != list(range(1, len(truth) + 1)):
        raise UserError(f"{path}: the images are not numbered from 1 to {len(truth)}; download the "
                        "archive again.")
    offsets = np.array([offset for _, offset in images], np.int64)
    return Members([path], np.zeros(len(images), np.int32), offsets, truth)
