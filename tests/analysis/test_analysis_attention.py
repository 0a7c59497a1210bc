"""Rollout and distances against cases that can be computed by hand."""

import math

import numpy as np
import pytest

from vit_jax.analysis.attention import (
    attention_maps,
    mean_distances,
    rollout,
    rollout_maps,
    uniform_distance,
)
from vit_jax.analysis.record import Recording

GRID, STRIDE = (3, 4), 16
PATCHES = 12


def recording(attention, prefix=0, class_token=None):
    """Of weights [..., N, N], for L = B = H = 1 where they have no such axes."""
    attention = np.asarray(attention, np.float32)
    attention = attention.reshape((1,) * (5 - attention.ndim) + attention.shape)
    class_token = prefix > 0 if class_token is None else class_token
    assert attention.shape[-1] == prefix + PATCHES
    return Recording(attention, None, GRID, STRIDE, class_token)


def random_attention(*shape, seed=0):
    weights = np.random.default_rng(seed).random((*shape, shape[-1])) ** 4
    return weights / weights.sum(-1, keepdims=True)


def looks_right(target_at_border):
    """[12, 12]: every patch looks at its right neighbour, at the border at `target(patch)`."""
    weights = np.zeros((PATCHES, PATCHES))
    for patch in range(PATCHES):
        at_border = patch % GRID[1] == GRID[1] - 1
        weights[patch, target_at_border(patch) if at_border else patch + 1] = 1
    return weights


# --- Rollout ---------------------------------------------------------------------------------


def test_rollout_of_uniform_attention():
    """(I + J) / 2 with the projection J = 1/N to the power L is J + 2^-L (I - J)."""
    n, layers = 5, 3
    uniform = np.full((layers, 2, 4, n, n), 1 / n)
    mean = np.full((n, n), 1 / n)
    expected = mean + 0.5**layers * (np.eye(n) - mean)
    np.testing.assert_allclose(rollout(uniform), [expected] * 2, rtol=1e-6)


def test_rollout_of_identity_attention():
    identity = np.broadcast_to(np.eye(5), (4, 1, 2, 5, 5))
    np.testing.assert_allclose(rollout(identity)[0], np.eye(5), atol=1e-7)


def test_rollout_of_two_layers_that_pass_on():
    """Token 0 looks at 1 in the last layer, 1 at 2 in the first: an order that matters."""
    first, last = np.eye(3), np.eye(3)
    first[1] = last[0] = 0
    first[1, 2] = last[0, 1] = 1
    flow = rollout(np.stack([first, last])[:, None, None])[0]
    np.testing.assert_allclose(flow, [[0.5, 0.25, 0.25], [0, 0.5, 0.5], [0, 0, 1]])


def test_rollout_against_a_loop():
    """Over images and layers, with explicit renormalisation as in the paper's code."""
    attention = random_attention(3, 2, 4, 6)
    for image in range(2):
        flow = np.eye(6)
        for layer in range(3):
            weights = sum(attention[layer, image, head] for head in range(4)) / 4 + np.eye(6)
            flow = weights / weights.sum(-1, keepdims=True) @ flow
        np.testing.assert_allclose(rollout(attention.astype(np.float32))[image], flow, atol=1e-6)


def test_maps_of_the_class_token():
    attention = random_attention(2, 3, 2, 14)  # a class token and a register
    seen = recording(attention, prefix=2)
    assert attention_maps(seen).shape == (2, 3, 2, *GRID)
    np.testing.assert_allclose(
        attention_maps(seen)[1, 2, 0, 2, 3], attention[1, 2, 0, 0, 2 + 2 * 4 + 3], rtol=1e-6)
    flow = rollout(seen.attention)
    np.testing.assert_allclose(rollout_maps(seen)[1, 1, 2], flow[1, 0, 2 + 1 * 4 + 2], rtol=1e-6)


def test_maps_without_a_class_token():
    """What all patches look at; registers are not asked."""
    attention = random_attention(2, 1, 2, 13)
    seen = recording(attention, prefix=1, class_token=False)
    expected = np.mean([attention[0, 0, 1, 1 + q, 1 + 1 * 4 + 2] for q in range(12)])
    np.testing.assert_allclose(attention_maps(seen)[0, 0, 1, 1, 2], expected, rtol=1e-6)


# --- Distance --------------------------------------------------------------------------------


def test_distance_of_uniform_attention():
    """The mean distance of two patches, one of them a neighbour 16 pixels away and so on."""
    places = [(row, column) for row in range(GRID[0]) for column in range(GRID[1])]
    expected = np.mean([STRIDE * math.dist(a, b) for a in places for b in places])
    got = mean_distances(recording(np.full((PATCHES, PATCHES), 1 / PATCHES)))
    assert got.shape == (1, 1, 1)
    assert got.item() == pytest.approx(expected, rel=1e-6)
    assert uniform_distance(GRID, STRIDE) == pytest.approx(expected)


def test_distance_of_identity_attention():
    assert mean_distances(recording(np.eye(PATCHES))).item() == 0


@pytest.mark.parametrize("at_border, border_distance", [
    (lambda patch: patch, 0), (lambda patch: patch - 3, 3 * STRIDE)], ids=["stays", "wraps"])
def test_distance_of_a_head_that_looks_right(at_border, border_distance):
    """One patch for three columns of four, at the border what the head does there."""
    got = mean_distances(recording(looks_right(at_border))).item()
    assert got == pytest.approx((3 * STRIDE + border_distance) / 4)


def test_tokens_without_a_place_do_not_count():
    """A class token and a register that look far away, and get nine tenths of all weights."""
    weights = np.zeros((14, 14))
    weights[:2, -1] = 1
    weights[2:, 2:] = 0.1 * looks_right(lambda patch: patch)
    weights[2:, :2] = 0.45
    assert mean_distances(recording(weights, prefix=2)).item() == pytest.approx(STRIDE * 3 / 4)


def test_distance_is_zero_where_no_patch_is_looked_at():
    weights = np.zeros((13, 13))
    weights[:, 0] = 1
    assert mean_distances(recording(weights, prefix=1)).item() == 0


def test_distances_of_layers_images_and_heads():
    attention = random_attention(2, 3, 2, 13)
    got = mean_distances(recording(attention, prefix=1))
    assert got.shape == (2, 3, 2)
    alone = mean_distances(recording(attention[1, 2, 0], prefix=1))
    assert got[1, 2, 0] == pytest.approx(alone.item(), rel=1e-6)
    total = 0
    for q in range(PATCHES):
        row = attention[1, 2, 0, 1 + q, 1:]
        total += sum(row[k] * STRIDE * math.dist(divmod(q, 4), divmod(k, 4)) for k in range(12)
                     ) / row.sum()
    assert alone.item() == pytest.approx(total / PATCHES, rel=1e-5)
