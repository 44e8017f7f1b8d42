"""What ``guestio --version`` prints: what a report of a defect must name."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata

import click

import guestio
from guestio._core.base import variant

# "h11>=0.14; extra == 'control'", with either kind of quotes.
_EXTRA = re.compile(r"^([\w.-]+).*;.*\bextra == [\"']([\w-]+)[\"']")


def extras() -> dict[str, list[str]]:
    """Each extra of the installed package, with those of its distributions that are missing.

    The extra of developers is left out. Empty if guestio is imported without being installed.
    """
    found: dict[str, list[str]] = {}
    try:
        requires = metadata.requires("guestio") or []
    except metadata.PackageNotFoundError:
        return found
    for match in filter(None, map(_EXTRA.match, requires)):
        name, extra = match.groups()
        if extra == "dev":
            continue
        missing = found.setdefault(extra, [])
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    return found


def describe() -> str:
    """The version, the build of the compiled core, Python, the platform and the extras."""
    checks = "assertions on" if variant.CHECKS else "assertions off"
    libc = "-".join(filter(None, platform.libc_ver())) or "unknown C library"
    host = f"{platform.system()} {platform.release()} {platform.machine()}"
    lines = [
        f"guestio, version {guestio.__version__}",
        f"core: {variant.NAME}, {variant.COMPILER}, {checks}",
        f"Python: {platform.python_implementation()} {platform.python_version()}",
        f"platform: {host}, {libc}, pages of {os.sysconf('SC_PAGESIZE')} bytes",
    ]
    for extra, missing in sorted(extras().items()):
        lines.append(f"extra {extra}: {'lacks ' + ', '.join(missing) if missing else 'there'}")
    return "\n".join(lines)


def show(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    """Print the description and end, as the callback of an option."""
    if wanted and not context.resilient_parsing:
        click.echo(describe())
        context.exit()
