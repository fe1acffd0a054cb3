"""The stages for a GPU: what is done stays done, what is not goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2
    assert "torch finds no CUDA device here" in capsys.readouterr().err


def test_a_training_is_finished_when_it_is_judged(tmp_path: Path):
    rows = tmp_path / "training" / "rows.json"
    rows.parent.mkdir()
    rows.write_text(json.dumps([{"epoch": 3, "epochs": 10}]))
    assert not gpu.finished("training", tmp_path, 0)
    rows.write_text(json.dumps([{"epoch": 10, "epochs": 10, "log_p": -84.9}]))
    assert gpu.finished("training", tmp_path, 0)
    assert not gpu.finished("training", tmp_path, 1)
    assert gpu.finished("speed", tmp_path, 0)


def test_a_stage_leaves_its_log_and_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = "import sys; print('one'); sys.exit(3)"
    monkeypatch.setitem(gpu.STAGES, "speed", lambda out, minutes: ["-c", script])
    record = gpu.run("speed", tmp_path, 1.0)
    assert (record["done"], record["code"]) == (False, 3)
    assert (tmp_path / "speed.log").read_text() == "one\n"


def test_a_stage_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = "import time\nwhile True: print('on', flush=True); time.sleep(0.05)"
    monkeypatch.setitem(gpu.STAGES, "tests", lambda out, minutes: ["-c", script])
    record = gpu.run("tests", tmp_path, 0.005)
    assert record["done"] is False
    assert record["code"] != 0
