"""What a sweep's runs came to: a table in Markdown, every run in CSV, and a figure."""

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import ml_collections
from matplotlib import ticker
from matplotlib.figure import Figure

from vit_jax import atomic
from vit_jax import config as config_lib
from vit_jax.config_keys import RESUMABLE
from vit_jax.errors import UserError
from vit_jax.models.summary import summarize
from vit_jax.sweeping.grid import Run, Sweep, folder
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.metrics import read_metrics
from vit_jax.training.state import model_from_json

RESULT = "result.json"
# Keys that a run may be resumed with, but with which it is not the run of the table any more.
LENGTHS = ("total_steps", "epochs")
PROBES = ("probes.every", "probes.names", "probes.shots", "probes.source")
_MAY_DIFFER = set(RESUMABLE) - {*LENGTHS, *PROBES}
_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100,
          "font.size": 9, "font.family": "DejaVu Sans"}  # a font that comes with matplotlib


def record(workdir: Path, run: Run) -> None:
    """Marks a run as finished: writes `result.json`, its config, what its model costs, and all
    metrics of its last step."""
    where = folder(workdir, run)
    checkpoints = Checkpoints(where / "checkpoints", writable=False)
    step = checkpoints.last_step
    meta = checkpoints.meta(step)
    checkpoints.close()
    summary = summarize(model_from_json(meta["model"]), tuple(meta["preprocessing"]["image_size"]))
    metrics = {}
    for entry in read_metrics(where / "metrics.jsonl"):
        if entry["step"] == step:
            metrics |= entry
    result = {"config": config_lib.to_json(run.config), "train_images": meta["train_images"],
              "parameters": summary.parameters, "flops": summary.flops, **metrics}
    atomic.write_text(where / RESULT, json.dumps(result, indent=2) + "\n")


def differences(
    ours: ml_collections.ConfigDict, theirs: ml_collections.ConfigDict
) -> dict[str, str]:
    """`config.differences`, without those of probes where neither has any."""
    changed = config_lib.differences(ours, theirs)
    probed = ours.probes.every or theirs.probes.every
    return {key: line for key, line in changed.items() if probed or key not in PROBES}


def read(workdir: Path, run: Run) -> dict[str, Any] | None:
    """The result of a run that has finished with this config; None if there is none.

    Raises:
      UserError: the file cannot be read.
    """
    path = folder(workdir, run) / RESULT
    try:
        result = json.loads(path.read_text())
        changed = differences(run.config, config_lib.from_json(result["config"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it to have the run checked "
                        "again.") from None
    return None if set(changed) - _MAY_DIFFER else result


def write(workdir: Path, sweep: Sweep, runs: list[Run]) -> None:
    """Writes `results.md`, `results.csv` and, if anything is finished, `results.png`; an earlier
    figure does not stay beside a table without numbers."""
    results = {run.name: read(workdir, run) for run in runs}
    cells: dict[tuple, list] = {}  # (row, column) -> (metric in %, FLOPs) of every seed
    for run in runs:
        result = results[run.name]
        if result and sweep.metric in result:
            for cell in run.cells:
                cells.setdefault(cell, []).append((100 * result[sweep.metric], result["flops"]))
    atomic.write_text(workdir / "results.csv", _csv(sweep, runs, results))
    if cells:
        with matplotlib.rc_context(_STYLE), atomic.replacing(workdir / "results.png") as temporary:
            _figure(sweep, cells).savefig(temporary)
    else:
        (workdir / "results.png").unlink(missing_ok=True)
    atomic.write_text(workdir / "results.md", _markdown(sweep, runs, results, cells))


def _markdown(sweep, runs, results, cells):
    done = sum(result is not None for result in results.values())
    seeds = len({run.seed for run in runs})
    repeats = f"; mean ± standard deviation of {seeds} seeds" if seeds > 1 else ", one seed"
    lines = [f"# {sweep.title}", "",
             f"Rows: {sweep.rows}. Columns: {sweep.columns}. {sweep.metric} in % after the last "
             f"step{repeats}."]
    if done < len(runs):
        lines.append(f"{done} of {len(runs)} runs are finished.")
    labels = sweep.column_labels
    lines += ["", f"| {sweep.rows} | " + " | ".join(map(str, labels)) + " |",
              "|---|" + "---:|" * len(labels)]
    for row, columns in sweep.cells.items():
        texts = ["n/a" if label not in columns else _text(cells.get((row, label), ()), seeds)
                 for label in labels]
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    if cells:
        lines += ["", f"![{sweep.title}](results.png)"]
    return "\n".join(lines) + "\n"


def _text(results, seeds):
    if not results:
        return "–"
    mean, deviation = _spread(results)
    some = f" ({len(results)} of {seeds})" if len(results) < seeds else ""
    return f"{mean:.1f}" + (f" ± {deviation:.1f}" if len(results) > 1 else "") + some


def _spread(results) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one run) of the metric."""
    values = [value for value, _ in results]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _csv(sweep, runs, results):
    """A line for every cell and seed that is finished, with every metric of any of them."""
    keys = list(dict.fromkeys(
        key for result in results.values() if result for key in result if key != "config"))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([sweep.rows, sweep.columns, "seed", "run", *keys])
    for run in runs:
        if result := results[run.name]:
            for row, column in run.cells:
                writer.writerow([row, column, run.seed, run.name,
                                 *(result.get(key, "") for key in keys)])
    return text.getvalue()


def _figure(sweep, cells) -> Figure:
    labels = sweep.column_labels
    numbers = sweep.x == "flops" or all(  # that have a place on a logarithmic axis
        isinstance(label, (int, float)) and label > 0 and label is not True for label in labels)
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    rows = list(sweep.cells)
    for index, row in enumerate(rows):
        points = []
        for position, label in enumerate(labels):
            results = cells.get((row, label))
            if not results:
                continue
            x = position + 0.5 * ((index + 0.5) / len(rows) - 0.5)  # beside each other
            if numbers:
                x = results[0][1] if sweep.x == "flops" else label
            points.append((x, *_spread(results)))
        if points:
            points.sort()
            x, mean, deviation = zip(*points, strict=True)
            axes.errorbar(x, mean, deviation, label=row, marker="o", markersize=4, capsize=2,
                          linestyle="-" if numbers else "none")
    xlabel = sweep.columns
    if not numbers:
        axes.set_xticks(range(len(labels)), map(str, labels))
        axes.set_xlim(-0.5, len(labels) - 0.5)
    elif sweep.x == "columns":
        axes.set_xscale("log")
        axes.set_xticks(labels, map(str, labels))
        axes.minorticks_off()
    else:
        xlabel = "forward FLOPs of one image"
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.EngFormatter())
        axes.minorticks_off()
    axes.set(title=sweep.title, xlabel=xlabel, ylabel=f"{sweep.metric} (%)")
    axes.grid(alpha=0.3)
    axes.legend(title=sweep.rows, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
