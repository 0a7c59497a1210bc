"""Deeper, wider, a wider MLP or smaller patches: the paper's Figure 8 (appendix D.2).

    python -m vit_jax.sweep --config=configs/ablations/scaling.py --workdir=runs/scaling \\
        --config.data.dir=DIRECTORY_OF_TFDS_DATASETS --shard=0/10

trains ten models on ImageNet-1k, each run as configs/pretrain_paper.py does, and probes them on
ImageNet with 5 images a class, which is what the table shows; not run here. All scale one with 8
blocks of width 1024, an MLP of 2048 and patches of 32 pixels, as in the paper; heads stay 64 wide.
The columns are factors (of patches, per side of the image), and the figure's x axis is the cost of
a forward pass. An argument is another row of that file, for example
scaling.py:B/32-jft-7ep,folder:/data/jft.

Published, as curves of the 5-shot accuracy on ImageNet after pretraining on JFT-300M: depth helps
most, up to 64 blocks and less and less beyond 16; width helps least; smaller patches help although
they add no parameters.

The small size trains nine models on handwritten digits, around one of 2 blocks of width 32 and
patches of 8 of the 16 pixels; docs/ablations.md has what it gave:

    python -m vit_jax.sweep --config=configs/ablations/scaling.py:cpu --workdir=runs/scaling_cpu
"""

import dataclasses
from pathlib import Path

from vit_jax.cli import load_config
from vit_jax.sweeping.grid import Sweep

CONFIGS = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that is scaled, and how far."""

    num_layers: int
    hidden_size: int
    mlp_dim: int
    patch_size: int
    head_dim: int
    factors: tuple[int, ...]
    depth_factors: tuple[int, ...]


FULL = Base(8, 1024, 2048, 32, head_dim=64, factors=(1, 2, 4), depth_factors=(1, 2, 4, 8))
SMALL = Base(2, 32, 64, 8, head_dim=16, factors=(1, 2, 4), depth_factors=(1, 2, 4))


def get_config(argument: str = "B/32-i1k-300ep"):
    """`argument` is 'cpu', or what configs/pretrain_paper.py takes."""
    if argument == "cpu":
        config = load_config(f"{CONFIGS}/quickstart.py")
        config.total_steps = 300
        config.eval_every = 0
        config.checkpoint_every = 0
    else:
        config = load_config(f"{CONFIGS}/pretrain_paper.py:{argument}")
        config.model.scan_layers = True  # 64 blocks compile as fast as one
        config.probes.every = 25_000
        config.probes.shots = (5,)
        config.probes.source = "tfds:imagenet2012"
        config.model.representation_size = FULL.hidden_size
    base = SMALL if argument == "cpu" else FULL
    config.model.num_layers = base.num_layers
    config.model.hidden_size = base.hidden_size
    config.model.num_heads = base.hidden_size // base.head_dim
    config.model.mlp_dim = base.mlp_dim
    config.model.patch_size = base.patch_size
    return config


def get_sweep(argument: str = ""):
    base = SMALL if argument == "cpu" else FULL

    def width(factor):
        size = factor * base.hidden_size
        wide = {"model.hidden_size": size, "model.num_heads": size // base.head_dim}
        return wide if base is SMALL else wide | {"model.representation_size": size}

    return Sweep(
        title="Depth, width, MLP and patches (Figure 8)",
        rows="what grows",
        columns="factor",
        cells={
            "depth": {k: {"model.num_layers": k * base.num_layers} for k in base.depth_factors},
            "width": {k: width(k) for k in base.factors},
            "MLP width": {k: {"model.mlp_dim": k * base.mlp_dim} for k in base.factors},
            "patches": {k: {"model.patch_size": base.patch_size // k} for k in base.factors},
        },
        x="flops",
        metric="eval/accuracy" if argument == "cpu" else "probe/5shot",
    )
