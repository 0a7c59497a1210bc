"""The command that classifies files, against the model and against a run's own evaluation."""

import contextlib
import csv
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import __file__ as tiny_file

import vit_jax
from vit_jax.checkpoints.adapt import expected_shapes
from vit_jax.config import base_config
from vit_jax.data.decode import decode_image
from vit_jax.data.imagenet import class_names
from vit_jax.data.pipeline import eval_crop
from vit_jax.data.sources import open_eval
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate_checkpoint
from vit_jax.images import Unreadable, find_images
from vit_jax.main import main as train
from vit_jax.predict import main, predict
from vit_jax.training.workdir import read_config


def run_of(folder, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        train([f"--config={tiny_file}", f"--workdir={folder}", "--config.eval_every=0",
               "--config.checkpoint_every=0", "--config.model.num_layers=1", *arguments])
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Digits, with a preprocessing of its own."""
    return run_of(tmp_path_factory.mktemp("run"), "--config.data.eval_crop=center_crop",
                  "--config.data.eval_resize=12", "--config.data.antialias=false",
                  "--config.data.mean=0.4,0.3,0.2", "--config.data.std=0.2",
                  "--config.data.interpolation=bicubic", "--config.model.representation_size=12",
                  "--config.optimizer.name=adamw", "--config.optimizer.learning_rate=0.02",
                  "--config.total_steps=60")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The 360 test images as PNG, in order."""
    folder = tmp_path_factory.mktemp("digits")
    source = open_eval("digits", dir=None, eval_split=None, image_size=(8, 8))
    for index in range(len(source)):
        Image.fromarray(decode_image(source[index].image, max_pixels=1000)).save(
            folder / f"{index:03}.png")
    return folder


@pytest.fixture
def photos(tmp_path):
    """Five images of different sizes and formats in folders, and what is none."""
    root = tmp_path / "my photos"
    for name, size in (("b.JPG", (20, 30)), ("a.png", (8, 8)), ("sub/Ä.Jpeg", (40, 9)),
                       ("sub/deep/c.webp", (16, 16)), ("sub/d.bmp", (10, 10))):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(len(name)).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    (root / "notes.txt").write_text("none")
    (root / ".hidden.png").write_bytes(b"x")
    (root / ".thumbs").mkdir()
    (root / ".thumbs/a.png").write_bytes(b"x")
    return root


FOUND = ["a.png", "b.JPG", "sub/d.bmp", "sub/Ä.Jpeg", "sub/deep/c.webp"]


def predicted(capsys, *arguments):
    main([*map(str, arguments), "--format=json"])
    return json.loads(capsys.readouterr().out)


def test_equals_the_evaluation_of_the_run(workdir, digits, capsys):
    config = read_config(workdir)
    evaluation = evaluate_checkpoint(config, workdir)
    capsys.readouterr()
    entries = predicted(capsys, f"--checkpoint={workdir}", digits, "--top=1", "--batch_size=100")
    assert [entry["file"] for entry in entries] == [
        str(digits / f"{index:03}.png") for index in range(360)]
    best = [entry["predictions"][0]["index"] for entry in entries]
    assert best == evaluation.predictions.tolist()
    assert len(set(best)) > 3  # a model that says one thing only would prove nothing


def test_preprocessing_features_and_probabilities(workdir, photos, tmp_path, capsys):
    """Pixel for pixel what the checkpoint says, through a forward pass without the command."""
    features = tmp_path / "features.npz"
    entries = predicted(
        capsys, f"--checkpoint={workdir}", photos, "--batch_size=2", f"--features={features}")
    assert [entry["file"] for entry in entries] == [str(photos / name) for name in FOUND]

    data = base_config().data
    data.eval_crop, data.eval_resize = "center_crop", 12
    data.antialias, data.interpolation = False, "bicubic"
    images = np.stack([
        eval_crop(decode_image((photos / name).read_bytes(), max_pixels=10_000), (8, 8), data)
        for name in FOUND])
    assert images.shape == (5, 8, 8, 3)
    images = ((images / 255 - [0.4, 0.3, 0.2]) / 0.2).astype(np.float32)
    body = vit_jax.load_model(workdir, num_classes=0)
    expected = np.asarray(body.model.apply({"params": body.params}, images, train=False))
    with np.load(features) as saved:
        assert saved["files"].tolist() == [str(photos / name) for name in FOUND]
        assert saved["features"].dtype == np.float32 and saved["features"].shape == (5, 12)
        np.testing.assert_allclose(saved["features"], expected, atol=1e-5)
    whole = vit_jax.load_model(workdir)
    logits = np.float64(whole.model.apply({"params": whole.params}, images, train=False))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for entry, row in zip(entries, probabilities, strict=True):
        order = np.argsort(-row)[:5]
        assert [p["index"] for p in entry["predictions"]] == order.tolist()
        assert [p["class"] for p in entry["predictions"]] == [str(index) for index in order]
        np.testing.assert_allclose(
            [p["probability"] for p in entry["predictions"]], row[order], atol=1e-5)


def test_formats_agree(workdir, photos, capsys):
    arguments = [f"--checkpoint={workdir}", str(photos), "--top=3"]
    entries = predicted(capsys, *arguments)
    main([*arguments, "--format=csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert rows == [
        {"file": entry["file"], "rank": str(rank)} | {k: str(v) for k, v in prediction.items()}
        for entry in entries for rank, prediction in enumerate(entry["predictions"], 1)]
    main(arguments)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["file", "class", "index", "probability"]
    assert len(lines) == 1 + 3 * 5 and len({len(line) for line in lines}) == 1
    first = entries[0]["predictions"][0]
    assert lines[1].removeprefix(entries[0]["file"]).split() == [
        first["class"], str(first["index"]), f"{first['probability']:.4f}"]
    assert captured.err.startswith(f"{workdir} step 60: ")  # the report


def test_unreadable_images_are_left_out(workdir, photos, tmp_path, capsys):
    """The others are still printed, in every format and the features, and the exit code is 1."""
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    (photos / "empty.jpg").write_bytes(b"")
    for number, form in enumerate(("json", "csv", "table")):
        features = tmp_path / f"{number}.npz"
        with pytest.raises(UserError, match="^3 of 8 images could not be read.$"):
            main([f"--checkpoint={workdir}", str(tmp_path / "no.png"), str(photos), "--top=1",
                  f"--format={form}", "--batch_size=3", f"--features={features}"])
        captured = capsys.readouterr()
        for name in FOUND:
            assert str(photos / name) in captured.out
        for name in ("broken.png", "empty.jpg"):
            assert captured.err.count(f"{photos / name} cannot be read: ") == 1
        assert f"{tmp_path / 'no.png'} cannot be read: it does not exist" in captured.err
        if form == "json":
            assert len(json.loads(captured.out)) == 5
        with np.load(features) as saved:
            assert saved["features"].shape == (5, 12)
    with pytest.raises(UserError, match="^1 of 1 images"):
        main([f"--checkpoint={workdir}", str(tmp_path / "no.png"), "--format=json",
              f"--features={tmp_path / 'none.npz'}"])
    assert json.loads(capsys.readouterr().out) == []
    assert not (tmp_path / "none.npz").exists()


def test_links_to_folders_are_followed_but_not_in_circles(photos, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "linked").symlink_to(photos)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    found = find_images([str(tmp_path / "a")], Unreadable())
    assert found == [str(tmp_path / "a" / "linked" / Path(path).relative_to(photos))
                     for path in find_images([str(photos)], Unreadable())]


def test_as_a_command(workdir, photos):
    """Exit code 1 with a bad file, what is readable on stdout; 0 without."""
    command = [sys.executable, "-m", "vit_jax.predict", f"--checkpoint={workdir}", "--top=1",
               "--format=csv", str(photos / "a.png")]
    good = subprocess.run(command, capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert len(good.stdout.splitlines()) == 2
    bad = subprocess.run([*command, str(photos / "notes.txt")], capture_output=True, text=True)
    assert bad.returncode == 1
    (*bad_row, bad_share), (*good_row, good_share) = (
        run.stdout.rstrip("\n").split(",") for run in (bad, good))
    assert bad_row == good_row
    assert float(bad_share) == pytest.approx(float(good_share), abs=1e-5)  # other batch sizes
    assert "notes.txt cannot be read: it is not a JPEG, PNG" in bad.stderr
    assert bad.stderr.endswith("error: 1 of 2 images could not be read.\n")
    assert "Traceback" not in bad.stderr


def test_other_sizes_and_the_best_checkpoint(workdir, photos, capsys):
    image = photos / "b.JPG"
    small = predicted(capsys, f"--checkpoint={workdir}", image)
    assert predicted(capsys, f"--checkpoint={workdir}", image, "--best") == small  # one evaluation
    main([f"--checkpoint={workdir}", str(image), "--image_size=16,24", "--format=json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out) != small
    assert "resized  Transformer/posembed_input/pos_embedding 1x5x16 -> 1x25x16" in captured.err


def test_sigmoid_probabilities(workdir, digits):
    """Each class's own, for a run that was trained so; more classes than there are mean all."""
    loaded = vit_jax.load_model(workdir)
    images = [str(digits / "000.png")]

    def probabilities(loss):
        told = dataclasses.replace(loaded, metadata=loaded.metadata | {"loss": loss})
        (prediction,) = predict(told, images, Unreadable(), 99, 1)
        assert sorted(prediction.classes) == list(range(10))
        return np.float64(prediction.probabilities)

    softmax, sigmoid = probabilities("softmax"), probabilities("sigmoid")
    assert softmax.sum() == pytest.approx(1, abs=1e-5) != pytest.approx(sigmoid.sum(), abs=1e-3)
    logits = np.log(sigmoid) - np.log1p(-sigmoid)
    np.testing.assert_allclose(softmax, np.exp(logits) / np.exp(logits).sum(), atol=1e-5)


def google_file(path, model, size=8):
    """A file of random parameters, without names of classes."""
    generator = np.random.default_rng(0)
    np.savez(path, **{
        name: generator.normal(size=shape).astype(np.float32)
        for name, shape in expected_shapes(model, (size, size), 3).items()})
    return path


TINY = dict(patch_size=4, hidden_size=16, mlp_dim=24, num_heads=2, num_layers=1)


def test_imagenet_names_where_there_are_none(tmp_path, photos, capsys):
    path = google_file(tmp_path / "a.npz", vit_jax.create_model("B/16", num_classes=1000, **TINY))
    entries = predicted(capsys, f"--checkpoint={path}", photos)
    for prediction in entries[0]["predictions"]:
        assert prediction["class"] == class_names()[prediction["index"]]
    path = google_file(tmp_path / "a.npz", vit_jax.create_model("B/16", num_classes=999, **TINY))
    entries = predicted(capsys, f"--checkpoint={path}", photos)
    assert entries[0]["predictions"][0]["class"] == str(entries[0]["predictions"][0]["index"])


def test_features_of_a_model_without_a_head(tmp_path, photos, capsys):
    path = google_file(tmp_path / "a.npz", vit_jax.create_model("B/16", num_classes=0, **TINY))
    with pytest.raises(UserError, match="has no head, so it gives features, not classes; save th"):
        main([f"--checkpoint={path}", str(photos)])
    for form in ("table", "csv", "json"):
        main([f"--checkpoint={path}", str(photos), f"--features={tmp_path / 'f.npz'}",
              f"--format={form}"])
        out = capsys.readouterr().out
    assert [entry["predictions"] for entry in json.loads(out)] == [[]] * 5
    with np.load(tmp_path / "f.npz") as saved:
        assert saved["features"].shape == (5, 16)


def test_a_convolutional_baseline(tmp_path, photos, capsys):
    model = vit_jax.create_model("R50x1", num_classes=3, stages=(1,))
    path = google_file(tmp_path / "a.npz", model, 32)
    entries = predicted(capsys, f"--checkpoint={path}", photos, "--image_size=32")
    assert len(entries) == 5 and len(entries[0]["predictions"]) == 3


@pytest.mark.parametrize("arguments, message", [
    (["{photos}"], "--checkpoint"),
    (["--checkpoint={run}"], "IMAGE_OR_DIR"),
    (["--checkpoint={tmp}/no", "{photos}"], "no does not exist"),
    (["--checkpoint={run}", "{tmp}/empty"],
     "There are no images in {tmp}/empty, that is, no files"),
    (["--checkpoint={run}", "{photos}", "--top=0"], "--top=0 must be at least 1."),
    (["--checkpoint={run}", "{photos}", "--batch_size=-1"], "--batch_size=-1 must be at least 1."),
    (["--checkpoint={run}", "{photos}", "--image_size=big"], "--image_size=big is neither"),
    (["--checkpoint={run}", "{photos}", "--image_size=9"], "not divisible into patches"),
    (["--checkpoint={run}", "{photos}", "--format=xml"], "invalid choice: 'xml'"),
    (["--checkpoint={run}", "{photos}", "--features={tmp}/no/a.npz"], "{tmp}/no does not exist"),
    (["--checkpoint={run}", "--features", "{photos}/a.png", "{photos}"],
     "--features={photos}/a.png does not end in .npz; name the file to write"),
    (["--checkpoint={run}", "{photos}", "--tpo=3"], "did you mean --top?"),
], ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_mistakes(workdir, photos, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    names = dict(run=workdir, photos=photos, tmp=tmp_path)
    with pytest.raises(UserError) as error:
        main([argument.format(**names) for argument in arguments])
    assert message.format(**names) in str(error.value)


def test_predictions_per_patch_are_refused(tmp_path, digits):
    model = vit_jax.create_model("B/16", num_classes=3, **TINY)
    path = google_file(tmp_path / "a.npz", model)
    loaded = vit_jax.load_model(path, classifier="token_unpooled")
    with pytest.raises(UserError, match="one prediction per patch"):
        list(predict(loaded, [str(digits / "000.png")], Unreadable(), 5, 1))


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "IMAGE_OR_DIR" in capsys.readouterr().out
