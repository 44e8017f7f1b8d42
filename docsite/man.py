"""Manual pages from the command line's own help: ``python -m docsite.man [DIRECTORY]``."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Final

import click

import guestio
from guestio.cli import cli

DIRECTORY: Final = Path(__file__).resolve().parent.parent / "build/man"


def escaped(text: str) -> str:
    """Text that troff prints as it is."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(f"\\&{line}" if line[:1] in (".", "'") else line for line in text.split("\n"))


def page(name: str, command: click.Command) -> str:
    """The manual page of a command.

    Args:
        name: What is typed: ``guestio blk``.
        command: What it runs.
    """
    context = click.Context(command, info_name=name)
    summary = command.get_short_help_str(200).rstrip(".")
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [
        f'.TH {escaped(name.replace(" ", "-").upper())} 1 "" "guestio {guestio.__version__}"',
        ".SH NAME",
        f"{escaped(name.replace(' ', '-'))} \\- {escaped(summary)}",
        ".SH SYNOPSIS",
        f".B {escaped(name)}",
        escaped(usage),
        ".SH DESCRIPTION",
    ]
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        # \b is how click is told to leave a paragraph as it is.
        kept, text = paragraph.startswith("\b"), paragraph.removeprefix("\b").strip("\n")
        lines += [".PP", *([".nf"] if kept else []), escaped(text), *([".fi"] if kept else [])]
    lines.append(".SH OPTIONS")
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            lines += [".TP", f".B {escaped(record[0])}", escaped(record[1])]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for child in command.list_commands(context):
            below = command.commands[child]
            lines += [".TP", f".BR {escaped(f'guestio-{child}')} (1)"]
            lines.append(escaped(below.get_short_help_str(200)))
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """All manual pages, by the names of their files."""
    made = {"guestio.1": page("guestio", cli)}
    for child, command in cli.commands.items():
        made[f"guestio-{child}.1"] = page(f"guestio {child}", command)
    return made


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    for file, text in pages().items():
        (directory / file).write_text(text)
    print(directory)
