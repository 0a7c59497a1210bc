"""Building and checking a config: types, limits, and what is said about a mistake."""

import json
import math

import ml_collections
import numpy as np
import pytest

from vit_jax.config import (
    base_config,
    check_value,
    describe,
    differences,
    flatten,
    format_value,
    from_json,
    image_size,
    parse_value,
    set_value,
    to_json,
    validate,
)
from vit_jax.config_keys import FIELDS
from vit_jax.errors import UserError, did_you_mean

pytestmark = pytest.mark.core


def changed(**settings):
    """A valid config but for `settings`; `__` stands for the dot."""
    config = base_config()
    config.total_steps = 10
    for key, value in settings.items():
        *sections, last = key.split("__")
        node = config
        for section in sections:
            node = node[section]
        node[last] = value
    return config


def refusal(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    return str(error.value)


def test_the_base_config_is_valid_once_it_has_a_length():
    config = base_config()
    assert flatten(config).keys() == FIELDS.keys()
    config.total_steps = 1
    assert validate(config).is_locked
    assert flatten(validate(config)) == flatten(config)


def test_every_key_is_described():
    """--help is the only list of keys that a user without the source has."""
    text = describe()
    for key, field in FIELDS.items():
        assert f"--config.{key}=" in text
        assert all(choice in text for choice in field.choices)


def test_round_trip_through_json_text():
    """A resumed run compares tuples with what JSON made of them: lists."""
    config = validate(changed(
        data__image_size=(24, 32), data__crop_area=(0.3, 1), optimizer__frozen=("^cls$", "Dense"),
        optimizer__clip_norm=1, model__layer_scale=1e-5, model__scan_layers=True,
        data__dir="a folder/ünï"))
    again = from_json(json.loads(json.dumps(to_json(config))))
    assert flatten(again) == flatten(config)
    assert {k: type(v) for k, v in flatten(again).items()} == {
        k: type(v) for k, v in flatten(config).items()}
    assert again.data.image_size == (24, 32) and again.optimizer.frozen == ("^cls$", "Dense")
    assert not differences(again, config)


def test_json_of_an_older_version_gets_the_new_keys():
    values = to_json(changed())
    del values["optimizer"]["clip_norm"], values["mesh"]
    assert flatten(from_json(values)) == flatten(changed())


@pytest.mark.parametrize("key, text, value", [
    ("total_steps", "1000", 1000),
    ("total_steps", "1e3", 1000),
    ("total_steps", "1.5e3", 1500),
    ("total_steps", "1_000", 1000),
    ("total_steps", "2.0", 2),
    ("total_steps", "none", None),
    ("total_steps", " None ", None),
    ("schedule.timescale", "9007199254740993", 2**53 + 1),  # no detour over a float
    ("mesh.data", "-1", -1),
    ("optimizer.learning_rate", "1", 1.0),
    ("optimizer.learning_rate", "3e-4", 3e-4),
    ("model.head_bias_init", "-10", -10.0),
    ("optimizer.clip_norm", "none", None),
    ("data.flip", "true", True),
    ("data.flip", "False", False),
    ("data.flip", "0", False),
    ("data.flip", "YES", True),
    ("data.dir", "/data/my sets,1", "/data/my sets,1"),
    ("data.dir", "none", None),
    ("model.position_embedding", "none", "none"),  # a choice of that name
    ("model.position_embedding", "None", None),
    ("data.source", "none", "none"),  # not optional: a text like any other
    ("data.crop_area", "0.1,1", (0.1, 1.0)),
    ("data.crop_area", "(0.1, 1)", (0.1, 1.0)),
    ("data.crop_area", "[0.1, 1]", (0.1, 1.0)),
    ("data.image_size", "16", 16),
    ("data.image_size", "1.6e1", 16),
    ("data.image_size", "16,24", (16, 24)),
    ("data.image_size", "(16, 24)", (16, 24)),
    ("optimizer.frozen", "^embedding,head", ("^embedding", "head")),
    ("optimizer.frozen", "^(embedding|cls)", ("^(embedding|cls)",)),
    ("optimizer.frozen", "block_[0-3]/, (a|b)$", ("block_[0-3]/", "(a|b)$")),
    ("optimizer.frozen", r"block_\d{1,2}/,head", (r"block_\d{1,2}/", "head")),
    ("optimizer.frozen", "^(?!a{1,},[)]),[^],]$,[(,],c", ("^(?!a{1,},[)])", "[^],]$", "[(,]", "c")),
    ("optimizer.frozen", r"\(a,b\,c\[,d", (r"\(a", r"b\,c\[", "d")),
    ("optimizer.frozen", "", ()),
    ("optimizer.frozen", "()", ()),
])
def test_text_is_read_as_the_type_of_the_key(key, text, value):
    parsed = parse_value(key, text)
    assert parsed == value and type(parsed) is type(value)
    if isinstance(value, tuple):
        assert [type(item) for item in parsed] == [type(item) for item in value]
    assert parse_value(key, format_value(value)) == value  # how a sweep passes it to its runs


@pytest.mark.parametrize("key, text, message", [
    ("total_steps", "1.5", "config.total_steps='1.5' is not an integer or none."),
    ("batch_size", "abc", "config.batch_size='abc' is not an integer."),
    ("batch_size", "", "config.batch_size='' is not an integer."),
    ("batch_size", "none", "config.batch_size='none' is not an integer."),
    ("batch_size", "1e999", "config.batch_size='1e999' is not an integer."),
    ("batch_size", "nan", "config.batch_size='nan' is not an integer."),
    ("optimizer.learning_rate", "fast", "config.optimizer.learning_rate='fast' is not a number."),
    ("optimizer.learning_rate", "inf", "config.optimizer.learning_rate=inf is not a finite"),
    ("model.layer_scale", "nan", "config.model.layer_scale=nan is not a finite number."),
    ("data.flip", "maybe", "config.data.flip='maybe' is not true or false."),
    ("data.flip", "2", "config.data.flip='2' is not true or false."),
    ("data.crop_area", "0.5", "config.data.crop_area=(0.5,) must have 2 entries."),
    ("data.crop_area", "0.1,x", "config.data.crop_area='x' is not a list of 2 values."),
    ("data.image_size", "16,16,3", "config.data.image_size=(16, 16, 3) must have 2 entries."),
    ("data.image_size", "big", "config.data.image_size='big' is not an integer or 2 of them."),
])
def test_text_that_is_no_such_value(key, text, message):
    assert refusal(parse_value, key, text).startswith(message)


@pytest.mark.parametrize("key, value, message", [
    ("batch_size", "64", "config.batch_size='64' is not an integer."),
    ("batch_size", 64.5, "config.batch_size=64.5 is not an integer."),
    ("batch_size", True, "config.batch_size=True is not an integer."),
    ("batch_size", math.inf, "config.batch_size=inf is not a finite number."),
    ("batch_size", None, "config.batch_size=None is not an integer."),
    ("optimizer.learning_rate", False, "config.optimizer.learning_rate=False is not a number."),
    ("data.flip", 1, "config.data.flip=1 is not true or false."),
    ("data.flip", "true", "config.data.flip='true' is not true or false."),
    ("data.source", 3, "config.data.source=3 is not a string."),
    ("data.crop_area", 0.5, "config.data.crop_area=0.5 is not a list of 2 values."),
    ("data.crop_area", (0.5,), "config.data.crop_area=(0.5,) must have 2 entries."),
    ("data.image_size", (8, 8.5), "config.data.image_size=8.5 is not an integer or 2 of them."),
    ("batch_size", (8, 8), "config.batch_size=(8, 8) is not an integer."),
    ("optimizer.frozen", "head", "config.optimizer.frozen='head' is not a list of values."),
    ("optimizer.frozen", (1,), "config.optimizer.frozen=1 is not a list of values."),
    ("dtype", "float16", "config.dtype='float16' is not one of 'float32', 'bfloat16'; did you mean "
     "'bfloat16'?"),
    ("optimizer.name", "adamW", "config.optimizer.name='adamW' is not one of 'adamw', 'adam', "
     "'adafactor', 'sgd'; did you mean 'adamw'?"),
    ("model.position_embedding", "learned_3d", "config.model.position_embedding='learned_3d'"),
    ("batch_size", 0, "config.batch_size=0 must be at least 1."),
    ("optimizer.momentum", 1.5, "config.optimizer.momentum=1.5 must be at least 0 and at most 0."
     "999999."),
    ("optimizer.momentum", 1, "config.optimizer.momentum=1.0 must be at least 0 and at most 0.99"),
    ("seed", 2**32, "config.seed=4294967296 must be at least 0 and at most 4294967295."),
    ("model.dropout_rate", 1.0, "config.model.dropout_rate=1.0 must be at least 0 and at most 0.9"),
    ("data.crop_area", (0.0, 1.0), "config.data.crop_area=0.0 must be at least 1e-06 and at most"),
    ("data.image_size", (0, 8), "config.data.image_size=0 must be at least 1."),
    ("total_steps", 2**31, "config.total_steps=2147483648 must be at least 1 and at most 21"),
    ("mesh.data", -2, "config.mesh.data=-2 must be at least -1."),
    ("model", {}, "config.model is a section; set one of its keys: model.variant, "),
])
def test_wrong_values_are_refused(key, value, message):
    """What a recipe could assign, so values rather than texts."""
    assert refusal(check_value, key, value).startswith(message)


@pytest.mark.parametrize("key, value, kept", [
    ("optimizer.learning_rate", 1, 1.0),
    ("seed", 2**32 - 1, 2**32 - 1),
    ("batch_size", 64.0, 64),
    ("data.crop_area", [0.5, 1], (0.5, 1.0)),
    ("data.image_size", [8, 16], (8, 16)),
    ("optimizer.learning_rate", np.float64(0.5), 0.5),
])
def test_values_become_the_type_of_the_key(key, value, kept):
    """Else a resumed run, which reads JSON, would differ from the one that was started."""
    assert check_value(key, value) == kept
    config = changed()
    set_value(config, key, value)
    assert flatten(validate(config))[key] == kept
    json.dumps(to_json(validate(config)))


@pytest.mark.parametrize("key, nearest", [
    ("batchsize", "batch_size"),
    ("total_step", "total_steps"),
    ("optimiser.learning_rate", "optimizer.learning_rate"),
    ("optimizer.learningrate", "optimizer.learning_rate"),
    ("learning_rate", "optimizer.learning_rate"),  # without its section
    ("data.learning_rate", "optimizer.learning_rate"),  # in the wrong one
    ("model.image_size", "data.image_size"),
    ("warmup_steps", "schedule.warmup_steps"),
    ("schedule.warmup", "schedule.warmup_steps"),
    ("modle.variant", "model.variant"),
    ("batch_size.train", "batch_size"),
    ("variant", "model.variant"),
])
def test_unknown_keys_name_the_nearest(key, nearest):
    message = f"Unknown config key {key!r}; did you mean {nearest!r}?"
    assert refusal(parse_value, key, "1") == message
    assert refusal(set_value, changed(), key, 1) == message


def test_a_key_like_no_other_and_a_section():
    assert refusal(parse_value, "zzz", "1") == "Unknown config key 'zzz'."
    assert refusal(parse_value, "", "1") == "Unknown config key ''."
    assert refusal(parse_value, "mesh", "8") == (
        "config.mesh is a section; set one of its keys: mesh.data, mesh.fsdp, mesh.tensor.")


def test_did_you_mean():
    assert did_you_mean("B/61", ["B/16", "L/32"]) == "; did you mean 'B/16'?"
    assert did_you_mean("ADAMW", ["adam", "adamw", "sgd"]) == "; did you mean 'adamw'?"
    assert did_you_mean("zebra", ["B/16", "L/32"]) == did_you_mean("", []) == "."


@pytest.mark.parametrize("settings, message", [
    (dict(batch_sizes=3), "Unknown config key 'batch_sizes'; did you mean 'batch_size'?"),
    (dict(model__depth=3), "Unknown config key 'model.depth'"),
    (dict(ema=ml_collections.ConfigDict({"decay": 0.9})), "Unknown config key 'ema.decay'"),
    (dict(batch_size="64"), "config.batch_size='64' is not an integer."),
    (dict(optimizer="sgd"), "config.optimizer is a section; set one of its keys: "),
    (dict(model=None), "config.model is a section; set one of its keys: "),
    (dict(model={"variant": "B/16", "depth": 3}), "Unknown config key 'model.depth'"),
    (dict(batch_size={"train": 3}), "Unknown config key 'batch_size.train'; did you mean 'batch_s"),
])
def test_what_a_recipe_may_not_do(settings, message):
    assert refusal(validate, changed(**settings)).startswith(message)


def test_a_recipe_may_replace_a_section():
    """What it leaves out has its default."""
    config = validate(changed(model={"variant": "B/16", "num_layers": 3}))
    assert flatten(config) == flatten(changed(model__variant="B/16", model__num_layers=3))


@pytest.mark.parametrize("settings, message", [
    (dict(total_steps=None),
     "Give one of config.total_steps and config.epochs; neither is set."),
    (dict(epochs=3), "Give one of config.total_steps and config.epochs; both are set."),
    (dict(batch_size=10, accumulation_steps=4),
     "config.batch_size=10 is not divisible by config.accumulation_steps=4."),
    (dict(task="masked_patches", loss__name="sigmoid"),
     "config.loss.name=sigmoid only applies to classification"),
    (dict(task="masked_patches", model__representation_size=8),
     "config.model.representation_size=8 only applies to classification, not to "
     "config.task='masked_patches'; leave it at None."),
    (dict(optimizer__name="adam", optimizer__weight_decay=0.1), "config.optimizer.name='adam' has"),
    (dict(total_steps=None, epochs=0), "config.epochs=0 would train nothing"),
    (dict(optimizer__clip_norm=0), "config.optimizer.clip_norm=0 would"),
    (dict(parallelism="pmap", mesh__fsdp=2), "config.parallelism='pmap' is data parallel only"),
    (dict(parallelism="pmap", mesh__tensor=2), "config.parallelism='pmap' is data parallel only"),
    (dict(mesh__data=0), "config.mesh.data=0 must be -1 (all devices that are left) or at least"),
    (dict(data__crop_area=(0.9, 0.1)), "config.data.crop_area=(0.9, 0.1) must be (smallest, lar"),
    (dict(data__crop_aspect=(2, 1)), "config.data.crop_aspect=(2.0, 1.0) must be (smallest, larg"),
    (dict(probes__every=2, probes__shots=()), "config.probes.shots is empty, so that"),
    (dict(probes__every=2, probes__names=()), "config.probes.names is empty"),
    (dict(profile_steps=(3, 2)), "config.profile_steps=(3, 2) would record nothing; give (2, 3)."),
    (dict(model__variant="B/61"), "config.model.variant: Unknown model variant 'B/61'; did you m"),
    (dict(model__variant="b/16"), "config.model.variant: Unknown model variant 'b/16'; did you m"),
])
def test_keys_that_do_not_fit_each_other(settings, message):
    assert refusal(validate, changed(**settings)).startswith(message)


@pytest.mark.parametrize("settings", [
    dict(total_steps=None, epochs=0.5),
    dict(optimizer__name="adam", optimizer__weight_decay=0),
    dict(parallelism="pmap", mesh__data=8),
    dict(data__crop_area=(0.5, 0.5)),
    dict(profile_steps=(3, 3)),
    dict(probes__every=0, probes__shots=()),
    dict(model__variant="ViT-B_16"),
    dict(batch_size=12, accumulation_steps=4),
], ids=str)
def test_neighbours_of_what_is_refused(settings):
    """The checks above must not be wider than they say."""
    assert validate(changed(**settings)).is_locked


def test_image_size():
    assert image_size(validate(changed(data__image_size=24))) == (24, 24)
    assert image_size(validate(changed(data__image_size=(24, 32)))) == (24, 32)


def test_differences():
    ours = validate(changed(batch_size=32, data__image_size=(8, 16)))
    theirs = validate(changed(batch_size=64))
    assert differences(ours, theirs) == {
        "batch_size": "batch_size: 64 -> 32",
        "data.image_size": "data.image_size: 224 -> (8, 16)",
    }
    assert differences(ours, ours) == {}
