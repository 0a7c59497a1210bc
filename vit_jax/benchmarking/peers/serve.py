"""The peer's end of the conversation in `vit_jax/benchmarking/peer.py`, and the clock of pipelines,
which our side uses too. Imports nothing of ours: the Python that runs it may not have it."""

import json
import sys
import time


def say(**answer):
    print(json.dumps(answer), flush=True)


def reader(stream, read_ahead):
    """Times batches after discarding those that may have been prefetched before the clock started.
    Returns only when prefetching is over, which would slow down whatever is measured next."""
    def run(times):
        for _ in range(read_ahead):
            next(stream)
        begin = time.perf_counter()
        for _ in range(times):
            next(stream)
        seconds = time.perf_counter() - begin
        time.sleep(1.5 * read_ahead * seconds / times)
        return seconds
    return run


def serve(prepare):
    """Calls prepare(kind, task) -> (run, about), then run(times) -> seconds for every line."""
    try:
        run, about = prepare(sys.argv[1], json.loads(sys.argv[2]))
    except ImportError as error:
        say(error=f"{error.name or error} is not installed in this environment; install it, or "
                  "name a Python that has it with --peer_python.")
        sys.exit(1)
    except ValueError as error:
        say(error=str(error))
        sys.exit(1)
    say(ready=about)
    for line in sys.stdin:
        say(seconds=run(json.loads(line)["times"]))
