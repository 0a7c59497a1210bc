"""What `python -m vit_jax.benchmark` measures, and with what; nothing else imports it."""
