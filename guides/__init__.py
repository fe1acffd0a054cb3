"""Inference programs, one per file."""
