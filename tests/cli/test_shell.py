"""What a shell and a terminal get: completion, manual pages, colors, JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from docsite.man import escaped, page, pages
from guestio.cli import cli

PROGRAM = Path(sys.executable).with_name("guestio")
"""What an installation puts beside Python: completion goes by the program's name."""

CLI = Path(__file__).parents[2] / "src/guestio/cli"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_commands_options_and_choices_are_completed() -> None:
    for words, wanted in (
        ("guestio bl", "blk"),
        ("guestio bench --iom", "--iommu"),
        ("guestio bench --iommu st", "strict"),
    ):
        done = run(
            _GUESTIO_COMPLETE="bash_complete",
            COMP_WORDS=words,
            COMP_CWORD=str(len(words.split()) - 1),
        )
        assert f"plain,{wanted}" in done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_given_a_script(shell: str) -> None:
    done = run(_GUESTIO_COMPLETE=f"{shell}_source")
    assert done.returncode == 0
    assert "_GUESTIO_COMPLETE" in done.stdout


def test_each_command_has_a_manual_page() -> None:
    made = pages()
    assert set(made) == {"guestio.1", *(f"guestio-{name}.1" for name in cli.commands)}
    for name, command in cli.commands.items():
        text = made[f"guestio-{name}.1"]
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert escaped(parameter.opts[-1]) in text, (name, parameter.opts)
        # What begins with a dot is for troff.
        requests = {line.split()[0] for line in text.splitlines() if line.startswith(".")}
        assert requests <= {".TH", ".SH", ".PP", ".TP", ".B", ".BR", ".nf", ".fi"}, name


def test_text_is_no_request_of_troff() -> None:
    @click.command(help=".so /etc/passwd\n'x \\fB-n")
    def hostile() -> None:
        pass

    assert "\n\\&.so /etc/passwd\n\\&'x \\efB\\-n\n" in page("guestio x", hostile)


def test_no_colors_where_there_is_no_terminal() -> None:
    for environment in ({}, {"NO_COLOR": "1", "TERM": "xterm-256color"}):
        done = run("faults", **environment)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout + done.stderr


def test_no_color_holds_on_a_terminal() -> None:
    """Rich and click decide; that they are asked in the way which honors NO_COLOR is ours."""
    code = (
        "from rich.console import Console; import io;"
        "out = io.StringIO();"
        "Console(file=out, force_terminal=True).print('[red]x[/]');"
        "print(repr(out.getvalue()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "[31m" not in done.stdout
    for path in CLI.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"force_terminal|no_color=False|\\x1b\[3|\\033\[3", text), path.name


def test_each_command_that_prints_a_table_has_json() -> None:
    tables = {"bench", "check", "explain", "faults", "fuzz", "replay", "report", "top"}
    without = {
        name
        for name in tables
        if not any("--json" in parameter.opts for parameter in cli.commands[name].params)
    }
    assert not without
    found = json.loads(run("faults", "--json").stdout)
    assert {"error", "corrupt", "skip-interrupt"} <= {rule["name"] for rule in found["rules"]}
    assert "every" in found["selectors"]
