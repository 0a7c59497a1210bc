"""A grid of runs: what is in it, running it, and the table it ends in."""
