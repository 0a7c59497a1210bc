"""vit_jax: pretrain, fine-tune and examine Vision Transformers in JAX and Flax."""

import os

# TFDS and Orbax reach files through etils, which takes TensorFlow for it where that is installed,
# seconds and gigabytes that nothing here needs. It decides at first use, so this comes first.
os.environ.setdefault("EPATH_USE_TF", "false")

from vit_jax.models.variants import create_model

__version__ = "0.1.0"
__all__ = ["create_model"]
