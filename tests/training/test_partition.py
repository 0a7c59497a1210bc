"""Which device holds what, on eight simulated ones. Nothing is computed: shapes are enough."""

import math
import re

import jax
import pytest
from jax.sharding import PartitionSpec as P

from vit_jax.config import base_config, validate
from vit_jax.errors import UserError
from vit_jax.models.shapes import params_shapes
from vit_jax.training import parallel, partition
from vit_jax.training.optimizer import make_optimizer, make_schedule
from vit_jax.training.state import build_model, make_init

pytestmark = pytest.mark.core


def configure(mesh=(-1, 1, 1), **settings):
    config = base_config()
    config.total_steps = 10
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    for key, value in settings.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    return validate(config)


def state_specs(config):
    """{path: (shape, spec)} of every leaf of the train state, and the notes."""
    size = (224, 224)
    model = build_model(config, 1000, size)
    optimizer = make_optimizer(config, make_schedule(config, 10), params_shapes(model, size))
    shapes = jax.eval_shape(make_init(model, optimizer, size, 0))
    shardings, notes = partition.state_shardings(shapes, partition.make_mesh(config))
    leaves = jax.tree.leaves_with_path(shapes)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    }, notes


@pytest.mark.parametrize("asked, sizes", [
    ((-1, 1, 1), (8, 1, 1)),
    ((-1, 2, 1), (4, 2, 1)),
    ((-1, 2, 2), (2, 2, 2)),
    ((-1, 8, 1), (1, 8, 1)),
    ((2, 1, 4), (2, 1, 4)),
])
def test_mesh_sizes(asked, sizes):
    mesh = partition.make_mesh(configure(asked))
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    assert partition.batch_shards(mesh) == sizes[0] * sizes[1]


@pytest.mark.parametrize("asked", [(1, 1, 1), (4, 1, 1), (16, 1, 1), (-1, 3, 1), (-1, 16, 1)])
def test_meshes_that_do_not_fit(asked):
    """Devices that are left out would idle without a word."""
    with pytest.raises(UserError, match=r"does not fit 8 devices; choose sizes whose product is 8"):
        partition.make_mesh(configure(asked))


def test_a_mesh_of_some_devices():
    assert partition.make_mesh(configure(), jax.devices()[:3]).size == 3


@pytest.mark.parametrize("batch, asked, parts, nearest", [
    (12, (-1, 1, 1), 1, "8 or 16"),
    (16, (-1, 1, 1), 4, "32"),
    (6, (-1, 2, 2), 1, "4 or 8"),
    (4, (-1, 1, 1), 1, "8"),
])
def test_batches_that_cannot_be_split(batch, asked, parts, nearest):
    config = configure(asked, batch_size=batch, accumulation_steps=parts)
    with pytest.raises(UserError, match=f"size={batch} is not .* nearest that is: {nearest}\\.$"):
        parallel.check_devices(config, partition.make_mesh(config))


@pytest.mark.parametrize("batch, asked, parts", [
    (16, (-1, 1, 1), 2), (4, (-1, 2, 2), 1), (1, (1, 1, 8), 1),
])
def test_batches_that_can_be_split(batch, asked, parts):
    """Devices of the tensor axis share their images, so they do not count."""
    config = configure(asked, batch_size=batch, accumulation_steps=parts)
    parallel.check_devices(config, partition.make_mesh(config))


@pytest.mark.parametrize("parallelism, batch", [("jit", 1), ("pmap", 8)])
def test_a_single_image_has_none_to_be_mixed_with(parallelism, batch):
    mesh = (1, 1, 8) if parallelism == "jit" else (-1, 1, 1)
    for mixing in ({"data__mixup": 0.1}, {"data__cutmix": 1.0}):
        config = configure(mesh, batch_size=batch, parallelism=parallelism, **mixing)
        with pytest.raises(UserError, match="one image per batch .*; raise config.batch_size"):
            parallel.check_devices(config, partition.make_mesh(config))
        config.batch_size = 2 * batch
        parallel.check_devices(config, partition.make_mesh(config))


BLOCK = {
    "LayerNorm_0/scale": P(),
    "LayerNorm_0/bias": P(),
    "LayerNorm_1/scale": P(),
    "LayerNorm_1/bias": P(),
    "MlpBlock_0/Dense_0/kernel": P("fsdp", "tensor"),
    "MlpBlock_0/Dense_0/bias": P("tensor"),
    "MlpBlock_0/Dense_1/kernel": P("tensor", "fsdp"),
    "MlpBlock_0/Dense_1/bias": P(),
    "MultiHeadDotProductAttention_0/out/kernel": P("tensor", None, "fsdp"),
    "MultiHeadDotProductAttention_0/out/bias": P(),
} | {
    f"MultiHeadDotProductAttention_0/{name}/{leaf}": spec
    for name in ("query", "key", "value")
    for leaf, spec in (("kernel", P("fsdp", "tensor", None)), ("bias", P("tensor", None)))
}
OUTSIDE = {
    "cls": P(),
    "embedding/kernel": P(None, None, None, "fsdp"),
    "embedding/bias": P(),
    "Transformer/posembed_input/pos_embedding": P(),
    "Transformer/encoder_norm/scale": P(),
    "Transformer/encoder_norm/bias": P(),
    "head/kernel": P("fsdp", None),
    "head/bias": P(),
}


def expected_spec(path):
    """The whole table once more, by hand; None for a path that it does not have."""
    if match := re.fullmatch(r"Transformer/encoderblock(_\d+)?/(.*)", path):
        spec = BLOCK.get(match[2])
        if match[1] is None and spec:  # stacked blocks: the layer axis is in front
            return P(None, *spec)
        return spec
    if re.search(r"(^conv_root|^block\d/unit\d+/conv(\d|_proj))/kernel$", path):
        return P(None, None, None, "fsdp")
    if re.search(r"(^gn_root|^block\d/unit\d+/gn(\d|_proj))/(scale|bias)$", path):
        return P()
    return OUTSIDE.get(path)


@pytest.mark.parametrize("settings", [
    dict(model__variant="B/16"),
    dict(model__variant="B/16", model__scan_layers=True),
    dict(model__variant="R50+B/16"),
], ids=str)
def test_every_leaf_under_all_three_axes(settings):
    """Parameters by the table, and both moments of Adam exactly as their parameters: a moment
    that stayed whole would take the memory that FSDP is there to save."""
    specs, notes = state_specs(configure((2, 2, 2), **settings))
    assert notes == []
    params = {path.removeprefix("params/"): value for path, value in specs.items()
              if path.startswith("params/")}
    for path, (shape, spec) in params.items():
        assert spec == expected_spec(path), path
        assert len(spec) in (0, len(shape))

    moments = {path: value for path, value in specs.items() if re.search(r"/(mu|nu)/", path)}
    assert len(moments) == 2 * len(params)
    for path, value in moments.items():
        assert value == params[re.sub(r".*/(mu|nu)/", "", path)], path
    rest = set(specs) - set(moments) - {f"params/{path}" for path in params}
    assert rest and all(specs[path] == ((), P()) for path in rest)  # counters

    # In numbers: a device holds little more than a quarter of the Transformer, half of the rest.
    whole = sum(math.prod(shape) for shape, _ in params.values())
    held = sum(math.prod(shape) / 2 ** sum(axis is not None for axis in spec)
               for shape, spec in params.values())
    assert held < 0.4 * whole


@pytest.mark.parametrize("scan", [False, True])
def test_axes_that_do_not_divide_are_said_once(scan):
    """Ti/16 has three heads: with tensor=2 its attention stays whole, its MLP does not."""
    specs, notes = state_specs(configure(
        (-1, 1, 2), model__variant="Ti/16", model__scan_layers=scan))
    block = "params/Transformer/encoderblock" + ("" if scan else "_7")
    front = (None,) if scan else ()
    attention = f"{block}/MultiHeadDotProductAttention_0"
    assert specs[f"{attention}/query/kernel"][1] == P(*front, "fsdp", None, None)
    assert specs[f"{attention}/out/kernel"][1] == P(*front, None, None, "fsdp")
    assert specs[f"{block}/MlpBlock_0/Dense_0/kernel"][1] == P(*front, "fsdp", "tensor")
    # Not for every layer, nor again for the moments: q, k and v with their biases, and out.
    assert len(notes) == len(set(notes)) == 7
    assert ("mesh.tensor=2 does not divide an axis of 3 in MultiHeadDotProductAttention_0/query/"
            "kernel, which stays replicated.") in notes


def test_what_is_not_in_the_encoder_is_said_once_too():
    specs, notes = state_specs(configure(
        (1, 8, 1), model__variant="Ti/16", model__hidden_size=12, model__num_layers=1))
    assert specs["params/head/kernel"][1] == P(None, None)
    assert sum("head/kernel" in note for note in notes) == 1
    assert sum("embedding/kernel" in note for note in notes) == 1
