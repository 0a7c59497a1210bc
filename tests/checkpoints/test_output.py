"""Where an export may be written, and what becomes of a name that cannot be."""

import pytest

from vit_jax.checkpoints import output
from vit_jax.errors import UserError

pytestmark = pytest.mark.core


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        output.check_out(*arguments)
    return str(error.value)


def test_only_an_earlier_npz_is_replaced(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("thesis")
    message = refusal(notes, "npz", True)
    assert "no earlier export" in message and "notes.txt.conversion_report.json" in message
    assert "choose another --out" in message
    assert "replace it with --overwrite" in refusal(notes, "npz", False)
    (tmp_path / "notes.txt.conversion_report.json").write_text("{}")
    output.check_out(notes, "npz", True)


@pytest.mark.parametrize("write", [lambda path: path.mkdir(), lambda path: path.write_bytes(b"")],
                         ids=["directory", "file"])
def test_a_name_that_is_too_long(tmp_path, write):
    out = tmp_path / ("x" * 250)  # with what a temporary name adds
    output.check_out(out, "npz", True)
    with pytest.raises(UserError, match="File name too long"), output.temporary(out) as path:
        write(path)


def test_a_directory_whose_name_is_too_long(tmp_path):
    assert "is no directory" in refusal(tmp_path / ("x" * 300) / "out", "timm", False)


def test_a_long_name_of_something_else(tmp_path):
    other = tmp_path / ("x" * 250)
    other.write_text("thesis")
    assert "no earlier export" in refusal(other, "npz", True)
