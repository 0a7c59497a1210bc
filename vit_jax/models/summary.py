"""What a model consists of and what it costs: shapes, parameters and FLOPs, without running it."""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from vit_jax.models.shapes import params_shapes


@dataclasses.dataclass(frozen=True)
class Row:
    """A module with everything below it, or a parameter held beside submodules (`cls`).

    Attributes:
      path: names from the model down, separated by '/'.
      output_shape: the module's output for one image, or the parameter's shape.
      parameters: number of scalars.
      flops: forward FLOPs of one image.
    """

    path: str
    output_shape: tuple[int, ...]
    parameters: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """The modules in the order in which they run, and the totals; made by `summarize`.

    Attributes:
      flops: of all modules, each for all of its tokens, as tables of architectures count them.
      needed_flops: without those of tokens that nothing reads, which the model leaves out
        (`VisionTransformer.leaves_out_tokens`).
    """

    image_size: tuple[int, int]
    rows: tuple[Row, ...]
    parameters: int
    flops: int
    needed_flops: int


def summarize(model: nn.Module, image_size: tuple[int, int], channels: int = 3) -> Summary:
    """Traces the forward pass for one image; nothing is computed, so any size takes seconds.

    FLOPs are those of matrix products and convolutions, counted as 2 per multiply-add (padding
    included, so that R50 has its usual 4.1 G multiply-adds). Normalisation, softmax, activations
    and additions are not counted.

    Args:
      model: a model of `create_model`.
      image_size: height and width in pixels.
      channels: of the image.

    Raises:
      ValueError: the image size does not fit the model.
    """
    if getattr(model, "attention_implementation", "xla") != "xla":
        model = model.clone(attention_implementation="xla")  # same products, seen by the tracer
    images = jax.ShapeDtypeStruct((1, *image_size, channels), jnp.float32)
    params = params_shapes(model, image_size, channels)

    shapes = {}  # of every module's output, in the order of the calls

    def record(call, args, kwargs, context):
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        path = context.module.path
        shapes.setdefault(path, None)
        output = call(*args, **kwargs)
        shapes[path] = output.shape
        return output

    def forward(params, images):
        with nn.intercept_methods(record):  # with intermediates, the model skips no tokens
            return model.apply({"params": params}, images, train=False, mutable=["intermediates"])

    jaxpr = jax.make_jaxpr(forward)(params, images).jaxpr

    parameters, flops, rows_of = Counter(), Counter(), {path: [] for path in shapes}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = tuple(key.key for key in keys)
        parameters.update({path[:i]: leaf.size for i in range(len(path))})
        rows_of[path[:-1]].append(Row("/".join(path), leaf.shape, leaf.size, 0))
    for names, count in _products(jaxpr):
        path = ()
        flops[path] += count
        for name in names:  # keep the modules, leave out the class, methods, einsum subscripts
            if (*path, name) in shapes:
                path = (*path, name)
                flops[path] += count

    rows = []
    for path, shape in shapes.items():
        if path and (parameters[path] or flops[path]):
            rows.append(Row("/".join(path), shape, parameters[path], flops[path]))
        if any(path == other[:-1] for other in shapes if other):
            rows.extend(rows_of[path])
    unread = _unread_flops(model, rows) if getattr(model, "leaves_out_tokens", False) else 0
    return Summary(tuple(image_size), tuple(rows), parameters[()], flops[()], flops[()] - unread)


def _unread_flops(model, rows):
    """Those of all tokens but one in the last block, where they are keys and values alone."""
    layers = model.num_layers if model.scan_layers else 1
    block = "Transformer/encoderblock" + ("" if model.scan_layers else f"_{model.num_layers - 1}")
    by_path = {row.path: row for row in rows}
    flops = by_path[block].flops
    for name in ("key", "value"):
        flops -= by_path[f"{block}/MultiHeadDotProductAttention_0/{name}"].flops
    tokens = by_path[f"{block}/LayerNorm_0"].output_shape[0]
    return flops // layers // tokens * (tokens - 1)


def _products(jaxpr: Jaxpr, stack=(), times=1) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yields (name stack, FLOPs) for every matrix product and convolution, nested ones too."""
    for equation in jaxpr.eqns:
        names = (*stack, *str(equation.source_info.name_stack).split("/"))
        primitive, params = equation.primitive.name, equation.params
        if primitive == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            yield names, times * 2 * terms * equation.outvars[0].aval.size
        elif primitive == "conv_general_dilated":
            kernel = equation.invars[1].aval
            terms = kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            yield names, times * 2 * terms * equation.outvars[0].aval.size
        else:
            repeats = times * (params["length"] if primitive == "scan" else 1)
            inner = [list(_products(body, names, repeats)) for body in _bodies(params)]
            if primitive == "cond":  # one branch runs: take the most expensive
                inner = [max(inner, key=lambda products: sum(flops for _, flops in products))]
            yield from itertools.chain(*inner)


def _bodies(params) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def format_summary(summary: Summary, depth: int = 2) -> str:
    """A table of what lies at most `depth` levels down; its lines add up to the totals.

    Equal neighbours share a line: `12 x 7,087,872` is 12 blocks of as many parameters each.
    """
    children = {}
    for row in summary.rows:
        children.setdefault(row.path.rpartition("/")[0], []).append(row)

    def lines(parent, label, level, times):
        for _, group in itertools.groupby(children[parent], key=_likeness):
            first, *others = group
            count = times * (1 + len(others))
            name = label + first.path.rpartition("/")[2]
            if others:
                name += " ... " + re.search(r"\d+$", others[-1].path)[0]
            if level == depth or first.path not in children:
                yield _line(name, first, count)
                continue
            yield from lines(first.path, name + "/", level + 1, count)
            own = first.flops - sum(row.flops for row in children[first.path])
            if own:
                own = dataclasses.replace(first, parameters=0, flops=own)
                yield _line(f"{name} (itself)", own, count)

    table = [("Layer", "Output shape", "Parameters", "FLOPs"), *lines("", "", 1, 1)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = [
        f"{layer:<{widths[0]}}  {shape:<{widths[1]}}  {parameters:>{widths[2]}}  "
        f"{flops:>{widths[3]}}"
        for layer, shape, parameters, flops in table
    ]
    rule = "-" * len(text[0])
    height, width = summary.image_size
    totals = (
        f"Parameters: {summary.parameters:,}\n"
        f"FLOPs for one image of {height}x{width}: {summary.flops:,} "
        f"({_scaled(summary.flops // 2)} multiply-adds)"
    )
    if summary.needed_flops != summary.flops:
        totals += (f"\nActually computed: {summary.needed_flops:,}, since only the class token of "
                   "the last block is read")
    return "\n".join((text[0], rule, *text[1:], rule, totals))


def _likeness(row):
    stem, digits = re.fullmatch(r"(.*?)(\d*)", row.path).groups()
    return stem, bool(digits), row.output_shape, row.parameters, row.flops


def _line(name, row, count):
    prefix = f"{count} x " if count > 1 else ""
    shape = " x ".join(map(str, row.output_shape))
    parameters = f"{prefix}{row.parameters:,}" if row.parameters else "-"
    return name, shape, parameters, f"{prefix}{_scaled(row.flops)}" if row.flops else "-"


def _scaled(number):
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return str(number)
