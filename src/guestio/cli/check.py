"""``guestio check``: what a back-end, front-end, vfio-user server or virtio-iommu does, judged."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from guestio.cli.seconds import Seconds
from guestio.errors import DeviceError

# What only this command needs is imported when it runs: the other commands start without it.
if TYPE_CHECKING:
    from guestio.faults import Check, Demand, Report, Result

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

--front-end turns it round: the command listens on SOCKET as a back-end with a small device, and
judges the front-end that connects, and the driver of its guest, until it hangs up, --seconds are
over, or SIGINT. What did not happen is a SKIP, so let the guest do what is to be judged:

\b
  guestio check --front-end /tmp/judge.sock &
  qemu-system-x86_64 -machine q35,memory-backend=mem -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -chardev socket,id=c0,path=/tmp/judge.sock \\
    -device vhost-user-blk-pci,chardev=c0,num-queues=1 \\
    -kernel vmlinuz -initrd initrd -append "root=/dev/vda"

--vfio-user checks a vfio-user server of any PCI device in the same way as a back-end: negotiation,
regions, configuration space, interrupts, DMA mappings, resets, and clients that break the rules.
--device nvme and virtio add what such a device does:

\b
  guestio nvme disk.img --socket /tmp/nvme.sock &
  guestio check --vfio-user /tmp/nvme.sock --device nvme

--virtio-iommu checks a virtio-iommu: that of a vhost-user back-end on SOCKET, or with --qemu the
one that QEMU has, driven by qtest without a guest, with two of QEMU's edu devices as endpoints:

\b
  guestio check --virtio-iommu --qemu qemu-system-x86_64

Exit status: 0 if nothing is FAIL, WEDGED or CRASH, 1 if something is or the back-end cannot be
reached, 2 for bad arguments, 130 after SIGINT, with the verdicts until then; with --front-end
SIGINT is one of its ends.
"""

_DEVICES: Final = ("blk", "net", "console", "rng", "input", "fs", "any", "nvme", "virtio")
_BACK_END: Final = "a vhost-user back-end"
_FRONT_END: Final = "--front-end"
_VFIO_USER: Final = "--vfio-user"
_IOMMU: Final = "--virtio-iommu"
_OPTIONS: Final = {
    _BACK_END: {"device", "severity", "seed", "queue", "writable", "patience", "command"},
    _FRONT_END: {"device", "image", "queues", "iommu", "seconds", "patience"},
    _VFIO_USER: {"device", "severity", "seed", "patience", "command"},
    _IOMMU: {"severity", "seed", "patience", "qemu"},
}
"""Options that not every kind of check has."""
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
    "--front-end",
    is_flag=True,
    help="Listen on SOCKET as a back-end, and judge the front-end that connects.",
)
@click.option(
    "--vfio-user", is_flag=True, help="Check the vfio-user server that listens on SOCKET."
)
@click.option(
    "--virtio-iommu",
    is_flag=True,
    help="Check the virtio-iommu of a vhost-user back-end that listens on SOCKET, or of --qemu.",
)
@click.option(
    "--qemu",
    metavar="PROGRAM",
    help="With --virtio-iommu: check the device of this QEMU, 7.2 or newer, which is started.",
)
@click.option(
    "--device",
    type=click.Choice(_DEVICES),
    help="Type of the device. 'any' applies the rules of messages and rings alone. With "
    "--front-end: blk, net, console or rng. With --vfio-user: nvme, virtio, or 'any' for what all "
    "PCI devices have in common.  [default: blk, with --vfio-user any]",
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
    help="Seconds that an answer, and the honest request after each check, may take.  [default: 1, "
    "with --front-end 2]",
)
@click.option(
    "--command",
    metavar="WORDS",
    help="Starts the back-end, now and whenever it has ended.",
)
@click.option(
    "--image",
    type=click.Path(),
    metavar="FILE",
    help="With --front-end: what is on the disk, which is WRITTEN. By default 64 MiB of zeroes.",
)
@click.option(
    "--queues",
    type=click.IntRange(1, 64),
    metavar="N",
    help="With --front-end: request queues of the disk.  [default: 1]",
)
@click.option(
    "--iommu",
    is_flag=True,
    help="With --front-end: offer VIRTIO_F_ACCESS_PLATFORM, for a device behind an IOMMU.",
)
@click.option(
    "--seconds",
    type=Seconds(0, 86400 * 365),
    metavar="N",
    help="With --front-end: end after so long, if the front-end stays as long.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON rather than a table.")
@click.option(
    "--junit", type=click.Path(dir_okay=False), metavar="FILE", help="Write JUnit XML there too."
)
@click.option(
    "--all", "show_all", is_flag=True, help="Show checks that passed or were skipped too."
)
@click.option("--list", "list_", is_flag=True, help="List the checks, and run none.")
@click.pass_context
def check(
    context: click.Context,
    socket: str | None,
    front_end: bool,
    vfio_user: bool,
    virtio_iommu: bool,
    qemu: str | None,
    device: str | None,
    only: tuple[str, ...],
    severity: str,
    seed: int,
    queue: int | None,
    writable: bool,
    patience: float | None,
    command: str | None,
    image: str | None,
    queues: int | None,
    iommu: bool,
    seconds: float | None,
    as_json: bool,
    junit: str | None,
    show_all: bool,
    list_: bool,
) -> None:
    """Check a back-end or a front-end; the help text is ``HELP``."""
    from guestio import faults
    from guestio.faults.catalogue import select

    if front_end + vfio_user + virtio_iommu > 1:
        raise click.UsageError("say one of --front-end, --vfio-user and --virtio-iommu")
    kind = _FRONT_END if front_end else _VFIO_USER if vfio_user else _BACK_END
    kind = _IOMMU if virtio_iommu else kind
    _refuse_others(context, kind)
    if device is None:
        device = "any" if vfio_user else "blk"
    try:
        chosen: Sequence[Check | Demand] = select(_known(kind, device), only)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if list_:
        _list(chosen, as_json=as_json)
        return
    if qemu is not None and socket is not None:
        raise click.UsageError("say one of SOCKET and --qemu")
    if socket is None and qemu is None:
        who = {_FRONT_END: "to listen", _VFIO_USER: "the server listens"}
        raise click.UsageError(
            f"say on which SOCKET {who.get(kind, 'the back-end listens')}, or --list"
        )
    place = socket or ""
    if front_end:
        judged = _judge(
            place,
            device,
            only,
            image=image,
            queues=queues or 1,
            iommu=iommu,
            seconds=seconds,
            patience=2.0 if patience is None else patience,
        )
        for result in judged.results:
            if not as_json and (show_all or result.bad):
                _show(result)
        _finish(judged, as_json=as_json, junit=junit)
        sys.exit(0 if judged.passed else 1)
    shown: list[Result] = []

    def progress(result: Result) -> None:
        shown.append(result)
        if not as_json and (show_all or result.bad or result.verdict == "REJECT"):
            _show(result)

    options: dict[str, Any] = {
        "only": only,
        "severity": severity,
        "seed": seed,
        "patience": 1.0 if patience is None else patience,
        "progress": progress,
    }
    if not virtio_iommu:
        options["command"] = command
    try:
        if virtio_iommu:
            device = "iommu"
            report = faults.check_iommu(socket, qemu=qemu, **options)
        elif vfio_user:
            report = faults.check_server(place, device, **options)
        else:
            report = faults.check(place, device, queue=queue, writable=writable, **options)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except DeviceError as error:
        click.echo(f"guestio: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        report = faults.Report(place or str(qemu), device, seed, shown)
        _finish(report, as_json=as_json, junit=junit)
        sys.exit(130)
    _finish(report, as_json=as_json, junit=junit)
    sys.exit(0 if report.passed else 1)


def _refuse_others(context: click.Context, kind: str) -> None:
    """End the command for an option that was given and says nothing here."""
    for name in sorted(set().union(*_OPTIONS.values()) - _OPTIONS[kind]):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            where = kind if kind == _BACK_END else f"a check with {kind}"
            raise click.UsageError(f"--{name} is not for {where}")


def _known(kind: str, device: str) -> Sequence[Check | Demand]:
    """What there is to check, for a type of device.

    Raises:
        ValueError: There is no such type for that.
    """
    from guestio import faults

    if kind == _IOMMU:
        return faults.iommu_catalogue()
    types = {
        _BACK_END: tuple(faults.KINDS),
        _FRONT_END: faults.JUDGED_DEVICES,
        _VFIO_USER: faults.SERVED_DEVICES,
    }[kind]
    if device not in types:
        raise ValueError(f"there is no device type {device!r} here; say one of {', '.join(types)}")
    if kind == _FRONT_END:
        return faults.demands(device)
    return faults.server_catalogue(device) if kind == _VFIO_USER else faults.catalogue(device)


def _judge(socket: str, device: str, only: tuple[str, ...], **options: Any) -> Report:
    """Judge a front-end until it hangs up, the time is over, or SIGINT."""
    from guestio import faults

    seconds = options.pop("seconds")
    try:
        run = faults.JudgedRun(socket, device, only, **options)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except DeviceError as error:
        click.echo(f"guestio: {error}", err=True)
        sys.exit(1)
    with run:
        click.echo(run.ready_line, err=True)
        # An exception would be lost where it is raised amid what must not fail.
        signal.signal(signal.SIGINT, lambda *_: run.stop())
        run.serve(seconds)
        return run.report()


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


def _list(checks: Sequence[Check | Demand], *, as_json: bool) -> None:
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
