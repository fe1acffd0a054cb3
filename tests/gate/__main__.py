"""Print what every cell showed: ``python -m tests.gate``, or ``python -m tests.gate all``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from tests.gate.answers import PRECISION, check
from tests.gate.cells import Cell, cells, discrete_cells, further_cells, quick_cells, uncovered
from tests.gate.closed_forms import closed_forms
from tests.gate.pairs import BIASED, PAIRS, REFUSED, UNBIASED
from tests.gate.penalties import PenaltyCell, penalty_cells
from tests.gate.planted import planted


def main() -> int:
    """Print what every cell showed; 1 if anything is not as declared."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    start, plants, every = time.process_time(), planted(), sys.argv[1:] == ["all"]
    precision = PRECISION / 2 if every else PRECISION
    groups: dict[str, Sequence[Cell | PenaltyCell]] = {
        **({pair.name: cells([pair]) for pair in PAIRS if every} or {"one each": quick_cells()}),
        "further": further_cells(),
        "discrete": discrete_cells(),
        "penalties": penalty_cells(),
    }
    failed = [*uncovered(c for group in groups.values() for c in group), *closed_forms()]
    print(f"closed forms and coverage: {len(failed)} problems", *failed, sep="\n  ", flush=True)
    print(
        f"{'':12}{'cells':>6}{'passed':>8}{'worst |z|':>11}{'largest s.e.':>14}{'rows':>9}{'s':>6}"
    )
    results = []
    for name, group in groups.items():
        found = [check(cell, precision) for cell in group]
        print(
            f"{name:12}{len(found):6}{sum(not r.problems for r in found):8}"
            f"{max(r.worst for r in found):11.2f}{max(r.error for r in found):14.2%}"
            f"{max(r.rows for r in found):9}{sum(r.seconds for r in found):6.0f}",
            *(f"  FAILED {r.cell}: {'; '.join(r.problems)}" for r in found if r.problems),
            sep="\n",
            flush=True,
        )
        results += found
    missed = [(plant, why) for plant in plants if (why := plant.missed())]
    for plant, why in missed:
        print(f"  MISSED {plant}: {'; '.join(why)}")
    for status in (UNBIASED, BIASED, REFUSED):
        of_status = [r for r in results if r.cell.status == status]
        print(f"{status}: {sum(not r.problems for r in of_status)} of {len(of_status)} cells pass")
    print(f"planted errors: {len(plants) - len(missed)} of {len(plants)} caught")
    print(f"worst |z| {max(r.worst for r in results):.2f}, {time.process_time() - start:.0f} s")
    print("\nbias by design, relative to the gradient, +- standard error (in standard errors)")
    for r in (r for r in results if r.cell.status == BIASED):
        sigmas = f"{r.sigmas:.1f}" if r.error > 1e-9 else "exact"
        print(f"  {r.bias:8.2%} +- {r.error:.2%} ({sigmas}): {r.cell}")
    return int(bool(failed or missed or any(r.problems for r in results)))


if __name__ == "__main__":
    sys.exit(main())
