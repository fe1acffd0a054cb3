"""The documentation: its blocks run, its reference is whole, its links lead somewhere.

A page is one namespace and one folder. Python blocks run in order; one whose title is the name of a
file is written to it. Lines that call ``pyro-vae`` are parsed, and run where ``<!-- run -->`` stands
above their block. What follows a block under the title "prints" is what it prints, to the letter;
under "prints, about" numbers may differ.
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import typer

import pyro_vae
from pyro_vae import conditionals, evaluation, guides, models, nn, plots
from pyro_vae import sklearn as estimators
from pyro_vae.cli import app, main
from pyro_vae.data import mixed
from pyro_vae.evaluation import annealing, disentanglement, imputation, multimodal
from pyro_vae.objectives import penalties
from pyro_vae.objectives.specs import recipes

ROOT = Path(__file__).parents[1]
BESIDE = (annealing, disentanglement, imputation, multimodal, mixed, estimators)  # not in a face
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(<!-- run -->\n)?^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
PRINTS, ABOUT = 'text title="prints"', 'text title="prints, about"'


def blocks(page: Path) -> Iterator[tuple[bool, str, str]]:
    """Triples (to be run, what it is, what it holds) of the fenced blocks of a page."""
    for mark, info, body in FENCE.findall(page.read_text(encoding="utf-8")):
        yield bool(mark), info, body


def commands(body: str) -> list[list[str]]:
    """Arguments of the lines that call pyro-vae; a backslash continues a line."""
    lines = body.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("pyro-vae ")]


def about(text: str) -> str:
    """A printed text without what may differ from machine to machine."""
    text = re.sub(r"(not widened|widened x[\d.]+)(, )?", "", text)
    text = re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", text)
    return re.sub(r"[ \t]+", " ", re.sub(r"-{3,}", "---", text)).strip()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_blocks_run(page, tmp_path, monkeypatch, capsys):
    torch.set_default_dtype(torch.float32)  # as a reader has it; the fixture restores float64
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for run, info, body in blocks(page):
        capsys.readouterr()
        if file := re.fullmatch(r'python title="(.+)"', info):
            Path(file[1]).write_text(body)
        elif info == "python":
            exec(compile(body, str(page), "exec"), namespace)
        elif info == PRINTS:
            assert printed == body
        elif info == ABOUT:
            assert about(printed) == about(body)
        for arguments in commands(body):
            parse(arguments)
            assert not run or main(arguments) == 0
        if info not in (PRINTS, ABOUT):
            printed = capsys.readouterr().out


def subcommands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def parse(arguments: list[str]) -> None:
    """Read a command line as pyro-vae would, and stop there."""
    name, *rest = arguments
    subcommands()[name].make_context(name, rest)


def test_no_block_is_missed():
    """Blocks inside lists or without an end would not be found, and not be run."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(list(blocks(page))), page


def listed(page: str, names: Iterable[str]) -> list[str]:
    """The names that a page does not have."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [name for name in names if name not in text]


def classes(module: ModuleType) -> list[str]:
    return [name for name in module.__all__ if inspect.isclass(getattr(module, name))]


def test_tables_are_whole():
    of_rows = [n for n in classes(penalties) if n not in ("Latent", "Penalty")]
    assert listed("objectives.md", (f"{name}(" for name in recipes())) == []
    assert listed("objectives.md", (f"`{name}(" for name in of_rows)) == []
    assert listed("parts.md", (f"`{name}`" for name in classes(conditionals))) == []
    assert listed("parts.md", (f"`{name}`" for name in nn.__all__)) == []
    assert listed("cli.md", (f"\n### {name}\n" for name in subcommands())) == []
    assert listed("figures.md", (f"`{name}`" for name in plots.__all__)) == []


# ---------------------------------------------------------------------------------------------
# The site


class Page(HTMLParser):
    """Identifiers of a page, and what it links to and loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("script", "img", "iframe") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") == "stylesheet":
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    """The built pages; a warning fails the build."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Page(path) for path in folder.rglob("*.html")}


def public() -> Iterator[tuple[str, Any]]:
    """Names and objects of all that the library's ``__all__`` lists offer."""
    offered = [getattr(pyro_vae, name) for name in pyro_vae.__all__]
    parts = [part for part in offered if inspect.ismodule(part)]
    for module in [pyro_vae, *parts, evaluation, models, guides, *BESIDE]:
        yield from ((f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__)


def located(name: str) -> Any:
    """What a dotted name means; modules first, of which some have the name of a function beside them."""
    module, _, rest = name.rpartition(".")
    while module not in sys.modules:
        module, _, part = module.rpartition(".")
        rest = f"{part}.{rest}"
    return attrgetter(rest)(sys.modules[module])


@pytest.mark.slow
def test_reference_holds_every_public_name(site):
    pages = [page for path, page in site.items() if path.parent.name == "api"]
    names = {name for page in pages for name in page.ids if name.startswith("pyro_vae.")}
    known = {id(located(name)) for name in names}
    assert [name for name, found in public() if id(found) not in known] == []


def test_every_public_function_and_class_has_a_first_sentence():
    for name, found in public():
        if inspect.isclass(found) or inspect.isfunction(found) or inspect.ismodule(found):
            first = (inspect.getdoc(found) or "").split("\n\n")[0].strip()
            assert re.search(r"[.:]$", first), f"{name}: {first!r}"


@pytest.mark.slow
def test_links_lead_somewhere(site):
    for path, page in site.items():
        for link in page.links:
            target = urlsplit(link)
            if target.scheme or path.name == "404.html":
                continue
            there = (path.parent / unquote(target.path)).resolve() if target.path else path
            assert there in site, f"{path.name}: {link}"
            assert not target.fragment or unquote(target.fragment) in site[there].ids, link


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site):
    for path, page in site.items():
        assert [source for source in page.loaded if urlsplit(source).netloc] == [], path.name
