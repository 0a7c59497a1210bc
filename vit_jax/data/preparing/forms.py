"""Which form of raw data a path holds."""

import os
import tarfile

from vit_jax.data.preparing import imagenet
from vit_jax.data.preparing.folders import FolderInput
from vit_jax.data.preparing.inputs import Input
from vit_jax.data.preparing.tars import open_class_tars
from vit_jax.data.preparing.tfrecord import TfrecordInput
from vit_jax.errors import UserError

_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zip")


def open_input(path: str) -> Input:
    """Lists what is under a path: image folder, ImageNet archives, archives by class, TFRecords.

    Raises:
      UserError: there is nothing, or nothing that can be read.
    """
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.exists(path):
        raise UserError(f"--from={path} does not exist.")
    if os.path.isdir(path):
        entries = sorted(os.listdir(path))
        if "dataset_info.json" in entries:
            return TfrecordInput(path)
        versions = [entry for entry in entries
                    if os.path.exists(os.path.join(path, entry, "dataset_info.json"))]
        if versions:
            raise UserError(f"--from={path} holds prepared data sets; give one of "
                            f"{', '.join(os.path.join(path, entry) for entry in versions)}.")
        if imagenet.TRAIN in entries or imagenet.VALIDATION in entries:
            return imagenet.open_imagenet(path)
        if any(entry.endswith(".tar") for entry in entries):
            return open_class_tars(path)
        compressed = [entry for entry in entries if entry.endswith(_COMPRESSED)]
        if compressed and not any(os.path.isdir(os.path.join(path, entry)) for entry in entries):
            path = os.path.join(path, compressed[0])
        else:
            return FolderInput(path)
    if path.endswith(_COMPRESSED):
        raise UserError(f"{path} is compressed, so it cannot be read in place; unpack it and give "
                        "the folder.")
    if os.path.isfile(path) and tarfile.is_tarfile(path):
        return open_class_tars(path)
    raise UserError(f"--from={path} is neither a folder nor a tar file.")
