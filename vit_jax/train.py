"""A training run, from the config to the report."""

import contextlib
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vit_jax import config as config_lib
from vit_jax.checkpoints.load import fit, read
from vit_jax.cli import Stopped
from vit_jax.data.pipeline import BadImages, train_batches
from vit_jax.data.sources import open_splits
from vit_jax.devices import find as find_device
from vit_jax.errors import UserError
from vit_jax.evaluate import make_evaluator, pixel_statistics
from vit_jax.models.shapes import params_shapes
from vit_jax.models.summary import format_summary, summarize
from vit_jax.models.vit import VisionTransformer
from vit_jax.probes.evaluator import make_probes
from vit_jax.training import distributed, parallel, partition
from vit_jax.training import workdir as workdir_lib
from vit_jax.training.checkpoint import BEST, Checkpoints, check_same_data, describe_run
from vit_jax.training.metrics import MetricsLog, Progress
from vit_jax.training.optimizer import make_optimizer, make_schedule
from vit_jax.training.profile import ProfileWindow
from vit_jax.training.state import (
    build_model,
    fields_from_json,
    group_blocks,
    make_init,
    state_shapes,
)
from vit_jax.training.step import make_train_step
from vit_jax.training.stop import StopSignal
from vit_jax.training.task import make_task_loss

_STEPS_IN_FLIGHT = 2  # how far Python may run ahead of the devices
_BAD_FROM_THE_START = 64  # images, all of which would be too many to go on
_OTHER_DRAWS = (
    "from here on, dropout, stochastic depth, mixup, CutMix, random erasing and corrupted patches, "
    "where used, differ from those of an uninterrupted run: with parallelism='pmap' each device "
    "draws its own random numbers.")


def train(config: ml_collections.ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Trains to the end, resuming from the last checkpoint of the workdir if there is one.

    Raises:
      UserError: something the user can fix; earlier checkpoints are kept.
      Stopped: `stop` was requested; the state was saved.
    """
    with contextlib.ExitStack() as held:
        _train(config, workdir, stop, held)


def _train(config, workdir, stop, held):
    """`held` is an ExitStack that is closed when the run ends, whatever the reason."""
    # Data.
    size = config_lib.image_size(config)
    train_source, eval_source = open_splits(
        config.data.source, dir=config.data.dir, train_split=config.data.train_split,
        eval_split=config.data.eval_split, image_size=size)
    classes = train_source.class_names
    total_steps = config.total_steps or max(
        1, round(config.epochs * len(train_source) / config.batch_size))
    bad_images = BadImages(config.data.on_bad_image)

    # Devices, model, optimizer.
    mesh = partition.make_mesh(config)
    parallel.check_devices(config, mesh)
    stored = _last_meta(workdir)
    if stored:  # before the stored model is used: in the workdir of another run it is another one
        workdir_lib.check_same_run(config, stored["config"], workdir)
    start, fields, told = _start(config, stored)
    pixels = pixel_statistics(config, told)
    plain = build_model(config, len(classes), size, fields)
    model = group_blocks(plain, config, mesh)
    reset = config.init_head == "reset"
    start_params = fit(start, model, size, config, classes, reset) if start else None
    schedule = make_schedule(config, total_steps)
    optimizer = make_optimizer(config, schedule, params_shapes(model, size))
    ema = config.ema_decay is not None
    init = make_init(model, optimizer, size, config.seed, ema=ema)
    shapes = state_shapes(model, optimizer, size, ema=ema)
    shardings, notes = partition.state_shardings(shapes, mesh)

    # A new run, or one to continue.
    changes = workdir_lib.claim(workdir, config)
    held.enter_context(workdir_lib.alone(workdir))
    summary = summarize(plain, size)
    print(format_summary(summary))
    for line in describe(config, mesh, model, train_source, eval_source, total_steps):
        print(line)
    meta = describe_run(config, plain, pixels, classes, train_source)
    meta["drawn_apart"] = parallel.drawn_apart(config, mesh)
    notes += [f"changed since this run began: {change}" for change in changes]
    if stored and stored.get("drawn_apart", meta["drawn_apart"]) != meta["drawn_apart"]:
        notes.append(_OTHER_DRAWS)
    for line in notes:
        print(f"note: {line}")
    checkpoints = Checkpoints(workdir / "checkpoints")
    first_step = checkpoints.last_step or 0
    distributed.check_agreement({
        "config": config_lib.to_json(config), "last checkpoint": first_step,
        "training set": (len(train_source), classes, meta["train_identity"])})
    if first_step > total_steps:
        raise UserError(f"{workdir} is at step {first_step}, beyond the {total_steps} steps asked "
                        "for; raise config.total_steps or use another --workdir.")
    if first_step:
        check_same_data(meta, stored)
        state = checkpoints.restore(first_step, shapes, shardings)
        print(f"Continuing from step {first_step}.", flush=True)
    else:
        state = jax.jit(init, out_shardings=shardings)()
        if start:
            state = state.replace(params=jax.device_put(start_params, shardings.params))
            if ema:
                state = state.replace(ema_params=jax.device_put(start_params, shardings.params))
            print(start.report)
    del start_params
    workdir_lib.renew(workdir, config)

    loss_sum = make_task_loss(model, config, pixels)
    train_step = parallel.compile_train_step(
        lambda axis_name: make_train_step(
            loss_sum, optimizer, schedule, config, axis_name=axis_name),
        config, mesh, shardings)
    evaluate = make_evaluator(model, config, mesh, eval_source, bad_images, pixels)
    probe = None
    if config.probes.every:
        probe = make_probes(
            getattr(model, "backbone", model), config, mesh,
            *_probe_sources(config, size, train_source, eval_source), bad_images, pixels,
            names=config.probes.names, shots=config.probes.shots)
    batches = train_batches(
        train_source, config, size, bad_images, first_step=first_step,
        rows=parallel.process_rows(mesh, config.batch_size))
    log = MetricsLog(workdir, first_step, active=distributed.is_main())
    progress = Progress(
        first_step, total_steps, config.batch_size, mesh.size, summary.needed_flops,
        find_device(mesh.devices.flat[0].device_kind))
    profile = ProfileWindow(
        config.profile_steps if distributed.is_main() else None, workdir / "profile")
    unchecked = []  # (step, metrics) whose loss nobody has looked at yet
    best = checkpoints.best_metric
    saved_step = first_step
    evaluation, usable = None, False

    all_finite = jax.jit(
        lambda params: jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)])),
        out_shardings=partition.replicated(mesh))

    def save(step, scalars=None):
        check_finite(unchecked, workdir, checkpoints)
        if not all_finite(state.params):
            raise UserError(_not_finite("weights", "nan or inf", step, workdir, checkpoints))
        checkpoints.save(step, state, meta, scalars)

    def probes_due(step):
        return probe and (step == total_steps or step % config.probes.every == 0)

    def run_probes(step):
        with progress.paused():
            probed = probe(state.params).scalars()
        log.write(step, probed)
        progress.say("  ".join(f"{key} {value:.4f}" for key, value in probed.items()))

    # The loop. Everything due after a step happens in this order: log, evaluate, save, probe, stop.
    # Probes come after the save, because they may take longer than the time until a kill.
    try:
        if signal := stop.check(first_step + 1):  # asked here, since there may be no step left
            raise Stopped(signal, first_step)
        if first_step and probes_due(first_step) and distributed.total(
                not log.has(first_step, "probe/")):
            run_probes(first_step)
        metrics, compiled = {}, {}
        for step in range(first_step + 1, total_steps + 1):
            if signal := stop.check(step):
                if saved_step != step - 1:
                    save(step - 1)
                checkpoints.wait()
                raise Stopped(signal, step - 1)
            profile.before(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                with progress.waiting(metrics):
                    batch = next(batches)
                usable = usable or batch["mask"].any()
                if not usable and (step == total_steps or bad_images.count >= _BAD_FROM_THE_START):
                    raise UserError(
                        f"{train_source.name}: none of the first {bad_images.count} images could "
                        f"be decoded; the last was {bad_images.last}. Replace these files.")
                begin = time.perf_counter()
                state, metrics = train_step(state, batch)
            unchecked.append((step, metrics))
            compiled |= progress.step_done(step, metrics, time.perf_counter() - begin)
            jax.block_until_ready(unchecked[-_STEPS_IN_FLIGHT:][0])
            profile.after(step, metrics)
            last = step == total_steps

            if last or step % config.log_every == 0:
                check_finite(unchecked, workdir, checkpoints)
                scalars = {f"train/{key}": float(value) for key, value in metrics.items()}
                log.write(step, scalars | compiled | progress.show(step, scalars))
                compiled = {}

            scalars = None
            if last or (config.eval_every and step % config.eval_every == 0):
                with progress.paused():
                    evaluation = evaluate(state.params)
                    scalars = evaluation.scalars()
                    averaged = evaluate(state.ema_params) if state.ema_params else None
                log.write(step, scalars | (averaged.scalars("eval_ema") if averaged else {}))
                progress.say(f"step {step}/{total_steps}  {evaluation}")
                if averaged:
                    progress.say(f"EMA weights  {averaged}")

            is_best = scalars is not None and scalars[BEST] > best
            due = config.checkpoint_every and step % config.checkpoint_every == 0
            if last or is_best or due:
                with progress.paused():
                    save(step, scalars)
                saved_step = step
                best = scalars[BEST] if is_best else best

            if probes_due(step):
                run_probes(step)
        checkpoints.wait()
        if evaluation is None:  # no step was left
            evaluation = evaluate(state.params)
            averaged = evaluate(state.ema_params) if state.ema_params else None
            if not log.has(first_step, BEST):  # nor had the last one been evaluated
                log.write(first_step, evaluation.scalars()
                          | (averaged.scalars("eval_ema") if averaged else {}))
    finally:
        profile.close()
        progress.close()
        batches.close()
        log.close()
        checkpoints.close()

    # The report.
    if skipped := distributed.distinct(bad_images.origins):
        print(f"{skipped} images could not be decoded and were skipped.")
    if distributed.is_main():
        from vit_jax.report import write_report  # matplotlib takes half a second of a start

        folder = write_report(workdir, evaluation, classes, train_source.labels())
        of_best = f" (best checkpoint: {best:.4f})" if best >= 0 else ""
        print(f"Finished {total_steps} steps; accuracy {evaluation.accuracy:.4f}{of_best}. "
              f"Figures are in {folder}, checkpoints and metrics beside it.")
    print(evaluation.final_line(), flush=True)


def _last_meta(workdir):
    """`describe_run` of the checkpoint that a run goes on from; None for a new one."""
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        return None
    with contextlib.closing(Checkpoints(directory, writable=False)) as checkpoints:
        step = checkpoints.last_step
        return None if step is None else checkpoints.meta(step)


def _start(config, stored):
    """(contents of config.init, the fields of its model, its preprocessing); (None, None, {})
    without config.init. A resumed run has None first and takes the others from its own checkpoint
    (`stored`), because config.init may no longer exist."""
    if not config.init:
        return None, None, {}
    if stored:
        return None, fields_from_json(stored["model"]), stored["preprocessing"]
    start = read(config.init, num_heads=config.model.num_heads)
    return start, start.fields, start.preprocessing


def _probe_sources(config, size, train_source, eval_source):
    """(training, evaluation) data of the probes: the run's own, or that of probes.source."""
    if config.probes.source is None:
        return train_source, eval_source
    return open_splits(config.probes.source, dir=config.data.dir, train_split=None,
                       eval_split=None, image_size=size)


def check_finite(unchecked: list, workdir: Path, checkpoints: Checkpoints) -> None:
    """Empties the list of (step, metrics), or raises UserError at the first loss or gradient norm
    that is not finite: the checkpoint on disk is then the last good one."""
    for step, metrics in jax.device_get(unchecked):
        for name in ("loss", "grad_norm"):
            if not np.isfinite(metrics[name]):
                raise UserError(_not_finite(name.replace("grad_norm", "gradient norm"),
                                            metrics[name], step, workdir, checkpoints))
    unchecked.clear()


def _not_finite(what, value, step, workdir, checkpoints):
    saved = checkpoints.last_step
    kept = f"the checkpoint of step {saved} in {workdir} is kept" if saved else (
        "no checkpoint had been written")
    return (f"The {what} became {value} at step {step}; {kept}. Lower "
            "config.optimizer.learning_rate, lengthen config.schedule.warmup_steps or set "
            "config.optimizer.clip_norm, in a new --workdir.")


def describe(config, mesh, model, train_source, eval_source, total_steps) -> list[str]:
    """What a person should see before any time is spent: devices, data, length."""
    device = mesh.devices.flat[0]
    names = train_source.class_names
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    attention = []
    if isinstance(model, VisionTransformer) and device.platform == "gpu":  # elsewhere no choice
        kernel, reason = model.attention_kernel(config_lib.image_size(config), train=True)
        attention = [f"Attention {kernel}" + (f" ({reason})" if reason else "")]
    return [
        f"Devices   {mesh.size} {device.device_kind} ({jax.process_count()} process), mesh {axes}, "
        f"{config.parallelism}, {config.dtype}",
        *attention,
        f"Training  {train_source.name}: {len(train_source):,} images, "
        f"{total_steps:,} steps of {config.batch_size} "
        f"({total_steps * config.batch_size / len(train_source):.1f} epochs)",
        f"Testing   {eval_source.name}: {len(eval_source):,} images",
        f"Classes   {len(names)}: {shown}",
    ]
