"""Masked patch prediction through the trainer: runs, resumes, fine-tunes, is probed and drawn."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import __file__ as tiny_file

import vit_jax
from vit_jax.checkpoints.adapt import flatten
from vit_jax.checkpoints.load import load_masked_model
from vit_jax.data.builtin import Digits
from vit_jax.errors import UserError
from vit_jax.main import main
from vit_jax.masked import main as draw
from vit_jax.models.vit import VisionTransformer
from vit_jax.probe import main as probe

MASKED = ["--config.task=masked_patches", "--config.model.patch_size=2",
          "--config.model.num_layers=1", "--config.optimizer.name=adamw",
          "--config.optimizer.learning_rate=0.01"]


def run(workdir, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([f"--config={tiny_file}", f"--workdir={workdir}", *arguments])
    return out.getvalue()


def read_params(workdir):
    return flatten(load_masked_model(workdir).params)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, drawn):
    """60 steps, with probes and figures."""
    folder = tmp_path_factory.mktemp("masked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vit_jax.report.write_report", drawn)
        out = run(folder, *MASKED, "--config.total_steps=60", "--config.eval_every=10",
                  "--config.checkpoint_every=0", "--config.probes.every=30",
                  "--config.probes.shots=1,5")
    assert out.splitlines()[-1].startswith("eval/accuracy=0.")
    assert out.splitlines()[-1].endswith("eval/images=360")
    return folder


def test_it_learns_and_is_probed(pretrained):
    entries = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["eval/loss"] for entry in entries if "eval/loss" in entry]
    assert losses[-1] < losses[0] - 0.5 < np.log(512)  # that of knowing nothing
    probes = [entry for entry in entries if "probe/5shot" in entry]
    assert [entry["step"] for entry in probes] == [30, 60]
    assert 0.1 < probes[-1]["probe/1shot"] < probes[-1]["probe/5shot"] < 1
    assert [path.name for path in (pretrained / "report").iterdir()] == ["curves.png"]


@pytest.mark.parametrize("extra", [
    pytest.param([], marks=pytest.mark.slow, id="plain"),
    pytest.param(["--config.model.scan_layers=true", "--config.mesh.fsdp=2"],
                 id="scanned and sharded"),
])
def test_resuming_equals_not_stopping(tmp_path, extra):
    assert jax.device_count() == 8  # what sharding relies on
    arguments = [*MASKED, "--config.checkpoint_every=3", "--config.optimizer.name=sgd", *extra]
    run(tmp_path / "whole", *arguments, "--config.total_steps=6")
    run(tmp_path / "parts", *arguments, "--config.total_steps=3")
    run(tmp_path / "parts", *arguments, "--config.total_steps=6")
    whole, parts = read_params(tmp_path / "whole"), read_params(tmp_path / "parts")
    assert whole.keys() == parts.keys() and "mask_token" in whole
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name])


def test_the_result_is_an_ordinary_checkpoint(pretrained):
    loaded = vit_jax.load_model(pretrained)
    assert type(loaded.model) is VisionTransformer and loaded.model.num_classes == 0
    dropped = [name for name, *_ in loaded.report.dropped]
    assert sorted(dropped) == ["mask_token", "patch_head/bias", "patch_head/kernel"]
    features = loaded.model.apply({"params": loaded.params}, np.zeros((1, 8, 8, 3)), train=False)
    assert features.shape == (1, 16)


def test_fine_tuning(pretrained, tmp_path):
    out = run(tmp_path, f"--config.init={pretrained}", "--config.model.patch_size=2",
              "--config.model.num_layers=1", "--config.optimizer.learning_rate=0",
              "--config.total_steps=1")
    assert "reset    head/kernel 16x10 (the file has no head)" in out
    assert "dropped  mask_token 1x1x16 (of masked pretraining)" in out
    before = flatten(vit_jax.load_model(pretrained).params)
    after = flatten(vit_jax.load_model(tmp_path).params)
    assert after.keys() - before.keys() == {"head/kernel", "head/bias"}
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    with pytest.raises(UserError, match="was not trained with config.task='masked_patches'"):
        load_masked_model(tmp_path)


def test_the_commands(pretrained, tmp_path, capsys):
    probe([f"--checkpoint={pretrained}", "--data=digits", "--what=knn"])
    assert "20 nearest neighbours" in capsys.readouterr().out
    source = Digits().open("test")
    for i in range(3):
        Image.fromarray(source[i].image).save(tmp_path / f"{i}.png")
    draw([f"--checkpoint={pretrained}", str(tmp_path), f"--out={tmp_path / 'masked.png'}"])
    assert np.asarray(Image.open(tmp_path / "masked.png")).std() > 10
    with pytest.raises(UserError, match="has no classes to evaluate; probe its features"):
        main(["--mode=evaluate", f"--workdir={pretrained}"])
    with pytest.raises(UserError, match="corrupts none of 16 patches"):
        draw([f"--checkpoint={pretrained}", str(tmp_path / "0.png"), "--rate=0.01",
              f"--out={tmp_path / 'masked.png'}"])
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="folder.png cannot be written: Is a directory"):
        draw([f"--checkpoint={pretrained}", str(tmp_path / "0.png"),
              f"--out={tmp_path / 'folder.png'}"])
    assert not list(tmp_path.glob(".*"))


def test_a_workdir_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text("of an export")
    for path in (tmp_path, tmp_path / "no"):
        with pytest.raises(UserError, match="is not the workdir of a run"):
            load_masked_model(path)


def test_a_seed_that_jax_would_cut(tmp_path):
    with pytest.raises(UserError, match="--seed=4294967296 must be at least 0 and below"):
        draw(["--checkpoint=none", "0.png", f"--out={tmp_path / 'masked.png'}", f"--seed={2**32}"])


@pytest.mark.parametrize("arguments, message", [
    (["--rate=-0.5", "--out=masked.png"], "--rate=-0.5 must be more than 0 and at most 1"),
    (["--rate=2", "--out=masked.png"], "--rate=2 must be more"),
    (["--rate=nan", "--out=masked.png"], "--rate=nan must be more"),
    (["--out=masked"], "--out=masked does not end in .png"),
])
def test_flags_are_checked_before_anything_is_loaded(arguments, message):
    with pytest.raises(UserError, match=message):
        draw(["--checkpoint=none", "0.png", *arguments])


@pytest.mark.parametrize("arguments, message", [
    (["--config.init=augreg:B/16"], "starts from random weights"),
    (["--config.data.mixup=0.2"], "config.data.mixup=0.2 changes the colours"),
    (["--config.masked.rate=0.01"], "at a rate of 0.01 corrupts none of 16 patches"),
    (["--config.model.variant=R50x1", "--config.model.patch_size=none",
      "--config.model.num_layers=none", "--config.model.hidden_size=none",
      "--config.model.mlp_dim=none", "--config.model.num_heads=none"],
     "R50x1 has no patches to mask"),
    (["--config.masked.target=downsized_colors"], "divisible by 4, not 2"),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_mistakes(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", *MASKED, *arguments)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
