"""A TensorFlow Datasets directory in TFRecord format, without TensorFlow.

A TFRecord file is a sequence of records: the length (8 bytes, little endian), its checksum (4), the
data, their checksum (4). https://www.tensorflow.org/tutorials/load_data/tfrecord
"""

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from vit_jax.data.decode import BadImageError
from vit_jax.data.preparing.checksum import crc32c
from vit_jax.data.preparing.inputs import Item, digest
from vit_jax.data.tfds import class_names, import_tfds
from vit_jax.errors import UserError


class TfrecordInput:
    """The records of a prepared data set, in the order they are in, which TFDS has shuffled."""

    shuffled = True
    left_out = ()

    def __init__(self, folder: str):
        """Raises UserError where TFDS cannot open the folder, it holds no labelled images, or a
        file is damaged or missing."""
        self.where = self._folder = folder
        try:
            with open(os.path.join(folder, "dataset_info.json"), encoding="utf-8") as file:
                self._info = dict(json.load(file))
            builder = import_tfds().builder_from_directory(folder)
            self._features = builder.info.features
            splits = {name: split for name, split in builder.info.splits.items() if name != "all"}
            files = {name: [str(path) for path in split.filepaths]
                     for name, split in splits.items() if split.num_examples}
        except Exception as error:  # whatever TFDS makes of files that are damaged
            raise UserError(f"{folder} cannot be opened by TFDS ({error}); copy it again."
                            ) from error
        if (form := self._info.get("fileFormat") or "tfrecord") != "tfrecord":
            advice = (f"train on it with --config.data.source=tfds:{self._info['name']} "
                      f"--config.data.dir={folder}" if form == "array_record" else
                      "only tfrecord can be converted; prepare the original data")
            raise UserError(f"{folder} is already in {form} format; {advice}.")
        self.class_names = class_names(self._features, folder)
        self.data_set = "/".join(filter(None, (self._info["name"], self._info.get("configName"))))
        self.version = self._info["version"]
        self._files = files
        # Of every split, where each file's records begin, and how many there are before each file.
        self._offsets, self._firsts = {}, {}
        for name, paths in files.items():
            self._offsets[name] = [record_offsets(path) for path in paths]
            self._firsts[name] = np.cumsum([0] + [len(part) for part in self._offsets[name]])
            if self._firsts[name][-1] != splits[name].num_examples:
                raise UserError(
                    f"{folder}: split {name!r} has {self._firsts[name][-1]} records, not the "
                    f"{splits[name].num_examples} that dataset_info.json tells of; copy it again.")
        self.splits = {name: int(first[-1]) for name, first in self._firsts.items()}

    def digest(self) -> str:
        return digest(
            (name, os.path.basename(path), os.path.getsize(path), len(offsets))
            for name, paths in self._files.items()
            for path, offsets in zip(paths, self._offsets[name], strict=True))

    def read(self, split: str, index: int) -> Item:
        number = int(np.searchsorted(self._firsts[split], index, side="right")) - 1
        within = index - int(self._firsts[split][number])
        path = self._files[split][number]
        origin = f"{os.path.basename(path)} record {within}"
        with open(path, "rb") as file:
            file.seek(int(self._offsets[split][number][within]))
            (length,) = struct.unpack("<Q4x", file.read(12))
            data = file.read(length)
            checksum = file.read(4)
        if checksum != masked_checksum(data):
            raise BadImageError("its checksum does not match: it is damaged")
        try:
            item = Item(tf_example_pb2.Example.FromString(data), origin, data)
            _ = item.image, item.label
        except (DecodeError, IndexError) as error:
            raise BadImageError("it is not a tf.train.Example with an image and a label") from error
        return item

    def write_features(self, folder: Path, *, any_size: bool) -> dict:
        if any_size:
            tfds = import_tfds()
            features = dict(self._features) | {"image": tfds.features.Image()}
            tfds.features.FeaturesDict(features).save_config(str(folder))
        for entry in os.scandir(self._folder):
            # Names of classes and what other features store beside features.json.
            if entry.name.endswith((".labels.txt", ".json")) and entry.name != "dataset_info.json":
                if not (folder / entry.name).exists():
                    shutil.copyfile(entry.path, folder / entry.name)
        return {key: value for key, value in self._info.items() if key != "alternativeFileFormats"}


def record_offsets(path: str) -> np.ndarray:
    """int64 [n]: where the records of a file begin; only their lengths are read.

    Raises:
      UserError: it is missing, damaged, incomplete, or no TFRecord file.
    """
    offsets = []
    position = 0
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while position < size:
                file.seek(position)
                header = file.read(12)
                if header[8:] != masked_checksum(header[:8]):
                    raise UserError(f"{path} is damaged at byte {position}, or no TFRecord file; "
                                    "copy it again.")
                offsets.append(position)
                position += 12 + int.from_bytes(header[:8], "little") + 4
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); copy it again.") from error
    if position > size:
        raise UserError(f"{path} ends in the middle of a record; copy it again.")
    return np.array(offsets, np.int64)


def masked_checksum(data: bytes) -> bytes:
    """A TFRecord's checksum: a CRC-32C, rotated, since CRCs of data that hold CRCs are weak."""
    checksum = crc32c(data)
    rotated = (checksum >> 15 | checksum << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)
