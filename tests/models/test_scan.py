"""Loop, scan and rematerialisation: the same function, and one layout turned into the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import equations, named
from tiny_models import abstract_params, pixels, random_params, tiny

from vit_jax.models.scan import stack_blocks, unstack_blocks


def loss_and_gradients(model, params, images):
    def loss(params):
        logits = model.apply({"params": params}, images, train=False)
        return (logits**2).mean(), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits, gradients


def assert_computes(model, params, images, logits, gradients):
    """These logits and gradients, in whichever layout the model has; all trees are unstacked."""
    given = stack_blocks(params) if model.scan_layers else params
    got_logits, got_gradients = loss_and_gradients(model, given, images)
    if model.scan_layers:
        got_gradients = unstack_blocks(got_gradients)
    np.testing.assert_allclose(got_logits, logits, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        got_gradients, gradients,
    )  # fmt: skip


@functools.cache
def reference(**options):
    """(images, params, logits, gradients) of a model with the blocks one by one."""
    model, images = tiny(**options), pixels()
    params = random_params(model, 8, 8)
    return images, params, *loss_and_gradients(model, params, images)


@pytest.mark.core
@pytest.mark.parametrize(
    "scan_layers, remat",
    [(scan, remat) for scan in (False, True) for remat in ("none", "full", "dots", "names")][1:],
)
def test_layouts_and_remat_compute_the_same(scan_layers, remat):
    images, params, logits, gradients = reference()
    model = tiny(scan_layers=scan_layers, remat=remat)
    assert_computes(model, params, images, logits, gradients)


@pytest.mark.parametrize("unroll, remat", [
    (False, "none"), (False, "full"), (True, "none"), (True, "full"), (True, "dots")])
def test_without_the_loop_it_computes_the_same(unroll, remat):
    """And remat computes a second time no less than without scan_layers, as it would if equal
    numbers could be found."""
    images, params, logits, gradients = reference(num_layers=3)
    model = tiny(num_layers=3, scan_layers=True, scan_unroll=unroll, remat=remat)
    assert_computes(model, params, images, logits, gradients)

    def program(model, params):
        def loss(params):
            return model.apply({"params": params}, images, train=False).sum()
        return jax.jit(jax.grad(loss)).lower(params).compile().as_text()

    grouped = program(model, stack_blocks(params))
    assert (" while(" in grouped) != unroll
    if unroll:
        alone = program(tiny(num_layers=3, remat=remat), params)
        assert grouped.count(" exponential(") >= alone.count(" exponential(")


@pytest.mark.core
@pytest.mark.parametrize("place", ["every_layer", "every_layer_shared"])
@pytest.mark.parametrize("scan_layers, remat", [(True, "none"), (False, "full"), (True, "names")])
def test_positions_in_every_layer_are_the_same_in_all_layouts(place, scan_layers, remat):
    images, params, logits, gradients = reference(position_embedding_at=place)
    model = tiny(position_embedding_at=place, scan_layers=scan_layers, remat=remat)
    assert_computes(model, params, images, logits, gradients)


@pytest.mark.core
def test_remat_recomputes_what_it_says():
    """Counted in the matrix products of the gradient of two blocks."""
    images = pixels()

    def products(remat):
        model = tiny(remat=remat)
        params = abstract_params(model, 8, 8)
        gradient = jax.grad(lambda p: model.apply({"params": p}, images, train=False).sum())
        return len(named(equations(gradient, params), "dot_general"))

    none, full, dots, names = (products(remat) for remat in ("none", "full", "dots", "names"))
    # Of the 8 products of a block: query, key, value, logits, heads, out, two dense layers.
    assert dots - none == 2 * 2  # logits and heads
    assert names - none == 2 * 5  # also query, key and value
    assert full - none == 2 * 7  # all but the last, whose result only the next block needs


@pytest.mark.core
@pytest.mark.parametrize("optimizer", [None, optax.adamw(1e-3)], ids=["params", "adamw"])
def test_stacking_round_trip_is_exact(optimizer):
    """Of parameters, and of an optimizer state that holds trees like them."""
    model = tiny(num_layers=11)  # encoderblock_10 must come after encoderblock_2
    tree = abstract_params(model, 8, 8)
    if optimizer:
        tree = jax.eval_shape(optimizer.init, tree)
    generator = np.random.default_rng(0)
    tree = jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape, np.float32), tree)
    stacked = stack_blocks(tree)
    assert any(leaf.shape[:1] == (11,) for leaf in jax.tree.leaves(stacked))
    back = unstack_blocks(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.core
def test_stacked_trees_are_those_of_a_scanned_model():
    """Also in an optimizer state, whose counter has no layers."""
    adamw = optax.adamw(1e-3)
    for make in (lambda params: params, lambda params: jax.eval_shape(adamw.init, params)):
        loop, scan = (make(abstract_params(tiny(scan_layers=s), 8, 8)) for s in (False, True))
        stacked, unstacked = (
            jax.eval_shape(stack_blocks, loop),
            jax.eval_shape(unstack_blocks, scan),
        )
        assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, scan)
        assert jax.tree.map(jnp.shape, unstacked) == jax.tree.map(jnp.shape, loop)


@pytest.mark.core
def test_trees_without_blocks_are_left_alone():
    tree = {"block1": {"unit1": np.ones(2)}, "head": np.zeros(3)}
    for function in (stack_blocks, unstack_blocks):
        assert jax.tree.structure(function(tree)) == jax.tree.structure(tree)
