"""What every benchmark leaves in results/: JSON and a text table, with the machine named."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from pyro_vae.files import replacing
from pyro_vae.training.runs import versions

__all__ = ["RESULTS", "folder_of", "keep", "kept", "machine", "write"]

ROWS = "rows.json"
RESULTS = Path(__file__).parent / "results"


def folder_of(out: Path, *key: Any) -> Path:
    """The folder of one row of a table that is made bit by bit."""
    return out / "".join(c if c.isalnum() else "_" for c in "_".join(map(str, key)))


def kept(out: Path) -> list[dict[str, Any]]:
    """The rows that earlier calls, or others meanwhile, have finished."""
    file = out / ROWS
    return json.loads(file.read_text()) if file.exists() else []


def keep(out: Path, records: list[dict[str, Any]]) -> None:
    """Write the rows so that ``kept`` finds them, all or nothing."""
    with replacing(out / ROWS) as temporary:
        temporary.write_text(json.dumps(records, indent=2))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu} | versions()


def write(
    name: str,
    settings: dict[str, Any],
    records: Any,
    table: str,
    folder: Path = RESULTS,
    show: bool = True,
) -> None:
    """``NAME.json`` and ``NAME.txt`` in the folder; the table is printed too, or not."""
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "settings": settings,
    }
    report = json.dumps({**about, "records": records}, indent=2)
    (folder / f"{name}.json").write_text(report + "\n")
    shown = ", ".join(f"{key} {value}" for key, value in {**about["machine"], **settings}.items())
    text = f"{table}\n\n{about['date']}; {shown}\n"
    (folder / f"{name}.txt").write_text(text)
    if show:
        print(text)
