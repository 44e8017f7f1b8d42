"""``guestio check``: what a vhost-user back-end does with everything that it may be sent."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from guestio.cli.seconds import Seconds
from guestio.errors import DeviceError

# What only this command needs is imported when it runs: the other commands start without it.
if TYPE_CHECKING:
    from guestio.faults import Check, Report, Result

HELP = """Run the conformance catalogue against the vhost-user back-end that listens on SOCKET.

No virtual machine is needed: this process is the front-end and the driver. Each check is one demand
of the virtio or the vhost-user specification, or one rule that a front-end or a driver breaks. Any
back-end will do:

\b
  guestio blk disk.img --socket /tmp/blk.sock &
  guestio check /tmp/blk.sock --device blk

\b
  qemu-storage-daemon --blockdev driver=file,node-name=disk,filename=disk.img \\
    --export type=vhost-user-blk,id=e,node-name=disk,\\
addr.type=unix,addr.path=/tmp/qsd.sock &
  guestio check /tmp/qsd.sock --device blk

\b
Verdicts:
  PASS    as the specification demands
  REJECT  refused cleanly what may be refused
  FAIL    a demand is not met
  WEDGED  no honest request is served afterwards, within --patience
  CRASH   the back-end is gone
  SKIP    does not apply, with the reason

A back-end that ends with its front-end, or crashes, is started again with --command. Without it,
checks after a crash are skipped. A DISK IS WRITTEN only with --writable; what was there is put
back, unless the disk fails at that.

A QEMU guest with a disk whose back-end is to be checked, for comparison:

\b
  qemu-system-x86_64 -machine q35,memory-backend=mem -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -chardev socket,id=c0,path=/tmp/blk.sock \\
    -device vhost-user-blk-pci,chardev=c0,num-queues=1 \\
    -kernel vmlinuz -initrd initrd -append "root=/dev/vda"

Exit status: 0 if nothing is FAIL, WEDGED or CRASH, 1 if something is or the back-end cannot be
reached, 2 for bad arguments, 130 after SIGINT, with the verdicts until then.
"""

_DEVICES: Final = ("blk", "net", "console", "rng", "input", "fs", "any")
_COLORS: Final = {
    "PASS": "green",
    "REJECT": "cyan",
    "SKIP": "bright_black",
    "FAIL": "red",
    "WEDGED": "red",
    "CRASH": "red",
}


@click.command("check", help=HELP)
@click.argument("socket", required=False, type=click.Path())
@click.option(
    "--device",
    type=click.Choice(_DEVICES),
    default="blk",
    show_default=True,
    help="Type of the device. 'any' applies the rules of messages and rings alone.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Run these checks: a name, an area such as 'ring', or a pattern. May be repeated.",
)
@click.option(
    "--severity",
    type=click.Choice(["safety", "must", "should"]),
    default="should",
    show_default=True,
    help="The weakest kind to run: recommendations too, demands, or only what a hostile "
    "front-end does.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
@click.option(
    "--queue",
    type=click.IntRange(0, 255),
    metavar="N",
    help="The queue that requests are made on, by default that of the device type.",
)
@click.option(
    "--writable", is_flag=True, help="Write to the disk too, and put back what was there."
)
@click.option(
    "--patience",
    type=Seconds(0.05, 600),
    default=1.0,
    show_default=True,
    help="Seconds that an answer, and the honest request after each check, may take.",
)
@click.option(
    "--command",
    metavar="WORDS",
    help="Starts the back-end, now and whenever it has ended.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON rather than a table.")
@click.option(
    "--junit", type=click.Path(dir_okay=False), metavar="FILE", help="Write JUnit XML there too."
)
@click.option(
    "--all", "show_all", is_flag=True, help="Show checks that passed or were skipped too."
)
@click.option("--list", "list_", is_flag=True, help="List the checks, and run none.")
def check(
    socket: str | None,
    device: str,
    only: tuple[str, ...],
    severity: str,
    seed: int,
    queue: int | None,
    writable: bool,
    patience: float,
    command: str | None,
    as_json: bool,
    junit: str | None,
    show_all: bool,
    list_: bool,
) -> None:
    """Check a back-end; the help text is ``HELP``."""
    from guestio import faults
    from guestio.faults.catalogue import select

    try:
        chosen = select(faults.catalogue(device), only)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if list_:
        _list(chosen, as_json=as_json)
        return
    if socket is None:
        raise click.UsageError("say on which SOCKET the back-end listens, or --list")
    shown: list[Result] = []

    def progress(result: Result) -> None:
        shown.append(result)
        if not as_json and (show_all or result.bad or result.verdict == "REJECT"):
            _show(result)

    try:
        report = faults.check(
            socket,
            device,
            only=only,
            severity=severity,
            seed=seed,
            queue=queue,
            writable=writable,
            patience=patience,
            command=command,
            progress=progress,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except DeviceError as error:
        click.echo(f"guestio: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        report = faults.Report(socket, device, seed, shown)
        _finish(report, as_json=as_json, junit=junit)
        sys.exit(130)
    _finish(report, as_json=as_json, junit=junit)
    sys.exit(0 if report.passed else 1)


def _finish(report: Report, *, as_json: bool, junit: str | None) -> None:
    if junit is not None:
        try:
            Path(junit).write_text(report.to_junit(), encoding="utf-8")
        except OSError as error:
            click.echo(f"guestio: cannot write {junit}: {error.strerror}", err=True)
            sys.exit(1)
    if as_json:
        click.echo(report.to_json())
    else:
        click.echo(report.summary)


def _show(result: Result) -> None:
    verdict = click.style(f"{result.verdict:<7}", fg=_COLORS[result.verdict])
    click.echo(f"{verdict} {result.id:<32} {result.reason}".rstrip())
    if result.bad:
        click.echo(f"        {result.text}\n        {result.source} ({result.severity})")


def _list(checks: list[Check], *, as_json: bool) -> None:
    if as_json:
        import json

        rows = [
            {
                "id": each.id,
                "source": each.source,
                "text": each.text,
                "severity": str(each.severity),
                "devices": sorted(each.devices),
            }
            for each in checks
        ]
        click.echo(json.dumps(rows, indent=1))
        return
    for each in checks:
        click.echo(f"{each.id:<32} {each.severity:<6} {each.source}\n    {each.text}")
    click.echo(f"{len(checks)} checks")
