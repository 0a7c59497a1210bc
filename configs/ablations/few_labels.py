"""What masked patch prediction is worth where labels are few: fine-tuned against from scratch.

    python -m vit_jax.main --config=configs/masked_patches.py:B/16 --workdir=runs/masked \\
        --config.data.dir=DIRECTORY_OF_TFDS_DATASETS
    python -m vit_jax.sweep --config=configs/ablations/few_labels.py:full,runs/masked \\
        --workdir=runs/few_labels --config.data.dir=DIRECTORY_OF_TFDS_DATASETS --shard=0/6

pretrains B/16 on ImageNet's images alone, then trains it on 1, 10 and 99% of them with labels, once
from these weights and once from random ones, otherwise alike: 30,000 steps with the settings of
configs/pretrain_paper.py:B/16-i1k-300ep, but for its representation layer. The argument is
SIZE,WORKDIR of the pretraining. Not run here. Published (arXiv 2010.11929, section 4.6), with JFT's
images and all labels: 79.9%, 2% more than from scratch.

The small size has 250, 1,000 and 4,000 labels of CIFAR-10 and the model of configs/cifar10.py:cpu;
docs/masked_patches.md has what it gave:

    python -m vit_jax.main --config=configs/masked_patches.py:cpu --workdir=runs/masked_cpu \\
        --config.data.dir=DIRECTORY_OF_TFDS_DATASETS
    python -m vit_jax.sweep --config=configs/ablations/few_labels.py:cpu,runs/masked_cpu \\
        --workdir=runs/few_labels_cpu --seeds=2 --config.data.dir=DIRECTORY_OF_TFDS_DATASETS
"""

import os
from pathlib import Path

from vit_jax.cli import load_config
from vit_jax.errors import UserError
from vit_jax.sweeping.grid import Sweep

CONFIGS = Path(__file__).parent.parent


def _split(argument):
    size, _, pretrained = argument.partition(",")
    if size not in ("full", "cpu") or not pretrained:
        raise UserError("name the size and the workdir of the pretraining run: "
                        "--config=configs/ablations/few_labels.py:cpu,runs/masked_cpu")
    return size, pretrained


def get_config(argument: str = ""):
    """`argument` is SIZE,WORKDIR; see above. The config of the runs from scratch."""
    size, _ = _split(argument)
    config = load_config(
        f"{CONFIGS}/" + ("cifar10.py:cpu" if size == "cpu" else "pretrain_paper.py:B/16-i1k-300ep"))
    config.epochs = None
    config.model.representation_size = None  # which masked pretraining does not have
    config.total_steps = 30_000
    if size == "cpu":
        config.total_steps = 300
        config.batch_size = 64
        config.eval_every = 0
        config.checkpoint_every = 0
        config.schedule.warmup_steps = 50
    return config


def get_sweep(argument: str = ""):
    size, pretrained = _split(argument)
    shares = {250: "0.5%", 1000: "2%", 4000: "8%"} if size == "cpu" else {
        12_812: "1%", 128_117: "10%", 1_268_355: "99%"}
    pretrained = os.path.abspath(os.path.expanduser(pretrained))
    starts = {"from scratch": {}, "masked patch prediction": {"init": pretrained}}
    return Sweep(
        title="Masked patch prediction and few labels",
        rows="start",
        columns="labels",
        cells={start: {labels: changes | {"data.train_split": f"train[:{share}]"}
                       for labels, share in shares.items()}
               for start, changes in starts.items()},
    )
