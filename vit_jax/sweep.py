"""Train a grid of runs and compare them: python -m vit_jax.sweep --config=FILE.py[:ARGS]
--workdir=DIR [--config.key=value ...]"""

import os
import sys
from pathlib import Path
from signal import SIGTERM

import jax

from vit_jax import cli
from vit_jax.buckets import refuse_bucket
from vit_jax.checkpoints.names import is_name
from vit_jax.errors import UserError
from vit_jax.sweeping import results
from vit_jax.sweeping.execution import Stopping, run_all, write_tables
from vit_jax.sweeping.grid import Run, folder, load
from vit_jax.training.workdir import has_checkpoints


def main(arguments: list[str]) -> None:
    """Runs the command; see `--help`."""
    overrides, rest = cli.split_overrides(arguments)
    parser = cli.ArgumentParser(
        prog="python -m vit_jax.sweep",
        description="Trains the runs of a sweep (configs/ablations/), one after another, each with "
        "python -m vit_jax.main\nin DIR/NAME on all devices of this machine, and writes "
        "DIR/results.md, results.csv and results.png\nafter every run. Running the same command "
        "again skips finished runs and resumes the others. A run that\nfails does not stop the "
        "sweep.",
        epilog="--config.KEY=VALUE applies to every run. One part of a SLURM job array:\n"
        "  --shard=$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT  (sbatch --array=0-7)",
    )
    parser.add_argument("--config", metavar="FILE.py[:ARGS]", required=True, help="the sweep")
    parser.add_argument("--workdir", metavar="DIR", type=Path, required=True,
                        help="holds the runs and the tables")
    parser.add_argument("--seeds", metavar="N", type=int, default=1,
                        help="repeats of every run, with config.seed, config.seed + 1, ... (1)")
    parser.add_argument("--shard", metavar="I/N", default="0/1",
                        help="runs the I-th of N parts, I from 0; the parts may run at once")
    parser.add_argument("--report", action="store_true",
                        help="only writes the tables of the finished runs")
    flags = parser.parse(rest)
    if flags.seeds < 1:
        raise UserError(f"--seeds={flags.seeds} must be at least 1.")
    part, parts = cli.parse_shard(flags.shard)
    workdir = Path(os.path.abspath(os.path.expanduser(flags.workdir)))
    sweep, runs = load(flags.config, overrides, flags.seeds)
    if not flags.report:
        _check_starts(workdir, runs[part::parts])
    # The devices are for the runs: a GPU that this process had taken would be missing there.
    jax.config.update("jax_platforms", "cpu")

    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The workdir {workdir} cannot be written: {error.strerror}; choose "
                        "another --workdir.") from None
    failed, busy = [], []
    if flags.report:
        write_tables(workdir, sweep, runs)
    else:
        with Stopping() as stopping:
            failed, busy = run_all(
                flags.config, workdir, sweep, runs, runs[part::parts], stopping)
        if stopping.signal:
            print(f"Stopped by {stopping.signal.name}; run the same command to continue.",
                  file=sys.stderr)
            sys.exit(cli.EXIT_SAVED if stopping.signal == SIGTERM else 128 + stopping.signal)
    beside = "results.csv and results.png are" if (workdir / "results.png").exists() else (
        "results.csv is")
    print(f"\n{(workdir / 'results.md').read_text()}\nThis table is {workdir / 'results.md'}; "
          f"{beside} beside it.")
    if busy:
        print(f"In progress in other processes: {', '.join(busy)}.")
    if failed:
        raise UserError(f"{len(failed)} of {len(runs[part::parts])} runs failed "
                        f"({', '.join(failed)}): see above, and log.txt in their folders. Run the "
                        "same command to retry them.")


def _check_starts(workdir: Path, runs: list[Run]) -> None:
    """Raises UserError if a run cannot begin for want of its config.init: now, not when the runs
    before it have taken days."""
    for run in runs:
        start = run.config.init
        if not start or has_checkpoints(folder(workdir, run)) or results.read(workdir, run):
            continue
        refuse_bucket("config.init", start)
        if not is_name(start) and not os.path.exists(os.path.expanduser(start)):
            raise UserError(f"The run {run.name}: config.init={start} does not exist.")


if __name__ == "__main__":
    cli.run_command(main)
