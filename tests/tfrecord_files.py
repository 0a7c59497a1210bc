"""A TFDS directory in TFRecord form, with TensorBoard's own writer of such files."""

import json

import tensorflow_datasets as tfds
from image_files import encode, photo
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorflow_datasets.proto import tf_example_pb2

NAMES = ("cat", "dog", "übel")


def write_tfrecord(root, splits=(("train", (5, 4)), ("test", (3,))), config=None, size=(20, 30),
                   file_format="tfrecord"):
    """Splits are given by the records of each of their files; returns the folder."""
    folder = root.joinpath(*filter(None, ("pets", config, "3.2.1")))
    folder.mkdir(parents=True)
    tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(*size, 3), encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=NAMES),
        "species": tfds.features.ClassLabel(names=("tame", "wild")),
    }).save_config(str(folder))
    (folder / "dataset_info.json").write_text(json.dumps({
        "name": "pets", "version": "3.2.1", "fileFormat": file_format, "citation": "Us, 2020",
        **({"configName": config} if config else {}),
        "splits": [{"name": split, "shardLengths": [str(count) for count in counts],
                    "numBytes": "9",
                    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}
                   for split, counts in splits]}))
    for split, counts in splits:
        for number, count in enumerate(counts):
            name = f"pets-{split}.tfrecord-{number:05d}-of-{len(counts):05d}"
            with open(folder / name, "wb") as file:
                writer = RecordWriter(file)
                for record in range(count):
                    writer.write(example(split, number, record, size))
    return folder


def example(split, number, record, size=(20, 30)):
    """The serialized record that `write_tfrecord` writes."""
    example = tf_example_pb2.Example()
    features = example.features.feature
    seed = 100 * number + record + (split == "test") * 1000
    features["image"].bytes_list.value.append(encode(photo(*size, seed)))
    features["label"].int64_list.value.append(record % len(NAMES))
    features["species"].int64_list.value.append(record % 2)
    return example.SerializeToString(deterministic=True)
