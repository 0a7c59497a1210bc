"""A model and a run small enough that a step takes milliseconds."""

import ml_collections

from vit_jax.config import base_config


def make_tiny_config() -> ml_collections.ConfigDict:
    """Two blocks of width 16 on 8x8 digits, six steps of plain SGD, nothing random."""
    config = base_config()
    config.total_steps = 6
    config.batch_size = 16
    config.eval_batch_size = 128
    config.log_every = 1
    config.eval_every = 3
    config.checkpoint_every = 2
    config.model.variant = "Ti/16"
    config.model.patch_size = 4
    config.model.hidden_size = 16
    config.model.mlp_dim = 32
    config.model.num_heads = 2
    config.model.num_layers = 2
    config.data.image_size = 8
    config.data.train_crop = "none"
    config.data.flip = False
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.schedule.name = "constant"
    return config


get_config = make_tiny_config  # so that `--config=tests/tiny.py` runs it
