"""`tfds:NAME`: a prepared TensorFlow Datasets directory in ArrayRecord format, without TensorFlow.

The directory is found and checked here, file by file, before TFDS sees it: TFDS itself answers a
data set that is not there with minutes of attempts to download it.
"""

import json
import os
import re
import shlex
import sys

import numpy as np

from vit_jax.buckets import refuse_bucket
from vit_jax.data.array_record import Records
from vit_jax.data.records import Record, allow_open_files, missing_split
from vit_jax.errors import UserError, did_you_mean

_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.\-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_SPLIT = re.compile(r"\s*(?P<name>[\w\-]+)\s*(\[.*\])?\s*")
_MOST_LABELS_READ = 200_000


def import_tfds():
    """Imports TFDS, which takes a third of a second, for this source only."""
    # `sys.modules['tensorflow'] = None` is how Python is told that a module must not be imported;
    # TFDS takes any entry of that name for TensorFlow itself.
    if "tensorflow" in sys.modules and sys.modules["tensorflow"] is None:
        del sys.modules["tensorflow"]
    import tensorflow_datasets

    return tensorflow_datasets


class Tfds:
    """A prepared data set."""

    def __init__(self, name: str, dir: str | None):
        """Raises UserError where it is not prepared, not ArrayRecord, or not labelled images."""
        self._where = f"tfds:{name}"
        folder = _find(name, dir)
        _check_format(folder, name)
        tfds = import_tfds()
        try:
            self._builder = tfds.builder_from_directory(folder)
            if self._builder.info.file_format.value != "array_record":  # it is there as well
                self._builder.info.set_file_format(
                    "array_record", override=True, override_if_initialized=True)
            features = self._builder.info.features
            self._splits = [split for split in self._builder.info.splits if split != "all"]
        except Exception as error:  # whatever TFDS makes of files that are damaged
            raise UserError(
                f"{self._where}: {folder} cannot be opened by TFDS ({_first_line(error)}); prepare "
                "it again."
            ) from error
        self._where += f" in {folder}"
        self._origin = f"tfds:{self._builder.info.full_name}"
        self._class_names = class_names(features, self._where)
        # TFDS takes as many classes as label.labels.txt has lines.
        if len(self._class_names) != (promised := _promised_classes(folder)):
            raise UserError(f"{self._where}: label.labels.txt names {len(self._class_names)} "
                            f"classes, but features.json says {promised}; copy or prepare the data "
                            "set again.")

    def default_eval_split(self) -> str:
        for split in ("validation", "test"):
            if split in self._splits:
                return split
        raise UserError(
            f"{self._where} has no split 'validation' or 'test', only "
            f"{', '.join(map(repr, self._splits))}; name splits, for example "
            "config.data.train_split='train[:98%]' and config.data.eval_split='train[98%:]'."
        )

    def open(self, split: str) -> "TfdsSplit":
        for part in split.split("+"):
            match = _SPLIT.fullmatch(part)
            if match and match["name"] not in (*self._splits, "all"):
                raise missing_split(self._where, match["name"], self._splits, slices=True)
        try:
            if self._builder.info.splits[split].num_examples <= 0:
                raise ValueError("it holds no images")
            parts = self._builder.info.splits[split].file_instructions
        except Exception as error:
            raise UserError(
                f"{self._where}: cannot read split {split!r} ({_first_line(error)}); slices look "
                "like 'train[:90%]', 'train[90%:]' or 'train[:1000]'."
            ) from error
        files = {os.fspath(part.filename) for part in parts}
        missing = sorted(file for file in files if not os.path.exists(file))
        if missing:
            raise UserError(f"{self._where}: split {split!r} is incomplete, {missing[0]} is "
                            "missing; copy or prepare the data set again.")
        # A global shuffle reads from all files at once, and they stay open.
        allow_open_files(
            len(files), f"{self._where}: split {split!r}",
            "have fewer (--records_per_file of python -m vit_jax.prepare)")
        # Not TFDS's data source, which needs 20 times as long to decode a record as `_parse`.
        records = Records([(os.fspath(part.filename), part.skip, part.take) for part in parts])
        source = TfdsSplit(f"{self._origin} split {split!r}", split, self._class_names, records)
        if source[0].label < 0:
            raise UserError(
                f"{source.name} has no labels (the first is {source[0].label}); choose another of "
                f"{', '.join(map(repr, self._splits))}."
            )
        return source


class TfdsSplit:
    """One split, or a slice of one; records are read when they are asked for."""

    def __init__(self, name: str, split: str, class_names: tuple[str, ...], records: Records):
        """`records`: serialized tf.train.Examples."""
        self.name = name
        self.split = split
        self.class_names = class_names
        self._records = records

    def __setstate__(self, state):
        import_tfds()  # once for processes that share what is unpickled, not in each of them
        self.__dict__.update(state)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has no record {index}")
        image, label = _parse(*self._records.read(index, index + 1))
        return Record(image, label, f"{self.name} record {index}")

    def labels(self) -> np.ndarray | None:
        """int32 [len]; None for more than 200,000 records, since the images are read with them."""
        if len(self) > _MOST_LABELS_READ:
            return None
        labels = np.empty(len(self), np.int32)
        for start in range(0, len(self), 1024):
            rows = slice(start, min(start + 1024, len(self)))
            labels[rows] = [
                _parse(example)[1] for example in self._records.read(rows.start, rows.stop)]
        return labels

    def identity(self) -> str:
        return f"{self.name} {self._records.digest()}"


def _parse(example: bytes) -> tuple[bytes, int]:
    """The encoded image and the label of a serialized tf.train.Example."""
    from tensorflow_datasets.proto import tf_example_pb2

    features = tf_example_pb2.Example.FromString(example).features.feature
    return features["image"].bytes_list.value[0], features["label"].int64_list.value[0]


def _find(name: str, dir: str | None) -> str:
    """The folder of the wanted, or else the highest, version of a data set."""
    match = _NAME.fullmatch(name)
    if not match:
        raise UserError(
            f"config.data.source={'tfds:' + name!r} does not name a data set; use tfds:NAME, "
            "tfds:NAME/CONFIG or tfds:NAME:1.2.3."
        )
    came_from = "config.data.dir" if dir else "$TFDS_DATA_DIR"
    root = dir or os.environ.get("TFDS_DATA_DIR")
    if not root:
        came_from, root = "the folder for TFDS data sets", "~/tensorflow_datasets"
    refuse_bucket(came_from, root)
    root = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(root):
        raise UserError(
            f"tfds:{name}: {came_from}, {root}, "
            f"{'is not a folder' if os.path.exists(root) else 'does not exist'}; set "
            "config.data.dir to where "
            f"TFDS data sets are, or prepare it: {_prepare(name)}."
        )
    if os.path.exists(os.path.join(root, "dataset_info.json")):
        info = _info(root)
        for part, key in (("name", "name"), ("config", "configName"), ("version", "version")):
            if match[part] not in (None, info.get(key)):
                raise UserError(
                    f"tfds:{name}: {root} holds {part} {info.get(key)!r}, not {match[part]!r}; "
                    "set config.data.dir to the folder that holds your data sets."
                )
        return root

    # The data set's own folder will do as well as the folder above it.
    above = os.path.dirname(root) if os.path.basename(root) == match["name"] else root
    base = os.path.join(above, *filter(None, (match["name"], match["config"])))
    versions = _versions(base)
    if not versions and not match["config"]:
        configs = [config for config in _listdir(base) if _versions(os.path.join(base, config))]
        if len(configs) > 1:
            raise UserError(f"tfds:{name} has several configs in {base}; choose one of "
                            f"{', '.join(f'tfds:{name}/{config}' for config in configs)}.")
        if configs:
            base = os.path.join(base, configs[0])
            versions = _versions(base)
    if not versions:
        prepared = [other for other in _listdir(root) if os.path.isdir(os.path.join(root, other))]
        hint = did_you_mean(match["name"], set(prepared) - {match["name"]})
        raise UserError(f"tfds:{name} is not prepared: no {base}/VERSION/dataset_info.json{hint} "
                        f"Set config.data.dir, or prepare it: {_prepare(name)}.")
    version = match["version"] or versions[-1]
    if version not in versions:
        raise UserError(f"tfds:{name}: version {version} is not prepared in {base}, only "
                        f"{', '.join(versions)}{did_you_mean(version, versions)}")
    return os.path.join(base, version)


def _versions(base: str) -> list[str]:
    """The prepared versions in a folder, ascending by number."""
    found = [
        entry for entry in _listdir(base)
        if _VERSION.fullmatch(entry)
        and os.path.exists(os.path.join(base, entry, "dataset_info.json"))
    ]
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")])


def _listdir(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); check its permissions."
                        ) from error


def _check_format(folder: str, name: str) -> None:
    info = _info(folder)
    formats = [info.get("fileFormat") or "tfrecord", *info.get("alternativeFileFormats", [])]
    if "array_record" not in formats:
        if formats[0] == "tfrecord":
            how = f"python -m vit_jax.prepare --from={shlex.quote(folder)} --out=ANOTHER_DIR"
        else:
            how = _prepare(name, elsewhere=True)
        raise UserError(f"tfds:{name}: {folder} is in {formats[0]} format, but ArrayRecord is "
                        f"needed: {how}.")
    if not os.path.exists(os.path.join(folder, "features.json")):
        raise UserError(f"tfds:{name}: {folder} has no features.json, so the contents of its "
                        "records are unknown; copy or prepare the data set again.")


def _promised_classes(folder: str) -> int:
    features = _json(folder, "features.json")["featuresDict"]["features"]
    return int(features["label"]["classLabel"]["numClasses"])


def _info(folder: str) -> dict:
    return _json(folder, "dataset_info.json")


def _json(folder: str, name: str) -> dict:
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)}); copy or prepare the data "
                        "set again.") from error


def _prepare(name: str, *, elsewhere: bool = False) -> str:
    """The call that prepares a data set; TFDS skips one that is prepared in the same place."""
    where = "ANOTHER_DIR" if elsewhere else "DIR"
    return (f"tfds.builder({name!r}, data_dir='{where}').download_and_prepare("
            "file_format='array_record'), where TensorFlow is installed")


def class_names(features, where: str) -> tuple[str, ...]:
    """The classes of a data set with these TFDS features.

    Raises:
      UserError: an example is not an image with a class.
    """
    tfds = import_tfds()
    held = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    for key, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        if not isinstance(held.get(key), kind):
            kinds = ", ".join(f"{k!r} ({type(v).__name__})" for k, v in held.items()) or "none"
            raise UserError(
                f"{where} has no {kind.__name__} feature called {key!r}, only {kinds}; choose a "
                "data set made for image classification."
            )
    dtype = np.dtype(held["image"].np_dtype)
    if dtype not in (np.uint8, np.uint16):  # TFDS stores a float as the four bytes of an RGBA pixel
        raise UserError(f"{where} holds {dtype} images, not uint8 or uint16; choose a data set "
                        "made for image classification.")
    return tuple(held["label"].names)


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(". See ")[0].rstrip(".")
