"""What a benchmark leaves: a table to read, and JSON, CSV and a bar chart with --out."""

import csv
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from vit_jax.data.pipeline import available_cores

_PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12",
             "nvidia-cudnn-cu13", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy",
             "simplejpeg", "opencv-python-headless")

Row = dict[str, Any]  # of one side: printed, and written to the CSV file, in the order of its keys


def environment(arguments: list[str]) -> dict[str, Any]:
    """Machine, versions, commit and command, without which the numbers are meaningless."""
    devices = jax.devices()
    return {
        "command": command(arguments),
        "commit": _commit(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "cpu": _cpu(),
        "cores": available_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "variables": {name: value for name, value in sorted(os.environ.items())
                      if name.startswith(("XLA_", "JAX_"))},
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def command(arguments: list[str]) -> str:
    """As it was typed."""
    return shlex.join(["python", "-m", "vit_jax.benchmark", *arguments])


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit():
    """Of the checkout that this file is in; None if it is installed elsewhere."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, text=True,
                          capture_output=True, check=False).stdout.strip() or None


def _cpu():
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return " ".join([fields.get("model name", "unknown"), *numbers])


def format_table(rows: list[Row]) -> str:
    """Columns in the order of the first row's keys, numbers to the right."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys] + [[_text(row.get(key)) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(isinstance(row.get(key), (int, float, type(None))) for row in rows)
               for key in keys]
    lines = ["  ".join(cell.rjust(width) if right else cell.ljust(width)
                       for cell, width, right in zip(line, widths, numeric, strict=True)).rstrip()
             for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _text(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(folder: Path, about: dict[str, Any], rows: list[Row], chart: tuple[str, str]) -> None:
    """Writes benchmark.json, benchmark.csv and benchmark.png.

    Args:
      folder: made if it is not there.
      about: of `environment`, with whatever else was measured.
      rows: the table.
      chart: the rows' keys of the bars' labels (one or more, separated by spaces) and lengths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = json.dumps({**about, "rows": rows}, indent=1)
    (folder / "benchmark.json").write_text(result + "\n")
    with open(folder / "benchmark.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    labels, key = chart
    figure = Figure(figsize=(7, 0.8 + 0.35 * len(rows)), layout="constrained", dpi=150)
    axes = figure.subplots()
    names = [" ".join(str(row.get(label, "")) for label in labels.split()) for row in rows]
    bars = axes.barh(range(len(rows)), [row[key] for row in rows], color=[
        "C0" if row.get("side", "vit_jax") == "vit_jax" else "C7" for row in rows])
    axes.bar_label(bars, fmt="%.4g", padding=3)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel(key)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{about['devices']}, {about['cpu']}, {about['cores']} cores", fontsize=8)
    figure.savefig(folder / "benchmark.png")


def read(folder: Path) -> dict[str, Any]:
    """What `write` has written: `about`, with the table under 'rows'."""
    return json.loads((folder / "benchmark.json").read_text())
