"""Worker processes that fill rows of batches, for data whose decoding would make the threads of one
process contend for Python's global interpreter lock.

This process cannot fork, since JAX runs threads in it. It starts one helper, which imports once
what decoding needs and then forks the workers. A worker talks to one thread of this process over a
socket and writes to memory that both share. Workers and helper exit when their socket is closed, so
none of them outlives this process, however it ends; until then they ignore SIGINT and SIGTERM,
which a terminal or scheduler sends to all processes but which only this one must handle.
"""

import atexit
import contextlib
import functools
import itertools
import mmap
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler, recv_handle, send_handle

import numpy as np

from vit_jax.data import assembly
from vit_jax.data.records import allow_open_files
from vit_jax.errors import UserError

AVAILABLE = hasattr(os, "memfd_create")  # Linux

_HELPER = ("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
           "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
           "from vit_jax.data import workers; workers.serve({})")
_WITHOUT = "--config.data.worker_kind=thread uses threads instead."
_FEWER = "use fewer (--config.data.workers)"


class Processes:
    """A crew of processes; see `assembly.Crew`."""

    def __init__(self, make: assembly.Maker, count: int):
        """`make` is pickled, and called in every process.

        Raises:
          UserError: it cannot be pickled, or so many processes cannot be started.
        """
        try:
            already = len(os.listdir("/proc/self/fd"))
            allow_open_files(already + count, f"decoding in {count} processes", _FEWER)
            self._helper = _helper()
            self._connections = self._helper.fork(make, count)
        except OSError as error:
            raise UserError(f"{count} decoding processes cannot be started "
                            f"({error.strerror or error}); {_FEWER}.") from error
        self._idle = queue.SimpleQueue()
        for connection in self._connections:
            self._idle.put((connection, set()))
        self._closed = False
        self._free = []  # memory that no batch is in
        self._numbers = itertools.count()

    def memory(self, size: int) -> assembly.Memory:
        slot = next((slot for slot in self._free if len(slot.map) == size), None)
        if slot:
            self._free.remove(slot)
        else:
            slot = _Slot(next(self._numbers), size)
        # Views refer to this array and not to what it is made of, so it lives as long as they do.
        array = np.frombuffer(slot.map, np.uint8)
        weakref.finalize(array, self._free.append, slot).atexit = False
        return assembly.Memory(array, slot)

    def fill(self, memory: assembly.Memory, task: assembly.Task) -> list[tuple[str, str]]:
        connection, known = worker = self._idle.get()
        slot = memory.slot
        try:
            connection.send((slot.number, None if slot.number in known else len(slot.map), task))
            if slot.number not in known:
                send_handle(connection, slot.file, None)  # by which it finds the memory
                known.add(slot.number)
            problems, mistake, trace = connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            if self._closed:
                raise
            self._helper.check()
            raise UserError(
                "a decoding process has died; most likely the system killed it because it ran out "
                "of memory. Use fewer workers (--config.data.workers) or smaller batches; "
                f"{_WITHOUT}"
            ) from error
        finally:
            self._idle.put(worker)
        if mistake:
            raise UserError(mistake)
        if trace:
            raise RuntimeError(f"in a decoding process:\n{trace}")
        return problems

    def close(self) -> None:
        self._closed = True
        for connection in self._connections:
            # Not `close`: a thread may be waiting in `recv`, which `shutdown` makes end with EOF.
            end = socket.socket(fileno=connection.fileno())
            end.shutdown(socket.SHUT_RDWR)
            end.detach()


class _Slot:
    """Memory shared with other processes. It has no name that would be left behind by a crash."""

    def __init__(self, number: int, size: int):
        self.number = number
        self.file = os.memfd_create("vit_jax batch")
        weakref.finalize(self, os.close, self.file).atexit = False
        os.ftruncate(self.file, size)
        self.map = mmap.mmap(self.file, size)


def _search_path() -> list[str]:
    """sys.path without entries that are not strings (such as a Path), which Python ignores too."""
    return [entry for entry in sys.path if isinstance(entry, str)]


class _Helper:
    """The process that forks workers."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(_search_path()),  # so that it finds this package
            "OPENBLAS_NUM_THREADS": "1",  # it can only fork safely while it has no threads
            "JAX_PLATFORMS": "cpu",
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _HELPER.format(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()

    def fork(self, make, count):
        """Connections to so many new workers; UserError where `make` cannot be pickled."""
        try:
            pickled = ForkingPickler.dumps(make)
        except Exception as error:
            raise _not_shared(error) from error
        ours = []
        try:
            with self._lock:
                self._connection.send((count, _search_path()))
                for _ in range(count):
                    end, theirs = socket.socketpair()
                    ours.append(end)
                    with theirs:
                        send_handle(self._connection, theirs.fileno(), None)
                self._connection.send_bytes(pickled)
        except BaseException as error:
            for end in ours:
                end.close()
            if isinstance(error, OSError):
                self.check()
            self.close()  # it would read the next request as the rest of this one
            raise
        return [Connection(end.detach()) for end in ours]

    def check(self):
        """Raises UserError if it has exited, or is just exiting."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=1)
            raise UserError("the helper process that starts the decoding processes has exited with "
                            f"code {code}; {_WITHOUT}")

    @property
    def alive(self):
        return self._process.poll() is None

    def close(self):
        self._process.kill()
        self._process.wait()


_lock = threading.Lock()
_current: _Helper | None = None


def _helper() -> _Helper:
    global _current
    with _lock:
        if not _current or not _current.alive:
            _current = _Helper()
            atexit.register(_current.close)
        return _current


def _not_shared(error):
    return UserError(f"the data source cannot be sent to other processes ({error}); define its "
                     f"class in a module that they can import. {_WITHOUT}")


# --- In the helper and its workers -----------------------------------------------------------


def serve(socket_number: int) -> None:
    """Forks workers on request, until the socket is closed."""
    import vit_jax.data.pipeline  # noqa: F401 - once, for all

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # data sets may be in many files
    requests = Connection(socket_number)
    while True:
        try:
            count, sys.path[:] = requests.recv()
            sockets = [recv_handle(requests) for _ in range(count)]
            pickled = requests.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            make = ForkingPickler.loads(pickled)
        except Exception as error:
            make = functools.partial(_fail, _not_shared(error))
        for number in sockets:
            if not os.fork():
                requests.close()
                for other in sockets:
                    if other != number:
                        os.close(other)
                try:
                    _work(Connection(number), make)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
        for number in sockets:
            os.close(number)
        del make, pickled


def _fail(error):
    raise error


def _work(connection, make):
    """Fills rows until the connection ends."""
    example, memory = None, {}
    while True:
        problems, mistake, trace = [], None, None
        try:
            number, size, task = connection.recv()
            file = recv_handle(connection) if size else None
        except (EOFError, ConnectionResetError):
            return
        if size:
            memory[number] = np.frombuffer(mmap.mmap(file, size), np.uint8)
            os.close(file)
        try:
            if example is None:
                example = make()
            problems = assembly.fill(memory[number], task, example)
        except UserError as error:
            mistake = str(error)
        except Exception:
            trace = traceback.format_exc()
        try:
            connection.send((problems, mistake, trace))
        except BrokenPipeError:
            return
