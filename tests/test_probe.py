"""The command that probes features: a run's, an npz file's, its table and JSON, its mistakes."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from tiny import __file__ as tiny_file

import vit_jax
from vit_jax.checkpoints.adapt import expected_shapes
from vit_jax.data.builtin import Digits
from vit_jax.errors import UserError
from vit_jax.main import main as train
from vit_jax.probe import main
from vit_jax.probes.extraction import Features
from vit_jax.probes.fewshot import draw_examples, fewshot_accuracies
from vit_jax.probes.knn import knn_accuracy


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with a preprocessing of its own."""
    folder = tmp_path_factory.mktemp("run")
    with contextlib.redirect_stdout(io.StringIO()):
        train([f"--config={tiny_file}", f"--workdir={folder}", "--config.eval_every=0",
               "--config.checkpoint_every=0", "--config.model.num_layers=1",
               "--config.data.mean=0.4,0.3,0.2", "--config.data.std=0.2",
               "--config.optimizer.name=adamw", "--config.optimizer.learning_rate=0.02",
               "--config.total_steps=40"])
    return folder


def features(workdir, split):
    """Without the command and the pipeline."""
    source = Digits().open(split)
    images = np.stack([source[i].image for i in range(len(source))])
    loaded = vit_jax.load_model(workdir, num_classes=0)
    x = ((images / 255 - [0.4, 0.3, 0.2]) / 0.2).astype(np.float32)
    values = np.asarray(loaded.model.apply({"params": loaded.params}, x, train=False))
    return Features(values, source.labels(), np.arange(len(values)))


def test_probes_of_a_run(workdir, tmp_path, capsys):
    out = tmp_path / "probes.json"
    main([f"--checkpoint={workdir}", "--data=digits", "--shots=1,5", f"--out={out}"])
    text = capsys.readouterr().out
    results = json.loads(out.read_text())
    assert results["train"] == "digits split 'train'" and results["train_images"] == 1437
    assert results["test"] == "digits split 'test'" and results["test_images"] == 360
    assert results["features"] == 16 and results["image_size"] == [8, 8]

    known, tested = features(workdir, "train"), features(workdir, "test")
    draws = [draw_examples(known.labels, 10, 5, seed) for seed in range(3)]
    expected = fewshot_accuracies(known, tested, draws, (1, 5))
    # The sums of another batch round otherwise, which an image on the border may notice.
    for shots in (1, 5):
        np.testing.assert_allclose(
            results["fewshot"]["accuracy_by_seed"][str(shots)], expected[shots], atol=2 / 360)
    assert results["knn"]["accuracy"] == pytest.approx(knn_accuracy(known, tested, 10), abs=1 / 360)
    assert results["linear"]["accuracy"] > np.mean(expected[5]) > 0.3

    mean = np.mean(results["fewshot"]["accuracy_by_seed"]["5"])
    assert re.search(rf"^5-shot +{mean:.4f}  \(", text, re.MULTILINE)
    assert re.search(rf"^20 nearest neighbours +{results['knn']['accuracy']:.4f}$", text,
                     re.MULTILINE)
    assert re.search(rf"^linear +{results['linear']['accuracy']:.4f}  \(l2 ", text, re.MULTILINE)
    assert "16 features of images of 8x8; learned from 1,437 of digits split 'train', " in text


def test_some_probes_and_another_size(workdir, capsys):
    main([f"--checkpoint={workdir}", "--data=digits", "--what=knn", "--image_size=16"])
    out = capsys.readouterr().out
    assert "resized  Transformer/posembed_input/pos_embedding 1x5x16 -> 1x17x16" in out
    assert "images of 16x16" in out and "20 nearest neighbours" in out
    assert "shot" not in out and "linear" not in out


def test_a_file_and_a_folder_with_a_broken_image(tmp_path, capsys):
    """Colours are told apart by a model of random weights; the broken image is left out."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for name, colour in (("blue", (40, 60, 200)), ("red", (200, 60, 40))):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-30, 30, (16, 16, 3))
                Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(
                    folder / f"{i}.png")
    (tmp_path / "photos/train/red/broken.png").write_bytes(b"nothing")
    model = vit_jax.create_model("B/16", num_classes=3, patch_size=4, hidden_size=16, mlp_dim=24,
                                 num_heads=2, num_layers=1)
    np.savez(tmp_path / "a.npz", **{
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in expected_shapes(model, (8, 8), 3).items()})
    main([f"--checkpoint={tmp_path / 'a.npz'}", f"--data=folder:{tmp_path / 'photos'}",
          "--what=fewshot,knn", "--shots=10"])
    out = capsys.readouterr().out
    assert "1 images could not be decoded and were skipped." in out
    assert re.search(r"^10-shot +1\.0000  \(1\.0000 to 1\.0000, 3 seeds\)$", out, re.MULTILINE)
    assert re.search(r"^20 nearest neighbours +1\.0000$", out, re.MULTILINE)


@pytest.mark.parametrize("arguments, message", [
    (["--data=digits"], "--checkpoint"),
    (["--checkpoint={run}"], "--data"),
    (["--checkpoint={run}", "--data=digts"], "--data='digts' is not a data source"),
    (["--checkpoint={run}", "--data=tfds:cifar10", "--data_dir={run}/no"],
     "--data_dir, {run}/no, does not exist"),
    (["--checkpoint={run}", "--data=digits", "--eval_split=val"], "no split 'val'"),
    (["--checkpoint={run}", "--data=digits", "--what=knn,lniear"], "did you mean 'linear'?"),
    (["--checkpoint={run}", "--data=digits", "--shots=5,0"], "--shots=5,0 must be numbers"),
    (["--checkpoint={run}", "--data=digits", "--shots=few"], "--shots=few must be numbers"),
    (["--checkpoint={run}", "--data=digits", "--batch_size=0"], "must be at least 1"),
    (["--checkpoint={run}", "--data=digits", "--out={run}/a.npz"], "does not end in .json; name"),
    (["--checkpoint={run}", "--data=digits", "--out={run}/no/a.json"], "{run}/no does not exist"),
], ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_mistakes(workdir, arguments, message):
    with pytest.raises(UserError) as error:
        main([argument.format(run=workdir) for argument in arguments])
    assert message.format(run=workdir) in str(error.value)


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "--what" in capsys.readouterr().out
