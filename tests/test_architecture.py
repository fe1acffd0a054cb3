"""Who may import whom: every module is parsed, and what the table does not allow is an error.

And what is left for later: parts and packages that are imported when they are first asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyro_vae
from pyro_vae import _ON_DEMAND

ROOT = Path(__file__).parents[1]

# Parts of the library that each part may import, besides itself. "" is the public face,
# pyro_vae/__init__.py, which re-exports from everywhere and which nobody inside imports.
BATCH = {"batch"}
FILES = {"files"}
OBJECTIVES = {"objectives", "operators", *BATCH}
FAST = {"compiled", "linter"}
EVALUATION = {"evaluation", *FAST, *OBJECTIVES}
PROGRAMS = {"models", "guides", "conditionals", "nn"}
MIDDLE = {"pairs", "reporting", "training"}
FACE = {*MIDDLE, *EVALUATION, *FAST, *OBJECTIVES, *PROGRAMS, *FILES, "data"}
ALLOWED: dict[str, set[str]] = {
    "": {*FACE, "saved", "cli", "sklearn"},
    "cli": {*FACE, "saved"},
    "saved": FACE,
    "sklearn": FACE,
    "pairs": {*EVALUATION, *PROGRAMS},
    "reporting": {*EVALUATION, *FILES},
    "training": {*EVALUATION, *FILES},
    "evaluation": {*FAST, *OBJECTIVES},
    "compiled": OBJECTIVES,
    "linter": OBJECTIVES,
    "objectives": {"operators", *BATCH},
    "data": {*BATCH, *FILES},
    "models": {"conditionals", "nn", *BATCH},
    "guides": {"conditionals", "nn", *BATCH},
    "conditionals": {"nn"},
    "nn": set(),
    "batch": set(),
    "operators": set(),
    "files": set(),
}

# Packages from elsewhere, besides the standard library.
USUAL = {"torch", "pyro", "numpy"}
OUTSIDE: dict[str, set[str]] = {
    "nn": {"torch"},
    "cli": {*USUAL, "typer", "tqdm", "arviz", "matplotlib"},
    "reporting": {*USUAL, "arviz", "matplotlib", "pandas"},
    "evaluation": {*USUAL, "sklearn"},
    "sklearn": {*USUAL, "sklearn"},
    "data": {*USUAL, "pandas", "PIL", "pooch", "pyarrow", "sklearn"},
    "training": {*USUAL, "safetensors", "tqdm"},
}


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Pairs (part, file), models and guides by their real folders (rglob follows no link)."""
    for source in ("pyro_vae", "models", "guides"):
        for path in sorted((root / source).rglob("*.py")):
            inside = path.relative_to(root).parts
            name = inside[1].removesuffix(".py") if source == "pyro_vae" else source
            yield "" if name == "__init__" else name, path


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Pairs (line, dotted name) of all that a module imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from pyro_vae import batch` imports pyro_vae.batch.
            names = (
                [f"{base}.{alias.name}" for alias in node.names] if base == "pyro_vae" else [base]
            )
            yield from ((node.lineno, name) for name in names)


def refusal(part: str, name: str) -> str | None:
    """Why a module of ``part`` may not import ``name``, or None if it may."""
    if name.startswith("."):
        return "relative import: write it out from pyro_vae"
    top, _, rest = name.partition(".")
    if top in ("models", "guides"):
        return f"import pyro_vae.{name}: {name} would be a second module"
    if top != "pyro_vae":
        fine = top in sys.stdlib_module_names or top in OUTSIDE.get(part, USUAL)
        return None if fine else f"{part or 'pyro_vae'} may not import {top}"
    target = rest.partition(".")[0]
    if target not in ALLOWED or not target:
        return "import the part that defines it, not the public face"
    if target == part or target in ALLOWED[part]:
        return None
    return f"{part} may not import {target}"


def violations(root: Path) -> list[str]:
    found = []
    for part, path in modules(root):
        where = path.relative_to(root)
        if part not in ALLOWED:
            found.append(f"{where}: part {part!r} is not in the table of this test")
            continue
        for line, name in imports(path):
            if why := refusal(part, name):
                found.append(f"{where}:{line}: import of {name}: {why}")
    return found


def test_imports_follow_the_table() -> None:
    assert list(modules(ROOT))
    assert violations(ROOT) == []


def test_table_has_no_cycle() -> None:
    """Everything to the right is listed, and nothing to the left."""
    for part, others in ALLOWED.items():
        for other in others:
            assert ALLOWED[other] <= others, (part, other)
            assert part not in ALLOWED[other], (part, other)


FORBIDDEN = [
    ("pyro_vae/training/fit.py", "from pyro_vae.models.latent import LatentVariableModel"),
    ("pyro_vae/training/fit.py", "from pyro_vae import data"),
    ("pyro_vae/training/__init__.py", "import pyro_vae.pairs"),
    ("pyro_vae/objectives/bounds.py", "from pyro_vae.evaluation.likelihood import log_likelihood"),
    ("pyro_vae/objectives/bounds.py", "def f():\n    import pyro_vae.linter"),
    ("pyro_vae/objectives/bounds.py", "from pyro_vae import Batch"),
    ("pyro_vae/objectives/bounds.py", "import pyro_vae as pv"),
    ("pyro_vae/objectives/bounds.py", "from . import estimators"),
    ("pyro_vae/objectives/bounds.py", "from .estimators import pathwise"),
    ("pyro_vae/evaluation/likelihood.py", "import arviz as az"),
    ("pyro_vae/evaluation/likelihood.py", "from pyro_vae.training.fit import fit"),
    ("pyro_vae/compiled.py", "from pyro_vae.linter import check"),
    ("pyro_vae/batch.py", "from pyro_vae.objectives import Objective"),
    ("pyro_vae/data/load.py", "from pyro_vae.training.runs import load"),
    ("pyro_vae/data/load.py", "import typer"),
    ("pyro_vae/nn/mlp.py", "import pyro"),
    ("pyro_vae/nn/mlp.py", "import numpy as np"),
    ("pyro_vae/nn/mlp.py", "from pyro_vae.batch import Batch"),
    ("pyro_vae/conditionals/gaussian.py", "from pyro_vae.batch import Batch"),
    ("pyro_vae/pairs/vae.py", "from pyro_vae.training import fit"),
    ("pyro_vae/pairs/vae.py", "from matplotlib import pyplot"),
    ("pyro_vae/sklearn.py", "from pyro_vae.cli import main"),
    ("pyro_vae/extra.py", "import torch"),
    ("models/latent.py", "from pyro_vae.guides.amortized import AmortizedGuide"),
    ("models/latent.py", "from pyro_vae.objectives import Objective"),
    ("guides/amortized.py", "from pyro_vae.models.latent import LatentVariableModel"),
    ("guides/amortized.py", "import models.latent"),
    ("pyro_vae/pairs/vae.py", "from guides.amortized import AmortizedGuide"),
]


@pytest.mark.parametrize(("file", "code"), FORBIDDEN, ids=[f"{f}: {c}" for f, c in FORBIDDEN])
def test_planted_import_is_found(tmp_path: Path, file: str, code: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    (found,) = violations(tmp_path)
    assert found.startswith(file)


PERMITTED = [
    ("pyro_vae/__init__.py", "from pyro_vae.cli import main\nfrom pyro_vae.models import latent"),
    ("pyro_vae/cli.py", "import typer, arviz\nfrom pyro_vae import data, pairs, reporting"),
    ("pyro_vae/sklearn.py", "from sklearn.base import BaseEstimator\nimport pyro_vae.data"),
    ("pyro_vae/reporting/plots.py", "import matplotlib.pyplot\nimport pyro_vae.evaluation"),
    ("pyro_vae/evaluation/latent.py", "from pyro_vae.evaluation.likelihood import log_likelihood"),
    ("pyro_vae/nn/__init__.py", "import math, torch\nfrom pyro_vae.nn.mlp import mlp"),
    ("guides/__init__.py", "from pyro_vae.guides.amortized import AmortizedGuide"),
    ("models/latent.py", "import pyro\nfrom pyro_vae.conditionals.gaussian import Gaussian"),
]


@pytest.mark.parametrize(("file", "code"), PERMITTED, ids=[file for file, _ in PERMITTED])
def test_permitted_import_passes(tmp_path: Path, file: str, code: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert violations(tmp_path) == []


# --- what is left for later ---------------------------------------------------------------------

HEAVY = {"arviz", "matplotlib", "pandas", "PIL", "pooch", "pyarrow", "sklearn"}
PARTS = {home.partition(":")[0] for home in _ON_DEMAND.values()}
LATER = {"pyro_vae": HEAVY | PARTS | {"concurrent.futures.process", "typer"}, "pyro_vae.cli": HEAVY}


@pytest.mark.parametrize("module", LATER)
def test_import_leaves_for_later(module: str) -> None:
    code = f"import sys, {module}; print(*{LATER[module]} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def for_type_checkers() -> dict[str, Any]:
    """What the imports of pyro_vae/__init__.py that do not run would give."""
    tree = ast.parse(Path(pyro_vae.__file__).read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    found: dict[str, Any] = {}
    exec(compile(ast.Module(guarded.body, []), pyro_vae.__file__, "exec"), found)
    del found["__builtins__"]
    return found


def test_names_on_demand_are_those_that_type_checkers_see(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = for_type_checkers()
    assert set(declared) == set(_ON_DEMAND) <= set(pyro_vae.__all__)
    for name, value in declared.items():
        monkeypatch.delitem(vars(pyro_vae), name, raising=False)  # as before the first import
        assert name in dir(pyro_vae)
        assert getattr(pyro_vae, name) is value
