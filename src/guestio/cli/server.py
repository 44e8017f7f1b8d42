"""What all commands that serve a device have in common: options, signals, log and exit status."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from guestio.budgets import DMA_REVOKE_AFTER, LONGEST_TIMEOUT, STOP_TIMEOUT
from guestio.cli.extras import observing
from guestio.cli.seconds import Seconds
from guestio.cli.stderr import StderrLog
from guestio.control.rates import with_rates
from guestio.control.summary import text_of
from guestio.control.watched import WatchedServer
from guestio.errors import DeviceMethodError, GuestioError
from guestio.faults import Faults, Misbehaving, MisbehavingPci
from guestio.pci import PciDevice
from guestio.peer.endpoint import (
    activation_sockets,
    adopt_socket,
    remove_sockets,
    sockets_made,
)
from guestio.ratelog import LOG
from guestio.sandbox import Mode as SandboxMode
from guestio.sandbox import Sandbox
from guestio.serving import (
    RATE_SECONDS,
    AnyServer,
    Signals,
    Transport,
    make_server,
    run_until_signaled,
)
from guestio.virtio.device import Device

if TYPE_CHECKING:
    from guestio.observe import Payload, Recorder

EXIT_GRACE = 0.2
"""Seconds that the end of a command waits for its log to be read."""

Command = TypeVar("Command", bound=Callable[..., None])

_log = logging.getLogger("guestio.cli.server")


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
_WATCH_OPTIONS = (
    click.option(
        "--control",
        metavar="PATH",
        help="Where to listen for questions about the server (guestio top, /status, /metrics). "
        "Only this user may connect.",
    ),
    click.option(
        "--http",
        metavar="HOST:PORT",
        help="The same over TCP, [::1]:8080 for example. What other machines can reach needs a "
        "token, in GUESTIO_CONTROL_TOKEN.",
    ),
)
RECORD_OPTIONS = (
    click.option(
        "--record",
        metavar="FILE",
        help="Record what becomes of each request, translation and fault, to a file that must not "
        "be there yet. `guestio report FILE` says what happened.",
    ),
    click.option(
        "--record-payload",
        type=click.Choice(["none", "headers", "all"]),
        default="none",
        show_default=True,
        help="What requests carry, as --payload of `guestio record`.",
    ),
)
_FAULT = click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="RULE",
    help="Misbehave by a rule, such as 'error op=read sector=100-200' or 'msi-lost p=0.01'; may be "
    "given several times. Each request passes through Python then, which is slower. 'none' is no "
    "rule: they may be switched on at run time. `guestio faults` lists what can go wrong.",
)
_INTERRUPTS = click.option(
    "--interrupts",
    type=click.Choice(["msix", "intx"]),
    default="msix",
    show_default=True,
    help="Interrupts of the PCI function, over vfio-user: MSI-X and the pin INTA, or the pin only. "
    "Hot-unplugging a device with MSI-X aborts QEMU 11.1; without it works.",
)
_REVOKE_AFTER = click.option(
    "--revoke-after",
    type=Seconds(0, LONGEST_TIMEOUT),
    default=DMA_REVOKE_AFTER,
    show_default=True,
    metavar="SECONDS",
    help="How long, over vfio-user, an unmap of the driver waits for an access of the device to "
    "end, which is cut off then. Less than QEMU's x-msg-timeout (5 s).",
)
_POLL_US = click.option(
    "--poll-us",
    type=click.IntRange(0, 1_000_000),
    default=0,
    show_default=True,
    metavar="N",
    help="Microseconds to look out for the next request, over vfio-user for the next message too, "
    "before sleeping.",
)
SANDBOX_OPTION = click.option(
    "--sandbox",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="auto: once all is open, the process can start no program, open no socket and write no "
    "other file, as far as kernel and libseccomp allow. A device that tries gets PermissionError. "
    "off: for a device that must.",
)
_OPTIONS = (
    click.option(
        "--transport",
        type=click.Choice(["vhost-user", "vfio-user"]),
        help="What is spoken at the socket. vfio-user makes a virtio device a PCI function.  "
        "[default: vhost-user; for a PCI device vfio-user]",
    ),
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
        help="How long a front-end may take to translate an address, over vhost-user.",
    ),
    _REVOKE_AFTER,
    _INTERRUPTS,
    click.option(
        "--track-dirty",
        is_flag=True,
        help="Count the pages of guest memory that the device writes, over vhost-user.",
    ),
    _POLL_US,
    click.option(
        "--queue-threads",
        is_flag=True,
        help="Serve each queue in a thread of its own, over vhost-user. For large requests and "
        "several CPUs; small ones are served faster by one thread.",
    ),
)
_VHOST_USER = ("miss_timeout", "track_dirty", "queue_threads")
_PCI = ("revoke_after", "poll_us")
_VFIO_USER = ("revoke_after",)
_VIRTIO = ("iommu", "indirect", "in_order", "stop_timeout", "poll_us")
_WATCH = ("control", "http")
_VIRTIO_PCI = ("interrupts",)
_NAMES = (*_VIRTIO, *_VHOST_USER, *_VFIO_USER, *_VIRTIO_PCI)


def vfio_user_help(name: str, words: str, *, what: str = "the device") -> str:
    """What a command's help says about vfio-user.

    Args:
        name: Of the socket in its example.
        words: The command and its arguments.
        what: What it serves.
    """
    path = f"/tmp/{name}.sock"  # noqa: S108 - an example
    return f"""
Over vfio-user {what} is a PCI function, which QEMU 10.1 or later takes over as it is. Behind a
virtio-iommu, or an intel-iommu with caching-mode=on, it reaches what the guest has mapped:

\b
  guestio {words} \\
    --transport vfio-user --socket {path} &
  qemu-system-x86_64 -machine q35,memory-backend=mem -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -device virtio-iommu-pci \\
    -device '{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{path}"}}}}' \\
    -kernel vmlinuz -initrd initrd -append "console=ttyS0"
"""


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
    return _with_server(command, _OPTIONS, _NAMES)


def pci_server_options(command: Command) -> Command:
    """Give a command the options of every server of a PCI device over vfio-user, as ``server``."""
    return _with_server(command, (_REVOKE_AFTER, _POLL_US), _PCI)


def _with_server(
    command: Command, more: Sequence[Callable[[Any], Any]], names: Sequence[str]
) -> Command:
    @functools.wraps(command)
    def collected(
        *,
        socket: str | None,
        connect: str | None,
        fd: int | None,
        transport: Transport | None = None,
        faults: Sequence[str] = (),
        record: str | None = None,
        record_payload: Payload = "none",
        sandbox: SandboxMode = "auto",
        **arguments: Any,
    ) -> None:
        if sum(given is not None for given in (socket, connect, fd)) > 1:
            fail("give one of --socket, --connect and --fd")
        context = click.get_current_context()
        options = {name: arguments.pop(name) for name in (*names, *_WATCH)}
        given = {
            name
            for name in names
            if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
        }
        server = Server(
            options,
            given=given,
            transport=transport,
            socket=socket,
            connect=connect,
            fd=fd,
            faults=parse_faults(faults),
            record=record,
            record_payload=record_payload,
            sandbox=sandbox,
        )
        command(server=server, **arguments)

    decorated: Any = collected
    for option in reversed(
        (*_PLACE_OPTIONS, *more, *_WATCH_OPTIONS, *RECORD_OPTIONS, _FAULT, SANDBOX_OPTION)
    ):
        decorated = option(decorated)
    result: Command = decorated
    return result


class Server:
    """Serves one device as its command was told to, and ends the process properly.

    Args:
        options: For what serves, whichever the transport is.
        given: Those of them that the user has set.
        transport: What is spoken at the socket; None for what suits the device.
        socket: Where to listen.
        connect: Where to connect to.
        fd: A socket to use. With none of the three it is systemd's.
        faults: Rules that the device is to misbehave by; None for a device as it is.
        record: Where to record what it does, or None.
        record_payload: How much of what requests carry is recorded.
        sandbox: Whether to drop what serving does not need.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        given: Collection[str] = (),
        transport: Transport | None = None,
        socket: str | None = None,
        connect: str | None = None,
        fd: int | None = None,
        faults: Faults | None = None,
        record: str | None = None,
        record_payload: Payload = "none",
        sandbox: SandboxMode = "auto",
    ) -> None:
        self._sandbox = sandbox
        self._record, self._record_payload = record, record_payload
        self.faults = faults
        self.options = dict(options)
        self._given = given
        self._transport = transport
        self._socket, self._connect, self._fd = socket, connect, fd

    def _options_for(self, device: Device | PciDevice) -> dict[str, Any]:
        """The options that apply; ends the process for one that the user has set and that do not.

        A PCI device has no rings, and each transport has options of its own.
        """
        if isinstance(device, PciDevice):
            names: tuple[str, ...] = _PCI
        elif self._transport == "vfio-user":
            names = (*_VIRTIO, *_VFIO_USER, *_VIRTIO_PCI)
        else:
            names = (*_VIRTIO, *_VHOST_USER)
        for name in sorted(self._given):
            if name not in names:
                where = (
                    "of a PCI device"
                    if isinstance(device, PciDevice)
                    else (f"over {self._transport or 'vhost-user'}")
                )
                fail(f"there is no --{name.replace('_', '-')} {where}")
        found = {name: value for name, value in self.options.items() if name in names}
        for name in _WATCH:
            if self.options.get(name) is not None:
                found[name] = self.options[name]
        if "http" in found:
            found["http_token"] = os.environ.get("GUESTIO_CONTROL_TOKEN")
        return found

    def _misbehaving(self, device: Device | PciDevice) -> Device | PciDevice:
        """The device, or one that is as it except where rules say so."""
        if self.faults is None:
            return device
        if isinstance(device, PciDevice):
            return MisbehavingPci(device, self.faults)
        return Misbehaving(device, self.faults)

    def _fault_lines(self) -> list[str]:
        if self.faults is None:
            return []
        return [
            "guestio: misbehaves by rules; every request passes through Python",
            *fault_lines(self.faults),
        ]

    def _make(
        self, device: Device | PciDevice, place: str | socket.socket, **more: Any
    ) -> AnyServer:
        options = self._options_for(device)
        return make_server(device, place, transport=self._transport, **options, **more)

    def _backend(self, device: Device | PciDevice) -> AnyServer:
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
        make: Callable[[], Device | PciDevice],
        what: str,
        *,
        signals: Mapping[int, Callable[[], object]] | None = None,
        cleanup: Callable[[], object] = lambda: None,
        more: Callable[[], Sequence[str]] = lambda: (),
        removes: Callable[[], Sequence[str]] = lambda: (),
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
            removes: Paths of sockets that ``cleanup`` removes.
        """

        def open_server(stack: contextlib.ExitStack) -> AnyServer:
            device = self._misbehaving(make())
            stack.callback(_close, device)
            return self._backend(device)

        run_server(
            open_server,
            what,
            signals=signals,
            cleanup=cleanup,
            started=lambda backend, stack: start_recording(
                backend, stack, self._record, self._record_payload
            ),
            more=lambda: [*more(), *self._fault_lines()],
            faults=self.faults,
            sandbox=lambda made: make_sandbox(self._sandbox, made, self._record, removes()),
        )


def start_recording(
    server: WatchedServer, stack: contextlib.ExitStack, file: str | None, payload: Payload
) -> Recorder | None:
    """Record what a server does until the stack is closed, if a file is named."""
    if file is None:
        return None
    with observing():
        from guestio.observe import Recorder
    try:
        recorder = Recorder(
            server,
            file,
            payload=payload,
        )
    except OSError as error:
        fail(f"--record {_reason(error)}")
    stack.callback(recorder.close, finished=None)
    return recorder


def make_sandbox(
    mode: SandboxMode, server: WatchedServer, record: str | None, removes: Sequence[str] = ()
) -> Sandbox | None:
    """What a server that is about to serve does without; None if it is to keep all.

    Args:
        mode: As the user wants it.
        server: It and its device have opened what they need.
        record: The file of its recording, if there is one.
        removes: Further sockets that are removed at the end.
    """
    if mode == "off":
        return None
    return Sandbox(connects=server.connects, removes=[*sockets_made(), *removes], records=record)


Served = TypeVar("Served", bound=WatchedServer)


def run_server(
    open_server: Callable[[contextlib.ExitStack], Served],
    what: str,
    *,
    signals: Mapping[int, Callable[[], object]] | None = None,
    cleanup: Callable[[], object] = lambda: None,
    started: Callable[[Served, contextlib.ExitStack], Recorder | None] = lambda *_: None,
    more: Callable[[], Sequence[str]] = lambda: (),
    faults: Faults | None = None,
    sandbox: Callable[[Served], Sandbox | None] = lambda _: None,
) -> None:
    """Make a server and have it serve until SIGINT, SIGTERM or SIGHUP, or its end.

    Args:
        open_server: Makes it, with what is to be closed after it put on the stack; see `Server.run`
            for what its errors lead to.
        what: What is served, for messages.
        signals: Called in the main thread for other signals.
        cleanup: Called at the end, whatever happened, also if the server hangs.
        started: Called with the server before it serves; what it puts on the stack ends before. It
            returns the recorder, if there is one.
        more: Lines to print after the one that says where the server listens.
        faults: Rules whose counts are logged at the end.
        sandbox: What the process is to do without from when the server serves.
    """
    log = StderrLog()
    served: list[Served] = []

    def summarize() -> None:
        for backend in served:
            log.say(text_of(with_rates(backend, RATE_SECONDS)))

    stop = Signals({signal.SIGUSR1: summarize} | dict(signals or {}))
    status, why = 1, ""
    recorder: Recorder | None = None

    def give_up() -> None:
        try:
            if recorder is not None and recorder.closing:
                log.say(
                    "guestio: ended before the recording was a Parquet file: `guestio report` "
                    "reads it as it is, and `guestio report --finish` makes it one"
                )
            else:
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
                backend = open_server(stack)
                stack.callback(backend.close)
                served.append(backend)
                recorder = started(backend, stack)
                box = sandbox(backend)
                if box is not None:
                    box.enter()

            def ready() -> None:
                notes = () if box is None else box.notes
                for line in (backend.ready_line, *more(), *(f"guestio: {each}" for each in notes)):
                    log.say(line)

            if not run_until_signaled(backend, stop, ready, box):
                give_up()
        finally:
            with stop.limiting(give_up):
                stack.close()
        _log.info("%s ended: %s", what, backend.statistics)
        for each in () if faults is None else faults.counts():
            _log.info(
                "fault %d (%s) struck %d of %d",
                each.number,
                each.rule,
                each.struck,
                each.matched,
            )
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


def fault_lines(faults: Faults) -> list[str]:
    """The rules in force, a line each."""
    return [f"fault {number}: {rule}" for number, rule, *_ in faults.counts()]


def parse_faults(rules: Sequence[str]) -> Faults | None:
    """The rules of a command line; ends the process for one that is none."""
    if not rules:
        return None
    faults = Faults()
    for rule in rules:
        if rule != "none":
            try:
                faults.on(rule)
            except ValueError as error:
                fail(f"--fault: {error}")
    return faults


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


def _close(device: Device | PciDevice) -> None:
    """Close a device, if it can be closed; what it raises is logged."""
    try:
        close = getattr(device, "close", None)
        if close is not None:
            close()
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
