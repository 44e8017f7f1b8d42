"""The ``guestio`` command."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
from contextlib import ExitStack
from typing import Literal, NoReturn

import click

import guestio
from guestio.budgets import EXIT_TIMEOUT
from guestio.cli.bench import Seconds, bench
from guestio.cli.stderr import FORMAT, StderrLog, open_standard_descriptors
from guestio.errors import GuestioError
from guestio.vhost_user import Backend
from guestio.virtio.blk import IO_THREADS, MAX_IO_THREADS, BlockDevice

BLK_HELP = """Serve IMAGE as a disk over vhost-user.

The socket is ready when one line on standard error says so. One front-end is served at a time;
when it goes away the next one may come. SIGINT, SIGTERM and SIGHUP end the service with status 0
and remove the socket.

A complete QEMU command line for a guest with a virtual IOMMU in front of the disk:

\b
  guestio blk disk.img --socket /tmp/blk.sock &
  qemu-system-x86_64 -machine q35,memory-backend=mem,kernel-irqchip=off -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -device virtio-iommu-pci \\
    -chardev socket,id=c0,path=/tmp/blk.sock \\
    -device vhost-user-blk-pci,chardev=c0,num-queues=1,\\
iommu_platform=on,disable-legacy=on,ats=on \\
    -kernel vmlinuz -initrd initrd -append "root=/dev/vda"

Guest memory must be shared (share=on). Without an IOMMU leave out the virtio-iommu-pci line and
everything after num-queues. With intel-iommu, boot with intel_iommu=on, put the disk below a port
("-device pcie-root-port,id=port0" and bus=port0), and use

\b
  -device intel-iommu,intremap=off,device-iotlb=on
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(guestio.__version__, prog_name="guestio")
def cli() -> None:
    """Virtual devices that sit safely behind a virtual IOMMU."""


@cli.command(help=BLK_HELP)
@click.argument("image", type=click.Path())
@click.option("--socket", "path", required=True, metavar="PATH", help="Where to listen.")
@click.option("--read-only", is_flag=True, help="Refuse writes; the image may be read-only.")
@click.option(
    "--num-queues",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Request queues offered.",
)
@click.option(
    "--iommu",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="Whether the device may sit behind an IOMMU.",
)
@click.option(
    "--indirect",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Whether to offer indirect descriptors; auto: unless there may be an IOMMU, where each "
    "request's table costs a translation. Without them the queue needs 128 entries.",
)
@click.option(
    "--poll-us",
    type=click.IntRange(0, 1_000_000),
    default=0,
    show_default=True,
    metavar="N",
    help="Microseconds to look out for the next request before sleeping.",
)
@click.option(
    "--io-threads",
    type=click.IntRange(0, MAX_IO_THREADS),
    default=IO_THREADS,
    show_default=True,
    metavar="N",
    help="Threads that wait for the disk: for reads of what is not in the page cache, flushes and "
    "discards. Others are served meanwhile. 0: everybody waits for each, which takes least CPU "
    "time. Cached reads, and writes, never need them.",
)
@click.option(
    "--queue-threads",
    is_flag=True,
    help="Serve each queue in a thread of its own. For large requests and several CPUs; small ones "
    "are served faster by one thread.",
)
@click.option("--serial", metavar="TEXT", help="Serial number, up to 20 ASCII characters.")
def blk(
    image: str,
    path: str,
    read_only: bool,
    num_queues: int,
    iommu: Literal["auto", "off"],
    indirect: Literal["auto", "on", "off"],
    poll_us: int,
    io_threads: int,
    queue_threads: bool,
    serial: str | None,
) -> None:
    """Serve an image; the help text is ``BLK_HELP``."""
    log = StderrLog()
    stop = _Signals()
    try:
        with ExitStack() as stack:
            device = BlockDevice(
                image,
                read_only=read_only,
                num_queues=num_queues,
                serial=serial,
                io_threads=io_threads,
            )
            stack.callback(device.close)
            backend = stack.enter_context(
                Backend(
                    device,
                    path,
                    iommu=iommu,
                    indirect=indirect,
                    poll_us=poll_us,
                    queue_threads=queue_threads,
                )
            )
            _run_until_signalled(backend, stop, log)
    except (GuestioError, ValueError) as error:
        _fail(str(error))
    except OSError as error:
        click.echo(f"guestio: the disk cannot be served: {error.strerror}", err=True)
        sys.exit(1)
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        click.echo(f"guestio: the disk cannot be served: {error} (ulimit -u, pids.max)", err=True)
        sys.exit(1)
    finally:
        drained = log.drain(EXIT_GRACE)
    if not drained:
        # The end of Python waits for what is written to standard error.
        os._exit(0)


@cli.command()
@click.option(
    "--seconds",
    type=Seconds(0.1, 3600),
    default=5.0,
    show_default=True,
    help="How long to write, read and compare.",
)
def demo(seconds: float) -> None:
    """Watch a disk behind an IOMMU work, and refuse what it must refuse.

    A back end runs in one process and a scripted guest in another; no VM is needed. Ends with
    status 0 only if every check held.
    """
    from guestio.cli.demo import run

    logging.basicConfig(level=logging.ERROR, format=FORMAT, stream=sys.stderr)
    sys.exit(run(seconds))


cli.add_command(bench)

EXIT_GRACE = 0.2
"""Seconds that the end of a command waits for its log to be read."""


def _fail(message: str) -> NoReturn:
    """End with one line and the status for a bad argument."""
    click.echo(f"guestio: {message}", err=True)
    sys.exit(2)


class _Signals:
    """Waits for SIGINT, SIGTERM or SIGHUP; one that arrives before is not lost.

    The kernel may choose any thread for a signal: a byte wakes the main thread, which must handle
    it. SIGHUP is left alone where it is ignored, as `nohup` does.
    """

    def __init__(self) -> None:
        self._over, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._wake)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)

    def over(self) -> None:
        """Make :meth:`wait` return. From any thread."""
        os.write(self._wake, b"e")

    def wait(self) -> None:
        """Wait for a signal or :meth:`over`."""
        select.select((self._over,), (), ())


def _run_until_signalled(backend: Backend, stop: _Signals, log: StderrLog) -> None:
    """Serve in a thread, so that a signal is obeyed whatever keeps that thread."""
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            backend.serve()
        except BaseException as error:
            errors.append(error)
        finally:
            stop.over()

    thread = threading.Thread(target=serve, name="guestio-serve", daemon=True)
    thread.start()
    log.say(f"listening on {backend.path}")
    stop.wait()
    backend.stop()
    thread.join(EXIT_TIMEOUT)
    if thread.is_alive():
        backend.remove_socket()
        log.say("guestio: ended although a request or a disk hangs")
        log.drain(EXIT_GRACE)
        os._exit(0)
    if errors:
        raise errors[0]


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
