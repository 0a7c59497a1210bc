"""The table of keys: its defaults hold, and every key in it does something."""

import dataclasses
import sys
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest

from vit_jax import main as main_module
from vit_jax.config import base_config, check_value, validate
from vit_jax.config_keys import FIELDS, RESUMABLE, Field
from vit_jax.data import pipeline
from vit_jax.models.resnet import ResNet
from vit_jax.models.vit import VisionTransformer
from vit_jax.training.optimizer import make_optimizer, make_schedule

SOURCE = str(Path(main_module.__file__).parent)


@pytest.mark.parametrize("key", FIELDS)
def test_defaults_pass_their_own_check(key):
    """A recipe that changes nothing would otherwise be refused for a value it did not choose."""
    default = FIELDS[key].default
    assert check_value(key, default) == default
    assert type(check_value(key, default)) is type(default)


def test_resumable_keys_exist():
    """A key that was renamed would silently become one that a resumed run may not change."""
    assert set(RESUMABLE) <= set(FIELDS)
    assert len(set(RESUMABLE)) == len(RESUMABLE)


def test_no_key_is_dead(tiny_config, tmp_path, monkeypatch):
    """Every key is read by the code that it is about: options that do nothing are worse than none.

    Records what a run reads, and then what the parts read that this run had no use for. Copying
    and storing the config as a whole does not count.
    """
    read, paths, alive = set(), {}, []
    original = ml_collections.ConfigDict.__getitem__
    wholesale = {"flatten", "to_json"}

    def getitem(self, key):
        value = original(self, key)
        frame = sys._getframe(1)
        while "ml_collections" in frame.f_code.co_filename:
            frame = frame.f_back
        ours = frame.f_code.co_filename.startswith(SOURCE)
        if id(self) in paths and ours and frame.f_code.co_name not in wholesale:
            read.add(paths[id(self)] + key)
        return value

    def recorded(config):
        config = validate(config)
        alive.append(config)  # so that no other config gets its id
        paths[id(config)] = ""
        paths.update({id(config[section]): f"{section}." for section in config
                      if isinstance(config[section], ml_collections.ConfigDict)})
        return config

    monkeypatch.setitem(FIELDS, "data.dead", Field(1, int, "so that this test is seen to work"))
    tiny_config.model.num_layers = 1
    tiny_config.total_steps, tiny_config.epochs = None, 0.02  # two steps
    monkeypatch.setattr(ml_collections.ConfigDict, "__getitem__", getitem)
    monkeypatch.setattr(main_module.config, "validate", recorded)
    monkeypatch.setattr(main_module.cli, "load_config", lambda argument: tiny_config)
    main_module.main(["--config=recorded.py", f"--workdir={tmp_path / 'run'}",
                      "--config.data.workers=0"])
    main_module.main(["--config=recorded.py", f"--config.init={tmp_path / 'run'}",
                      "--mode=evaluate"])
    main_module.main(["--config=recorded.py", f"--workdir={tmp_path / 'masked'}",
                      "--config.task=masked_patches", "--config.init=none",
                      "--config.probes.every=5",
                      "--config.probes.shots=1"])

    params = {"dense": {"kernel": jax.ShapeDtypeStruct((2, 2), "float32")}}
    image, rng = np.zeros((8, 8, 3), np.uint8), np.random.default_rng(0)
    for optimizer, schedule, crop in (("adamw", "linear", "inception"), ("sgd", "rsqrt", "pad")):
        config = base_config()
        config.total_steps = 10
        config.optimizer.name, config.schedule.name = optimizer, schedule
        config.data.train_crop, config.data.eval_crop = crop, "center_crop"
        config = recorded(config)
        make_optimizer(config, make_schedule(config, 10), params)
        float(make_schedule(config, 10)(1))
        pipeline.train_view((8, 8), config.data)(image, rng)
        pipeline.eval_crop(image, (8, 8), config.data)
    assert set(FIELDS) - read == {"data.dead"}


def test_every_model_key_is_an_option_of_a_model():
    """They are handed over together, so the test above cannot tell them apart."""
    options = {field.name for model in (VisionTransformer, ResNet)
               for field in dataclasses.fields(model)}
    keys = {key.removeprefix("model.") for key in FIELDS if key.startswith("model.")}
    assert keys - {"variant"} <= options
