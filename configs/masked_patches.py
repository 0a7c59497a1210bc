"""Masked patch prediction, the paper's self-supervision (arXiv 2010.11929, appendix B.1.2).

    python -m vit_jax.main --config=configs/masked_patches.py:B/16 --workdir=runs/masked \\
        --config.data.dir=DIRECTORY_OF_TFDS_DATASETS
    python -m vit_jax.main --config=configs/finetune.py:B/16,imagenet2012 \\
        --workdir=runs/masked_finetuned --config.init=runs/masked \\
        --config.data.dir=DIRECTORY_OF_TFDS_DATASETS

The argument is MODEL[,SOURCE]: any Transformer or hybrid, and a data source (tfds:imagenet2012
unless given), whose labels are not used. Half of the patch embeddings are corrupted (80% become the
mask token, 10% another patch's embedding, 10% stay) and the 3-bit mean colour of each is predicted.
Other targets, and another corruption rate, that the paper tried:

    --config.masked.target=downsized_colors    16 colours of every patch
    --config.masked.target=pixels              all of its pixels, by their squared error
    --config.masked.rate=0.15                  as much as BERT corrupts

See what it learned with `python -m vit_jax.masked`, and measure it with `python -m vit_jax.probe`.

The paper trained for a million steps on JFT-300M, and saw little gain after 100,000 and similar
gains on ImageNet: so 100,000 steps on ImageNet here. Adam, the rate, warmup, decay and batch are
the paper's, crops and flips its authors' (github.com/google-research/vision_transformer, issue
103). Chosen here: no weight decay, no dropout, no clipping, bfloat16.

Published: 79.9% of ImageNet after fine-tuning B/16 (2% more than from scratch, 4% less than with
supervised pretraining); not run here. The short form, for two CPU cores, on CIFAR-10:

    python -m vit_jax.main --config=configs/masked_patches.py:cpu --workdir=runs/masked_cpu \\
        --config.data.dir=DIRECTORY_OF_TFDS_DATASETS

trains the model of configs/cifar10.py:cpu; docs/masked_patches.md has the results.
"""

from vit_jax.config import base_config
from vit_jax.errors import UserError
from vit_jax.models.variants import canonical_name


def get_config(argument: str = ""):
    """`argument` is MODEL[,SOURCE] or cpu; see above."""
    model, _, source = argument.partition(",")
    if not model:
        raise UserError("name a model: --config=configs/masked_patches.py:B/16")
    config = base_config()
    config.task = "masked_patches"
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-4
    config.schedule.name = "cosine"
    config.schedule.warmup_steps = 10_000
    if model == "cpu":
        return _cpu(config, source)

    try:
        config.model.variant = canonical_name(model)
    except ValueError as error:
        raise UserError(str(error)) from None
    config.total_steps = 100_000
    config.batch_size = 4096
    config.log_every = 50
    config.eval_every = 2500
    config.checkpoint_every = 1000
    config.dtype = "bfloat16"

    config.data.source = source or "tfds:imagenet2012"
    config.data.train_split = None if source else "train"
    config.data.eval_split = None if source else "validation"
    config.data.image_size = 224
    config.data.train_crop = "inception"
    return config


def _cpu(config, source):
    config.epochs = 5
    config.batch_size = 128
    config.log_every = 50
    config.eval_every = 500
    config.checkpoint_every = 1000

    config.model.variant = "Ti/16"
    config.model.patch_size = 4
    config.model.hidden_size = 128
    config.model.mlp_dim = 256
    config.model.num_heads = 4
    config.model.num_layers = 4
    config.model.classifier = "gap"
    config.model.position_embedding = "sincos_2d"

    config.data.source = source or "tfds:cifar10"
    config.data.image_size = 32
    config.data.train_crop = "pad"

    config.optimizer.learning_rate = 1e-3
    config.schedule.warmup_steps = 500
    return config
