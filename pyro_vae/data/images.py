"""A folder of images: site ``x``, with subfolders as splits and as classes ``y``.

All ``.png``, ``.jpg``, ``.jpeg``, ``.bmp``, ``.webp``, ``.tif`` and ``.tiff`` files, sorted by name;
other files are left alone. Grey images are ``x`` [B, H, W]; if one of them has colour, all are
[B, 3, H, W]. Values are 0..255. Images have one size, or are resized to ``size`` by averaging over
areas (PIL's BOX).

Subfolders ``train``, ``valid``, ``test`` are splits; any others, in those or at the top, are classes:
``y`` numbers them in alphabetical order, ``record["classes"]["y"]`` has their names.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.source import SPLITS, Array, Source, select

__all__ = ["read_images"]

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
MODES = {"1": "L", "L": "L", "LA": "L"} | dict.fromkeys(
    ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"), "RGB"
)


def read_images(
    path: Path, sites: Collection[str] | None = None, size: tuple[int, int] | None = None
) -> Source:
    """The images of a folder.

    Raises:
        ValueError: no images, one that is unreadable, of another size than the first, of more than
            8 bits, transparent or with several frames; loose images beside subfolders.
    """
    if size is not None and not _is_size(size):
        raise ValueError(f"size= came {size!r}, wanted two whole numbers above 0, (H, W)")
    folders = _splits(path)
    classes = sorted({inside.name for folder in folders.values() for inside in _subfolders(folder)})
    files = {split: _files(folder) for split, folder in folders.items()}
    everything = [file for inside in files.values() for file in inside]
    mode = "RGB" if any(_mode(file) == "RGB" for file in everything) else "L"
    digest = hashlib.sha256()
    wanted, first = None, ""
    parts: dict[str, dict[str, Array]] = {}
    for split, inside in files.items():
        rows: list[Array] = []
        for file in inside:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(path).as_posix()} {len(content)} ".encode() + content)
            pixels = _pixels(file, content, mode, size)
            wanted, first = (pixels.shape[:2], file.name) if wanted is None else (wanted, first)
            if pixels.shape[:2] != wanted:
                raise ValueError(
                    f"{file}: came {_by(pixels.shape)}, wanted {_by(wanted)} as {first} has; resize "
                    "all by size=(H, W)"
                )
            rows.append(pixels if mode == "L" else pixels.transpose(2, 0, 1))
        parts[split] = {"x": np.stack(rows)}
        if classes:
            parts[split]["y"] = np.array([classes.index(file.parent.name) for file in inside])
    record: dict[str, Any] = {"source": str(path), "sha256": digest.hexdigest()}
    if classes:
        record["classes"] = {"y": classes}
    if size is not None:
        text = f"x: resized to {_by(size)} by averaging over areas"
        record["steps"] = [{"site": "x", "step": "resize", "size": list(size), "text": text}]
    return Source(str(path), select(str(path), parts, sites), record)


# --- folders ------------------------------------------------------------------------------------


def _splits(path: Path) -> dict[str, Path]:
    """Split -> folder."""
    inside = {folder.name: folder for folder in _subfolders(path)}
    splits = {split: inside.pop(split) for split in SPLITS if split in inside}
    if splits and (inside or _images(path)):
        loose = sorted(inside) or [_images(path)[0].name]
        raise ValueError(
            f"{path}: {loose} lie beside the splits {list(splits)}; wanted folders named "
            f"{', '.join(SPLITS)} alone, or none of them"
        )
    return splits or {"all": path}


def _subfolders(path: Path) -> list[Path]:
    return sorted(
        folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")
    )


def _images(path: Path) -> list[Path]:
    return sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in ENDINGS and not file.name.startswith(".")
    )


def _files(folder: Path) -> list[Path]:
    """The images of a split, class by class."""
    loose, classes = _images(folder), _subfolders(folder)
    if loose and classes:
        raise ValueError(
            f"{folder}: {loose[0].name} lies beside the classes {[c.name for c in classes]}; wanted "
            "every image in a class, or no folders"
        )
    for inside in classes:
        if deeper := _subfolders(inside):
            raise ValueError(f"{deeper[0]}: a folder in a class, wanted images alone")
    files = loose or [file for inside in classes for file in _images(inside)]
    if not files:
        raise ValueError(f"{folder}: no images ({', '.join(ENDINGS)}) in the folder")
    return files


# --- files --------------------------------------------------------------------------------------


@contextmanager
def _opened(file: Path, content: Any) -> Iterator[Any]:
    """A PIL image; whatever is wrong with the file is one kind of error."""
    from PIL import Image

    try:
        with Image.open(content) as image:
            yield image
    except (OSError, SyntaxError, EOFError, KeyError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: not a readable image ({error})") from None


def _mode(file: Path) -> str:
    """``L`` or ``RGB``, by the header."""
    with _opened(file, file) as image:
        mode = image.mode
    if mode not in MODES:
        raise ValueError(f"{file}: came an image of mode {mode}, wanted 8 bits, grey or colour")
    return MODES[mode]


def _pixels(file: Path, content: bytes, mode: str, size: tuple[int, int] | None) -> Array:
    """``[H, W]`` or ``[H, W, 3]``, the way up that it is shown."""
    from PIL import Image, ImageOps

    with _opened(file, io.BytesIO(content)) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"{file}: came {image.n_frames} frames, wanted one")
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            opacity = np.asarray(upright.convert("RGBA"))[..., 3]
            if opacity.min() < 255:
                raise ValueError(f"{file}: came transparent pixels, wanted none; fill them first")
        plain = upright.convert(mode)
        if size is not None and plain.size != (size[1], size[0]):
            plain = plain.resize((size[1], size[0]), Image.Resampling.BOX)
        return np.asarray(plain)


def _is_size(size: Any) -> bool:
    pair = isinstance(size, tuple | list) and len(size) == 2
    return pair and all(isinstance(side, int) and side > 0 for side in size)


def _by(shape: Any) -> str:
    return f"{shape[0]} x {shape[1]} (H x W)"
