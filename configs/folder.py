"""Your own photos, from scratch: one folder per class, or train/ and val/ with such folders inside.

    python -m vit_jax.main --config="configs/folder.py:/data/my photos" --workdir=runs/photos

A tenth of the photos is held out for evaluation unless there is a val/, valid/, validation/ or
test/ folder. Training from scratch wants thousands of photos per class.
"""

from vit_jax.config import base_config
from vit_jax.errors import UserError


def get_config(path: str = ""):
    """`path` is the folder."""
    if not path:
        raise UserError("Say which folder: --config=configs/folder.py:/path/to/photos")
    config = base_config()
    config.batch_size = 128
    config.epochs = 100
    config.log_every = 20
    config.eval_every = 500
    config.checkpoint_every = 500

    config.model.variant = "Ti/16"
    config.model.classifier = "gap"
    config.model.position_embedding = "sincos_2d"
    config.model.stochastic_depth_rate = 0.1

    config.data.source = f"folder:{path}"
    config.data.image_size = 224
    config.data.train_crop = "inception"
    config.data.eval_crop = "center_crop"
    config.data.antialias = True  # photos are many times larger than the model's input

    config.loss.label_smoothing = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0
    config.schedule.warmup_steps = 100
    return config
