"""Named data sets: found, decoded from their originals, and laid out in splits."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vae.data import available, describe, load
from pyro_vae.data.fetch import Original, Public
from pyro_vae.data.named import NAMED, drawing_split, read_bits, read_idx

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("PYRO_VAE_DATA", raising=False)
    monkeypatch.setenv("PYRO_VAE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def idx(array: Any) -> bytes:
    header = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes())


def text(bits: Any) -> bytes:
    return b"".join(b" ".join(b"%d" % bit for bit in row) + b" \n" for row in bits)


Serve = Callable[[str, dict[str, bytes]], Public]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, places: Path) -> Serve:
    """Put a small data set in the place of a named one, its originals on the disk."""

    class FromDisk:
        def __init__(self, **_: Any) -> None: ...

        def __call__(self, url: str, target: str, _: Any) -> None:
            Path(target).write_bytes(Path(url).read_bytes())

    def put(name: str, files: dict[str, bytes]) -> Public:
        for file, content in files.items():
            (places / file).write_bytes(content)
        originals = tuple(Original(file, (str(places / file),)) for file in files)
        small = replace(NAMED[name], originals=originals, shapes={}, counts={})
        monkeypatch.setattr("pooch.HTTPDownloader", FromDisk)
        monkeypatch.setitem(NAMED, name, small)
        return small

    return put


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_digits_from_their_originals(serve: Serve, name: str, places: Path) -> None:
    x = RANDOM.integers(0, 256, (7, 28, 28), dtype=np.uint8)
    y = np.arange(7, dtype=np.uint8)
    files = {
        "train-images-idx3-ubyte.gz": idx(x[:5]),
        "train-labels-idx1-ubyte.gz": idx(y[:5]),
        "t10k-images-idx3-ubyte.gz": idx(x[5:]),
        "t10k-labels-idx1-ubyte.gz": idx(y[5:]),
    }
    assert {original.name for original in NAMED[name].originals} == set(files)
    serve(name, files)
    train, test = load(name), load(name, "test")
    assert torch.equal(train["x"], torch.from_numpy(x[:5]).double())
    assert torch.equal(test["x"], torch.from_numpy(x[5:]).double())
    assert (train["y"].tolist(), test["y"].tolist()) == (list(range(5)), [5, 6])
    record = train.record
    assert (record["name"], record["levels"]) == (name, {"x": 256})
    assert record["source"] == str(places / "cache" / f"{name}.npz")
    assert [original["name"] for original in record["originals"]] == list(files)
    assert (len(record.get("classes", {"y": []})["y"]) == 10) == (name == "fashion_mnist")


@pytest.mark.parametrize("name", NAMED)
def test_what_is_known_of_the_originals(name: str) -> None:
    public = NAMED[name]
    for original in public.originals:
        assert all(url.endswith(f"/{original.name}") for url in original.urls)
        assert len(original.urls) > 1
        if original.known_hash is not None:
            kind, _, digest = original.known_hash.partition(":")
            assert (kind, len(digest)) == ("md5", 32)
    for site, counts in public.counts.items():
        assert sum(counts) == public.shapes[site if site in public.shapes else "x"][0]


def test_folder_comes_before_the_cache(
    places: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.setenv("PYRO_VAE_DATA", str(places))
    np.savez(places / "mnist.npz", x_train=np.zeros((3, 2, 2), np.uint8))
    assert load("mnist")["x"].shape == (3, 2, 2)
    known = available()
    assert known["digits"] == "scikit-learn"
    assert known["mnist"] == str(places / "mnist.npz")
    assert known["omniglot28"] == "not here yet, about 16 MB to download"


# --- statically binarized MNIST -----------------------------------------------------------------


def test_static_binary_from_its_originals(serve: Serve) -> None:
    bits = RANDOM.integers(0, 2, (9, 784), dtype=np.uint8)
    parts = {"train": bits[:4], "valid": bits[4:7], "test": bits[7:]}
    serve(
        "mnist_static_binary",
        {f"binarized_mnist_{split}.amat": text(rows) for split, rows in parts.items()},
    )
    for split, rows in parts.items():
        batch = load("mnist_static_binary", split)
        assert batch.sites == ("x",)
        assert batch["x"].shape == (len(rows), 28, 28)
        assert (batch["x"].flatten(1).numpy() == rows).all()
    assert batch.record["splits"] == ["train", "valid", "test"]
    assert "levels" not in batch.record


def test_static_binary_file_is_unpacked(places: Path) -> None:
    bits = RANDOM.integers(0, 2, (4, 784), dtype=np.uint8)
    path = places / "mnist_static_binary.npz"
    np.savez(path, x_valid=np.packbits(bits, axis=1), y_valid=np.arange(4, dtype=np.uint8))
    batch = load(path, split="valid")
    assert batch["x"].dtype == torch.float64
    assert batch["x"].flatten(1).tolist() == bits.tolist()
    assert batch["y"].tolist() == [0, 1, 2, 3]
    assert "unpacked" in describe(path, split="valid")["steps"][0]["text"]
    np.savez(path, x=np.zeros((4, 28, 28), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"wanted bit-packed uint8 \[N, 98\]"):
        load(path)


# --- Omniglot -----------------------------------------------------------------------------------


def drawings(*alphabets: str, first: int) -> bytes:
    """Two characters an alphabet, 20 drawings each: white, with one row of ink per drawer."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("__MACOSX/images/a/b.png", b"")
        for k, alphabet in enumerate(alphabets):
            for character in range(2):
                for drawer in range(20):
                    pixels = np.ones((105, 105), bool)
                    pixels[15 * character : 15 * character + drawer + 1] = False
                    image = io.BytesIO()
                    Image.fromarray(pixels).save(image, "PNG")
                    number = first + 2 * k + character + 1
                    place = f"images/{alphabet}/character{character + 1:02}"
                    archive.writestr(f"{place}/{number:04}_{drawer + 1:02}.png", image.getvalue())
    return out.getvalue()


def test_omniglot_from_its_originals(serve: Serve) -> None:
    files = {
        "images_background.zip": drawings("Greek", "Avesta", first=0),
        "images_evaluation.zip": drawings("Bengali", first=4),
    }
    serve("omniglot28", files)
    parts = [load("omniglot28", split) for split in ("train", "valid", "test")]
    assert [part.size for part in parts] == [120 - 30 - 5, 5, 30]
    # BOX takes or leaves whole pixels, by where their centres are
    centre = np.ceil((np.arange(105) + 0.5) / 3.75).astype(int) - 1
    for part in parts:
        assert part.sites == ("x", "char", "alphabet", "drawer")
        assert part["x"].shape == (part.size, 28, 28)
        names = part.record["classes"]["alphabet"]
        assert names == ["Avesta", "Bengali", "Greek"]
        for row in range(part.size):
            char, drawer = int(part["char"][row]), int(part["drawer"][row])
            assert names[part["alphabet"][row]] == ("Greek", "Avesta", "Bengali")[char // 2]
            inked = (np.arange(105) >= 15 * (char % 2)) & (
                np.arange(105) < 15 * (char % 2) + drawer
            )
            wanted = [255 * inked[centre == k].mean() for k in range(28)]
            assert np.allclose(part["x"][row], np.array(wanted)[:, None], atol=0.5)
    assert parts[2]["char"].bincount().tolist() == [5] * 6
    assert parts[0].record["levels"] == {"x": 256}
    rest = load("omniglot28", sites=["official_evaluation"])
    assert rest["official_evaluation"].unique().tolist() == [0, 1]


def test_drawing_split_is_pinned() -> None:
    """Recorded numbers are of this split."""
    char = np.repeat(np.arange(1623), 20)
    split = drawing_split(char)
    assert np.bincount(split).tolist() == [23000, 1345, 8115]
    assert (split.reshape(-1, 20) == 2).sum(1).tolist() == [5] * 1623
    assert np.flatnonzero(split[:40] == 2).tolist() == [1, 8, 10, 18, 19, 21, 22, 31, 37, 38]
    assert np.flatnonzero(split[:60] == 1).tolist() == [11, 25, 40]


def test_omniglot_file_without_its_split(places: Path) -> None:
    np.savez(places / "omniglot28.npz", x=np.zeros((3, 28, 28), np.uint8))
    with pytest.raises(ValueError, match=r"sites= names \['alphabet', 'char', 'drawer', 'split'\]"):
        load(places / "omniglot28.npz")


# --- originals that are broken ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "Not a gzipped file"),
        (gzip.compress(b"<html>"), "not an idx file of bytes"),
        (gzip.compress(b"\0\0\x08\x03\0\0"), "not an idx file of bytes"),
        (idx(np.zeros((2, 3), np.uint8))[:-9], "end-of-stream"),
        (
            gzip.compress(gzip.decompress(idx(np.zeros((2, 3), np.uint8)))[:-1]),
            "17 bytes do not hold",
        ),
    ],
    ids=["page", "packed page", "header", "cut", "short"],
)
def test_broken_idx(serve: Serve, places: Path, content: bytes, message: str) -> None:
    names = [original.name for original in NAMED["mnist"].originals]
    serve("mnist", dict.fromkeys(names, content))
    with pytest.raises(
        ValueError, match=f"mnist: what came cannot be decoded: .*{message}"
    ) as raised:
        load("mnist")
    assert "\n" not in str(raised.value)
    assert not (places / "cache").exists()


def test_read_idx(tmp_path: Path) -> None:
    array = RANDOM.integers(0, 256, (2, 3, 4), dtype=np.uint8)
    (tmp_path / "a.gz").write_bytes(idx(array))
    assert (read_idx(tmp_path / "a.gz") == array).all()


@pytest.mark.parametrize("content", [b"", b"0 1 2", b"0 1 0", b"<html>", b"0.0 1.0 " * 784])
def test_broken_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.amat").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.amat: not rows of 784 numbers 0 and 1"):
        read_bits(tmp_path / "a.amat")


@pytest.mark.parametrize("content", [b"<html>", drawings(first=0)], ids=["page", "empty"])
def test_broken_drawings(serve: Serve, content: bytes) -> None:
    serve("omniglot28", {"images_background.zip": content, "images_evaluation.zip": content})
    with pytest.raises(ValueError, match="omniglot28: what came cannot be decoded"):
        load("omniglot28")
