"""Tables of the command line's options, made from the application itself.

A line ``<!-- options: fit -->`` in a page becomes the options of ``pyro-vae fit``.
"""

from __future__ import annotations

import re
from typing import Any

import typer

from pyro_vae.cli import app

MARK = re.compile(r"^<!-- options: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What mkdocs calls with every page."""
    return MARK.sub(lambda mark: options(mark[1]), markdown)


def options(name: str) -> str:
    """Arguments and options of a command, as a table."""
    group: Any = typer.main.get_command(app)
    command = group.commands[name]
    context = typer.Context(command)
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    lines = ["| option | meaning |", "| --- | --- |"]
    for spelled, meaning in filter(None, records):
        spelled = re.sub(r"<list\[(\w+)\]>", r"<\1>", spelled).replace(" range>", ">")
        lines.append(f"| `{spelled}` | {meaning} |".replace("\n", " "))
    return "\n".join(lines)
