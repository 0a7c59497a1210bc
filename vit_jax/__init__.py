"""vit_jax: pretrain, fine-tune and examine Vision Transformers in JAX and Flax."""

import os

# TFDS and Orbax access files through etils, which imports TensorFlow for that if it is installed:
# seconds and gigabytes that nothing here needs. It decides at first use, so this comes first.
os.environ.setdefault("EPATH_USE_TF", "false")

from vit_jax.models.variants import create_model

__version__ = "0.1.0"
__all__ = ["create_model", "load_model"]


def __getattr__(name):
    if name == "load_model":  # brings Orbax along, which a model alone does not need
        from vit_jax.checkpoints.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
