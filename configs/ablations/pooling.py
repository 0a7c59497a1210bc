"""Class token or global average pooling, at several learning rates: the paper's Figure 9
(appendix D.3).

    python -m vit_jax.sweep --config=configs/ablations/pooling.py --workdir=runs/pooling \\
        --config.data.dir=DIRECTORY_OF_TFDS_DATASETS --shard=0/6

trains B/16 six times on ImageNet-1k, each run as configs/pretrain_paper.py does; not run here. An
argument is another row of that file, for example pooling.py:B/16-jft-7ep,folder:/data/jft. The
learning rates are two around those of the paper's JFT runs, and that of its ImageNet runs.

Published is the finding, as curves: both work equally well, but they need different learning
rates, and a first attempt with the class token's rate was what made pooling look worse.

The small size trains four blocks on handwritten digits; docs/ablations.md has what it gave:

    python -m vit_jax.sweep --config=configs/ablations/pooling.py:cpu --workdir=runs/pooling_cpu
"""

from pathlib import Path

from vit_jax.cli import load_config
from vit_jax.sweeping.grid import Sweep

CONFIGS = Path(__file__).parent.parent


def get_config(argument: str = "B/16-i1k-300ep"):
    """`argument` is 'cpu', or what configs/pretrain_paper.py takes."""
    if argument != "cpu":
        return load_config(f"{CONFIGS}/pretrain_paper.py:{argument}")
    config = load_config(f"{CONFIGS}/quickstart.py")
    config.total_steps = 300
    config.eval_every = 0
    config.checkpoint_every = 0
    config.model.position_embedding = "learned_1d"
    return config


def get_sweep(argument: str = ""):
    rates = (1e-3, 3e-3, 1e-2) if argument == "cpu" else (3e-4, 8e-4, 3e-3)
    return Sweep(
        title="Class token and global average pooling (Figure 9)",
        rows="classifier",
        columns="learning rate",
        cells={
            row: {rate: {"model.classifier": classifier, "optimizer.learning_rate": rate}
                  for rate in rates}
            for row, classifier in (("class token", "token"), ("average pooling", "gap"))
        },
    )
