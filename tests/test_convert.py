"""The command `convert`: a run's weights in another library, errors, and life without PyTorch."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import __file__ as tiny_file

import vit_jax
from vit_jax.checkpoints import export, targets
from vit_jax.checkpoints.verify import PLAIN, function, read_images
from vit_jax.convert import main
from vit_jax.errors import UserError
from vit_jax.main import main as train

ROOT = Path(__file__).parent.parent
TRAIN = [f"--config={tiny_file}", "--config.data.workers=0", "--config.optimizer.learning_rate=0.5",
         "--config.data.antialias=true", "--config.data.interpolation=bicubic",
         "--config.data.eval_crop=center_crop", "--config.data.eval_resize=10",
         "--config.total_steps=3", "--config.model.num_layers=1"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A tiny run that crops and filters as PyTorch's transforms do."""
    path = tmp_path_factory.mktemp("run") / "digits"
    train([*TRAIN, f"--workdir={path}"])
    return path


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (33, 20, 3)), ("b.png", (8, 8, 3)), ("c.png", (17, 40, 3))):
        smooth = np.kron(rng.integers(0, 256, (1, 4, 3)), np.ones((shape[0], -(-shape[1] // 4), 1)))
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(smooth[:, :shape[1]].astype(np.uint8)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        main(list(map(str, arguments)))
    return str(error.value)


# `python -m vit_jax.convert` three times over, first with transformers, whose imports are the
# delicate ones. timm by itself is imported by `test_a_failed_check_is_a_failed_command`.
THREE = """
import runpy, sys
source, out = sys.argv[1:]
for target in ("hf", "torchvision", "timm"):
    options = ["--allow_gelu_change"] if target == "torchvision" else []
    sys.argv[1:] = [source, out + target, f"--to={target}", *options]
    runpy.run_module("vit_jax.convert", run_name="__main__")
"""


def test_the_command_compares_with_the_installed_libraries(workdir, tmp_path):
    """In a process of its own, without the tests' help for a torchvision that does not import."""
    for library in ("torch", "torchvision", "timm", "transformers"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed; this needs the extra 'parity'")
    result = subprocess.run(
        [sys.executable, "-c", THREE, f"--from={workdir}", f"--out={tmp_path}/"],
        cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n  PASS") == result.stdout.count("4 of 4 agree") == 3


def test_a_run_predicts_the_same_in_timm(workdir, photos, tmp_path, capsys):
    """From the exported directory alone, image files included."""
    from torch_shim import timm, torch

    out = tmp_path / "out"
    main([f"--from={workdir}", "--to=timm", f"--out={out}", f"--images={photos}"])
    text = capsys.readouterr().out
    assert "vit_jax names" in text and "7 of 7 agree" in text and "\n  PASS" in text

    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    names = json.loads((out / "config.json").read_text())["label_names"]
    assert names == [str(digit) for digit in range(10)]
    loaded = vit_jax.load_model(workdir)
    for path in sorted(photos.iterdir()):
        with torch.no_grad():
            theirs = model(transform(Image.open(path).convert("RGB"))[None]).numpy()
        images = read_images([path], loaded.metadata["preprocessing"])
        ours = function(loaded.model, export.flatten(loaded.params))(images)
        # Both libraries filter with Pillow: the pixels are the same, the rest is rounding.
        assert abs(theirs - ours).max() < PLAIN * max(1, ours.std())
        assert ours.std() > 0.1


def test_the_best_checkpoint_of_a_run(workdir, tmp_path):
    main([f"--from={workdir}", "--to=npz", f"--out={tmp_path / 'a.npz'}", "--best", "--noverify"])
    source = json.loads((tmp_path / "a.npz.conversion_report.json").read_text())["source"]
    best = vit_jax.load_model(workdir, checkpoint="best")
    assert source == best.report.source
    back = export.flatten(vit_jax.load_model(tmp_path / "a.npz").params)
    for path, value in export.flatten(best.params).items():
        np.testing.assert_array_equal(back[path], value)


def test_hf_and_torchvision(workdir, tmp_path, capsys):
    import torch_shim  # noqa: F401

    main([f"--from={workdir}", "--to=hf", f"--out={tmp_path / 'hf'}", "--dtype=bfloat16"])
    assert "rounding to bfloat16" in capsys.readouterr().out
    assert "--allow_gelu_change" in refusal(
        f"--from={workdir}", "--to=torchvision", f"--out={tmp_path / 'tv'}")
    main([f"--from={workdir}", "--to=torchvision", f"--out={tmp_path / 'tv'}",
          "--allow_gelu_change"])
    text = capsys.readouterr().out
    assert "effect   exact GELU instead of tanh" in text and "\n  PASS" in text


# A carrier who has no PyTorch, and one whose numbers do not agree; each as a command of its own.

def command(*arguments, before=""):
    code = f"import sys\n{before}\nfrom vit_jax import cli, convert\ncli.run_command(convert.main)"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True,
        text=True, timeout=300, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_without_pytorch(workdir, tmp_path):
    done = command(f"--from={workdir}", "--to=timm", f"--out={tmp_path / 'out'}",
                   before="sys.modules['torch'] = sys.modules['timm'] = None")
    assert (done.returncode, done.stderr) == (0, "")
    assert "SKIPPED  the outputs were not compared: torch is not installed" in done.stdout
    assert "read back bit for bit" in done.stdout
    assert vit_jax.load_model(tmp_path / "out").model.num_classes == 10


def test_a_failed_check_is_a_failed_command(workdir, tmp_path):
    before = """
from vit_jax.checkpoints import export
write = export._write_directory
def write_wrongly(path, report, model, tensors, *rest):
    write(path, report, model, {name: x + 1 for name, x in tensors.items()}, *rest)
export._write_directory = write_wrongly
"""
    done = command(f"--from={workdir}", "--to=timm", f"--out={tmp_path / 'out'}", before=before)
    assert done.returncode == 1
    assert done.stderr.startswith("error: The exported model does not reproduce the original")
    assert "Traceback" not in done.stderr and "\n  FAIL " in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]


@pytest.mark.parametrize("arguments, message", [
    ([], "arguments are required: --from, --to, --out"),
    (["--from=x", "--to=timm"], "required: --out"),
    (["--from=x", "--out=y"], "required: --to"),
    (["--from=x", "--to=keras", "--out=y"], "invalid choice: 'keras'"),
    (["--from=x", "--to=timm", "--out=y", "--dtype=int8"], "invalid choice: 'int8'"),
    (["--from=x", "--to=timm", "--out=y", "--no_verify"], "did you mean --noverify?"),
    (["--from=x", "--to=timm", "--out=y", "--noverify", "--images=z"], "--images has no effect wi"),
    (["--from=x", "--to=hf", "--out=y", "--allow_gelu_change"], "is for --to=torchvision; leave"),
    (["--from=x", "--to=timm", "--out="], "--out= is empty"),
    (["--from=nowhere/x.npz", "--to=timm", "--out=y"], "does not exist"),
])
def test_mistakes(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(*arguments)
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_left_alone(workdir, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    message = refusal(f"--from={workdir}", "--to=timm", f"--out={tmp_path}", "--noverify")
    assert "exists; choose another --out" in message
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{flag}" in text for flag in (
        "from", "to", "out", "match_eps", "noverify", "dtype", "allow_gelu_change", "images",
        "overwrite", "best"))
    assert all(target in text for target in targets.TARGETS)
