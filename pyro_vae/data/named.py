"""The data sets that have a name: where they come from, and how their files are laid out.

``mnist`` (LeCun et al. 1998), 60000 / 10000 rows of ``x`` [B, 28, 28] 0..255 and ``y`` 0..9, and
``fashion_mnist`` (Xiao et al. 2017, arXiv:1708.07747), likewise: from the idx files, whose MD5 are
those of torchvision's source.

``omniglot28`` (Lake et al. 2015), 23000 / 1345 / 8115 rows: the official drawings, 105 x 105, inverted,
so that ink is bright, and averaged by PIL's BOX to ``x`` [B, 28, 28]; ``char`` 0..1622, ``alphabet``
0..49, ``drawer`` 1..20. Both official sets, of which the MD5 are torchvision's, are pooled. Per
character 5 of the 20 drawings are test rows, and 1345 of all others are valid rows, by
``numpy.random.RandomState(0)``. Not the file of the IWAE paper: log-likelihoods are near to, not
comparable digit by digit with, published ones.

``mnist_static_binary`` (Salakhutdinov and Murray 2008; Larochelle and Murray 2011), 50000 / 10000 /
10000 rows of ``x`` [B, 28, 28] in {0, 1}: Larochelle's text files, which have no labels and no
published hash. Their SHA-256 at the first download is kept beside the data, and later ones must have
it. A file with labels ``y`` in PYRO_VAE_DATA is taken as it is.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from pyro_vae.data.digits import BUILT_IN, read_digits
from pyro_vae.data.fetch import Original, Public, cache_folder, fetch, originals
from pyro_vae.data.npz import read_npz
from pyro_vae.data.source import SPLITS, Array, Source
from pyro_vae.data.sprites import read_sprites

__all__ = ["FOLDER", "MADE", "NAMED", "available", "obtain", "read_named"]

FOLDER = "PYRO_VAE_DATA"
MADE = dict.fromkeys(BUILT_IN, read_digits) | {"sprites": read_sprites}  # that need no file
Files = Mapping[str, Path]


# --- where they are -----------------------------------------------------------------------------


def available() -> dict[str, str]:
    """The data sets that have a name, and where each of them is."""
    folder = _folder()
    found = {path.stem: str(path) for path in sorted(folder.glob("*.npz"))} if folder else {}
    for name, public in NAMED.items():
        kept = cache_folder() / f"{name}.npz"
        absent = f"not here yet, about {public.megabytes} MB to download"
        found.setdefault(name, str(kept) if kept.exists() else absent)
    return dict.fromkeys(BUILT_IN, "scikit-learn") | {"sprites": "rendered"} | found


def obtain(name: str) -> Path | None:
    """The file of a name: in the folder of data sets, or downloaded; None for an unknown name."""
    folder = _folder()
    if folder and (path := folder / f"{name}.npz").exists():
        return path
    return fetch(name, NAMED[name]) if name in NAMED else None


def _folder() -> Path | None:
    given = os.environ.get(FOLDER)
    if given and not Path(given).is_dir():
        raise ValueError(f"{FOLDER} names {given}, which is not a folder")
    return Path(given) if given else None


# --- how they are laid out ----------------------------------------------------------------------


def read_named(path: Path, sites: Collection[str] | None = None) -> Source:
    """An ``.npz`` file, with what is known of one that has the name of a data set."""
    found = LAYOUTS.get(path.stem, read_npz)(path, sites)
    if path.stem in NAMED and NAMED[path.stem].classes:
        found.record["classes"] = dict(NAMED[path.stem].classes)
    if before := originals(path):
        found.record["originals"] = before
    return found


def _packed(path: Path, sites: Collection[str] | None) -> Source:
    """Bit-packed rows [N, 98] of site x as [N, 28, 28] of 0 and 1."""
    found = read_npz(path, sites)
    for part in found.parts.values():
        if "x" in part:
            if part["x"].dtype != np.uint8 or part["x"].shape[1:] != (98,):
                came = f"{part['x'].dtype} {list(part['x'].shape)}"
                raise ValueError(f"{path}: array 'x' came {came}, wanted bit-packed uint8 [N, 98]")
            part["x"] = np.unpackbits(part["x"], axis=1).reshape(-1, 28, 28)
    text = "x: unpacked from bits, 1 = ink (static binarization of the file's authors)"
    found.record["steps"] = [{"site": "x", "step": "unpack", "text": text}]
    return found


def _omniglot(path: Path, sites: Collection[str] | None) -> Source:
    """Rows whose split is in an array of its own: 0, 1, 2 for train, valid, test."""
    found = read_npz(path, [*(sites or ("x", "char", "alphabet", "drawer")), "split"])
    found.check("all")
    whole = found.parts["all"]
    split = whole.pop("split")
    found.parts = {
        name: {site: array[split == number] for site, array in whole.items()}
        for number, name in enumerate(SPLITS)
    }
    with np.load(path, allow_pickle=False) as archive:
        names = archive["alphabet_names"].tolist() if "alphabet_names" in archive else []
    found.record["classes"] = {"alphabet": names}
    return found


LAYOUTS = {"mnist_static_binary": _packed, "omniglot28": _omniglot}


# --- where they come from -----------------------------------------------------------------------


def _from_idx(files: Files) -> dict[str, Array]:
    names = {"x_train": "train-images", "y_train": "train-labels", "x_test": "t10k-images"}
    names |= {"y_test": "t10k-labels"}
    kinds = {"x": "idx3", "y": "idx1"}
    return {
        array: read_idx(files[f"{name}-{kinds[array[0]]}-ubyte.gz"])
        for array, name in names.items()
    }


def read_idx(path: Path) -> Array:
    """The array of bytes in an ``idx`` file that is packed by gzip.

    Raises:
        ValueError: another magic number or length.
    """
    with gzip.open(path) as file:
        content = file.read()
    dims = content[3] if len(content) > 3 else 0
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * dims:
        raise ValueError(f"{path.name}: not an idx file of bytes")
    shape = np.frombuffer(content, ">i4", dims, 4)
    if len(content) != 4 + 4 * dims + shape.prod():
        raise ValueError(f"{path.name}: {len(content)} bytes do not hold {shape.tolist()}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _from_text(files: Files) -> dict[str, Array]:
    return {
        f"x_{split}": np.packbits(read_bits(files[f"binarized_mnist_{split}.amat"]), axis=1)
        for split in SPLITS
    }


def read_bits(path: Path) -> Array:
    """Rows [N, 784] of 0 and 1, written as text with blanks between them.

    Raises:
        ValueError: something else in the file.
    """
    content = np.frombuffer(path.read_bytes(), np.uint8)
    bits = content[content > ord(" ")] - ord("0")
    if len(bits) == 0 or bits.max() > 1 or len(bits) % 784:
        raise ValueError(f"{path.name}: not rows of 784 numbers 0 and 1")
    return bits.reshape(-1, 784)


def _from_drawings(files: Files) -> dict[str, Array]:
    """Drawings ALPHABET/characterNN/CCCC_DD.png: character CCCC - 1 by drawer DD."""
    from PIL import Image, ImageOps

    rows = []
    for official, name in enumerate(("images_background.zip", "images_evaluation.zip")):
        with zipfile.ZipFile(files[name]) as archive:
            for member in sorted(archive.namelist()):
                place = PurePosixPath(member)
                if not re.fullmatch(r"\d{4}_\d\d\.png", place.name):
                    continue
                with Image.open(io.BytesIO(archive.read(member))) as image:
                    ink = ImageOps.invert(image.convert("L"))
                    small = ink.resize((28, 28), Image.Resampling.BOX)
                character, drawer = map(int, place.stem.split("_"))
                rows.append((np.asarray(small), character - 1, place.parts[-3], drawer, official))
    if not rows:
        raise ValueError("no drawings in the archives")
    x, char, alphabet, drawer, evaluation = zip(*rows, strict=True)
    names, numbers = np.unique(alphabet, return_inverse=True)
    return {
        "x": np.stack(x),
        "char": np.array(char, np.int16),
        "alphabet": numbers.astype(np.uint8),
        "drawer": np.array(drawer, np.uint8),
        "official_evaluation": np.array(evaluation, np.uint8),
        "split": drawing_split(np.array(char)),
        "alphabet_names": names,
    }


def drawing_split(char: Array) -> Array:
    """0, 1, 2 for train, valid, test: a quarter of every character's drawings to test, and 1345 of
    24345 of the rest to valid."""
    random = np.random.RandomState(0)
    split = np.zeros(len(char), np.uint8)
    for number in np.unique(char):
        rows = np.flatnonzero(char == number)
        split[rows[random.permutation(len(rows))[: len(rows) // 4]]] = 2
    rest = np.flatnonzero(split == 0)
    split[random.permutation(rest)[: round(len(rest) * 1345 / 24345)]] = 1
    return split


def _files(names: Mapping[str, str | None], *folders: str) -> tuple[Original, ...]:
    return tuple(
        Original(name, tuple(folder + name for folder in folders), known and f"md5:{known}")
        for name, known in names.items()
    )


DIGITS = {"x_train": (60000, 28, 28), "x_test": (10000, 28, 28)}
DIGITS |= {"y_train": (60000,), "y_test": (10000,)}  # type: ignore[dict-item]

NAMED = {
    "mnist": Public(
        _files(
            {
                "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
                "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
                "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
            },
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://raw.githubusercontent.com/fgnt/mnist/master/",
        ),
        megabytes=12,
        decode=_from_idx,
        shapes=DIGITS,
        counts={
            "y_train": (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
            "y_test": (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
        },
    ),
    "fashion_mnist": Public(
        _files(
            {
                "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
                "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
                "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
            },
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        megabytes=31,
        decode=_from_idx,
        shapes=DIGITS,
        counts={"y_train": (6000,) * 10, "y_test": (1000,) * 10},
        classes={
            "y": [
                "T-shirt/top",
                "Trouser",
                "Pullover",
                "Dress",
                "Coat",
                "Sandal",
                "Shirt",
                "Sneaker",
                "Bag",
                "Ankle boot",
            ]
        },
    ),
    "omniglot28": Public(
        _files(
            {
                "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
                "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
            },
            "https://github.com/brendenlake/omniglot/raw/master/python/",
            "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/",
        ),
        megabytes=16,
        decode=_from_drawings,
        shapes={"x": (32460, 28, 28), "split": (32460,)},
        counts={"split": (23000, 1345, 8115), "official_evaluation": (19280, 13180)},
    ),
    "mnist_static_binary": Public(
        _files(
            {f"binarized_mnist_{split}.amat": None for split in SPLITS},
            "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",
            "https://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",
        ),
        megabytes=110,
        decode=_from_text,
        shapes={"x_train": (50000, 98), "x_valid": (10000, 98), "x_test": (10000, 98)},
    ),
}
