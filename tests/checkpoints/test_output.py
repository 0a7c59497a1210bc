"""Where an export may be written, and what becomes of a name that cannot be."""

import errno
from pathlib import Path

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
    assert "is not an earlier export" in message and "notes.txt.conversion_report.json" in message
    assert "choose another --out" in message
    assert "replace it with --overwrite" in refusal(notes, "npz", False)
    (tmp_path / "notes.txt.conversion_report.json").write_text("{}")
    output.check_out(notes, "npz", True)


@pytest.mark.parametrize("write", [lambda path: path.mkdir(), lambda path: path.write_bytes(b"")],
                         ids=["directory", "file"])
def test_a_name_that_is_too_long(tmp_path, write):
    out = tmp_path / ("x" * 256)
    output.check_out(out, "npz", True)
    with pytest.raises(UserError, match="File name too long"), output.temporary(out) as path:
        write(path)


def test_no_other_file_is_deleted_with_an_earlier_export(tmp_path):
    (tmp_path / "conversion_report.json").write_text("{}")
    output.check_out(tmp_path, "timm", True)
    (tmp_path / ".git").mkdir()
    (tmp_path / "notes.txt").write_text("thesis")
    message = refusal(tmp_path, "timm", True)
    assert "more than an earlier export (.git, notes.txt), which --overwrite would del" in message


def test_an_earlier_export_survives_a_new_one_that_fails(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(UserError, match="cannot be written"), output.temporary(out) as path:
        output.move(path, out)  # nothing was written there
    assert (out / "config.json").read_text() == "old"
    with output.temporary(out) as path:
        path.mkdir()
        (path / "config.json").write_text("new")
        output.move(path, out)
    assert (out / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_export_is_not_removed_if_it_cannot_be_put_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    replace = Path.replace

    def fails(path, target):
        if target == out:
            raise OSError(errno.EIO, "Input/output error")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(UserError, match="cannot be written"), output.temporary(out) as path:
        path.mkdir()
        output.move(path, out)
    (old,) = tmp_path.glob(".out.*.old")
    assert (old / "config.json").read_text() == "old"


def test_a_directory_whose_name_is_too_long(tmp_path):
    assert "is not a directory" in refusal(tmp_path / ("x" * 300) / "out", "timm", False)


def test_a_long_name_of_something_else(tmp_path):
    other = tmp_path / ("x" * 250)
    other.write_text("thesis")
    assert "is not an earlier export" in refusal(other, "npz", True)
