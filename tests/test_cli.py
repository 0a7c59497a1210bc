"""Reading config files and arguments, and how a command ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax import cli
from vit_jax.cli import apply_overrides, load_config, run_command, split_overrides
from vit_jax.config import base_config, flatten
from vit_jax.config_keys import FIELDS
from vit_jax.errors import UserError
from vit_jax.main import main

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / "tiny.py"


def refusal(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    return str(error.value)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """recipe(body) writes recipe.py into the working directory, and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(body, name="recipe.py"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("from vit_jax.config import base_config\n" + body)
        return name

    return write


TAKES_ARGUMENTS = """
def get_config(arguments="default"):
    config = base_config()
    config.total_steps = 1
    config.data.source = arguments
    return config
"""


@pytest.mark.parametrize("arguments, overrides, rest", [
    ([], {}, []),
    (["--config.a=1", "--config=f.py", "--workdir=w"],
     {"a": "1"}, ["--config=f.py", "--workdir=w"]),
    (["--config=f.py", "--config.a.b=1", "--workdir=w", "--config.c=2"],
     {"a.b": "1", "c": "2"}, ["--config=f.py", "--workdir=w"]),
    (["--config", "f.py", "--config.a", "1", "--workdir", "w"],
     {"a": "1"}, ["--config", "f.py", "--workdir", "w"]),
    (["--config.a", "1", "--config.b=2", "--config.c", "3"], {"a": "1", "b": "2", "c": "3"}, []),
    (["--config.a=x=y"], {"a": "x=y"}, []),
    (["--config.a="], {"a": ""}, []),
    (["--config.a", "-1"], {"a": "-1"}, []),  # a negative number is a value
    (["--config.a=two words", "--config.b", "two words"], {"a": "two words", "b": "two words"}, []),
    (["--config.flag"], {"flag": "true"}, []),
    (["--config.flag", "--config.a", "1"], {"flag": "true", "a": "1"}, []),
    (["--config.flag", "--workdir=w"], {"flag": "true"}, ["--workdir=w"]),
    (["--config.a=1", "--config.a=2"], {"a": "2"}, []),  # the last one counts
    (["--workdir=--config.a=1"], {}, ["--workdir=--config.a=1"]),
])
def test_split_overrides(arguments, overrides, rest):
    assert split_overrides(arguments) == (overrides, rest)


def test_overrides_are_read_as_the_type_of_their_key():
    config = base_config()
    apply_overrides(config, {"total_steps": "1e3", "model.variant": "B/16", "data.flip": "false"})
    assert (config.total_steps, config.model.variant, config.data.flip) == (1000, "B/16", False)


@pytest.mark.parametrize("given", [
    "B/16,folder:/data/my photos", "a:b:c", "x.py:y", " two words ", "", "größe=3",
])
def test_config_arguments_arrive_as_one_string(recipe, given):
    assert load_config(f"{recipe(TAKES_ARGUMENTS)}:{given}").data.source == given


@pytest.mark.parametrize("name", ["recipe.py", "my recipes/first one.py", "v1:2.py", "a.b.py"])
def test_config_paths(recipe, name):
    assert load_config(recipe(TAKES_ARGUMENTS, name)).data.source == "default"
    assert load_config(f"{Path(name).absolute()}:digits").data.source == "digits"


def test_the_recipe_gets_what_it_leaves_out(recipe):
    """It may replace a section, and return a locked config; overrides come after it."""
    name = recipe("""
def get_config():
    config = base_config()
    config.model = {"variant": "B/16"}
    return config.lock()
""")
    config = load_config(name)
    assert flatten(config).keys() == FIELDS.keys()
    apply_overrides(config, {"model.num_layers": "3"})
    assert (config.model.variant, config.model.num_layers) == ("B/16", 3)


@pytest.mark.parametrize("body, message", [
    ("x = 1\n", "recipe.py: it does not define get_config(), which must return a config."),
    ("def get_config():\n    return base_config().modle\n", "recipe.py, line 3: AttributeError: "),
    ("def get_config():\n    1 / 0\n", "recipe.py, line 3: ZeroDivisionError: division by zero"),
    ("def get_config():\n    return deeper()\ndef deeper():\n    raise KeyError('x')\n",
     "recipe.py, line 5: KeyError: 'x'"),
    ("import no_such_module\n", "recipe.py, line 2: ModuleNotFoundError: No module named 'no_su"),
    ("def get_config(:\n", "recipe.py: SyntaxError: "),
    ("get_config = 3\n", "recipe.py: TypeError: "),
    ("def get_config():\n    pass\n", "recipe.py: get_config() returned NoneType, not a Confi"),
    ("def get_config():\n    return {'seed': 1}\n", "recipe.py: get_config() returned dict, not a"),
    ("def get_config():\n    c = base_config()\n    c.sead = 1\n    return c\n",
     "recipe.py: Unknown config key 'sead'; did you mean 'seed'?"),
    ("def get_config():\n    c = base_config()\n    c.optimizer = 'sgd'\n    return c\n",
     "recipe.py: config.optimizer is a section; set one of its keys: "),
    ("def get_config(variant):\n    return base_config()\n",
     "recipe.py: get_config(variant) cannot be called with no arguments; use "
     "--config=recipe.py:ARGS."),
])
def test_mistakes_in_a_recipe_are_located(recipe, body, message):
    assert refusal(load_config, recipe(body)).startswith(message)


def test_the_line_of_a_syntax_error_is_said(recipe):
    assert "line 3" in refusal(load_config, recipe("x = 1\nif x\n"))


def test_arguments_for_a_recipe_that_takes_none(recipe):
    name = recipe("def get_config():\n    return base_config()\n")
    assert refusal(load_config, f"{name}:B/16") == (
        "recipe.py: get_config() cannot be called with the arguments 'B/16'; use "
        "--config=recipe.py.")


@pytest.mark.parametrize("asked, hint", [
    ("configs/quikstart.py", "; did you mean 'configs/quickstart.py'?"),
    ("configs/quikstart.py:B/16", "; did you mean 'configs/quickstart.py'?"),
    ("configs/quickstart", "; did you mean 'configs/quickstart.py'?"),
    ("quickstart.py", "; did you mean 'configs/quickstart.py'?"),
    ("configs", "; "),  # a folder is no config
])
def test_a_missing_file_names_the_nearest(recipe, asked, hint):
    for name in ("quickstart", "pretrain_in21k"):
        recipe(TAKES_ARGUMENTS, f"configs/{name}.py")
    assert refusal(load_config, asked).startswith(
        f"There is no config file {asked.removesuffix(':B/16')!r}{hint}")


def test_a_missing_file_where_nothing_is_near(recipe, tmp_path):
    recipe(TAKES_ARGUMENTS, "configs/quickstart.py")
    assert refusal(load_config, "configs/zzz.py").endswith(
        "; there are configs/quickstart.py.")
    os.mkdir("empty")
    os.chdir("empty")  # the fixture returns from it
    assert refusal(load_config, "no/such/x.py").endswith(
        f"; the working directory is {tmp_path / 'empty'}.")
    assert refusal(load_config, "x.py").endswith(f"; the working directory is {Path.cwd()}.")


@pytest.mark.parametrize("argument, message", [
    ("--wrkdir=x", "unknown argument '--wrkdir'; did you mean --workdir?"),
    ("--work=x", "unknown argument '--work'; did you mean --workdir?"),  # no abbreviations
    ("--confg=x.py", "unknown argument '--confg'; did you mean --config?"),
    ("--batch_size=3", "unknown argument '--batch_size'; did you mean --config.batch_size?"),
    ("--model.variant=B/16", "unknown argument '--model.variant'; did you mean --config.model."),
    ("--zzzzzzzzzzzz", "unknown argument '--zzzzzzzzzzzz' (see --help)"),
    ("train", "unknown argument 'train' (see --help)"),
    ("--mode=trian", "argument --mode: invalid choice: 'trian'"),
    ("--checkpoint=7", "argument --checkpoint: invalid choice: '7'"),
    ("--mode", "argument --mode: expected one argument"),
])
def test_unknown_flags_name_the_nearest(tmp_path, argument, message):
    workdir = [] if "dir" in message or "work" in argument else [f"--workdir={tmp_path / 'run'}"]
    assert refusal(main, [f"--config={TINY}", *workdir, argument]).startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("raised, code, message", [
    (UserError("wrong."), 1, "error: wrong.\n"),
    (cli.Stopped(signal.SIGTERM, 7), 75, "Stopped by SIGTERM after step 7, which is saved;"),
    (cli.Stopped(signal.SIGINT, 7), 130, "Stopped by SIGINT after step 7, which is saved;"),
    (cli.Stopped(signal.SIGTERM, 0), 75, "Stopped by SIGTERM before the first step;"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
], ids=str)
def test_how_a_command_ends(monkeypatch, capsys, raised, code, message):
    monkeypatch.setattr(sys, "argv", ["command", "--an=argument"])

    def command(arguments):
        assert arguments == ["--an=argument"]
        raise raised

    with pytest.raises(SystemExit) as end:
        run_command(command)
    out, err = capsys.readouterr()
    assert end.value.code == code and out == ""
    assert err.startswith(message) and err.count("\n") == 1


def test_a_reader_that_has_had_enough():
    """As in `python -m vit_jax.summary ... | head -1`: it ends quietly."""
    code = "from vit_jax import cli; cli.run_command(lambda _: print('line\\n' * 10**5))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 128 + signal.SIGPIPE
    process.stderr.close()


@pytest.mark.parametrize("raised, expected", [
    ("cli.Stopped(signal.SIGTERM, 3)", 75), ("KeyboardInterrupt()", 130), ("cli.UserError('x')", 1),
])
def test_the_exit_code_stays_where_nobody_reads_it_any_more(raised, expected):
    """As with `2>&1 | tee log`, where Ctrl-C ends tee too."""
    code = ("import signal; from vit_jax import cli\ndef command(arguments):\n"
            f"    input(); raise {raised}\ncli.run_command(command)")
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    process.communicate(b"\n")
    assert process.returncode == expected


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as end:
        run_command(lambda arguments: 1 / 0)
    assert end.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "ZeroDivisionError: division by zero" in err
    run_command(lambda arguments: None)  # success does not exit


@pytest.mark.parametrize("arguments, sentence", [
    ([], "error: --workdir=DIR is missing."),
    (["--mode=evaluate"], "error: --workdir=DIR is missing, or --config.init=CHECKPOINT instead"),
    (["--workdir=run"], "error: --config=FILE.py is missing; try configs/quickstart.py."),
    (["--workdir=", f"--config={TINY}"], "error: --workdir= is empty"),
    (["--workdir", "", f"--config={TINY}"], "error: --workdir= is empty"),
    (["--ema", "", f"--config={TINY}"], "error: unknown argument ''"),
    (["--workdir=run", "--config=missing.py"], "error: There is no config file 'missing.py'"),
    (["--workdir=run", f"--config={TINY}", "--config.lr=1"], "error: Unknown config key 'lr'"),
    (["--workdir=run", f"--config={TINY}", "--config.optimizer.lr=1"],
     "error: Unknown config key 'optimizer.lr'"),
    (["--workdir=run", f"--config={TINY}", "--config.seed=x"],
     "error: config.seed='x' is not an integer."),
    (["--workdir=run", f"--config={TINY}", "--config.seed"],
     "error: config.seed='true' is not an integer."),
    (["--workdir=run", "--config.seed=x", f"--config={TINY}"],
     "error: config.seed='x' is not an integer."),
    (["--workdir=run", f"--config={TINY}", "--config.epochs=1"], "error: Give one of config.total"),
], ids=str)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    monkeypatch, tmp_path, capfd, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    with pytest.raises(SystemExit) as end:
        run_command(main)
    out, err = capfd.readouterr()
    assert end.value.code == 1 and out == ""
    assert err.startswith(sentence) and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_key(monkeypatch, capsys):
    """absl's --help exits with 1."""
    monkeypatch.setattr(sys, "argv", ["main", "--help"])
    with pytest.raises(SystemExit) as end:
        run_command(main)
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    for flag in ("--config", "--workdir", "--mode", "--checkpoint"):
        assert flag in out
    assert all(f"--config.{key}=" in out for key in FIELDS)


def test_a_mistake_as_a_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vit_jax.main", f"--config={TINY}", "--workdir=run",
         "--config.model.dept=3"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: Unknown config key 'model.dept'")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_blanks_in_its_paths(monkeypatch, tmp_path, capsys):
    """Overrides before --config, values as words of their own, and 1e0 for an integer."""
    recipe = tmp_path / "my recipes" / "tiny one.py"
    recipe.parent.mkdir()
    recipe.write_text(TINY.read_text())
    monkeypatch.chdir(tmp_path)
    main(["--config.total_steps=2e0", "--config.model.num_layers", "1", "--config",
          "my recipes/tiny one.py", "--workdir", "my run", "--config.data.flip"])
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("eval/accuracy=")
    assert "2 steps of 16" in out
    assert (tmp_path / "my run" / "config.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"my recipes", "my run"}


def test_parse_image_size():
    assert cli.parse_image_size("224") == (224, 224)
    assert cli.parse_image_size("224,384") == cli.parse_image_size("224x384") == (224, 384)
    for text in ("", "0", "-8", "8,", "8,8,8", "8.0"):
        with pytest.raises(UserError):
            cli.parse_image_size(text)
