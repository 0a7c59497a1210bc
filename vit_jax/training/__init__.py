"""The parts of a training run: step, losses, optimizer, partitioning, checkpoints, metrics."""
