"""The visible training loop, what a run leaves, and grids of runs."""
