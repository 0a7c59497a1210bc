"""How fast it is here, and beside other libraries: python -m vit_jax.benchmark --what=train"""

import argparse
import contextlib
import fnmatch
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import ml_collections

from vit_jax import cli, devices
from vit_jax import config as config_lib
from vit_jax.benchmarking import capacity, models, pipelines, report
from vit_jax.benchmarking.peer import PEERS, Peer
from vit_jax.benchmarking.photos import Photos, make_photos
from vit_jax.benchmarking.profile import profile
from vit_jax.benchmarking.stall import checkpoint_stall
from vit_jax.benchmarking.startup import cold_and_warm
from vit_jax.benchmarking.timing import Timing, alternate, ratio
from vit_jax.checkpoints.targets import timm_name
from vit_jax.data.pipeline import available_cores
from vit_jax.errors import UserError
from vit_jax.models.variants import VARIANTS, canonical_name
from vit_jax.training.memory import executable_bytes

_MODELS = ("timm", "timm-compiled", "transformers")
_AGAINST = {"train": _MODELS, "infer": _MODELS, "input": ("tf.data", "torch-dataloader"),
            "checkpoint": (), "startup": ()}
_SECONDS, _MATMUL_SECONDS = 2.0, 0.3  # of a side in a round
# Config keys that a measurement follows; any other would be ignored, and is refused.
_MODEL = ("dtype", "mesh.*", "model.*", "data.image_size")
_TRAINING = (*_MODEL, "seed", "accumulation_steps", "ema_decay", "loss.*", "optimizer.*",
             "schedule.*", "total_steps", "data.mixup", "data.cutmix", "data.random_erasing")
_KEYS = {"train": _TRAINING, "infer": _MODEL, "checkpoint": _TRAINING, "startup": _TRAINING,
         "input": ("seed", "data.image_size", "data.workers", "data.worker_kind", "data.train_crop",
                   "data.crop_*", "data.scaled_decode", "data.flip", "data.randaugment",
                   "data.antialias", "data.interpolation", "data.max_pixels")}
# Those with which the work stays the same: other libraries follow them, but for the attention, the
# activation and the kind of workers, which they choose for themselves.
_SHARED_KEYS = dict.fromkeys(("train", "infer"), ("dtype", "data.image_size",
                             "model.attention_implementation", "model.activation")) | {
    "input": ("data.image_size", "data.workers", "data.worker_kind", "data.crop_area",
              "data.crop_aspect")}
LARGEST = "largest"  # --batch_sizes


def main(arguments: list[str]) -> None:
    """Runs the command; see `--help`."""
    overrides, rest = cli.split_overrides(arguments)
    flags = _parse(rest)
    against = flags.against.split(",") if flags.against else []
    variants, batch_sizes = _variants(flags), _batch_sizes(flags)
    _check(flags, overrides, against)
    flags.seconds = flags.seconds or _SECONDS
    if flags.what == "input":
        about, rows = _measure_input(flags, overrides, variants, batch_sizes, against)
    else:
        pieces = [(variant, batch_size) for variant in variants or ["S/16"]
                  for batch_size in batch_sizes]
        for variant, batch_size in pieces:  # mistakes before the first is measured
            _config(overrides, variant, None if batch_size == LARGEST else batch_size)
        if len(pieces) > 1:
            _each_by_itself(arguments, flags, pieces)
            return
        ((variant, batch_size),) = pieces
        measure = {"checkpoint": _measure_checkpoint, "startup": _measure_startup}.get(
            flags.what, _measure_largest if batch_size == LARGEST else _measure_model)
        try:
            about, rows = measure(flags, overrides, variant, batch_size, against)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"{variant} with --batch_sizes={batch_size} does not fit into this device's "
                f"memory; --batch_sizes={LARGEST} finds what does.") from error
    _report(flags, report.environment(arguments) | about, rows)


def _each_by_itself(arguments, flags, pieces):
    """Measures every (variant, batch size) in a process of its own, since JAX keeps what memory it
    had of a GPU; what is found is shown and written as it comes, whatever fails after it."""
    rows, about, failed = [], {}, []
    with tempfile.TemporaryDirectory() as folder:
        for variant, batch_size in pieces:
            run = subprocess.run(
                [sys.executable, "-m", __spec__.name, *arguments, f"--variants={variant}",
                 f"--batch_sizes={batch_size}", f"--out={folder}"],
                stdout=subprocess.DEVNULL, check=False)
            if run.returncode:
                failed.append(f"{variant} with {batch_size}")
                continue
            found = report.read(Path(folder))
            rows += found.pop("rows")
            profiles = about.get("profiles", []) + found.pop("profiles", [])
            about = found | {"command": report.command(arguments)} | (
                {"profiles": profiles} if profiles else {})
            print(report.format_table(rows), end="\n\n", file=sys.stderr, flush=True)
            if flags.out:
                _write(flags, about, rows)
    if rows:
        _report(flags, about, rows)
    if failed:
        raise UserError(f"{len(failed)} of {len(pieces)} measurements failed, as said above: "
                        f"{', '.join(failed)}.")


def _report(flags, about, rows):
    print(f"{about['devices']}; {about['cpu']}, {about['cores']} cores; "
          f"jax {about['packages']['jax']}; commit {about['commit']}")
    for key in ("matmul TFLOP/s", "photos", "cores used"):
        if key in about:
            print(f"{key}: {about[key]}")
    print(report.format_table(rows))
    if "profiles" in about:
        print("\nShares of a step's time (docs/performance.md)")
        print(report.format_table(about["profiles"]))
    if flags.out:
        _write(flags, about, rows)
        print(f"Wrote benchmark.json, .csv and .png to {flags.out}.")


def _write(flags, about, rows):
    with cli.writing_to(flags.out):
        report.write(flags.out, about, rows, _chart(flags))


def _chart(flags):
    """What the bars are; see `report.write`."""
    charts = {"input": ("side", "images/s"), "checkpoint": ("variant", "blocked ms"),
              "startup": ("variant cache", "total s")}
    if flags.batch_sizes == LARGEST:
        return "variant side", "largest batch"
    return charts.get(flags.what, ("variant batch side", "images/s"))


def _parse(arguments) -> argparse.Namespace:
    parser = cli.ArgumentParser(
        prog="python -m vit_jax.benchmark",
        description="Benchmarks this machine, and with --against also other libraries, alternately "
        "on the same workload in the same run.",
        epilog="--config.KEY=VALUE sets dtype, mesh, remat, ... as for vit_jax.main:\n"
        "  python -m vit_jax.benchmark --what=train --variants=S/16,B/16 --against=timm\n"
        "  python -m vit_jax.benchmark --what=train --variants=B/16 --batch_sizes=largest "
        "--config.dtype=bfloat16\n"
        "  python -m vit_jax.benchmark --what=input --images=/data/photos --against=tf.data",
    )
    parser.add_argument("--what", choices=_AGAINST, required=True,
                        help="training steps, inference, the input pipeline, asynchronous "
                        "checkpoints, or the time from the command to the first step")
    parser.add_argument("--variants", metavar="V[,V]", default="",
                        help="models (S/16); with --what=input, also trains them on the pipeline")
    parser.add_argument("--batch_sizes", metavar="N[,N]", default="16",
                        help="images per batch (16), or 'largest': as many as fit an accelerator")
    parser.add_argument("--against", metavar="PEER[,PEER]", default="",
                        help=", ".join(PEERS))
    parser.add_argument("--rounds", metavar="N", type=int, default=7,
                        help="how often each side is measured (7); the median counts")
    parser.add_argument("--seconds", metavar="S", type=float,
                        help=f"approximate time per side and round ({_SECONDS:g})")
    parser.add_argument("--profile", action="store_true",
                        help="also trace a step, and say which parts of the model take its time")
    parser.add_argument("--images", metavar="DIR", type=Path,
                        help="photos (JPEG) to decode; default: synthetic ones of 500x375")
    parser.add_argument("--peer_python", metavar="PATH", type=os.path.expanduser,
                        default=sys.executable,
                        help="a Python that has the other libraries; default: this one")
    parser.add_argument("--out", metavar="DIR", type=Path,
                        help="where to write JSON, CSV and a chart")
    flags = parser.parse(arguments)
    if flags.rounds < 1 or not (flags.seconds is None or 0 < flags.seconds < math.inf):
        raise UserError("--rounds must be at least 1 and --seconds more than 0.")
    return flags


def _variants(flags):
    try:
        return [canonical_name(name) for name in flags.variants.split(",") if flags.variants]
    except ValueError as error:
        raise UserError(f"--variants: {error}") from None


def _batch_sizes(flags):
    if flags.batch_sizes == LARGEST and flags.what in ("train", "infer"):
        return [LARGEST]
    sizes = flags.batch_sizes.split(",")
    for text in sizes:
        if not (text.isdecimal() and int(text)):
            alone = ", or just 'largest'" if flags.what in ("train", "infer") else ""
            raise UserError(f"--batch_sizes={flags.batch_sizes} must be numbers of images{alone}.")
    return [int(text) for text in sizes]


def _check(flags, overrides, against):
    """Refuses what would have no effect, could not be compared, or could not be written."""
    for name in against:
        if name not in _AGAINST[flags.what]:
            possible = ", ".join(_AGAINST[flags.what])
            raise UserError(f"--against={name} cannot be used with --what={flags.what}"
                            f"{f', only {possible}' if possible else ''}.")
    if flags.images and flags.what != "input":
        raise UserError("--images is for --what=input.")
    if flags.seconds and flags.what in ("checkpoint", "startup"):
        raise UserError(f"--seconds has no effect on --what={flags.what}; --rounds has.")
    if flags.profile and (flags.what not in ("train", "infer") or flags.batch_sizes == LARGEST):
        raise UserError("--profile is for --what=train and --what=infer of given --batch_sizes.")
    trains = flags.what == "input" and flags.variants
    followed = [(_KEYS[flags.what] + (_TRAINING if trains else ()), f"--what={flags.what}"),
                *((_SHARED_KEYS[flags.what], f"--against={name}") for name in against)]
    for key, text in overrides.items():
        config_lib.parse_value(key, text)  # refuses what is no key or no value
        if key in ("model.variant", "batch_size"):
            raise UserError(f"--config.{key} is what --variants and --batch_sizes are for.")
        for keys, who in followed:
            if not any(fnmatch.fnmatchcase(key, pattern) for pattern in keys):
                raise UserError(f"--config.{key} has no effect on {who}; leave it out. "
                                f"The keys that have an effect: {', '.join(keys)}.")
    if flags.out:  # now, so that nothing is measured in vain
        with cli.writing_to(flags.out):
            flags.out.mkdir(parents=True, exist_ok=True)


def _config(
    overrides: dict[str, str], variant: str | None, batch_size: int | None
) -> ml_collections.ConfigDict:
    """A run on noise with AdamW; what the command line says has the last word."""
    config = config_lib.base_config()
    settings = {"total_steps": 1000, "data.source": "synthetic", "optimizer.weight_decay": 0.1,
                "model.variant": variant, "batch_size": batch_size}
    for key, value in settings.items():
        if value is not None:
            config_lib.set_value(config, key, value)
    cli.apply_overrides(config, overrides)
    return config_lib.validate(config)


# --- Training and inference ------------------------------------------------------------------


def _measure_model(flags, overrides, variant, batch_size, against):
    config = _config(overrides, variant, batch_size)
    if against:
        # A GPU's memory is shared with the other process, so that none is taken ahead.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        _check_one_device(jax.default_backend(), len(jax.devices()))
    with contextlib.ExitStack() as stack:
        peers = {name: stack.enter_context(contextlib.closing(
            Peer(name, _task(flags.what, config, variant), flags.peer_python)))
            for name in against}
        work = models.BUILD[flags.what](config)
        for name, peer in peers.items():
            if peer.about["parameters"] != work.parameters:
                raise UserError(
                    f"--against={name} builds {variant} with {peer.about['parameters']:,} "
                    f"parameters, and here it has {work.parameters:,}; leave it out.")
        products = {" x ".join(map(str, shape)): models.matmul(shape, config.dtype)
                    for shape in models.matmul_shapes()}
        sides = {"vit_jax": work.run} | {name: peer.run for name, peer in peers.items()}
        timings = alternate(
            sides | {name: product.run for name, product in products.items()},
            rounds=flags.rounds,
            seconds=lambda side: flags.seconds if side in sides else _MATMUL_SECONDS)
    rates = {name: product.flops / timings[name].median / 1e12
             for name, product in products.items()}
    # Of every round the fastest product, since the machine's speed may change between rounds.
    ceiling = [max(products[name].flops / timings[name].rounds[i] for name in products)
               for i in range(flags.rounds)]
    device = devices.find(jax.devices()[0].device_kind)
    batch, ours, rows = config.batch_size, timings["vit_jax"], []
    for side in sides:
        timing = timings[side]
        of_image = work.whole_flops if side in peers else work.flops
        flops = of_image * batch / len(jax.devices())
        about = peers[side].about if side in peers else {
            "memory_bytes": executable_bytes(work.executable),
            "first_seconds": work.compile_seconds, "library": work.attention}
        memory = about.get("memory_bytes")
        rows.append({
            "variant": variant, "batch": batch, "dtype": config.dtype, "side": side,
            **_rates(timing, batch), "ms/step": 1e3 * timing.median,
            "of matmul": statistics.median(
                flops / seconds / rate
                for seconds, rate in zip(timing.rounds, ceiling, strict=True)),
            "MFU": flops / timing.median / device.bf16_flops if device else None,
            "GiB": memory / 2**30 if memory else None,
            "compile s": about["first_seconds"],
            "vit_jax is faster by": None if side == "vit_jax" else ratio(ours, timing),
            "library": about["library"],
        })
    about = {"matmul TFLOP/s": {shape: round(rate, 4) for shape, rate in rates.items()}}
    if flags.profile:
        about["profiles"] = [
            {"variant": variant, "batch": batch, "part": share.part, "%": 100 * share.total,
             "of it products": 100 * share.products} for share in _profile(work)]
    return about, rows


def _check_one_device(platform, number):
    if platform != "cpu" and number > 1:
        raise UserError("--against compares one device with one; show this process a single one "
                        "(CUDA_VISIBLE_DEVICES=0).")


def _profile(work):
    """After everything else, and without a claim on it: what fails here takes nothing away."""
    try:
        shares = profile(work.executable, work.call)
    except jax.errors.JaxRuntimeError as error:
        print(f"--profile failed: {error}", file=sys.stderr)
        return []
    if not shares:
        print("--profile: the trace names no operations. On a GPU that is CUPTI's work: is it "
              "installed, and may this user profile?", file=sys.stderr)
    return shares


def _rates(timing: Timing, images: int):
    return {"images/s": images / timing.median, "worst": images / timing.worst,
            "best": images / timing.best}


def _task(what, config, variant):
    """What a peer has to know; see `peers/torch_models.py`."""
    sizes = VARIANTS[variant][1]
    return {
        "what": what, "variant": variant, "batch_size": config.batch_size, "dtype": config.dtype,
        "image_size": config_lib.image_size(config), "num_classes": models.NUM_CLASSES,
        "timm": timm_name(variant), "hybrid": "patch_size" not in sizes or "+" in variant,
        "sizes": {key: sizes.get(key) for key in (
            "patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers")},
    }


def _measure_largest(flags, overrides, variant, _, against):
    platform, shards = capacity.devices()
    if platform == "cpu":
        raise UserError(f"--batch_sizes={LARGEST} needs an accelerator; a CPU's memory is shared "
                        "with other processes, so what fits is not well defined.")
    if against:
        _check_one_device(platform, shards)
    tries = {}

    def ours(number, cache):
        config = config_lib.to_json(_config(overrides, variant, shards * number))
        tries[number] = capacity.attempt(flags.what, json.dumps(config), cache)
        return tries[number].failure

    def peers(name, number):
        task = _task(flags.what, _config(overrides, variant, number), variant)
        try:
            Peer(name, task, flags.peer_python).close()
        except UserError as error:
            return str(error)
        return ""

    with tempfile.TemporaryDirectory() as cache:
        number = capacity.search("vit_jax", lambda number: ours(number, cache), shards)
    row = {"variant": variant, "dtype": _config(overrides, variant, shards).dtype}
    rows = [row | {"side": "vit_jax", "largest batch": shards * number,
                   "XLA recomputes": tries[number].recomputed if number else None}]
    for name in against:
        batch = capacity.search(name, lambda number: peers(name, number))  # noqa: B023
        rows.append(row | {"side": name, "largest batch": batch})
    return {}, rows


# --- Everything else -------------------------------------------------------------------------


def _measure_input(flags, overrides, variants, batch_sizes, against):
    rows, (batch_size, *others) = [], batch_sizes
    if others:
        raise UserError("--what=input measures one of --batch_sizes; run it again for another.")
    with contextlib.ExitStack() as stack:
        folder = flags.images or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not flags.images:
            make_photos(folder)
        photos = Photos(folder)
        config = _config(overrides, None, batch_size)
        workers = available_cores() if config.data.workers is None else config.data.workers
        cores = min(max(1, workers), available_cores())
        task = {"paths": photos.paths, "batch_size": batch_size, "workers": max(1, workers),
                "image_size": config_lib.image_size(config), "area": config.data.crop_area,
                "aspect": config.data.crop_aspect}
        peers = {name: stack.enter_context(contextlib.closing(
            Peer(name, task, flags.peer_python))) for name in against}
        decode = stack.enter_context(pipelines.decoding(config, photos))
        sides = {"vit_jax": decode} | {name: peer.run for name, peer in peers.items()}
        timings = alternate(sides, rounds=flags.rounds, seconds=lambda _: flags.seconds)
        for side, timing in timings.items():
            rows.append({
                "side": side, **_rates(timing, batch_size),
                "images/s/core": batch_size / timing.median / cores,
                "vit_jax is faster by": None if side == "vit_jax" else ratio(
                    timings["vit_jax"], timing),
                "library": peers[side].about["library"] if side in peers else "",
            })
        for variant in variants:
            config = _config(overrides, variant, batch_size)
            with pipelines.fed_training(config, photos) as (fed, synthetic):
                timings = alternate({"fed": fed, "memory": synthetic}, rounds=flags.rounds,
                                    seconds=lambda _: flags.seconds)
            rows += [{"side": f"training {variant} from {source}", **_rates(timing, batch_size),
                      "of training from memory": None if name == "memory" else ratio(
                          timing, timings["memory"])}
                     for (name, timing), source in zip(
                         timings.items(), ("these photos", "memory"), strict=True)]
    return {"photos": f"{len(photos.paths):,} of {flags.images or '500x375 (made)'}",
            "cores used": cores}, rows


def _measure_checkpoint(flags, overrides, variant, batch_size, _):
    found = checkpoint_stall(
        _config(overrides, variant, batch_size), saves=flags.rounds, steps=3)
    slower = found.step_while_writing and found.step_while_writing / found.step
    return {}, [{
        "variant": variant, "batch": batch_size, "GiB": found.bytes / 2**30,
        "ms/step": 1e3 * found.step, "blocked ms": 1e3 * found.blocked,
        "blocked steps": found.blocked / found.step, "written s": found.written,
        "step while writing": slower,
    }]


def _measure_startup(flags, overrides, variant, batch_size, _):
    config = json.dumps(config_lib.to_json(_config(overrides, variant, batch_size)))
    return {}, [{
        "variant": variant, "cache": cache, "imports s": found.imports, "state s": found.state,
        "compile s": found.compile, "first step s": found.first_step, "total s": found.total,
    } for cache, found in zip(("cold", "warm"), cold_and_warm(config, flags.rounds), strict=True)]


if __name__ == "__main__":
    cli.run_command(main)
