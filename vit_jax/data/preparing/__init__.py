"""Raw data to ArrayRecord files: reading what there is, shrinking, writing. See vit_jax.prepare."""
