"""Checkpoints of a run: asynchronous, atomic, the last and the best, on Orbax."""

import contextlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

import vit_jax
from vit_jax import config as config_lib
from vit_jax.data.records import Source
from vit_jax.errors import UserError
from vit_jax.models.scan import stack_blocks, unstack_blocks
from vit_jax.training.state import TrainState, model_to_json
from vit_jax.training.step import Pixels

BEST = "eval/accuracy"
_NOT_EVALUATED = {BEST: -1.0}  # Orbax warns about checkpoints without metrics


class Checkpoints:
    """The folder `checkpoints/` of a workdir.

    A checkpoint holds the train state, its blocks always unstacked, and `meta`: what the weights
    mean (config, class names, preprocessing, versions). A save returns as soon as the state is
    copied; the files appear under their final name only when they are complete.
    """

    def __init__(self, directory: Path, *, writable: bool = True):
        # By default every replicated array is split into one part per device to write: thousands of
        # small programs to compile and run before a save returns.
        kinds, scalars = ocp.type_handlers, ocp.type_handlers.ScalarHandler()
        state = ocp.PyTreeCheckpointHandler(
            type_handler_registry=kinds.create_type_handler_registry(
                (int, scalars), (float, scalars), (np.ndarray, kinds.NumpyHandler()),
                (jax.Array, kinds.ArrayHandler(use_replica_parallel=False))))
        # Without a registry Orbax cannot tell the contents of a checkpoint that it did not write.
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        meta = ocp.JsonCheckpointHandler()
        for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
            handlers.add("state", args, state)
        for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
            handlers.add("meta", args, meta)
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([
                policies.LatestN(1),
                policies.BestN(
                    get_metric_fn=lambda m: m[BEST], n=1, keep_checkpoints_without_metrics=False),
            ]),
            best_fn=lambda metrics: metrics[BEST],
            create=writable,
            cleanup_tmp_directories=writable,  # what a killed save left behind
        )
        _check_metrics(directory)
        try:
            self._manager = ocp.CheckpointManager(
                directory.absolute(), handler_registry=handlers, options=options)
        except OSError as error:
            raise UserError(f"{directory} cannot be opened: {error.strerror or error}; check its "
                            "permissions.") from error

    @property
    def last_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the highest evaluation accuracy, if one was evaluated."""
        return self._manager.best_step() if self.best_metric >= 0 else None

    @property
    def best_metric(self) -> float:
        """That accuracy; negative before the first evaluation."""
        step = self._manager.best_step()
        if step is None:
            return _NOT_EVALUATED[BEST]
        with self._reading(step):
            return self._manager.metrics(step)[BEST]

    def save(self, step: int, state: TrainState, meta: dict[str, Any],
             metrics: dict[str, float] | None = None) -> None:
        """Starts saving; raises UserError if this, or the save before it, cannot be written."""
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_fields(_to_disk(state))), meta=ocp.args.JsonSave(meta))
        with self._writing():
            self._manager.check_for_errors()
            self._manager.save(step, args=args, metrics=metrics or _NOT_EVALUATED)

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Returns when everything is on disk; UserError if it cannot be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, as `wait` does, and ends Orbax's threads."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except (OSError, ValueError) as error:
            # TensorStore's come as ValueError, but so do those of a process that has ended.
            if isinstance(error, ValueError) and "os_error" not in str(error):
                raise
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"A checkpoint cannot be written to {self._manager.directory} ({reason:.300}); fix "
                "this and start again: completed checkpoints are kept.") from error

    def meta(self, step: int) -> dict[str, Any]:
        """What the weights of this checkpoint mean."""
        return self._restore(step, meta=ocp.args.JsonRestore())["meta"]

    def restore(self, step: int, state: Any, shardings: Any) -> TrainState:
        """Reads a train state.

        Args:
          step: of an existing checkpoint.
          state: shapes and types of the state as the run has it.
          shardings: where its leaves belong; the mesh may be another than when it was saved.
        """
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        on_disk = unstack_blocks(wanted, _block_of)
        restored = TrainState(**self._restore_state(step, _fields(on_disk)))
        if not _is_stacked(state):
            return restored

        def stacked(restored):
            # Leaf by leaf: of frozen blocks an optimizer keeps nothing, so that nothing tells on
            # disk that there was an `encoderblock`.
            return jax.tree.unflatten(
                jax.tree.structure(state), jax.tree.leaves(stack_blocks(restored)))

        return jax.jit(stacked, out_shardings=shardings)(restored)

    def restore_arrays(self, step: int) -> dict[str, Any]:
        """The train state as it is on disk: nested dictionaries and lists of NumPy arrays."""
        with self._reading(step):
            _check_arrays(self._manager.directory / str(step) / "state")
            tree = self._manager.item_metadata(step)["state"].tree
        return self._restore_state(step, jax.tree.map(lambda x: np.empty(x.shape, x.dtype), tree))

    def _restore_state(self, step, state):
        wanted = ocp.args.PyTreeRestore(
            state, restore_args=ocp.checkpoint_utils.construct_restore_args(state))
        return self._restore(step, state=wanted)["state"]

    def _restore(self, step, **args):
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(**args))

    @contextlib.contextmanager
    def _reading(self, step):
        """Turns what Orbax raises for damaged or missing files into a UserError. (For some files it
        returns None instead, hence AttributeError and TypeError.)"""
        try:
            yield
        except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"The checkpoint of step {step} in {self._manager.directory} cannot be read "
                f"({type(error).__name__}: {reason:.300}); copy it again, or "
                "remove its folder to continue from an earlier one."
            ) from error


def _check_metrics(directory):
    """Raises UserError for metrics files that would crash Orbax, which reads all at once."""
    for path in directory.glob("*/metrics/metrics"):
        if not path.parts[-3].isdigit():  # left over by a killed save, and read by nobody
            continue
        try:
            json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged or incomplete ({error}); copy it again, or remove "
                            "the folder of its step.") from error


def _check_arrays(folder):
    """Raises ValueError if the list of all arrays is damaged. Orbax would report that for every
    array separately, mostly after its caller has returned."""
    store = tensorstore.KvStore.open(
        {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}).result()
    if not store.list().result():
        raise ValueError(f"no arrays in {folder}")


def _fields(state):
    """Without an empty `ema_params`, which runs from before it existed do not have either."""
    return {name: value for name, value in vars(state).items() if value is not None}


def _is_stacked(state):
    return "encoderblock" in state.params.get("Transformer", {})


def _block_of(stacked: jax.ShapeDtypeStruct, index: int) -> jax.ShapeDtypeStruct:
    """One block of a stacked array, on the devices where its numbers will be."""
    mesh, spec = stacked.sharding.mesh, stacked.sharding.spec
    return jax.ShapeDtypeStruct(
        stacked.shape[1:], stacked.dtype,
        sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec[1:])))


def _to_disk(state):
    return jax.jit(unstack_blocks)(state) if _is_stacked(state) else state


def describe_run(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    pixels: Pixels,
    class_names: tuple[str, ...],
    train_source: Source,
) -> dict[str, Any]:
    """`meta` of a run's checkpoints: enough to use the weights without the command line."""
    return {
        "model": model_to_json(getattr(model, "backbone", model)),
        "config": config_lib.to_json(config),
        "class_names": list(class_names),
        "train_images": len(train_source),
        "train_identity": train_source.identity(),
        "preprocessing": {
            "image_size": list(config_lib.image_size(config)),
            "crop": config.data.eval_crop,
            "resize": config.data.eval_resize,
            "interpolation": config.data.interpolation,
            "antialias": config.data.antialias,
            "mean": pixels.mean,
            "std": pixels.std,
        },
        "versions": {name: importlib.metadata.version(name)
                     for name in ("jax", "flax", "optax", "orbax-checkpoint")}
        | {"vit_jax": vit_jax.__version__},
    }


def check_same_data(meta: dict[str, Any], stored: dict[str, Any]) -> None:
    """Raises UserError if a resumed run would see other classes or other images."""
    for key, what in (("class_names", "classes"), ("train_images", "number of training images")):
        if meta[key] != stored[key]:
            raise UserError(
                f"The data changed since this run began: its {what} was {_short(stored[key])}, now "
                f"it is {_short(meta[key])}. Restore the data, or use another --workdir."
            )
    key = "train_identity"  # older checkpoints have none, or of a TFDS data set its name alone
    if not meta[key].startswith(stored.get(key, "")):
        raise UserError(
            "The data changed since this run began: there are as many training images as before, "
            f"but other images or other labels ({_short(stored[key])} is now {_short(meta[key])}). "
            "Restore the data, or use another --workdir.")


def _short(value):
    text = str(value)
    return text if len(text) < 100 else text[:100] + "..."
