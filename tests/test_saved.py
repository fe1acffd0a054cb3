"""Runs come back from their folders, and no code does that nobody named."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.conditionals import Bernoulli, Binomial, Gaussian, StandardNormal
from pyro_vae.pairs import rebuilt
from pyro_vae.saved import PairSpec, keywords

OWN = """
import pyro_vae as pv
from torch import nn

print("the file was run")


def build(batch, latent=2, wide=False):
    return pv.pairs.vae(batch, latent=latent, hidden=(8,) if wide else (4,))
"""


def binary(rows: int = 30) -> pv.Batch:
    generator = torch.Generator().manual_seed(0)
    return pv.Batch({"x": (torch.rand(rows, 6, generator=generator) < 0.3).float()})


def trained(path: Path, **options: Any) -> pv.Run:
    data = binary()
    model, guide = pv.pairs.vae(data, latent=2, hidden=(4,), **options)
    return pv.fit(model, guide, data, epochs=3, batch_size=10, out=path)


def assert_same(a: pv.Run, b: pv.Run) -> None:
    for one, other in ((a.model, b.model), (a.guide, b.guide)):
        mine, theirs = one.state_dict(), other.state_dict()  # type: ignore[attr-defined]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_ready_pair_comes_back_by_its_name(tmp_path):
    run = trained(tmp_path / "run", activation=nn.Tanh)
    before = torch.random.get_rng_state()
    again = pv.load(tmp_path / "run")
    assert torch.equal(before, torch.random.get_rng_state())
    assert again.model is not run.model
    assert_same(run, again)
    assert again.history == run.history
    assert again.best == run.best
    assert again.stopped == "epochs"
    assert again.objective == repr(run.objective)
    assert "30 steps" not in repr(again)
    assert "9 steps" in repr(again)
    mine, theirs = (each.evaluate(binary(), 20) for each in (run, again))
    assert torch.equal(mine.log_p, theirs.log_p)


@pytest.mark.parametrize(
    "options",
    [
        {"likelihood": Bernoulli},
        {"likelihood": Gaussian, "net": pv.nn.dense_resnet},
        {"hidden": 5, "prior": StandardNormal, "site": "x"},
        {"activation": nn.ELU, "hidden": [4, 3]},
    ],
    ids=["likelihood", "net", "prior", "activation"],
)
def test_options_are_told_by_name(options):
    model, guide = pv.pairs.vae(binary(), latent=3, **options)
    again = rebuilt(json.loads(json.dumps(model.built_by)), binary())
    assert str(again[0]) == str(model)
    assert str(again[1]) == str(guide)


@pytest.mark.parametrize(
    "options",
    [
        {"likelihood": partial(Binomial.build, total_count=20)},
        {"prior": StandardNormal(2)},
        {"activation": lambda: nn.ReLU()},
    ],
    ids=["partial", "module", "lambda"],
)
def test_pair_of_own_parts_has_to_be_given(tmp_path, options):
    run = trained(tmp_path / "run", **options)
    with pytest.raises(ValueError, match=r"run: its pair was built by code of its own.*pair="):
        pv.load(tmp_path / "run")
    fresh = pv.pairs.vae(binary(), latent=2, hidden=(4,), **options)
    assert_same(run, pv.load(tmp_path / "run", fresh))
    again = pv.load(
        tmp_path / "run", lambda batch: pv.pairs.vae(batch, latent=2, hidden=(4,), **options)
    )
    assert_same(run, again)


def test_file_runs_only_where_it_is_named(tmp_path, capsys):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    data = binary()
    model, guide = PairSpec(f"{file}:build", ("latent=3", "wide=True"))(data)
    run = pv.fit(model, guide, data, epochs=1, out=tmp_path / "run")
    file.write_text(OWN + "\n")  # so that the file would be imported anew
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"built by .*own.py:build, and no code is run"):
        pv.load(tmp_path / "run")
    assert capsys.readouterr().out == ""
    again = pv.load(tmp_path / "run", f"{file}:build")
    assert "the file was run" in capsys.readouterr().out
    assert_same(run, again)


def test_config_that_names_code_runs_none(tmp_path, capsys):
    trained(tmp_path / "run")
    file = tmp_path / "evil.py"
    file.write_text(OWN)
    for name in (f"{file}:build", "BUILDERS", "__builtins__"):
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        config["pair"] = {"pair": name, "options": {}}
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="its pair was built by"):
            pv.load(tmp_path / "run")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ({"pair": "vae", "options": {"nosuch": 1}}, "nosuch"),
        ({"pair": "vae", "options": {"likelihood": {"part": "system"}}}, "'system'"),
        ({"pair": "vae", "options": {"latent": -1}}, "latent=-1"),
        ({"pair": "vae", "options": 3}, "of 3"),
    ],
    ids=["option", "part", "value", "kind"],
)
def test_recipe_that_makes_no_pair(tmp_path, pair, words):
    trained(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "pair": pair}))
    with pytest.raises(ValueError, match=r"config.json: pair: ") as error:
        pv.load(tmp_path / "run")
    assert words in str(error.value)


def test_another_pair_is_refused(tmp_path):
    trained(tmp_path / "run")
    other = pv.pairs.vae(binary(), latent=3, hidden=(4,))
    with pytest.raises(ValueError, match="safetensors: not of this pair"):
        pv.load(tmp_path / "run", other)


def test_run_that_is_not_there_or_not_finished(tmp_path):
    with pytest.raises(ValueError, match=r"no such file; is .* a run folder"):
        pv.load(tmp_path / "run")
    trained(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not finished; go on with .*resume"):
        pv.load(tmp_path / "run")


def test_device_that_does_not_work(tmp_path):
    trained(tmp_path / "run")
    with pytest.raises(ValueError, match="device: came 'nowhere'"):
        pv.load(tmp_path / "run", device="nowhere")


def test_data_other_than_the_stand_in(tmp_path):
    run = trained(tmp_path / "run")
    seen = []

    def build(batch: pv.Batch) -> Any:
        seen.append(len(batch))
        return pv.pairs.vae(batch, latent=2, hidden=(4,))

    assert_same(run, pv.load(tmp_path / "run", build, data=binary(17)))
    assert seen == [17]


def test_standardized_data_come_with_what_undoes_it(tmp_path):
    raw = pv.Batch({"x": np.random.default_rng(0).normal(5.0, 3.0, (40, 3))})
    (data,) = pv.data.standardize(raw)
    model, guide = pv.pairs.vae(data, latent=2, hidden=(4,))
    pv.fit(model, guide, data, epochs=1, out=tmp_path / "run")
    record = pv.load(tmp_path / "run").config["data"]
    torch.testing.assert_close(pv.data.undo(record, "x", data["x"]), raw["x"])
    torch.testing.assert_close(pv.data.standardize_as(record, raw)["x"], data["x"])
    run = pv.load(tmp_path / "run")
    with pytest.raises(ValueError, match=r"evaluate: .* standardized otherwise .*standardize_as"):
        run.evaluate(raw, 5)
    same = run.evaluate(pv.data.standardize_as(record, raw), 5)
    assert torch.equal(same.log_p, run.evaluate(data, 5).log_p)


def f(batch: Any, size: int, *, name: str = "") -> None: ...


def test_keywords():
    assert keywords(["size=3", " name = a "], f, "-o") == {"size": 3, "name": "a"}
    with pytest.raises(ValueError, match="-o: came 'size', wanted name=value"):
        keywords(["size"], f, "-o")
    with pytest.raises(ValueError, match=r"-o: came 'batch', wanted one of \['size', 'name'\]"):
        keywords(["batch=1"], f, "-o")
