"""Who takes part, by short names."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.cases import Case, networks, rows
from benchmarks.speed.runner import Runner, torch_runner

__all__ = ["COMPETITORS", "PEAKS", "PEAK_FLOP", "Competitor", "chosen", "flop", "missing"]


@dataclass(frozen=True)
class Competitor:
    """
    Attributes:
        label: in tables.
        module: has ``make(case, device, pick, way) -> Runner``, whose ``way`` is ``way``.
        steps: whether it is in the table of steps on a fixed batch; ``rows``: of rows that are picked.
        needs: a package that may be missing.
    """

    label: str
    module: str
    way: str
    steps: bool = True
    rows: bool = True
    needs: str = "torch"

    def make(self, case: Case, device: str, pick: bool) -> Runner:
        """A function that imports what it needs when it is called, in a process of its own."""
        build: Callable[..., Runner] = import_module(f"benchmarks.speed.{self.module}").make
        return build(case, device, pick, self.way)


COMPETITORS = {
    "compiled": Competitor("pyro_vae, compiled", "ours", "compiled"),
    "traced": Competitor("pyro_vae, traced", "ours", "traced"),
    "eager": Competitor("pyro_vae, eager", "ours", "eager"),
    "svi": Competitor("Pyro SVI", "stock", "svi"),
    "svi-loader": Competitor("Pyro SVI, DataLoader", "stock", "svi-loader", steps=False),
    "hand": Competitor("by hand, eager, fused Adam", "by_hand", "hand"),
    "hand-compiled": Competitor("by hand, compiled, fused Adam", "by_hand", "hand-compiled"),
    "hand-twice": Competitor("by hand, compiled, Adam too", "by_hand", "hand-twice"),
    "hand-graph": Competitor("by hand, one graph", "by_hand", "hand-graph"),
    "numpyro": Competitor("NumPyro, update", "in_numpyro", "numpyro", needs="numpyro"),
    "numpyro-loop": Competitor("NumPyro, fori_loop", "in_numpyro", "numpyro-loop", needs="numpyro"),
    "matmul": Competitor("matrix product", "competitors", "torch", rows=False),
    "matmul-onednn": Competitor("matrix product, oneDNN", "competitors", "oneDNN", rows=False),
}
PEAKS = ("matmul", "matmul-onednn")
SIZES = {"cpu": 1024, "cuda": 8192}  # of the matrices whose product is the machine's peak
PEAK_FLOP = {device: 2 * size**3 for device, size in SIZES.items()}


def make(case: Case, device: str, pick: bool, way: str) -> Runner:
    """A product of two large float32 matrices: the machine's peak, by the library that torch calls
    for it, or by oneDNN, which PyTorch has too (on some CPUs it is twice as fast as MKL)."""
    a = torch.randn(SIZES[device], SIZES[device], device=device)
    if way == "torch":
        return torch_runner(lambda b: a @ b, a.clone(), [], device)
    if device != "cpu":
        raise ValueError("oneDNN: for CPUs alone")
    product = torch.ops.mkldnn._linear_pointwise
    return torch_runner(lambda b: product(a, b, None, "none", [], ""), a.clone(), [], device)


def chosen(names: Collection[str] | None, pick: bool) -> list[str]:
    """Those of a table, in its order."""
    return [
        name
        for name, one in COMPETITORS.items()
        if (one.rows if pick else one.steps) and (names is None or name in names)
    ]


def missing(name: str) -> str:
    """Why a competitor can't run here, or nothing."""
    package = COMPETITORS[name].needs
    return "" if find_spec(package) else f"{package} is not installed"


def flop(case: Case) -> int:
    """Floating-point operations of matrix products and convolutions in a loss and its gradient."""
    from benchmarks.speed.by_hand import loss

    nets, x = networks(case), rows(case, case.batch)
    with FlopCounterMode(display=False) as counter:
        loss(nets, case, x).backward()
    return int(counter.get_total_flops())
