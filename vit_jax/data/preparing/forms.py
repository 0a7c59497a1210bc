"""Which form of raw data a path holds."""

import glob
import os
import tarfile

from vit_jax.data.folder import is_folder, is_visible
from vit_jax.data.preparing import imagenet
from vit_jax.data.preparing.folders import FolderInput
from vit_jax.data.preparing.inputs import Input
from vit_jax.data.preparing.tars import list_folder, open_archive, open_class_tars
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
        listed = list_folder(path)
        entries = [entry.name for entry in listed]
        if "dataset_info.json" in entries:
            return TfrecordInput(path)
        _refuse_prepared(path, "*")
        if imagenet.TRAIN in entries or imagenet.VALIDATION in entries:
            return imagenet.open_imagenet(path)
        archives = [entry.name for entry in listed
                    if entry.name.lower().endswith((".tar", *_COMPRESSED))
                    and is_visible(entry.name) and not is_folder(entry)]
        # Next to folders, archives were unpacked or are copies: train.tar is not a class then.
        if not archives or any(is_visible(entry.name) and is_folder(entry) for entry in listed):
            return _open_folder(path, archives)
        if any(archive.lower().endswith(".tar") for archive in archives):
            return open_class_tars(path)
        path = os.path.join(path, archives[0])
    if path.lower().endswith(_COMPRESSED):
        raise UserError(f"{path} is compressed, so it cannot be read in place; unpack it and give "
                        "the folder.")
    if os.path.isfile(path):
        with open_archive(path) as file:
            if tarfile.is_tarfile(file):
                return open_class_tars(path)
    raise UserError(f"--from={path} is neither a folder nor a tar file.")


def _refuse_prepared(path: str, *below: str) -> None:
    found = glob.glob(os.path.join(glob.escape(path), *below, "dataset_info.json"))
    if found:
        raise UserError(f"--from={path} holds prepared data sets; give one of "
                        f"{', '.join(sorted(map(os.path.dirname, found)))}.")


def _open_folder(path: str, archives: list[str]) -> FolderInput:
    try:
        return FolderInput(path, archives)
    except UserError as error:
        _refuse_prepared(path, "*", "*")
        tars = [archive for archive in archives if archive.lower().endswith(".tar")]
        if not tars:
            raise
        raise UserError(f"{error} Archives such as {tars[0]} are only read if there are no folders "
                        "beside them.") from error
