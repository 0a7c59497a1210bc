"""The activations that are saved for the backward pass, derived from the traced program.

`jax.vjp` says which arrays the backward pass needs. A compiler saves fewer: cheap functions of
others (sums, casts and the like) are recomputed inside the operation that reads them. Only where a
loop over the blocks (`scan_layers`) passes arrays from the forward to the backward pass, all of
them are saved. Nothing is computed here, and there is no table of architectures: any model, remat
policy and dtype is traced as it is.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from vit_jax.training.step import LossSum

# Images in the trace. A prime beyond every width in use, so that an array holds one entry or more
# per image exactly if this divides its size; then everything scales with the real number.
_IMAGES = 10007

_PRODUCTS = {"dot_general", "conv_general_dilated"}
# What a compiler does not recompute for a second consumer: reductions, transcendental functions,
# random bits, loops, and data movement other than reshapes.
_COSTLY = _PRODUCTS | {
    "argmax", "cond", "cumsum", "erf", "erf_inv", "exp", "gather", "log", "log1p", "logistic",
    "pow", "random_bits", "random_fold_in", "random_unwrap", "random_wrap", "reduce_max",
    "reduce_min", "reduce_sum", "reduce_window_max", "scan", "scatter", "select_and_scatter_add",
    "shift_right_logical", "sort", "tanh", "threefry2x32", "top_k", "while",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """Kept for the backward pass. `shape` is that of one image, with a leading None, or, without
    it, of an array that all images share (a kernel cast to bfloat16)."""

    shape: tuple[int | None, ...]
    itemsize: int

    @property
    def per_image(self) -> bool:
        return self.shape[:1] == (None,)

    @property
    def bytes(self) -> int:
        """Of one image, or of the shared array."""
        size = self.itemsize
        for axis in self.shape:
            size *= axis or 1
        return size


@dataclasses.dataclass(frozen=True)
class Residuals:
    """What one forward pass leaves for the backward pass.

    Attributes:
      blocks: number of equal Transformer blocks, 0 for a ResNet.
      block: of one block, all that `jax.vjp` keeps; a loop over the blocks stores this.
      block_fused: of one block, what is left when the compiler sees it beside its backward pass.
      outside: of everything else, fused.
    """

    blocks: int
    block: tuple[Array, ...]
    block_fused: tuple[Array, ...]
    outside: tuple[Array, ...]


def residuals(
    model: nn.Module, params: Any, size: tuple[int, int], loss_sum: LossSum
) -> Residuals:
    """Traces forward pass and loss.

    Args:
      model: as `build_model` makes it, with `scan_layers` if it has blocks: then the block is one
        piece of the program, which can be looked at by itself. `scan_unroll` leaves out what a
        model without a loop does: the last block is then counted with everything else.
      params: its parameters' shapes.
      size: (height, width) of the images.
      loss_sum: of this model, as the train step differentiates it.
    """
    batch = {
        "image": jax.ShapeDtypeStruct((_IMAGES, *size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((_IMAGES,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((_IMAGES,), jnp.bool),
    }

    def kept(params, batch):
        _, pull_back = jax.vjp(lambda params: loss_sum(params, batch, jax.random.key(0)), params)
        return jax.tree.leaves(pull_back)

    jaxpr = jax.make_jaxpr(kept)(params, batch).jaxpr
    program = _Program(jaxpr)
    outputs = [program.values[v] for v in jaxpr.outvars if not isinstance(v, Literal)]
    length = getattr(model, "num_layers", 0) - getattr(model, "leaves_out_tokens", False)
    loops = [op for op in program.operations
             if op.name == "scan" and op.equation.params["length"] == length]
    stacked, block, block_fused = set(), [], []
    for loop in loops:
        inside, carried = _loop_body(loop.equation)
        body = inside.jaxpr.outvars[carried:]
        left = []
        for output, variable in zip(loop.outputs[carried:], body, strict=True):
            if output in outputs:
                stacked.add(output)
                if not isinstance(variable, Literal):
                    left.append(inside.values[variable])
        block += dict.fromkeys(left)
        block_fused += inside.kept(left)
    outside = program.kept([v for v in outputs if v not in stacked], stacked)
    return Residuals(length, _arrays(block), _arrays(block_fused), _arrays(outside))


def _loop_body(equation) -> tuple["_Program", int]:
    """One turn of a loop, to which its weights are given, and how many of its results are carried
    to the next; the others are stacked. JAX's versions say this differently, so it is read off the
    axis that stacked arrays have more."""
    body = _body(equation.params)
    carried = sum(outer.aval.ndim == inner.aval.ndim for outer, inner in zip(
        equation.outvars, body.outvars, strict=True))
    whole = sum(outer.aval.ndim == inner.aval.ndim for outer, inner in zip(
        equation.invars, body.invars, strict=True))
    constants = whole - carried
    weights = [*body.invars[:constants], *body.invars[whole:]]
    return _Program(body, given=[*weights, *body.constvars]), carried


def _arrays(values: Iterable["_Value"]) -> tuple[Array, ...]:
    found = []
    for value in values:
        shape = value.aval.shape
        for axis, size in enumerate(shape):
            if size % _IMAGES == 0:
                # Axes that were merged with the images' are a further axis of the image.
                shape = (None, size // _IMAGES, *shape[:axis], *shape[axis + 1:])
                shape = tuple(n for n in shape if n != 1)
                break
        found.append(Array(shape, getattr(value.aval.dtype, "itemsize", 4)))
    return tuple(found)


class _Value:
    """An array of the program; variables of nested programs may be aliases of it."""

    def __init__(self, aval):
        self.aval = aval

    @property
    def bytes(self) -> int:
        return self.aval.size * getattr(self.aval.dtype, "itemsize", 4)


@dataclasses.dataclass(eq=False)
class _Operation:
    name: str
    inputs: list[_Value]
    outputs: list[_Value]
    equation: Any


class _Program:
    """A jaxpr as one flat list of operations, with the bodies of nested calls in place and equal
    operations once, as compilers have it. `given` are the variables that cost nothing to keep."""

    def __init__(self, jaxpr, given=None):
        self.jaxpr = jaxpr
        self.operations: list[_Operation] = []
        self.values = {v: _Value(v.aval) for v in [*jaxpr.constvars, *jaxpr.invars]}
        self._given = {self.values[v] for v in (self.values if given is None else given)}
        self._seen = {}
        self._flatten(jaxpr, self.values)
        self._position = {value: i for i, op in enumerate(self.operations) for value in op.outputs}

    def _flatten(self, jaxpr, values):
        for equation in jaxpr.eqns:
            name, params = equation.primitive.name, equation.params
            inputs = [v if isinstance(v, Literal) else values[v] for v in equation.invars]
            body = _body(params) if name not in ("scan", "while", "cond") else None
            if body is not None:
                inner = {v: _Value(v.aval) for v in body.constvars}
                # A call's first operands may be constants of rules that the body does not have.
                operands = inputs[len(inputs) - len(body.invars):]
                for variable, value in zip(body.invars, operands, strict=True):
                    inner[variable] = (
                        _Value(variable.aval) if isinstance(value, Literal) else value)
                self._flatten(body, inner)
                for out, variable in zip(equation.outvars, body.outvars, strict=True):
                    values[out] = (
                        _Value(out.aval) if isinstance(variable, Literal) else inner[variable])
                continue
            key = (name, str(params), tuple(
                str(v) if isinstance(v, Literal) else id(v) for v in inputs))
            if name in ("scan", "while", "cond") or key not in self._seen:
                outputs = [_Value(v.aval) for v in equation.outvars]
                self._seen[key] = outputs
                arrays = [v for v in inputs if isinstance(v, _Value)]
                self.operations.append(_Operation(name, arrays, outputs, equation))
            else:
                outputs = self._seen[key]
            values.update(zip(equation.outvars, outputs, strict=True))

    def kept(self, wanted: Iterable[_Value], stored: Iterable[_Value] = ()) -> list[_Value]:
        """Which arrays must be kept so that all `wanted` can be had again without costly
        operations, beside what is given or `stored` elsewhere."""
        free = self._given | set(stored)
        operands = {v for op in self.operations if op.name in _PRODUCTS for v in op.inputs}
        wanted = sorted({v for v in wanted if v not in free},
                        key=lambda v: self._position.get(v, -1))
        # Products read whole arrays from memory, so their operands exist in any case.
        kept = dict.fromkeys(v for v in wanted if v in operands)
        here = {self._unshaped(v) for v in operands.intersection(wanted)}

        def follows(value, known):
            if value not in known:
                made_by = self._cheap(value)
                known[value] = value in free or self._unshaped(value) in here or (
                    made_by is not None and all(follows(v, known) for v in made_by.inputs))
            return known[value]

        for value in wanted:
            if not follows(value, {}):
                # Of a chain of casts and reshapes the compiler keeps the smallest.
                while ((made_by := self._cheap(value)) and len(made_by.inputs) == 1
                       and made_by.inputs[0].bytes <= value.bytes
                       and made_by.inputs[0] not in free):
                    value = made_by.inputs[0]
                kept[value] = None
                here.add(self._unshaped(value))
        return list(kept)

    def _unshaped(self, value):
        """The array of which `value` is another view: a reshape moves nothing."""
        while (made_by := self._cheap(value)) and made_by.name == "reshape":
            (value,) = made_by.inputs
        return value

    def _cheap(self, value):
        operation = self.operations[self._position[value]] if value in self._position else None
        return operation if operation and operation.name not in _COSTLY else None


def _body(params):
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params:
            body = params[key]
            return body.jaxpr if isinstance(body, ClosedJaxpr) else body
    return None
