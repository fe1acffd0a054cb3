"""Generative programs, one per file."""
