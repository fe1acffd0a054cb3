"""What an install puts into site-packages: pyro_vae, whole, and nothing else."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("pyro_vae", "models", "guides")


def packages_on_disk() -> set[str]:
    """Dotted names of all folders with an ``__init__.py`` (rglob does not follow the links)."""
    folders = [
        init.parent.relative_to(ROOT).parts
        for source in SOURCES
        for init in (ROOT / source).rglob("__init__.py")
    ]
    return {
        ".".join(parts if parts[0] == "pyro_vae" else ("pyro_vae", *parts)) for parts in folders
    }


def modules_on_disk() -> set[str]:
    """Paths in a wheel of all modules."""
    return {
        str(PurePosixPath(*package.split("."), module.name))
        for package in packages_on_disk()
        for module in (ROOT / Path(*package.split("."))).glob("*.py")
    }


def test_pyproject_lists_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    assert len(packages) == len(set(packages))
    assert set(packages) == packages_on_disk()


def test_links_are_relative() -> None:
    for name in ("models", "guides"):
        link = ROOT / "pyro_vae" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..", name)


def build(tree: Path, kind: str) -> Path:
    """Build in ``tree`` with the setuptools of this environment, so that no network is needed."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}('out')"
    (tree / "out").mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (result,) = (tree / "out").glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return result


def copy_tree(target: Path, links: bool) -> Path:
    """The sources in a folder of their own, with or without the two links."""
    target.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, target)
    for source in (*SOURCES, "tests"):
        shutil.copytree(ROOT / source, target / source, symlinks=True, ignore=ignore)
    if not links:
        for name in ("models", "guides"):
            (target / "pyro_vae" / name).unlink()
    return target


def check_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    (info,) = top - {"pyro_vae"}
    assert info.startswith("pyro_vae-")
    assert info.endswith(".dist-info")
    assert {name for name in names if name.endswith(".py")} == modules_on_disk()
    assert "pyro_vae/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_wheel_holds_pyro_vae_only(tmp_path: Path, links: bool) -> None:
    check_wheel(build(copy_tree(tmp_path / "tree", links), "wheel"))


def test_wheel_from_sdist(tmp_path: Path) -> None:
    sdist = build(copy_tree(tmp_path / "tree", links=True), "sdist")
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    assert (tree / "tests" / Path(__file__).name).exists()
    check_wheel(build(tree, "wheel"))


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_editable_install_exposes_pyro_vae_only(tmp_path: Path, links: bool) -> None:
    tree = copy_tree(tmp_path / "tree", links)
    archive = zipfile.ZipFile(build(tree, "editable"))
    installed = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert all(name.startswith("__editable__") for name in installed), installed
    for name in installed:
        text = archive.read(name).decode()
        if name.endswith(".pth"):
            # A line that is a path would put the root, with models and guides, on sys.path.
            assert all(line.startswith("import __editable__") for line in text.splitlines())
        else:
            # Where the links are, they lie inside pyro_vae, and one entry says it all.
            rest = set() if links else {"pyro_vae.models", "pyro_vae.guides"}
            assert set(mapping(text)) == {"pyro_vae"} | rest


def mapping(finder: str) -> dict[str, str]:
    """The table MAPPING of the finder module that setuptools writes."""
    for node in ast.parse(finder).body:
        if isinstance(node, ast.AnnAssign | ast.Assign) and node.value is not None:
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and target.id == "MAPPING":
                table: dict[str, str] = ast.literal_eval(node.value)
                return table
    raise AssertionError("the finder has no MAPPING")
