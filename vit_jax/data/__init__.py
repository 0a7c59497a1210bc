"""From pictures on disk to batches of uint8 arrays; knows nothing of models."""
