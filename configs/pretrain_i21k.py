"""ImageNet-21k as in AugReg, "How to train your ViT?" (arXiv 2106.10270).

    python -m vit_jax.main --config=configs/pretrain_i21k.py:B/16 --workdir=runs/b16_i21k \\
        --config.data.dir=DIRECTORY_OF_TFDS_DATASETS
    python -m vit_jax.main --config=configs/pretrain_i21k.py:S/16,folder:/data/imagenet21k \\
        --workdir=runs/s16_i21k_30ep --config.epochs=30

The argument is MODEL or MODEL,SOURCE. TFDS has no public builder for ImageNet-21k: the default
source, tfds:imagenet21k, is a data set of that name with one split `full`, which you have to
prepare in ArrayRecord format yourself. Any other SOURCE is read with its own splits; a folder
should hold train/ and val/. 300 epochs are the paper's long schedule, --config.epochs=30 its short
one. Out of memory? Set --config.accumulation_steps=8.

The first six models are those of big_vision's configs/vit_i21k.py, whose augmentation is a
compromise between 30 and 300 epochs. The others have what the names of Google's recommended files
say (aug_light1 there is read as the paper's light2), and all else as the six.

    MODEL      augmentation  RandAugment  mixup  weight decay  published, %
    Ti/16      none          -            0      0.1           78.22
    S/32       none          -            0      0.1           79.58
    S/16       light1        (2, 0)       0      0.1           83.73
    B/32       light2        (2, 10)      0.2    0.1           83.59
    B/16       light2        (2, 10)      0.2    0.1           85.49
    L/16       medium2       (2, 15)      0.5    0.1           85.59
    B/8        medium2       (2, 15)      0.5    0.1           85.58 (at 224)
    R+Ti/16    none          -            0      0.03          75.40
    R26+S/32   light2        (2, 10)      0.2    0.1           83.85
    R50+L/32   medium1       (2, 15)      0.2    0.1           85.99

R50+L/32 also has dropout and stochastic depth of 0.1. Published is the accuracy on ImageNet-1k of
Google's recommended files after fine-tuning at 384 (README of
github.com/google-research/vision_transformer); each was chosen among 28 settings, so not all of
them are the ones above. Not run here.

Differences from big_vision: computation is in bfloat16; large crops are decoded at a reduced size
(see docs/data.md; --config.data.scaled_decode=false turns that off); evaluation shrinks images
bilinearly (there by area); mixup draws one weight per image (there per device); position embeddings
are initialised with a standard deviation of 0.02 (there 1 / sqrt(width)). Like big_vision's config,
and unlike the published files, the models use global average pooling;
--config.model.classifier=token gives them a class token.
"""

import dataclasses

from vit_jax.config import base_config
from vit_jax.errors import UserError
from vit_jax.models.variants import canonical_name


@dataclasses.dataclass(frozen=True)
class Setting:
    """Augmentation and regularisation of one model."""

    randaugment: tuple[int, int] | None = None  # operations, magnitude
    mixup: float = 0.0
    weight_decay: float = 0.1
    dropout: float = 0.0  # and stochastic depth


LIGHT2, MEDIUM2 = Setting((2, 10), 0.2), Setting((2, 15), 0.5)
SETTINGS = {
    "Ti/16": Setting(),
    "S/32": Setting(),
    "S/16": Setting((2, 0)),  # which still inverts, posterizes, ...
    "B/32": LIGHT2,
    "B/16": LIGHT2,
    "L/16": MEDIUM2,
    "B/8": MEDIUM2,
    "R+Ti/16": Setting(weight_decay=0.03),
    "R26+S/32": LIGHT2,
    "R50+L/32": Setting((2, 15), 0.2, dropout=0.1),
}


def get_config(argument: str = ""):
    """`argument` is MODEL[,SOURCE]; see above."""
    model, _, source = argument.partition(",")
    if not model:
        raise UserError("name a model: --config=configs/pretrain_i21k.py:B/16")
    try:
        model = canonical_name(model)
    except ValueError as error:
        raise UserError(str(error)) from None
    if model not in SETTINGS:
        raise UserError(f"there is no recipe for {model}, only for {', '.join(SETTINGS)}.")
    setting = SETTINGS[model]

    config = base_config()
    config.epochs = 300
    config.batch_size = 4096
    config.log_every = 50
    config.eval_every = 2500
    config.checkpoint_every = 1000
    config.dtype = "bfloat16"

    config.model.variant = model
    config.model.classifier = "gap"
    config.model.head_bias_init = -10.0
    if setting.dropout:
        config.model.dropout_rate = setting.dropout
        config.model.stochastic_depth_rate = setting.dropout
    if model in ("L/16", "R50+L/32"):
        config.model.scan_layers = True  # 24 blocks compile as fast as one

    if source:
        config.data.source = source
    else:
        config.data.source = "tfds:imagenet21k"
        config.data.train_split = "full[51200:]"
        config.data.eval_split = "full[25600:51200]"
    config.data.image_size = 224
    config.data.train_crop = "inception"
    config.data.randaugment = setting.randaugment
    config.data.mixup = setting.mixup
    config.data.eval_crop = "center_crop"
    config.data.eval_resize = 256

    config.loss.name = "sigmoid"
    config.optimizer.name = "adamw"
    config.optimizer.momentum_dtype = "bfloat16"
    config.optimizer.learning_rate = 1e-3
    # The files' wd_0.1. In big_vision it is 1e-4, multiplied by a schedule that peaks at 1; here
    # it is multiplied by the learning rate.
    config.optimizer.weight_decay = setting.weight_decay
    config.optimizer.clip_norm = 1.0
    config.schedule.name = "cosine"
    config.schedule.warmup_steps = 10_000
    return config
