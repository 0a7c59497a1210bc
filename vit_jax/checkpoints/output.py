"""Writing an export so that nothing half-written ever has its name."""

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import safetensors

from vit_jax.errors import UserError

REPORT = "conversion_report.json"  # which every export has
_OF_EXPORTS = {REPORT, "README.md", "class_names.json", "config.json", "model.safetensors",
               "preprocessor_config.json"}


def check_out(out: Path, target: str, overwrite: bool) -> None:
    """Raises UserError if writing would touch anything but an earlier export."""
    # os.path says no, where pathlib raises, to a name that is too long.
    if not os.path.isdir(out.parent):
        raise UserError(f"{out.parent} is not a directory; create it, or correct --out.")
    if not os.path.lexists(out):
        return
    if target == "npz":
        mark, where = beside(out), f"there is no {beside(out).name} beside it"
        if out.is_dir():
            raise UserError(f"{out} is a directory; --to=npz writes a file: --out=DIR/NAME.npz.")
    elif not out.is_dir():
        raise UserError(f"{out} is a file; --to={target} writes a directory.")
    elif not (names := _names_in(out)):
        return
    else:
        mark, where = out / REPORT, f"it has no {REPORT}"
    if overwrite and not os.path.isfile(mark):
        raise UserError(f"{out} is not an earlier export ({where}), so --overwrite keeps it; "
                        "choose another --out.")
    if overwrite and target != "npz" and (
            others := [name for name in names if name not in _OF_EXPORTS]):
        raise UserError(f"{out} holds more than an earlier export ({', '.join(others[:5])}), which "
                        "--overwrite would delete; move it away, or choose another --out.")
    if not overwrite:
        raise UserError(f"{out} exists; choose another --out, or replace it with --overwrite.")


def _names_in(folder):
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}.") from error


def beside(out: Path) -> Path:
    """The path of an npz's report, which also marks the npz as an export."""
    return out.with_name(f"{out.name}.{REPORT}")


@contextlib.contextmanager
def temporary(out: Path) -> Iterator[Path]:
    """A path beside `out` to write to; what is still there at the end is removed.

    Raises:
      UserError: a file cannot be written.
    """
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=".vit_jax.", suffix=".tmp", dir=out.parent))
        yield folder / out.name
    except OSError as error:
        raise UserError(f"{error.filename or out} cannot be written: {error.strerror or error}."
                        ) from error
    except safetensors.SafetensorError as error:  # its word for a full disk, for example
        raise UserError(f"{out} cannot be written: {error}.") from error
    finally:
        if folder:
            remove(folder)


def move(temporary: Path, final: Path) -> None:
    """Gives what was written its name, in place of an earlier export."""
    if not (final.is_dir() and any(final.iterdir())):
        temporary.replace(final)
        return
    # A directory with contents cannot be replaced. The old one does not go where `temporary` lies,
    # which is removed whatever happens.
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    final.replace(old)
    try:
        temporary.replace(final)
    except OSError:
        old.replace(final)
        raise
    remove(old)


def name_of_failure(out: Path) -> Path:
    """A path beside `out` that does not exist yet: OUT.failed, OUT.failed.2, ..."""
    names = (f"{out.name}.failed{suffix}" for suffix in itertools.chain(
        [""], (f".{i}" for i in itertools.count(2))))
    return next(path for path in map(out.with_name, names) if not os.path.lexists(path))


def remove(path: Path) -> None:
    """Removes a file or a directory, if it exists and lets itself be removed."""
    # An error here, of a name that is too long for example, would hide the one that came before.
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
