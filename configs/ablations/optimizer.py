"""Adam against SGD for pretraining ResNets: the paper's Table 7 (appendix D.1).

    python -m vit_jax.sweep --config=configs/ablations/optimizer.py --workdir=runs/optimizer \\
        --config.data.dir=DIRECTORY_OF_TFDS_DATASETS --shard=0/4

trains R50x1 and R152x2 on ImageNet-1k, once with each optimizer, for as long and on the same images
as configs/pretrain_paper.py:B/16-i1k-300ep; not run here. Adam uses the learning rates of the
paper's Table 3 and a weight decay of 0.1. SGD follows BiT (arXiv 1912.11370): a learning rate of
0.03 times batch size / 256 and momentum 0.9; its weight decay of 1e-4 passes through the momentum,
ours does not, so it is 1e-3 here. The paper trained on JFT-300M, for which there is an argument:

    python -m vit_jax.sweep --workdir=runs/optimizer_jft \\
        --config=configs/ablations/optimizer.py:R50x1-jft-7ep,folder:/data/jft

Published, the accuracy after pretraining on JFT-300M and fine-tuning, in %:

                     Adam                    SGD
                R50x1   R152x2          R50x1   R152x2
    ImageNet    77.54   84.97           78.24   84.37
    CIFAR-10    97.67   99.06           97.46   99.07
    CIFAR-100   86.07   92.05           85.17   91.06
    Pets        91.11   95.37           91.00   94.79
    Flowers     94.26   98.62           92.06   99.32
    average     89.33   94.01           88.79   93.72

The small size trains a ResNet of two blocks and a ViT of four on handwritten digits;
docs/ablations.md has what it gave:

    python -m vit_jax.sweep --config=configs/ablations/optimizer.py:cpu --workdir=runs/optimizer_cpu
"""

from pathlib import Path

from vit_jax.cli import load_config
from vit_jax.sweeping.grid import Sweep

CONFIGS = Path(__file__).parent.parent


def get_config(argument: str = "B/16-i1k-300ep"):
    """`argument` is 'cpu', or what configs/pretrain_paper.py takes."""
    if argument == "cpu":
        config = load_config(f"{CONFIGS}/quickstart.py")
        config.total_steps = 300
        config.eval_every = 0
        config.checkpoint_every = 0
        for key in ("patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers",
                    "classifier", "position_embedding"):
            config.model[key] = None
        return config
    config = load_config(f"{CONFIGS}/pretrain_paper.py:{argument}")
    config.model.variant = "R50x1"
    for key in ("representation_size", "dropout_rate", "scan_layers"):  # which a ResNet has not
        config.model[key] = None
    return config


def get_sweep(argument: str = ""):
    small = argument == "cpu"
    if small:
        vit = {"model.variant": "Ti/16", "model.patch_size": 4, "model.hidden_size": 64,
               "model.mlp_dim": 256, "model.num_heads": 4, "model.num_layers": 4}
        models = {
            "ResNet": ({"model.variant": "R50x1", "model.stages": (1, 1)}, 1e-3),
            "ViT": (vit, 3e-3),
        }
    else:
        models = {name: ({"model.variant": name}, rate)
                  for name, rate in (("R50x1", 1e-3), ("R152x2", 6e-4))}

    def adam(rate):
        return {"optimizer.name": "adamw", "optimizer.learning_rate": rate,
                "optimizer.weight_decay": 0.1}

    sgd = {"optimizer.name": "sgd", "optimizer.learning_rate": 0.1 if small else 0.03 * 4096 / 256,
           "optimizer.momentum": 0.9, "optimizer.weight_decay": 1e-3}
    return Sweep(
        title="Adam and SGD (Table 7)",
        rows="model",
        columns="optimizer",
        cells={row: {"Adam": model | adam(rate), "SGD": model | sgd}
               for row, (model, rate) in models.items()},
    )
