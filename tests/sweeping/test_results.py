"""Tables and figures of results that are written by hand."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from vit_jax import config as config_lib
from vit_jax.errors import UserError
from vit_jax.sweeping import results
from vit_jax.sweeping.grid import Run, Sweep


@pytest.fixture
def make(tmp_path, tiny_config):
    """Writes results for a sweep with two seeds: {(row, column, seed): accuracy}."""
    def build(sweep, accuracies):
        runs = []
        for seed in (0, 1):
            for row, columns in sweep.cells.items():
                for column in columns:
                    tiny_config.seed = seed
                    run = Run(f"{row}-{column}-{seed}", ((row, column),), seed, {},
                              config_lib.validate(tiny_config))
                    runs.append(run)
                    (tmp_path / run.name).mkdir()
                    if (row, column, seed) in accuracies:
                        (tmp_path / run.name / "result.json").write_text(json.dumps({
                            "config": config_lib.to_json(run.config), "flops": 1000,
                            "step": 6, "eval/accuracy": accuracies[row, column, seed]}))
        return runs
    return build


NAMED = Sweep("Places", "kind", "place", {"none": {"stem": {}}, "1-D": {"stem": {}, "all": {}}})
ACCURACIES = {("none", "stem", 0): 0.5, ("none", "stem", 1): 0.625, ("1-D", "all", 1): 0.75}


def table(path):
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_table(make, tmp_path):
    results.write(tmp_path, NAMED, make(NAMED, ACCURACIES))
    mean, deviation = np.mean([50, 62.5]), np.std([50, 62.5], ddof=1)
    assert table(tmp_path / "results.md") == [
        ["kind", "stem", "all"], ["---", "---:", "---:"],
        ["none", f"{mean:.1f} ± {deviation:.1f}", "n/a"],
        ["1-D", "–", "75.0 (1 of 2)"],
    ]
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# Places\n") and "3 of 6 runs are finished" in text


def test_csv(make, tmp_path):
    results.write(tmp_path, NAMED, make(NAMED, ACCURACIES))
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["kind"], row["place"], int(row["seed"])): float(row["eval/accuracy"])
            for row in rows} == ACCURACIES
    assert rows[0]["run"] == "none-stem-0" and "config" not in rows[0]


def test_a_run_in_two_cells_is_in_both(make, tmp_path):
    run, = make(Sweep("", "r", "c", {"a": {1: {}}}), {("a", 1, 0): 0.5})[:1]
    sweep = Sweep("Two", "r", "c", {"a": {1: {}}, "b": {1: {}}})
    shared = Run(run.name, (("a", 1), ("b", 1)), 0, {}, run.config)
    results.write(tmp_path, sweep, [shared])
    assert table(tmp_path / "results.md")[2:] == [["a", "50.0"], ["b", "50.0"]]


@pytest.mark.parametrize("columns, x, scale, ticks", [
    (("stem", "all"), "columns", "linear", ["stem", "all"]),
    ((3e-4, 1e-3), "columns", "log", ["0.0003", "0.001"]),
    ((0, 0.1), "columns", "linear", ["0", "0.1"]),  # 0 has no place on a logarithmic axis
    ((True, False), "columns", "linear", ["False", "True"]),
    ((1, 2), "flops", "log", None),
])
def test_figure(make, tmp_path, monkeypatch, columns, x, scale, ticks):
    """Means over their columns, or over the FLOPs; names side by side and numbers to scale."""
    sweep = Sweep("A title", "rows", "columns", {row: dict.fromkeys(columns, {})
                                                 for row in ("none", "1-D")}, x=x)
    accuracies = {(row, column, seed): 0.25 * seed + 0.5 * i
                  for row in sweep.cells for i, column in enumerate(columns) for seed in (0, 1)}
    drawn = []
    draw = results._figure
    monkeypatch.setattr(results, "_figure", lambda *a: drawn.append(draw(*a)) or drawn[0])
    results.write(tmp_path, sweep, make(sweep, accuracies))
    with Image.open(tmp_path / "results.png") as image:
        assert min(image.size) > 200
    axes, = drawn[0].axes
    assert axes.get_title() == "A title" and axes.get_ylabel() == "eval/accuracy (%)"
    assert axes.get_xlabel() == ("forward FLOPs of one image" if x == "flops" else "columns")
    assert axes.get_xscale() == scale
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["none", "1-D"]
    if ticks:
        assert [text.get_text() for text in axes.get_xticklabels()] == ticks
    for container in axes.containers:
        line = container.lines[0]
        assert sorted(line.get_ydata()) == [12.5, 62.5]
        if x == "flops":
            assert list(line.get_xdata()) == [1000, 1000]
        elif scale == "log":
            assert list(line.get_xdata()) == list(columns)


def test_another_metric(make, tmp_path):
    """A finished run that did not measure it has nothing to show."""
    run, other = make(Sweep("", "r", "c", {"a": {1: {}, 2: {}}}), {("a", 2, 0): 0.5})[:2]
    config = config_lib.to_json(run.config)
    (tmp_path / run.name / "result.json").write_text(
        json.dumps({"config": config, "flops": 1, "eval/accuracy": 0.5, "probe/5shot": 0.25}))
    results.write(tmp_path, Sweep("", "r", "c", {"a": {1: {}, 2: {}}}, metric="probe/5shot"),
                  [run, other])
    assert table(tmp_path / "results.md")[2:] == [["a", "25.0", "–"]]


def test_nothing_is_finished(make, tmp_path):
    (tmp_path / "results.png").write_text("of another config")
    results.write(tmp_path, NAMED, make(NAMED, {}))
    assert "0 of 6 runs are finished" in (tmp_path / "results.md").read_text()
    assert not (tmp_path / "results.png").exists()
    assert [file.name for file in tmp_path.glob(".*")] == []


def test_only_results_of_this_config_count(make, tmp_path):
    run = make(NAMED, ACCURACIES)[0]
    for key, value, counts in (
            ("optimizer.learning_rate", 0.2, False), ("total_steps", 12, False),
            ("probes.every", 3, False), ("probes.shots", (5,), True),  # there are no probes
            ("data.workers", 2, True), ("eval_every", 1, True)):
        config = run.config.copy_and_resolve_references().unlock()
        config_lib.set_value(config, key, value)
        found = results.read(tmp_path, Run(run.name, run.cells, 0, {}, config))
        assert (found is not None) == counts, key


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": 3}', '{"config": {"sead": 1}}'])
def test_a_damaged_result_is_named(make, tmp_path, text):
    run = make(NAMED, ACCURACIES)[0]
    (tmp_path / run.name / "result.json").write_text(text)
    with pytest.raises(UserError, match="none-stem-0/result.json cannot be read .*delete it"):
        results.read(tmp_path, run)
