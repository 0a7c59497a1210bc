"""Files that are replaced as a whole: whoever reads one finds the old or the new, never a half."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from vit_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path, with the same ending, whose file takes the place of `path` at the end of
    the block; of a failure nothing is left.

    Raises:
      UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):  # mostly since it has taken its place
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """The file becomes this text; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text)
