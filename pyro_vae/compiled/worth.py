"""Does a graph repay its making? By rough numbers, the same everywhere: a training takes the same
steps wherever it goes on."""

from __future__ import annotations

from collections.abc import Sequence

from pyro_vae.compiled.graph import Graph

__all__ = ["LEVELS", "check_level", "not_worth"]

LEVELS = ("auto", "eager", "traced", "compiled")

# Seconds, measured on two cores.
SAVED = 1.5e-3  # a call, by not running Pyro's handlers
SAVED_PER_ENTRY = 0.4e-9  # that is not written to memory and read again
RECORDING = 1.0
COMPILING = 3.0
COMPILING_PER_OPERATION = 0.02


def check_level(level: str) -> None:
    """Refuse a level that there is not.

    Raises:
        ValueError: naming the levels.
    """
    if level not in LEVELS:
        raise ValueError(f"compile: came {level!r}, wanted one of {list(LEVELS)}")


def not_worth(calls: float | None, what: str, graphs: Sequence[Graph] = ()) -> str:
    """Why so many calls to come don't repay graphs; empty if they do.

    Args:
        calls: None if their number is not known.
        what: they are, in the plural.
        graphs: as recorded; before that, the least that it takes is asked for.
    """
    if calls is None:
        return f"the number of {what} to come is not known"
    saved, seconds = SAVED, RECORDING
    if graphs:
        saved += SAVED_PER_ENTRY * sum(graph.entries() for graph in graphs)
        seconds = COMPILING + COMPILING_PER_OPERATION * sum(map(len, graphs))
    if calls * saved >= seconds:
        return ""
    return (
        f"{calls:.0f} {what} save about {calls * saved:.1f} s, a graph takes about {seconds:.0f} s"
    )
