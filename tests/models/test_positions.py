"""Position embeddings: their formulas, and the places where they are added."""

import functools
import math

import jax
import numpy as np
import pytest
from tiny_models import abstract_params, apply, pixels, random_params, tiny

from vit_jax.models.positions import POSITION_EMBEDDINGS, AddPositionEmbs, sincos_2d
from vit_jax.models.vit import Encoder1DBlock

pytestmark = pytest.mark.core


def test_sincos_2d_against_a_loop():
    height, width, features = 3, 5, 16
    expected = np.zeros((height * width, features))
    for row in range(height):
        for column in range(width):
            for k in range(4):  # features / 4 frequencies from 1 to 1 / 10000
                angles = [position / 10_000 ** (k / 3) for position in (column, row)]
                expected[row * width + column, k::4] = [
                    function(angle) for angle in angles for function in (math.sin, math.cos)
                ]
    np.testing.assert_allclose(sincos_2d(height, width, features), expected, atol=1e-6)


@pytest.mark.parametrize("features", [4, 10])
def test_sincos_2d_refuses_widths_it_cannot_fill(features):
    with pytest.raises(ValueError, match=f"divisible by 4 and at least 8, not {features}"):
        sincos_2d(2, 2, features)


@pytest.mark.parametrize("prefix", [0, 1])
def test_learned_2d_adds_row_and_column(prefix):
    generator = np.random.default_rng(0)
    tokens = generator.standard_normal((2, prefix + 6, 8)).astype(np.float32)
    rows = generator.standard_normal((1, 2, 4)).astype(np.float32)
    columns = generator.standard_normal((1, 3, 4)).astype(np.float32)
    params = {"row_embedding": rows, "column_embedding": columns}
    expected = tokens.copy()
    for row in range(2):
        for column in range(3):
            expected[:, prefix + 3 * row + column, :4] += rows[0, row]
            expected[:, prefix + 3 * row + column, 4:] += columns[0, column]
    got = AddPositionEmbs("learned_2d").apply({"params": params}, tokens, grid=(2, 3))
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("kind", POSITION_EMBEDDINGS)
def test_only_none_is_blind_to_order(kind):
    """Rectangles, and whether gap sees that two patches were exchanged."""
    model = tiny(position_embedding=kind, classifier="gap", num_classes=0)
    images = pixels(height=8, width=12)
    exchanged = images.copy()
    exchanged[:, :4, :4], exchanged[:, 4:, 8:] = images[:, 4:, 8:], images[:, :4, :4]
    params = random_params(model, 8, 12)
    change = abs(apply(model, params, images) - apply(model, params, exchanged)).max()
    assert (change < 1e-5) if kind == "none" else (change > 1e-3)


@pytest.mark.parametrize("kind", ["learned_1d", "learned_2d"])
def test_positions_of_every_layer(kind):
    """The tables one by one: that of the first block acts as one at the stem does, that of another
    block on what comes into that block."""
    images = pixels()
    stem, every = (tiny(position_embedding=kind, position_embedding_at=place, num_classes=0)
                   for place in ("stem", "every_layer"))
    params = random_params(stem, 8, 8)
    table = params["Transformer"]["posembed_input"]
    zeros = jax.tree.map(np.zeros_like, table)

    def with_tables(*tables):
        inside = {name: tree for name, tree in params["Transformer"].items()
                  if name != "posembed_input"}
        for i, positions in enumerate(tables):
            inside[f"encoderblock_{i}"] = inside[f"encoderblock_{i}"] | {
                "posembed_input": positions}
        return params | {"Transformer": inside}

    np.testing.assert_allclose(
        apply(every, with_tables(table, zeros), images), apply(stem, params, images), atol=1e-5)

    @jax.jit
    def tokens(params):
        _, state = every.apply({"params": params}, images, train=False, mutable=["intermediates"])
        inside = state["intermediates"]["Transformer"]
        return [inside[f"encoderblock_{i}"]["tokens"][0] for i in range(2)]

    between, after = tokens(with_tables(zeros, table))
    positioned = AddPositionEmbs(kind).apply({"params": table}, between, grid=(2, 2))
    second = jax.jit(functools.partial(Encoder1DBlock(mlp_dim=24, num_heads=2).apply, train=False))
    weights = {"params": params["Transformer"]["encoderblock_1"]}
    np.testing.assert_allclose(second(weights, positioned), after, atol=1e-5)


@pytest.mark.parametrize("kind", ["learned_1d", "learned_2d", "sincos_2d"])
def test_shared_positions_are_equal_tables_in_every_layer(kind):
    images = pixels()
    shared = tiny(position_embedding=kind, position_embedding_at="every_layer_shared")
    params = random_params(shared, 8, 8)
    inside = dict(params["Transformer"])
    if kind == "sincos_2d":  # has no table: the same values as a learned one
        table = {"pos_embedding": np.pad(sincos_2d(2, 2, 16), ((1, 0), (0, 0)))[None]}
    else:
        table = inside.pop("posembed_input")
    for i in range(2):
        inside[f"encoderblock_{i}"] = inside[f"encoderblock_{i}"] | {"posembed_input": table}
    every = tiny(position_embedding="learned_1d" if kind == "sincos_2d" else kind,
                 position_embedding_at="every_layer")
    np.testing.assert_allclose(
        apply(shared, params, images),
        apply(every, params | {"Transformer": inside}, images), atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(position_embedding="none"), "there is no position embedding"),
        (dict(position_embedding="relative"), "in the attention of every layer already"),
        (dict(position_embedding="sincos_2d"), "same in every layer; use 'every_layer_shared'"),
        (dict(register_tokens=1), "register tokens, which have no position.*use 'stem'"),
    ],
)
def test_places_that_positions_cannot_have_are_refused(options, message):
    with pytest.raises(ValueError, match=f"position_embedding_at='every_layer' .*{message}"):
        abstract_params(tiny(position_embedding_at="every_layer", **options), 8, 8)
