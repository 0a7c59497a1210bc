"""What the position embedding is, and where it is added: the paper's Table 8 (appendix D.4).

    python -m vit_jax.sweep --config=configs/ablations/position.py --workdir=runs/position \\
        --config.data.dir=DIRECTORY_OF_TFDS_DATASETS --shard=0/8

trains B/16 eight times on ImageNet-1k, each run as configs/pretrain_paper.py does, and probes it on
ImageNet with 5 images a class, which is what the table shows; not run here. Another row of that
file, and with it another data set, is an argument:

    python -m vit_jax.sweep --config=configs/ablations/position.py:B/16-jft-7ep,folder:/data/jft \\
        --workdir=runs/position_jft

Published, for B/16 trained on JFT-300M, the accuracy of a linear probe of 5 images a class on
ImageNet, in %:

                 stem    every layer   every layer, shared
    none         61.38   n/a           n/a
    learned 1-D  64.21   63.96         64.29
    learned 2-D  64.00   64.05         64.02
    relative     64.03   n/a           n/a

The small size trains four blocks on handwritten digits; docs/ablations.md has what it gave:

    python -m vit_jax.sweep --config=configs/ablations/position.py:cpu --workdir=runs/position_cpu
"""

from pathlib import Path

from vit_jax.cli import load_config
from vit_jax.sweeping.grid import Sweep

CONFIGS = Path(__file__).parent.parent


def get_config(argument: str = "B/16-i1k-300ep"):
    """`argument` is 'cpu', or what configs/pretrain_paper.py takes."""
    if argument != "cpu":
        config = load_config(f"{CONFIGS}/pretrain_paper.py:{argument}")
        config.probes.every = 25_000
        config.probes.shots = (5,)
        config.probes.source = "tfds:imagenet2012"
        return config
    config = load_config(f"{CONFIGS}/quickstart.py")
    config.total_steps = 300
    config.eval_every = 0
    config.checkpoint_every = 0
    config.model.classifier = "token"
    return config


def get_sweep(argument: str = ""):
    def positions(kind, place="stem"):
        return {"model.position_embedding": kind, "model.position_embedding_at": place}

    def learned(kind):
        return {
            "stem": positions(kind),
            "every layer": positions(kind, "every_layer"),
            "every layer, shared": positions(kind, "every_layer_shared"),
        }

    return Sweep(
        title="Position embeddings (Table 8)",
        rows="position embedding",
        columns="where it is added",
        cells={
            "none": {"stem": positions("none")},
            "learned 1-D": learned("learned_1d"),
            "learned 2-D": learned("learned_2d"),
            "relative": {"stem": positions("relative")},
        },
        metric="eval/accuracy" if argument == "cpu" else "probe/5shot",
    )
