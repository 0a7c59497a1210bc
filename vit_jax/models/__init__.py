"""Linen modules: the Vision Transformer, its ResNet stems and baselines, and their names."""
