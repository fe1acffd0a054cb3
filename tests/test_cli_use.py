"""The commands that use a finished run, as a user types them."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import pyro_vae as pv
from pyro_vae.cli import main

COLUMNS = ["age", "height", "weight"]


def table() -> pd.DataFrame:
    random = np.random.default_rng(0)
    factor = random.normal(size=60)
    values = np.stack([40 + 10 * factor, 170 + 8 * factor, 70 + 5 * random.normal(size=60)], 1)
    frame = pd.DataFrame(values.round(2), columns=COLUMNS)
    frame.loc[::7, "weight"] = np.nan
    frame["group"] = (factor > 0).astype(int)
    return frame


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table, a folder of images, and a run of each."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        table().to_csv("people.csv", index=False)
        random = np.random.default_rng(1)
        for kind in ("train", "test"):
            (place / "pictures" / kind).mkdir(parents=True)
            for i in range(12):
                pixels = (random.random((8, 8)) * 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / "pictures" / kind / f"{i}.png")
        small = "--steps 4 -o latent=2 -o hidden=4"
        people = f"fit --data people.csv -d drop=group -d standardize=True --out people {small}"
        assert main(shlex.split(people)) == 0
        pictures = f"fit --data pictures -d dequantize=True --out images {small}"
        assert main(shlex.split(f"{pictures} -o likelihood=Gaussian")) == 0
    return place


@pytest.fixture(autouse=True)
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYRO_VAE_DATA", raising=False)
    return tmp_path


def output_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(shlex.split(command)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def error_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(map(str, Path().rglob("*")))
    capsys.readouterr()
    assert main(shlex.split(command)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(map(str, Path().rglob("*"))) == before
    return err


def raw_test_rows() -> np.ndarray[Any, Any]:
    """The rows that are held out, as they are in the file."""
    whole = pv.data.load("people.csv", drop="group")
    test = pv.data.split(whole, (0.8, 0.2))[1]
    return np.where(test.mask("x").numpy(), test["x"].numpy(), np.nan)


# --- numbers ------------------------------------------------------------------------------------


def test_evaluate_says_what_the_units_are(capsys):
    summary = json.loads(output_of("evaluate people -K 20 --json", capsys))
    steps = json.loads(Path("people/config.json").read_text())["data"]["steps"]
    (scaled,) = [step for step in steps if step["step"] == "standardize"]
    seen = ~np.isnan(raw_test_rows())
    jacobian = (seen * np.array(scaled["log_jacobian"])).sum(1).mean()
    np.testing.assert_allclose(summary["log_p_raw"] - summary["log_p"], jacobian, rtol=1e-6)
    assert "bits_per_dim" not in summary


def test_a_mask_is_data_where_it_is_asked_for(capsys):
    pair = "--pair missing -o mechanism=self_masking -o latent=2 -o hidden=4"
    options = "-d drop=group -d standardize=True -d mask=x"
    output_of(f"fit --data people.csv {options} --out seen --steps 2 {pair}", capsys)
    summary = json.loads(output_of("evaluate seen -K 500 --json", capsys))
    run = pv.load("seen")
    test = pv.Batch({"x": raw_test_rows().astype(np.float32)})
    test = pv.data.standardize_as(run.config["data"], test).with_mask()
    log_p = run.evaluate(test, 500).summary()["log_p"]
    np.testing.assert_allclose(summary["log_p"], log_p, rtol=0.01)
    assert abs(run.evaluate(test.without("s"), 500).summary()["log_p"] - log_p) > 0.2


def test_evaluate_images_in_bits(capsys):
    summary = json.loads(output_of("evaluate images -K 20 --json", capsys))
    entries, log_p = 64, summary["log_p"] - 64 * np.log(256)
    np.testing.assert_allclose(summary["bits_per_dim"], -log_p / (entries * np.log(2)), rtol=1e-6)
    assert "bits/dim <= " in output_of("evaluate images -K 20", capsys)


def test_evaluate_by_annealed_importance_sampling(capsys):
    summary = json.loads(output_of("evaluate people -K 20 --annealed 30 --seed 1 --json", capsys))
    run = pv.load("people")
    test = pv.data.standardize_as(
        run.config["data"], pv.data.split(pv.data.load("people.csv", drop="group"), (0.8, 0.2))[1]
    )
    wanted = pv.annealed(run.model, test, temperatures=30, seed=1).summary()
    assert summary["annealed"]["log_p"] == pytest.approx(wanted["log_p"], rel=1e-6)
    assert abs(summary["annealed"]["log_p"] - summary["log_p"]) < 3
    text = output_of("evaluate people -K 20 --annealed 30 --seed 1", capsys)
    assert f"whatever the guide: log p(x) >= {wanted['log_p']:.3f}" in text


# --- tables -------------------------------------------------------------------------------------


def test_encode(capsys):
    text = output_of("encode people --out codes.csv", capsys)
    assert text == "codes.csv: row [12], z [12, 2], z_sd [12, 2]\n"
    codes = pd.read_csv("codes.csv")
    assert list(codes.columns) == ["row", "z_0", "z_1", "z_sd_0", "z_sd_1"]
    run = pv.load("people")
    test = pv.data.standardize_as(
        run.config["data"], pv.data.split(pv.data.load("people.csv", drop="group"), (0.8, 0.2))[1]
    )
    exact = pv.encode(run.model, run.guide, test)
    np.testing.assert_allclose(codes[["z_0", "z_1"]], exact["z"].numpy(), rtol=1e-5, atol=1e-6)
    output_of("encode people --out codes.npz --split train", capsys)
    with np.load("codes.npz") as file:
        assert file["z_sd"].shape == (48, 2)


def test_reconstruct_fills_in_what_is_missing_in_the_units_of_the_file(capsys):
    output_of("reconstruct people --out filled.csv", capsys)
    filled = pd.read_csv("filled.csv")
    assert list(filled.columns) == COLUMNS
    assert not filled.isna().any().any()
    assert 100 < filled["height"].mean() < 250
    output_of("reconstruct people --out scaled.csv --raw", capsys)
    assert abs(pd.read_csv("scaled.csv")["height"].mean()) < 5
    output_of("reconstruct people --out few.csv --rows 3", capsys)
    assert len(pd.read_csv("few.csv")) == 3


def test_fill_keeps_what_is_observed(capsys):
    output_of("reconstruct people --split all --fill --out filled.csv", capsys)
    before, after = table()[COLUMNS], pd.read_csv("filled.csv")
    seen = before.notna().to_numpy()
    np.testing.assert_allclose(after.to_numpy()[seen], before.to_numpy()[seen], rtol=1e-5)
    assert not after.isna().any().any()


def test_codes_have_the_row_numbers_of_the_file(capsys):
    output_of("encode people --out test.csv", capsys)
    output_of("encode people --split all --out all.csv", capsys)
    test, everything = pd.read_csv("test.csv"), pd.read_csv("all.csv")
    assert list(everything["row"]) == list(range(60))
    joined = test.merge(everything, on="row", suffixes=("", "_all"))
    np.testing.assert_allclose(joined["z_0"], joined["z_0_all"], rtol=1e-4, atol=1e-5)
    assert not np.array_equal(test["row"], range(12))


def test_rows_that_a_run_was_selected_by(capsys):
    small = "--steps 2 -o latent=2 -o hidden=4 --valid 0.25"
    output_of(f"fit --data people.csv -d drop=group --out r {small}", capsys)
    output_of("encode r --split valid --out valid.csv", capsys)
    output_of("encode r --split all --out all.csv", capsys)
    valid, everything = pd.read_csv("valid.csv"), pd.read_csv("all.csv")
    assert len(valid) == 12
    joined = valid.merge(everything, on="row", suffixes=("", "_all"))
    np.testing.assert_allclose(joined["z_0"], joined["z_0_all"], rtol=1e-4, atol=1e-5)


def test_resume_starts_where_there_is_nothing(capsys):
    small = "--steps 2 -o latent=2 -o hidden=4 --resume"
    for _ in range(2):
        text = output_of(f"fit --data people.csv -d drop=group --out r {small}", capsys)
        assert text.startswith("r: 2 steps")


def test_export_to_a_full_disk(monkeypatch, capsys):
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left" in error_of("export people --rows 2 --draws 3 --out p.nc", capsys)


def test_sample(capsys):
    assert output_of("sample people -n 5 --out s.npz", capsys) == "s.npz: z [5, 2], x [5, 3]\n"
    with np.load("s.npz") as first:
        x = first["x"]
    assert 100 < x[:, 1].mean() < 250
    output_of("sample people -n 5 --sites x --seed 1 --out other.npz", capsys)
    with np.load("other.npz") as other:
        assert list(other) == ["x"]
        assert not np.array_equal(other["x"], x)
    output_of("sample images -n 3 --sites x --out pixels.npz", capsys)
    with np.load("pixels.npz") as file:
        assert file["x"].min() >= 0
        assert file["x"].max() <= 255
        np.testing.assert_array_equal(file["x"], file["x"].round())


def test_export(capsys):
    import arviz as az

    text = output_of("export people --out p.nc --rows 5 --draws 10", capsys)
    assert text.startswith("p.nc: 10 draws of 5 rows; x: (x - mean) / scale")
    idata = az.from_netcdf("p.nc")
    assert dict(idata["posterior"]["z"].sizes) == {"chain": 1, "draw": 10, "row": 5, "z_dim_0": 2}
    assert set(idata["observed_data"].data_vars) == {"x"}
    idata.close()
    output_of("export people --rows 2 --draws 3", capsys)
    assert Path("people/posterior.nc").exists()


# --- figures ------------------------------------------------------------------------------------


def test_plot_makes_every_figure_of_images(capsys):
    shown = output_of("plot images", capsys).splitlines()
    names = {
        *("training", "samples", "reconstructions", "interpolations"),
        *("traversals", "latent_map", "rates", "weights"),
    }
    assert {Path(line).stem for line in shown} == names
    for line in shown:
        with Image.open(line) as image:
            assert min(image.size) > 100


def test_plot_of_a_table_leaves_out_what_has_no_pixels(capsys):
    capsys.readouterr()
    assert main(shlex.split("plot people --format svg --out figures --label group")) == 0
    out, err = capsys.readouterr()
    assert {Path(line).stem for line in out.splitlines()} == {
        *("training", "samples", "reconstructions", "latent_map", "rates", "weights")
    }
    assert err == ""
    assert "<svg" in Path("figures/rates.svg").read_text()


def test_plot_of_a_comparison(capsys):
    output_of(
        "compare --data people.csv -d drop=group --objective elbo --objective mean_field --steps 2 "
        "-K 10 -o latent=2 -o hidden=4 --out grid",
        capsys,
    )
    assert output_of("plot grid", capsys) == "grid/figures/comparison.png\n"


def test_samples_as_a_figure(capsys):
    output_of("sample images -n 9 --out s.png --sites x", capsys)
    output_of("reconstruct images --rows 5 --out r.pdf", capsys)
    with Image.open("s.png") as image:
        assert min(image.size) > 100
    assert Path("r.pdf").read_bytes().startswith(b"%PDF")


# --- data ---------------------------------------------------------------------------------------


def test_data_describes(capsys):
    text = output_of("data people.csv --sites x,y=group", capsys)
    assert "site x: [60, 3]" in text
    assert "9 entries missing" in text
    assert "site y: [60] int64" in text
    text = output_of("data people.csv --sites x,y=group -d drop=weight,age", capsys)
    assert "site x: [60, 1]" in text
    some = "data people.csv --sites x=age+weight,y=group --json"
    record = json.loads(output_of(some, capsys))
    assert record["columns"] == {"x": ["age", "weight"], "y": ["group"]}
    record = json.loads(output_of("data people.csv -d columns=age,height --json", capsys))
    assert record["columns"] == {"x": ["age", "height"]}
    assert "digits" in output_of("data", capsys)
    assert "mnist" in json.loads(output_of("data --json", capsys))


def test_valid_by_share_and_by_split(capsys):
    small = "--steps 2 -o latent=2 -o hidden=4 -o likelihood=Gaussian"
    random = torch.Generator().manual_seed(0)
    x = torch.rand(30, 4, generator=random).numpy() * 3
    np.savez("parts.npz", x_train=x[:20], x_valid=x[20:25], x_test=x[25:])
    for valid in ("0.25", "valid"):
        text = output_of(f"fit --data parts.npz --out v{valid} --valid {valid} {small}", capsys)
        assert "valid bound" in text
    rows = [json.loads(Path(f"v{v}/config.json").read_text())["rows"] for v in ("0.25", "valid")]
    assert rows == [15, 20]


def test_options_of_training_are_kept(capsys):
    torch.set_default_dtype(torch.float32)  # the fixture restores float64
    more = "--ema 0.9 --accumulate 2 --precision bf16 --batch-size 8"
    output_of(
        f"fit --data people.csv -d drop=group --out r --steps 2 -o latent=2 -o hidden=4 {more}",
        capsys,
    )
    config = json.loads(Path("r/config.json").read_text())
    assert (config["ema"], config["accumulate"], config["precision"]) == (0.9, 2, "bf16")


# --- errors -------------------------------------------------------------------------------------

BAD = [
    ("sample people --out s.gif", ["s.gif", "'.gif'", ".npz"]),
    ("sample people --out none/s.npz", ["none/s.npz", "no such folder"]),
    ("sample people --out s.npz --sites w", ["'w'", "'x'"]),
    ("sample people --out s.npz --device nowhere", ["device", "'nowhere'"]),
    ("encode none --out z.csv", ["none/config.json", "no such file"]),
    ("encode people --out z.csv --split valid", ["people.csv", "'valid'", "train, test or all"]),
    ("encode people --out z.csv --data pictures", ["pictures"]),
    ("export people --out p.csv", ["--out", "p.csv", ".nc"]),
    ("export people --out none/p.nc", ["none/p.nc", "no such folder"]),
    ("plot people --kind bogus", ["--kind", "bogus", "samples"]),
    ("plot people --kind traversals", ["image"]),
    ("plot images --format gif", ["--format", "'gif'", "svg"]),
    ("plot images --image-shape 8", ["--image-shape", "'8'", "H,W"]),
    ("plot images --kind samples --site w", ["--site", "'w'", "x"]),
    ("reconstruct people --out r.png --image-shape 8,8", ["3", "8"]),
    ("data none.csv", ["none.csv", "no such file"]),
    ("data people.csv -d nosuch=1", ["--data-option", "'nosuch'"]),
    ("data people.csv -d split=test", ["--data-option", "split"]),
    ("data people.csv -d columns=age,nosuch", ["people.csv", "nosuch"]),
    ("data people.csv --sites x=age,y=group,x=height", ["'x' came twice", "x=age+height"]),
    ("data people.csv --sites x,x,y=group", ["'x' came twice", "x=COLUMN+COLUMN"]),
    ("data bogus", ["bogus", "digits"]),
    ("fit --data people.csv -d drop=group --out r --valid half", ["--valid", "'half'"]),
    ("fit --data people.csv -d drop=group --out r --valid 1.5", ["--valid", "'1.5'"]),
    ("fit --data people.csv -d drop=group --out r --ema 2", ["ema=2"]),
    ("fit --data people.csv -d drop=group --out r --precision half", ["precision", "half"]),
    ("fit --data people.csv -d standardize=z --out r", ["standardize", "'z'"]),
]


@pytest.mark.parametrize(("command", "words"), BAD, ids=[command for command, _ in BAD])
def test_error_is_one_line(command, words, capsys):
    message = error_of(command, capsys)
    assert [word for word in words if word not in message] == [], message


def test_run_whose_data_are_gone_still_samples(capsys):
    config = json.loads(Path("people/config.json").read_text())
    config["command"]["data"] = "elsewhere.csv"
    Path("people/config.json").write_text(json.dumps(config))
    output_of("sample people -n 5 --out s.npz", capsys)
    message = error_of("encode people --out z.csv", capsys)
    assert "its data are gone" in message
    assert "--data" in message


def test_run_by_hand_needs_its_data_named(capsys):
    data = pv.data.load("people.csv", drop="group")
    model, guide = pv.pairs.vae(data, latent=2, hidden=(4,))
    pv.fit(model, guide, data, steps=2, out="byhand")
    assert "which data" in error_of("encode byhand --out z.csv", capsys)


def test_completion(monkeypatch, capsys):
    """As the shell asks for it, once its script is installed."""
    monkeypatch.setenv("_PYRO_VAE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "pyro-vae re")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.split() == ["reconstruct"]
