"""The peer's end of the conversation in `vit_jax/benchmarking/peer.py`. Imports nothing of ours."""

import json
import sys


def say(**answer):
    print(json.dumps(answer), flush=True)


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
