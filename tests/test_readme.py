"""README, recipes and scripts name things that exist."""

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
DOCUMENTS = [README, *(path.read_text() for path in sorted((ROOT / "configs").glob("*.py")))]


def commands():
    """Arguments of every `vit_jax.main` command in README and the recipes' docstrings."""
    for document in DOCUMENTS:
        for line in document.replace("\\\\\n", " ").replace("\\\n", " ").splitlines():
            if "-m vit_jax.main --" in line and "`" not in line:
                yield shlex.split(line.split("-m vit_jax.main ")[1])


def test_there_are_commands():
    assert len(list(commands())) >= 8


@pytest.mark.parametrize("arguments", list(commands()), ids=" ".join)
def test_documented_commands_use_what_exists(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides, rest = cli.split_overrides(arguments)
    for path, text in overrides.items():
        parse_value(path, text)
    for argument in rest:
        if argument.startswith("--config="):
            cli.load_config(argument.removeprefix("--config="))


def test_every_recipe_is_tested_and_in_the_readme():
    files = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert files == {recipe.split(":")[0] for recipe in RECIPES}
    for name in files:
        assert f"configs/{name}" in README


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("script", [".ci/run", "launch/local.sh"])
def test_scripts_are_executable_and_parse(script):
    assert (ROOT / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", ROOT / script], check=True)
