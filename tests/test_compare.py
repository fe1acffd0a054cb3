"""Grids of objectives and seeds: what is run, what is reused, what the table says."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals.gaussian import Gaussian
from pyro_vae.data import load
from pyro_vae.evaluation import Evaluation
from pyro_vae.objectives.estimators import Pathwise
from pyro_vae.objectives.recipes import elbo, iwae
from pyro_vae.pairs import vae
from pyro_vae.training import compare as compare_module
from pyro_vae.training.compare import Comparison, compare
from pyro_vae.training.fit import NonFiniteError, fit
from tests.small_pairs import data

OBJECTIVES = ["elbo", "iwae:num_particles=3,estimator=dreg"]
TRAIN, TEST = Batch({"x": data(12)}), Batch({"x": data(6, seed=1)})
SMALL: dict[str, Any] = {"latent": 2, "hidden": 4}


def small(
    objectives: Any = OBJECTIVES, seeds: Iterable[int] = (0, 1), **options: Any
) -> Comparison:
    defaults: dict[str, Any] = {
        "build": vae,
        "train": Batch({"x": data(12)}),
        "test": Batch({"x": data(6, seed=1)}),
        "options": SMALL,
        "num_particles": 20,
        "progress": False,
        "epochs": 1,
    }
    return compare(objectives=objectives, seeds=seeds, **{**defaults, **options})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The cells that were trained."""
    cells: list[tuple[str, int]] = []
    run = compare_module._run

    def counted(cell: Any, *args: Any) -> Any:
        cells.append(cell.key)
        return run(cell, *args)

    monkeypatch.setattr(compare_module, "_run", counted)
    return cells


def assert_same(a: Comparison, b: Comparison) -> None:
    assert list(a.cells) == list(b.cells)
    for key, mine in a.cells.items():
        theirs = b.cells[key]
        for name, value in mine.arrays().items():
            assert np.array_equal(value, theirs.arrays()[name]), (key, name)


# ---------------------------------------------------------------------------------------------
# What is run


def test_every_objective_with_every_seed(trained: list[Any]):
    comparison = small(seeds=(seed for seed in (3, 1, 3)))
    assert trained == [(spec, seed) for spec in OBJECTIVES for seed in (3, 1)]
    assert list(comparison.cells) == trained
    assert comparison.objectives == OBJECTIVES
    assert all(seconds > 0 for seconds in comparison.seconds.values())
    assert [e.seed for e in comparison.cells.values()] == [3, 1, 3, 1]
    assert all(e.num_particles == 20 for e in comparison.cells.values())


def test_cells_do_not_depend_on_each_other():
    """A module among the options is trained in place, for one cell."""
    ready = Gaussian(nn.Linear(2, 3), (3,))
    before = [p.detach().clone() for p in ready.parameters()]
    options: dict[str, Any] = {**SMALL, "likelihood": ready}
    both = small(options=options)
    for (spec, seed), e in both.cells.items():
        alone = small([spec], [seed], options=options).cells[spec, seed]
        assert torch.equal(alone.log_p, e.log_p)
    assert all(map(torch.equal, ready.parameters(), before))


def test_the_random_state_is_left_as_it_was():
    before = torch.get_rng_state()
    small(["elbo"], [0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_processes_change_nothing(tmp_path: Path):
    valid = Batch({"x": data(5, seed=2)})
    options: dict[str, Any] = {"optimizer": adam(0.01), "valid": valid}
    alone = small(**options)
    assert_same(small(jobs=2, out=tmp_path, **options), alone)
    assert_same(small(out=tmp_path, **options), alone)


def test_what_processes_exchange_can_be_pickled():
    fit = {"optimizer": adam(0.01)}
    cell = compare_module._Cell(vae, "a", "elbo", 0, SMALL, fit, 10, first_pixel)
    again = pickle.loads(pickle.dumps(cell))
    assert (again.key, again.build, again.options) == (("a", 0), vae, SMALL)
    assert again.judge is first_pixel
    comparison = small(["elbo"], [0])
    assert_same(pickle.loads(pickle.dumps(comparison)), comparison)
    batch = pickle.loads(pickle.dumps(TRAIN))
    assert torch.equal(batch["x"], TRAIN["x"])


def test_objectives_by_name():
    named = {"plain": "elbo", "own": partial(iwae, 3, "dreg")}
    comparison, by_text = small(named, [0]), small(["elbo", OBJECTIVES[1]], [0])
    assert comparison.objectives == ["plain", "own"]
    for mine, theirs in zip(named, by_text.objectives, strict=True):
        assert torch.equal(comparison.rows(mine), by_text.rows(theirs))


def test_objectives_themselves():
    """Every cell trains a copy."""
    own = iwae(3, "dreg")
    comparison, by_text = small([own], [0]), small([OBJECTIVES[1]], [0])
    assert comparison.objectives == [repr(own)]
    assert torch.equal(comparison.rows(repr(own)), by_text.rows(OBJECTIVES[1]))


def test_a_second_judge(tmp_path: Path, trained: list[Any]):
    comparison = small(judge=first_pixel, out=tmp_path)
    x = data(6, seed=1)[:4, 0]
    assert torch.equal(comparison.judged["elbo", 1], x + 1)
    torch.testing.assert_close(comparison.rows("elbo", "judged"), x + 0.5)
    record = comparison.summary()[0]
    assert record["judged"] == pytest.approx(float(x.mean()) + 0.5)
    assert record["judged_se"] == pytest.approx(float(x.std()) / 2)
    assert record["judged_gain"] == 0
    assert f"{record['judged']:.2f} ± {record['judged_se']:.2f}" in str(comparison)
    again = small(judge=first_pixel, out=tmp_path)
    assert len(trained) == 4
    assert torch.equal(again.judged["elbo", 1], x + 1)


def test_without_a_second_judge():
    with pytest.raises(ValueError, match="compare had no judge="):
        by_hand()[0].rows("elbo", "judged")


# ---------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_refused_is_recorded(jobs: int, tmp_path: Path):
    """By itself, and with this pair."""
    biased, strict = "iwae:num_particles=2,estimator=stl", partial(elbo, estimator=Strict())
    asked = {"elbo": "elbo", "biased": biased, "no such": "elbow", "strict": strict}
    comparison = small(asked, out=tmp_path, refused="record", jobs=jobs)
    assert comparison.objectives == ["elbo"]
    assert list(comparison.refused) == [(n, s) for n in list(asked)[1:] for s in (0, 1)]
    told = {record["objective"]: record["reason"] for record in comparison.refusals()}
    assert [record["seeds"] for record in comparison.refusals()] == [[0, 1]] * 3
    assert "biased" in told["biased"]
    assert "came 'elbow', wanted one of" in told["no such"]
    assert told["strict"] == "estimator strict: refused"
    *_, first, second, third = str(comparison).splitlines()
    assert first == f"refused: biased: {told['biased']}"
    assert (second[:18], third[:16]) == ("refused: no such: ", "refused: strict:")


class Strict(Pathwise):
    """Refuses every pair."""

    def scores(self, site: str, reparameterized: bool) -> bool:
        raise ValueError("estimator strict: refused")


def test_a_training_that_fails_is_recorded(monkeypatch: pytest.MonkeyPatch):
    bad = partial(torch.optim.SGD, lr=1e300)
    monkeypatch.setattr(compare_module, "fit", only_for("iwae", bad))
    comparison = small(refused="record", seeds=[0])
    assert comparison.objectives == ["elbo"]
    (reason,) = comparison.refused.values()
    assert reason.startswith("iwae:num_particles=3,estimator=dreg, seed 0: step")


def test_nothing_but_refusals():
    comparison = small(["elbow"], [0], refused="record")
    assert comparison.summary() == []
    assert str(comparison).startswith("refused: elbow: objective: came 'elbow'")


# ---------------------------------------------------------------------------------------------
# Mapped files


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_rows_in_mapped_files(jobs: int, tmp_path: Path):
    for name, x in (("train", data(12)), ("test", data(6, seed=1))):
        np.save(tmp_path / f"{name}.npy", x.numpy())
    rows: dict[str, Any] = {
        name: load(tmp_path / f"{name}.npy", mmap=True) for name in ("train", "test")
    }
    assert rows["train"].mapped
    out = tmp_path / "out"
    assert_same(small(jobs=jobs, out=out, **rows), small())


def test_mapped_files_are_told_by_what_is_in_them(tmp_path: Path):
    paths = []
    for seed in (0, 0, 1):
        np.save(tmp_path / "x.npy", data(30, seed=seed).numpy())
        paths.append(path_of(tmp_path, train=load(tmp_path / "x.npy", mmap=True)))
    assert paths[0] == paths[1] != paths[2]


def test_rows_beyond_the_first_block_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compare_module, "_BLOCK", 5)
    other = data(12)
    other[11, 0] += 1
    path = path_of(tmp_path, train=Batch({"x": data(12)}))
    assert path_of(tmp_path, train=Batch({"x": other})) != path


# ---------------------------------------------------------------------------------------------
# What is reused


def test_a_comparison_goes_on_where_it_was_cut_off(tmp_path: Path, trained: list[Any]):
    small([OBJECTIVES[0]], [0], out=tmp_path)
    assert len(trained) == 1
    comparison = small(out=tmp_path)
    assert trained[1:] == [(OBJECTIVES[0], 1), (OBJECTIVES[1], 0), (OBJECTIVES[1], 1)]
    again = small(out=tmp_path)
    assert len(trained) == 4
    assert_same(again, comparison)
    assert again.seconds == comparison.seconds
    assert (tmp_path / "comparison.txt").read_text() == f"{comparison}\n"


def test_finished_cells_survive_an_error(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
):
    bad = partial(torch.optim.SGD, lr=1e300)
    monkeypatch.setattr(compare_module, "fit", only_for("iwae", bad))
    with pytest.raises(NonFiniteError, match="iwae:num_particles=3,estimator=dreg, seed 0: step"):
        small(out=tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 2
    monkeypatch.setattr(compare_module, "fit", fit)
    trained.clear()
    small(out=tmp_path)
    assert trained == [(OBJECTIVES[1], 0), (OBJECTIVES[1], 1)]


def only_for(name: str, optimizer: Any) -> Any:
    """Train one objective with another optimizer."""

    def change(model: Any, guide: Any, rows: Any, objective: Any, **options: Any) -> Any:
        if repr(objective.bound) == name:
            options |= {"optimizer": optimizer, "epochs": 5}
        return fit(model, guide, rows, objective, **options)

    return change


def build_one(batch: Batch, latent: int = 2) -> tuple[Any, Any]:
    return vae(batch, latent, 4)


def build_two(batch: Batch, latent: int = 2) -> tuple[Any, Any]:
    return vae(batch, latent, 5)


def closure(hidden: int) -> Any:
    def build(batch: Batch, **options: Any) -> tuple[Any, Any]:
        return vae(batch, 2, hidden)

    return build


def first_pixel(model: Any, guide: Any, test: Batch, seed: int) -> Tensor:
    """A judge of four rows that has seen nothing of the pair but its seed."""
    return test["x"][:4, 0] + seed


class Builder:
    """A callable whose repr says nothing about it."""

    def __init__(self, hidden: int) -> None:
        self.hidden = hidden

    def __call__(self, batch: Batch, **options: Any) -> tuple[Any, Any]:
        return vae(batch, 2, self.hidden)


def adam(lr: float) -> Any:
    return partial(torch.optim.Adam, lr=lr)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Gaussian(nn.Linear(2, 3), (3,))


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "K": ({}, {"num_particles": 21}),
    "options": ({}, {"options": {**SMALL, "latent": 1}}),
    "epochs": ({}, {"epochs": 2}),
    "learning rate": ({"optimizer": adam(0.1)}, {"optimizer": adam(0.2)}),
    "training rows": ({}, {"train": Batch({"x": data(12, seed=9)})}),
    "test rows": ({}, {"test": Batch({"x": data(6, seed=9)})}),
    "row weights": ({}, {"train": Batch({"x": data(12)}, weights=torch.arange(12.0))}),
    "missing entries": ({}, {"train": Batch({"x": data(12)}).hide("x", data(12) > 1)}),
    "dtype": (
        {"train": Batch({"x": torch.ones(2, 3, dtype=torch.float32)})},
        {"train": Batch({"x": torch.ones(2, 3, dtype=torch.float64)})},
    ),
    "held-out rows": ({"valid": TEST}, {"valid": Batch({"x": data(6, seed=2)})}),
    "builder": ({"build": build_one}, {"build": build_two}),
    "closure": ({"build": closure(4)}, {"build": closure(5)}),
    "partial": ({"build": partial(vae, hidden=4)}, {"build": partial(vae, hidden=5)}),
    "ready module": (
        {"options": {**SMALL, "likelihood": network(0)}},
        {"options": {**SMALL, "likelihood": network(1)}},
    ),
    "judge": ({}, {"judge": first_pixel}),
    "function": ({"spec": partial(elbo, 2)}, {"spec": partial(elbo, 3)}),
    "array": (
        {"options": {**SMALL, "hidden": np.array([4, 4])}},
        {"options": {**SMALL, "hidden": np.array([4, 5])}},
    ),
}


def path_of(folder: Path, **changes: Any) -> Path:
    """Where a cell of these settings is kept."""
    settings: dict[str, Any] = {
        "build": vae,
        "train": TRAIN,
        "test": TEST,
        "options": SMALL,
        "num_particles": 20,
        "epochs": 1,
        "spec": "elbo",
        "judge": None,
        **changes,
    }
    build, train, test, options, num_particles = (
        settings.pop(name) for name in ("build", "train", "test", "options", "num_particles")
    )
    spec, judge = settings.pop("spec"), settings.pop("judge")
    cell = compare_module._Cell(build, "a", spec, 0, options, settings, num_particles, judge)
    return compare_module._path(folder, cell, compare_module._described([train, test]))


@pytest.mark.parametrize("case", SETTINGS)
def test_cells_of_other_settings_are_kept_apart(case: str, tmp_path: Path):
    first, second = SETTINGS[case]
    assert path_of(tmp_path, **first) == path_of(tmp_path, **first)
    assert path_of(tmp_path, **first) != path_of(tmp_path, **second)


def test_the_default_dtype_is_a_setting(tmp_path: Path):
    path = path_of(tmp_path)
    torch.set_default_dtype(torch.float32)
    assert path_of(tmp_path) != path


@pytest.mark.parametrize(
    "value", [build_one, closure(4), partial(build_one, latent=1), adam(0.1), Gaussian, TRAIN]
)
def test_settings_are_told_without_their_place_in_memory(value: Any):
    """Which is another one in the process that goes on."""
    assert " at 0x" not in repr(compare_module._described(value))


def test_what_has_no_description_is_never_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    builder = Builder(4)
    path = path_of(tmp_path, build=builder)
    assert path_of(tmp_path, build=builder) == path
    monkeypatch.setattr(compare_module, "_PROCESS", "another process")
    assert path_of(tmp_path, build=builder) != path


def empty_archive() -> bytes:
    file = io.BytesIO()
    np.savez(file)
    return file.getvalue()


def single_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"no archive",
        lambda content: content[: len(content) // 2],
        lambda content: content[:200] + bytes(50) + content[250:],
        lambda content: empty_archive(),
        lambda content: single_array(),
        lambda content: pickle.dumps({"log_p": 1}),
    ],
    ids=["empty", "text", "cut off", "changed", "archive without cells", "array", "pickle"],
)
def test_a_damaged_cell_is_run_again(damage: Any, tmp_path: Path, trained: list[Any]):
    comparison = small(out=tmp_path)
    trained.clear()
    (path,) = tmp_path.glob("elbo-seed1-*.npz")
    path.write_bytes(damage(path.read_bytes()))
    again = small(out=tmp_path)
    assert trained == [("elbo", 1)]
    assert_same(again, comparison)


# ---------------------------------------------------------------------------------------------
# What the table says


def evaluation(log_p: Tensor, seed: int = 0) -> Evaluation:
    zero = torch.zeros(len(log_p))
    return Evaluation(
        *(log_p, log_p - 0.5, log_p - 1.0, 10 + zero, zero),
        rate={"z": torch.tensor([0.5, 0.0])},
        active={"z": torch.tensor([True, False])},
        num_particles=100,
        proposals=("not widened",),
        seed=seed,
    )


def by_hand(rows: int = 400) -> tuple[Comparison, Tensor, Tensor]:
    """Rows that differ much from each other, objectives that differ little on each of them."""
    base = 10 * torch.randn(rows)
    gain = 0.3 + 0.1 * torch.randn(rows)
    cells = {}
    for seed in (0, 1):
        cells["elbo", seed] = evaluation(base + seed, seed)
        cells["iwae:num_particles=5", seed] = evaluation(base + gain + seed, seed)
    return Comparison(cells, dict.fromkeys(cells, 2.0)), base, gain


def test_differences_are_paired_by_row():
    comparison, base, gain = by_hand()
    difference = comparison.versus("iwae:num_particles=5", "elbo")
    assert difference.mean == pytest.approx(float(gain.mean()))
    assert difference.error == pytest.approx(float(gain.std()) / 20)
    torch.testing.assert_close(comparison.rows("elbo"), base + 0.5)
    torch.testing.assert_close(comparison.rows("elbo", "elbo"), base - 0.5)
    back = comparison.versus("elbo", "iwae:num_particles=5", "elbo")
    assert back.mean == pytest.approx(-difference.mean)


def test_records():
    comparison, base, gain = by_hand()
    first, second = comparison.summary()
    assert (first["objective"], first["seeds"], first["rows"]) == ("elbo", [0, 1], 400)
    assert first["log_p"] == pytest.approx(float(base.mean()) + 0.5)
    assert first["log_p_se"] == pytest.approx(float(base.std()) / 20)
    assert first["log_p_gain"] == 0
    assert second["log_p_gain"] == pytest.approx(float(gain.mean()))
    assert second["log_p_gain_se"] < 0.05 * second["log_p_se"]
    low, high = second["log_p_per_seed"]
    assert high - low == pytest.approx(1.0)
    assert second["active_units"] == [1, 1]
    assert second["seconds"] == 2.0


def test_table():
    comparison, _, gain = by_hand()
    text = str(comparison)
    head, _, first, second, *notes = text.splitlines()
    assert "log p >= (K=100)" in head
    assert "log p >= (K=10)" in head
    assert first.startswith("elbo ")
    assert f"{float(gain.mean()):+.2f} ± " in second
    assert "400 held-out rows" in " ".join(notes)
    assert len({line.index("±") for line in (first, second)}) == 1  # columns stand in line


def test_table_of_too_few_particles_for_khat():
    comparison, *_ = by_hand()
    cells = {key: replace(e, num_particles=5) for key, e in comparison.cells.items()}
    few = Comparison(cells)
    assert all(r["khat_median"] is None and r["khat_bad_share"] is None for r in few.summary())
    assert "bad: no share, as K is too small for a k-hat" in str(few)


def test_unknown_objective():
    comparison, *_ = by_hand()
    with pytest.raises(ValueError, match=r"came 'iwae', wanted one of \['elbo', 'iwae:"):
        comparison.rows("iwae")


def test_a_single_row_has_no_error():
    comparison, *_ = by_hand(rows=1)
    assert math.isnan(comparison.summary()[0]["log_p_se"])
    assert "nan" in str(comparison)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown objective": ({"objectives": ["elbow"]}, "came 'elbow', wanted one of"),
    "refused objective": ({"objectives": ["iwae:num_particles=2,estimator=stl"]}, "biased"),
    "no objectives": ({"objectives": []}, "wanted a list of at least one"),
    "text for a list": ({"objectives": "elbo"}, "objectives='elbo', wanted a list"),
    "unknown word": ({"refused": "skip"}, "came refused='skip', wanted 'raise' or 'record'"),
    "no seeds": ({"seeds": ()}, "no seeds"),
    "seed": ({"seed": 3}, "wanted seeds="),
    "other sites": ({"test": Batch({"y": data(4)})}, "train has sites"),
    "no rows": ({"test": Batch({"x": data(4)[:0]})}, "test came without rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str, trained: list[Any], tmp_path: Path):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        small(**{"out": tmp_path / "out", **options})
    assert trained == []
    assert not (tmp_path / "out").exists()
