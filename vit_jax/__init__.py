"""vit_jax: pretrain, fine-tune and examine Vision Transformers in JAX and Flax."""

from vit_jax.models.variants import create_model

__version__ = "0.1.0"
__all__ = ["create_model"]
