"""The command `prepare`: every input becomes what `tfds:` and TFDS read, interrupted or not."""

import io
import json
import os
import re
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from image_files import encode, photo
from imagenet_archives import SORTED, TRUTH, WNIDS, image, write_imagenet
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorflow_datasets.proto import tf_example_pb2
from tfrecord_files import example, write_tfrecord
from tiny import __file__ as tiny_file

from vit_jax.data.decode import decode_image
from vit_jax.data.sources import open_splits
from vit_jax.errors import UserError
from vit_jax.main import main as train
from vit_jax.prepare import main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def photos(tmp_path):
    """36 images of three classes in every form that folders hold, and three that are broken."""
    rng = np.random.default_rng(0)
    files = {}
    for label, name in enumerate(("big cat", "dog", "Übel")):
        for number in range(12):
            height, width = rng.integers(16, 60, 2)
            files[f"{name}/{number}.jpg"] = encode(photo(height, width, 100 * label + number))
    grey16 = (photo(40, 50)[..., 0].astype(np.uint16) << 8) + 77
    files |= {
        "dog/0.jpg": encode(photo(40, 50), mode="L"),
        "dog/1.jpg": encode(photo(40, 50), mode="CMYK"),
        "dog/2.jpg": encode(photo(40, 50), "PNG"),  # as one of ImageNet's
        "dog/3.png": encode(grey16, "PNG"),
        "dog/4.webp": encode(photo(40, 50), "WEBP"),
        "dog/5.png": encode(photo(40, 50), "PNG", mode="RGBA"),
        "dog/6.bmp": encode(photo(40, 50), "BMP"),
        "Übel/a b ☃'$.JPG": encode(photo(900, 1100)),
        "Übel/cut.jpg": encode(photo(40, 50))[:400],
        "Übel/empty.jpg": b"",
        "big cat/text.jpg": b"hello",
    }
    for name in ("dog/3.jpg", "dog/4.jpg", "dog/5.jpg", "dog/6.jpg", "Übel/0.jpg"):
        del files[name]
    for name, content in files.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "photos"


def prepare(source, out, *flags):
    main([f"--from={source}", f"--out={out}", *flags])


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        main([str(argument) for argument in arguments])
    return str(error.value)


def command(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "vit_jax.prepare", *map(str, arguments)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def both(name, out):
    return open_splits(f"tfds:{name}", dir=str(out), train_split=None, eval_split=None,
                       image_size=(8, 8))


def by_name(folder, split):
    """{file name: (encoded image, label)} as TFDS itself reads a split."""
    builder = tfds.builder_from_directory(folder)
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return {record["file_name"].decode(): (bytes(record["image"]), record["label"])
            for record in source}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder(photos, tmp_path, capsys):
    prepare(photos, tmp_path / "out")
    folder = tmp_path / "out" / "photos" / "1.0.0"
    ours = both("photos", tmp_path / "out")
    theirs = open_splits(
        f"folder:{photos}", dir=None, train_split=None, eval_split=None, image_size=(8, 8))
    bad = {"Übel/cut.jpg", "Übel/empty.jpg", "big cat/text.jpg"}
    for split, mine, original in zip(("train", "validation"), ours, theirs, strict=True):
        assert mine.class_names == original.class_names
        expected = {os.path.relpath(record.origin, photos): (record.image, record.label)
                    for record in original}
        expected = {name: value for name, value in expected.items() if name not in bad}
        assert {(record.image, record.label) for record in mine} == set(expected.values())
        assert by_name(folder, split) == expected
    # TFDS decodes them too; which is how it reads them without `vit_jax`.
    for record in tfds.builder_from_directory(folder).as_data_source("train"):
        assert record["image"].dtype == np.uint8 and record["image"].ndim == 3

    out = capsys.readouterr().out
    lines = (folder / "bad_files.txt").read_text("utf-8").splitlines()
    assert {line.split("\t")[0] for line in lines} == bad and len(lines) == 3
    assert "Left out    3 unusable image files" in out
    assert "  Übel/empty.jpg: the file is empty" in out
    counts = np.bincount(ours[0].labels())
    names = ours[0].class_names
    assert re.search(
        rf"train +{counts.sum()} images in 1 files, .* of images in, .* out\n +3 classes, from "
        rf"{counts.min()} images \({names[counts.argmin()]}\) to {counts.max()} ", out)


def test_files_that_end_up_empty(photos, tmp_path):
    prepare(photos, tmp_path / "out", "--records_per_file=1")
    folder = tmp_path / "out" / "photos" / "1.0.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["splits"][0]["shardLengths"].count("0") >= 2
    train, _ = both("photos", tmp_path / "out")
    assert len([record.image for record in train]) == len(train) > 29
    assert len(by_name(folder, "train")) == len(train)


def test_records_are_mixed(photos, tmp_path):
    prepare(photos, tmp_path / "out")
    labels = both("photos", tmp_path / "out")[0].labels()
    assert (np.diff(labels) != 0).sum() > len(labels) / 3


def test_resize(photos, tmp_path):
    prepare(photos, tmp_path / "out", "--resize=32", "--quality=90", "--name=small")
    train, _ = both("small", tmp_path / "out")
    seen = 0
    for record in train:
        with Image.open(io.BytesIO(record.image)) as opened:
            assert opened.format == "JPEG" and min(opened.size) <= 32
            seen += min(opened.size) == 32
        assert decode_image(record.image, max_pixels=10**6).shape[2] == 3
    assert seen > 10
    records = by_name(tmp_path / "out" / "small" / "1.0.0", "train")
    large = records.get("Übel/a b ☃'$.JPG")
    assert large and Image.open(io.BytesIO(large[0])).size == (1100 * 32 // 900, 32)


def test_what_is_left_out_is_named(photos, tmp_path, capsys):
    for number in range(12):
        (photos / f"{number}.zip").write_bytes(b"")
    prepare(photos, tmp_path / "out")
    assert re.search(r"\nIgnored, since they are not folders of classes: 0.zip, 1.zip, 10.zip, .*, "
                     r"7.zip, and 2 more\.\n", capsys.readouterr().out)


def test_imagenet(tmp_path, capsys):
    prepare(write_imagenet(tmp_path / "from"), tmp_path / "out", "--records_per_file=5")
    folder = tmp_path / "out" / "imagenet2012" / "1.0.0"
    train, validation = both("imagenet2012", tmp_path / "out")
    assert train.class_names == tuple(SORTED) and (len(train), len(validation)) == (12, 6)
    assert by_name(folder, "train") == {
        f"{wnid}_{number}.JPEG": (image(100 * label + number), label)
        for label, wnid in enumerate(SORTED) for number in range(4)}
    assert by_name(folder, "validation") == {
        f"ILSVRC2012_val_{number:08d}.JPEG": (
            image(1000 + number), SORTED.index(WNIDS[TRUTH[number - 1] - 1]))
        for number in range(1, 7)}
    assert "Found 12 images for 'train', 6 images for 'validation' in 3 classes; 5 files go to" in (
        capsys.readouterr().out)


def test_tfrecords_are_copied_unchanged_and_in_order(tmp_path):
    folder = write_tfrecord(tmp_path / "from", config="small")
    prepare(folder, tmp_path / "out", "--records_per_file=2")
    copy = tmp_path / "out" / "pets" / "small" / "3.2.1"
    builder = tfds.builder_from_directory(copy)
    for split, counts in (("train", (5, 4)), ("test", (3,))):
        records = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        assert list(records) == [example(split, number, record)
                                 for number, count in enumerate(counts) for record in range(count)]
    assert builder.info.citation == "Us, 2020" and "species" in builder.info.features
    assert builder.as_data_source("train")[3]["image"].shape == (20, 30, 3)
    assert len(both("pets/small", tmp_path / "out")[0]) == 9


def test_tfrecords_shrunk(tmp_path):
    prepare(write_tfrecord(tmp_path / "from"), tmp_path / "out", "--resize=10", "--name=small")
    records = tfds.builder_from_directory(tmp_path / "out" / "small" / "3.2.1").as_data_source(
        "train")
    assert [record["image"].shape for record in records] == [(10, 15, 3)] * 9
    assert [record["species"] for record in records] == [0, 1, 0, 1, 0, 0, 1, 0, 1]


def test_a_split_without_labels(tmp_path, capsys):
    """As the test split of TFDS's imagenet2012."""
    folder = write_tfrecord(tmp_path / "from")
    with open(folder / "pets-test.tfrecord-00000-of-00001", "wb") as file:
        writer = RecordWriter(file)
        for record in range(3):
            unlabelled = tf_example_pb2.Example.FromString(example("test", 0, record))
            unlabelled.features.feature["label"].int64_list.value[0] = -1
            writer.write(unlabelled.SerializeToString())
    prepare(folder, tmp_path / "out")
    assert re.search(r"\ntest +3 images .*\n +without labels\n", capsys.readouterr().out)


def test_training_on_it_with_the_command_of_the_report(photos, tmp_path, capsys):
    prepare(photos, tmp_path / "out with space")
    line = capsys.readouterr().out.splitlines()[-1]
    arguments = shlex.split(line)
    assert arguments[:3] == ["python", "-m", "vit_jax.main"]
    arguments = [argument.replace("RECIPE.py", tiny_file).replace("DIR", str(tmp_path / "run"))
                 if argument.startswith(("--config=", "--workdir=")) else argument
                 for argument in arguments[3:]]
    train([*arguments, "--config.total_steps=1", "--config.eval_every=0",
           "--config.model.num_layers=1"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("eval/images=4")


def test_without_a_split_to_evaluate_on_the_command_of_the_report_has_slices(tmp_path, capsys):
    write_imagenet(tmp_path / "from")
    os.remove(tmp_path / "from" / "ILSVRC2012_img_val.tar")
    prepare(tmp_path / "from", tmp_path / "out")
    assert "'--config.data.train_split=train[:98%]' '--config.data.eval_split=train[98%:]'" in (
        capsys.readouterr().out)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """180 images that take some 5 ms each, and the 60 files that an undisturbed run makes."""
    root = tmp_path_factory.mktemp("many")
    data = [encode(photo(400, 500, seed)) for seed in range(4)]
    for index in range(180):
        path = root / "from" / f"class {index % 3}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if index == 77 else data[index % 4])
    flags = (f"--from={root / 'from'}", "--resize=250", "--records_per_file=3", "--name=many")
    main([*flags, f"--out={root / 'out'}"])
    return flags, contents(root / "out")


def finished(out):
    """{file: (inode, time)} of the files of records that are complete."""
    found = out.glob("many/1.0.0/many-*")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def wait_for(process, out, files):
    """Until so many files are complete."""
    deadline = time.monotonic() + 60
    while len(finished(out)) < files:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def test_killed_at_any_moment(many, tmp_path):
    flags, expected = many
    rng = np.random.default_rng()
    killed_after = rng.integers(1, 15)
    process = command(*flags, f"--out={tmp_path}", "--workers=2")
    wait_for(process, tmp_path, killed_after)
    time.sleep(rng.uniform(0, 0.02))  # into the middle of a file
    process.kill()
    process.communicate()
    complete = finished(tmp_path)
    assert killed_after <= len(complete) < 60
    assert not (tmp_path / "many" / "1.0.0" / "dataset_info.json").exists()

    main([*flags, f"--out={tmp_path}"])
    assert contents(tmp_path) == expected
    # Not done again, save for one file a worker: it had its name, and was not noted yet.
    assert len(complete.items() - finished(tmp_path).items()) <= 2
    main([*flags, f"--out={tmp_path}"])  # nor anything else, when all is there
    assert contents(tmp_path) == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_stopped(many, tmp_path, number, code):
    flags, expected = many
    process = command(*flags, f"--out={tmp_path}", "--workers=2")
    wait_for(process, tmp_path, 2)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == code
    assert stderr == (f"Stopped by {number.name}; complete files are kept. Run the same command to "
                      "continue.\n")
    folder = tmp_path / "many" / "1.0.0"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert 2 <= len(finished(tmp_path)) < 60
    main([*flags, f"--out={tmp_path}"])
    assert contents(tmp_path) == expected


def test_shards_in_processes(many, tmp_path):
    flags, expected = many
    processes = [command(*flags, f"--out={tmp_path}", f"--shard={part}/3") for part in range(3)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert contents(tmp_path) == expected
    ends = ["is complete: " in stdout or "are still missing: " in stdout for stdout, _ in outputs]
    assert all(ends) and any("The data set is complete" in stdout for stdout, _ in outputs)


def test_one_shard_alone(many, tmp_path, capsys):
    flags, expected = many
    main([*flags, f"--out={tmp_path}", "--shard=1/3"])
    assert "40 of 60 files are still missing" in capsys.readouterr().out
    assert len(finished(tmp_path)) == 20
    assert not (tmp_path / "many" / "1.0.0" / "dataset_info.json").exists()
    main([*flags, f"--out={tmp_path}"])
    assert contents(tmp_path) == expected


def test_threads_do_not_show(many, tmp_path):
    flags, expected = many
    main([*flags, f"--out={tmp_path}", "--workers=7"])
    assert contents(tmp_path) == expected


def test_a_full_disk(photos, tmp_path):
    """The system's answer to too large a file comes the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        message = refusal(f"--from={photos}", f"--out={tmp_path / 'out'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(r"array_record-00000-of-00001 cannot be written \(.*File too large\); fix "
                     r"this and run the command again: completed files are kept\.", message)
    assert not list((tmp_path / "out").rglob(".*"))
    prepare(photos, tmp_path / "out")
    assert len(both("photos", tmp_path / "out")[0]) > 29


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0 and "--records_per_file" in capsys.readouterr().out


def test_mistakes(photos, tmp_path):
    out = f"--out={tmp_path / 'out'}"
    assert refusal(out) == "the following arguments are required: --from (see --help)"
    assert refusal(f"--from={photos}") == "the following arguments are required: --out (see --help)"
    assert "did you mean --resize?" in refusal(f"--from={photos}", out, "--rezise=8")
    for flag in ("--resize=0", "--workers=0", "--records_per_file=-1"):
        assert refusal(f"--from={photos}", out, flag) == f"{flag} must be at least 1."
    assert "--quality=101 must be from 1 to 100" in refusal(
        f"--from={photos}", out, "--quality=101")
    assert "--quality is that of the JPEGs that --resize writes" in refusal(
        f"--from={photos}", out, "--quality=90")
    for shard in ("3/3", "1", "-1/2", "a/b", "0/0"):
        assert f"--shard={shard} is not I/N" in refusal(f"--from={photos}", out, f"--shard={shard}")
    assert "--name= is empty" in refusal(f"--from={photos}", out, "--name=")
    for name in ("a b", "1st", "ümlaut"):
        assert f"--name={name!r} must begin with a letter" in refusal(
            f"--from={photos}", out, f"--name={name}")
    photos.rename(tmp_path / "写真")
    assert refusal(f"--from={tmp_path / '写真'}", out) == (
        f"No name for the data set can be derived from {tmp_path / '写真'}; choose one with "
        "--name=NAME.")
    for inside in (tmp_path / "写真", tmp_path / "写真" / "new"):
        assert "is inside --from=" in refusal(
            f"--from={tmp_path / '写真'}", f"--out={inside}", "--name=pets")
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in refusal(
        f"--from={tmp_path / '写真'}", f"--out={tmp_path / 'file'}", "--name=pets")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_sentences(tmp_path, monkeypatch, capsys):
    nowhere = tmp_path / "nowhere"
    monkeypatch.setattr(sys, "argv", ["prepare", f"--from={nowhere}", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "vit_jax" / "prepare.py"), run_name="__main__")
    assert end.value.code == 1
    assert capsys.readouterr().err == f"error: --from={nowhere} does not exist.\n"


def test_the_manifest_holds_nothing_that_differs_between_machines(photos, tmp_path):
    prepare(photos, tmp_path / "out")
    text = (tmp_path / "out" / "photos" / "1.0.0" / "prepare.json").read_text()
    assert set(json.loads(text)) == {"name", "data", "resize", "quality", "records_per_file"}
    assert str(tmp_path) not in text
