"""Files that are replaced as a whole."""

import pytest

from vit_jax import atomic
from vit_jax.errors import UserError

pytestmark = pytest.mark.core


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic.replacing(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old" and temporary.suffix == ".txt"
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    atomic.write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name, reason", [
    ("file/a.txt", "Not a directory"), ("none/a.txt", "No such file"), ("folder", "directory"),
    (f"{300 * 'x'}.txt", "File name too long")])
def test_what_cannot_be_written(tmp_path, name, reason):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"cannot be written: .*{reason}"):
        atomic.write_text(tmp_path / name, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
