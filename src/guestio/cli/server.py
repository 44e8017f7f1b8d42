"""What all commands that serve a device have in common: options, signals, log and exit status."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

import click

from guestio import vfio_user
from guestio.budgets import DMA_REVOKE_AFTER, LONGEST_TIMEOUT, STOP_TIMEOUT
from guestio.cli.seconds import Seconds
from guestio.cli.stderr import StderrLog
from guestio.errors import DeviceMethodError, GuestioError
from guestio.peer.endpoint import activation_sockets, adopt_socket, remove_sockets
from guestio.ratelog import LOG
from guestio.vhost_user import Backend
from guestio.vhost_user.serve import Signals, run_until_signaled

EXIT_GRACE = 0.2
"""Seconds that the end of a command waits for its log to be read."""

Command = TypeVar("Command", bound=Callable[..., None])

_log = logging.getLogger("guestio.cli.server")


class Closable(Protocol):
    """A device that is closed at the end."""

    def close(self) -> None:
        """Give everything back."""
        ...


_PLACE_OPTIONS = (
    click.option(
        "--socket",
        metavar="PATH",
        help="Where to listen. Without it, --connect and --fd, the socket that systemd hands over "
        "(LISTEN_FDS) is used.",
    ),
    click.option(
        "--connect",
        metavar="PATH",
        help="Connect to a front-end or client that listens there, again whenever it is gone.",
    ),
    click.option(
        "--fd",
        type=click.IntRange(3),
        metavar="N",
        help="Use a socket that the caller has opened: a listening one, or one that the other side "
        "is connected to, with which the service ends.",
    ),
)
_OPTIONS = (
    click.option(
        "--iommu",
        type=click.Choice(["auto", "off"]),
        default="auto",
        show_default=True,
        help="Whether the device may sit behind an IOMMU.",
    ),
    click.option(
        "--indirect",
        type=click.Choice(["auto", "on", "off"]),
        default="auto",
        show_default=True,
        help="Whether to offer indirect descriptors; auto: unless there may be an IOMMU, where "
        "each request's table costs a translation. Without them a disk's queue needs 128 entries.",
    ),
    click.option(
        "--in-order",
        is_flag=True,
        help="Offer to give requests back in the order of the ring (VIRTIO_F_IN_ORDER), which some "
        "drivers make use of; a slow request then holds up those behind it.",
    ),
    click.option(
        "--stop-timeout",
        type=Seconds(0, LONGEST_TIMEOUT),
        default=STOP_TIMEOUT,
        show_default=True,
        metavar="SECONDS",
        help="How long a stop of a queue waits for requests that the device holds.",
    ),
    click.option(
        "--miss-timeout",
        type=Seconds(0, LONGEST_TIMEOUT, min_open=True),
        default=5.0,
        show_default=True,
        metavar="SECONDS",
        help="How long a front-end may take to translate an address.",
    ),
    click.option(
        "--track-dirty",
        is_flag=True,
        help="Count the pages of guest memory that the device writes.",
    ),
    click.option(
        "--poll-us",
        type=click.IntRange(0, 1_000_000),
        default=0,
        show_default=True,
        metavar="N",
        help="Microseconds to look out for the next request before sleeping.",
    ),
    click.option(
        "--queue-threads",
        is_flag=True,
        help="Serve each queue in a thread of its own. For large requests and several CPUs; small "
        "ones are served faster by one thread.",
    ),
)
_NAMES = (
    "iommu",
    "indirect",
    "in_order",
    "stop_timeout",
    "miss_timeout",
    "track_dirty",
    "poll_us",
    "queue_threads",
)
_PCI_OPTIONS = (
    click.option(
        "--revoke-after",
        type=Seconds(0, LONGEST_TIMEOUT),
        default=DMA_REVOKE_AFTER,
        show_default=True,
        metavar="SECONDS",
        help="How long an unmap of the driver waits for an access of the device to end, which is "
        "cut off then. Less than QEMU's x-msg-timeout (5 s).",
    ),
)


def num_queues_option(
    default: int | None, text: str, *, most: int = 64
) -> Callable[[Command], Command]:
    """The option ``--num-queues``, for devices that have as many as one likes."""
    return click.option(
        "--num-queues",
        type=click.IntRange(1, most),
        default=default,
        show_default=default is not None,
        help=text,
    )


def server_options(command: Command) -> Command:
    """Give a command the options of every server; it is called with them as ``server``."""
    return _with_server(command, Server, _OPTIONS, _NAMES)


def pci_server_options(command: Command) -> Command:
    """Give a command the options of every server of a PCI device over vfio-user, as ``server``."""
    return _with_server(command, PciServer, _PCI_OPTIONS, ("revoke_after",))


def _with_server(
    command: Command,
    kind: type[Server],
    more: Sequence[Callable[[Any], Any]],
    names: Sequence[str],
) -> Command:
    @functools.wraps(command)
    def collected(
        *, socket: str | None, connect: str | None, fd: int | None, **arguments: Any
    ) -> None:
        if sum(given is not None for given in (socket, connect, fd)) > 1:
            fail("give one of --socket, --connect and --fd")
        options = {name: arguments.pop(name) for name in names}
        command(server=kind(options, socket=socket, connect=connect, fd=fd), **arguments)

    decorated: Any = collected
    for option in reversed((*_PLACE_OPTIONS, *more)):
        decorated = option(decorated)
    result: Command = decorated
    return result


class Server:
    """Serves one device as its command was told to, and ends the process properly.

    Args:
        options: For :class:`~guestio.vhost_user.Backend`.
        socket: Where to listen.
        connect: Where to connect to.
        fd: A socket to use. With none of the three it is systemd's.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        socket: str | None = None,
        connect: str | None = None,
        fd: int | None = None,
    ) -> None:
        self.options = dict(options)
        self._socket, self._connect, self._fd = socket, connect, fd

    def _make(
        self, device: Any, place: str | socket.socket, **more: Any
    ) -> Backend | vfio_user.Server:
        return Backend(device, place, **more, **self.options)

    def _backend(self, device: Any) -> Backend | vfio_user.Server:
        if self._connect is not None:
            return self._make(device, self._connect, connect=True)
        if self._socket is not None:
            return self._make(device, self._socket)
        if self._fd is not None:
            return self._make(device, adopt_socket(self._fd))
        handed = activation_sockets()
        if len(handed) != 1:
            for each in handed:
                each.close()
            fail(
                f"systemd hands over {len(handed)} sockets: name one with --fd"
                if handed
                else "say where to listen (--socket PATH) or to connect to (--connect PATH), or "
                "which socket to use (--fd N)"
            )
        return self._make(device, handed[0])

    def run(
        self,
        make: Callable[[], Closable],
        what: str,
        *,
        signals: Mapping[int, Callable[[], object]] | None = None,
        cleanup: Callable[[], object] = lambda: None,
        more: Callable[[], Sequence[str]] = lambda: (),
    ) -> None:
        """Make a device and serve it until SIGINT, SIGTERM or SIGHUP, or the end of its connection.

        A `GuestioError`, `ValueError` or `TypeError` of making the device or listening ends the
        process with status 2 and one line, an error of the system or of the device's methods, or
        while serving, with 1.

        Args:
            make: Makes the device; it is closed at the end.
            what: What is served, for messages ("the disk").
            signals: Called in the main thread for other signals.
            cleanup: Called at the end, whatever happened, also if the device hangs.
            more: Lines to print after the one that says where the server listens.
        """
        log = StderrLog()
        stop = Signals(signals)
        status, why = 1, ""

        def give_up() -> None:
            try:
                log.say("guestio: ended although a request or the device hangs")
                remove_sockets()
                cleanup()
                log.drain(EXIT_GRACE)
            finally:
                os._exit(0)

        stack = contextlib.ExitStack()
        try:
            try:
                stack.callback(cleanup)
                with stop.limiting(give_up), _refusals():
                    device = make()
                    stack.callback(_close, device)
                    backend = stack.enter_context(self._backend(device))

                def ready() -> None:
                    for line in (backend.ready_line, *more()):
                        log.say(line)

                if not run_until_signaled(backend, stop, ready):
                    give_up()
            finally:
                with stop.limiting(give_up):
                    stack.close()
            _log.info("%s ended: %s", what, backend.statistics)
            status = 0
        except GuestioError as error:
            why = str(error)
        except OSError as error:
            why = _reason(error)
        except RuntimeError as error:
            if "new thread" not in str(error):
                raise
            why = f"{error} (ulimit -u, pids.max)"
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
            raise
        finally:
            if why:
                # Not directly: a reader of standard error that reads nothing must not keep us.
                log.say(f"guestio: {what} cannot be served: {' '.join(why.split())}")
            if not log.drain(EXIT_GRACE):
                # The end of Python waits for what is written to standard error.
                os._exit(status)
            _leave_within(stop.seconds_left, log, status)
        if status:
            sys.exit(status)


class PciServer(Server):
    """Serves a PCI device over vfio-user; all else as `Server`."""

    def _make(
        self, device: Any, place: str | socket.socket, **more: Any
    ) -> Backend | vfio_user.Server:
        return vfio_user.Server(device, place, **more, **self.options)


def _leave_within(seconds: float, log: StderrLog, status: int) -> None:
    """Limit the end of Python, which waits for threads and for what was registered for it."""

    def end() -> None:
        time.sleep(seconds)
        log.say("guestio: ended although threads of the device, or its exit handlers, go on")
        log.drain(EXIT_GRACE)
        os._exit(status)

    # Where no thread can be had, Python ends as it does.
    with contextlib.suppress(RuntimeError):
        threading.Thread(target=end, name="guestio-end", daemon=True).start()


def _close(device: Closable) -> None:
    """Close a device; what it raises is logged."""
    try:
        device.close()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        called, kind = f"{type(device).__name__}.close", type(error).__name__
        LOG.report(_log, logging.ERROR, "%s raised %s: %s", called, kind, error, trace=True)


@contextlib.contextmanager
def _refusals() -> Any:
    """What is raised inside is a bad argument: one line and status 2."""
    try:
        yield
    except DeviceMethodError:
        raise
    except (GuestioError, ValueError, TypeError) as error:
        _end(2, str(error))


def _reason(error: OSError) -> str:
    """What the system says, with the file."""
    said = error.strerror or str(error)
    return said if error.filename is None else f"{said}: {os.fsdecode(error.filename)}"


def fail(message: str) -> NoReturn:
    """End with one line and the status for a bad argument."""
    _end(2, message)


def _end(status: int, message: str) -> NoReturn:
    click.echo(f"guestio: {message}", err=True)
    sys.exit(status)
