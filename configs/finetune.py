"""Fine-tuning as in the paper's Table 4: SGD, cosine decay, batch 512, no weight decay, at 384.

    python -m vit_jax.main --config=configs/finetune.py:B/16,cifar10 --workdir=runs/b16_cifar10
    python -m vit_jax.main --config="configs/finetune.py:S/16,folder:/data/my photos" \\
        --workdir=runs/photos

The argument is MODEL,DATA. MODEL is a variant such as B/16. DATA is one of the rows below,
`vtab:NAME` (the first 1,000 images of the TFDS data set NAME, 2,500 steps) or `folder:PATH`.

    DATA          steps   warmup  learning rates that the paper tried
    imagenet2012  20,000  500     0.003, 0.01, 0.03, 0.06
    cifar10       10,000  500     0.001, 0.003, 0.01, 0.03
    cifar100      10,000  500     0.001, 0.003, 0.01, 0.03
    pets             500  100     0.001, 0.003, 0.01, 0.03
    flowers          500  100     0.001, 0.003, 0.01, 0.03
    vtab:NAME      2,500  500     0.01
    folder:PATH      500  100     none; the default is that of pets

The first rate that Google's code or big_vision recommends is the default; try the others with
--config.optimizer.learning_rate. The warmups are Google's and big_vision's (the paper gives none).

The weights are AugReg's (`augreg:MODEL`), or the paper's own (`imagenet21k:MODEL`) for models that
AugReg does not have; any other checkpoint with --config.init=PATH. Out of memory? With
--config.accumulation_steps=8 --config.dtype=bfloat16, B/16 takes 11 GiB by vit_jax.plan.

    only the head           --config.optimizer.frozen='^(?!head/)'
    layer-wise decay        --config.optimizer.layer_decay=0.75
    at another resolution   --config.data.image_size=224

Dropout is 0. Google's code fine-tunes L/16, H/14, R50+B/16 and R50+L/32 of the paper's weights with
--config.model.dropout_rate=0.1; by its README that is better for L/16 and R50+B/16 (ImageNet 85.05
against 84.47%, 85.08 against 83.72%), and worse for B/16 and B/32.

Published (paper, Table 5, pretrained on ImageNet-21k, in %), not run here:

                  B/16   B/32   L/16   L/32   H/14
    imagenet2012  83.97  81.28  85.15  80.99  85.13
    cifar10       98.95  98.79  99.16  99.13  99.27
    cifar100      91.67  91.97  93.44  93.04  93.82
    flowers       99.38  99.11  99.61  99.19  99.51
    pets          94.43  93.02  94.73  93.09  94.82
"""

import dataclasses

from vit_jax.checkpoints.names import AUGREG
from vit_jax.config import base_config
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.variants import canonical_name


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of Table 4."""

    source: str
    train_split: str | None
    eval_split: str | None
    steps: int
    warmup: int
    learning_rate: float


ROWS = {
    "imagenet2012": Row("tfds:imagenet2012", "train[:99%]", "validation", 20_000, 500, 0.03),
    "cifar10": Row("tfds:cifar10", "train[:98%]", "test", 10_000, 500, 0.01),
    "cifar100": Row("tfds:cifar100", "train[:98%]", "test", 10_000, 500, 0.01),
    "pets": Row("tfds:oxford_iiit_pet", "train", "test", 500, 100, 0.003),
    "flowers": Row("tfds:oxford_flowers102", "train", "test", 500, 100, 0.003),
}


def get_config(argument: str = ""):
    """`argument` is MODEL,DATA; see above."""
    variant, comma, data = argument.partition(",")
    if not comma or not variant or not data:
        raise UserError("name a model and a data set: --config=configs/finetune.py:B/16,cifar10")
    try:
        variant = canonical_name(variant)
    except ValueError as error:
        raise UserError(str(error)) from None
    row = _row(data)

    config = base_config()
    config.init = f"augreg:{variant}" if variant in AUGREG else f"imagenet21k:{variant}"
    config.total_steps = row.steps
    config.batch_size = 512
    config.log_every = 10
    config.eval_every = max(100, row.steps // 20)
    config.checkpoint_every = max(100, row.steps // 20)

    config.model.variant = variant

    config.data.source = row.source
    config.data.train_split = row.train_split
    config.data.eval_split = row.eval_split
    config.data.image_size = 378 if variant.endswith("/14") else 384  # 14 does not divide 384
    config.data.train_crop = "inception"
    config.data.eval_crop = "squash"

    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.momentum_dtype = "bfloat16"
    config.optimizer.learning_rate = row.learning_rate
    config.optimizer.clip_norm = 1.0
    config.schedule.name = "cosine"
    config.schedule.warmup_steps = row.warmup
    return config


def _row(data):
    if data in ROWS:
        return ROWS[data]
    kind, colon, name = data.partition(":")
    if kind == "folder" and name:
        return Row(data, None, None, 500, 100, 0.003)
    if kind == "vtab" and name:
        return Row(f"tfds:{name}", "train[:1000]", "test", 2_500, 500, 0.01)
    known = [*ROWS, "vtab:NAME", "folder:PATH"]
    raise UserError(
        f"unknown data set {data!r}{did_you_mean(data, known)} The choices are {', '.join(known)}.")
