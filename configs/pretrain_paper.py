"""Pretraining as in "An Image is Worth 16x16 Words" (arXiv 2010.11929), every row of Table 3.

    python -m vit_jax.main --config=configs/pretrain_paper.py:B/16-i1k-300ep \\
        --workdir=runs/b16_i1k --config.data.dir=DIRECTORY_OF_TFDS_DATASETS
    python -m vit_jax.main --config=configs/pretrain_paper.py:L/16-jft-14ep,folder:/data/jft \\
        --workdir=runs/l16_jft --config.mesh.fsdp=8 --config.accumulation_steps=4

The argument is ROW or ROW,SOURCE. ROW is MODEL-DATA-EPOCHS, one of ROWS below. JFT-300M is not
public, so `jft` needs a SOURCE of your own. i21k is tfds:imagenet21k, a data set with one split
`full` that you have to prepare in ArrayRecord format yourself (TFDS has no public builder for it),
and i1k is tfds:imagenet2012. Any other SOURCE is read with its own splits; a folder should hold
train/ and val/. Out of memory? Set --config.accumulation_steps=8, --config.mesh.fsdp=8, or
--config.model.remat=full with --config.model.scan_layers=true; vit_jax.plan finds what fits.

Published, the accuracy on ImageNet after fine-tuning at 384, in % (Tables 5 and 6), not run here:

                B/32   B/16   L/32   L/16   H/14
    jft-7ep     80.73  84.15  84.37  86.30
    jft-14ep                         87.12  88.08
    i21k-30ep                 -      -              (which of 30 and 90 is not said)
    i21k-90ep   81.28  83.97  80.99  85.15  85.13*
    i1k-300ep   73.38  77.91  71.16  76.53  -

                R50x1  R50x2  R101x1  R152x1  R152x2  R200x3
    jft-7ep     77.54  82.12  80.67   81.88   84.97
    jft-14ep                                  85.56*  87.22*

                R50+B/32  R50+B/16  R50+L/32  R50+L/16
    jft-7ep     84.90     85.58     85.68     86.60
    jft-14ep                                  87.12

and of the pretraining itself, on its own validation images (issue 62 of
github.com/google-research/vision_transformer):

    i21k-90ep   44.04  47.88  45.42  49.90  49.06
    i1k-300ep   69.19  74.79  66.90  72.59

L/16 took 230 TPUv3-core-days on i21k and 680 on jft, H/14 2,500 on jft (Table 2).

The paper's authors have since clarified (issues 2 and 34 there): crops and flips are those of
fine-tuning; the head has a hidden layer (`representation_size`); i21k uses sigmoid cross-entropy,
an initial bias of -10, and a linear decay that ends at 1e-5. Chosen here:

  - jft as i21k; sigmoid for i1k too, with the initial bias of big_vision's configs/vit_i1k.py.
  - Weight decay is decoupled and multiplied by the learning rate: the Adam of the Flax of that time
    did so, and AugReg's decay of 0.1 at a rate of 1e-3 is 1e-4 in big_vision, which does not
    multiply. It applies to kernels alone, as in big_vision.
  - The ResNets have no hidden layer in the head.
  - * is in Tables 5 and 6, but not in Table 3: the rate is that of the nearest row.
  - Splits as in AugReg, evaluation as in fine-tuning, computation in bfloat16.

An image has one label here; in JFT it had 1.26 on average.
"""

import dataclasses

from vit_jax.config import base_config
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.variants import SIZES


@dataclasses.dataclass(frozen=True)
class Data:
    """What the rows of one data set share."""

    source: str | None
    train_split: str | None
    eval_split: str | None
    decay: str
    end_value: float
    weight_decay: float
    dropout: float
    clip_norm: float | None
    head_bias: float


DATA = {
    "jft": Data(None, None, None, "linear", 1e-5, 0.1, 0.0, None, -10.0),
    "i21k": Data("tfds:imagenet21k", "full[51200:]", "full[25600:51200]", "linear", 1e-5, 0.03, 0.1,
                 None, -10.0),
    "i1k": Data("tfds:imagenet2012", "train[:99%]", "validation", "cosine", 0.0, 0.3, 0.1, 1.0,
                -6.9),
}

# The peak of the learning rate, of Table 3 but for those with a *.
ROWS = {
    "B/32-jft-7ep": 8e-4,
    "B/16-jft-7ep": 8e-4,
    "L/32-jft-7ep": 6e-4,
    "L/16-jft-7ep": 4e-4,
    "L/16-jft-14ep": 4e-4,
    "H/14-jft-14ep": 3e-4,
    "R50x1-jft-7ep": 1e-3,
    "R50x2-jft-7ep": 1e-3,
    "R101x1-jft-7ep": 8e-4,
    "R152x1-jft-7ep": 6e-4,
    "R152x2-jft-7ep": 6e-4,
    "R152x2-jft-14ep": 6e-4,  # *
    "R200x3-jft-14ep": 6e-4,  # *
    "R50+B/32-jft-7ep": 8e-4,
    "R50+B/16-jft-7ep": 8e-4,
    "R50+L/32-jft-7ep": 2e-4,
    "R50+L/16-jft-7ep": 4e-4,
    "R50+L/16-jft-14ep": 4e-4,
    "B/32-i21k-90ep": 1e-3,
    "B/16-i21k-90ep": 1e-3,
    "L/32-i21k-30ep": 1e-3,
    "L/32-i21k-90ep": 1e-3,
    "L/16-i21k-30ep": 1e-3,
    "L/16-i21k-90ep": 1e-3,
    "H/14-i21k-90ep": 1e-3,  # *
    "B/32-i1k-300ep": 3e-3,
    "B/16-i1k-300ep": 3e-3,
    "L/32-i1k-300ep": 3e-3,
    "L/16-i1k-300ep": 3e-3,
    "H/14-i1k-300ep": 3e-3,
}


def get_config(argument: str = ""):
    """`argument` is ROW[,SOURCE]; see above."""
    row, _, source = argument.partition(",")
    if not row:
        raise UserError("name a row: --config=configs/pretrain_paper.py:B/16-i1k-300ep")
    if row not in ROWS:
        raise UserError(
            f"unknown row {row!r}{did_you_mean(row, ROWS)} The rows are {', '.join(ROWS)}.")
    model, data_name, epochs = row.rsplit("-", 2)
    data = DATA[data_name]
    if not source and not data.source:
        raise UserError(
            "JFT-300M is not public; name a data set of your own: "
            f"--config=configs/pretrain_paper.py:{row},folder:/data/photos")

    config = base_config()
    config.epochs = int(epochs.removesuffix("ep"))
    config.batch_size = 4096
    config.log_every = 50
    config.eval_every = 2500
    config.checkpoint_every = 1000
    config.dtype = "bfloat16"

    config.model.variant = model
    config.model.head_bias_init = data.head_bias
    if "/" in model:  # a Transformer, or a hybrid
        size = model.split("/")[0].split("+")[-1]
        config.model.representation_size = SIZES[size]["hidden_size"]
        config.model.dropout_rate = data.dropout
        if size in ("L", "H"):
            config.model.scan_layers = True  # 24 or 32 blocks compile as fast as one

    config.data.source = source or data.source
    config.data.train_split = None if source else data.train_split
    config.data.eval_split = None if source else data.eval_split
    config.data.image_size = 224
    config.data.train_crop = "inception"
    config.data.eval_crop = "squash"

    config.loss.name = "sigmoid"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = ROWS[row]
    config.optimizer.weight_decay = data.weight_decay
    config.optimizer.clip_norm = data.clip_norm
    config.schedule.name = data.decay
    config.schedule.end_value = data.end_value
    config.schedule.warmup_steps = 10_000
    return config
