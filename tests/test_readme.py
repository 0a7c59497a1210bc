"""README, recipes and scripts name things that exist."""

import contextlib
import functools
import importlib
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from recipes import RECIPES

from vit_jax import cli
from vit_jax.config import parse_value

pytestmark = pytest.mark.core
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [README, *(
    path.read_text() for pattern in ("docs/*.md", "configs/*.py", "configs/ablations/*.py")
    for path in sorted(ROOT.glob(pattern)))]


def commands():
    """(command, arguments) of every `python -m vit_jax.COMMAND` line with arguments in README, the
    docs and the recipes' docstrings."""
    for document in DOCUMENTS:
        for line in document.replace("\\\\\n", " ").replace("\\\n", " ").splitlines():
            if found := re.match(r" *python -m vit_jax\.(\w+) (.*)", line):
                yield found[1], shlex.split(found[2], comments=True)


def test_there_are_commands():
    assert {command for command, _ in commands()} >= {
        "main", "convert", "predict", "prepare", "probe", "visualize", "summary", "masked"}


@functools.cache
def flags_of(command):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        importlib.import_module(f"vit_jax.{command}").main(["--help"])
    return set(re.findall(r"--\w+", shown.getvalue()))


@pytest.mark.parametrize("command, arguments", list(commands()), ids=str)
def test_documented_commands_use_what_exists(command, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides, rest = cli.split_overrides(arguments)
    for path, text in overrides.items():
        parse_value(path, text)
    for argument in rest:
        if argument.startswith("--config=configs/"):
            cli.load_config(argument.removeprefix("--config="))
        if argument.startswith("--"):
            assert argument.split("=")[0] in flags_of(command)


def test_every_recipe_is_tested_and_in_the_readme():
    files = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert files == {recipe.split(":")[0] for recipe in RECIPES}
    for name in files:
        assert f"configs/{name}" in README


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))],
                         ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_page_is_in_the_readme():
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name})" in README


@pytest.mark.parametrize("script", [".ci/run", "launch/local.sh"])
def test_scripts_are_executable_and_parse(script):
    assert (ROOT / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", ROOT / script], check=True)
