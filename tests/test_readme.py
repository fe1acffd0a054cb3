"""The README's Python blocks run, in order, as they are printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_python_blocks_run(capsys):
    torch.set_default_dtype(torch.float32)  # as a reader has it; the fixture restores float64
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert "log p(x) >=" in capsys.readouterr().out
