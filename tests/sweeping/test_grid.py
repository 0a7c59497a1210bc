"""Which runs a sweep has, and that those of configs/ablations can run."""

import shlex
from pathlib import Path

import pytest

from vit_jax import cli
from vit_jax import config as config_lib
from vit_jax.errors import UserError
from vit_jax.sweeping import grid
from vit_jax.training.state import build_model

TESTS = Path(__file__).parent.parent
ABLATIONS = TESTS.parent / "configs" / "ablations"
FILES = sorted(path.name for path in ABLATIONS.glob("*.py"))
ARGUMENTS = [
    *(f"{name}{size}" for name in FILES if name != "few_labels.py" for size in ("", ":cpu")),
    "few_labels.py:full,runs/masked", "few_labels.py:cpu,runs/masked_cpu"]


@pytest.fixture
def sweep_file(tmp_path):
    """Writes a sweep of these cells over tests/tiny.py."""
    def write(cells):
        path = tmp_path / "sweep.py"
        path.write_text(
            "import runpy\n"
            "from vit_jax.sweeping.grid import Sweep\n"
            f"get_config = runpy.run_path({str(TESTS / 'tiny.py')!r})['get_config']\n"
            f"def get_sweep():\n    return Sweep('Title', 'row', 'column', {cells!r})\n")
        return str(path)
    return write


def test_every_cell_is_a_run(sweep_file):
    rate, heads = "optimizer.learning_rate", "model.num_heads"
    cells = {"Two words/16": {0.1: {rate: 0.1}, 1e-3: {rate: 1e-3}}, "b": {0.1: {heads: 1}}}
    sweep, runs = grid.load(sweep_file(cells), {"model.hidden_size": "32"}, 2)
    assert [run.name for run in runs] == [
        f"{name}-seed{seed}" for seed in (0, 1)
        for name in ("Two-words-16-0.1", "Two-words-16-0.001", "b-0.1")]
    assert sweep.column_labels == [1e-3, 0.1]
    second = runs[4]
    assert second.cells == (("Two words/16", 1e-3),)
    assert second.settings == {"model.hidden_size": 32, rate: 1e-3, "seed": 1}
    changed = config_lib.differences(second.config, runs[0].config)
    assert set(changed) == {rate, "seed"} and second.config.model.hidden_size == 32


def test_equal_settings_share_a_run(sweep_file):
    """Also where one says what the other leaves to the base config."""
    cells = {"depth": {1: {"model.num_layers": 2}, 2: {"model.num_layers": 4}},
             "width": {1: {}, 2: {"model.hidden_size": 32}}}
    _, runs = grid.load(sweep_file(cells), {}, 1)
    assert [run.cells for run in runs] == [
        (("depth", 1), ("width", 1)), (("depth", 2),), (("width", 2),)]


def test_seeds_begin_with_the_configs(sweep_file):
    _, runs = grid.load(sweep_file({"a": {"b": {}}}), {"seed": "5"}, 2)
    assert [(run.seed, run.config.seed, run.settings["seed"]) for run in runs] == [
        (5, 5, 5), (6, 6, 6)]


@pytest.mark.parametrize("cells, overrides, message", [
    ({"a": {"b": {"model.patch": 4}}}, {}, "The run a, b: Unknown config key 'model.patch'"),
    ({"a": {"b": {"batch_size": 15, "accumulation_steps": 2}}}, {}, "a, b: .*not divisible"),
    ({"a": {"b": {"model.num_heads": 1}}}, {"model.num_heads": "4"},
     r"--config.model.num_heads is what this sweep varies \(a, b: 1\)"),
    ({"a b": {"c": {}}, "a-b": {"c": {"batch_size": 8}}}, {}, "both called a-b-c-seed0"),
    ({"a": {1: {"seed": 1}, 2: {"seed": 2}}}, {}, "The run a, 1: seed is what --seeds varies"),
    ({"a": {"batch_size": 8}}, {}, r"sweep.py: cells\['a'\] .* a dict of config keys for each"),
    ({"a": 0.1}, {}, r"cells\['a'\] .* not 0.1"),
])
def test_grids_that_cannot_be(sweep_file, cells, overrides, message):
    with pytest.raises(UserError, match=message):
        grid.load(sweep_file(cells), overrides, 1)


def test_a_misspelt_axis():
    with pytest.raises(UserError, match="x='flop' of the sweep must be 'columns' or 'flops'"):
        grid.Sweep("Title", "row", "column", {}, x="flop")


def test_settings_survive_the_command_line():
    """What a run is told by `--config.key=value` is what the sweep meant."""
    for argument in ARGUMENTS:
        for run in grid.load(str(ABLATIONS / argument), {}, 1)[1]:
            for key, value in run.settings.items():
                assert config_lib.parse_value(key, config_lib.format_value(value)) == value


def test_a_recipe_is_no_sweep():
    with pytest.raises(
            UserError, match=r"tiny.py: it does not define get_sweep\(\), which must return"):
        grid.load(str(TESTS / "tiny.py"), {}, 1)


@pytest.mark.parametrize("argument", [  # eight full-size models; :cpu has as many small ones
    pytest.param(argument, marks=[pytest.mark.slow] if argument == "position.py" else [])
    for argument in ARGUMENTS])
def test_every_ablation_can_run(argument):
    """Every model takes its images. Its docstring names the number of parts it is run in."""
    _, runs = grid.load(str(ABLATIONS / argument), {}, 1)
    models = {str((run.config.model, run.config.data.image_size)): run.config for run in runs}
    for config in models.values():
        build_model(config, 10, config_lib.image_size(config))
        # What masked pretraining leaves behind has no such layer, and would not fit.
        assert config.init is None or config.model.representation_size is None
    if ":cpu" not in argument:
        assert f"--shard=0/{len(runs)}" in (ABLATIONS / argument.split(":")[0]).read_text()


DOCUMENTS = [*(ABLATIONS / name for name in FILES), TESTS.parent / "docs" / "ablations.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documented_commands_use_what_exists(document, monkeypatch):
    monkeypatch.chdir(TESTS.parent)
    lines = document.read_text().replace("\\\\\n", " ").replace("\\\n", " ").splitlines()
    start = "python -m vit_jax.sweep "
    commands = [line.strip().removeprefix(start) for line in lines
                if line.strip().startswith(start)]
    assert commands
    for command in commands:
        overrides, rest = cli.split_overrides(shlex.split(command))
        flags = dict(argument.removeprefix("--").split("=", 1) for argument in rest)
        assert set(flags) <= {"config", "workdir", "seeds", "shard"}
        assert grid.load(flags["config"], overrides, int(flags.get("seeds", 1)))[1]


def test_scaling_keeps_heads_as_wide_and_features_wider():
    for size in ("", ":cpu"):
        _, runs = grid.load(str(ABLATIONS / f"scaling.py{size}"), {}, 1)
        models = [run.config.model for run in runs]
        assert len({model.hidden_size / model.num_heads for model in models}) == 1
        # What is probed in front of the head is as wide as what is scaled.
        assert all(model.representation_size in (None, model.hidden_size) for model in models)


@pytest.mark.parametrize("argument, message", [
    ("data_size.py:small", "takes 'full' or 'cpu', not 'small'"),
    ("few_labels.py:cpu", "name the size and the workdir"),
    ("position.py:B/99", "unknown row 'B/99'"),
])
def test_unknown_sizes_of_ablations(argument, message):
    with pytest.raises(UserError, match=message):
        grid.load(str(ABLATIONS / argument), {}, 1)
