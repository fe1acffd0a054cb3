"""A process that is killed, and the one that goes on: the benchmark, with a few kills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, pathlib, sys
from benchmarks.interrupted import measure
print(json.dumps(measure(2, 1, pathlib.Path(sys.argv[1]))))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the benchmark forks")
def test_a_few_kills(tmp_path: Path):
    """Three, unless a run is over before its last. In a process of its own, since a fork wants a
    parent that has trained nothing."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout.splitlines()[-1])
    assert [record["equal"] for record in records] == [1, 1]
    assert sum(record["killed"] for record in records) >= 2
    assert sum(record["resumed"] + record["begun anew"] for record in records) == 3
