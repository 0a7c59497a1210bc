"""What all commands share: reading a config file and its overrides, and how a command ends.

absl's flags are not used: with them an unknown key or a missing file is a traceback, `--config.x`
must follow `--config`, `1e3` is no integer, and `--help` exits with 1.
"""

import argparse
import contextlib
import difflib
import errno
import inspect
import itertools
import os
import re
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_collections

from vit_jax.buckets import refuse_bucket
from vit_jax.config import from_json, parse_value, set_value
from vit_jax.config_keys import FIELDS
from vit_jax.errors import UserError
from vit_jax.host_memory import keep_freed_memory

# Process 0 exits last: otherwise the others are killed before they can report why they failed.
_LAST_WORDS_SECONDS = 2
EXIT_SAVED = 75  # EX_TEMPFAIL: stopped by SIGTERM after saving; run the same command again


class Stopped(Exception):
    """A signal asked the run to stop, and it has saved."""

    def __init__(self, number: signal.Signals, step: int):
        done = f"after step {step}, which is saved" if step else "before the first step"
        super().__init__(f"Stopped by {number.name} {done}; run the same command to continue.")
        self.exit_code = EXIT_SAVED if number == signal.SIGTERM else 128 + number


def run_command(command: Callable[[list[str]], None]) -> None:
    """Runs `command(arguments)` and exits: 0 only on success, mistakes as a sentence on stderr."""
    sys.stdout.reconfigure(errors="replace")  # file names may be in any encoding
    sys.stderr.reconfigure(errors="replace")
    keep_freed_memory()
    try:
        command(sys.argv[1:])
    except UserError as error:
        _fail(f"error: {error}", 1)
    except Stopped as stop:  # all processes of a run come here together
        _print_last(stop)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:  # whoever read the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        _fail(f"error: The disk is full ({error}); completed files are kept." if full
              else traceback.format_exc(), 1)
    sys.stdout.flush()


def _print_last(message):
    """Prints on stderr, after all of stdout. The exit code matters more than whether somebody still
    reads: a `tee` may have been stopped by the same Ctrl-C."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{message}\n")):
        try:
            stream.write(text)
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(message, code):
    _print_last(message)
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        # The normal way out waits minutes for the other processes, which wait for this one.
        if sys.modules["jax"].process_index() == 0:
            time.sleep(_LAST_WORDS_SECONDS)
        os._exit(code)
    sys.exit(code)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with unabbreviated flags, and errors that are one sentence."""

    def __init__(self, **kwargs):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message):
        raise UserError(f"{message} (see --help)")

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Parses all arguments. An unknown one is an error that names the nearest flag; so are an
        empty value, but of flags that are empty by default, and the address of a bucket."""
        options = {flag: action for action in self._actions for flag in action.option_strings}
        given = arguments[: arguments.index("--") if "--" in arguments else None]
        # Before argparse, which would rather say that the flag that was meant is missing.
        for name in (argument.split("=")[0] for argument in given):
            if name.startswith("--") and name not in options:
                keys = [f"--config.{key}" for key in FIELDS] if "--config" in options else []
                close = difflib.get_close_matches(name, [*options, *keys], n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                self.error(f"unknown argument {name!r}{hint}")
        # An unset variable, as in --workdir=$RUN; as a path it would be the working directory.
        for argument, following in itertools.pairwise([*given, None]):
            flag, equals, value = argument.partition("=")
            empty = not value if equals else following == ""
            if empty and flag in options and options[flag].nargs != 0 and (
                    options[flag].default != ""):
                self.error(f"{flag}= is empty")
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            self.error(f"unknown argument {unknown[0]!r}")
        for action in self._actions:
            value = getattr(known, action.dest, None)
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, (str, Path)):
                    refuse_bucket((action.option_strings or [action.metavar])[-1], str(path))
            if isinstance(value, Path):  # no shell expands the ~ of --out=~/results
                setattr(known, action.dest, Path(os.path.expanduser(value)))
        return known


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns a full disk and the like into a UserError about `--out`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out={folder} cannot be written to: {reason}.") from error


def split_overrides(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Takes `--config.key=value` and `--config.key value` out of the arguments, wherever they are.

    A bare `--config.flag` that no value follows means true.
    """
    overrides, rest = {}, []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            has_value = position < len(arguments) and not arguments[position].startswith("--")
            value = arguments[position] if has_value else "true"
            position += has_value
        overrides[key] = value
    return overrides, rest


def load_config(argument: str) -> ml_collections.ConfigDict:
    """Runs `get_config` of `FILE.py` or `FILE.py:ARGS`; see `call_in_file`. An unknown key or a
    wrong value is a UserError too."""
    return call_in_file(argument, "get_config", ml_collections.ConfigDict, from_json)


def call_in_file(
    argument: str, name: str, kind: type, convert: Callable[[Any], Any] = lambda result: result
) -> Any:
    """Runs the function `name` of `FILE.py` or `FILE.py:ARGS` and returns what it returns, through
    `convert`; ARGS is passed as one string.

    Raises:
      UserError: no such file or function, a result that is no `kind`, or the file's own error with
        its line.
    """
    # The first '.py:' separates, so that arguments and Windows drives may hold colons.
    path, separator, config_argument = argument.partition(".py:")
    file = Path(path + ".py" if separator else path)
    if not file.is_file():
        raise UserError(f"There is no config file {str(file)!r}{_nearest_file(file)}")
    try:
        module = runpy.run_path(str(file))
        if name not in module:
            what = name.removeprefix("get_")
            raise UserError(f"it does not define {name}(), which must return a {what}.")
        arguments = (config_argument,) if separator else ()
        _check_call(module[name], arguments, file)
        result = module[name](*arguments)
        if not isinstance(result, kind):
            raise UserError(f"{name}() returned {type(result).__name__}, not a {kind.__name__}.")
        return convert(result)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except Exception as error:  # the user's own code: any error of it is a mistake in that file
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        line = f", line {frames[-1].lineno}" if frames else ""
        what = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"{file}{line}: {type(error).__name__}: {what}") from error


def _check_call(function, arguments, file):
    signature = inspect.signature(function)
    try:
        signature.bind(*arguments)
    except TypeError:
        given = f"the arguments {arguments[0]!r}" if arguments else "no arguments"
        right = f"{file}" if arguments else f"{file}:ARGS"
        raise UserError(
            f"{function.__name__}{signature} cannot be called with {given}; use --config={right}."
        ) from None


def _nearest_file(file: Path) -> str:
    folders = [folder for folder in (Path("configs"), file.parent) if folder.is_dir()]
    known = {path.name: str(path) for folder in folders for path in sorted(folder.glob("*.py"))
             if path.name != "setup.py"}
    close = difflib.get_close_matches(file.name, known, n=1)
    if close:
        return f"; did you mean {known[close[0]]!r}?"
    here = f"the working directory is {os.getcwd()}"
    return f"; there are {', '.join(known.values())}." if known else f"; {here}."


def apply_overrides(config: ml_collections.ConfigDict, overrides: dict[str, str]) -> None:
    """Sets the command line's values, read as each key's own type."""
    for path, text in overrides.items():
        set_value(config, path, parse_value(path, text))


def add_weights_flags(parser: argparse.ArgumentParser) -> None:
    """`--best` and `--ema`: which weights of a workdir a command takes."""
    parser.add_argument("--best", action="store_true",
                        help="for a workdir: load the checkpoint with the highest accuracy instead "
                        "of the last one")
    parser.add_argument("--ema", action="store_true",
                        help="for a workdir: load the EMA weights (config.ema_decay)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """`--checkpoint`, `--best`, `--ema` and `--image_size`: which model a command loads."""
    parser.add_argument("--checkpoint", metavar="PATH", required=True,
                        help="a file, a directory, a run's workdir, or a name: augreg:B/16")
    add_weights_flags(parser)
    parser.add_argument("--image_size", metavar="N[,M]", help="instead of the checkpoint's: "
                        "pixels per side, or height,width")


def model_options(flags: argparse.Namespace) -> dict[str, Any]:
    """What these flags mean to `load_model`, for models of colour images."""
    size = parse_image_size(flags.image_size) if flags.image_size else None
    return {"channels": 3, "image_size": size, **weights_options(flags)}


def weights_options(flags: argparse.Namespace) -> dict[str, Any]:
    """What these flags mean to `load_model`."""
    return {"checkpoint": "best" if flags.best else "last", "ema": flags.ema}


def parse_shard(text: str) -> tuple[int, int]:
    """`--shard`: '2/8' to (2, 8).

    Raises:
      UserError: anything else, or a part that does not exist.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard={text} is not I/N with I from 0 to N - 1; for example, the two "
                        "parts of N=2 are 0/2 and 1/2.")
    return int(match[1]), int(match[2])


def parse_image_size(text: str) -> tuple[int, int]:
    """`--image_size`: '224', '224,384' or '224x384' to (height, width).

    Raises:
      UserError: anything else.
    """
    match = re.fullmatch(r"(\d+)(?:[,x](\d+))?", text)
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not all(size):
        raise UserError(f"--image_size={text} is neither a number of pixels nor height,width.")
    return size
