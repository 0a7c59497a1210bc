"""A training run, from the config to the report."""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vit_jax import config as config_lib
from vit_jax.checkpoints.load import fit, read
from vit_jax.cli import Stopped
from vit_jax.data.pipeline import BadImages, train_batches
from vit_jax.data.sources import Source, open_splits
from vit_jax.devices import find as find_device
from vit_jax.errors import UserError
from vit_jax.evaluate import make_evaluator, pixel_statistics
from vit_jax.models.summary import Summary, format_summary, summarize
from vit_jax.models.vit import VisionTransformer
from vit_jax.probes.evaluator import make_probes
from vit_jax.training import distributed, parallel, partition
from vit_jax.training import workdir as workdir_lib
from vit_jax.training.checkpoint import BEST, Checkpoints, check_same_data, describe_run
from vit_jax.training.metrics import MetricsLog, Progress
from vit_jax.training.profile import ProfileWindow
from vit_jax.training.program import Program
from vit_jax.training.state import build_model, fields_from_json
from vit_jax.training.step import Pixels
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
    run, start = _prepare(config, workdir)
    changes = workdir_lib.claim(workdir, config)
    with workdir_lib.alone(workdir):
        print(format_summary(run.summary))
        for line in _describe(run):
            print(line)
        meta = _meta(run)
        for line in _notes(run, meta, changes):
            print(f"note: {line}")
        checkpoints = Checkpoints(workdir / "checkpoints")
        state = _first_state(run, start, meta, checkpoints)
        workdir_lib.renew(workdir, config)
        loop = _Loop(run, meta, checkpoints, state)
        del start, state  # or their memory would be held until the end
        _report(run, loop.steps(stop), loop)


# --- Before the first step -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Run:
    """What is to be trained, known before anything is computed or written.

    Attributes:
      size: (height, width) of the images.
      plain: the model as checkpoints describe it; `program` has it as it is trained.
      pixels: mean and standard deviation of the images.
      stored: `meta` of the checkpoint that the run goes on from; None for a new run.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    size: tuple[int, int]
    train_source: Source
    eval_source: Source
    total_steps: int
    plain: nn.Module
    program: Program
    summary: Summary
    pixels: Pixels
    stored: dict[str, Any] | None


def _prepare(config, workdir):
    """(_Run, start): (parameters, report) of config.init for a new run that has one, else None."""
    size = config_lib.image_size(config)
    train_source, eval_source = open_splits(
        config.data.source, dir=config.data.dir, train_split=config.data.train_split,
        eval_split=config.data.eval_split, image_size=size)
    classes = train_source.class_names
    total_steps = config.total_steps or max(
        1, round(config.epochs * len(train_source) / config.batch_size))
    mesh = partition.make_mesh(config)
    parallel.check_devices(config, mesh)
    stored = _last_meta(workdir)
    if stored:  # before the stored model is used: in the workdir of another run it is another one
        workdir_lib.check_same_run(config, stored["config"], workdir)
    contents, fields, told = _start(config, stored)
    pixels = pixel_statistics(config, told)
    plain = build_model(config, len(classes), size, fields)
    program = Program.of(config, plain, mesh, total_steps)
    start, reset = None, config.init_head == "reset"
    if contents:
        start = fit(contents, program.model, size, config, classes, reset), contents.report
    return _Run(config, workdir, size, train_source, eval_source, total_steps, plain, program,
                summarize(plain, size), pixels, stored), start


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


def _describe(run):
    """What a person should see before any time is spent: devices, data, length."""
    config, mesh, model = run.config, run.program.mesh, run.program.model
    device, names, images = (
        mesh.devices.flat[0], run.train_source.class_names, len(run.train_source))
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    attention = []
    if isinstance(model, VisionTransformer) and device.platform == "gpu":  # elsewhere no choice
        kernel, reason = model.attention_kernel(run.size, train=True)
        attention = [f"Attention {kernel}" + (f" ({reason})" if reason else "")]
    return [
        f"Devices   {mesh.size} {device.device_kind}"
        + (f" of {processes} processes" if (processes := jax.process_count()) > 1 else "")
        + f", mesh {axes}, {config.parallelism}, {config.dtype}",
        *attention,
        f"Training  {run.train_source.name}: {images:,} images, "
        f"{run.total_steps:,} steps of {config.batch_size} "
        f"({run.total_steps * config.batch_size / images:.1f} epochs)",
        f"Testing   {run.eval_source.name}: {len(run.eval_source):,} images",
        f"Classes   {len(names)}: {shown}",
    ]


def _meta(run):
    """What the run's checkpoints say of themselves."""
    meta = describe_run(
        run.config, run.plain, run.pixels, run.train_source.class_names, run.train_source)
    return meta | {"drawn_apart": parallel.drawn_apart(run.config, run.program.mesh)}


def _notes(run, meta, changes):
    """What is not quite as asked for, or not as it was; `changes` are those of the config."""
    notes = run.program.notes + [f"changed since this run began: {change}" for change in changes]
    if run.stored and run.stored.get("drawn_apart", meta["drawn_apart"]) != meta["drawn_apart"]:
        notes.append(_OTHER_DRAWS)
    return notes


def _first_state(run, start, meta, checkpoints):
    """The state of the last checkpoint, or a new one, with the parameters of `start` if given."""
    step, program = checkpoints.last_step or 0, run.program
    distributed.check_agreement({
        "config": config_lib.to_json(run.config), "last checkpoint": step,
        "training set": (len(run.train_source), run.train_source.class_names,
                         meta["train_identity"])})
    if step > run.total_steps:
        raise UserError(f"{run.workdir} is at step {step}, beyond the {run.total_steps} steps "
                        "asked for; raise config.total_steps or use another --workdir.")
    if step:
        check_same_data(meta, run.stored)
        state = checkpoints.restore(step, program.shapes, program.shardings)
        print(f"Continuing from step {step}.", flush=True)
        return state
    state = program.initial_state()
    if start:
        params, report = start
        state = state.replace(params=jax.device_put(params, program.shardings.params))
        if run.config.ema_decay is not None:  # arrays of its own, as the step takes over both
            state = state.replace(ema_params=jax.device_put(params, program.shardings.params))
        print(report)
    return state


# --- The steps -------------------------------------------------------------------------------


class _Loop:
    """The steps of a run, with all that is due between them.

    Attributes:
      state: the train state after the last step.
      best: accuracy of the best checkpoint; negative while none was evaluated.
      bad_images: those that could not be decoded.
    """

    def __init__(self, run, meta, checkpoints, state):
        """`state` is that of the last of the checkpoints, which all will have this `meta`."""
        config, program, pixels = run.config, run.program, run.pixels
        mesh, model = program.mesh, program.model
        self.state, self.best = state, checkpoints.best_metric
        self.bad_images = BadImages(config.data.on_bad_image)
        self._run, self._config, self._meta = run, config, meta
        self._checkpoints = checkpoints
        self._first_step = self._saved_step = checkpoints.last_step or 0
        loss_sum = make_task_loss(model, config, pixels)
        self._train_step = parallel.compile_train_step(
            lambda axis_name: program.step(loss_sum, axis_name), config, mesh, program.shardings)
        self._evaluate_params = make_evaluator(
            model, config, mesh, run.eval_source, self.bad_images, pixels)
        self._probe_params = None
        if config.probes.every:
            self._probe_params = make_probes(
                getattr(model, "backbone", model), config, mesh, *_probe_sources(run),
                self.bad_images, pixels, names=config.probes.names, shots=config.probes.shots)
        self._batches = train_batches(
            run.train_source, config, run.size, self.bad_images, first_step=self._first_step,
            rows=parallel.process_rows(mesh, config.batch_size))
        self._log = MetricsLog(run.workdir, self._first_step, active=distributed.is_main())
        self._progress = Progress(
            self._first_step, run.total_steps, config.batch_size, mesh.size,
            run.summary.needed_flops, find_device(mesh.devices.flat[0].device_kind))
        self._profile = ProfileWindow(
            config.profile_steps if distributed.is_main() else None, run.workdir / "profile")
        self._all_finite = jax.jit(
            lambda params: jnp.all(jnp.stack(
                [jnp.isfinite(x).all() for x in jax.tree.leaves(params)])),
            out_shardings=partition.replicated(mesh))
        self._metrics = {}  # of the last step
        self._unchecked = []  # (step, metrics) whose loss nobody has looked at yet
        self._compiled = {}  # the time it took, until it is logged
        self._usable = False  # whether an image could be decoded

    def steps(self, stop):
        """Takes those that are left, and returns the scores of the last state.

        What is due after a step happens in this order: log, evaluate, save, probe, stop. Probes
        come after the save, because they may take longer than the time until a kill.
        """
        config, total, scores = self._config, self._run.total_steps, []
        try:
            if signal := stop.check(self._first_step + 1):  # here, since no step may be left
                raise Stopped(signal, self._first_step)
            self._make_up_for_probes()
            for step in range(self._first_step + 1, total + 1):
                if signal := stop.check(step):
                    if self._saved_step != step - 1:
                        self._save(step - 1)
                    self._checkpoints.wait()
                    raise Stopped(signal, step - 1)
                self._train(step)
                last, scalars = step == total, None
                if last or step % config.log_every == 0:
                    self._log_step(step)
                if last or _is_due(config.eval_every, step):
                    scores = self._evaluate()
                    scalars = scores[0].scalars()
                    self._log_scores(step, scores)
                    self._show_scores(step, scores)
                is_best = scalars is not None and scalars[BEST] > self.best
                if last or is_best or _is_due(config.checkpoint_every, step):
                    with self._progress.paused():
                        self._save(step, scalars)
                    self.best = scalars[BEST] if is_best else self.best
                if last or _is_due(config.probes.every, step):
                    self._probe(step)
            self._checkpoints.wait()
            if not scores:  # no step was left
                scores = self._evaluate()
                if not self._log.has(self._first_step, BEST):  # nor had the last been evaluated
                    self._log_scores(self._first_step, scores)
        finally:
            for part in (
                    self._profile, self._progress, self._batches, self._log, self._checkpoints):
                part.close()
        return scores[0]

    def _train(self, step):
        self._profile.before(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            with self._progress.waiting(self._metrics):
                batch = next(self._batches)
            self._check_images(step, batch)
            begin = time.perf_counter()
            self.state, self._metrics = self._train_step(self.state, batch)
        seconds = time.perf_counter() - begin
        self._unchecked.append((step, self._metrics))
        self._compiled |= self._progress.step_done(step, self._metrics, seconds)
        jax.block_until_ready(self._unchecked[-_STEPS_IN_FLIGHT:][0])
        self._profile.after(step, self._metrics)

    def _check_images(self, step, batch):
        """Raises UserError if not one image could be decoded so far."""
        self._usable = self._usable or batch["mask"].any()
        bad, last = self.bad_images, step == self._run.total_steps
        if not self._usable and (last or bad.count >= _BAD_FROM_THE_START):
            raise UserError(
                f"{self._run.train_source.name}: none of the first {bad.count} images could be "
                f"decoded; the last was {bad.last}. Replace these files.")

    def _log_step(self, step):
        self._check_finite()
        scalars = {f"train/{key}": float(value) for key, value in self._metrics.items()}
        self._log.write(step, scalars | self._compiled | self._progress.show(step, scalars))
        self._compiled = {}

    def _evaluate(self):
        """[scores of the parameters, and of their averages where there are some]."""
        with self._progress.paused():
            return [self._evaluate_params(params)
                    for params in (self.state.params, self.state.ema_params) if params]

    def _log_scores(self, step, scores):
        self._log.write(step, {
            key: value for prefix, each in zip(("eval", "eval_ema"), scores, strict=False)
            for key, value in each.scalars(prefix).items()})

    def _show_scores(self, step, scores):
        titles = f"step {step}/{self._run.total_steps}", "EMA weights"
        for title, each in zip(titles, scores, strict=False):
            self._progress.say(f"{title}  {each}")

    def _save(self, step, scalars=None):
        self._check_finite()
        if not self._all_finite(self.state.params):
            raise self._not_finite("weights", "nan or inf", step)
        self._checkpoints.save(step, self.state, self._meta, scalars)
        self._saved_step = step

    def _probe(self, step):
        if not self._probe_params:
            return
        with self._progress.paused():
            probed = self._probe_params(self.state.params).scalars()
        self._log.write(step, probed)
        self._progress.say("  ".join(f"{key} {value:.4f}" for key, value in probed.items()))

    def _make_up_for_probes(self):
        """Of the checkpoint, if they were due and a kill came before their end."""
        step, every = self._first_step, self._config.probes.every
        due = step and every and (step == self._run.total_steps or _is_due(every, step))
        if due and distributed.total(not self._log.has(step, "probe/")):
            self._probe(step)

    def _check_finite(self):
        """Raises UserError at the first loss or gradient norm since the last check that is not
        finite: the checkpoint on disk is then the last good one."""
        for step, metrics in jax.device_get(self._unchecked):
            for name in ("loss", "grad_norm"):
                if not np.isfinite(metrics[name]):
                    raise self._not_finite(
                        name.replace("grad_norm", "gradient norm"), metrics[name], step)
        self._unchecked.clear()

    def _not_finite(self, what, value, step):
        saved = self._checkpoints.last_step
        kept = (f"the checkpoint of step {saved} in {self._run.workdir} is kept" if saved
                else "no checkpoint had been written")
        return UserError(
            f"The {what} became {value} at step {step}; {kept}. Lower "
            "config.optimizer.learning_rate, lengthen config.schedule.warmup_steps or set "
            "config.optimizer.clip_norm, in a new --workdir.")


def _is_due(every, step):
    return bool(every) and step % every == 0


def _probe_sources(run):
    """(training, evaluation) data of the probes: the run's own, or that of probes.source."""
    config = run.config
    if config.probes.source is None:
        return run.train_source, run.eval_source
    return open_splits(config.probes.source, dir=config.data.dir, train_split=None,
                       eval_split=None, image_size=run.size)


# --- After the last step ---------------------------------------------------------------------


def _report(run, evaluation, loop):
    """Writes the figures, and says how the run ended."""
    if skipped := distributed.distinct(loop.bad_images.origins):
        print(f"{skipped} images could not be decoded and were skipped.")
    if distributed.is_main():
        from vit_jax.report import write_report  # matplotlib takes half a second of a start

        folder = write_report(
            run.workdir, evaluation, run.train_source.class_names, run.train_source.labels())
        of_best = f" (best checkpoint: {loop.best:.4f})" if loop.best >= 0 else ""
        print(f"Finished {run.total_steps} steps; accuracy {evaluation.accuracy:.4f}{of_best}. "
              f"Figures are in {folder}, checkpoints and metrics beside it.")
    print(evaluation.final_line(), flush=True)
