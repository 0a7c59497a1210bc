"""What a run will take before it is paid for: python -m vit_jax.plan --config=FILE.py[:ARGS]
--devices=N --device=NAME"""

import dataclasses
import math
import re

import jax
import ml_collections
from jax.sharding import AbstractMesh

from vit_jax import cli
from vit_jax import config as config_lib
from vit_jax.data.known import known_size
from vit_jax.data.sources import open_splits
from vit_jax.devices import DEVICES, Device, named, train_flops
from vit_jax.errors import UserError
from vit_jax.models.attention import cudnn_lacks
from vit_jax.models.summary import Summary, summarize
from vit_jax.models.vit import VisionTransformer
from vit_jax.training.memory import (
    Memory,
    Planner,
    compile_step,
    executable_bytes,
    has_loop,
    resolve_mesh,
)
from vit_jax.training.optimizer import make_schedule
from vit_jax.training.partition import batch_shards

# Of a device's memory, what may be planned: JAX is given 90 % of it (launch/env/gpu.sh), and
# compilers were found to need up to a tenth more than planned (docs/plan.md).
_SHARE = 0.8
_JAX_SHARE = 0.75  # of a GPU, where nothing else is said
# Images per second of one CPU core, measured as docs/plan.md says.
_DECODED_PER_CORE = 550
_RANDAUGMENTED_PER_CORE = 2000

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs and time, at an assumed MFU.

    Attributes:
      forward, train, hardware: FLOPs of one image; `hardware` counts what remat repeats.
      step_flops: training FLOPs of a batch.
      step_seconds: at the assumed MFU.
      images_per_second: over all devices.
      days: of all steps.
    """

    forward: float
    train: float
    hardware: float
    step_flops: float
    step_seconds: float
    images_per_second: float
    days: float


def main(arguments: list[str]) -> None:
    """Runs the command; see `--help`."""
    overrides, rest = cli.split_overrides(arguments)
    flags = _parser().parse(rest)
    if flags.device is None:
        raise UserError(f"--device=NAME is missing; there are "
                        f"{', '.join(device.name for device in DEVICES)}.")
    for flag in ("devices", "devices_per_host", "images", "num_classes", "images_per_core"):
        value = getattr(flags, flag)
        if value is not None and not 1 <= value < math.inf:  # nan neither
            raise UserError(f"--{flag}={value} must be a finite number of at least 1.")
    if not 0 < flags.mfu <= 1:
        raise UserError(f"--mfu={flags.mfu} is a share of the peak, above 0 and at most 1.")
    device = named(flags.device)
    config = cli.load_config(flags.config)
    cli.apply_overrides(config, overrides)
    config = config_lib.validate(config)

    jax.config.update("jax_platforms", "cpu")  # nothing is computed; accelerators stay untouched
    if flags.check and jax.config.jax_num_cpu_devices != flags.devices:
        jax.config.update("jax_num_cpu_devices", flags.devices)
    mesh = resolve_mesh(config, flags.devices)
    images, classes = data_size(config, flags.images, flags.num_classes)
    planner = Planner(config, classes)
    kernel, reason = attention_kernel(config, planner.model, device)
    planner.fused_attention = kernel == "cudnn"
    memory = planner.memory(config, mesh)
    summary = summarize(planner.model, config_lib.image_size(config))
    steps = config.total_steps or max(1, round(config.epochs * images / config.batch_size))
    make_schedule(config, steps)  # refuses what a run would
    if config.parallelism == "pmap" and flags.devices > flags.devices_per_host:
        raise UserError(
            f"config.parallelism='pmap' supports only one process, but {flags.devices} devices "
            f"are on several hosts of --devices_per_host={flags.devices_per_host}; use 'jit'.")
    cost = estimate_cost(config, summary, steps, flags.devices, device, flags.mfu)

    sections = [
        (f"{flags.config} on {flags.devices} x {device.name}", [
            ("model", f"{config.model.variant}, {summary.parameters:,} parameters, "
             f"{classes:,} classes"),
            *run_rows(config, mesh),
            *([("attention", kernel + (f" ({reason})" if reason else ""))] if kernel else []),
        ]),
        ("Memory of each device, GiB", memory_rows(memory, device)),
        ("Work", work_rows(config, cost, steps, images)),
        (f"Time, if MFU is {flags.mfu:g}: an assumption (--mfu), not a prediction", [
            ("step", f"{cost.step_seconds:.3g} s"),
            ("images per second", f"{cost.images_per_second:,.0f}"),
            ("all steps", f"{cost.days:,.2f} days, {cost.days * 24 * flags.devices:,.0f} "
             "device-hours"),
            ("", "(without evaluation, checkpoints and compilation)"),
        ]),
        ("Input pipeline at that speed", input_rows(config, cost, flags)),
    ]
    print(_format(sections))
    for note in [*planner.notes(config, mesh), *_notes(config, device, memory)]:
        print(f"note: {note}")
    print()
    print(suggestion(planner, config, flags.devices, device, memory))
    if flags.check:
        print(check(config, classes, flags.devices))


def _parser():
    parser = cli.ArgumentParser(
        prog="python -m vit_jax.plan",
        description="Says what a run will take: memory of each device and whether it fits, FLOPs, "
        "days, images per second and CPU cores. Computes shapes only and touches no accelerator. "
        "docs/plan.md says what each number means and how far the memory is off.",
        epilog="--config.KEY=VALUE changes the config, as in vit_jax.main. The exit code is 0 "
        "whenever the plan could be made, also if it does not fit.",
    )
    parser.add_argument("--config", metavar="FILE.py[:ARGS]", required=True, help="the recipe")
    parser.add_argument("--devices", metavar="N", type=int, default=8,
                        help="accelerators in all, as JAX counts them (8)")
    parser.add_argument("--device", metavar="NAME",
                        help=f"what they are: {', '.join(device.name for device in DEVICES)}")
    parser.add_argument("--mfu", metavar="SHARE", type=float, default=0.4,
                        help="model FLOPs utilisation to assume (0.4)")
    parser.add_argument("--images", metavar="N", type=int,
                        help="number of training images, if the data set cannot be read here")
    parser.add_argument("--num_classes", metavar="K", type=int,
                        help="number of classes, likewise")
    parser.add_argument("--devices_per_host", metavar="N", type=int, default=8, help="(8)")
    parser.add_argument("--images_per_core", metavar="RATE", type=float,
                        help="images that a CPU core decodes and augments in a second (measured: "
                        f"{_DECODED_PER_CORE}, less with RandAugment)")
    parser.add_argument("--check", action="store_true",
                        help="also compile the step for as many simulated CPU devices, and compare "
                        "with the memory that the compiler reports; takes a minute or more")
    return parser


def data_size(
    config: ml_collections.ConfigDict, images: int | None, classes: int | None
) -> tuple[int | None, int]:
    """(images, classes) of the training split: as given, else of the data set where it can be read
    here, else of a known public one. Images may be None if total_steps says how long to train.

    Raises:
      UserError: nothing says how many there are.
    """
    if classes and (images or config.total_steps):
        return images, classes
    data = config.data
    try:
        split, _ = open_splits(
            data.source, dir=data.dir, train_split=data.train_split, eval_split=data.eval_split,
            image_size=config_lib.image_size(config))
        found = len(split), len(split.class_names)
    except UserError as error:
        found = known_size(data.source, data.train_split or "train")
        if not found:
            missing = [flag for flag, value in (
                ("--images=N", images or config.total_steps), ("--num_classes=K", classes),
            ) if not value]
            raise UserError(
                f"{error} To plan without the data, say its size: {' and '.join(missing)}."
            ) from None
    return images or found[0], classes or found[1]


def attention_kernel(
    config: ml_collections.ConfigDict, model, device: Device
) -> tuple[str, str]:
    """(name, reason) of the attention kernel that training would use on such a device, as
    `vit_jax.models.attention.choose_implementation` finds it there; ('', '') without attention.

    Raises:
      UserError: the config asks for cuDNN's, which cannot be used.
    """
    if not isinstance(model, VisionTransformer):
        return "", ""
    requested = config.model.attention_implementation or "auto"
    if requested == "xla":
        return "xla", ""
    head_dim = model.hidden_size // model.num_heads
    reason = cudnn_lacks(config.dtype, head_dim, model.attention_dropout_rate,
                         model.position_embedding == "relative")
    if not device.is_nvidia:
        reason = "cuDNN's kernel needs an NVIDIA GPU"
    if reason and requested == "cudnn":
        raise UserError(f"config.model.attention_implementation='cudnn' cannot be used: {reason}; "
                        "use 'auto' or 'xla'.")
    return ("xla", reason) if reason else ("cudnn", "")


def recomputed_flops(summary: Summary, remat: str) -> int:
    """Forward FLOPs of one image that the backward pass computes a second time, with all tokens of
    the last block. A block's last product is never among them, since no gradient needs its result.
    """
    def flops(pattern):
        return sum(row.flops for row in summary.rows if re.search(pattern, row.path))

    blocks = flops(r"/encoderblock(_\d+)?$") - flops(r"/MlpBlock_0/Dense_1$")
    attention = flops(r"/MultiHeadDotProductAttention_0$")
    projections = flops(r"/MultiHeadDotProductAttention_0/(query|key|value|out)$")
    return {
        "none": 0,
        "dots": attention - projections,
        "names": attention - flops(r"/MultiHeadDotProductAttention_0/out$"),
        "full": blocks,
    }[remat]


def estimate_cost(
    config: ml_collections.ConfigDict, summary: Summary, steps: int, devices: int, device: Device,
    mfu: float,
) -> Cost:
    """FLOPs from the model, times from the assumed MFU of so many devices."""
    train = train_flops(summary.needed_flops)
    images_per_second = devices * device.bf16_flops * mfu / train
    step_seconds = config.batch_size / images_per_second
    return Cost(
        forward=summary.needed_flops,
        train=train,
        hardware=train + recomputed_flops(summary, config.model.remat or "none"),
        step_flops=config.batch_size * train,
        step_seconds=step_seconds,
        images_per_second=images_per_second,
        days=steps * step_seconds / 86_400,
    )


def run_rows(config: ml_collections.ConfigDict, mesh: AbstractMesh) -> list[tuple[str, str]]:
    """How the batch and the computation are laid out."""
    height, width = config_lib.image_size(config)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    parts = f" in {config.accumulation_steps} parts" if config.accumulation_steps > 1 else ""
    return [
        ("images", f"{height}x{width}, {config.batch_size:,} in a batch, "
         f"{config.batch_size // batch_shards(mesh):,} of them on a device{parts}"),
        ("mesh", f"{axes} ({config.parallelism})"),
        ("computation", f"{config.dtype}, remat {config.model.remat or 'none'}"
         + (", scan_layers" if has_loop(config) else "")),
    ]


def work_rows(
    config: ml_collections.ConfigDict, cost: Cost, steps: int, images: int | None
) -> list[tuple[str, str]]:
    """FLOPs and the length of the run."""
    epochs = ""
    if images:
        epochs = f" ({steps * config.batch_size / images:,.1f} epochs of {images:,} images)"
    return [
        ("forward pass of an image", _flops(cost.forward)),
        ("training on an image", _flops(cost.train)),
        *([("  with what remat repeats", _flops(cost.hardware))]
          if cost.hardware > cost.train else []),
        ("training step", _flops(cost.step_flops)),
        ("steps", f"{steps:,}{epochs}"),
    ]


def memory_rows(memory: Memory, device: Device) -> list[tuple[str, str]]:
    """The table of a device's memory, with the verdict."""
    rows = [
        ("parameters", memory.params),
        ("optimizer state", memory.optimizer),
        *([("averaged parameters", memory.ema)] if memory.ema else []),
        ("gradients", memory.gradients),
        ("activations kept", memory.kept),
        ("one block's backward pass", memory.working),
        ("images and labels", memory.batch),
        ("total", memory.total),
        (f"{_SHARE:.0%} of {device.name}'s {device.memory_bytes / _GIB:.1f}",
         _SHARE * device.memory_bytes),
    ]
    verdict = "fits" if _fits(memory, device) else "does not fit"
    return [*((label, f"{size / _GIB:8.3f}") for label, size in rows), ("verdict", verdict)]


def _fits(memory, device):
    return memory.total <= _SHARE * device.memory_bytes


def input_rows(config: ml_collections.ConfigDict, cost: Cost, flags) -> list[tuple[str, str]]:
    """What the hosts must supply."""
    hosts = math.ceil(flags.devices / flags.devices_per_host)
    per_host = cost.images_per_second / hosts
    rows = [("images per second", f"{cost.images_per_second:,.0f}"),
            (f"on each of {hosts:,} hosts" if hosts > 1 else "on its host", f"{per_host:,.0f}")]
    if config.data.source in ("digits", "synthetic"):
        return [*rows, ("CPU cores", f"none for decoding: {config.data.source} is made in memory")]
    rate, said = flags.images_per_core, "--images_per_core"
    if not rate:
        rate, said = _DECODED_PER_CORE, "500x375 JPEG, random crop to 224"
        if config.data.randaugment:
            rate = 1 / (1 / rate + 1 / _RANDAUGMENTED_PER_CORE)
            said += ", RandAugment"
    return [*rows, ("CPU cores per host", f"{math.ceil(per_host / rate):,} at {rate:,.0f} images/s "
                    f"each ({said})")]


def _notes(config, device, memory):
    if config.dtype != "bfloat16":
        yield (f"the peak of {device.name} is of bfloat16; with config.dtype={config.dtype} an MFU "
               "is much lower.")
    if (config.model.remat or "none") != "none" and not has_loop(config):
        yield ("without config.model.scan_layers=true a compiler may undo remat; it was found to "
               "take several times the activations above (docs/plan.md).")
    most = _JAX_SHARE * _SHARE / 0.9
    if device.is_nvidia and most < memory.total / device.memory_bytes <= _SHARE:
        yield ("JAX takes 75 % of a GPU unless XLA_CLIENT_MEM_FRACTION says otherwise; set it to "
               "0.9, as launch/env/gpu.sh does.")


def suggestion(
    planner: Planner, config: ml_collections.ConfigDict, devices: int, device: Device,
    memory: Memory,
) -> str:
    """The least accumulation, then remat, then fsdp that fits, as flags to add."""
    found = planner.smallest_that_fits(config, devices, _SHARE * device.memory_bytes)
    if found is None:
        return (f"No combination of fsdp, remat and accumulation_steps fits {devices} x "
                f"{device.name}. Use more or larger devices, a larger config.mesh.tensor, or a "
                "smaller config.batch_size.")
    other, needs = found
    was, now = config_lib.flatten(config), config_lib.flatten(other)
    flags = " ".join(
        f"--config.{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in now.items() if value != was[key])
    if not flags:
        return ("It fits. Nothing to change: accumulation, then remat, then fsdp are as small as "
                "possible.")
    if _fits(memory, device):
        return (f"It fits. So does {flags} ({needs.total / _GIB:.1f} GiB), the first that fits by "
                "accumulation, then remat, then fsdp.")
    return f"The smallest change that fits ({needs.total / _GIB:.1f} GiB): {flags}"


def check(config: ml_collections.ConfigDict, classes: int, devices: int) -> str:
    """Compares with what the compiler says of the step on simulated CPU devices. Both in float32,
    since a CPU has no bfloat16 products, and with scan_layers, without which it undoes remat."""
    config = config.copy_and_resolve_references()
    config.unlock()
    config.dtype, config.parallelism = "float32", "jit"
    planner = Planner(config, classes)
    if isinstance(planner.model, VisionTransformer):
        config.model.scan_layers, config.model.scan_unroll = True, False
        config.model.attention_implementation = "xla"
    planned = planner.memory(config, resolve_mesh(config, devices)).total
    found = executable_bytes(compile_step(config, classes, jax.devices("cpu")[:devices]))
    return (f"Check in float32 with scan_layers, compiled for {devices} simulated CPU devices: "
            f"the compiler takes {found / _GIB:.3f} GiB of each, the plan says "
            f"{planned / _GIB:.3f} GiB ({planned / found - 1:+.1%}).")


def _flops(number):
    factor, unit = next(
        ((factor, unit) for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"))
         if number >= factor), (1e6, "M"))
    return f"{number / factor:,.2f} {unit}FLOPs"


def _format(sections):
    width = max(len(label) for _, rows in sections for label, _ in rows)
    return "\n\n".join(
        "\n".join([title, *(f"  {label:<{width}}  {text}" for label, text in rows)])
        for title, rows in sections)


if __name__ == "__main__":
    cli.run_command(main)
