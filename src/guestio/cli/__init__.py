"""The ``guestio`` command: one file for each of its commands."""

from __future__ import annotations

import logging
import sys

import click

from guestio.cli.bench import bench
from guestio.cli.blk import blk
from guestio.cli.check import check
from guestio.cli.console import console
from guestio.cli.convert import convert
from guestio.cli.explain import explain
from guestio.cli.extcap import extcap
from guestio.cli.faults import faults
from guestio.cli.fuzz import fuzz
from guestio.cli.input import input_
from guestio.cli.inspect import inspect
from guestio.cli.net import net
from guestio.cli.nvme import nvme
from guestio.cli.proxy import proxy
from guestio.cli.record import record
from guestio.cli.replay import replay
from guestio.cli.report import report
from guestio.cli.rng import rng
from guestio.cli.seconds import Seconds
from guestio.cli.serve import serve
from guestio.cli.stderr import FORMAT, open_standard_descriptors
from guestio.cli.top import top
from guestio.cli.version import show


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show,
    help="Show the version, the build, Python, the platform and the extras, and exit.",
)
def cli() -> None:
    """Virtual devices that sit safely behind a virtual IOMMU."""


@cli.command()
@click.option(
    "--seconds",
    type=Seconds(0.1, 3600),
    default=20.0,
    show_default=True,
    help="About how long.",
)
@click.option(
    "--open", "open_", is_flag=True, help="Open the inspector in the browser; stay until Ctrl-C."
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="RULE",
    help="Have the disk misbehave, as --fault of `guestio blk`: see a check fail.",
)
def demo(seconds: float, open_: bool, faults: tuple[str, ...]) -> None:
    """Watch a disk behind an IOMMU work, and refuse what it must refuse.

    A back-end runs in one process and a guest's driver in another; no VM is needed. Ends with
    status 0 only if every check held.
    """
    from guestio.cli.demo import run
    from guestio.faults import parse

    logging.basicConfig(level=logging.ERROR, format=FORMAT, stream=sys.stderr)
    try:
        for rule in faults:
            parse(rule)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    sys.exit(run(seconds, open_=open_, faults=faults))


for _command in (
    bench,
    blk,
    check,
    console,
    convert,
    explain,
    extcap,
    faults,
    fuzz,
    input_,
    inspect,
    net,
    nvme,
    proxy,
    record,
    replay,
    report,
    rng,
    serve,
    top,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command; bad usage ends with one line and status 2."""
    open_standard_descriptors()
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see '{context.command_path} --help')" if context is not None else ""
        click.echo(f"guestio: {error.format_message()}{hint}", err=True)
        sys.exit(2)
    except click.Abort:
        sys.exit(1)
