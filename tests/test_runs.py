"""What a run leaves in its folder, when it is finished and when it is not."""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.batch import Batch, take
from pyro_vae.evaluation import evaluate
from pyro_vae.objectives import iwae
from pyro_vae.training import runs
from pyro_vae.training import state as state_module
from pyro_vae.training.fit import NonFiniteError, Run
from pyro_vae.training.runs import FORMAT, Folder, versions
from pyro_vae.training.state import read_tensors, write_tensors
from tests.exact_pairs import BatchGuide, LinearBatchModel
from tests.small_pairs import Guide, LinearModel, MethodPair, batch_norm, data
from tests.trainings import ADAM, fit, parameters, same

BEGINNING = {"config.json", "example.safetensors", "state.safetensors"}
FILES = BEGINNING | {"guide.safetensors", "history.csv", "model.safetensors"}


def train(out: Path, pair: Any = None, rows: Any = None, **options: Any) -> Run:
    model, guide = pair or (LinearModel(), Guide(batch_norm()))
    rows = data(8) if rows is None else rows
    return fit(model, guide, rows, iwae(2), out=out, **{"epochs": 2, "batch_size": 4, **options})


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files(tmp_path: Path):
    out = tmp_path / "runs" / "a"
    run = train(out, seed=5, valid=data(3))
    assert files(out) == FILES
    config = Folder(out).config()
    assert config["format"] == FORMAT
    assert config["versions"] == versions()
    assert (config["seed"], config["rows"], config["batch_size"], config["steps"]) == (5, 8, 4, 4)
    assert (config["precision"], config["accumulate"], config["ema"]) == ("full", 1, None)
    assert config["objective"] == repr(run.objective)
    assert config["best"] == run.best
    assert (config["stopped"], config["notes"]) == ("epochs", list(run.notes))
    with open(out / "history.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == run.history == Folder(out).history()


def test_a_pair_is_restored_with_its_buffers(tmp_path: Path):
    run = train(tmp_path)
    torch.manual_seed(7)
    model, guide = LinearModel(), Guide(batch_norm())
    Folder(tmp_path).load_into(model, guide)
    x = data(5)
    assert torch.equal(evaluate(model, guide, x, 20).log_p, run.evaluate(x, 20).log_p)


def test_what_is_restored_is_the_average(tmp_path: Path):
    run = train(tmp_path, ema=0.9)
    model, guide = LinearModel(), Guide(batch_norm())
    Folder(tmp_path).load_into(model, guide)
    assert same(parameters(model, guide), parameters(run.model, run.guide))


def test_a_model_and_a_guide_that_share_a_network(tmp_path: Path):
    pair = MethodPair()
    train(tmp_path, (pair.model, pair.guide))
    for name in ("model", "guide"):
        tensors, _ = read_tensors(tmp_path / f"{name}.safetensors")
        assert {k: v.tolist() for k, v in tensors.items()} == {
            k: v.tolist() for k, v in pair.state_dict().items()
        }
    again = MethodPair()
    Folder(tmp_path).load_into(again.model, again.guide)
    assert same(parameters(again), parameters(pair))


def test_entries_are_added(tmp_path: Path):
    folder = Folder(tmp_path)
    folder.update_config({"command": ["a"]})
    folder.update_config({"data": 1})
    config = folder.config()
    assert (config["command"], config["data"], config["format"]) == (["a"], 1, FORMAT)


def test_history_goes_on_across_resumes(tmp_path: Path):
    train(tmp_path, epochs=2)
    run = train(tmp_path, epochs=5, resume=True)
    history = Folder(tmp_path).history()
    assert history == run.history
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5]
    seconds = [record["seconds"] for record in history]
    assert seconds == sorted(seconds)
    assert Folder(tmp_path).config()["steps"] == 10


# ---------------------------------------------------------------------------------------------
# From the first step on


def test_what_is_known_is_there_before_the_first_step(tmp_path: Path):
    class Curious(LinearBatchModel):
        looked: dict[str, Any] | None = None

        def forward(self, batch: Any) -> None:
            super().forward(batch)
            if torch.is_grad_enabled() and (tmp_path / "config.json").exists() and not self.looked:
                folder = Folder(tmp_path)
                self.looked = {"config": folder.config(), "files": files(tmp_path)}
                self.looked |= {"step": folder.state()["step"], "rows": folder.example()}

    model = Curious()
    model.built_by = {"pair": "vae", "options": {"latent": 2}}  # type: ignore[assignment]
    rows = Batch({"x": data(8)}, record={"name": "mine"})
    train(tmp_path, (model, BatchGuide()), rows, seed=3, note={"command": "fit", "seed": 99})
    looked = model.looked
    assert looked is not None
    assert (looked["files"], looked["step"]) == (BEGINNING, 0)
    config = looked["config"]
    assert (config["seed"], config["objective"]) == (3, repr(iwae(2)))
    assert (config["pair"], config["data"]) == (model.built_by, {"name": "mine"})
    assert config["command"] == Folder(tmp_path).config()["command"] == "fit"
    assert (looked["rows"].total, looked["rows"].record) == (8, {"name": "mine"})
    assert torch.equal(looked["rows"]["x"][:2], torch.stack([*data(8).aminmax(dim=0)]))


class OnDemand(Batch):
    """Rows that are too many to look at."""

    def to(self, *args: Any, **options: Any) -> Batch:
        return self

    def look(self, rows: int = 10_000) -> Batch:
        return self.rows(slice(0, 5))


def test_an_example_of_rows_on_demand(tmp_path: Path):
    train(tmp_path, (LinearBatchModel(), BatchGuide()), OnDemand({"x": data(8)}))
    least, greatest = data(8)[:5].aminmax(dim=0)
    rows = Folder(tmp_path).example()
    assert torch.equal(rows["x"][:2], torch.stack([least, greatest]))
    assert rows.total == 8


def test_a_function_may_say_how_it_was_built(tmp_path: Path):
    model, guide = function_pair()
    model.built_by = {"pair": "my_file.py:build"}
    train(tmp_path, (model, guide))
    assert Folder(tmp_path).config()["pair"] == {"pair": "my_file.py:build"}


def fails(pair: Any = None, **options: Any) -> Callable[[Path], Any]:
    return lambda out: train(out, pair, **options)


def raises(error: BaseException) -> Callable[..., None]:
    def callback(run: Run, record: dict[str, float]) -> None:
        raise error

    return callback


REFUSED: dict[str, Callable[[Path], Any]] = {
    "no parameters": fails((lambda x: None, lambda x: None)),
    "objective": fails(epochs=0),
    "monitor": fails(valid=data(3)[:0]),
    "precision": fails(precision="fp8"),
    "note": fails(note={"a": object()}),
    "first step": lambda out: train(out, rows=torch.full((8, 3), torch.inf)),
    "callback in the first epoch": fails(callbacks=[raises(RuntimeError("no"))]),
}


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty folder"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_got_nowhere_leaves_nothing(case: str, there: bool, tmp_path: Path):
    out = tmp_path / "run"
    if there:
        out.mkdir()
    with pytest.raises((ValueError, RuntimeError)):
        REFUSED[case](out)
    assert out.exists() is there
    assert list(out.glob("*")) == []
    train(out)


def test_a_run_that_is_interrupted_at_once_can_go_on(tmp_path: Path):
    torch.manual_seed(0)
    whole = train(tmp_path / "whole")
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", callbacks=[raises(KeyboardInterrupt())])
    assert files(tmp_path / "run") == BEGINNING
    again = train(tmp_path / "run", resume=True)
    assert same(parameters(again.model, again.guide), parameters(whole.model, whole.guide))


def test_a_run_that_fails_later_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "SAVE_SHARE", 1e9)
    monkeypatch.setattr(runs, "SAVE_EVERY", 0.0)
    out, x = tmp_path / "run", data(8)

    def poison(run: Run, record: dict[str, float]) -> None:
        if record["epoch"] == 3:
            x.fill_(torch.inf)

    with pytest.raises(NonFiniteError):
        train(out, rows=x, epochs=9, callbacks=[poison])
    assert files(out) == BEGINNING
    assert Folder(out).state()["step"] == 6
    assert train(out, epochs=4, resume=True).history[-1]["step"] == 8


def test_what_a_killed_process_left_half_written_is_swept(tmp_path: Path):
    train(tmp_path)
    strays = {".state.17.tmp.safetensors", ".config.17.tmp.json", ".tmpAbC123"}
    for name in strays:
        (tmp_path / name).write_bytes(b"half of")
    (tmp_path / "example.safetensors").unlink()  # and what it did not get to
    train(tmp_path, epochs=3, resume=True)
    assert files(tmp_path) == FILES


def test_a_full_disk_loses_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "SAVE_SHARE", 1e9)
    monkeypatch.setattr(runs, "SAVE_EVERY", 0.0)
    torch.manual_seed(0)
    whole = train(tmp_path / "whole", epochs=6)
    save_file: Any = vars(state_module)["save_file"]
    saved: list[Any] = []

    def full(*args: Any, **kwargs: Any) -> None:
        saved.append(args)
        if len(saved) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*args, **kwargs)

    monkeypatch.setattr(state_module, "save_file", full)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"state\.safetensors: can't be written: No space left"):
        train(tmp_path / "run", epochs=6)
    monkeypatch.setattr(state_module, "save_file", save_file)
    assert Folder(tmp_path / "run").state()["step"] == 6  # the start, the example, three epochs
    again = train(tmp_path / "run", epochs=6, resume=True)
    assert same(parameters(again.model, again.guide), parameters(whole.model, whole.guide))


# ---------------------------------------------------------------------------------------------
# Functions


def function_pair(latent: int = 2, weight: str = "weight") -> tuple[Any, Any]:
    decoder = nn.Linear(latent, 3)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
        share = pyro.param(
            "share", torch.full((latent,), 1 / latent), constraint=constraints.simplex
        )
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, share).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc = x @ pyro.param(weight, torch.zeros(3, latent))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    return model, guide


def batch_function_pair() -> tuple[Any, Any]:
    """With a parameter for each row of a minibatch, which is made in the minibatch's size."""

    def model(batch: Any) -> None:
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("x", dist.Normal(loc + z, 1.0).to_event(1))

    def guide(batch: Any) -> None:
        each = pyro.param("each", torch.zeros(batch.size, 3))
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(each, 1.0).to_event(1))

    return model, guide


class HalfStored(LinearModel):
    """A module that makes one of its parameters by ``pyro.param``."""

    def forward(self, x: Tensor) -> None:
        shift = pyro.param("shift", torch.ones(3), constraint=constraints.positive)
        super().forward(x - shift)


STORED: dict[str, tuple[Callable[[], tuple[Any, Any]], Callable[[], Any], set[str]]] = {
    "functions": (
        function_pair,
        lambda: data(8),
        {"decoder$$$weight", "decoder$$$bias", "scale", "share", "weight"},
    ),
    "functions of a batch": (
        batch_function_pair,
        lambda: Batch({"x": data(8)}),
        {"loc", "each"},
    ),
    "half stored": (lambda: (HalfStored(), Guide()), lambda: data(8), {"shift"}),
    "model alone": (
        lambda: (function_pair()[0], Guide()),
        lambda: data(8),
        {"decoder$$$weight", "decoder$$$bias", "scale", "share"},
    ),
}


def bounds(model: Any, guide: Any, rows: Any) -> Tensor:
    """Of the first minibatch, at a seed."""
    torch.manual_seed(0)
    return iwae(20).rows(model, guide, take(rows, slice(0, 4)))


@pytest.mark.parametrize("clear", [True, False], ids=["new process", "same process"])
@pytest.mark.parametrize("kind", STORED)
def test_what_pyro_param_made_comes_back(kind: str, clear: bool, tmp_path: Path):
    make, rows_of, names = STORED[kind]
    rows = rows_of()
    run = train(tmp_path, make(), rows, optimizer=ADAM)
    saved, _ = read_tensors(tmp_path / "params.safetensors")
    assert set(saved) == names
    held = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    wanted = bounds(run.model, run.guide, rows)
    if clear:
        pyro.clear_param_store()
        pyro.param("somebody else's", torch.tensor(7.0))
    else:
        for value in pyro.get_param_store()._params.values():
            value.detach().add_(1.0)
    torch.manual_seed(9)
    model, guide = make()
    before = torch.get_rng_state()
    Folder(tmp_path).load_into(model, guide)
    assert torch.equal(torch.get_rng_state(), before)
    store = pyro.get_param_store()
    for name, value in held.items():
        torch.testing.assert_close(store[name].detach(), value)
    assert torch.equal(bounds(model, guide, rows), wanted)
    if clear:
        assert float(store["somebody else's"].detach()) == 7.0


OTHER_PAIRS: dict[str, tuple[Callable[[], tuple[Any, Any]], str]] = {
    "name": (
        lambda: function_pair(weight="other"),
        r"parameter 'weight' \[3, 2\], the pair has none",
    ),
    "shape": (
        lambda: function_pair(latent=3),
        r"parameter 'decoder\$\$\$weight' \[3, 2\], the pair has \[3, 3\]",
    ),
    "data": (batch_function_pair, "it does not run on the run's example: "),
}


@pytest.mark.parametrize("case", OTHER_PAIRS)
def test_functions_of_another_pair(case: str, tmp_path: Path):
    train(tmp_path, function_pair())
    pyro.clear_param_store()
    make, message = OTHER_PAIRS[case]
    with pytest.raises(ValueError, match=rf"params\.safetensors: not of this pair: {message}"):
        Folder(tmp_path).load_into(*make())
    assert list(pyro.get_param_store().keys()) == []


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
        with pytest.raises(ValueError, match="can't make the run folder"):
            Folder(out).write("metrics.json", "{}")


def test_nothing_to_resume(tmp_path: Path):
    with pytest.raises(ValueError, match=r"state\.safetensors: no such file"):
        train(tmp_path, resume=True)


def test_a_run_that_is_not_finished_is_not_loaded(tmp_path: Path):
    train(tmp_path)
    (tmp_path / "guide.safetensors").unlink()
    with pytest.raises(ValueError, match=r"guide\.safetensors: no such file: .* not finished"):
        Folder(tmp_path).load_into(LinearModel(), Guide(batch_norm()))


def test_files_of_another_format(tmp_path: Path):
    train(tmp_path)
    folder = Folder(tmp_path)
    theirs = {"format": 99, "versions": {"pyro_vae": "7.0"}}
    folder.write("config.json", json.dumps(folder.config() | theirs))
    for name in ("state", "example"):
        path = tmp_path / f"{name}.safetensors"
        tensors, about = read_tensors(path)
        write_tensors(path, tensors, about | theirs)
    message = (
        f"run format 99, written by pyro_vae 7.0; pyro_vae {versions()['pyro_vae']} reads {FORMAT}: "
        "use the version that wrote the run"
    )
    for read in (folder.config, folder.state, folder.example):
        with pytest.raises(ValueError, match=message):
            read()
    with pytest.raises(ValueError, match=message):
        train(tmp_path, resume=True)


def test_a_file_in_the_place_of_another(tmp_path: Path):
    train(tmp_path)
    (tmp_path / "state.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="run format None, written by pyro_vae unknown"):
        Folder(tmp_path).state()
    (tmp_path / "state.safetensors").write_bytes((tmp_path / "example.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"state\.safetensors: not the state of a run"):
        Folder(tmp_path).state()


READERS: dict[str, Callable[[Folder], Any]] = {
    "config.json": Folder.config,
    "example.safetensors": Folder.example,
    "guide.safetensors": lambda folder: folder.load_into(LinearModel(), Guide(batch_norm())),
    "history.csv": Folder.history,
    "model.safetensors": lambda folder: folder.load_into(LinearModel(), Guide(batch_norm())),
    "state.safetensors": Folder.state,
}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_cut_off_is_told_in_one_line(name: str, share: float, tmp_path: Path):
    train(tmp_path)
    READERS[name](Folder(tmp_path))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: min(int(share * len(content)), len(content) - 2)])
    with pytest.raises(ValueError) as caught:
        READERS[name](Folder(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: ")
    assert "\n" not in message


@pytest.mark.parametrize("name", ["state", "example", "model", "guide"])
def test_a_pickle_in_the_place_of_a_file(name: str, tmp_path: Path):
    train(tmp_path)
    path = tmp_path / f"{name}.safetensors"
    torch.save(LinearModel().state_dict(), path)
    with pytest.raises(ValueError, match=rf"{name}\.safetensors: came a file of torch\.save"):
        READERS[path.name](Folder(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is .* a run folder"),
        ("{", "not readable as JSON, or cut off"),
        ("[1]", "wanted a JSON object"),
    ],
)
def test_broken_config(content: str | None, message: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Folder(tmp_path).config()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is .* a run folder"),
        ("step,loss\n1,2.0,3\n", "not a history"),
        ("step,loss\n1,two\n", "not a history: could not convert"),
        ("step,loss\n1,2.", "the last line is cut off"),
    ],
)
def test_broken_history(content: str | None, message: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "history.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        Folder(tmp_path).history()


def test_numbers_of_a_history(tmp_path: Path):
    text = "step,loss,valid\n1,-2.5,\n2,nan,1e-05\n3,-inf,4\n"
    (tmp_path / "history.csv").write_text(text)
    first, second, third = Folder(tmp_path).history()
    assert first == {"step": 1, "loss": -2.5}
    assert (second["step"], second["valid"], str(second["loss"])) == (2, 1e-5, "nan")
    assert third == {"step": 3, "loss": -float("inf"), "valid": 4}


@pytest.mark.parametrize(
    "guide", [lambda: Guide(), lambda: Guide(nn.Linear(3, 6))], ids=["keys", "shapes"]
)
def test_parameters_of_another_pair(guide: Any, tmp_path: Path):
    train(tmp_path)
    with pytest.raises(ValueError, match=r"guide\.safetensors: not of this pair: .*net"):
        Folder(tmp_path).load_into(LinearModel(), guide())
