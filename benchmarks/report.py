"""What every benchmark leaves in results/: JSON and a text table, with the machine named."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from pyro_vae.training.runs import versions

__all__ = ["machine", "write"]

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu} | versions()


def write(name: str, settings: dict[str, Any], records: Any, table: str) -> None:
    """``results/NAME.json`` and ``results/NAME.txt``; the table is printed too."""
    RESULTS.mkdir(exist_ok=True)
    about = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "settings": settings}
    report = json.dumps({**about, "records": records}, indent=2)
    (RESULTS / f"{name}.json").write_text(report + "\n")
    shown = ", ".join(f"{key} {value}" for key, value in {**about["machine"], **settings}.items())
    text = f"{table}\n\n{about['date']}; {shown}\n"
    (RESULTS / f"{name}.txt").write_text(text)
    print(text)
