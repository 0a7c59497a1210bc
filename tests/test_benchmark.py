"""The command, on models of a few neurons: what it measures is real, how fast is not tested."""

import contextlib
import csv
import dataclasses
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import benchmark
from vit_jax.benchmarking import capacity, models, pipelines
from vit_jax.benchmarking.peer import PEERS, Peer
from vit_jax.benchmarking.timing import alternate
from vit_jax.errors import UserError
from vit_jax.models.shapes import params_shapes
from vit_jax.training.state import build_model

TINY = ["--config.data.image_size=8", "--config.model.patch_size=4",
        "--config.model.hidden_size=16", "--config.model.mlp_dim=24", "--config.model.num_heads=2",
        "--config.model.num_layers=2"]
OVERRIDES = dict(argument.removeprefix("--config.").split("=") for argument in TINY)
PRODUCTS = ((8, 16, 24), (16, 16, 16))
QUICK = ["--rounds=2", "--seconds=0.01", "--batch_sizes=8"]
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm and PyTorch are not installed")


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setattr(models, "_CPU_SHAPES", PRODUCTS)
    monkeypatch.setattr(benchmark, "_MATMUL_SECONDS", 0.001)


def rows(tmp_path, *arguments):
    benchmark.main([*arguments, f"--out={tmp_path / 'out'}"])
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    with open(tmp_path / "out" / "benchmark.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(found["rows"])
    with Image.open(tmp_path / "out" / "benchmark.png") as chart:
        assert chart.size[0] > 500
    return found


def forward_flops():
    """Of TINY: 4 patches and the class token, which alone is read after the last block."""
    tokens, width, mlp = 5, 16, 24
    keys_and_values = 2 * width * width  # multiply-adds of a token
    rest = 2 * width * width + 2 * tokens * width + 2 * width * mlp
    return 2 * (4 * 4 * 4 * 3 * width + 2 * tokens * keys_and_values + (tokens + 1) * rest
                + width * models.NUM_CLASSES)


@pytest.mark.parametrize("what, passes, options", [
    ("train", 3, ["--config.model.remat=full", "--profile"]),
    pytest.param("infer", 1, ["--config.dtype=bfloat16"], marks=pytest.mark.core)])
def test_models(what, passes, options, tmp_path, capsys, monkeypatch):
    measured = {}
    monkeypatch.setattr(benchmark, "alternate", lambda *sides, **how: measured.update(
        alternate(*sides, **how)) or measured)
    found = rows(tmp_path, f"--what={what}", "--variants=B/16", *QUICK, *TINY, *options)
    assert found["command"].startswith(f"python -m vit_jax.benchmark --what={what}")
    assert found["packages"]["jax"] and found["cores"] >= 1 and len(found["matmul TFLOP/s"]) == 2
    (row,) = found["rows"]
    assert row["variant"] == "B/16" and row["batch"] == 8
    assert row["worst"] <= row["images/s"] <= row["best"]
    assert row["images/s"] == pytest.approx(8e3 / row["ms/step"])
    assert row["GiB"] > 0 and row["compile s"] > 0 and row["MFU"] is None
    # An image a device, whatever remat repeats, beside each round's fastest product.
    shares = [passes * forward_flops() / seconds / max(
        2 * math.prod(shape) / each for shape, each in zip(PRODUCTS, products, strict=True))
        for seconds, *products in zip(*(side.rounds for side in measured.values()), strict=True)]
    assert row["of matmul"] == pytest.approx(statistics.median(shares))
    out = capsys.readouterr().out
    assert "images/s" in out
    if "--profile" in options:
        parts = {row["part"]: row for row in found["profiles"]}
        assert {"attention", "attention: projections", "MLP", "LayerNorm", "optimizer"} <= set(
            parts)
        assert sum(row["%"] for row in parts.values()) == pytest.approx(100)
        assert parts["MLP"]["of it products"] > 0 == parts["optimizer"]["of it products"]
        assert "attention: projections" in out


# What `python -m MODULE ARGUMENTS` does, with small products as in `small_products`.
CHILD = f"""import runpy, sys
from vit_jax.benchmarking import models
models._CPU_SHAPES = {PRODUCTS}
sys.argv[:] = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def test_what_was_measured_is_kept_when_another_fails(tmp_path, monkeypatch, capfd):
    """Each in a process of its own: 18 is no width for the twelve heads of B/16."""
    monkeypatch.setattr(benchmark, "subprocess", types.SimpleNamespace(
        DEVNULL=subprocess.DEVNULL, run=lambda command, **options: subprocess.run(
            [command[0], "-c", CHILD, *command[1:]], **options)))
    with pytest.raises(UserError, match="1 of 2 measurements failed, .*: B/16 with 8"):
        rows(tmp_path, "--what=infer", "--variants=Ti/16,B/16", "--rounds=1", "--seconds=0.01",
             "--batch_sizes=8", "--config.data.image_size=16", "--config.model.num_layers=1",
             "--config.model.hidden_size=18")
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [row["variant"] for row in found["rows"]] == ["Ti/16"]
    assert "Ti/16,B/16" in found["command"] and found["packages"]["jax"]
    out, errors = capfd.readouterr()
    assert "hidden_size 18 is not divisible by num_heads 12" in errors
    assert out.count("Ti/16") == 1 and "Wrote benchmark.json" in out


@pytest.mark.core
def test_training_trains():
    """The measured step is the run's own: it changes the weights, and counts its steps."""
    config = benchmark._config(OVERRIDES, "S/16", 8)
    trainer = models.Trainer(config)
    before = np.asarray(trainer.state.params["head"]["bias"])
    step = trainer.compile()
    trainer.state, metrics = step(trainer.state, trainer.batch)
    assert int(trainer.state.step) == 1 and np.isfinite(float(metrics["loss"]))
    assert (np.asarray(trainer.state.params["head"]["bias"]) != before).any()


def test_largest(tmp_path, monkeypatch):
    """With eight devices that hold 100 images each, and kernels that take no more than 200."""
    def attempt(what, config_json, cache):
        size = json.loads(config_json)["batch_size"]
        return capacity.Try("RESOURCE_EXHAUSTED: out of memory" if size > 8 * 200 else
                            "too many blocks" if size > 8 * 100 else "", recomputed=size)

    monkeypatch.setattr(capacity, "devices", lambda: ("gpu", 8))
    monkeypatch.setattr(capacity, "attempt", attempt)
    found = rows(tmp_path, "--what=train", "--variants=B/16", "--batch_sizes=largest", *TINY)
    (row,) = found["rows"]
    assert row["side"] == "vit_jax" and row["largest batch"] == row["XLA recomputes"] == 8 * 100


@needs_torch
@pytest.mark.parametrize("what, library, options", [
    ("infer", "timm", ["--config.dtype=bfloat16"]),
    pytest.param("train", "transformers", [], marks=pytest.mark.slow),
])
def test_against_pytorch(tmp_path, monkeypatch, what, library, options):
    """A small model of ours stands in for Ti/16, whose compilation takes long; it says to have
    the parameters of the config's own."""
    build = models.BUILD[what]

    def stand_in(config):
        shapes = params_shapes(build_model(config, models.NUM_CLASSES, (32, 32)), (32, 32))
        work = build(benchmark._config(OVERRIDES | {"dtype": config.dtype}, "Ti/16", 8))
        return dataclasses.replace(work, parameters=sum(
            math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)))

    monkeypatch.setitem(models.BUILD, what, stand_in)
    found = rows(tmp_path, f"--what={what}", "--variants=Ti/16", *QUICK, *options,
                 "--config.data.image_size=32", f"--against={library}")
    ours, other = found["rows"]
    assert [ours["side"], other["side"]] == ["vit_jax", library]
    assert ours["vit_jax is faster by"] is None and other["vit_jax is faster by"] > 0
    assert other["library"].startswith(f"{library} ") and ", torch " in other["library"]


@needs_torch
@pytest.mark.parametrize("library, what", [("timm", "train"), ("transformers", "infer")])
def test_peers_run_the_same_model(library, what):
    config = benchmark._config({"data.image_size": "32"}, "Ti/16", 2)
    with contextlib.closing(Peer(library, benchmark._task(what, config, "Ti/16"))) as peer:
        assert peer.about["parameters"] == 5_680_552 and peer.run(1) > 0


def test_another_model_is_not_compared(tmp_path, monkeypatch):
    script = tmp_path / "other.py"
    script.write_text("print('{\"ready\": {\"parameters\": 1000}}', flush=True); input()")
    monkeypatch.setitem(PEERS, "timm", (str(script), "timm"))
    monkeypatch.setitem(
        models.BUILD, "infer", lambda config: types.SimpleNamespace(parameters=2000))
    with pytest.raises(UserError, match="builds S/32 with 1,000 parameters, and here it has 2,000"):
        benchmark.main(["--what=infer", "--variants=S/32", "--batch_sizes=8", "--against=timm"])


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos" / "inside"
    folder.mkdir(parents=True)
    for i, size in enumerate([(40, 30), (25, 50), (16, 16)]):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.JPG", format="JPEG")
    return folder.parent


def test_input_and_training_that_it_feeds(tmp_path, photos):
    found = rows(tmp_path, "--what=input", f"--images={photos}", *QUICK, *TINY, "--variants=B/16",
                 "--config.data.workers=2")
    ours, fed, memory = found["rows"]
    assert ours["images/s/core"] == pytest.approx(ours["images/s"] / 2)
    assert fed["side"] == "training B/16 from these photos" and "from memory" in memory["side"]
    assert fed["of training from memory"] > 0 and found["photos"].startswith("3 of ")


def test_batches_that_were_ready_before_the_clock_started_do_not_count(monkeypatch):
    config = benchmark._config(OVERRIDES, "B/16", 8)
    batch, taken = models.synthetic_batch(8, (8, 8)), []

    def stream(*_):
        while True:
            taken.append(1)
            yield batch

    monkeypatch.setattr(pipelines, "batches", stream)
    with pipelines.fed_training(config, None) as (fed, memory):
        assert fed(3) > 0 and len(taken) == 3 + pipelines._READ_AHEAD
        assert memory(3) > 0 and len(taken) == 3 + pipelines._READ_AHEAD


def test_a_damaged_photo_stops_the_measurement(photos):
    (photos / "bad.jpg").write_bytes(b"no photo")
    (photos / "._bad.jpg").write_bytes(b"of macOS")
    with pytest.raises(UserError, match=r"/bad.jpg cannot be decoded: .* Remove it from --images"):
        benchmark.main(["--what=input", f"--images={photos}", *QUICK])


def test_the_schedule_is_of_the_steps_that_the_config_says():
    long = {"total_steps": "100000", "schedule.warmup_steps": "10000"}
    models.Trainer(benchmark._config(OVERRIDES | long, "B/16", 8))
    with pytest.raises(UserError, match="warmup_steps=10000"):
        models.Trainer(benchmark._config(OVERRIDES | long | {"total_steps": "10000"}, "B/16", 8))


@needs_torch
def test_input_against_a_data_loader(tmp_path, photos):
    found = rows(tmp_path, "--what=input", f"--images={photos}", *QUICK,
                 "--config.data.image_size=8", "--against=torch-dataloader")
    assert found["rows"][1]["library"].startswith("torch ")


def test_made_photos(tmp_path):
    found = rows(tmp_path, "--what=input", "--rounds=1", "--seconds=0.01", "--batch_sizes=8")
    assert found["photos"] == "256 of 500x375 (made)"


def test_checkpoint(tmp_path):
    (row,) = rows(tmp_path, "--what=checkpoint", "--variants=B/16", "--rounds=2", *TINY,
                  "--batch_sizes=8")["rows"]
    assert row["blocked steps"] == pytest.approx(row["blocked ms"] / row["ms/step"])
    assert row["written s"] >= row["blocked ms"] / 1e3
    # Weights and two moments in float32, of which little is compressible.
    assert row["GiB"] * 2**30 > 3 * 4 * 18_000


def test_startup(tmp_path):
    cold, warm = rows(tmp_path, "--what=startup", "--variants=B/16", "--rounds=1", *TINY,
                      "--batch_sizes=8")["rows"]
    assert (cold["cache"], warm["cache"]) == ("cold", "warm")
    for row in (cold, warm):
        phases = ("imports s", "state s", "compile s", "first step s")
        assert row["total s"] == pytest.approx(sum(row[phase] for phase in phases))
    assert warm["compile s"] < cold["compile s"]


def test_a_start_that_fails(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="process ended with exit code 1: it said nothing"):
        benchmark.main(["--what=startup", "--variants=B/16", "--rounds=1", *TINY])


@pytest.mark.parametrize("arguments, message", [
    ([], "--what"),
    (["--what=speed"], "invalid choice: 'speed'"),
    (["--what=train", "--variants=S/17"], "--variants: .*S/17"),
    (["--what=train", "--batch_sizes=0"], "=0 must be numbers of images, or just 'largest'"),
    (["--what=train", "--batch_sizes=largest", "--against=timm"], "needs an accelerator"),
    (["--what=train", "--batch_sizes=8,largest"], "=8,largest must be numbers of images, or just"),
    (["--what=checkpoint", "--batch_sizes=largest"], r"=largest must be numbers of images\.$"),
    (["--what=input", "--batch_sizes=8,16"], "measures one of --batch_sizes"),
    (["--what=train", "--against=tf.data"], "tf.data cannot be used with --what=train, only timm"),
    (["--what=startup", "--against=timm"], r"cannot be used with --what=startup\.$"),
    (["--what=train", "--images=x"], "--images is for --what=input"),
    (["--what=input", "--images=/nothing"], "/nothing holds no .jpg"),
    (["--what=infer", "--batch_sizes=3", *TINY], "batch_size=3 is not divisible by 8"),
    (["--what=train", "--rounds=0"], "--rounds must be at least 1"),
    (["--what=input", "--profile"], "--profile is for --what=train and"),
    (["--what=train", "--seconds=nan"], "--seconds more than 0"),
    (["--what=train", f"--out={__file__}"], "--out=.* cannot be written to: File exists"),
    (["--what=input", "--config.dtype=bfloat16"], "dtype has no effect on --what=input"),
    (["--what=startup", "--seconds=1"], "--seconds has no effect on --what=startup"),
    (["--what=train", "--config.batch_size=3"], "--config.batch_size is what --variants and"),
    (["--what=train", "--config.mesh.fsdp=3"], "does not fit"),
    (["--what=train", "--against=timm", "--config.model.remat=full"], "on --against=timm"),
    (["--what=train", "--config.nonsense=1"], "nonsense"),
    (["--what=train", "--config.parallelism=pmap"], "parallelism has no effect on --what=train"),
    (["--what=infer", "--config.optimizer.name=sgd"], "no effect on --what=infer; .*model"),
    (["--what=input", "--against=tf.data", "--config.data.antialias=true"], "on --against=tf.data"),
])
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        benchmark.main(arguments)


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None,
                    reason="TensorFlow is installed")
def test_a_library_that_is_not_installed(photos):
    with pytest.raises(UserError, match="tensorflow is not installed .*--peer_python"):
        benchmark.main(["--what=input", f"--images={photos}", "--against=tf.data"])


def test_a_python_that_does_not_start(photos):
    with pytest.raises(UserError, match="--peer_python=/no/python does not start"):
        benchmark.main(["--what=input", f"--images={photos}", "--against=tf.data",
                        "--peer_python=/no/python"])
