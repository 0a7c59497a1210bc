"""CIFAR-10 from scratch: a ViT of 32x32 pixels in 4x4 patches.

    python -m vit_jax.main --config=configs/cifar10.py --workdir=runs/cifar10 \\
        --config.data.dir=DIRECTORY_OF_TFDS_DATASETS

The full recipe (9 blocks of width 192, 200 epochs) is for an accelerator; how far it gets is not
measured yet. The short one, for two CPU cores:

    python -m vit_jax.main --config=configs/cifar10.py:cpu --workdir=runs/cifar10_cpu \\
        --config.data.dir=DIRECTORY_OF_TFDS_DATASETS

It reached 54.9% accuracy on the 10,000 test images after its three epochs, on CIFAR-10 re-encoded
as JPEG of quality 75, in 28 minutes on two cores that were busy with other work too.

The data must be prepared in ArrayRecord format; docs/data.md says how.
"""

from vit_jax.config import base_config
from vit_jax.errors import UserError


def get_config(size: str = "full"):
    """`size` is 'full' or 'cpu'."""
    if size not in ("full", "cpu"):
        raise UserError(f"the argument must be 'full' or 'cpu', not {size!r}.")
    config = base_config()
    config.batch_size = 512
    config.epochs = 200
    config.log_every = 50
    config.eval_every = 1000
    config.checkpoint_every = 1000

    config.model.variant = "Ti/16"
    config.model.patch_size = 4
    config.model.num_layers = 9
    config.model.classifier = "gap"
    config.model.position_embedding = "sincos_2d"
    config.model.stochastic_depth_rate = 0.1

    config.data.source = "tfds:cifar10"
    config.data.image_size = 32
    config.data.train_crop = "pad"
    config.data.crop_padding = 4

    config.loss.label_smoothing = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0
    config.schedule.warmup_steps = 1000

    if size == "cpu":
        config.batch_size = 128
        config.epochs = 3
        config.eval_every = 391
        config.checkpoint_every = 391
        config.model.hidden_size = 128
        config.model.mlp_dim = 256
        config.model.num_heads = 4
        config.model.num_layers = 4
        config.model.stochastic_depth_rate = 0.0
        config.loss.label_smoothing = 0.0
        config.schedule.warmup_steps = 200
    return config
