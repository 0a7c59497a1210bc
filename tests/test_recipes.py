"""Every recipe, made tiny, on eight devices: what it asks for runs, and runs without a warning."""

import json
import math
import re

import jax
import pytest
from recipes import CONFIGS, RECIPES

from vit_jax import train as train_module
from vit_jax.cli import load_config
from vit_jax.config import flatten, image_size, validate
from vit_jax.data.builtin import Synthetic
from vit_jax.data.pipeline import BadImages, train_batches
from vit_jax.errors import UserError
from vit_jax.models.shapes import params_shapes
from vit_jax.models.variants import VARIANTS, create_model
from vit_jax.models.vit import VisionTransformer, check_image_size
from vit_jax.training.optimizer import make_optimizer, make_schedule
from vit_jax.training.state import build_model, make_init
from vit_jax.training.step import make_train_step
from vit_jax.training.stop import StopSignal
from vit_jax.training.task import make_task_loss


def load(recipe):
    return load_config(f"{CONFIGS}/{recipe}")


def stages(variant):
    """Bottlenecks per stage of a ResNet or of a hybrid's stem; None for plain patches."""
    fields = VARIANTS[variant][1]
    return fields.get("stages", fields.get("resnet_stages"))


def stand_in(variant):
    """The first variant of the same kind: Ti/16 for plain patches, R50x1 for the ResNets, and for
    hybrids one whose stem has as many stages."""
    def kind(name):
        return VARIANTS[name][0], None if stages(name) is None else len(stages(name))

    return next(name for name in VARIANTS if kind(name) == kind(variant))


def shrink(config):
    """Keeps what a recipe does, and makes everything small that it does it to."""
    config.model.variant = stand_in(config.model.variant)
    if VARIANTS[config.model.variant][0] is VisionTransformer:
        config.model.hidden_size = 16
        config.model.mlp_dim = 32
        config.model.num_heads = 2
        config.model.num_layers = 2
        if config.model.representation_size:
            config.model.representation_size = 16
    if stages(config.model.variant) is None:
        config.model.patch_size = 4
        config.data.image_size = 8
    else:
        config.data.image_size = 32  # the largest stride
    config.init = None
    config.data.source = "synthetic"
    config.data.train_split = config.data.eval_split = None
    config.data.workers = 0
    config.total_steps, config.epochs = 2, None
    config.schedule.warmup_steps = min(config.schedule.warmup_steps, 1)
    config.batch_size = config.eval_batch_size = 16
    config.log_every = 1
    config.eval_every = config.checkpoint_every = 0  # at the end
    return validate(config)


def program(config):
    """What the steps of a tiny config consist of: of numbers only whether they are there."""
    return tuple(
        (key, bool(value) if isinstance(value, (float, tuple)) else value)
        for key, value in flatten(config).items())


def covering(programs):
    """Recipes that together have every value that any setting takes."""
    chosen, seen = [], set()
    for settings, recipe in programs.items():
        if not seen.issuperset(settings):
            chosen.append(recipe)
            seen.update(settings)
    return chosen


# Recipes that differ in numbers or sizes alone would run the same program again.
PROGRAMS = {}
for _recipe in RECIPES:
    PROGRAMS.setdefault(program(shrink(load(_recipe))), _recipe)
# A step takes ten seconds to compile. So all are run by `pytest -m slow`, some are traced always,
# and two are always run: one with all of AugReg's augmentation, and a looped one with dropout.
RUN = ["pretrain_i1k.py:S/32,augreg", "pretrain_paper.py:L/32-i21k-30ep"]


@pytest.fixture
def tiny(monkeypatch):
    """One bottleneck a stage, which is no key of a config; few images."""
    for name, (module, fields) in VARIANTS.items():
        if stages(name) is not None:
            key = "stages" if "stages" in fields else "resnet_stages"
            monkeypatch.setitem(
                VARIANTS, name, (module, fields | {key: (1,) * len(stages(name))}))
    monkeypatch.setattr(Synthetic, "_LENGTHS", {"train": 32, "test": 16})


@pytest.mark.parametrize("recipe", covering(PROGRAMS))
def test_the_step_can_be_traced(recipe, tiny):
    """With a batch from the pipeline."""
    config = shrink(load(recipe))
    size = image_size(config)
    source = Synthetic(size).open("train")
    batch = next(train_batches(source, config, size, BadImages("error")))
    model = build_model(config, len(source.class_names), size)
    schedule = make_schedule(config, config.total_steps)
    optimizer = make_optimizer(config, schedule, params_shapes(model, size))
    state = jax.eval_shape(make_init(model, optimizer, size, config.seed))
    step = make_train_step(make_task_loss(model, config), optimizer, schedule, config)
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(str, after) == jax.tree.map(str, state)  # shapes and types stay
    assert metrics["loss"].dtype == "float32"


@pytest.mark.parametrize("recipe", [
    pytest.param(recipe, marks=[] if recipe in RUN else [pytest.mark.slow])
    for recipe in PROGRAMS.values()])
def test_two_steps(recipe, tiny, tmp_path):
    with StopSignal() as stop:
        train_module.train(shrink(load(recipe)), tmp_path, stop)
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["train/loss"] for entry in entries if "train/loss" in entry]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert entries[-1]["eval/images"] == 16


def test_what_always_runs_is_there():
    assert set(RUN) <= set(PROGRAMS.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_sizes_fit_each_other(recipe):
    """At full size, which nothing above builds."""
    config = load(recipe)
    overrides = {key: value for key, value in config.model.items()
                 if key != "variant" and value is not None}
    model = create_model(config.model.variant, num_classes=1000, **overrides)
    if isinstance(model, VisionTransformer):
        check_image_size(image_size(config), model.patch_pixels)
        assert model.representation_size in (None, model.hidden_size)
        assert model.hidden_size % model.num_heads == 0


# As printed in the paper (arXiv 2010.11929, appendix B.1).
TABLE_3 = """
ViT-B/{16,32}      JFT-300M     7     8e-4  linear  0.1   0.0
ViT-L/32           JFT-300M     7     6e-4  linear  0.1   0.0
ViT-L/16           JFT-300M     7/14  4e-4  linear  0.1   0.0
ViT-H/14           JFT-300M     14    3e-4  linear  0.1   0.0
R50x{1,2}          JFT-300M     7     1e-3  linear  0.1   0.0
R101x1             JFT-300M     7     8e-4  linear  0.1   0.0
R152x{1,2}         JFT-300M     7     6e-4  linear  0.1   0.0
R50+ViT-B/{16,32}  JFT-300M     7     8e-4  linear  0.1   0.0
R50+ViT-L/32       JFT-300M     7     2e-4  linear  0.1   0.0
R50+ViT-L/16       JFT-300M     7/14  4e-4  linear  0.1   0.0
ViT-B/{16,32}      ImageNet-21k 90    1e-3  linear  0.03  0.1
ViT-L/{16,32}      ImageNet-21k 30/90 1e-3  linear  0.03  0.1
ViT-{B/16,B/32,L/16,L/32,H/14} ImageNet 300 3e-3 cosine 0.3 0.1
"""
DATA = {"JFT-300M": "jft", "ImageNet-21k": "i21k", "ImageNet": "i1k"}


def test_table_3_of_the_paper():
    seen = 0
    for line in TABLE_3.split("\n")[1:-1]:
        models, data, all_epochs, rate, decay, weight_decay, dropout = line.split()
        before, choices, after = re.fullmatch(r"([^{]*)\{?([^{}]*)\}?(.*)", models).groups()
        for choice in choices.split(","):
            model = (before + choice + after).replace("ViT-", "")
            for epochs in all_epochs.split("/"):
                seen += 1
                config = load(f"pretrain_paper.py:{model}-{DATA[data]}-{epochs}ep,folder:/data/x")
                assert config.model.variant == model
                assert config.epochs == float(epochs)
                assert config.optimizer.learning_rate == float(rate)
                assert config.schedule.name == decay
                assert config.optimizer.weight_decay == float(weight_decay)
                assert (config.model.dropout_rate or 0.0) == float(dropout)
                assert config.optimizer.clip_norm == (1.0 if data == "ImageNet" else None)
                assert (config.batch_size, config.schedule.warmup_steps) == (4096, 10_000)
    assert seen == 27


@pytest.mark.parametrize("recipe", ["pretrain_i1k.py:S/16,90", "pretrain_i1k.py:B/16,augreg",
                                    "pretrain_i21k.py:B/16"])
def test_weight_decay_is_that_of_big_vision(recipe):
    """Its configs say 1e-4 of the weights an update, at the peak of the schedule."""
    optimizer = load(recipe).optimizer
    assert optimizer.learning_rate * optimizer.weight_decay == pytest.approx(1e-4)


@pytest.mark.parametrize("recipe, message", [
    ("pretrain_i1k.py", "name a model and a recipe: --config=configs/pretrain_i1k.py:S/16,90"),
    ("pretrain_i1k.py:S/16", "name a model and a recipe"),
    ("pretrain_i1k.py:S/61,90", "Unknown model variant 'S/61'; did you mean 'S/16'?"),
    ("pretrain_i1k.py:H/14,90", "there is no recipe for H/14, only for Ti/16, S/32, S/16, B/32, B"),
    ("pretrain_i1k.py:S/16,91",
     "unknown recipe '91'; did you mean '90'? The choices are 90, 150, 300, "),
    ("pretrain_i21k.py", "name a model"),
    ("pretrain_i21k.py:B/61", "Unknown model variant 'B/61'; did you mean 'B/16'?"),
    ("pretrain_i21k.py:H/14", "there is no recipe for H/14, only for Ti/16, S/32, "),
    ("pretrain_paper.py", "name a row"),
    ("pretrain_paper.py:B/16-i1k-30ep", "unknown row 'B/16-i1k-30ep'; did you mean 'B/16-i1k-300e"),
    ("pretrain_paper.py:B/16-jft-7ep", "JFT-300M is not public; name a data set of your own: "
     "--config=configs/pretrain_paper.py:B/16-jft-7ep,folder:/data/photos"),
])
def test_wrong_arguments(recipe, message):
    with pytest.raises(UserError) as error:
        load(recipe)
    assert message in str(error.value)


def test_a_source_of_your_own_has_its_own_splits():
    for recipe in ("pretrain_i21k.py:B/16", "pretrain_paper.py:B/16-i1k-300ep"):
        assert load(recipe).data.train_split
        data = load(f"{recipe},folder:/data/my, photos").data
        assert data.source == "folder:/data/my, photos"
        assert data.train_split is None and data.eval_split is None
