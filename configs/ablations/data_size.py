"""ViT, hybrid and ResNet trained on more and more images: the paper's Figures 3 and 4.

    python -m vit_jax.sweep --config=configs/ablations/data_size.py --workdir=runs/data_size \\
        --config.data.dir=DIRECTORY_OF_TFDS_DATASETS --shard=0/16

trains four models on 3, 10, 30 and 99% of ImageNet-1k's training images (the last 1% is held out in
configs/pretrain_paper.py too), with that file's settings for ViTs and the number of steps of the
whole data set, and probes them with 5 images a class, which is what the table shows; not run here.
A share is a slice of the split, such as 'train[:10%]', which TFDS sources have (folders and digits
do not); it is not balanced by class.

Published, as curves: pretrained on ImageNet, ViT-L is below ViT-B; on ImageNet-21k they are alike,
and on JFT-300M the larger is better. Of 9, 30, 90 and 300 million images of JFT, ViT-B/32 is much
worse than R50x1 with the fewest and better from 90 million on.

The small size takes 1, 4 and 16% of CIFAR-10 (500, 2,000 and 8,000 images), shrunk to 16x16 pixels;
docs/ablations.md has what it gave:

    python -m vit_jax.sweep --config=configs/ablations/data_size.py:cpu \\
        --workdir=runs/data_size_cpu --config.data.dir=DIRECTORY_OF_TFDS_DATASETS
"""

from pathlib import Path

from vit_jax.cli import load_config
from vit_jax.errors import UserError
from vit_jax.models.variants import SIZES
from vit_jax.sweeping.grid import Sweep

CONFIGS = Path(__file__).parent.parent
_IMAGES = 1_268_355  # of ImageNet-1k's train[:99%]
_SMALL_VIT = {
    "model.hidden_size": 64, "model.mlp_dim": 128, "model.num_heads": 4, "model.num_layers": 4,
}


def get_config(size: str = "full"):
    """`size` is 'full' or 'cpu'."""
    if size not in ("full", "cpu"):
        raise UserError(f"configs/ablations/data_size.py takes 'full' or 'cpu', not {size!r}.")
    if size == "full":
        config = load_config(f"{CONFIGS}/pretrain_paper.py:B/16-i1k-300ep")
        config.total_steps = round(config.epochs * _IMAGES / config.batch_size)
        config.epochs = None
        config.probes.every = 25_000
        config.probes.shots = (5,)
        config.probes.source = "tfds:imagenet2012"
        return config
    config = load_config(f"{CONFIGS}/cifar10.py:cpu")
    config.epochs = None
    config.total_steps = 400
    config.batch_size = 64
    config.eval_batch_size = 500
    config.eval_every = 0
    config.checkpoint_every = 0
    config.data.image_size = 16
    config.data.crop_padding = 2
    config.schedule.warmup_steps = 50
    config.model.hidden_size = None
    config.model.mlp_dim = None
    config.model.num_heads = None
    config.model.num_layers = None
    config.model.patch_size = None
    config.model.classifier = None
    config.model.position_embedding = None
    config.model.stochastic_depth_rate = None
    return config


def _vit(variant):
    size = variant.split("/")[0].split("+")[-1]
    return {"model.variant": variant, "model.representation_size": SIZES[size]["hidden_size"],
            "model.scan_layers": size == "L"}


def get_sweep(size: str = "full"):
    if size == "cpu":
        shares = (1, 4, 16)
        models = {
            "ViT": _SMALL_VIT | {"model.patch_size": 4},
            "hybrid": _SMALL_VIT | {"model.variant": "R+Ti/16", "model.patch_size": 1},
            "ResNet": {"model.variant": "R50x1", "model.stages": (1, 1)},
        }
    else:
        shares = (3, 10, 30, 99)
        models = {
            "ViT-B/32": _vit("B/32"),
            "ViT-L/16": _vit("L/16"),
            "R50+ViT-B/32": _vit("R50+B/32"),
            "R50x1": {"model.variant": "R50x1", "model.representation_size": None,
                      "model.dropout_rate": None},
        }
    return Sweep(
        title="Number of training images (Figures 3 and 4)",
        rows="model",
        columns="% of the training images",
        cells={
            row: {share: model | {"data.train_split": f"train[:{share}%]"} for share in shares}
            for row, model in models.items()
        },
        metric="eval/accuracy" if size == "cpu" else "probe/5shot",
    )
