"""The command line: what it does, and that every error is one line that leaves nothing behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vae.cli import main
from pyro_vae.data import load
from pyro_vae.objectives.specs import recipes
from pyro_vae.saved import PairSpec
from pyro_vae.training.fit import fit

SMALL = "-o latent=2 -o hidden=4"

PAIRS = """
from __future__ import annotations

import sys
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import nn


@dataclass
class Sizes:  # which needs to find its module
    latent: int = 2


class Model(nn.Module):
    def __init__(self, width, latent="z", site="x", event_dim=1, cut=None):
        super().__init__()
        self.net = nn.Linear(Sizes().latent, width)
        self.latent, self.site, self.event_dim, self.cut = latent, site, event_dim, cut

    def prior(self):
        return dist.Normal(torch.zeros(2), 1.0)

    def forward(self, batch):
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample(self.latent, self.prior().to_event(1))
            x = dist.Bernoulli(logits=self.net(z[..., : self.cut]))  # line of the model
            pyro.sample(self.site, x.to_event(self.event_dim))  # line of the site


class UnitModel(Model):
    def prior(self):
        return dist.Uniform(torch.zeros(2), torch.ones(2))


class Guide(nn.Module):
    def __init__(self, width, latent=2):
        super().__init__()
        self.net = nn.Linear(width, 2 * latent)

    def forward(self, batch):
        x = batch["x"]
        loc, raw = self.net(x).chunk(2, -1)
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def build(batch, kind="model"):
    width = batch["x"].shape[1]
    models = {
        "model": lambda: Model(width),
        "latent_name": lambda: Model(width, latent="u"),
        "latent_support": lambda: UnitModel(width),
        "site": lambda: Model(width, site="y"),
        "width": lambda: Model(width + 1),
        "event": lambda: Model(width, event_dim=0),
        "shapes": lambda: Model(width, cut=1),
    }
    return models[kind](), Guide(width)


def programs(batch):
    decoder, encoder = nn.Linear(2, batch["x"].shape[1]), nn.Linear(batch["x"].shape[1], 2)

    def model(batch):
        pyro.module("decoder", decoder)
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1))

    def guide(batch):
        pyro.module("encoder", encoder)
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(encoder(batch["x"]), scale).to_event(1))

    return model, guide


def wide(batch):
    class Wide(Guide):
        def forward(self, batch):
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("z", dist.Normal(self.net(batch["x"]), 1.0).to_event(1))

    model = Model(batch["x"].shape[1])
    model.prior = lambda: dist.Normal(torch.zeros(2), 1.0)
    model.net = nn.LazyLinear(batch["x"].shape[1])
    return model, Wide(batch["x"].shape[1])


def no_plate(batch):
    net = Model(batch["x"].shape[1]).net

    def model(batch):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1))

    return model, Guide(batch["x"].shape[1])


def nothing_to_train(batch):
    def model(batch):
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z[..., None].expand(z.shape + (6,))).to_event(1))

    def guide(batch):
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    return model, guide


def exits_when_run(batch):
    def program(batch):
        sys.exit(3)

    return program, program


def fails(batch):
    raise KeyError("w")


def exits(batch):
    sys.exit("bye")


def nothing(batch):
    pass


def numbers(batch):
    return 1, 2


def alone(batch):
    return Guide(6)


def needs(batch, width):
    pass


def takes_none():
    pass


value = 3
"""


def line(text: str) -> str:
    """Where a text stands in the file of pairs."""
    (number,) = [i for i, each in enumerate(PAIRS.splitlines(), 1) if text in each]
    return f"mine.py:{number}: "


def entries(folder: Path) -> dict[str, bytes | None]:
    """All that is under a folder, with its contents."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data sets of 40 rows and files of pairs, good and bad."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYRO_VAE_DATA", raising=False)
    monkeypatch.delenv("PYRO_VAE_DEBUG", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", [*sys.path])
    random = np.random.default_rng(0)
    binary = (random.random((40, 6)) < 0.3).astype(np.uint8)
    real = random.normal(size=(40, 6))
    infinite = np.where(np.arange(240).reshape(40, 6) == 20, np.inf, real)
    images = random.random((40, 8, 8)) < 0.3
    arrays: dict[str, dict[str, Any]] = {
        "binary": {"x": binary},
        "parts": {"x_train": binary[:30], "x_valid": binary[30:35], "x_test": binary[35:]},
        "grey": {"x": random.random((40, 6))},
        "late_grey": {"x_train": np.where(np.arange(40)[:, None] > 30, 0.5, binary)},
        "real": {"x": real},
        "images": {"x_train": images[:30], "x_test": images[30:]},
        "labelled": {"x": binary, "y": np.arange(40)},
        "other": {"y": binary},
        "infinite": {"x": infinite},
        "missing": {"x": np.full((40, 6), np.nan)},
        "objects": {"x": np.array([{}, 1], dtype=object)},
        "text": {"x": np.array(["a"] * 40)},
        "nothing": {},
        "no_rows": {"x": np.zeros((0, 6))},
        "one_row": {"x": real[:1]},
        "single": {"x": np.float64(3)},
        "ragged": {"x": binary, "y": binary[:20]},
        "test_only": {"x_test": binary},
        "train_only": {"x_train": binary},
        "widths": {"x_train": binary[:30], "x_test": binary[30:, :5]},
    }
    for name, held in arrays.items():
        np.savez(f"{name}.npz", **held)
    Path("empty.npz").touch()
    Path("cut.npz").write_bytes(Path("binary.npz").read_bytes()[:-40])
    Path("prose.npz").write_text("hello")
    np.save("array.npy", binary)
    files = {
        "mine.py": PAIRS,
        "syntax.py": "def build(batch)\n    pass\n",
        "divides.py": "\n\nvalue = 1 / 0\n",
        "imports.py": "import there_is_no_such_module\n",
        "leaves.py": "import sys\n\nsys.exit(3)\n",
        "prose.txt": "hello",
    }
    for name, text in files.items():
        Path(name).write_text(text)
    return tmp_path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run of two epochs."""
    assert main(shlex.split(f"fit --data binary.npz --out run --epochs 2 {SMALL}")) == 0
    capsys.readouterr()
    return folder / "run"


def error_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The line of a command that fails, having made sure that it is one, and changes no file."""
    before = entries(Path.cwd())
    assert main(shlex.split(command)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(err) < 700
    assert entries(Path.cwd()) == before
    return err


def output_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(shlex.split(command)) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert err == ""
    return str(out)


def strict(text: str) -> Any:
    """JSON without Infinity and NaN."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


# --- errors -------------------------------------------------------------------------------------

FIT = "fit --out run --epochs 1 --data"
ERRORS: list[tuple[str, list[str]]] = [
    # the command itself
    ("nosuch", ["No such command", "nosuch"]),
    ("--nosuch", ["No such option", "--nosuch"]),
    ("fit", ["Missing option", "--data"]),
    ("fit --data", ["--data"]),
    ("fit --data binary.npz", ["Missing option", "--out"]),
    ("evaluate", ["Missing argument"]),
    (f"{FIT} binary.npz --nosuch 3", ["--nosuch"]),
    (f"{FIT} binary.npz more", ["more"]),
    # numbers
    (f"{FIT} binary.npz --epochs 0", ["--epochs"]),
    (f"{FIT} binary.npz --epochs a", ["--epochs"]),
    (f"{FIT} binary.npz --epochs 1.5", ["--epochs"]),
    (f"{FIT} binary.npz --steps 0", ["--steps"]),
    (f"{FIT} binary.npz --steps 3", ["--epochs", "--steps", "one of them"]),
    (f"{FIT} binary.npz --batch-size 0", ["--batch-size"]),
    (f"{FIT} binary.npz --lr -1", ["--lr", "-1", "above 0"]),
    (f"{FIT} binary.npz --lr 0", ["--lr", "above 0"]),
    (f"{FIT} binary.npz --lr nan", ["--lr", "nan"]),
    (f"{FIT} binary.npz --lr a", ["--lr"]),
    (f"{FIT} binary.npz --clip 0", ["--clip", "above 0"]),
    (f"{FIT} binary.npz --valid 1.5", ["--valid", "1.5", "share"]),
    (f"{FIT} binary.npz --valid -0.1", ["--valid", "-0.1", "share"]),
    (f"{FIT} binary.npz --valid nan", ["--valid", "nan", "share"]),
    (f"{FIT} binary.npz --valid 0.99", ["binary.npz", "0.99", "32 rows empty"]),
    (f"{FIT} binary.npz --patience 0", ["--patience"]),
    (f"{FIT} binary.npz --patience 3", ["patience", "valid"]),
    (f"{FIT} binary.npz --seed a", ["--seed"]),
    (f"{FIT} binary.npz --seed -1", ["--seed"]),
    (f"{FIT} binary.npz --seed {10**30}", ["--seed"]),
    (f"{FIT} binary.npz --compile bogus", ["compile", "bogus", "eager"]),
    (f"{FIT} binary.npz --device nosuch", ["device", "nosuch"]),
    # data
    (f"{FIT} nosuch", ["nosuch", "digits_binary", "PYRO_VAE_DATA"]),
    (f"{FIT} nosuch.npz", ["nosuch.npz", "no such file"]),
    (f"{FIT} ''", ["unknown"]),
    (f"{FIT} empty.npz", ["empty.npz", "empty", ".npz file"]),
    (f"{FIT} cut.npz", ["cut.npz", "cut short"]),
    (f"{FIT} prose.npz", ["prose.npz", "numpy.savez"]),
    (f"{FIT} array.npy -d columns=a", ["array.npy", "columns"]),
    (f"{FIT} infinite.npz", ["infinite.npz", "site 'x'", "row 3"]),
    (f"{FIT} missing.npz", ["site 'x'", "no observed entry"]),
    (f"{FIT} objects.npz", ["objects.npz", "'x'", "Python objects", "numbers"]),
    (f"{FIT} text.npz", ["text.npz", "'x'", "numbers"]),
    (f"{FIT} nothing.npz", ["nothing.npz", "no arrays"]),
    (f"{FIT} no_rows.npz", ["no_rows.npz", "no rows"]),
    (f"{FIT} one_row.npz", ["one_row.npz", "1 rows"]),
    (f"{FIT} single.npz", ["single.npz", "'x'"]),
    (f"{FIT} ragged.npz", ["ragged.npz", "number of rows", "40", "20"]),
    (f"{FIT} test_only.npz", ["test_only.npz", "no training rows", "SITE_train"]),
    (f"{FIT} other.npz", ["site 'x'", "['y']", "site="]),
    (f"{FIT} labelled.npz --sites y", ["site 'x'", "['y']"]),
    (f"{FIT} labelled.npz --sites z", ["labelled.npz", "['z']", "['x', 'y']"]),
    (f"{FIT} grey.npz -o likelihood=Bernoulli", ["site 'x'", "Bernoulli", "ContinuousBernoulli"]),
    (f"{FIT} late_grey.npz -o likelihood=Bernoulli", ["site 'x'", "row 31", "Bernoulli"]),
    # objectives
    (f"{FIT} binary.npz --objective nosuch", ["nosuch", "elbo", "iwae"]),
    (f"{FIT} binary.npz --objective ''", ["objective", "elbo"]),
    (f"{FIT} binary.npz --objective iwae", ["iwae", "num_particles=..."]),
    (f"{FIT} binary.npz --objective iwae:K=3", ["iwae", "'K'", "num_particles"]),
    (f"{FIT} binary.npz --objective iwae:5", ["'5'", "argument=value"]),
    (f"{FIT} binary.npz --objective iwae:num_particles=0", ["num_particles=0", ">= 1"]),
    (f"{FIT} binary.npz --objective iwae:num_particles=a", ["num_particles='a'", "number"]),
    (f"{FIT} binary.npz --objective elbo:chunk=0", ["chunk=0", ">= 1"]),
    (f"{FIT} binary.npz --objective elbo:estimator=a", ["estimator", "'a'", "dreg"]),
    (f"{FIT} binary.npz --objective iwae:num_particles=2,estimator=stl", ["stl", "iwae", "dreg"]),
    (f"{FIT} binary.npz --objective renyi:alpha=1,num_particles=2", ["alpha=1", "ELBO"]),
    (f"{FIT} binary.npz --objective renyi:alpha=(1,2),num_particles=2", ["alpha=(1,2)"]),
    (f"{FIT} binary.npz --objective beta_vae:beta=-1", ["beta=-1", ">= 0"]),
    (f"{FIT} binary.npz --objective beta_vae:beta=linear(a)", ["linear(a)"]),
    (f"{FIT} binary.npz --objective \"beta_vae:beta={{'q': 2}}\"", ["'q'", "'z'"]),
    # pairs and their options
    (f"{FIT} binary.npz --pair nosuch", ["nosuch", "vae", "my_file.py:build"]),
    (f"{FIT} binary.npz -o latent", ["'latent'", "name=value"]),
    (f"{FIT} binary.npz -o latent=", ["'latent='", "name=value"]),
    (f"{FIT} binary.npz -o nosuch=3", ["'nosuch'", "latent", "likelihood"]),
    (f"{FIT} binary.npz -o batch=3", ["'batch'", "latent"]),
    (f"{FIT} binary.npz -o latent=0", ["latent=0", "above 0"]),
    (f"{FIT} binary.npz -o latent=2.5", ["latent=2.5", "whole"]),
    (f"{FIT} binary.npz -o hidden=64,a", ["-o hidden=64,a", "whole"]),
    (f"{FIT} binary.npz -o site=y", ["site 'y'", "['x']"]),
    (f"{FIT} binary.npz -o likelihood=Bernouli", ["likelihood='Bernouli'", "conditionals"]),
    (f"{FIT} binary.npz -o likelihood=StandardNormal", ["-o likelihood=StandardNormal"]),
    (f"{FIT} binary.npz -o likelihood=dense", ["-o likelihood=dense"]),
    (f"{FIT} binary.npz -o net=3", ["net=3", "pyro_vae.nn"]),
    (f"{FIT} binary.npz -o net=convolutional", ["convolutional", "image"]),
    (f"{FIT} binary.npz -o activation=Nosuch", ["activation='Nosuch'"]),
    # files of pairs
    (f"{FIT} binary.npz --pair nosuch.py:build", ["nosuch.py", "no such file"]),
    (f"{FIT} binary.npz --pair mine.py", ["mine.py", "my_file.py:build"]),
    (f"{FIT} binary.npz --pair mine.py:nosuch", ["mine.py", "no function 'nosuch'"]),
    (f"{FIT} binary.npz --pair mine.py:value", ["mine.py", "no function 'value'"]),
    (f"{FIT} binary.npz --pair prose.txt:build", ["prose.txt", "*.py"]),
    (f"{FIT} binary.npz --pair syntax.py:build", ["syntax.py:1: ", "SyntaxError"]),
    (f"{FIT} binary.npz --pair divides.py:build", ["divides.py:3: ", "ZeroDivisionError"]),
    (f"{FIT} binary.npz --pair imports.py:build", ["imports.py:1: ", "there_is_no_such_module"]),
    (f"{FIT} binary.npz --pair leaves.py:build", ["leaves.py:3: ", "SystemExit: 3"]),
    (f"{FIT} binary.npz --pair mine.py:fails", [line('KeyError("w")'), "fails", "KeyError: w"]),
    (f"{FIT} binary.npz --pair mine.py:exits", [line('sys.exit("bye")'), "SystemExit: bye"]),
    (f"{FIT} binary.npz --pair mine.py:nothing", ["mine.py:nothing", "NoneType", "(model, guide)"]),
    (f"{FIT} binary.npz --pair mine.py:numbers", ["(int, int)", "(model, guide)"]),
    (f"{FIT} binary.npz --pair mine.py:alone", ["Guide", "(model, guide)"]),
    (f"{FIT} binary.npz --pair mine.py:needs", ["'width'", "build(batch, **options)"]),
    (f"{FIT} binary.npz --pair mine.py:takes_none", ["build(batch, **options)"]),
    (f"{FIT} binary.npz --pair mine.py:build -o nosuch=1", ["--option", "'nosuch'", "kind"]),
    (f"{FIT} binary.npz --pair mine.py:build -o kind=a", [line("models[kind]()"), "KeyError: a"]),
    # programs
    (f"{FIT} binary.npz --pair mine.py:exits_when_run", [line("sys.exit(3)"), "SystemExit: 3"]),
    (
        f"{FIT} binary.npz --pair mine.py:build -o kind=shapes",
        [line("line of the model"), "shapes"],
    ),
    (f"{FIT} binary.npz --pair mine.py:build -o kind=latent_name", ["site 'z'", "['u', 'x']"]),
    (f"{FIT} binary.npz --pair mine.py:build -o kind=latent_support", ["site 'z'", "support"]),
    (f"{FIT} binary.npz --pair mine.py:build -o kind=site", ["['z', 'y']", "['x']", "rename"]),
    (
        f"{FIT} binary.npz --pair mine.py:build -o kind=width",
        [line("line of the site"), "site 'x'", "[6]", "[7]"],
    ),
    (f"{FIT} binary.npz --pair mine.py:build -o kind=event", ["x"]),
    (f"{FIT} binary.npz --pair mine.py:wide", ["site 'z'", "[4]", "[2]"]),
    (f"{FIT} binary.npz --pair mine.py:no_plate", ["plate", "dim -1"]),
    (f"{FIT} binary.npz --pair mine.py:nothing_to_train", ["no parameters"]),
    (f"{FIT} other.npz --pair mine.py:build", [line('width = batch["x"]'), "site 'x'", "['y']"]),
    (f"{FIT} grey.npz --pair mine.py:build", ["Bernoulli", "support"]),
    # where runs go
    ("fit --data binary.npz --epochs 1 --out binary.npz", ["binary.npz", "File exists"]),
    ("fit --data binary.npz --epochs 1 --out binary.npz/run", ["binary.npz", "Not a directory"]),
    ("evaluate nosuch", ["nosuch", "no such file", "run folder"]),
    ("evaluate binary.npz", ["binary.npz", "run folder"]),
    ("evaluate . ", ["run folder"]),
    # comparisons
    ("compare --data binary.npz --objective nosuch", ["nosuch", "elbo"]),
    ("compare --data binary.npz --seeds a", ["--seeds", "'a'", "0,1,2"]),
    ("compare --data binary.npz --seeds ''", ["--seeds", "''"]),
    ("compare --data binary.npz --seeds 0,,1", ["--seeds", "'0,,1'"]),
    ("compare --data binary.npz --seeds=-1", ["--seeds", "'-1'"]),
    ("compare --data binary.npz --jobs 0", ["--jobs"]),
    ("compare --data binary.npz -K 0", ["--num-particles"]),
    ("compare --data binary.npz --pair nosuch --out run", ["nosuch", "vae"]),
    ("compare --data binary.npz -o nosuch=3 --out run", ["'nosuch'", "latent"]),
    ("compare --data binary.npz --out run --compile nosuch", ["nosuch", "eager"]),
    ("compare --data binary.npz --out binary.npz --steps 1", ["binary.npz", "File exists"]),
    ("compare --data train_only.npz --out run", ["train_only.npz", "'test'", "['train']"]),
    ("compare --data widths.npz --out run", ["site 'x'", "[5]", "[6]"]),
    (
        "compare --data binary.npz --pair mine.py:build -o kind=shapes --steps 1 --out run",
        [line("line of the model"), "shapes"],
    ),
    # checks
    ("check --data nosuch", ["nosuch", "digits"]),
    ("check --data binary.npz --rows 0", ["--rows"]),
    ("check --data grey.npz -o likelihood=Bernoulli", ["site 'x'", "Bernoulli"]),
]


@pytest.mark.parametrize(("command", "words"), ERRORS, ids=[command for command, _ in ERRORS])
def test_error_is_one_line(
    command: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(command, capsys)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("command", [f"{FIT} binary.npz", "compare --data binary.npz --out run"])
def test_device_that_is_not_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "device" in error_of(f"{command} --device cuda", capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
@pytest.mark.parametrize("command", [f"{FIT} binary.npz", "compare --data binary.npz --out run"])
def test_no_permission(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.chmod(0o500)
    try:
        assert "Permission denied" in error_of(command, capsys)
    finally:
        folder.chmod(0o700)


RUN_ERRORS: list[tuple[str, list[str]]] = [
    ("fit --data binary.npz --out run --epochs 3", ["run", "holds a run already", "resume"]),
    ("fit --data binary.npz --out run --epochs 3 --resume", ["options", "hidden=4", "run"]),
    (f"fit --data parts.npz --out run --epochs 3 --resume {SMALL}", ["data", "parts.npz"]),
    (
        f"fit --data binary.npz --out run --epochs 3 --resume --objective mean_field {SMALL}",
        ["objective", "'mean_field'", "'elbo'"],
    ),
    ("evaluate run -K 0", ["--num-particles"]),
    ("evaluate run --split nosuch", ["'nosuch'", "train, test or all"]),
    ("evaluate run --data nosuch.npz", ["nosuch.npz", "no such file"]),
    ("evaluate run --data parts.npz --split all", ["'all'", "['train', 'valid', 'test']"]),
    ("evaluate run --data other.npz", ["site 'x'", "['y']"]),
    ("evaluate run --data images.npz", ["site 'x'", "[8, 8]", "[6]"]),
]


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("command", "words"), RUN_ERRORS, ids=[command for command, _ in RUN_ERRORS]
)
def test_error_leaves_a_run_as_it_is(
    command: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(command, capsys)
    assert [word for word in words if word not in message] == [], message


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def break_it(run: Path) -> None:
        config = json.loads((run / "config.json").read_text())
        change(config)
        (run / "config.json").write_text(json.dumps(config))

    return break_it


def _cut_weights(run: Path) -> None:
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


def _weights_of_another_pair(run: Path) -> None:
    main(shlex.split("fit --data binary.npz --out other --steps 1 -o latent=3 -o hidden=4"))
    (run / "guide.safetensors").write_bytes(Path("other/guide.safetensors").read_bytes())


BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "config missing": (lambda run: (run / "config.json").unlink(), ["config.json", "no such file"]),
    "config no JSON": (lambda run: (run / "config.json").write_text("{"), ["config.json", "JSON"]),
    "config a list": (lambda run: (run / "config.json").write_text("[]"), ["config.json", "list"]),
    "newer format": (_config(lambda c: c.update(format=9)), ["format 9", "reads 1"]),
    "not by the command line": (_config(lambda c: c.pop("command")), ["which data", "--data"]),
    "weights missing": (lambda run: (run / "guide.safetensors").unlink(), ["guide.safetensors"]),
    "weights cut short": (_cut_weights, ["model.safetensors", "not a readable"]),
    "weights empty": (
        lambda run: (run / "model.safetensors").write_bytes(b""),
        ["model.safetensors", "not a readable"],
    ),
    "weights of another pair": (
        _weights_of_another_pair,
        ["guide.safetensors", "not of this pair"],
    ),
    "unfinished": (lambda run: (run / "model.safetensors").unlink(), ["not finished", "--resume"]),
    "data gone": (lambda run: Path("binary.npz").unlink(), ["binary.npz", "--data"]),
    "data broken": (lambda run: Path("binary.npz").write_text(""), ["binary.npz", "empty"]),
    "data of another shape": (
        lambda run: shutil.copy("images.npz", "binary.npz"),
        ["site 'x'", "test rows", "[8, 8]", "[6]"],
    ),
}


@pytest.mark.parametrize(("break_it", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_run(
    break_it: Callable[[Path], Any],
    words: list[str],
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_it(run)
    capsys.readouterr()
    message = error_of("evaluate run -K 20", capsys)
    assert [word for word in words if word not in message] == [], message


def test_broken_state(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = f"fit --data binary.npz --out run --epochs 3 --resume {SMALL}"
    state = run / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-20])
    assert "state.safetensors" in error_of(again, capsys)
    state.unlink()
    assert "state.safetensors" in error_of(again, capsys)


def test_changed_data_are_not_trained_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("binary.npz", x=np.ones((40, 6), np.uint8))
    again = f"fit --data binary.npz --out run --epochs 3 --resume {SMALL}"
    message = error_of(again, capsys)
    assert "changed since run was started" in message
    assert "binary.npz" in message


def test_an_empty_folder_that_was_there_stays(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run").mkdir()
    error_of(f"{FIT} binary.npz --compile bogus", capsys)
    assert (folder / "run").is_dir()


def test_debugging_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYRO_VAE_DEBUG", "1")
    assert main(shlex.split(f"{FIT} nosuch.npz")) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1] == "error: nosuch.npz: no such file"


def test_interruption_in_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_vae.cli.train.fit_pair", interrupt)
    assert main(shlex.split(f"{FIT} binary.npz")) == 130
    assert capsys.readouterr().err.startswith("stopped")
    assert not Path("run").exists()


# --- what it does -------------------------------------------------------------------------------


def test_fit_and_evaluate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"config.json", "model.safetensors", "guide.safetensors", "history.csv"}
    names |= {"state.safetensors", "example.safetensors"}
    assert {path.name for path in run.iterdir()} == names
    text = output_of("evaluate run -K 20", capsys)
    assert text.startswith("log p(x) >= ")
    assert "(K = 20, 8 rows" in text
    assert "active units" in text
    summary = strict(output_of("evaluate run -K 20 --json --split train", capsys))
    assert summary["rows"] == 32
    assert summary["split"] == "train"
    assert summary == strict((run / "metrics.json").read_text())


def test_run_says_what_it_is(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["command"]["data"] == str(Path("binary.npz").resolve())
    assert config["command"]["pair"] == "vae"
    assert config["command"]["options"] == ["latent=2", "hidden=4"]
    assert config["command"]["objective"] == "elbo"
    assert config["data"]["splits"] == ["all"]
    assert config["stopped"] == "epochs"


def test_output_of_fit(capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of(f"fit --data parts.npz --out run --steps 3 --valid 0.2 {SMALL}", capsys)
    assert text.startswith("run: 3 steps in ")
    assert "valid" in text
    assert text.splitlines()[1:] == ["eager: 3 steps save about 0.0 s, a graph takes about 1 s"]


def test_resume_goes_on_where_it_stopped(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output_of(f"fit --data binary.npz --out whole --epochs 4 {SMALL}", capsys)
    output_of(f"fit --data binary.npz --out run --epochs 4 --resume {SMALL}", capsys)
    for name in ("model.safetensors", "guide.safetensors"):
        assert (run / name).read_bytes() == Path("whole", name).read_bytes()


def test_seed_decides(capsys: pytest.CaptureFixture[str]) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        output_of(f"fit --data binary.npz --out {out} --steps 2 --seed {seed} {SMALL}", capsys)
    a, b, c = (Path(out, "model.safetensors").read_bytes() for out in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("data", "options", "shown"),
    [
        ("binary", "likelihood=Bernoulli", "_Bernoulli"),
        ("binary", "likelihood=Gaussian", "Gaussian"),
        ("binary", "hidden=4,3", "in_features=4, out_features=3"),
        ("binary", "net=dense_resnet", "Residual"),
        ("binary", "activation=Tanh", "Tanh"),
        ("images", "net=convolutional", "Conv2d"),
    ],
)
def test_options(data: str, options: str, shown: str) -> None:
    build = PairSpec("vae", ("latent=2", "hidden=4", options))
    pair = build(load(f"{data}.npz"))
    assert shown.lstrip("_") in str(pair)


def test_option_of_a_run_is_found_again(capsys: pytest.CaptureFixture[str]) -> None:
    options = "-o latent=2 -o hidden=2 -o net=convolutional -o likelihood=Bernoulli"
    output_of(f"fit --data images.npz --out run --steps 1 {options}", capsys)
    assert "(K = 10, 10 rows" in output_of("evaluate run -K 10", capsys)


def test_own_pair(capsys: pytest.CaptureFixture[str]) -> None:
    output_of("fit --data binary.npz --out run --steps 2 --pair mine.py:build", capsys)
    message = error_of("evaluate run -K 10", capsys)  # code runs only where somebody names it
    assert "run: its pair was built by" in message
    assert "--pair" in message
    assert "(K = 10, 8 rows" in output_of("evaluate run -K 10 --pair mine.py:build", capsys)
    output_of("fit --data binary.npz --out fun --steps 2 --pair mine.py:programs", capsys)
    assert "(K = 10, 8 rows" in output_of("evaluate fun -K 10 --pair mine.py:programs", capsys)
    compare = "compare --data binary.npz --steps 1 -K 10 --objective elbo --pair mine.py:build"
    assert "elbo" in output_of(compare, capsys)
    assert output_of("check --data binary.npz --pair mine.py:build", capsys) == "no findings\n"


def test_own_pair_has_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a_neighbour.py").write_text("from mine import build\n")
    Path("random.py").write_text("from a_neighbour import build\n")  # is not the real one
    output_of("fit --data binary.npz --out run --steps 1 --pair random.py:build", capsys)
    Path("random.py").unlink()
    assert "random.py: no such file" in error_of("evaluate run --pair random.py:build", capsys)


def test_check_finds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("check --data grey.npz --pair mine.py:build")) == 2
    out, err = capsys.readouterr()
    assert err == ""
    assert "error: site 'x'" in out
    assert "Bernoulli" in out


def test_comparison_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def counting(*given: Any, **options: Any) -> Any:
        trained.append(options["seed"])
        return fit(*given, **options)

    monkeypatch.setattr("pyro_vae.training.compare.fit", counting)
    command = f"compare --data binary.npz --steps 2 -K 20 --out grid {SMALL} -o net=dense "
    first = output_of(command + "--objective elbo --objective mean_field --seeds 0,1", capsys)
    assert trained == [0, 1, 0, 1]
    assert "mean_field" in first
    assert (
        output_of(command + "--objective elbo --objective mean_field --seeds 0,1", capsys) == first
    )
    assert len(trained) == 4
    records = strict(output_of(command + "--objective elbo --seeds 0,1,2 --json", capsys))
    assert trained == [0, 1, 0, 1, 2]
    assert [record["seeds"] for record in records] == [[0, 1, 2]]
    assert Path("grid/comparison.txt").read_text().startswith("objective")


def test_comparison_notices_a_changed_file(capsys: pytest.CaptureFixture[str]) -> None:
    command = "compare --data binary.npz --steps 1 -K 10 --out grid --objective elbo "
    output_of(command + "--pair mine.py:build", capsys)
    Path("mine.py").write_text(PAIRS + "\n# changed\n")
    output_of(command + "--pair mine.py:build", capsys)
    assert len(list(Path("grid").glob("elbo-*.npz"))) == 2


def test_objectives_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of("objectives", capsys)
    assert "iwae: num_particles, estimator=pathwise, chunk=None" in text
    assert "(Burda et al. 2016)" in text
    assert len(text.splitlines()) == 2 * len(recipes())


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch" in output_of("--version", capsys)
    assert output_of("--help", capsys) == output_of("", capsys)
    for command in ("fit", "evaluate", "compare", "check", "objectives"):
        assert f"\n  pyro-vae {command}" in output_of(f"{command} --help", capsys)


# --- runs whose surroundings have changed -------------------------------------------------------


def test_evaluate_from_another_folder(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.parent / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert "8 rows" in output_of("evaluate ../run -K 20", capsys)


def test_evaluate_data_that_were_moved(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = output_of("evaluate run -K 20", capsys)
    Path("binary.npz").rename("moved.npz")
    assert "--data" in error_of("evaluate run -K 20", capsys)
    assert output_of("evaluate run -K 20 --data moved.npz", capsys) == expected
    again = f"fit --data moved.npz --out run --epochs 3 --resume {SMALL}"
    assert "3 steps" in output_of(again, capsys)


def test_evaluate_data_that_were_changed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("binary.npz", x=1 - np.load("binary.npz")["x"])
    assert main(shlex.split("evaluate run -K 20")) == 0
    out, err = capsys.readouterr()
    assert out.startswith("log p(x) >= ")
    assert err == f"note: changed since the run: {Path('binary.npz').resolve()}\n"


def test_evaluate_by_name_without_the_variable(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYRO_VAE_DATA", str(folder))
    output_of(f"fit --data parts --out run --steps 1 {SMALL}", capsys)
    monkeypatch.delenv("PYRO_VAE_DATA")
    assert "5 rows" in output_of("evaluate run -K 20 --split valid", capsys)


def test_evaluate_other_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "5 rows" in output_of("evaluate run -K 20 --data parts.npz", capsys)


@pytest.mark.parametrize("change", ["2 * latent", "2 * latent, bias=False"])
def test_pair_file_that_was_changed(change: str, capsys: pytest.CaptureFixture[str]) -> None:
    output_of("fit --data binary.npz --out run --steps 2 --pair mine.py:build", capsys)
    assert "nn.Linear(width, 2 * latent)" in PAIRS
    Path("mine.py").write_text(PAIRS.replace("2 * latent", change) + "\n")
    if "bias" in change:
        message = error_of("evaluate run -K 20 --pair mine.py:build", capsys)
        assert "guide.safetensors: not of this pair" in message
        assert f"changed since the run: {Path('mine.py').resolve()}:build" in message
        return
    assert main(shlex.split("evaluate run -K 20 --pair mine.py:build")) == 0
    assert "mine.py:build" in capsys.readouterr().err


# --- processes ----------------------------------------------------------------------------------


def process(command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pyro_vae.cli", *shlex.split(command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # where the tests run in the background, processes would ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_process_is_quiet() -> None:
    """No progress bar where no terminal is, and no warning of a library."""
    running = process(f"fit --data binary.npz --out run --steps 5 {SMALL}")
    out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (0, "")
    assert out.startswith("run: 5 steps")


@pytest.mark.slow
def test_process_that_is_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    running = process(f"fit --data binary.npz --out run --epochs 1000000 {SMALL}")
    for _ in range(600):
        if Path("run/config.json").exists():
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert out == ""
    assert err.startswith("stopped")
    assert err.count("\n") == 1
    names = {"config.json", "state.safetensors", "example.safetensors"}
    assert {path.name for path in Path("run").iterdir()} == names
    assert "not finished" in error_of("evaluate run", capsys)


@pytest.mark.slow
def test_error_in_another_process() -> None:
    running = process(
        "compare --data binary.npz --pair mine.py:build -o kind=shapes --steps 1 --jobs 2 --out run "
        "--objective elbo --objective mean_field"
    )
    out, err = running.communicate(timeout=120)
    assert (running.returncode, out) == (2, "")
    assert err.startswith(f"error: {line('line of the model')}")
    assert err.count("\n") == 1
    assert not Path("run").exists()
