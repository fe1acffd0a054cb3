"""The speed benchmark: all competitors take the same step, and its tables say what was measured.

No time is asserted.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.speed import competitors, coverage, process, scaling, starting, steps, targets
from benchmarks.speed.__main__ import main
from benchmarks.speed.cases import CASES, Case, constant, networks, our_pair, rows
from benchmarks.speed.competitors import COMPETITORS, Competitor, flop
from benchmarks.speed.options import Options, Results
from benchmarks.speed.process import Failed, Worker, cores, interleaved, quartiles
from benchmarks.speed.runner import Runner, losses, picked, timed, trained
from pyro_vae.objectives.specs import recipes

ROOT = Path(__file__).parents[1]
SMALL = {name: replace(case, batch=8, rows=32) for name, case in CASES.items()}
SMALL["iwae"] = replace(SMALL["iwae"], particles=5)
SMALL["convolutional"] = replace(
    SMALL["convolutional"], event=(12, 8), hidden=(4, 8), latent=4, counts=16
)


@pytest.fixture(autouse=True)
def _float32():
    torch.set_default_dtype(torch.float32)


def runner(case: Case, name: str) -> Runner:
    return COMPETITORS[name].make(case, "cpu", False)


def mean_loss(case: Case, name: str, draws: int = 100) -> tuple[float, float]:
    """With its standard error, in nats per row."""
    found = np.array(losses(runner(case, name), draws))
    offset = constant(case, rows(case, case.batch)) if name.startswith("hand") else 0.0
    return found.mean() - offset, found.std() / math.sqrt(draws)


# ---------------------------------------------------------------------------------------------
# The same step


@pytest.mark.parametrize("name", ["svi", "hand"])
@pytest.mark.parametrize("case", SMALL)
def test_the_same_loss(case: str, name: str):
    torch.manual_seed(1)
    ours, error = mean_loss(SMALL[case], "eager")
    torch.manual_seed(2)
    theirs, other = mean_loss(SMALL[case], name)
    assert abs(ours - theirs) < 4 * math.hypot(error, other)
    assert error < 0.01 * ours  # else the comparison says nothing


def by_the_formula(case: Case, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    n = torch.tensor(float(case.counts))
    coefficient = (n + 1).lgamma() - (x + 1).lgamma() - (n - x + 1).lgamma()
    log_p = x * logits - n * torch.nn.functional.softplus(logits) + coefficient
    return log_p.flatten(1).sum(1)


@pytest.mark.parametrize("name", ["digits", "mnist", "convolutional"])
def test_the_nets_are_those_of_our_pair(name: str):
    case = SMALL[name]
    x, nets, (model, guide) = rows(case, 8), networks(case), our_pair(case)
    z = torch.randn(8, case.latent, generator=torch.Generator().manual_seed(3))
    ours = model.likelihood(z).log_prob(x)
    torch.testing.assert_close(by_the_formula(case, nets["decoder"](z), x), ours)
    loc, raw = nets["encoder"](x / case.counts).chunk(2, -1)
    posterior = guide.posterior(x).base_dist
    torch.testing.assert_close(loc, posterior.loc)
    torch.testing.assert_close(torch.nn.functional.softplus(raw) + 1e-4, posterior.scale)


@pytest.mark.parametrize("name", ["hand-compiled", "hand-twice", "hand-graph"])
def test_ways_by_hand_take_the_steps_of_the_first(name: str, monkeypatch: pytest.MonkeyPatch):
    """All but what the compiler does; one graph has its own Adam."""

    def uncompiled(function: Any = None, **options: Any) -> Any:
        return function or (lambda given: given)

    monkeypatch.setattr(torch, "compile", uncompiled)
    came = []
    for each in ("hand", name):
        one = runner(SMALL["digits"], each)
        torch.manual_seed(1)
        came.append([float(one.repeat(1)) for _ in range(20)])
    assert came[1] == pytest.approx(came[0], rel=1e-4)
    assert came[0][-1] < 0.98 * came[0][0]


def test_competitors_learn_alike():
    came = []
    for name in ("eager", "svi", "hand"):
        one = runner(SMALL["digits"], name)
        torch.manual_seed(1)
        offset = constant(SMALL["digits"], rows(SMALL["digits"], 8)) if name == "hand" else 0.0
        came.append(trained(one, 60) - offset)
    assert came == pytest.approx([came[0]] * 3, rel=0.02)
    assert came[0] < 0.9 * mean_loss(SMALL["digits"], "eager", 20)[0]


LADDER = replace(SMALL["two latents"], event=(30,), hidden=(16,), counts=16, particles=5)
PROGRAM = """
import json
import numpy as np
import torch
from benchmarks.speed.in_numpyro import run, weights
from tests.test_speed import LADDER, SMALL, mean_loss, networks, rows

nets, off = networks(SMALL["convolutional"]), []
x, z = rows(SMALL["convolutional"], 8) / 16, torch.randn(8, 4)
for net, given in ((nets["encoder"], x), (nets["decoder"], z)):
    theirs = run(net, weights(net), given.numpy())
    off.append(float(np.abs(np.asarray(theirs) - net(given).detach().numpy()).max()))
print(json.dumps([off, mean_loss(LADDER, "numpyro-loop")]))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("numpyro") is None, reason="NumPyro is not installed")
def test_the_same_nets_and_loss_in_numpyro():
    """In a process of its own, since JAX warns of forks ever after."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    off, (theirs, other) = json.loads(done.stdout.splitlines()[-1])
    assert max(off) < 1e-5
    ours, error = mean_loss(LADDER, "eager")
    assert abs(ours - theirs) < 4 * math.hypot(error, other)
    assert error < 0.01 * ours


def test_operations_of_a_step():
    """Two for each weight and row, thrice: output, gradient of weights, gradient of inputs, which
    nobody wants of the first layer."""
    sizes = [(784, 400), (400, 40), (20, 400), (400, 784)]
    weights = sum(a * b for a, b in sizes)
    assert flop(CASES["mnist"]) == 2 * 100 * (3 * weights - 784 * 400) == 328_000_000


def test_picked_rows_are_all_rows():
    data = torch.arange(12.0)[:, None]
    batches = list(picked(data, 4))
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert torch.equal(torch.cat(batches).sort(0).values, data)


# ---------------------------------------------------------------------------------------------
# Taking turns


class Clock:
    """A worker whose steps take a fixed time, without taking it."""

    def __init__(self, each: float, asked: list[Any], fails_at: int = 10**9) -> None:
        self.each, self.asked, self.fails_at = each, asked, fails_at
        self.times = 0

    def ask(self, what: str, n: int) -> Any:
        self.times += 1
        if self.times > self.fails_at:
            raise Failed("the process ended (exit code -9)")
        self.asked.append((self, n))
        return self.each * n, 2 * self.each * n


def test_turns():
    asked: list[Any] = []
    workers: Any = {
        "fast": Clock(1e-4, asked),
        "slow": Clock(3e-3, asked),
        "lost": Clock(1.0, asked, fails_at=3),
    }
    found, failed = interleaved(workers, 4, 0.3)
    assert found == {
        "fast": [pytest.approx((1e-4, 2e-4))] * 4,
        "slow": [pytest.approx((3e-3, 6e-3))] * 4,
    }
    assert failed == {"lost": "the process ended (exit code -9)"}
    last = [(worker, n) for worker, n in asked if worker is not workers["lost"]][-8:]
    assert {n for worker, n in last if worker is workers["fast"]} == {3000}
    assert {n for worker, n in last if worker is workers["slow"]} == {100}
    first = [worker for worker, _ in last[::2]]
    assert {id(worker) for worker in first} == {id(workers["fast"]), id(workers["slow"])}


def test_time_and_reset():
    """A step that adds 1: counts, and the parameter put back."""
    at = torch.zeros(())
    counted = []

    def repeat(n: int) -> torch.Tensor:
        counted.append(n)
        return at.add_(n)

    def reset() -> None:
        at.zero_()

    one = Runner(repeat, reset, lambda: None)
    assert min(timed(one, 50)) >= 0
    assert counted == [6, 50]
    assert losses(one, 3) == [1.0, 1.0, 1.0]
    assert trained(one, 20) == 19.5


def test_quartiles():
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)


def test_cores_are_given_back():
    before = dict(os.environ)
    able = hasattr(os, "sched_getaffinity")
    mask = os.sched_getaffinity(0) if able else set()
    with cores(1):
        assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "1"
        assert not able or os.sched_getaffinity(0) == {min(mask)}
    assert dict(os.environ) == before
    assert not able or os.sched_getaffinity(0) == mask


def test_a_process_that_ends_says_so():
    worker = Worker(os._exit, 3)
    with pytest.raises(Failed, match="TypeError"):  # it is given a connection, too
        worker.answer()
    with pytest.raises(Failed, match=r"the process ended \(exit code 0\)"):
        worker.ask("time", 1)
    worker.close()


# ---------------------------------------------------------------------------------------------
# Tables


def record(name: str, seconds: list[float], **more: Any) -> dict[str, Any]:
    job = process.Job(CASES["digits"], name, "cpu", 1)
    middle, low, high = (1000 * t for t in quartiles(seconds))
    ms = {"ms": middle, "ms_low": low, "ms_high": high, "seconds": seconds, "gflops": 3.0}
    ms["cores"] = 1.0
    return job.key() | ms | more


RECORDS = [
    record("compiled", [1e-4, 1e-4, 2e-4], level="compiled", reason=""),
    record("traced", [9e-4] * 3, level="eager", reason="a draw that does not trace"),
    record("eager", [2e-3] * 3, level="eager", reason="", loss=350.0, loss_se=0.1, z=-1.23)
    | {"trained": 180.5},
    record("svi", [1e-3, 2e-3, 4e-3]),
    record("hand", [2e-4] * 3),
    process.Job(CASES["digits"], "numpyro", "cpu", 1).key()
    | {"failed": "numpyro is not installed"},
]


def test_table_of_steps():
    lines = steps.table(RECORDS).splitlines()
    assert lines[0] == "digits: 64-64-8, batch 64, ELBO, cpu, threads 1"
    assert lines[2].split()[2:] == ["0.100", "[0.100,", "0.150]", "3.0", "1.00"]
    assert "at level eager: a draw that does not trace" in lines[3]
    assert "20.00 [15.00, 20.00]" in lines[4]
    assert lines[4].endswith("350.00 ± 0.10       -1.2   180.50")
    assert "20.00 [15.00, 20.00]" in lines[5]  # round by round: 10, 20, 20
    assert lines[7].split("  ")[-1].strip() == "not run: numpyro is not installed"


def test_targets():
    lines = targets.verdicts(RECORDS).splitlines()[3:]
    assert [line.split("   ")[-1].strip() for line in lines] == ["aim met", "MISSED", "1.4", "met"]
    assert "not run: NumPyro" in lines[2]
    assert "1.00 [0.75, 1.50]" in lines[3]  # stock Pyro over eager
    fallen = [RECORDS[0] | {"level": "traced"}, *RECORDS[1:]]
    assert "aim met (pyro_vae at level traced)" in targets.verdicts(fallen)
    assert targets.verdicts([]) == ""


def test_another_loss_is_pointed_out():
    off = {"loss": 351.0, "loss_se": 0.1, "z": 7.1, "trained": 180.5}
    text = steps.table([RECORDS[2], record("svi", [1e-3] * 3) | off])
    assert text.endswith("+7.1   180.50   NOT THE SAME LOSS")
    assert text.count("NOT") == 1


def test_a_competitor_that_fails_says_why(monkeypatch: pytest.MonkeyPatch):
    """Here where losses are compared; its neighbours are timed."""

    class Breaks(Clock):
        def ask(self, what: str, n: int) -> Any:
            if what != "time":
                raise Failed("RuntimeError: out of memory")
            return super().ask(what, n)

    class Works(Clock):
        def ask(self, what: str, n: int) -> Any:
            known = {"losses": [350.0, 351.0], "trained": 180.0}
            return known[what] if what in known else super().ask(what, n)

    @contextmanager
    def started(jobs: dict[str, Any]) -> Iterator[Any]:
        workers = {"svi": Works(1e-3, []), "hand-graph": Breaks(1.0, [])}
        yield (
            workers,
            {"svi": {"unit": 1}, "hand-graph": {"unit": 1}, "hand": Failed("no compiler")},
        )

    monkeypatch.setattr(steps, "started", started)
    names = ["svi", "hand-graph", "hand"]
    came = steps.measure(SMALL["digits"], names, 1, Options(rounds=3))
    assert [r["failed"] for r in came] == ["", "RuntimeError: out of memory", "no compiler"]
    assert came[0]["ms"] == pytest.approx(1.0)
    assert came[0]["gflops"] == pytest.approx(flop(SMALL["digits"]) / 1e6)
    assert came[0]["cores"] == 2.0
    assert came[0]["loss"] == 350.5


def test_the_best_by_hand_counts():
    some = [
        record("compiled", [2e-3] * 3),
        record("hand-compiled", [3e-3] * 3),
        record("hand-graph", [1.9e-3] * 3),
    ]
    some = [r | {"case": "mnist", "threads": 2} for r in some]
    (line,) = [line for line in targets.verdicts(some).splitlines() if "one graph" in line]
    assert line.split()[-10:-4] == ["0.95", "[0.95,", "0.95]", "0.95", "1.2", "met"]


def test_table_of_scaling():
    point = {"axis": "K", "value": 50}
    text = scaling.table([r | point for r in RECORDS])
    assert "Pyro SVI / compiled 20.00" in text
    axes = [axis for axis, _, _ in scaling.points()]
    assert {axis: axes.count(axis) for axis in axes} == {"K": 5, "batch": 5, "width": 6}
    assert all(flop(case) > 0 for _, _, case in list(scaling.points())[5:7])


def test_results_go_on(tmp_path: Path):
    options = Options(results=tmp_path)
    Results("x", options, lambda records: f"{len(records)} lines").add([{"case": "digits"}])
    assert (tmp_path / "x.txt").read_text().startswith("1 lines\n")
    again = Results("x", replace(options, resume=True), str)
    assert again.has(case="digits")
    assert not again.has(case="mnist")
    other = Results("x", replace(options, resume=True, rounds=3), str)
    assert other.records == []


def test_a_competitor_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    lacking = Competitor("nobody", "nothing", "", needs="a_package_nobody_has")
    monkeypatch.setitem(COMPETITORS, "nobody", lacking)
    assert competitors.missing("hand") == ""
    assert "nobody" in competitors.chosen(None, False)
    (came,) = steps.measure(SMALL["digits"], ["nobody"], 1, Options())
    assert came["failed"] == "a_package_nobody_has is not installed"


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path):
    """Through the processes and back, fit included."""
    usual = ["--quick", "--cases", "digits", "--results", str(tmp_path)]
    main([*usual, "--only", "steps", "--competitors", "eager", "hand"])
    main([*usual, "--only", "rows", "--competitors", "eager"])
    fixed, rows_of = (
        json.loads((tmp_path / name).read_text()) for name in ("speed.json", "speed_rows.json")
    )
    assert [r["competitor"] for r in fixed["records"]] == ["eager", "hand"]
    assert [r["competitor"] for r in rows_of["records"]] == ["eager"]
    for r in fixed["records"] + rows_of["records"]:
        assert r["failed"] == ""
        assert len(r["seconds"]) == 2
    assert abs(fixed["records"][1]["z"]) < 4
    assert fixed["settings"]["validation"] == "off for all"
    assert "by hand, eager" in (tmp_path / "speed.txt").read_text()


# ---------------------------------------------------------------------------------------------
# What starts, what is compiled


def test_tables_of_starting():
    text = starting._imports_table([{"what": "pyro_vae", "seconds": [1.0, 2.0, 4.0]}])
    assert text.splitlines()[1].split() == ["pyro_vae", "2.00", "[1.50,", "3.00]"]
    key = process.Job(CASES["digits"], "hand", "cpu", 1).key()
    one = {"cold": [{"first_s": 9.0, "settled_s": 12.0}], "warm": [{"first_s": 1.0}]}
    one["warm"][0]["settled_s"] = 2.0
    line = starting._first_table([key | one]).splitlines()[1]
    assert [
        word for word in line.split() if "." in word and "[" not in word and "]" not in word
    ] == [
        "9.00",
        "12.00",
        "2.00",
    ]


def test_coverage_tries_every_recipe_and_likelihood():
    specs = coverage.objectives()
    assert {spec.partition(":")[0] for spec in specs} == set(recipes())
    assert "iwae:num_particles=3,estimator=dreg" in specs
    names = " ".join(coverage.programs())
    assert all(
        kind in names for kind in ("Bernoulli", "StudentT", "LogisticMixture", "conv_resnet")
    )


def test_every_combination_is_tried_once_and_the_first_ones_are_spread():
    found, specs = coverage.combinations(), coverage.objectives()
    assert len(found) == len(set(found)) == len(specs) * len(coverage.programs())
    first = found[: 3 * len(specs)]
    assert Counter(spec for _, spec in first) == dict.fromkeys(specs, 3)
    assert len({pair for pair, _ in first}) > len(coverage.programs()) / 2


@pytest.mark.parametrize(
    ("pair", "spec", "level"),
    [
        ("vae, Binomial", "elbo:num_particles=3", "eager"),
        ("vae, missing entries, Gaussian", "iwae:num_particles=3,estimator=dreg", "eager"),
        ("multimodal, product", "mvtcae:alpha=0.5", "eager"),
        ("missing, self-masking", "iwae:num_particles=3", "eager"),
        ("table", "elbo:num_particles=3", "eager"),
        ("program, bottom-up ladder", "beta_vae:beta=linear(100)", "eager"),
        ("vae, Binomial", "iwae:num_particles=3,estimator=stl", "refused"),
    ],
)
def test_one_combination(pair: str, spec: str, level: str):
    found = coverage.tried(pair, spec, "eager")
    assert found["level"] == level
    assert ("biased" in found["reason"]) is (level == "refused")


def test_table_of_coverage():
    def of(pair: str, level: str, reason: str = "") -> dict[str, Any]:
        return {"pair": pair, "objective": "elbo", "level": level, "reason": reason}

    text = coverage.table(
        [
            of("a", "compiled"),
            of("b", "compiled"),
            of("c", "compiled"),
            of("d", "traced", "a spline"),
            of("a", "refused", "biased"),
        ]
    )
    lines = text.splitlines()
    number = len(coverage.combinations())
    assert lines[0].startswith(f"5 of {number} combinations")
    assert lines[0].endswith("4 asked for 'compiled', 1 refused")
    error = f"{math.sqrt((1 - 5 / number) * 0.75 * 0.25 / 4):.1%}"
    assert lines[2].split() == ["compiled", "3", "75.0%", "±", error]
    assert lines[3].split() == ["traced", "1", "25.0%", "±", error]
    assert lines[5:7] == ["traced: a spline", "  d: elbo"]
    assert lines[8] == "refused, 1: biased"
