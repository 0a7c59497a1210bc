"""A workdir belongs to one config: written when a run starts, compared when it goes on."""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections

from vit_jax import atomic
from vit_jax import config as config_lib
from vit_jax.config_keys import RESUMABLE
from vit_jax.errors import UserError
from vit_jax.training import distributed


def claim(workdir: Path, config: ml_collections.ConfigDict) -> list[str]:
    """Creates the workdir with its `config.json`, or checks that it belongs to this config.

    Of several processes only the first one writes, and all return when it has. An existing
    `config.json` is left unchanged until `renew`.

    Returns:
      The differences that a resumed run may have, one `key: old -> new` each.

    Raises:
      UserError: the workdir holds another run, cannot be written, or is not shared.
    """
    path = workdir / "config.json"
    changed = {}
    if path.exists():
        changed = config_lib.differences(config, read_config(workdir))
        _refuse({k: v for k, v in changed.items() if k not in RESUMABLE}, workdir)
    distributed.barrier("config.json was read")
    if not path.exists() and not has_checkpoints(workdir):
        renew(workdir, config)
    distributed.barrier("config.json is written")
    if not path.exists() and not has_checkpoints(workdir):
        raise UserError(
            f"Process {jax.process_index()} does not see {path}, which process 0 wrote; --workdir "
            "must be on a file system that all processes share."
        )
    return list(changed.values())


def renew(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes `config.json`, in the first process. UserError if that cannot be done."""
    if not distributed.is_main():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The workdir {workdir} cannot be written: {error.strerror}; choose "
                        "another --workdir.") from None
    atomic.write_text(workdir / "config.json",
                      json.dumps(config_lib.to_json(config), indent=2) + "\n")


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[None]:
    """Locks an existing workdir against other runs until the block, or this process, ends.

    Raises:
      UserError: there is one.
    """
    if not distributed.is_main():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context((workdir / ".running").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process is training in {workdir}; wait for it, stop it, or "
                            "choose another --workdir.") from None
        except OSError:  # not every file system has locks; where it cannot be written is said later
            pass
        yield


def check_same_run(
    config: ml_collections.ConfigDict, stored: dict[str, Any], workdir: Path
) -> None:
    """Raises UserError unless a run may go on from a checkpoint of the config `stored`."""
    changed = config_lib.differences(config, config_lib.from_json(stored))
    _refuse({k: v for k, v in changed.items() if k not in RESUMABLE}, workdir)


def check_same_model(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Raises UserError unless `config` describes the model that the workdir's run trained."""
    changed = config_lib.differences(config, read_config(workdir))
    _refuse({key: line for key, line in changed.items() if key.startswith("model.")}, workdir)


def _refuse(lines, workdir):
    if lines:
        empty = not has_checkpoints(workdir)
        raise UserError(
            f"The workdir {workdir} belongs to a run with another config:\n  "
            + "\n  ".join(lines.values())
            + "\nUse the old values, or another --workdir"
            + (" (or delete this one: it has no checkpoint yet)." if empty else ".")
        )


def has_checkpoints(workdir: Path) -> bool:
    """Whether there is a checkpoint to continue from, complete or not."""
    return any((workdir / "checkpoints").glob("[0-9]*"))


def read_config(workdir: Path) -> ml_collections.ConfigDict:
    """The config that a workdir was started with.

    Raises:
      UserError: no workdir, or not one of ours.
    """
    path = workdir / "config.json"
    try:
        return config_lib.from_json(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        what = "is not a folder" if workdir.exists() else "does not exist"
        what = "holds no run (no config.json)" if workdir.is_dir() else what
        raise UserError(f"The workdir {workdir} {what}; give the --workdir of a run.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions."
                        ) from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a config of ours: {error}.") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
