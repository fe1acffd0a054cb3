"""Files are whole or not there, and errors name them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyro_vae.files import replacing


def test_a_file_is_whole_or_not_there(tmp_path: Path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        assert temporary.suffix == path.suffix == ".txt"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_full_disk_leaves_what_was_there_and_names_the_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("before")

    def write() -> None:
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as error:
        write()
    assert error.value.filename == str(file)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "before")]


def test_folder_that_is_not_there(tmp_path):
    file = tmp_path / "none" / "a.txt"
    with pytest.raises(FileNotFoundError) as error, replacing(Path(file)) as temporary:
        temporary.write_text("x")
    assert error.value.filename == str(file)
