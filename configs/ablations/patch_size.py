"""How large a patch is: the paper's /16 and /32 (Tables 5 and 6).

    python -m vit_jax.sweep --config=configs/ablations/patch_size.py --workdir=runs/patch_size \\
        --config.data.dir=DIRECTORY_OF_TFDS_DATASETS --shard=0/4

trains B/32, B/16, L/32 and L/16 on ImageNet-1k, each run as configs/pretrain_paper.py does; not run
here. An argument is another row of that file for a B or an L, whose other settings then hold for
both.

Published, for those four, the accuracy on the validation images of the pretraining, at 224 pixels
(issue 62 of github.com/google-research/vision_transformer), in %:

         32      16
    B    69.19   74.79
    L    66.90   72.59

The small size trains four blocks of width 64 on handwritten digits of 16x16 pixels;
docs/ablations.md has what it gave:

    python -m vit_jax.sweep --config=configs/ablations/patch_size.py:cpu \\
        --workdir=runs/patch_size_cpu
"""

from pathlib import Path

from vit_jax.cli import load_config
from vit_jax.models.variants import SIZES
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
    return config


def get_sweep(argument: str = ""):
    if argument == "cpu":
        cells = {"4 blocks of 64": {patch: {"model.patch_size": patch} for patch in (2, 4, 8)}}
    else:
        cells = {
            size: {
                patch: {
                    "model.variant": f"{size}/{patch}",
                    "model.representation_size": SIZES[size]["hidden_size"],
                    "model.scan_layers": size == "L",
                }
                for patch in (16, 32)
            }
            for size in ("B", "L")
        }
    return Sweep(title="Patch size (Tables 5 and 6)", rows="model",
                 columns="pixels per side of a patch", cells=cells)
