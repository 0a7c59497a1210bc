"""ImageNet-1k from scratch: "better plain ViT" (arXiv 2205.01580) and AugReg (arXiv 2106.10270).

    python -m vit_jax.main --config=configs/pretrain_i1k.py:S/16,90 --workdir=runs/s16_90ep \\
        --config.data.dir=DIRECTORY_OF_TFDS_DATASETS
    python -m vit_jax.main --config=configs/pretrain_i1k.py:B/16,augreg --workdir=runs/b16_augreg \\
        --config.data.source=folder:/data/imagenet --config.data.train_split=none \\
        --config.data.eval_split=none

The second reads a folder with train/ and val/ instead of TFDS. The argument is MODEL,RECIPE. MODEL
is Ti/16, S/32, S/16, B/32, B/16 or L/16. RECIPE is one of

    90, 150, 300  epochs of the plain recipe (big_vision's configs/vit_s16_i1k.py): batch 1,024,
                  softmax, global average pooling, fixed 2-D position embedding, RandAugment, mixup
    augreg        300 epochs of big_vision's configs/vit_i1k.py: batch 4,096, sigmoid, class token,
                  augmentation that depends on the model size

The last 1% of the training images is held out for tuning:
--config.data.eval_split='train[99%:]'. Out of memory? Set --config.accumulation_steps=8. AugReg
found that B and L gain from --config.model.dropout_rate=0.1
--config.model.stochastic_depth_rate=0.1, which big_vision's config leaves out.

Differences from big_vision: computation is in bfloat16; large crops are decoded at a reduced size
(see docs/data.md; --config.data.scaled_decode=false turns that off); evaluation shrinks images
bilinearly (there by area); mixup draws one weight per image (there per device); in augreg the
position embeddings are initialised with a standard deviation of 0.02 (there 1 / sqrt(width)), and
the class token has one too.

Published, in % of the validation images; not run here:

    S/16,90           76.5   arXiv 2205.01580, Table 1; 6 to 7 hours on a TPUv3-8 (big_vision)
    S/16,150          78.5   the same table
    S/16,300          80.0   the same; a PyTorch copy: 79.75 +- 0.07 (github.com/EIFY/mup-vit, #6)
    B/16,augreg  about 79    github.com/google-research/big_vision, issue 7

No results have been published for the other combinations.
"""

from vit_jax.config import base_config
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.variants import SIZES, canonical_name

RECIPES = ("90", "150", "300", "augreg")

# RandAugment (operations, magnitude; at 0 it still inverts, posterizes, ...) and mixup's alpha.
LIGHT1 = ((2, 0), 0.0)
MEDIUM1 = ((2, 15), 0.2)
MEDIUM2 = ((2, 15), 0.5)
AUGREG = {"Ti/16": LIGHT1, "S/32": MEDIUM1, "S/16": MEDIUM2, "B/32": MEDIUM2, "B/16": MEDIUM2,
          "L/16": MEDIUM2}


def get_config(argument: str = ""):
    """`argument` is MODEL,RECIPE; see above."""
    model, _, recipe = argument.partition(",")
    if not model or not recipe:
        raise UserError("name a model and a recipe: --config=configs/pretrain_i1k.py:S/16,90")
    try:
        model = canonical_name(model)
    except ValueError as error:
        raise UserError(str(error)) from None
    if model not in AUGREG:
        raise UserError(f"there is no recipe for {model}, only for {', '.join(AUGREG)}.")
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}{did_you_mean(recipe, RECIPES)} The choices are "
                        f"{', '.join(RECIPES)}.")

    config = base_config()
    config.log_every = 50
    config.eval_every = 2500
    config.checkpoint_every = 1000
    config.dtype = "bfloat16"

    config.model.variant = model
    # The paper's head for pretraining, with a hidden layer.
    config.model.representation_size = SIZES[model.split("/")[0]]["hidden_size"]
    if model.startswith("L"):
        config.model.scan_layers = True  # 24 blocks compile as fast as one

    config.data.source = "tfds:imagenet2012"
    config.data.train_split = "train[:99%]"
    config.data.eval_split = "validation"
    config.data.image_size = 224
    config.data.train_crop = "inception"
    config.data.eval_crop = "center_crop"
    config.data.eval_resize = 256

    config.optimizer.name = "adamw"
    config.optimizer.momentum_dtype = "bfloat16"
    config.optimizer.learning_rate = 1e-3
    # big_vision's 1e-4 is multiplied by the schedule, which peaks at 1; ours by the learning rate.
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0
    config.schedule.name = "cosine"
    config.schedule.warmup_steps = 10_000

    if recipe == "augreg":
        config.epochs = 300
        config.batch_size = 4096
        config.model.classifier = "token"
        config.model.head_bias_init = -6.9  # the sigmoid of it is 1 / 1000
        config.data.randaugment, config.data.mixup = AUGREG[model]
        config.loss.name = "sigmoid"
    else:
        config.epochs = int(recipe)
        config.batch_size = 1024
        config.model.classifier = "gap"
        config.model.position_embedding = "sincos_2d"
        config.data.randaugment, config.data.mixup = (2, 10), 0.2
        config.loss.name = "softmax"
    return config
