"""What a run leaves in its folder."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.evaluation import evaluate
from pyro_vae.objectives import iwae
from pyro_vae.training.fit import Run, fit
from pyro_vae.training.runs import FORMAT, Folder, versions
from pyro_vae.training.state import read_tensors
from tests.small_pairs import Guide, LinearModel, MethodPair, batch_norm, data

FILES = {
    "config.json",
    "guide.safetensors",
    "history.csv",
    "model.safetensors",
    "state.safetensors",
}


def train(out: Path, pair: Any = None, **options: Any) -> Run:
    model, guide = pair or (LinearModel(), Guide(batch_norm()))
    options = {"epochs": 2, "batch_size": 4, "progress": False, "valid": data(3), **options}
    return fit(model, guide, data(8), iwae(2), out=out, **options)


def test_files(tmp_path: Path):
    out = tmp_path / "runs" / "a"
    run = train(out, seed=5)
    assert {path.name for path in out.iterdir()} == FILES
    config = Folder(out).config()
    assert config["format"] == FORMAT
    assert config["versions"] == versions()
    assert (config["seed"], config["rows"], config["batch_size"], config["steps"]) == (5, 8, 4, 4)
    assert config["objective"] == repr(run.objective)
    assert config["best"] == run.best
    assert (config["stopped"], config["notes"]) == ("epochs", list(run.notes))
    with open(out / "history.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == run.history


def test_a_pair_is_restored_with_its_buffers(tmp_path: Path):
    run = train(tmp_path)
    torch.manual_seed(7)
    model, guide = LinearModel(), Guide(batch_norm())
    Folder(tmp_path).load_into(model, guide)
    x = data(5)
    assert torch.equal(evaluate(model, guide, x, 20).log_p, run.evaluate(x, 20).log_p)


def test_a_model_and_a_guide_that_share_a_network(tmp_path: Path):
    pair = MethodPair()
    train(tmp_path, (pair.model, pair.guide))
    for name in ("model", "guide"):
        tensors, _ = read_tensors(tmp_path / f"{name}.safetensors")
        assert {k: v.tolist() for k, v in tensors.items()} == {
            k: v.tolist() for k, v in pair.state_dict().items()
        }


def test_functions_leave_what_is_in_the_store(tmp_path: Path):
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    train(tmp_path, (model, lambda x: None))
    tensors, _ = read_tensors(tmp_path / "model.safetensors")
    assert torch.equal(tensors["loc"], pyro.param("loc"))


def test_entries_are_added(tmp_path: Path):
    folder = Folder(tmp_path)
    folder.update_config({"command": ["a"]})
    folder.update_config({"data": 1})
    config = folder.config()
    assert (config["command"], config["data"], config["format"]) == (["a"], 1, FORMAT)


# ---------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("left", ["state.safetensors", "config.json"])
def test_a_run_is_not_overwritten(left: str, tmp_path: Path):
    train(tmp_path)
    for name in FILES - {left}:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"holds a run already; use resume"):
        train(tmp_path)


def test_a_path_that_is_a_file(tmp_path: Path):
    path = tmp_path / "file"
    path.touch()
    for out in (path, path / "below"):
        with pytest.raises(ValueError, match="can't make the run folder"):
            train(out)


def test_nothing_to_resume(tmp_path: Path):
    with pytest.raises(ValueError, match=r"state\.safetensors: no such file"):
        train(tmp_path, resume=True)


def test_files_of_another_format(tmp_path: Path):
    train(tmp_path)
    folder = Folder(tmp_path)
    config = folder.config()
    folder.write("config.json", json.dumps(config | {"format": 99}))
    with pytest.raises(ValueError, match=f"run format 99, this version of pyro_vae reads {FORMAT}"):
        folder.config()
    (tmp_path / "state.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="run format None"):
        folder.state()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is .* a run folder"), ("{", "not readable as JSON"), ("[1]", "wanted a JSON object")],
)
def test_broken_config(content: str | None, message: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Folder(tmp_path).config()


@pytest.mark.parametrize(
    "guide", [lambda: Guide(), lambda: Guide(nn.Linear(3, 6))], ids=["keys", "shapes"]
)
def test_parameters_of_another_pair(guide: Any, tmp_path: Path):
    train(tmp_path)
    with pytest.raises(ValueError, match=r"guide\.safetensors: not of this pair: .*net"):
        Folder(tmp_path).load_into(LinearModel(), guide())
