"""What a sweep compares: a grid of runs that differ from one base config in a few keys."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import ml_collections

from vit_jax import cli
from vit_jax import config as config_lib
from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What `get_sweep` of a file in configs/ablations returns.

    Attributes:
      title: of the table and the figure.
      rows: what its rows differ in, such as 'position embedding'; they are the figure's lines.
      columns: what its columns differ in; the figure's x axis.
      cells: row -> column -> {config key: value} that this run changes in the config of the same
        file's `get_config`. Columns that are numbers are drawn to scale. A cell that is left out
        is n/a; cells of equal settings share a run.
      x: 'columns', or 'flops' for the forward FLOPs of one image on the figure's x axis.
      metric: key in metrics.jsonl whose last value, a fraction, table and figure show in %.
    """

    title: str
    rows: str
    columns: str
    cells: dict[str, dict[str | float, dict[str, Any]]]
    x: str = "columns"
    metric: str = "eval/accuracy"

    def __post_init__(self):
        """Raises UserError for another `x`, or cells of another form."""
        if self.x not in ("columns", "flops"):
            raise UserError(f"x={self.x!r} of the sweep must be 'columns' or 'flops'.")
        for row, columns in self.cells.items():
            cells = columns.values() if isinstance(columns, dict) else [columns]
            if not all(isinstance(settings, dict) for settings in cells):
                raise UserError(f"cells[{row!r}] of the sweep must hold a dict of config keys for "
                                f"each of its columns, not {columns!r}.")

    @property
    def column_labels(self) -> list[str | float]:
        """Every column of any row; numbers ascending, names in the order in which they come."""
        labels = list(dict.fromkeys(label for row in self.cells.values() for label in row))
        numbers = all(isinstance(label, (int, float)) for label in labels)
        return sorted(labels) if numbers else labels


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a sweep.

    Attributes:
      name: of its folder in the sweep's workdir.
      cells: (row, column) that it stands in.
      seed: config.seed.
      settings: key -> value, all that the command line must set in the file's config.
      config: the whole.
    """

    name: str
    cells: tuple[tuple[str, str | float], ...]
    seed: int
    settings: dict[str, Any]
    config: ml_collections.ConfigDict


def load(argument: str, overrides: dict[str, str], seeds: int) -> tuple[Sweep, list[Run]]:
    """Reads `FILE.py[:ARGS]` and lists its runs, seed by seed, so that an unfinished sweep has at
    least one seed in as many rows as possible.

    Args:
      argument: of `--config`; ARGS are passed to both `get_config` and `get_sweep`.
      overrides: key -> text of `--config.key=text`, for every run.
      seeds: repeats; the first has the config's seed, the next that plus 1, ...

    Raises:
      UserError: no such file or sweep, or a run with an invalid config.
    """
    base = cli.load_config(argument)
    cli.apply_overrides(base, overrides)
    sweep = cli.call_in_file(argument, "get_sweep", Sweep)
    given = {key: config_lib.parse_value(key, text) for key, text in overrides.items()}
    runs: list[Run] = []
    for seed in range(base.seed, base.seed + seeds):
        runs += _runs_of_seed(sweep, base, given, seed)
    return sweep, runs


def _runs_of_seed(sweep, base, given, seed):
    runs = {}  # by config
    for row, columns in sweep.cells.items():
        for column, settings in columns.items():
            label = f"{row}, {column}"
            if both := [key for key in settings if key in given]:
                raise UserError(f"--config.{both[0]} is what this sweep varies ({label}: "
                                f"{settings[both[0]]!r}); change it in the file.")
            if "seed" in settings:
                raise UserError(f"The run {label}: seed is what --seeds varies; leave it out.")
            settings = given | settings | {"seed": seed}
            config = base.copy_and_resolve_references()
            try:
                for key, value in settings.items():
                    config_lib.set_value(config, key, value)
                config = config_lib.validate(config)
            except UserError as error:
                raise UserError(f"The run {label}: {error}") from None
            key = json.dumps(config_lib.to_json(config))
            if key in runs:
                runs[key] = dataclasses.replace(
                    runs[key], cells=(*runs[key].cells, (row, column)))
            else:
                name = f"{_slug(row)}-{_slug(column)}-seed{seed}"
                runs[key] = Run(name, ((row, column),), seed, settings, config)
    names = [run.name for run in runs.values()]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two runs of this sweep are both called {name}; rename a row or a "
                            "column.")
    return list(runs.values())


def _slug(label: str | float) -> str:
    """The label as a folder's name, in letters that need no quotes."""
    return re.sub(r"[^\w.+]+", "-", str(label)).strip("-")


def folder(workdir: Path, run: Run) -> Path:
    """The run's own workdir."""
    return workdir / run.name
