import json

import pytest
import tensorflow_datasets as tfds
from tfrecord_files import NAMES, example, write_tfrecord

from vit_jax.data.decode import BadImageError
from vit_jax.data.preparing.tfrecord import TfrecordInput
from vit_jax.errors import UserError


def refusal(folder):
    with pytest.raises(UserError) as error:
        TfrecordInput(str(folder))
    return str(error.value)


def test_records(tmp_path):
    source = TfrecordInput(str(write_tfrecord(tmp_path)))
    assert source.splits == {"train": 9, "test": 3} and source.class_names == NAMES
    assert (source.data_set, source.version) == ("pets", "3.2.1")
    expected = [("train", 0, i) for i in range(5)] + [("train", 1, i) for i in range(4)]
    for index, where in enumerate(expected):
        item = source.read("train", index)
        assert item.serialized == example(*where) == item.example.SerializeToString(
            deterministic=True)
        assert item.label == where[2] % 3
        assert item.origin == f"pets-train.tfrecord-{where[1]:05d}-of-00002 record {where[2]}"
    assert source.read("test", 2).serialized == example("test", 0, 2)


def test_configs(tmp_path):
    source = TfrecordInput(str(write_tfrecord(tmp_path, config="small")))
    assert source.data_set == "pets/small"
    assert source.write_features(tmp_path, any_size=False)["configName"] == "small"


@pytest.mark.parametrize("any_size", [False, True])
def test_features(tmp_path, any_size):
    source = TfrecordInput(str(write_tfrecord(tmp_path / "from")))
    info = source.write_features(tmp_path, any_size=any_size)
    assert info["citation"] == "Us, 2020"
    features = tfds.features.FeaturesDict.from_config(str(tmp_path))
    assert features["image"].shape == ((None, None, 3) if any_size else (20, 30, 3))
    assert tuple(features["label"].names) == NAMES
    assert tuple(features["species"].names) == ("tame", "wild")


def test_damaged_records(tmp_path):
    folder = write_tfrecord(tmp_path)
    source = TfrecordInput(str(folder))
    path = folder / "pets-test.tfrecord-00000-of-00001"
    whole = path.read_bytes()
    size = len(example("test", 0, 0))
    for position in (12, 12 + size // 2, 12 + size - 1, 12 + size):  # the last is the checksum
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1:])
        source = TfrecordInput(str(folder))
        with pytest.raises(BadImageError, match="checksum does not match"):
            source.read("test", 0)
        assert source.read("test", 1).serialized == example("test", 0, 1)


def test_damaged_files(tmp_path):
    folder = write_tfrecord(tmp_path)
    path = folder / "pets-test.tfrecord-00000-of-00001"
    whole = path.read_bytes()
    size = len(example("test", 0, 0))
    for content, problem in (
        (b"\1" + whole[1:], "damaged at byte 0"),
        (whole[:16 + size] + b"\1" * 40, f"damaged at byte {16 + size}"),
        (whole[:-1], "ends in the middle of a record"),
        (whole + whole[:5], "damaged at byte"),
        (whole[:16 + size], "split 'test' has 1 records, not the 3"),
        (b"", "split 'test' has 0 records, not the 3"),
    ):
        path.write_bytes(content)
        assert problem in refusal(folder)
    path.unlink()
    assert "cannot be read (No such file" in refusal(folder)


def test_what_is_not_a_labelled_tfrecord_data_set(tmp_path):
    folder = write_tfrecord(tmp_path / "a", file_format="array_record")
    assert "already in array_record format; train on it with --config.data.source=tfds:pets " in (
        refusal(folder))
    folder = write_tfrecord(tmp_path / "b", file_format="parquet")
    assert "already in parquet format; only tfrecord can be converted" in refusal(folder)
    folder = write_tfrecord(tmp_path / "c")
    info = json.loads((folder / "dataset_info.json").read_text())
    for damaged in ("{", json.dumps(info | {"splits": 3})):
        (folder / "dataset_info.json").write_text(damaged)
        assert "cannot be opened by TFDS" in refusal(folder)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    tfds.features.FeaturesDict({"text": tfds.features.Text()}).save_config(str(folder))
    assert "has no Image feature called 'image', only 'text' (Text)" in refusal(folder)
