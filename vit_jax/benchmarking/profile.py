"""`--profile`: which parts of a model a compiled step spends its time on, by XLA's own trace.

Every operation of the trace is found again in the compiled program, whose instructions carry the
names of the Flax modules and `jax.named_scope`s they come from.
"""

import collections
import dataclasses
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
from jax.profiler import ProfileData

# The first that is found in an instruction's name says whose it is.
_PARTS = (
    ("optimizer", r"/optimizer/"),
    ("loss", r"/loss/|\(loss\)"),
    ("attention: projections", r"/MultiHeadDotProductAttention_\d+/(query|key|value|out)/"),
    ("attention", r"/MultiHeadDotProductAttention_"),
    ("MLP", r"/MlpBlock_"),
    ("LayerNorm", r"/LayerNorm_|/encoder_norm"),
    ("head", r"/head/|/pre_logits/"),
    ("patches and positions", r"/embedding/|/posembed_input/|/cls\b"),
    ("residuals", r"/encoderblock"),
    ("ResNet", r"/conv_root/|/gn_root/|/block\d"),
)
_PRODUCTS = re.compile(r"\b(dot|convolution)\(|custom_call_target=\"__(cublas|cudnn|onednn)|"
                       r"kind=\"__triton_(nested_)?gemm")
_TRACES = 3
_CONTAINER = ("", False)  # of loops and branches: what is in them is in the trace itself
OTHER, NOTHING = "other", "nothing in the trace"


@dataclasses.dataclass(frozen=True)
class Share:
    """Of the time of a step, from 0 to 1.

    Attributes:
      part: of the model or the step.
      total: of this part.
      products: of that, in matrix products and convolutions, with what is fused into them.
    """

    part: str
    total: float
    products: float


def profile(executable: jax.stages.Compiled, call: Callable[[], object]) -> list[Share]:
    """Traces `call()`, which runs the executable once, a few times and returns the shares of the
    fastest, largest first; [] if the traces name no operations, as where a GPU is given many in one
    piece. Operations that run at the same time share it evenly."""
    kinds = _kinds(executable.as_text())
    jax.block_until_ready(call())
    traces = [[event for event in _trace(call) if kinds.get(event[2]) != _CONTAINER]
              for _ in range(_TRACES)]
    if not all(traces):
        return []
    best = min(traces, key=_duration)
    times = _shared_out(best)
    found = collections.defaultdict(lambda: [0.0, 0.0])
    for name, time in times.items():
        part, is_product = (NOTHING, False) if name is None else kinds.get(name, (OTHER, False))
        found[part][0] += time / _duration(best)
        found[part][1] += is_product * time / _duration(best)
    return sorted((Share(part, *shares) for part, shares in found.items()),
                  key=lambda share: -share.total)


Event = tuple[float, float, str]  # begin, end in nanoseconds, name of the instruction


def _trace(call) -> list[Event]:
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = ProfileData.from_file(str(file))
    planes = list(data.planes)
    # Beside an accelerator the host's operations are no more than their launches.
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    with warnings.catch_warnings():  # jaxlib's class of stats has no __module__ on Python 3.12
        warnings.simplefilter("ignore", DeprecationWarning)
        return [(event.start_ns, event.start_ns + event.duration_ns, str(operation))
                for plane in devices or planes for line in plane.lines for event in line.events
                if (operation := dict(event.stats).get("hlo_op"))]


def _duration(events):
    return max(end for _, end, _ in events) - min(begin for begin, _, _ in events)


def _shared_out(events: Iterable[Event]) -> dict[str | None, float]:
    """Nanoseconds of every instruction; under None those in which there was none."""
    edges = sorted(edge for number, (begin, end, _) in enumerate(events)
                   for edge in ((begin, 1, number), (end, 0, number)))
    names, active = [name for _, _, name in events], set()
    times, last = collections.Counter(), edges[0][0]
    for now, begins, number in edges:
        for name in [names[i] for i in active] or [None]:
            times[name] += (now - last) / max(1, len(active))
        last = now
        (active.add if begins else active.discard)(number)
    return times


def _kinds(program: str) -> dict[str, tuple[str, bool]]:
    """By instruction of a compiled program, its part and whether it is a product; of a fusion,
    those of the instructions in it."""
    bodies, kinds, calls = collections.defaultdict(list), {}, {}
    computation = None
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$|(?:ENTRY )?%?([\w.\-]+) \{$", line):
            computation = header[1] or header[2]
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            bodies[computation].append(line)
            called = re.search(r"\b(?:calls|to_apply)=%?([\w.\-]+)", line)
            calls[found[1]] = (line, called[1] if called else None)
    for name, (line, called) in calls.items():
        if re.search(r" (while|conditional|call)\(", line):
            kinds[name] = _CONTAINER
            continue
        lines = [line, *bodies[called]]
        kinds[name] = (_part(lines), any(_PRODUCTS.search(one) for one in lines))
    return kinds


def _part(lines):
    """The one that the first line, the instruction itself, names; or that most of the others do."""
    own, *inner = ([part for part, pattern in _PARTS if re.search(pattern, _name(line))][:1]
                   for line in lines)
    if own:
        return own[0]
    named = collections.Counter(part for found in inner for part in found)
    return named.most_common(1)[0][0] if named else OTHER


def _name(line):
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1] if found else ""
