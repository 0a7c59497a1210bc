"""Assembles batches row by row, ahead of the consumer, in threads or in worker processes.

Threads start immediately and share memory, but only one of them runs Python at a time. Processes
(`vit_jax.data.workers`) take two seconds to start and use memory of their own; the batches are the
same.
"""

import collections
import concurrent.futures
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

Batch = dict[str, np.ndarray]

_BATCHES_AHEAD = 2
_CHUNKS_PER_WORKER = 2  # so that one slow image does not leave the other workers idle
_ALIGNMENT = 64  # bytes, with which JAX on a CPU can use an array where it lies


class Example(NamedTuple):
    """One row of a batch; see `vit_jax.training.step` for the batch."""

    image: np.ndarray  # uint8 [H, W, 3]
    label: int
    valid: bool = True
    flip: bool = False
    problem: tuple[str, str] | None = None  # (origin, reason) where it could not be decoded


Maker = Callable[[], Callable[[int], Example]]  # returns a function: position -> example


class Task(NamedTuple):
    """Rows of a batch that one worker fills."""

    size: tuple[int, int]  # (height, width)
    batch_rows: int
    rows: range
    positions: Sequence[int]  # of these rows


class Memory(NamedTuple):
    """The buffer of a batch."""

    array: np.ndarray  # uint8 [bytes]
    slot: object = None  # the crew's own handle


class Crew(Protocol):
    """What fills rows; called from as many threads as there are workers."""

    def memory(self, size: int) -> Memory:
        """A buffer of `size` bytes, which belongs to the caller while it refers to the array."""
        ...

    def fill(self, memory: Memory, task: Task) -> list[tuple[str, str]]:
        """Returns the examples' problems."""
        ...

    def close(self) -> None:
        """Ends what `fill` waits for."""
        ...


class Threads:
    """Rows filled by the thread that asks."""

    def __init__(self, make: Maker):
        self._example = make()

    def memory(self, size: int) -> Memory:
        return Memory(np.empty(size, np.uint8))

    def fill(self, memory: Memory, task: Task) -> list[tuple[str, str]]:
        return fill(memory.array, task, self._example)

    def close(self) -> None:
        pass


def assemble(
    crew: Crew,
    positions: Iterator[Sequence[int]],
    size: tuple[int, int],
    workers: int,
    report: Callable[[str, str], None],
) -> Iterator[Batch]:
    """A batch for every list of positions.

    Args:
      crew: fills the rows; it is closed at the end.
      positions: of the examples of each batch.
      size: (height, width) of the images.
      workers: number of threads that fill rows ahead of the consumer; 0: the consumer's thread.
      report: is called with (origin, reason) of images that could not be decoded; what it raises
        ends the iteration.
    """
    pool = concurrent.futures.ThreadPoolExecutor(
        max(1, workers), thread_name_prefix="decode")  # which starts threads when they are needed

    def run(memory, task):
        for problem in crew.fill(memory, task):
            report(*problem)

    def start(wanted):
        memory = crew.memory(_layout(len(wanted), size)[1])
        rows, futures = range(len(wanted)), []
        chunk = max(1, len(rows) // (workers * _CHUNKS_PER_WORKER or 1))
        for part in (rows[i:i + chunk] for i in range(0, len(rows), chunk)):
            task = Task(size, len(rows), part, wanted[part.start:part.stop])
            if workers:
                futures.append(pool.submit(run, memory, task))
            else:
                run(memory, task)
        return _views(memory.array, len(rows), size), futures

    ahead = _BATCHES_AHEAD if workers else 0
    queue = collections.deque()
    try:
        for wanted in positions:
            queue.append(start(wanted))
            if len(queue) > ahead:
                yield _finish(*queue.popleft())
        while queue:
            yield _finish(*queue.popleft())
    finally:
        if not sys.is_finalizing():  # when threads have ended and modules are taken apart
            pool.shutdown(wait=False, cancel_futures=True)
            crew.close()


def _finish(batch, futures):
    for future in futures:
        future.result()  # raises what the thread raised
    return batch


def fill(
    memory: np.ndarray, task: Task, example: Callable[[int], Example]
) -> list[tuple[str, str]]:
    """Writes a task's rows into its batch's memory, uint8 [bytes]; returns the examples'
    problems."""
    batch = _views(memory, task.batch_rows, task.size)
    problems = []
    for row, position in zip(task.rows, task.positions, strict=True):
        made = example(position)
        batch["image"][row] = made.image
        batch["label"][row] = made.label
        batch["mask"][row] = made.valid
        batch["flip"][row] = made.flip
        if made.problem:
            problems.append(made.problem)
    return problems


def _views(memory, rows, size) -> Batch:
    """A batch's arrays in memory, uint8 [bytes]: image uint8 [rows, H, W, 3], label int32 [rows],
    mask bool [rows], flip bool [rows]."""
    return {
        name: memory[start:start + dtype.itemsize * math.prod(shape)].view(dtype).reshape(shape)
        for name, (start, dtype, shape) in _layout(rows, size)[0].items()}


def _layout(rows, size):
    """{array: (first byte, dtype, shape)} and the number of bytes."""
    fields, end = {}, 0
    for name, dtype, shape in (("image", np.uint8, (rows, *size, 3)), ("label", np.int32, (rows,)),
                               ("mask", np.bool_, (rows,)), ("flip", np.bool_, (rows,))):
        start, dtype = -(-end // _ALIGNMENT) * _ALIGNMENT, np.dtype(dtype)
        fields[name] = start, dtype, shape
        end = start + dtype.itemsize * math.prod(shape)
    return fields, end
