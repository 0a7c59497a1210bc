"""Weights of the world: their files, names, layouts and resolutions."""
