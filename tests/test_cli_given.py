"""Generating some sites from others on the command line."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli import main
from tests.test_cli_use import error_of, output_of

ROWS = 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data of two sites and a label, and a run of them."""
    place = tmp_path_factory.mktemp("made")
    random = np.random.default_rng(0)
    label = random.integers(0, 3, ROWS)
    x = 10 + 5 * (label[:, None] + random.normal(size=(ROWS, 4)))
    picture = (random.random((ROWS, 4, 4)) < 0.2 + 0.3 * label[:, None, None]).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        np.savez("three.npz", x=x.astype(np.float32), picture=picture, label=label)
        small = "--steps 4 -o latent=2 -o hidden=4 --pair multimodal"
        options = "-d standardize=x -o guide=joint -o \"likelihood={'x': 'StudentT'}\""
        command = f"fit --data three.npz --out run {small} {options} --objective jmvae:alpha=0.1"
        assert main(shlex.split(command)) == 0
    return place


@pytest.fixture(autouse=True)
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    torch.set_default_dtype(torch.float32)
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYRO_VAE_DATA", raising=False)
    return tmp_path


def test_of_the_runs_own_rows(capsys):
    text = output_of("sample run --given label --site x,picture --out made.npz", capsys)
    assert text == "made.npz: x [8, 4], picture [8, 4, 4]\n"
    run = pv.load("run")
    test = pv.data.split(pv.data.load("three.npz"), (0.8, 0.2))[1]
    wanted = pv.sample(
        run.model, given=pv.Batch({"label": test["label"]}), guide=run.guide, sites=["x", "picture"]
    )
    with np.load("made.npz") as file:
        np.testing.assert_array_equal(file["picture"], wanted["picture"].numpy())
        raw = pv.data.undo(run.config["data"], "x", wanted["x"])
        np.testing.assert_allclose(file["x"], raw.numpy(), rtol=1e-6)
    text = output_of("sample run --given x --given label --split train -n 3 --out z.csv", capsys)
    assert text.startswith("z.csv: z [3, 2], x [3, 4], picture [3, 4, 4], label [3]")


def test_of_a_file(capsys):
    """Its rows are scaled as the run's were, and come back in their own units."""
    x = (10 + 5 * np.random.default_rng(1).normal(size=(6, 4))).astype(np.float32)
    x[2] = np.nan
    np.save("rows.npy", x)
    text = output_of("sample run --given x=rows.npy --site label,x --mean --out l.npz", capsys)
    assert text == "l.npz: x [6, 4], label [6, 3]\n"
    run = pv.load("run")
    given = pv.data.standardize_as(run.config["data"], pv.Batch({"x": x}))
    wanted = pv.sample(run.model, given=given, guide=run.guide, sites=["label"], mean=True)
    with np.load("l.npz") as file:
        np.testing.assert_allclose(file["label"], wanted["label"].numpy(), rtol=1e-5)
        seen = ~np.isnan(x)
        np.testing.assert_allclose(file["x"][seen], x[seen], rtol=1e-5)
        assert np.isfinite(file["x"]).all()
    output_of("sample run --given x=three.npz --site label -n 5 --out five.csv", capsys)
    assert len(pd.read_csv("five.csv")) == 5


def test_a_figure_of_what_labels_look_like(capsys):
    output_of("sample run --given label --site picture -n 4 --mean --out p.png", capsys)
    assert Path("p.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--given sound", "--given: came 'sound', the run's data have ['x', 'picture', 'label']"),
        ("--given picture=three.npz --given x=short.npy", "differ in their number of rows"),
        ("--given x=wide.npy", "event shape [7]"),
        ("--given sound=three.npz", "the file has sites ['x', 'picture', 'label'], not 'sound'"),
        ("--given x=nowhere.npy", "nowhere.npy"),
        ("--given x --site sound", "came sites ['sound']"),
    ],
)
def test_refuses(options: str, message: str, capsys):
    np.save("short.npy", np.zeros((3, 4), np.float32))
    np.save("wide.npy", np.zeros((3, 7), np.float32))
    assert message in error_of(f"sample run {options} --out made.npz", capsys)


def test_fit_of_a_mixture_with_private_latents_and_its_evaluation(capsys):
    options = "-o guide=mixture -o latent=2 -o hidden=4 -o private=1 --steps 2"
    output_of(f"fit --data three.npz --pair multimodal {options} --out mixture", capsys)
    assert "log p(x) >=" in output_of("evaluate mixture -K 20", capsys)


def test_compare_takes_the_objectives_of_several_sites(capsys):
    names = ("mvae:sites=('x','label')", "jmvae:alpha=0.1")
    given = " ".join(f'--objective "{name}"' for name in names)
    small = "--pair multimodal -o latent=2 -o hidden=4 --steps 2 -K 20 --sites x,label --json"
    found = json.loads(output_of(f"compare --data three.npz {small} {given}", capsys))
    assert {row["objective"] for row in found} == set(names)
