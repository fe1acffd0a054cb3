"""Downloads from a local server: what is kept, and what every way of failing leaves and says."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import pytest

from pyro_vae.data.fetch import Original, Public, cache_folder, fetch, originals

CONTENT = bytes(range(200))


class Server(ThreadingHTTPServer):
    """Serves ``files``: path -> body, status, bytes that are promised beyond those that come."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, tuple[bytes, int, int]] = {}
        self.asked: list[str] = []
        self.place = f"http://127.0.0.1:{self.server_address[1]}/"

    def put(self, path: str, body: bytes, status: int = 200, missing: int = 0) -> None:
        self.files[path] = body, status, missing


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path[1:])
        body, status, missing = self.server.files.get(self.path[1:], (b"", 404, 0))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.put("one/a.bin", CONTENT)
        running.put("two/a.bin", CONTENT)
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYRO_VAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def public(server: Server) -> Public:
    """One original, of which any bytes will do, on two mirrors."""
    urls = (f"{server.place}one/a.bin", f"{server.place}two/a.bin")
    return Public(
        (Original("a.bin", urls, f"md5:{hashlib.md5(CONTENT).hexdigest()}"),),
        megabytes=1,
        decode=lambda files: {"x": np.frombuffer(files["a.bin"].read_bytes(), np.uint8)},
        shapes={"x": (200,)},
    )


def held(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def test_kept_and_not_asked_for_again(
    server: Server, cache: Path, public: Public, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch("some", public)
    assert path == cache / "some.npz"
    with np.load(path) as arrays:
        assert arrays["x"].tobytes() == CONTENT
    assert held(cache) == ["some.json", "some.npz"]
    assert capsys.readouterr().err == f"some: downloading 1 files, about 1 MB, to {cache}\n"
    assert originals(path) == [
        {
            "name": "a.bin",
            "url": f"{server.place}one/a.bin",
            "bytes": 200,
            "sha256": hashlib.sha256(CONTENT).hexdigest(),
        }
    ]
    assert fetch("some", public) == path
    assert server.asked == ["one/a.bin"]
    assert capsys.readouterr().err == ""


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYRO_VAE_CACHE", raising=False)
    assert cache_folder() == Path(pooch.os_cache("pyro_vae"))
    monkeypatch.setenv("PYRO_VAE_CACHE", "~/here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "here"


def test_the_next_mirror(server: Server, cache: Path, public: Public) -> None:
    server.put("one/a.bin", b"gone", 404)
    assert originals(fetch("some", public))[0]["url"] == f"{server.place}two/a.bin"
    assert server.asked == ["one/a.bin", "two/a.bin"]


def fails(public: Public, cache: Path, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as raised:
        fetch("some", public)
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)
    assert held(cache) == []


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (
            (b"other", 200, 0),
            ValueError,
            r"a.bin .*one/a.bin \(not the file it should be: its hash",
        ),
        ((CONTENT[:90], 200, 110), OSError, r"a.bin could not be downloaded: .*/a.bin \(cut off\)"),
        ((b"gone", 404, 0), OSError, r"/a.bin \(404 Not Found\)"),
        ((b"busy", 503, 0), OSError, r"/a.bin \(503 Service Unavailable\)"),
    ],
    ids=["checksum", "interrupted", "404", "503"],
)
def test_failed_downloads(
    server: Server,
    cache: Path,
    public: Public,
    answer: tuple[bytes, int, int],
    kind: type[Exception],
    message: str,
) -> None:
    for path in ("one/a.bin", "two/a.bin"):
        server.put(path, *answer)
    fails(public, cache, kind, f"^some: .*{message}.*; or put some.npz into a folder")
    server.put("two/a.bin", CONTENT)
    assert fetch("some", public).exists()


def test_no_network(cache: Path, public: Public) -> None:
    (original,) = public.originals
    away = replace(original, urls=("http://127.0.0.1:1/a.bin",))
    message = r"^some: a.bin could not be downloaded: http://127.0.0.1:1/a.bin \(no connection\)"
    fails(replace(public, originals=(away,)), cache, OSError, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": {"x": (10, 20)}}, r"some: x came as uint8 \[200\], wanted uint8 \[10, 20\]"),
        ({"counts": {"x": (200,)}}, r"some: x holds its values \[1, 1, .* times, wanted \[200\]"),
        ({"decode": lambda files: dict[str, Any]()["x"]}, "some: what came cannot be decoded: 'x'"),
    ],
    ids=["shape", "counts", "decode"],
)
def test_arrays_that_are_not_what_they_should_be(
    cache: Path, public: Public, change: dict[str, Any], message: str
) -> None:
    fails(replace(public, **change), cache, ValueError, message)


def test_a_file_that_changed_is_refused(server: Server, cache: Path, public: Public) -> None:
    path = fetch("some", public)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"some.npz: has changed since it was downloaded; delete"):
        fetch("some", public)
    path.unlink()
    assert fetch("some", public).exists()
    assert len(server.asked) == 2


def test_a_half_finished_pair_of_files_is_made_anew(cache: Path, public: Public) -> None:
    path = fetch("some", public)
    path.with_suffix(".json").unlink()
    path.write_bytes(b"half")
    with np.load(fetch("some", public)) as arrays:
        assert arrays["x"].tobytes() == CONTENT
    path.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"some.json: not readable; delete it to download again"):
        fetch("some", public)


def test_bytes_without_a_published_hash_are_remembered(
    server: Server, cache: Path, public: Public
) -> None:
    (original,) = public.originals
    unknown = replace(public, originals=(replace(original, known_hash=None),))
    fetch("some", unknown).unlink()
    for path in ("one/a.bin", "two/a.bin"):
        server.put(path, CONTENT[::-1])
    with pytest.raises(ValueError, match=r"\(not the file it should be: its hash differs\)"):
        fetch("some", unknown)
    (cache / "some.json").unlink()
    assert fetch("some", unknown).exists()


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "place",
    [(os, "replace"), (np, "savez_compressed"), (pooch.HTTPDownloader, "__call__")],
    ids=["replace", "write", "download"],
)
def test_disk_full(
    cache: Path, public: Public, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(*place, full)
        message = (
            r"cache: some cannot be kept here \(No space left on device\); name another .*CACHE"
        )
        fails(public, cache, OSError, message)
    assert not cache.exists()
    assert fetch("some", public).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(cache: Path, public: Public) -> None:
    cache.mkdir()
    cache.chmod(0o500)
    fails(public, cache, OSError, r"cannot be kept here \(Permission denied\)")


def test_the_cache_is_a_file(cache: Path, public: Public) -> None:
    cache.write_text("")
    with pytest.raises(OSError, match=r"cache: some cannot be kept here \(File exists\)"):
        fetch("some", public)
