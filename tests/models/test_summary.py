"""Shapes, parameters and FLOPs of a model that is never run."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jaxprs import equations, named
from tiny_models import abstract_params, tiny

from vit_jax.models.summary import format_summary, summarize
from vit_jax.models.variants import create_model


@pytest.mark.parametrize(
    "name, size, layers, tokens, width, published",
    [
        ("S/16", 224, 12, 197, 384, 4.61),
        ("B/16", 224, 12, 197, 768, 17.58),
        ("B/16", 384, 12, 577, 768, 55.54),
        ("L/16", 224, 24, 197, 1024, 61.60),
        ("H/14", 224, 32, 257, 1280, 167.40),
    ],
)
def test_multiply_adds_are_the_published_ones(name, size, layers, tokens, width, published):
    """timm's table of giga-multiply-adds counts 5 for every element of a LayerNorm, we do not."""
    flops = summarize(create_model(name, num_classes=1000), (size, size)).flops
    normalisation = 5 * (2 * layers + 1) * tokens * width
    assert (flops / 2 + normalisation) / 1e9 == pytest.approx(published, abs=0.006)


@pytest.mark.parametrize("options", [
    dict(), dict(num_layers=1), dict(classifier="gap"), dict(position_embedding="relative"),
    dict(register_tokens=3, representation_size=7), dict(num_classes=0),
], ids=str)
def test_needed_flops_are_those_of_the_program(options):
    model = tiny(**options)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    products = named(equations(lambda params, images: model.apply(
        {"params": params}, images, train=False), abstract_params(model, 8, 8), images),
        "dot_general")
    expected = 0
    for product in products:
        (axes, _), _ = product.params["dimension_numbers"]
        terms = math.prod(product.invars[0].aval.shape[axis] for axis in axes)
        expected += 2 * terms * product.outvars[0].aval.size
    summary = summarize(model, (8, 8))
    assert summary.needed_flops == expected
    assert (expected < summary.flops) == (model.classifier == "token")


def test_resnet50_has_its_usual_cost():
    summary = summarize(create_model("R50x1", num_classes=1000), (224, 224))
    assert summary.flops == 2 * 4_089_184_256


def test_every_product_of_a_block_is_counted():
    """In closed form for one block: N tokens of width D, MLP of width M, C classes."""
    n, d, m, c = 5, 16, 24, 5
    images, patches = 8 * 8 * 3, n - 1
    embedding = images // patches * patches * d
    block = 4 * n * d * d + 2 * n * n * d + 2 * n * d * m
    assert summarize(tiny(num_layers=1), (8, 8)).flops == 2 * (embedding + block + d * c)


@pytest.mark.parametrize(
    "options",
    [
        dict(scan_layers=True),
        dict(scan_layers=True, scan_unroll=True),
        dict(remat="full"),
        dict(remat="dots", scan_layers=True),
        dict(attention_implementation="cudnn", dtype="bfloat16"),
    ],
    ids=str,
)
def test_totals_do_not_depend_on_how_it_is_run(options):
    plain = summarize(tiny(), (8, 8))
    other = summarize(tiny(**options), (8, 8))
    assert (other.parameters, other.flops) == (plain.parameters, plain.flops)
    loop = options.get("scan_layers") and not options.get("scan_unroll")
    assert other.needed_flops == (plain.flops if loop else plain.needed_flops)
    by_path = {row.path: row for row in other.rows}
    for row in plain.rows:
        if "encoderblock" not in row.path:
            assert by_path[row.path] == row
    if "scan_layers" in options:
        (one,) = (row for row in plain.rows if row.path == "Transformer/encoderblock_0")
        both = by_path["Transformer/encoderblock"]
        assert (both.parameters, both.flops) == (2 * one.parameters, 2 * one.flops)


@pytest.mark.parametrize(
    "model, size, least, most",
    [
        (tiny(hidden_size=128, mlp_dim=512, patch_size=8), 32, 1.0, 1.04),
        (create_model("R50x1", num_classes=10, stages=(1, 1)), 32, 0.9, 1.1),
    ],
    ids=["transformer", "resnet"],
)
def test_the_compiler_counts_alike(model, size, least, most):
    """XLA also counts additions, normalisation and softmax, 2 % of the transformer. Of the
    convolutions it leaves out the products with padding, which our convention includes."""
    params = abstract_params(model, size, size)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)

    def forward(params, images):
        return model.apply({"params": params}, images, train=False)

    by_xla = jax.jit(forward).lower(params, images).compile().cost_analysis()["flops"]
    assert least <= by_xla / summarize(model, (size, size)).needed_flops <= most


@pytest.mark.parametrize("name", ["B/16", "R50+B/16", "R50x1"])
def test_lines_of_the_table_add_up(name):
    options = {} if name == "R50x1" else dict(num_layers=2)
    summary = summarize(create_model(name, num_classes=10, **options), (64, 64))
    tables = [format_summary(summary, depth=depth).splitlines() for depth in (1, 2, 3, 9)]
    assert len(tables[0]) < len(tables[1]) < len(tables[2])
    for lines in tables:
        start, end = (i for i, line in enumerate(lines) if set(line) == {"-"})
        parameters = 0
        for line in lines[start + 1 : end]:
            cell = re.split(r"\s{2,}", line)[2]
            if cell != "-":
                times, _, each = cell.rpartition(" x ")
                parameters += int(times or 1) * int(each.replace(",", ""))
        assert parameters == summary.parameters


def test_table_of_b16():
    summary = summarize(create_model("B/16", num_classes=1000), (224, 224))
    assert (
        format_summary(summary)
        == """\
Layer                              Output shape           Parameters        FLOPs
---------------------------------------------------------------------------------
cls                                1 x 1 x 768                   768            -
embedding                          1 x 14 x 14 x 768         590,592     231.21 M
Transformer/posembed_input         1 x 197 x 768             151,296            -
Transformer/encoderblock_0 ... 11  1 x 197 x 768      12 x 7,087,872  12 x 2.91 G
Transformer/encoder_norm           1 x 197 x 768               1,536            -
head                               1 x 1000                  769,000       1.54 M
---------------------------------------------------------------------------------
Parameters: 86,567,656
FLOPs for one image of 224x224: 35,127,656,448 (17.56 G multiply-adds)
Actually computed: 32,696,930,304, since only the class token of the last block is read"""
    )


def test_table_of_a_hybrid_fits_a_terminal():
    model = create_model("R50+L/32", num_classes=21_843, num_layers=11)
    summary = summarize(model, (384, 384))
    lines = format_summary(summary).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("block3/unit") for line in lines) == 2  # the first, and 2 ... 6
    assert any(line.startswith("Transformer/encoderblock_0 ... 10 ") for line in lines)


def test_image_size_must_fit():
    with pytest.raises(ValueError, match="225x224 is not divisible"):
        summarize(create_model("B/16", num_classes=1), (225, 224))
