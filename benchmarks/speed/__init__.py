"""How long does a training step take, beside the other ways to write the same step?

    python -m benchmarks.speed
    ... --only steps --cases digits --threads 1 --rounds 5
    ... --device cuda

The same net, parameters, rows, loss and optimizer in stock Pyro, plain PyTorch (eager, compiled),
NumPyro and pyro_vae. Every competitor has a process of its own with the same cores, and steps only
when it is asked, in rounds, while the others sleep.
"""
