"""Train or evaluate: python -m vit_jax.main --config=FILE.py[:ARGS] --workdir=DIR
[--config.key=value ...]"""

import os
import re
import signal
from pathlib import Path

import jax

from vit_jax import cli, config
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate_checkpoint
from vit_jax.train import train
from vit_jax.training import distributed
from vit_jax.training import workdir as workdir_lib
from vit_jax.training.stop import StopSignal


def main(arguments: list[str]) -> None:
    """Runs the command; see `--help`."""
    overrides, rest = cli.split_overrides(arguments)
    parser = cli.ArgumentParser(
        prog="python -m vit_jax.main",
        description="Trains a Vision Transformer, or evaluates a run (--workdir) or any other "
        "checkpoint (--config.init). Starting the same command again continues an interrupted run.",
        epilog=f"keys, set with --config.KEY=VALUE (defaults are those of the base config; the "
        f"file may change them):\n{config.describe()}",
    )
    parser.add_argument("--config", metavar="FILE.py[:ARGS]",
                        help="the recipe; for --mode=evaluate the run's own is the default")
    parser.add_argument("--workdir", metavar="DIR", type=Path,
                        help="holds checkpoints, config, metrics and report")
    parser.add_argument("--mode", choices=("train", "evaluate"), default="train",
                        help="what to do (%(default)s)")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last",
                        help="which checkpoint --mode=evaluate evaluates")
    parser.add_argument("--ema", action="store_true",
                        help="--mode=evaluate evaluates the EMA weights (config.ema_decay)")
    several = parser.add_argument_group(
        "a run of several processes", "(see docs/clusters.md; launch/ has a script for each place)")
    several.add_argument("--cluster", choices=distributed.CLUSTERS, default="auto",
                         help="how the processes find each other; none: a single-process run")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--num_processes", metavar="N", type=int, help="of the run")
    several.add_argument("--process_id", metavar="I", type=int, help="this process, from 0")
    flags = parser.parse(rest)
    # A relative path given here must mean the same after the config file ran.
    workdir = flags.workdir and Path(os.path.expanduser(flags.workdir)).absolute()
    if workdir is None and (flags.mode == "train" or "init" not in overrides):
        raise UserError("--workdir=DIR is missing" + (
            "." if flags.mode == "train" else ", or --config.init=CHECKPOINT instead of it."))
    if flags.mode == "train" and (flags.ema or flags.checkpoint == "best"):
        flag = "--ema" if flags.ema else "--checkpoint=best"
        raise UserError(f"{flag} only applies to --mode=evaluate; training always continues from "
                        "the last checkpoint. Leave it out, or add --mode=evaluate.")
    if flags.config:
        settings = cli.load_config(flags.config)
    elif flags.mode == "evaluate" and workdir:
        settings = workdir_lib.read_config(workdir)
    else:
        raise UserError("--config=FILE.py is missing; try configs/quickstart.py.")
    cli.apply_overrides(settings, overrides)
    settings = config.validate(settings)
    if flags.mode == "evaluate" and workdir and "init" in overrides:
        begun = workdir_lib.read_config(workdir).init
        if settings.init != begun:
            raise UserError(f"--mode=evaluate evaluates --workdir={flags.workdir} or "
                            f"--config.init={settings.init}; give one of them.")
    distributed.start(flags.cluster, flags.coordinator, flags.num_processes, flags.process_id)

    try:
        if flags.mode == "train":
            with StopSignal() as stop:
                train(settings, workdir, stop)
        else:
            if jax.process_count() > 1:  # JAX keeps SIGTERM for a training loop that asks for it
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if workdir:
                workdir_lib.check_same_model(settings, workdir)
            evaluation = evaluate_checkpoint(
                settings, workdir or settings.init, flags.checkpoint, flags.ema)
            print(evaluation.final_line(), flush=True)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # Some failures of a collective arrive as ValueError, with the runtime's status in front.
        if isinstance(error, ValueError) and not re.match(r"[A-Z_]+: ", str(error)):
            raise
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            if jax.process_count() == 1:
                raise
            raise UserError(
                "This run of several processes failed, most likely because another process exited: "
                f"see the output of that one ({distributed.first_line(error)}). Start all of them "
                "again to continue from the last checkpoint."
            ) from error
        raise UserError(
            f"Out of device memory at config.batch_size={settings.batch_size}, "
            f"accumulation_steps={settings.accumulation_steps}, remat={settings.model.remat}. "
            "Raise config.accumulation_steps, set config.model.remat=full together with "
            "config.model.scan_layers=true, or lower config.batch_size or config.eval_batch_size."
        ) from error


if __name__ == "__main__":
    cli.run_command(main)
