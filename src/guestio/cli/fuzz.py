"""``guestio fuzz``: a running peer is sent what nothing honest sends, and judged."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from guestio.cli.seconds import Seconds
from guestio.errors import DeviceError

# What only this command needs is imported when it runs: the other commands start without it.
if TYPE_CHECKING:
    from concurrent.futures import Executor

    from guestio.faults.fuzz import Campaign, Finding
    from guestio.faults.fuzz.bench import Job

HELP = """Send the vhost-user back-end at SOCKET what no honest front-end sends, and judge it.

No virtual machine is needed: this process is the front-end and the driver. A case is made of a
seed: valid beginnings, then messages, memory tables, IOMMU translations, rings and requests with
something wrong about them, resets, disconnects, honest requests between, and checks of the
catalogue of `guestio check`. After each case an honest request must be served within --patience. A
DISK IS WRITTEN: give the back-end one that may be lost.

\b
  truncate -s 4M disk.img
  guestio fuzz /tmp/blk.sock --device blk --seconds 60 \\
    --command 'guestio blk disk.img --socket {socket}'

\b
  guestio fuzz /tmp/qsd.sock --device blk --cases 1000 --command "qemu-storage-daemon \\
    --blockdev driver=file,node-name=disk,filename=disk.img \\
    --export type=vhost-user-blk,id=e,node-name=disk,writable=on,\\
addr.type=unix,addr.path={socket}"

\b
Verdicts:
  ok      it did as it must, and serves on
  WRONG   an honest request or message was answered wrongly, or memory was written that no
          request gave
  LATE    an honest one was not answered within --patience, and the next front-end is served
  WEDGED  no honest request is served afterwards
  CRASH   the process is gone, or nothing listens any more

What fails is played again to a back-end that --command starts anew, made smaller until no step can
be left out, and written to a file in --out, which plays it again:

\b
  guestio fuzz /tmp/blk.sock --reproduce guestio-fuzz/crash-killed-by-sigsegv-17.json \\
    --command 'guestio blk disk.img --socket {socket}'

The same seed makes the same steps in every run of this version. --jobs plays them in several
processes and --scheduler on the workers of a Dask cluster (extra 'cluster'), each with a back-end
of its own: {socket} and {directory} in --command are its own places. What is found is the same.
--resume goes on with the campaign in --out.

--front-end turns it round: guestio serves a device that lies by a few rules of `guestio faults`,
made of each seed; --command starts a front-end and its guest, and what the guest prints is judged.
One that has printed --healthy is ok, as is one without it that ends with status 0. A line that
matches --bad, a signal and another status are a CRASH, and WEDGED is what neither comes through
within --limit nor goes on to print what matches --alive:

\b
  guestio fuzz --front-end --device blk --healthy '^done' \
    --command "qemu-system-x86_64 -machine q35,memory-backend=mem -m 1G -nographic \
    -object memory-backend-memfd,id=mem,size=1G,share=on -no-reboot \
    -chardev socket,id=c0,path={socket} \
    -device vhost-user-blk-pci,chardev=c0,num-queues=1 \
    -kernel vmlinuz -initrd initrd -append 'console=ttyS0 panic=-1'"

A QEMU guest with a disk whose back-end is fuzzed, for comparison:

\b
  qemu-system-x86_64 -machine q35,memory-backend=mem -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -chardev socket,id=c0,path=/tmp/blk.sock \\
    -device vhost-user-blk-pci,chardev=c0,num-queues=1 \\
    -kernel vmlinuz -initrd initrd -append "root=/dev/vda"

Exit status: 0 if nothing was found, 1 if something was, or the back-end cannot be reached, 2 for
bad arguments, 130 after SIGINT, with what was found until then.
"""

_DEVICES: Final = ("blk", "net", "console", "rng", "input", "fs", "any")
_SECONDS: Final = 60.0
_LINE_EVERY: Final = 10.0


@click.command("fuzz", help=HELP)
@click.argument("socket", required=False, type=click.Path())
@click.option(
    "--device",
    type=click.Choice(_DEVICES),
    default="blk",
    show_default=True,
    help="Type of the device. 'any' has requests of 64 bytes each way.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the first case."
)
@click.option("--cases", type=click.IntRange(1), metavar="N", help="Play so many, from --seed on.")
@click.option(
    "--seconds",
    type=Seconds(0.1, 86400 * 365),
    metavar="T",
    help="Play for so long.  [default: 60, without --cases]",
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Processes that play, each with a back-end of its own.",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Have the workers of this Dask scheduler play, such as tcp://10.0.0.1:8786.",
)
@click.option(
    "--command",
    metavar="WORDS",
    help="Starts the back-end, now and whenever it has ended.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="guestio-fuzz",
    show_default=True,
    help="Where findings and the state of the campaign are written.",
)
@click.option("--resume", is_flag=True, help="Go on with the campaign in --out.")
@click.option(
    "--patience",
    type=Seconds(0.05, 600),
    help="Seconds that an honest answer may take.  [default: 1, with --front-end 30]",
)
@click.option(
    "--front-end",
    is_flag=True,
    help="Lie to the front-end that --command starts, and to its guest.",
)
@click.option(
    "--healthy",
    default="",
    metavar="REGEX",
    help="With --front-end: what a guest prints that has come through.",
)
@click.option(
    "--alive",
    default="",
    metavar="REGEX",
    help="With --front-end: what a living guest prints again and again, at least every --patience "
    "seconds once it has begun.",
)
@click.option(
    "--bad",
    metavar="REGEX",
    help="With --front-end: what is a crash.  [default: panics, oopses, sanitizers and the like]",
)
@click.option(
    "--limit",
    type=Seconds(0.1, 86400),
    default=120.0,
    show_default=True,
    metavar="T",
    help="With --front-end: seconds that a guest may take.",
)
@click.option(
    "--serve",
    metavar="WORDS",
    help="With --front-end: how guestio serves the device, such as 'blk disk.img --iommu off'.",
)
@click.option(
    "--reproduce",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Play the case of a finding, and nothing else.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON rather than text.")
@click.pass_context
def fuzz(
    context: click.Context,
    socket: str | None,
    device: str,
    seed: int,
    cases: int | None,
    seconds: float | None,
    jobs: int,
    scheduler: str | None,
    command: str | None,
    out: Path,
    resume: bool,
    patience: float | None,
    front_end: bool,
    healthy: str,
    alive: str,
    bad: str | None,
    limit: float,
    serve: str | None,
    reproduce: Path | None,
    as_json: bool,
) -> None:
    """Fuzz a back-end or a front-end; the help text is ``HELP``."""
    from guestio.faults import fuzz as fuzzing

    _refuse_others(context, front_end=front_end)
    try:
        words = None if command is None else fuzzing.parse_command(command)
        served = None if serve is None else fuzzing.parse_command(serve)
    except ValueError as error:
        raise click.UsageError(f"no command line: {error}") from None
    several = jobs > 1 or scheduler is not None
    if jobs > 1 and scheduler is not None:
        raise click.UsageError("say one of --jobs and --scheduler")
    own = words is not None and any("{socket}" in word for word in words)
    if several and not own:
        raise click.UsageError(
            "each worker needs a peer of its own: say --command with {socket} in it"
        )
    if socket is None and not own:
        raise click.UsageError(
            "say the SOCKET, or --command with {socket} in it, which is a place of its own then"
        )
    work: Job
    if front_end:
        if words is None:
            raise click.UsageError("--front-end needs the --command that starts the front-end")
        if device not in fuzzing.SERVED:
            raise click.UsageError(f"--front-end: --device {device} is not served by guestio")
        work = fuzzing.Guests(
            device,
            words,
            served or fuzzing.SERVED[device],
            healthy,
            alive,
            fuzzing.BAD if bad is None else bad,
            30.0 if patience is None else patience,
            limit,
            None if several else socket,
        )
        for name, pattern in (("healthy", healthy), ("alive", alive), ("bad", work.bad)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise click.UsageError(f"--{name}: {error}") from None
    else:
        patience = 1.0 if patience is None else patience
        work = fuzzing.Work(device, None if several else socket, words, patience)
    try:
        if reproduce is not None:
            finding = fuzzing.Finding.from_data(fuzzing.read_json(reproduce))
            _reproduce(work, finding, as_json=as_json)
        campaign = fuzzing.Campaign(work, seed, out, resume=resume)
    except fuzzing.CaseError as error:
        raise click.UsageError(str(error)) from None
    if cases is None and seconds is None:
        seconds = _SECONDS
    _run(campaign, jobs, scheduler, cases, seconds, as_json=as_json)


def _refuse_others(context: click.Context, *, front_end: bool) -> None:
    """End the command for an option that was given and says nothing here."""
    if front_end:
        return
    for name in ("healthy", "alive", "bad", "limit", "serve"):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} is only for --front-end")


def _reproduce(work: Job, finding: Finding, *, as_json: bool) -> None:
    """Play one case, say what became of it, and end."""
    from guestio.faults.fuzz import reproduce

    try:
        outcome = reproduce(work, finding)
    except DeviceError as error:
        click.echo(f"guestio: {error}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(outcome.to_data(), indent=1))
    else:
        click.echo(f"{_styled(str(outcome.verdict))} {outcome.reason}".rstrip())
        for line in outcome.stderr:
            click.echo(f"  {line}")
    sys.exit(1 if outcome.bad else 0)


def _run(
    campaign: Campaign,
    jobs: int,
    scheduler: str | None,
    cases: int | None,
    seconds: float | None,
    *,
    as_json: bool,
) -> None:
    from guestio.faults import fuzz as fuzzing

    progress = _Progress(as_json=as_json)
    owned: list[Executor] = []

    def local() -> Executor:
        owned.append(fuzzing.local_workers(jobs))
        return owned[-1]

    status = 0
    try:
        if scheduler is not None:
            workers, jobs = fuzzing.cluster_workers(scheduler)
            owned.append(workers)
        else:
            workers = local()
        campaign.run(
            workers,
            jobs,
            cases=cases,
            seconds=seconds,
            progress=progress.show,
            renew=None if scheduler is not None else local,
        )
    except DeviceError as error:
        progress.clear()
        click.echo(f"guestio: {error}", err=True)
        status = 1
    except KeyboardInterrupt:
        status = 130
    finally:
        for each in owned:
            # What was not begun is canceled already; Dask's knows no argument for that.
            each.shutdown(wait=status == 0)
    progress.clear()
    if as_json:
        click.echo(json.dumps(campaign.to_data(), indent=1))
    else:
        for finding in campaign.findings:
            _show(finding, campaign.out)
        click.echo(campaign.summary)
    sys.exit(status or (1 if campaign.found else 0))


def _show(finding: Finding, out: Path | None) -> None:
    outcome = finding.outcome
    click.echo(f"{_styled(str(outcome.verdict))} {outcome.reason}")
    alone = "" if outcome.repeats else "; not again from this case alone"
    click.echo(f"        seed {outcome.seed}, {len(finding.seeds)} in all{alone}")
    for step in finding.case.steps[:12]:
        text = str(step)
        click.echo(f"          {text if len(text) <= 100 else text[:97] + '...'}")
    for line in outcome.stderr[-3:]:
        click.echo(f"        | {line}")
    if out is not None:
        click.echo(f"        guestio fuzz --reproduce {out / finding.file_name}")


def _styled(verdict: str) -> str:
    return click.style(f"{verdict:<7}", fg="green" if verdict == "ok" else "red")


class _Progress:
    """A line on standard error: all the time on a terminal, else now and then."""

    def __init__(self, *, as_json: bool) -> None:
        self._terminal = sys.stderr.isatty()
        self._quiet = as_json
        self._started = self._last = time.monotonic()
        self._played: int | None = None

    def show(self, campaign: Any) -> None:
        """Tell how far the campaign is."""
        now = time.monotonic()
        if self._played is None:
            self._played = campaign.played
        if self._quiet or now < self._last + (0.2 if self._terminal else _LINE_EVERY):
            return
        self._last = now
        rate = (campaign.played - self._played) / max(now - self._started, 0.001)
        text = f"{now - self._started:.0f} s, {rate:.1f} cases/s, {campaign.summary}"
        if self._terminal:
            click.echo(f"\r\033[K{text[:150]}", nl=False, err=True)
        else:
            click.echo(text, err=True)

    def clear(self) -> None:
        """Take the line back."""
        if self._terminal and not self._quiet:
            click.echo("\r\033[K", nl=False, err=True)
