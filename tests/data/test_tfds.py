import base64
import concurrent.futures
import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from vit_jax.data import tfds as tfds_module
from vit_jax.data.decode import decode_image
from vit_jax.data.sources import open_eval, open_splits
from vit_jax.errors import UserError

pytestmark = pytest.mark.core

PNG = base64.b64decode(  # one red pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC")
CORE = "tensorflow_datasets.core.features."
IMAGE = {"pythonClassName": CORE + "image_feature.Image",
         "image": {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8"}}
DEPTH = {"pythonClassName": CORE + "image_feature.Image",
         "image": {"shape": {"dimensions": ["-1", "-1", "1"]}, "dtype": "float32"}}
LABEL = {"pythonClassName": CORE + "class_label_feature.ClassLabel",
         "classLabel": {"numClasses": "3"}}
TEXT = {"pythonClassName": CORE + "text_feature.Text", "text": {}}


def write(root, name="pets", version="1.0.0", *, config=None, file_format="array_record",
          splits=(("train", (0, 1, 2, 1)), ("test", (2, 0))), features=None, names=("a", "b", "c"),
          records=True):
    """A prepared data set of red pixels with the given labels, as TFDS lays it out on disk."""
    folder = root.joinpath(*filter(None, (name, config, version)))
    folder.mkdir(parents=True)
    info = {
        "name": name, "version": version, "fileFormat": file_format,
        "splits": [{"name": split, "shardLengths": [str(len(labels))], "numBytes": "9",
                    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}
                   for split, labels in splits],
    }
    if config:
        info["configName"] = config
    features = {"image": IMAGE, "label": LABEL} if features is None else features
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps({
        "pythonClassName": CORE + "features_dict.FeaturesDict",
        "featuresDict": {"features": features}}))
    (folder / "label.labels.txt").write_text("\n".join(names) + "\n")
    for split, labels in splits if records else ():
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for label in labels:
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(PNG)
            example.features.feature["label"].int64_list.value.append(label)
            writer.write(example.SerializeToString())
        writer.close()
    return folder


def both(source, dir, train_split=None, eval_split=None):
    return open_splits(source, dir=None if dir is None else str(dir), train_split=train_split,
                       eval_split=eval_split, image_size=(8, 8))


def refusal(source, dir, **splits):
    """The message; and it comes at once, where TFDS would try the network for minutes."""
    begin = time.monotonic()
    with pytest.raises(UserError) as error:
        both(source, dir, **splits)
    assert time.monotonic() - begin < 5
    return str(error.value)


def test_records(tmp_path):
    write(tmp_path)
    train, test = both("tfds:pets", tmp_path)
    assert (train.name, test.name) == (
        "tfds:pets/1.0.0 split 'train'", "tfds:pets/1.0.0 split 'test'")
    assert train.class_names == test.class_names == ("a", "b", "c")
    assert (len(train), len(test)) == (4, 2)
    assert train[1] == (PNG, 1, "tfds:pets/1.0.0 split 'train' record 1")
    assert decode_image(train[1].image, max_pixels=1).tolist() == [[[255, 0, 0]]]
    assert train.labels().tolist() == [0, 1, 2, 1] and train.labels().dtype == np.int32
    assert [record.label for record in test] == [2, 0]
    for index in (-1, 4):
        with pytest.raises(IndexError):
            train[index]


def test_identity(tmp_path):
    """That of the version and its records, wherever they are."""
    def identity(place, **how):
        write(tmp_path / place, **how)
        return both("tfds:pets", tmp_path / place, "train[:3]")[0].identity()

    here = identity("here")
    assert here == identity("there") and here.startswith("tfds:pets/1.0.0 split 'train[:3]' ")
    assert here != identity("newer", version="1.1.0")
    for number, labels in enumerate([(2, 1, 0, 1), (0, 1, 2, 1, 1)]):
        assert here != identity(f"other{number}", splits=[("train", labels), ("test", (0,))])


def test_label_names_that_are_cut_off(tmp_path):
    write(tmp_path, names=("a", "b"))
    assert "label.labels.txt names 2 classes, but features.json says 3" in refusal(
        "tfds:pets", tmp_path)


def test_places(tmp_path, monkeypatch):
    home = tmp_path / "home"
    write(home / "tensorflow_datasets", names=("in", "home", "c"))
    write(tmp_path / "variable", names=("in", "variable", "c"))
    folder = write(tmp_path / "given", names=("in", "given", "c"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert both("tfds:pets", None)[0].class_names[1] == "home"
    assert both("tfds:pets", "~/tensorflow_datasets")[0].class_names[1] == "home"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "variable"))
    assert both("tfds:pets", None)[0].class_names[1] == "variable"
    for dir in (tmp_path / "given", folder, folder.parent):
        assert both("tfds:pets", dir)[0].class_names[1] == "given"
    assert len(both("tfds:pets:1.0.0", folder)[0]) == 4
    for source in ("tfds:dogs", "tfds:pets:2.0.0", "tfds:pets/large"):
        assert f"{folder} holds " in refusal(source, folder)


def test_the_highest_version_wins_by_number(tmp_path):
    for version in ("2.0.0", "10.0.0", "9.1.0"):
        write(tmp_path, version=version)
    (tmp_path / "pets" / "11.0.0.incompleteXYZ").mkdir()
    (tmp_path / "pets" / "12.0.0").mkdir()
    assert "pets/10.0.0" in both("tfds:pets", tmp_path)[0].name
    assert "pets/2.0.0" in both("tfds:pets:2.0.0", tmp_path)[0].name
    message = refusal("tfds:pets:9.1.1", tmp_path)
    assert "only 2.0.0, 9.1.0, 10.0.0; did you mean '9.1.0'?" in message


def test_configs(tmp_path):
    write(tmp_path, config="small")
    assert both("tfds:pets", tmp_path)[0].name.startswith("tfds:pets/small/1.0.0")
    write(tmp_path, config="large", version="1.2.0")
    assert both("tfds:pets/large", tmp_path)[0].name.startswith("tfds:pets/large/1.2.0")
    assert len(both("tfds:pets/large:1.2.0", tmp_path)[0]) == 4
    assert "choose one of tfds:pets/large, tfds:pets/small" in refusal("tfds:pets", tmp_path)
    assert "not prepared" in refusal("tfds:pets/huge", tmp_path)


def test_default_evaluation_split(tmp_path):
    labels = (0, 1, 2)
    for name, splits in {
        "one": ("train", "test"), "two": ("train", "test", "validation"), "three": ("train",),
    }.items():
        write(tmp_path, name, splits=[(split, labels) for split in splits])
    assert both("tfds:one", tmp_path)[1].split == "test"
    assert both("tfds:two", tmp_path)[1].split == "validation"
    assert "no split 'validation' or 'test', only 'train'; name splits, for example " in (
        refusal("tfds:three", tmp_path))
    assert len(both("tfds:three", tmp_path, "train[:2]", "train[2:]")[1]) == 1


def test_evaluation_needs_no_train_split(tmp_path):
    write(tmp_path, splits=[("test", (0, 1))])
    source = open_eval("tfds:pets", dir=str(tmp_path), eval_split=None, image_size=(8, 8))
    assert len(source) == 2 and len(source.class_names) == 3
    assert "no split 'train', only 'test'" in refusal("tfds:pets", tmp_path)


def test_slices(cifar10_dir):
    train, rest = both("tfds:cifar10", cifar10_dir, "train[:98%]", "train[98%:]")
    assert (len(train), len(rest)) == (49_000, 1_000)
    whole = both("tfds:cifar10", cifar10_dir)[0]
    assert rest[0].image == whole[49_000].image
    assert len(both("tfds:cifar10", cifar10_dir, "train[:10]+test[:5]")[0]) == 15


@pytest.mark.parametrize("split", [
    "train[:98%", "train[a:b]", "train[99%:200%]", "train[:60000]", "train[50%:10%]", "train[:0]",
    "[:10]", "train+", "train test",
])
def test_bad_slices(tmp_path, split):
    write(tmp_path)
    message = refusal("tfds:pets", tmp_path, train_split=split)
    assert f"cannot read split {split!r}" in message and "slices look like 'train[:90%]'" in message
    assert "\n" not in message


def test_missing_split(tmp_path):
    write(tmp_path)
    message = refusal("tfds:pets", tmp_path, eval_split="tests")
    assert message.endswith("has no split 'tests', only 'train', 'test'; did you mean 'test'?")
    assert "no split 'trian'" in refusal("tfds:pets", tmp_path, train_split="test+trian[:50%]")


@pytest.mark.parametrize("file_format", ["tfrecord", None])
def test_tfrecord_form(tmp_path, file_format):
    folder = write(tmp_path, file_format=file_format, records=False)
    message = refusal("tfds:pets", tmp_path)
    assert f"{folder} is in tfrecord form" in message and "ArrayRecord is needed" in message
    assert f"python -m vit_jax.prepare --from={folder} --out=ANOTHER_DIR" in message


@pytest.mark.parametrize("first", ["tfrecord", "parquet"])
def test_array_record_beside_another_form(tmp_path, first):
    folder = write(tmp_path)
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"fileFormat": first, "alternativeFileFormats": ["array_record"]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert both("tfds:pets", tmp_path)[0].labels().tolist() == [0, 1, 2, 1]


def test_not_prepared(tmp_path, monkeypatch):
    write(tmp_path, "flowers102")
    message = refusal("tfds:flowers", tmp_path)
    assert f"no {tmp_path}/flowers/VERSION/dataset_info.json; did you mean 'flowers102'?" in message
    assert "tfds.builder('flowers', data_dir='DIR').download_and_prepare(" in message
    (tmp_path / "pets" / "1.0.0").mkdir(parents=True)  # what an interrupted preparation leaves
    assert "tfds:pets is not prepared" in refusal("tfds:pets", tmp_path)
    assert f"config.data.dir, {tmp_path}/no, does not exist" in refusal("tfds:a", tmp_path / "no")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no"))
    assert f"$TFDS_DATA_DIR, {tmp_path}/no, does not exist" in refusal("tfds:a", None)
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}/tensorflow_datasets, does not exist" in refusal("tfds:cifar10", None)


@pytest.mark.parametrize("name", ["", "a b", "../pets", "pets:latest", "pets/", "a/b/c"])
def test_no_name_of_a_data_set(tmp_path, name):
    assert "does not name a data set; use tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:1.2.3" in (
        refusal(f"tfds:{name}", tmp_path))


@pytest.mark.parametrize(("features", "complaint"), [
    ({"image": IMAGE}, "no ClassLabel feature called 'label', only 'image' (Image)"),
    ({"label": LABEL, "text": TEXT}, "no Image feature called 'image', only "),
    ({"image": TEXT, "label": LABEL}, "no Image feature called 'image', only "),
    ({"image": IMAGE, "label": TEXT}, "no ClassLabel feature called 'label', only "),
    ({"image": DEPTH, "label": LABEL}, "holds float32 images"),
])
def test_not_labelled_images(tmp_path, features, complaint):
    write(tmp_path, features=features)
    message = refusal("tfds:pets", tmp_path)
    assert complaint in message and "made for image classification" in message


def test_split_without_labels(tmp_path):
    write(tmp_path, splits=[("train", (0, 1)), ("validation", (0, 1)), ("test", (-1, -1))])
    assert "split 'test' has no labels" in refusal("tfds:pets", tmp_path, eval_split="test")


def test_incomplete_copies(tmp_path):
    folder = write(tmp_path, "shard")
    shard = folder / "shard-test.array_record-00000-of-00001"
    shard.unlink()
    assert f"{shard} is missing" in refusal("tfds:shard", tmp_path)
    (write(tmp_path, "features") / "features.json").unlink()
    assert "has no features.json" in refusal("tfds:features", tmp_path)
    (write(tmp_path, "broken") / "features.json").write_text("{")
    assert "cannot be opened by TFDS" in refusal("tfds:broken", tmp_path)
    for content in ("{", "[1]", "\xff"):
        folder = tmp_path / "info" / "1.0.0"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dataset_info.json").write_text(content, encoding="latin-1")
        assert "dataset_info.json cannot be read" in refusal("tfds:info", tmp_path)


def test_labels_of_a_very_large_data_set_are_not_read(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(tfds_module, "_MOST_LABELS_READ", 3)
    train, test = both("tfds:pets", tmp_path)
    assert train.labels() is None and test.labels() is not None


def test_same_as_tfds(cifar10_dir):
    """What `_parse` makes of a record is what TFDS makes of it."""
    _, test = both("tfds:cifar10", cifar10_dir)
    reference = tfds.builder_from_directory(f"{cifar10_dir}/cifar10/3.0.2").as_data_source(
        "test", decoders={"image": tfds.decode.SkipDecoding()})
    for index in range(0, len(test), 97):
        image, label, _ = test[index]
        assert (image, label) == (reference[index]["image"], reference[index]["label"])
    assert test.class_names[:3] == ("airplane", "automobile", "bird")
    assert np.bincount(test.labels()).tolist() == [1000] * 10


def test_many_threads_read_what_one_reads(cifar10_dir):
    _, test = both("tfds:cifar10", cifar10_dir)
    order = np.random.default_rng(0).permutation(len(test))[:2000].tolist()
    alone = [test[index] for index in order]
    _, fresh = both("tfds:cifar10", cifar10_dir)  # so that threads open the files, too
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(fresh.__getitem__, order))
    assert together == alone
    assert len({record.image for record in alone}) > 1990


def test_pickles(cifar10_dir):
    _, test = both("tfds:cifar10", cifar10_dir)
    before = test[17]
    pickled = pickle.dumps(test)
    assert len(pickled) < 100_000
    assert pickle.loads(pickled)[17] == before


def test_no_warnings(tmp_path):
    write(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, _ = both("tfds:pets", tmp_path)
        train.labels()


@pytest.mark.parametrize("mark", [False, True])
def test_tensorflow_is_not_needed(cifar10_dir, mark):
    """Neither with an import hook that fails nor with Python's own mark for "do not import"."""
    program = textwrap.dedent(f"""
        import sys

        class NoTensorFlow:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("tensorflow", "tensorflow_cpu"):
                    raise ImportError(name + " was imported")

        sys.meta_path.insert(0, NoTensorFlow())
        if {mark}:
            sys.modules["tensorflow"] = None
        from vit_jax.data.decode import decode_image
        from vit_jax.data.sources import open_splits

        for source in ("tfds:cifar10", "digits"):
            train, test = open_splits(source, dir={cifar10_dir!r}, train_split=None,
                                      eval_split=None, image_size=(8, 8))
            shape = decode_image(test[len(test) - 1].image, max_pixels=10_000).shape
            print(len(train), len(test.labels()), *shape, sep=",")
        assert "tensorflow" not in sys.modules
    """)
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:vit_jax", "-c", program],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["50000,10000,32,32,3", "1437,360,8,8,3"]
    assert result.stderr == ""


def test_other_forms_are_prepared_elsewhere(tmp_path):
    """In the same place TFDS would do nothing."""
    write(tmp_path, file_format="parquet", records=False)
    message = refusal("tfds:pets", tmp_path)
    assert "data_dir='ANOTHER_DIR').download_and_prepare(file_format='array_record')" in message


def test_more_files_than_may_be_open(tmp_path):
    """A global shuffle opens all of them; the soft limit is raised, and the hard one is said."""
    code = f"""
import resource, sys
from vit_jax.data.sources import open_eval
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[1])))
split = open_eval("tfds:pets", dir={str(tmp_path)!r}, eval_split="train", image_size=(8, 8))
print(len([split[index] for index in range(len(split))]))
"""
    folder = write(tmp_path, records=False, splits=[("train", (0,))])
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["1"] * 100
    (folder / "dataset_info.json").write_text(json.dumps(info))
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(PNG)
    example.features.feature["label"].int64_list.value.append(1)
    for number in range(100):
        writer = array_record_module.ArrayRecordWriter(
            str(folder / f"pets-train.array_record-{number:05d}-of-00100"), "group_size:1")
        writer.write(example.SerializeToString())
        writer.close()

    def run(hard):
        return subprocess.run(
            [sys.executable, "-c", code, str(hard)], text=True, capture_output=True)

    assert run(200).stdout == "100\n"
    assert ("split 'train' needs 100 open files at once, but only 90 are allowed; raise the limit"
            in run(90).stderr)
