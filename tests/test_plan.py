"""The plan command, against arithmetic from the sizes in the papers."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Var

from vit_jax.config import base_config, set_value, validate
from vit_jax.devices import named
from vit_jax.errors import UserError
from vit_jax.models.summary import summarize
from vit_jax.models.variants import create_model
from vit_jax.plan import (
    Cost,
    attention_kernel,
    data_size,
    input_rows,
    main,
    recomputed_flops,
    suggestion,
)
from vit_jax.training.memory import Memory

ROOT = Path(__file__).parent.parent
RECIPE = f"--config={ROOT}/configs/pretrain_paper.py:H/14-i21k-90ep"
GIB = 2**30


@pytest.fixture(autouse=True)
def no_data(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))


def printed(capsys, *arguments):
    main(list(arguments))
    return capsys.readouterr().out


def value(text, label):
    """The number after a label."""
    return float(re.search(rf"^ +{re.escape(label)} +([\d,.]+)", text, re.M)[1].replace(",", ""))


# Layers, width, MLP and heads of H/14 (arXiv 2010.11929, table 1) and G/14 (2106.04560, table 2).
SIZES = {"H/14": (32, 1280, 5120, 16), "G/14": (48, 1664, 8192, 16)}
N = 16 * 16 + 1  # tokens: 224 / 14 patches a side, and the class
K = 21_841


def by_hand(variant, devices, fsdp):
    """Bytes of a device and FLOPs of an image, for float32 parameters, Adam, a batch of 4096."""
    layers, width, mlp, heads = SIZES[variant]
    kernels = layers * (4 * width * width + 2 * width * mlp)  # q, k, v, projection; the MLP's two
    kernels += 14 * 14 * 3 * width + width * width + width * K  # patches, pre_logits, head
    others = layers * (4 * width + mlp + width + 2 * 2 * width)  # biases, two norms
    others += width + width + N * width + 2 * width + width + K  # and outside, in that order:
    # patches' bias, class token, positions, last norm, pre_logits' bias, head's bias
    parameters = 4 * (kernels / fsdp + others)

    # 2 FLOPs for every multiply-add; a token meets every kernel once, and in attention each head
    # multiplies N queries with N keys, and N x N weights with values.
    macs = N * layers * (4 * width**2 + 2 * width * mlp) + layers * 2 * N * N * width
    macs += (N - 1) * 14 * 14 * 3 * width + width * width + width * K

    # remat='names': a block keeps its input, the attention's output and the MLP's hidden layer.
    images = 4096 // devices
    kept = layers * images * N * (2 * width + mlp) * 2
    return dict(count=kernels + others, parameters=parameters, forward=2 * macs, kept=kept)


@pytest.mark.parametrize("variant", SIZES)
@pytest.mark.parametrize("devices, fsdp", [(8, 8), (256, 1)])
def test_by_hand(variant, devices, fsdp, capsys):
    hand = by_hand(variant, devices, fsdp)
    width = SIZES[variant][1]
    text = printed(
        capsys, RECIPE, f"--devices={devices}", "--device=h200",
        f"--config.model.variant={variant}", f"--config.model.representation_size={width}",
        f"--config.mesh.fsdp={fsdp}",
        "--config.model.remat=names", "--config.optimizer.momentum_dtype=bfloat16",
        "--config.model.dropout_rate=0")
    assert f"{variant}, {hand['count']:,} parameters" in text
    table = {label: value(text, label) for label in (
        "parameters", "optimizer state", "gradients", "activations kept",
        "one block's backward pass", "images and labels", "total")}
    near = dict(abs=0.0006)  # three decimals
    assert table["parameters"] == pytest.approx(hand["parameters"] / GIB, **near)
    # The first moment in bfloat16, the second in float32.
    assert table["optimizer state"] == pytest.approx(1.5 * hand["parameters"] / GIB, **near)
    assert table["gradients"] == table["parameters"]
    # Beside the blocks': images, what the head reads, the loss; under 7 % of the blocks'.
    assert hand["kept"] / GIB < table["activations kept"] < 1.07 * hand["kept"] / GIB
    assert table["total"] == pytest.approx(
        sum(n for label, n in table.items() if label != "total"), abs=0.004)

    forward = hand["forward"]
    assert value(text, "forward pass of an image") == pytest.approx(forward / 1e9, rel=0.006)
    step = 3 * forward * 4096
    assert value(text, "training step") == pytest.approx(step / 1e15, abs=0.006)
    # 989.5 TFLOPs each at 40 %; 90 epochs of 14,197,122 - 51,200 images.
    seconds = step / (devices * 989.5e12 * 0.4)
    assert value(text, "step") == pytest.approx(seconds, rel=0.006)
    steps = round(90 * 14_145_922 / 4096)
    assert value(text, "steps") == steps
    assert value(text, "all steps") == pytest.approx(steps * seconds / 86_400, abs=0.006)
    assert value(text, "images per second") == pytest.approx(4096 / seconds, rel=1e-3)
    cores = 4096 / seconds / (devices / 8) / 550
    assert cores <= value(text, "CPU cores per host") < cores + 1


def products(jaxpr):
    """FLOPs of the matrix products of a program without loops, but of those nobody reads."""
    total = 0
    read = [*jaxpr.outvars, *(v for equation in jaxpr.eqns for v in equation.invars)]
    read = {v for v in read if isinstance(v, Var)}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and read.intersection(equation.outvars):
            (axes, _), _ = equation.params["dimension_numbers"]
            terms = 1
            for axis in axes:
                terms *= equation.invars[0].aval.shape[axis]
            total += 2 * terms * equation.outvars[0].aval.size
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            total += products(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("classifier, remat", [
    ("token", "none"), ("gap", "none"), ("gap", "dots"), ("gap", "names"), ("gap", "full")])
def test_flops_are_those_of_the_gradient(classifier, remat):
    model = create_model("B/16", num_classes=7, patch_size=4, hidden_size=32, mlp_dim=48,
                         num_heads=2, num_layers=3, remat=remat, classifier=classifier)
    images = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False)["params"])
    gradient = jax.make_jaxpr(jax.grad(lambda params: jnp.sum(
        model.apply({"params": params}, images, train=True)[:, 0])))(params)
    summary = summarize(model, (8, 8))
    # Of the images nobody wants the gradient.
    embedding = next(row.flops for row in summary.rows if row.path == "embedding")
    expected = 3 * summary.needed_flops - embedding + recomputed_flops(summary, remat)
    assert products(gradient.jaxpr) == expected
    scanned = summarize(model.clone(scan_layers=True), (8, 8))
    assert recomputed_flops(scanned, remat) == recomputed_flops(summary, remat)


TINY = [f"--config={ROOT}/tests/tiny.py"]


def test_a_plan_that_does_not_fit(capsys):
    arguments = [RECIPE, "--device=l4", "--devices=8"]
    text = printed(capsys, *arguments)
    assert re.search(r"verdict +does not fit\n", text)
    flags = re.search(r"The smallest change that fits \(.* GiB\): (.*)", text)[1].split()
    assert flags == ["--config.accumulation_steps=2", "--config.mesh.fsdp=2",
                     "--config.model.remat=full"]
    text = printed(capsys, *arguments, *flags)
    assert re.search(r"verdict +fits\n", text) and "Nothing to change" in text


@pytest.mark.parametrize("total, changes, said", [
    (1, {}, "It fits. Nothing to change"),
    (1, dict(mesh__fsdp=4), "It fits. So does --config.mesh.fsdp=4 (2.0 GiB), the first"),
    (999, dict(mesh__fsdp=4, model__scan_layers=True, model__remat="full"),
     "The smallest change that fits (2.0 GiB): --config.mesh.fsdp=4 "
     "--config.model.remat=full --config.model.scan_layers=true"),
    (999, None, "No combination of fsdp, remat and accumulation_steps fits 8 x h200"),
])
def test_suggestion(total, changes, said):
    class Found:
        def smallest_that_fits(self, config, devices, limit):
            assert limit == 0.8 * named("h200").memory_bytes
            return changes if changes is None else (configure(**changes), memory(2))

    def memory(gibibytes):
        return Memory(gibibytes * GIB, 0, 0, 0, 0, 0, 0)

    text = suggestion(Found(), configure(), 8, named("h200"), memory(total))
    assert text.startswith(said)


def test_a_small_plan(capsys):
    text = printed(capsys, *TINY, "--device=L4", "--devices=4", "--config.ema_decay=0.9",
                   "--config.model.remat=full", "--images_per_core=3", "--devices_per_host=2")
    assert "4 x l4" in text and "mesh" in text and "data 4 x fsdp 1 x tensor 1 (jit)" in text
    assert "averaged parameters" in text
    assert "none for decoding: digits is made in memory" in text
    assert "on each of 2 hosts" in text
    assert "note: the peak of l4 is of bfloat16" in text
    assert "note: without config.model.scan_layers=true a compiler may undo remat" in text
    assert "an assumption (--mfu), not a prediction" in text


@pytest.mark.slow
def test_check_compiles_and_compares(capsys):
    text = printed(capsys, *TINY, "--device=l4", "--check")
    line = re.search(r"Check in float32 .* compiled for 8 simulated CPU devices: .* "
                     r"\(([+-]\d+\.\d)%\)\.\n", text)
    assert abs(float(line[1])) < 60  # of a model this small nearly all is odds and ends


def configure(**settings):
    config = base_config()
    config.total_steps = 10
    config.dtype = "bfloat16"
    for key, item in settings.items():
        set_value(config, key.replace("__", "."), item)
    return validate(config)


@pytest.mark.parametrize("settings, images_per_core, said", [
    ({}, None, "2 at 550 images/s each"),
    (dict(data__randaugment=(2, 15)), None, "3 at 431 images/s each"),  # 1 / (1/550 + 1/2000)
    ({}, 50, "20 at 50 images/s each (--images_per_core)"),
    (dict(data__source="synthetic"), None, "none for decoding: synthetic is made in memory"),
])
def test_input(settings, images_per_core, said):
    flags = argparse.Namespace(devices=12, devices_per_host=8, images_per_core=images_per_core)
    cost = Cost(0, 0, 0, 0, 0, images_per_second=2000, days=0)
    rows = dict(input_rows(configure(**(dict(data__source="folder:/x") | settings)), cost, flags))
    assert rows["on each of 2 hosts"] == "1,000"
    assert list(rows.values())[-1].startswith(said)


@pytest.mark.parametrize("device, settings, options, kernel, reason", [
    ("h100", {}, dict(classifier="gap"), "cudnn", ""),
    ("h100", {}, {}, "cudnn", ""),
    ("tpu-v4", {}, dict(classifier="gap"), "xla", "NVIDIA"),
    ("h100", dict(dtype="float32"), dict(classifier="gap"), "xla", "bfloat16"),
    ("h100", {}, dict(classifier="gap", attention_dropout_rate=0.1), "xla", "dropout"),
    ("h100", {}, dict(classifier="gap", position_embedding="relative"), "xla", "relative"),
    ("h100", {}, dict(classifier="gap", num_heads=2), "xla", "at most 128, not 192"),
    ("h100", dict(model__attention_implementation="xla"), dict(classifier="gap"), "xla", ""),
])
def test_attention_kernel(device, settings, options, kernel, reason):
    model = create_model("S/16", num_classes=10, **options)
    found, why = attention_kernel(configure(**settings), model, named(device))
    assert found == kernel and reason in why and bool(reason) == bool(why)


def test_attention_kernel_that_cannot_be():
    config = configure(model__attention_implementation="cudnn")
    with pytest.raises(UserError, match="'cudnn' cannot be used: cuDNN's kernel needs an NVIDIA"):
        attention_kernel(config, create_model("S/16", num_classes=10), named("tpu-v4"))


def test_data_size():
    digits, imagenet = configure(), configure(data__source="tfds:imagenet2012")
    nowhere = configure(data__source="folder:/none")
    assert data_size(digits, None, None) == (1437, 10)
    assert data_size(imagenet, None, None) == (1_281_167, 1000)
    assert data_size(imagenet, 7, None) == (7, 1000)
    assert data_size(nowhere, None, 3) == (None, 3)  # total_steps says how long
    with pytest.raises(UserError, match="say its size: --num_classes=K.$"):
        data_size(nowhere, 5, None)
    by_epochs = configure(data__source="folder:/none", total_steps=None, epochs=3)
    with pytest.raises(UserError, match="say its size: --images=N and --num_classes=K.$"):
        data_size(by_epochs, None, None)


@pytest.mark.parametrize("arguments, message", [
    ([], "required: --config"),
    (TINY, "--device=NAME is missing; there are a100-40gb"),
    ([*TINY, "--device=h200", "--config.total_steps=none", "--config.epochs=0.02",
      "--images=1000", "--num_classes=10", "--config.schedule.warmup_steps=50"],
     "warmup_steps=50 leaves no step of the"),
    ([*TINY, "--device=h200", "--devices=16", "--config.parallelism=pmap"],
     "16 devices are on several hosts of --devices_per_host=8"),
    ([*TINY, "--device=h201"], "did you mean 'h200'"),
    ([*TINY, "--device=h200", "--mfu=40"], "--mfu=40.0 is a share"),
    ([*TINY, "--device=h200", "--mfu=nan"], "--mfu=nan is a share"),
    ([*TINY, "--device=h200", "--images_per_core=nan"], "--images_per_core=nan must be a finite"),
    ([*TINY, "--device=h200", "--images_per_core=inf"], "=inf must be a finite number"),
    ([*TINY, "--device=h200", "--devices=0"], "--devices=0 must be a finite number of at least 1"),
    ([*TINY, "--device=h200", "--devices=3"], "batch_size=16 is not divisible by 3"),
    ([*TINY, "--device=h200", "--config.mesh.fsdp=3"], "does not fit 8 devices"),
    ([*TINY, "--device=h200", "--config.model.patch_size=3"], "nearest size that is: 9x9"),
    ([*TINY, "--device=h200", "--config.batchsize=3"], "did you mean 'batch_size'"),
    ([*TINY, "--devise=h200"], "did you mean --device"),
    ([*TINY, "--device=h200", "--config.data.source=tfds:unheard_of"], "--num_classes=K"),
], ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "")
def test_mistakes(arguments, message):
    with pytest.raises(UserError) as error:
        main(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_documented_example():
    """Prints what docs/plan.md shows; without an accelerator (JAX_PLATFORMS names one that is not
    there) and without arrays (the train state alone would be 7 GiB)."""
    document = (ROOT / "docs" / "plan.md").read_text()
    command, shown = re.search(
        r"```bash\npython (-m vit_jax.plan [^\n]*)\n```.*?```\n(.*?)\n```", document, re.S).groups()
    assert f"python {command}" in (ROOT / "README.md").read_text()
    # The kernel's record of a child's memory begins with its parent's, so it has to look itself.
    watched = ("import runpy, sys\nsys.argv[:] = sys.argv[2:]\n"
               "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
               "print(open('/proc/self/status').read(), file=sys.stderr)")
    run = subprocess.run([sys.executable, "-c", watched, *command.split()], cwd=ROOT,
                         env=os.environ | {"JAX_PLATFORMS": "tpu"}, capture_output=True, text=True,
                         check=False)
    assert run.returncode == 0 and run.stderr.startswith("Name:"), run.stderr
    lines = [[line.strip() for line in text.strip().splitlines()] for text in (run.stdout, shown)]
    assert lines[0] == lines[1]
    assert int(re.search(r"VmHWM:\s+(\d+) kB", run.stderr)[1]) < 3 * 2**20  # 3 GiB


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "The exit code is 0" in capsys.readouterr().out
