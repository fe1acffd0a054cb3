"""The benchmark of data missing because of their value: its protocol, and seeds that share a step."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import normal

import pyro_vae as pv
from benchmarks import not_miwae as bench


def test_protocol_hides_what_the_papers_hides(tmp_path):
    """Filling in the column's mean has the published RMSE (1.82), which fixes data and mask."""
    x = bench.table_of("breast")
    batch = bench.hidden_above_mean(x)
    assert x.shape == (569, 30)
    torch.testing.assert_close(x.square().mean(0), torch.ones(30))
    seen = batch.mask("x")
    assert seen[:, 15:].all()
    assert torch.equal(seen[:, :15], x[:, :15] <= x[:, :15].mean(0))
    assert torch.equal(batch["s"], seen.to(batch["s"]))
    given = argparse.Namespace(data="breast", row="mean", seeds=5, steps=1, particles=1, seed=0)
    (found,) = bench.measured(given, tmp_path)["rmse"]
    assert found == pytest.approx(1.82, abs=0.005)


class Noise:
    """Standard normal numbers ``[K, S, B, ...]``: those of all seeds, then those of one."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []
        self.seed: int | None = None
        self.place = 0

    def of(self, seed: int) -> None:
        self.seed, self.place = seed, 0

    def __call__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.seed is None:
            self.made.append(torch.randn(shape, dtype=dtype))
            return self.made[-1]
        numbers = self.made[self.place][:, self.seed : self.seed + 1]
        self.place += 1
        assert numbers.shape == shape
        return numbers


@pytest.mark.parametrize(
    "name", ["PPCA", "not-MIWAE PPCA, self-masking", "MIWAE", "not-MIWAE, agnostic"]
)
def test_stacked_seeds_are_trainings_of_their_own(monkeypatch, name):
    """Loss and gradient at the same draws, of two seeds at once and of each alone."""
    row, batch = bench.ROWS[name], bench.hidden_above_mean(torch.randn(12, 4))
    data = batch if row.mechanism else batch.without("s")
    objective, noise = pv.iwae(3), Noise()
    pairs: dict[tuple[int, ...], Any] = {
        seeds: bench.pair(row, batch, seeds) for seeds in ((7, 8), (7,), (8,))
    }
    for model, guide in pairs.values():
        objective.plan(model, guide, (data,), {})
    monkeypatch.setattr(normal, "_standard_normal", noise)

    def gradients(seeds: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        model, guide = pairs[seeds]
        loss = objective(model, guide)(data)
        named = dict([*model.named_parameters(), *guide.named_parameters()])
        found = torch.autograd.grad(loss, list(named.values()))
        return loss.detach(), dict(zip(named, found, strict=True))

    total, together = gradients((7, 8))
    losses = []
    for place, seed in enumerate((7, 8)):
        noise.of(place)
        loss, alone = gradients((seed,))
        losses.append(loss)
        for parameter, gradient in alone.items():
            torch.testing.assert_close(together[parameter][place : place + 1], gradient)
    assert losses[0] != losses[1]
    torch.testing.assert_close(total, losses[0] + losses[1])


def test_weighted_sums_over_chunks_are_those_of_all_particles():
    log_w, value = 5 * torch.randn(6, 2, 3), torch.randn(6, 2, 3, 4)
    sums = bench.Weighted()
    for k in (0, 2, 4):
        sums.add(log_w[k : k + 2], [value[k : k + 2], value[k : k + 2] + 1])
    weights = log_w.softmax(0)
    wanted = (weights[..., None] * value).sum(0)
    torch.testing.assert_close(sums.means[0], wanted)
    torch.testing.assert_close(sums.means[1], wanted + 1)
    torch.testing.assert_close(sums.log_total, log_w.logsumexp(0))
    torch.testing.assert_close(1 / sums.square, 1 / weights.square().sum(0))


def test_a_row_is_trained_and_the_table_says_what_was_not_run(tmp_path):
    given = argparse.Namespace(
        data="breast", row="not-MIWAE, sign known", seeds=2, steps=3, particles=50, seed=0
    )
    given.compile = "eager"
    record = bench.measured(given, tmp_path)
    assert len(record["rmse"]) == len(record["rmse_draws"]) == len(record["log_p"]) == 2
    assert all(0.5 < value < 3 for value in record["rmse"])
    lines = bench.table([record]).splitlines()
    (mine,) = [
        line
        for line in lines
        if line.startswith("breast") and "sign known   " in line and "PPCA" not in line
    ]
    assert f"{sum(record['rmse']) / 2:.3f} ±" in mine
    assert sum(line.endswith("not run") for line in lines) == 4 * len(bench.ROWS) - 1
