import errno
import gzip
import http.server
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from vit_jax.checkpoints import download as module
from vit_jax.checkpoints.download import cached_path, download
from vit_jax.errors import UserError

pytestmark = pytest.mark.core

CONTENT = bytes(range(251)) * 4000  # a megabyte; every chunk differs from its neighbours
HALF = 500_000


class Server:
    """Serves one file to whatever address. `plan` holds one dict for each request to come:

    drop: close the connection after so many bytes; ignore_range, ignore_if_range: a server that
    does not know the header; shift, at_most: answer another range than asked; claim: say another
    size; status, headers: of the answer; wait: an event to wait for after half of the file.
    """

    def __init__(self):
        self.content, self.headers = CONTENT, {"ETag": '"one"'}
        self.plan, self.requests = [], []  # requests: the headers of each so far
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._http.serve_forever, args=(0.01,)).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/models/ViT-B_16.npz"

    @property
    def ranges(self):
        return [headers["Range"] for headers in self.requests]

    def close(self):
        self._http.shutdown()
        self._http.server_close()

    def _handler(server):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.headers)
                server.answer(self, **(server.plan.pop(0) if server.plan else {}))

            def log_message(self, *args):
                pass

        return Handler

    def answer(self, handler, drop=None, ignore_range=False, ignore_if_range=False, shift=0,
               at_most=None, claim=None, status=None, headers=(), wait=None):
        content, start = self.content, 0
        size = claim or len(content)
        answer_headers = self.headers | dict(headers)
        versions = (None, self.headers.get("ETag"), self.headers.get("Last-Modified"))
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"] or "")
        if wanted and not ignore_range and (
            ignore_if_range or handler.headers["If-Range"] in versions
        ):
            start = int(wanted[1]) - shift
            content = content[:start + at_most] if at_most else content
            answer_headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{size}"
            status = status or (206 if start < len(content) else 416)
        body = content[start:] if status in (None, 200, 206) else b""
        handler.send_response(status or 200)
        if "Content-Length" not in answer_headers:
            answer_headers["Content-Length"] = str(claim or len(body))
        for key, value in answer_headers.items():
            if value is not None:
                handler.send_header(key, value)
        handler.end_headers()
        if drop is not None:
            body = body[:drop]
        if wait is not None:
            handler.wfile.write(body[:HALF])
            wait.wait(10)
            body = body[HALF:]
        try:
            handler.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # the client was killed
            pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "BACKOFF", 0.01)
    server = Server()
    yield server
    server.close()


def assert_downloaded(path, content=CONTENT):
    """The file is there, and nothing else."""
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def interrupted_download(server, **plan):
    """Leaves the first half of the file behind, as a killed process would."""
    server.plan = [{"drop": HALF}, {"status": 404}]
    with pytest.raises(UserError):
        download(server.url)
    server.plan, server.requests = [plan], []
    part = Path(f"{cached_path(server.url)}.part")
    assert part.stat().st_size > HALF - 2 * module.CHUNK
    return part.stat().st_size


def test_once_over_the_network(server, capsys):
    path = download(server.url)
    assert path == cached_path(server.url)
    assert_downloaded(path)
    server.close()
    server.plan = [{"status": 500}] * 9
    assert download(server.url) == path
    assert server.ranges == [None]


def test_a_server_that_does_not_tell_the_size(server):
    server.plan = [{"headers": {"Content-Length": None}}]
    assert_downloaded(download(server.url))


def test_the_path_mirrors_the_address(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    host = tmp_path / "storage.googleapis.com"
    folder = "https://storage.googleapis.com/vit_models/"
    assert cached_path(folder + "sam/B.npz") == host / "vit_models/sam/B.npz"
    assert cached_path(folder + "i%2Bj/R50%2BB.npz") == host / "vit_models/i+j/R50+B.npz"
    assert cached_path("http://LOCALHOST:80/B.npz", tmp_path / "x") == (
        tmp_path / "x/localhost_80/B.npz")
    one, two = (cached_path(folder + f"B.npz?generation={i}") for i in (1, 2))
    assert one != two and one.name.endswith("-B.npz")
    monkeypatch.delenv("VIT_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cached_path("http://h/f") == tmp_path / ".cache/vit_jax/h/f"


@pytest.mark.parametrize("url", [
    "", "B/16", "file:///etc/passwd", "ftp://host/file", "gs://vit_models/file", "http://host",
    "http://host/", "http://host/folder/", "http:///file", "http://host:port/file", "http://[/file",
    "http://host/../file", "http://host/a/%2e%2e/%2e%2e/file", "http://host/..%2Ffile",
    "http://host/a%5C..%5Cfile", "http://host/C:/file", "http://host/a%00b",
])
def test_only_addresses_of_files(url):
    with pytest.raises(UserError, match="is not the http.s. address of a file"):
        download(url)


def test_resumes_a_dropped_connection(server):
    server.plan = [{"drop": 200_000}, {"drop": 300_000}, {"status": 503}]
    assert_downloaded(download(server.url))
    offsets = [int(r.removeprefix("bytes=").removesuffix("-")) for r in server.ranges[1:]]
    assert offsets[0] > 100_000 and offsets[1] > offsets[0] + 200_000 and offsets[2] == offsets[1]


def test_resumes_an_earlier_download(server):
    offset = interrupted_download(server)
    assert_downloaded(download(server.url))
    assert server.ranges == [f"bytes={offset}-"]
    assert server.requests[0]["If-Range"] == '"one"'
    assert server.requests[0]["Accept-Encoding"] == "identity"


def test_by_date_where_there_is_no_strong_etag(server):
    server.headers = {"ETag": 'W/"one"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    offset = interrupted_download(server)
    assert_downloaded(download(server.url))
    assert server.ranges == [f"bytes={offset}-"]
    assert server.requests[0]["If-Range"] == server.headers["Last-Modified"]


def test_resumes_as_long_as_something_arrives(server):
    server.plan = [{"drop": 150_000}] * 10
    assert_downloaded(download(server.url))
    assert len(server.ranges) > module.ATTEMPTS


def test_resumes_when_the_network_is_back(server, monkeypatch):
    get, addresses = requests.get, [server.url, "http://127.0.0.1:9/", server.url]  # 9: no server
    monkeypatch.setattr(requests, "get", lambda url, **options: get(addresses.pop(), **options))
    server.plan = [{"drop": HALF}]
    assert_downloaded(download(server.url))
    assert not addresses and len(server.ranges) == 2


def test_ranges_shorter_than_asked_for(server):
    interrupted_download(server, at_most=1000)
    assert_downloaded(download(server.url))
    assert len(server.ranges) == 2 and server.ranges[1].startswith("bytes=")


def test_what_was_compressed_on_the_way(server):
    server.content, server.headers = gzip.compress(CONTENT), {"Content-Encoding": "gzip"}
    assert_downloaded(download(server.url))


def test_starts_over_where_versions_have_no_name(server):
    server.headers = {}
    server.plan = [{"drop": HALF}]
    assert_downloaded(download(server.url))
    assert server.ranges == [None, None]


def test_starts_over_where_the_server_ignores_range(server):
    interrupted_download(server, ignore_range=True)
    assert_downloaded(download(server.url))


@pytest.mark.parametrize("change", ["version", "size", "both"])
@pytest.mark.parametrize("ignore_if_range", [False, True])
def test_a_changed_file_is_not_glued_to_the_old_half(server, change, ignore_if_range):
    interrupted_download(server, ignore_if_range=ignore_if_range)
    server.content = CONTENT[::-1] if change == "version" else CONTENT[:0:-1]
    if change != "size":
        server.headers = {"ETag": '"two"'}
    elif not ignore_if_range:
        server.headers = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    assert_downloaded(download(server.url), server.content)


def test_a_file_that_is_shorter_now(server):
    interrupted_download(server, ignore_if_range=True)
    server.content, server.headers = CONTENT[:1000], {"ETag": '"two"'}
    assert_downloaded(download(server.url), CONTENT[:1000])


@pytest.mark.parametrize("at_most", [None, 1000])
def test_another_range_than_asked_for(server, at_most):
    interrupted_download(server, shift=1000, at_most=at_most)
    assert_downloaded(download(server.url))
    assert len(server.ranges) == 2 and server.ranges[1] is None


def test_a_file_that_grew_beyond_its_old_end(server):
    offset = interrupted_download(server)
    server.plan = [{"ignore_if_range": True, "at_most": len(CONTENT) - offset}]
    server.content = CONTENT[::-1] + bytes(1000)
    assert_downloaded(download(server.url), server.content)


def test_killed_between_the_last_byte_and_the_rename(server):
    interrupted_download(server)
    Path(f"{cached_path(server.url)}.part").write_bytes(CONTENT)
    assert_downloaded(download(server.url))
    assert not server.ranges


@pytest.mark.parametrize("notes", ["", "[]", "{}", '{"version": "x", "size": null}'])
def test_a_part_of_unknown_origin_is_not_continued(server, notes):
    interrupted_download(server)
    Path(f"{cached_path(server.url)}.part.json").write_text(notes)
    assert_downloaded(download(server.url))
    assert server.ranges == [None]


def test_gives_up_when_nothing_new_arrives(server):
    server.plan = [{"drop": HALF}] + [{"drop": 0}] * 20
    with pytest.raises(UserError, match="was interrupted 5 times in a row") as error:
        download(server.url)
    assert len(server.ranges) == module.ATTEMPTS
    assert server.url in str(error.value) and str(cached_path(server.url)) in str(error.value)
    assert not cached_path(server.url).exists()


def test_a_server_that_lies_about_the_size(server):
    server.plan = [{"claim": len(CONTENT) + 1000}] * 20
    with pytest.raises(UserError, match="was interrupted"):
        download(server.url)
    assert not cached_path(server.url).exists()


@pytest.mark.parametrize("plan, problem", [
    (dict(status=404), "does not exist .*404"),
    (dict(status=403), "is not public .*403"),
    (dict(status=418), "cannot be downloaded .*418"),
    (dict(headers={"Content-Type": "text/html; charset=utf-8"}), "a web page"),
    (dict(status=302, headers={"Location": "file:///etc/passwd"}), "cannot be downloaded .*file:"),
    (dict(status=302, headers={"Location": "ftp://127.0.0.1/file"}),
     "cannot be downloaded .*ftp:"),
    (dict(status=302, headers={"Location": "/models/ViT-B_16.npz"}),
     "cannot be downloaded .*redirects"),
])
def test_refusals_are_final_and_say_where_to_put_the_file(server, plan, problem):
    server.plan = [plan] * 40
    with pytest.raises(UserError, match=problem) as error:
        download(server.url)
    assert server.url in str(error.value) and str(cached_path(server.url)) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(server.ranges) == 1 or "redirects" in problem


def test_busy_servers_are_asked_again(server):
    server.plan = [{"status": 503}, {"status": 429}, {"drop": 0}]
    assert_downloaded(download(server.url))


def test_redirects_are_followed(server):
    there = server.url.replace("models", "mirror")
    server.plan = [{"status": 301, "headers": {"Location": there}}]
    assert_downloaded(download(server.url))
    assert cached_path(server.url).exists()


def test_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/vit_models/sam/ViT-B_16.npz"
        start = time.monotonic()
        with pytest.raises(UserError, match="cannot be reached .Connection refused.") as error:
            download(url, cache_dir=tmp_path)
        assert time.monotonic() - start < 1
    message = str(error.value)
    assert url in message and "\n" not in message
    path = Path(re.search(r"save it as (.*)\.$", message)[1])
    path.write_bytes(b"by hand")
    assert download(url, cache_dir=tmp_path) == path


def test_wrong_host(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")

    def unknown(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match="cannot be reached .Name or service not known."):
        download("https://storage.invalid/file.npz", cache_dir=tmp_path)


def test_no_space(server, monkeypatch):
    free = shutil.disk_usage("/")._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: free)
        with pytest.raises(UserError, match="more than are free") as error:
            download(server.url)
        assert str(cached_path(server.url)) in str(error.value)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device; .*VIT_JAX_CACHE"):
            download(server.url)
    assert_downloaded(download(server.url))


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be saved .*Not a directory.* VIT_JAX_CACHE"):
        download(server.url, cache_dir=tmp_path / "file")
    with pytest.raises(UserError, match="cannot be saved .*name too long"):
        download(server.url + "x" * 300)


def no_locks(*_):
    raise OSError(errno.ENOSYS, "as of Lustre without the option flock")


@pytest.mark.parametrize("has_locks", [True, False])
def test_two_at_once(server, monkeypatch, has_locks, capsys):
    if not has_locks:
        monkeypatch.setattr(module.fcntl, "flock", no_locks)
    both = threading.Event()
    server.plan = [{"wait": both}] * 2
    with ThreadPoolExecutor(2) as pool:
        paths = [pool.submit(download, server.url, progress=has_locks) for _ in range(2)]
        deadline = time.monotonic() + 10
        while "waiting" not in capsys.readouterr().err and len(server.ranges) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        both.set()
    assert paths[0].result() == paths[1].result()
    assert_downloaded(paths[0].result())
    assert len(server.ranges) == (1 if has_locks else 2)


# SIGINT is ignored, and that inherited, where the tests run in a shell's background.
COMMAND = """
import signal, sys
from vit_jax.checkpoints.download import download
signal.signal(signal.SIGINT, signal.default_int_handler)
download(sys.argv[1])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_is_continued(server, number):
    never = threading.Event()
    server.plan = [{"wait": never}]
    part = Path(f"{cached_path(server.url)}.part")
    with subprocess.Popen([sys.executable, "-c", COMMAND, server.url], stderr=subprocess.PIPE,
                          text=True) as process:
        while not part.exists() or part.stat().st_size < HALF // 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        errors = process.communicate(timeout=10)[1]
    never.set()
    assert process.returncode == -number
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    assert not cached_path(server.url).exists()
    assert_downloaded(download(server.url))
    assert server.ranges[1].startswith("bytes=") and server.ranges[1] != "bytes=0-"


def test_a_line_every_tenth(server, capsys):
    download(server.url)
    lines = capsys.readouterr().err.splitlines()
    assert 8 <= len(lines) <= 11
    assert re.fullmatch(r"ViT-B_16.npz: 100% of 1.0 MiB, [\d.]+ MiB/s", lines[-1])
    assert all("\r" not in line for line in lines)


def test_one_line_on_a_terminal(server, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    clock = itertools.count(0, 0.1)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    download(server.url)
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.endswith("\n") and text.count("\r") > 3


def test_silent(server, capsys):
    server.plan = [{"drop": HALF}]
    download(server.url, progress=False)
    assert capsys.readouterr().err == ""
