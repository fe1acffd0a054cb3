"""Variational autoencoders as Pyro programs."""
