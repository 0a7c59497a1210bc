"""`download`: one file over HTTP into the cache, whole or not at all.

While `NAME` is downloaded there stand beside it `NAME.part`, the bytes so far; `NAME.part.json`,
what the server said about the whole; and `NAME.lock`, which keeps two processes apart. An
interrupted download continues where it stopped (RFC 9110, section 14: Range, If-Range and
Content-Range), but only if the server names the file's version, and still the same; else it starts
over.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import requests
from urllib3 import exceptions as urllib3_errors

from vit_jax.errors import UserError

ATTEMPTS = 5  # in a row that bring nothing new
BACKOFF = 1.0  # seconds before the second of them; doubles with each
TIMEOUT = (10, 60)  # seconds to connect, and to wait for the next bytes
CHUNK = 1 << 16
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_UNREACHABLE = (
    urllib3_errors.NewConnectionError, urllib3_errors.ConnectTimeoutError,
    urllib3_errors.ProxyError, urllib3_errors.SSLError,
)


class _Failed(Exception):
    """What happened, as the rest of a sentence that begins with the address."""


class _Interrupted(_Failed):
    """Worth another attempt."""


class _Description(NamedTuple):
    """What the server says about the whole file; None where it does not."""

    version: str | None  # a strong ETag, else Last-Modified
    size: int | None


def cached_path(url: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """Where `download` puts `url`: its host and path under the cache directory, which is
    `cache_dir`, else `$VIT_JAX_CACHE`, else `~/.cache/vit_jax`.

    A query string adds its hash to the file name. The path is absolute; nothing is created.

    Raises:
      UserError: not an http(s) address of a file.
    """
    try:
        address = urlsplit(url)
        host = address.hostname + (f"_{address.port}" if address.port else "")
        folders = [unquote(part) for part in address.path.split("/") if part]
    except (ValueError, TypeError):  # a bad port or IPv6 address; no host at all
        folders = []
    if (
        not folders or address.scheme not in ("http", "https") or address.path.endswith("/")
        or any(part in (".", "..") or re.search(r"[/\\:\0]", part) for part in folders)
    ):
        raise UserError(f"{url!r} is not the http(s) address of a file.")
    if address.query:
        folders[-1] = hashlib.sha256(address.query.encode()).hexdigest()[:12] + "-" + folders[-1]
    root = cache_dir or os.environ.get("VIT_JAX_CACHE") or "~/.cache/vit_jax"
    return Path(os.path.abspath(os.path.expanduser(root)), host.replace(":", "_"), *folders)


def download(
    url: str,
    *,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> Path:
    """Downloads a file once; later calls find it in the cache without the network.

    Several processes may ask for the same file: one downloads, the others wait for it. A broken
    connection is resumed, with growing pauses while nothing new arrives; whatever else ends the
    download (Ctrl-C, SIGKILL), the next call resumes it.

    Args:
      url: http(s) address; redirects are followed, to http(s) only.
      cache_dir: see `cached_path`.
      progress: show it on stderr: one line that moves on a terminal, else a line every tenth.

    Returns:
      `cached_path(url, cache_dir)`, complete.

    Raises:
      UserError: offline, refused, not found, wrong size, no space, ...; the message gives the
        address, and the path where the file can be put by hand.
    """
    target = cached_path(url, cache_dir)
    try:
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked_part(target, progress) as part:
                if not target.is_file():  # while this process waited for another
                    _fetch(url, part, _Progress(target.name, progress))
                    os.replace(part, target)
                _description_file(part).unlink(missing_ok=True)
            Path(f"{target}.lock").unlink(missing_ok=True)
    except _Failed as error:
        raise UserError(f"{url} {error}; to provide it yourself, save it as {target}.") from None
    except OSError as error:
        raise UserError(
            f"{url} cannot be saved as {target}: {error.strerror or error}; make room, set "
            "VIT_JAX_CACHE to another directory, or put the file there by hand."
        ) from None
    return target


@contextlib.contextmanager
def _locked_part(target: Path, verbose: bool) -> Iterator[Path]:
    """The partial file, for this process alone. Where the file system has no locks it gets a name
    of its own, and cannot be resumed."""
    with open(f"{target}.lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if verbose:
                print(f"{target.name}: waiting for the process that downloads it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # Lustre without the option flock, for one
            part = Path(f"{target}.{uuid.uuid4().hex}.part")
            try:
                yield part
            finally:
                part.unlink(missing_ok=True)
                _description_file(part).unlink(missing_ok=True)
            return
        yield Path(f"{target}.part")


def _description_file(part: Path) -> Path:
    return Path(f"{part}.json")


def _resumable(part: Path) -> tuple[int, _Description | None]:
    """How many bytes are there, and of what; (0, None) where they cannot be continued."""
    try:
        whole = _Description(**json.loads(_description_file(part).read_text()))
        offset = part.stat().st_size
        return (offset, whole) if whole.version and 0 < offset <= whole.size else (0, None)
    except (OSError, ValueError, TypeError):  # absent, not ours, or without a size
        return 0, None


def _fetch(url, part, progress):
    """Fills `part`, in as many attempts as it takes while they bring something new."""
    start = furthest = _resumable(part)[0]
    failures = 0
    while True:
        try:
            return _attempt(url, part, progress)
        except (_Interrupted, requests.ConnectionError, requests.Timeout,
                requests.exceptions.ChunkedEncodingError) as error:
            *_, cause = causes = list(_causes(error))
            reason = getattr(cause, "strerror", None) or str(cause)
            offset = _resumable(part)[0]
            if offset <= start and any(isinstance(cause, _UNREACHABLE) for cause in causes):
                raise _Failed(f"cannot be reached ({reason})") from None
            failures = 1 if offset > furthest else failures + 1
            furthest = max(furthest, offset)
            if failures == ATTEMPTS:
                raise _Failed(f"was interrupted {ATTEMPTS} times in a row ({reason})") from None
        except requests.RequestException as error:  # a redirect to file://, or around in circles
            raise _Failed(f"cannot be downloaded ({error})") from None
        finally:
            progress.end_line()
        time.sleep(BACKOFF * 2 ** (failures - 1))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """From what requests raised down to the operating system's error."""
    while error is not None:
        yield error
        inner = (getattr(error, "reason", None), error.__cause__, *error.args)
        error = next((cause for cause in inner if isinstance(cause, BaseException)), None)


def _attempt(url, part, progress):
    """One request, for all of the file or for what is missing of it."""
    offset, whole = _resumable(part)
    if whole and offset == whole.size:  # killed between the last byte and the rename
        return
    headers = {"Accept-Encoding": "identity"}
    if whole:
        headers |= {"Range": f"bytes={offset}-", "If-Range": whole.version}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        resumed = response.status_code == 206
        if response.status_code == 416 or resumed and not _continues(response, offset, whole):
            _description_file(part).unlink(missing_ok=True)  # so the next attempt starts over
            raise _Interrupted("has changed on the server")
        _check_answer(response, part)
        if not resumed:
            offset, whole = 0, _described(response)
        missing = (whole.size or 0) - offset
        if shutil.disk_usage(part.parent).free < missing:
            raise _Failed(f"needs {missing} bytes, more than are free in {part.parent}")
        with open(part, "ab" if resumed else "wb") as file:
            if not resumed:
                _description_file(part).write_text(json.dumps(whole._asdict()))
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                offset += len(chunk)
                progress.show(offset, whole.size)
            file.flush()
            os.fsync(file.fileno())
    if whole.size not in (None, offset):
        raise _Interrupted(f"{offset} bytes of {whole.size}")


def _check_answer(response, part):
    status, reason = response.status_code, response.reason
    if status in _BUSY:
        raise _Interrupted(f"{status} {reason}")
    if status not in (200, 206):
        problem = {401: "is not public", 403: "is not public", 404: "does not exist",
                   410: "no longer exists"}.get(status, "cannot be downloaded")
        raise _Failed(f"{problem} (the server answers {status} {reason})")
    is_page = response.headers.get("Content-Type", "").startswith("text/html")
    if is_page and ".htm" not in part.name:
        raise _Failed("returns a web page (from a proxy, or a login page?) instead of the file")


def _described(response) -> _Description:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":  # against our wish: length and version are not those of the file
        return _Description(None, None)
    version = response.headers.get("ETag", "W/")
    if version.startswith("W/"):  # a weak ETag may name different bytes
        version = response.headers.get("Last-Modified")
    length = response.headers.get("Content-Length", "")
    return _Description(version, int(length) if length.isdigit() else None)


def _continues(response, offset: int, whole: _Description | None) -> bool:
    """Whether a 206 is what was asked for. Servers that do not know If-Range send the rest of any
    version; then the version gives it away, or the size."""
    rest = _described(response)
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    return (
        None not in (whole, found, rest.size) and rest.version in (None, whole.version)
        and (int(found[1]), int(found[2])) == (offset, whole.size)
    )


class _Progress:
    """What is shown on stderr meanwhile."""

    def __init__(self, name: str, enabled: bool):
        self._name, self._enabled = name, enabled
        self._moves = sys.stderr.isatty()
        self._first = None  # (seconds, bytes) when this process began
        self._next = 0  # when to show again: seconds on a terminal, else bytes

    def show(self, done: int, size: int | None):
        now = time.monotonic()
        self._first = self._first or (now, done)
        if not self._enabled or (now if self._moves else done) < self._next and done != size:
            return
        step = (size or 2**30) / 10
        self._next = now + 0.2 if self._moves else (done // step + 1) * step
        speed = max(done - self._first[1], 0) / max(now - self._first[0], 1e-3) / 2**20
        amount = f"{done / size:4.0%} of {size / 2**20:.1f}" if size else f"{done / 2**20:.1f}"
        start, end = ("\r", "\x1b[K") if self._moves else ("", "\n")
        print(f"{start}{self._name}: {amount} MiB, {speed:.1f} MiB/s", end=end, file=sys.stderr,
              flush=True)

    def end_line(self):
        """Lets what is printed next begin on a line of its own."""
        if self._enabled and self._moves and self._first:
            print(file=sys.stderr)
