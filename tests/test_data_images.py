"""Folders of images: pixels, colour, splits, classes, and errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pyro_vae.data import describe, load

GREY = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)


def draw(path: Path, pixels: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_grey(tmp_path: Path) -> None:
    for k, ending in enumerate(["png", "PNG", "bmp", "tif", "tiff", "webp"]):
        draw(
            tmp_path / f"{9 - k}.{ending}",
            GREY[k],
            **{"lossless": True} if ending == "webp" else {},
        )
    (tmp_path / "notes.txt").write_text("left alone")
    (tmp_path / ".hidden.png").write_text("left alone")
    (tmp_path / ".cache").mkdir()
    colour = load(tmp_path)["x"].shape == (6, 3, 5, 4)  # PIL's webp files are colour
    assert colour
    (tmp_path / "4.webp").unlink()
    batch = load(tmp_path)
    assert batch.sites == ("x",)
    assert (batch["x"].numpy() == GREY[[4, 3, 2, 1, 0]]).all()  # by name
    assert batch.record["levels"] == {"x": 256}
    assert (batch.record["splits"], batch.record["rows"]) == (["all"], 5)


def test_colour(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", COLOUR[0])
    draw(tmp_path / "b.png", GREY[0])
    x = load(tmp_path)["x"].numpy()
    assert x.shape == (2, 3, 5, 4)
    assert (x[0] == COLOUR[0].transpose(2, 0, 1)).all()
    assert (x[1] == GREY[0]).all()


def test_what_is_shown_is_what_comes(tmp_path: Path) -> None:
    """One bit, a palette, opaque alpha, and the orientation that a camera notes."""
    Image.fromarray(GREY[0] > 127).save(tmp_path / "bit.png")
    assert (load(tmp_path)["x"].numpy() == 255 * (GREY[0] > 127)).all()
    (tmp_path / "bit.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    draw(tmp_path / "turned.png", GREY[0], exif=exif)
    assert (load(tmp_path)["x"].numpy() == np.rot90(GREY[0], -1)).all()
    (tmp_path / "turned.png").unlink()
    opaque = np.dstack([COLOUR[0], np.full((5, 4), 255, np.uint8)])
    draw(tmp_path / "opaque.png", opaque)
    assert (load(tmp_path)["x"].numpy() == COLOUR[0].transpose(2, 0, 1)).all()


def test_classes_and_splits(tmp_path: Path) -> None:
    for k, (split, name) in enumerate(
        [("train", "dog"), ("train", "cat"), ("train", "dog"), ("test", "fox"), ("test", "cat")]
    ):
        draw(tmp_path / split / name / f"{k}.png", GREY[k])
    train, test = load(tmp_path), load(tmp_path, "test")
    assert (train["x"].numpy() == GREY[[1, 0, 2]]).all()
    assert train["y"].tolist() == [0, 1, 1]
    assert test["y"].tolist() == [0, 2]
    assert (test["x"].numpy() == GREY[[4, 3]]).all()
    assert train.record["classes"] == {"y": ["cat", "dog", "fox"]}
    assert train.record["splits"] == ["train", "test"]
    assert json.loads(json.dumps(train.record)) == train.record
    assert load(tmp_path / "train").record["classes"] == {"y": ["cat", "dog"]}
    assert load(tmp_path, sites=["y"]).sites == ("y",)
    before = describe(tmp_path)["sha256"]
    (tmp_path / "test/fox/3.png").rename(tmp_path / "test/fox/8.png")
    assert describe(tmp_path)["sha256"] != before


def test_size(tmp_path: Path) -> None:
    """Averages over areas: 4 x 4 of a chequered 8 x 8 is half its brightest everywhere."""
    draw(tmp_path / "a.png", (np.indices((8, 8)).sum(0) % 2 * 254).astype(np.uint8))
    draw(tmp_path / "b.png", np.full((2, 6), 40, np.uint8))
    batch = load(tmp_path, size=(4, 2))
    assert batch["x"].shape == (2, 4, 2)
    assert (batch["x"][0] == 127).all()
    assert (batch["x"][1] == 40).all()
    (resize, _) = batch.record["steps"]
    assert (resize["step"], resize["size"]) == ("resize", [4, 2])


def broken(path: Path) -> None:
    draw(path / "a.png", GREY[0])
    content = (path / "a.png").read_bytes()
    (path / "b.png").write_bytes(content[: len(content) // 2])


def animated(path: Path) -> None:
    frames = [Image.fromarray(pixels) for pixels in GREY[:2]]
    frames[0].save(path / "a.tif", save_all=True, append_images=frames[1:])


def transparent(path: Path) -> None:
    draw(path / "a.png", np.dstack([COLOUR[0], np.full((5, 4), 100, np.uint8)]))


ERRORS: dict[str, tuple[Any, str]] = {
    "empty": (lambda path: None, r"no images \(\.png, .*\) in the folder"),
    "empty class": (lambda path: (path / "cat").mkdir(), r"no images .* in the folder"),
    "not an image": (lambda path: (path / "a.png").write_text("no"), "a.png: not a readable image"),
    "cut short": (broken, "b.png: not a readable image"),
    "another size": (
        lambda path: (draw(path / "a.png", GREY[0]), draw(path / "b.png", GREY[0][:3])),
        r"b.png: came 3 x 4 \(H x W\), wanted 5 x 4 \(H x W\) as a.png has; resize all by size=",
    ),
    "16 bits": (
        lambda path: draw(path / "a.png", GREY[0].astype(np.uint16) * 256),
        "a.png: came an image of mode I;16, wanted 8 bits",
    ),
    "frames": (animated, "a.tif: came 2 frames, wanted one"),
    "transparent": (transparent, "a.png: came transparent pixels, wanted none"),
    "loose": (
        lambda path: (draw(path / "a.png", GREY[0]), draw(path / "cat/a.png", GREY[0])),
        r"a.png lies beside the classes \['cat'\]",
    ),
    "loose split": (
        lambda path: (draw(path / "train/a.png", GREY[0]), draw(path / "val/a.png", GREY[0])),
        r"\['val'\] lie beside the splits \['train'\]; wanted folders named train, valid, test",
    ),
    "deep": (lambda path: draw(path / "cat/old/a.png", GREY[0]), "old: a folder in a class"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(tmp_path: Path, case: str) -> None:
    make, message = ERRORS[case]
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [(0, 3), (2.5, 3), 28, (1, 2, 3)])
def test_size_that_is_none(tmp_path: Path, size: Any) -> None:
    draw(tmp_path / "a.png", GREY[0])
    with pytest.raises(
        ValueError, match=r"size= came .*, wanted two whole numbers above 0, \(H, W\)"
    ):
        load(tmp_path, size=size)
