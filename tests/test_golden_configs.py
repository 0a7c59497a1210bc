"""Every recipe's settings, against copies in golden/: no setting changes unseen.

`golden/base.txt` holds the base config, `golden/RECIPE.txt` what the recipe changes in it, one
`key=value` a line, a section for every argument. After a change that is meant:

    python tests/test_golden_configs.py --update
"""

import difflib
import sys
from pathlib import Path

import pytest
from recipes import CONFIGS, RECIPES

from vit_jax.cli import load_config
from vit_jax.config import base_config, flatten, validate

pytestmark = pytest.mark.core
GOLDEN = Path(__file__).parent / "golden"
UPDATE = "python tests/test_golden_configs.py --update"
NAMES = ["base", *dict.fromkeys(recipe.split(".py")[0] for recipe in RECIPES)]


def lines(settings):
    return "".join(f"{key}={value!r}\n" for key, value in settings.items())


def golden_text(name):
    """What golden/{name}.txt should hold."""
    base = flatten(base_config())
    if name == "base":
        return lines(base)
    sections = []
    for recipe in RECIPES:
        if recipe.split(".py")[0] == name:
            settings = flatten(validate(load_config(f"{CONFIGS}/{recipe}")))
            changed = {key: value for key, value in settings.items() if value != base[key]}
            sections.append(f"[{recipe}]\n{lines(changed)}")
    return "\n".join(sections)


def difference(name, stored, current):
    """The lines that differ, each below the argument it belongs to, and what to do."""
    stored, current = stored.splitlines(), current.splitlines()
    shown, heading = [], None
    for line in difflib.unified_diff(stored, current, f"golden/{name}.txt", f"configs/{name}.py",
                                     lineterm="", n=len(stored)):
        if line.startswith(" ["):
            heading = line
        elif line.startswith(("-", "+")):
            shown += [heading, line] if heading else [line]
            heading = None
    return "\n".join([*shown, f"If this is meant: {UPDATE}"])


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_those_on_record(name):
    path = GOLDEN / f"{name}.txt"
    assert path.exists(), f"{path.name} is missing: {UPDATE}"
    stored, current = path.read_text(), golden_text(name)
    assert stored == current, "\n" + difference(name, stored, current)


def test_nothing_else_is_on_record():
    assert {path.stem for path in GOLDEN.glob("*")} == set(NAMES)


def test_a_change_is_told_with_its_argument():
    current = golden_text("pretrain_i1k")
    head, section, rest = current.partition("[pretrain_i1k.py:S/16,90]\n")
    stored = head + section + rest.replace("epochs=90.0", "epochs=100.0", 1)
    assert difference("pretrain_i1k", stored, current).splitlines() == [
        "--- golden/pretrain_i1k.txt", "+++ configs/pretrain_i1k.py",
        " [pretrain_i1k.py:S/16,90]", "-epochs=100.0", "+epochs=90.0",
        f"If this is meant: {UPDATE}"]


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(f"usage: {UPDATE}")
    for stale in GOLDEN.glob("*"):
        stale.unlink()
    for name in NAMES:
        (GOLDEN / f"{name}.txt").write_text(golden_text(name))
