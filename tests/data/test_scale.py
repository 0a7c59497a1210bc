"""A data set of ImageNet-21k's size starts as fast as a small one, in as little memory."""

import json
import os
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from image_files import encode
from tensorflow_datasets.proto import tf_example_pb2

from vit_jax.data.pipeline import BadImages, train_batches
from vit_jax.data.preparing.inputs import write_features
from vit_jax.data.preparing.shards import divide
from vit_jax.data.records import Record

CLASSES = tuple(f"n{number:08d}" for number in range(21_000))


class Many:
    """A split of any size that takes no room."""

    name = "many"
    split = "train"
    class_names = CLASSES

    def __init__(self, images):
        self._images = images

    def __len__(self):
        return self._images

    def __getitem__(self, index):
        return Record(np.full((8, 8, 3), index % 256, np.uint8), index % 21_000, str(index))

    def labels(self):
        raise AssertionError("training must not ask for all labels of a large data set")


def first_batches(images, config, first_step=0):
    """(seconds, bytes) that three batches take, at their peak."""
    tracemalloc.start()
    begin = time.perf_counter()
    batches = train_batches(Many(images), config, (8, 8), BadImages("error"), first_step=first_step)
    labels = [next(batches)["label"] for _ in range(3)]
    seconds = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    batches.close()
    assert len(np.unique(labels)) > 0.9 * np.size(labels)  # from everywhere, not in order
    return seconds, peak


@pytest.mark.core
def test_batches_cost_the_same_for_14_thousand_and_14_million_records(tiny_config):
    tiny_config.data.workers = 0
    first_batches(14_000, tiny_config)  # imports
    small = first_batches(14_000, tiny_config)
    large = first_batches(14_000_000, tiny_config)
    deep = first_batches(14_000_000, tiny_config, first_step=10**7)  # far into a run
    for seconds, peak in (large, deep):
        assert peak < small[1] + 200_000  # a table of 14 million would take 56 MB at least
        assert seconds < small[0] + 1  # and making one a second; the slack is for other processes


@pytest.mark.slow
def test_a_directory_of_14_million_records(tmp_path):
    """Real files, tiny images; pytest -s shows the numbers that docs/data.md has."""
    image = encode(np.zeros((1, 1, 3), np.uint8), "PNG")
    sizes = {}
    for images in (14_000, 14_000_000):
        folder = tmp_path / str(images) / "many" / "1.0.0"
        folder.mkdir(parents=True)
        files = divide("train", images, None)
        for file in files:
            writer = ArrayRecordWriter(
                str(folder / f"many-train.array_record-{file.suffix}"), "group_size:1,uncompressed")
            for index in range(file.start, file.stop):
                example = tf_example_pb2.Example()
                example.features.feature["image"].bytes_list.value.append(image)
                example.features.feature["label"].int64_list.value.append(index % len(CLASSES))
                writer.write(example.SerializeToString())
            writer.close()
        write_features(folder, CLASSES)
        (folder / "dataset_info.json").write_text(json.dumps({
            "name": "many", "version": "1.0.0", "fileFormat": "array_record", "splits": [{
                "name": "train", "numBytes": "1",
                "shardLengths": [str(file.stop - file.start) for file in files],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}]}))
        result = subprocess.run(
            [sys.executable, __file__, str(tmp_path / str(images))], text=True, check=True,
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        sizes[images] = json.loads(result.stdout)
        print(f"{images:,} records in {len(files)} files:", sizes[images])
    small, large = sizes[14_000], sizes[14_000_000]
    assert large["open_seconds"] < small["open_seconds"] + 1
    # The index of every file: 8 bytes a record.
    assert large["megabytes"] < small["megabytes"] + 200


def measure(dir):
    """What one training process needs until all files were read from."""
    from vit_jax.config import base_config
    from vit_jax.data.sources import open_eval
    from vit_jax.data.tfds import import_tfds

    def megabytes():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    import_tfds()
    before, begin = megabytes(), time.perf_counter()
    source = open_eval("tfds:many", dir=dir, eval_split="train", image_size=(8, 8))
    opened = time.perf_counter()
    config = base_config()
    config.data.workers, config.data.worker_kind = 2, "thread"  # all memory is this process's
    batches = train_batches(source, config, (8, 8), BadImages("error"))
    next(batches)
    first = time.perf_counter()
    for _ in range(20):
        next(batches)
    batches.close()
    return {
        "open_seconds": round(opened - begin, 2),
        "first_batch_seconds": round(first - opened, 2),
        "megabytes": round(megabytes() - before),
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
