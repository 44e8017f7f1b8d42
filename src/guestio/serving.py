"""A device served until a signal ends it: what a program of a user's own needs to be a server."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeAlias

from guestio import vfio_user
from guestio.budgets import CLOSE_TIMEOUT, EXIT_TIMEOUT
from guestio.control.rates import with_rates
from guestio.control.summary import text_of
from guestio.errors import DeviceError
from guestio.faults import Faults, Level, Misbehaving, MisbehavingPci
from guestio.pci import PciDevice, VirtioPci
from guestio.peer.endpoint import sockets_made
from guestio.peer.server import PeerServer
from guestio.ratelog import LOG
from guestio.sandbox import Mode as SandboxMode
from guestio.sandbox import Sandbox
from guestio.vhost_user import Backend
from guestio.virtio.device import Device
from guestio.virtio.statistics import Statistics

if TYPE_CHECKING:
    from guestio.observe import Payload

log = logging.getLogger("guestio.serving")

Transport: TypeAlias = Literal["vhost-user", "vfio-user"]
"""What a front-end or client speaks at the socket."""

AnyServer: TypeAlias = Backend | vfio_user.Server
"""What serves a device over one of them."""

RATE_SECONDS: Final = 0.2
"""Seconds over which rates are taken for a summary on SIGUSR1."""

_SERVER_OPTIONS: Final = frozenset({"connect", "control", "http", "http_token", "revoke_after"})


def make_server(
    device: Device | PciDevice,
    path: str | os.PathLike[str] | socket.socket,
    *,
    transport: Transport | None = None,
    **options: Any,
) -> AnyServer:
    """What serves a device at a Unix socket.

    Args:
        device: What to serve; it is the caller's to close.
        path: Where to listen, or a socket.
        transport: ``"vhost-user"``; or ``"vfio-user"``, which makes a virtio device a PCI function
            (`VirtioPci`). None for the first, and for the other one if the device is a PCI device.
        options: As for `Backend`; over vfio-user as for `VirtioPci` and
            :class:`vfio_user.Server <guestio.vfio_user.Server>`.

    Raises:
        DeviceError, TypeError, ValueError: As from these; or a PCI device is to be served over
            vhost-user; or a rule of a device that misbehaves (:mod:`guestio.faults`) is for the
            other transport.
    """
    function = isinstance(device, PciDevice)
    if transport is None:
        transport = "vfio-user" if function else "vhost-user"
    faults = faults_of(device)
    if transport == "vhost-user":
        if function:
            raise ValueError("transport 'vhost-user' is for virtio devices, and this is a PCI one")
        if faults is not None:
            faults.refuse(Level.PCI, "there is a PCI function over vfio-user only")
        return Backend(device, path, **options)  # type: ignore[arg-type] # checked there
    if transport != "vfio-user":
        raise ValueError(f"transport {transport!r} is neither 'vhost-user' nor 'vfio-user'")
    outer = {name: options.pop(name) for name in _SERVER_OPTIONS & options.keys()}
    if "poll_us" in options:
        # Messages and rings are looked out for.
        outer["poll_us"] = options.pop("poll_us") if function else options["poll_us"]
    if not isinstance(device, PciDevice):
        virtio = VirtioPci(device, **options)
        made = virtio if faults is None else MisbehavingPci(virtio, faults)
        return vfio_user.Server(made, path, **outer)
    if options:
        raise TypeError(f"a PCI device has no {', '.join(sorted(options))}")
    return vfio_user.Server(device, path, **outer)


def faults_of(device: Device | PciDevice) -> Faults | None:
    """The rules that a device misbehaves by; None of one that does not."""
    return device.faults if isinstance(device, Misbehaving | MisbehavingPci) else None


def serve(
    device: Device | PciDevice,
    path: str | os.PathLike[str] | socket.socket,
    *,
    transport: Transport | None = None,
    record: str | os.PathLike[str] | None = None,
    record_payload: Payload = "none",
    sandbox: SandboxMode = "off",
    **options: Any,
) -> Statistics | vfio_user.Statistics:
    """Serve a device at a Unix socket until SIGINT, SIGTERM or SIGHUP.

    One line on standard error, ``listening on PATH``, says that a front-end may connect; with other
    sockets it is :attr:`Backend.ready_line <guestio.vhost_user.Backend.ready_line>`. A signal
    ends the service within 2 s, whatever the guest or the device does, and removes the socket; but
    not while ``attached`` is in this very thread. SIGUSR1 has a summary of what is going on printed
    on standard error. The signals are handled as before afterwards.

    Args:
        device: What to serve; it is the caller's to close.
        path: Where to listen, or a socket, as for :class:`~guestio.vhost_user.Backend`.
        transport: ``"vhost-user"`` or ``"vfio-user"``, see :func:`make_server`. None for the one
            that suits the device.
        record: A file that must not be there yet, to which all that happens is recorded from the
            first front-end on; see :class:`guestio.observe.Recorder`, which does the same for a
            `Backend`. Needs the extra ``record``. After the end of the service, a large recording
            takes some seconds to become a Parquet file.
        record_payload: How much of what requests carry is recorded: ``"none"``, ``"headers"`` or
            ``"all"``.
        sandbox: ``"auto"`` drops what serving does not need, as the server commands do: the
            process starts no program, opens no socket and writes no file from then on. That cannot
            be taken back when this function returns, so only a process that does nothing else
            should ask for it.
        options: As for `Backend`; over vfio-user as for `VirtioPci` and
            :class:`vfio_user.Server <guestio.vfio_user.Server>`.

    Returns:
        Counters over all front-ends or clients.

    Raises:
        DeviceError, TypeError, ValueError: As from these, or the extra is missing; nothing was
            served.
        OSError: The recording cannot be written; as from `Recorder`.
        RuntimeError: This is not the main thread, to which alone Python gives signals; use
            `Backend` in others.
        SystemExit, KeyboardInterrupt: The device raised it.

    Threads: the device's methods are called in a thread that this function starts, except
    ``attached``. A device whose method does not return loses this thread: an error is logged, and
    the thread ends with the process.
    """
    if sandbox not in ("auto", "off"):
        raise ValueError(f"sandbox {sandbox!r} is neither 'auto' nor 'off'")
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "serve waits for signals, which Python handles in the main thread: call it there, or "
            "use guestio.vhost_user.Backend"
        )
    served: list[AnyServer] = []

    def summarize() -> None:
        for each in served:
            print(text_of(with_rates(each, RATE_SECONDS)), file=sys.stderr, flush=True)

    with Signals({signal.SIGUSR1: summarize}) as signals, contextlib.ExitStack() as stack:
        backend = make_server(device, path, transport=transport, **options)
        served.append(backend)
        stack.callback(backend.close)
        if record is not None:
            stack.enter_context(_recorder(backend, record, record_payload))
        box = None
        if sandbox != "off":
            box = Sandbox(connects=backend.connects, removes=sockets_made(), records=record)
            box.enter()
            for note in box.notes:
                log.warning("%s", note)

        def ready() -> None:
            print(backend.ready_line, file=sys.stderr, flush=True)

        if not run_until_signaled(backend, signals, ready, box):
            # What is in use by the thread that hangs is not closed.
            stack.pop_all()
            LOG.report(
                log,
                logging.ERROR,
                "%s is served no more, although it has not returned from a call for %g s",
                type(device).__name__,
                EXIT_TIMEOUT,
            )
    counted: Statistics | vfio_user.Statistics = backend.statistics
    return counted


def _recorder(
    server: AnyServer, path: str | os.PathLike[str], payload: Payload
) -> contextlib.AbstractContextManager[object]:
    """What records a server. It needs the extra, and takes its time to be imported."""
    try:
        from guestio.observe import Recorder
    except ImportError as error:
        raise DeviceError(
            f"a recording needs the extra 'record' (pip install 'guestio[record]'): {error}"
        ) from None
    return Recorder(server, path, payload=payload)


_NO_SIGNAL = 255


class Signals:
    """Waits for SIGINT, SIGTERM or SIGHUP; one that arrives before the wait is not lost.

    The kernel may choose any thread for a signal: a byte wakes the main thread, which must handle
    it. SIGHUP is left alone where it is ignored, as `nohup` does, unless it is among the others.
    For the main thread.

    Args:
        others: Called in :meth:`wait`, in the main thread, for each other signal that arrives. One
            that is named here does not end the wait, SIGHUP for example.
    """

    def __init__(self, others: Mapping[int, Callable[[], object]] | None = None) -> None:
        self._others = dict(others or {})
        self._early = bytearray()
        self._ended_at: float | None = None
        self._over, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._fd_before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._before: dict[int, Any] = {}
        for number in {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *self._others}:
            ignored = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if number in self._others or not ignored:
                self._before[number] = signal.signal(number, lambda *_: None)

    def over(self) -> None:
        """Make :meth:`wait` return. From any thread."""
        self._write(0)

    def _write(self, number: int) -> None:
        # A pipe that is full is readable as well.
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, bytes([number]))

    def wait(self) -> None:
        """Wait for a signal or :meth:`over`."""
        poll = select.poll()
        poll.register(self._over, select.POLLIN)
        while True:
            if not self._early:
                poll.poll()
                self._read()
            early, self._early = self._early, bytearray()
            for at, number in enumerate(early):
                call = self._others.get(number)
                if call is not None:
                    call()
                elif not number or number in self._before:
                    self._early = early[at + 1 :]
                    return

    def _read(self) -> None:
        """Read what has arrived, and note since when an end is wanted."""
        arrived = os.read(self._over, 4096)
        if self._ended_at is None and any(
            number in self._before and number not in self._others for number in arrived
        ):
            self._ended_at = time.monotonic()
        self._early += arrived

    @contextlib.contextmanager
    def limiting(self, give_up: Callable[[], object]) -> Iterator[None]:
        """Obey a signal while the calling thread is inside this context, and :meth:`wait` is not.

        Args:
            give_up: Called in another thread if this one is still inside CLOSE_TIMEOUT after the
                first signal that ends the service, one that came before included.
        """
        left = threading.Event()
        thread = threading.Thread(
            target=self._limit, args=(left, give_up), name="guestio-signals", daemon=True
        )
        try:
            # Without a thread it is no worse than before; who serves reports that there is none.
            with contextlib.suppress(RuntimeError):
                thread.start()
            yield
        finally:
            left.set()
            if thread.ident is not None:
                self._write(_NO_SIGNAL)
                thread.join()

    @property
    def seconds_left(self) -> float:
        """Seconds until CLOSE_TIMEOUT after the first signal that ends the service, or from now."""
        since = time.monotonic() if self._ended_at is None else self._ended_at
        return max(since + CLOSE_TIMEOUT - time.monotonic(), 0.0)

    def _limit(self, left: threading.Event, give_up: Callable[[], object]) -> None:
        poll = select.poll()
        poll.register(self._over, select.POLLIN)
        while not left.is_set():
            longest = None
            if self._ended_at is not None:
                longest = max(self._ended_at + CLOSE_TIMEOUT - time.monotonic(), 0) * 1000
            if poll.poll(longest):
                self._read()
            elif not left.is_set():
                give_up()
                return

    def close(self) -> None:
        """Handle signals as before. Calling it again does nothing."""
        if self._over < 0:
            return
        for number, handler in self._before.items():
            # None: the handler was not installed from Python.
            if handler is not None:
                signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._over)
        os.close(self._wake)
        self._over = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_until_signaled(
    backend: PeerServer,
    signals: Signals,
    ready: Callable[[], object] = lambda: None,
    sandbox: Sandbox | None = None,
) -> bool:
    """Serve in a thread, so that a signal is obeyed whatever keeps that thread.

    Args:
        backend: What serves; it is the caller's to close, unless it hangs.
        signals: Ends the service.
        ready: Called once the thread has been started.
        sandbox: What this process has entered, which the thread enters too.

    Returns:
        Whether the service ended in time. If not, its socket was removed, and its thread is still
        in the device.

    Raises:
        BaseException: What its ``serve`` raised.
    """
    errors: list[BaseException] = []

    def serve_in_thread() -> None:
        try:
            if sandbox is not None:
                sandbox.enter_device_thread()
            backend.serve()
        except BaseException as error:
            errors.append(error)
        finally:
            signals.over()

    thread = threading.Thread(target=serve_in_thread, name="guestio-serve", daemon=True)
    thread.start()
    ready()
    signals.wait()
    backend.stop()
    thread.join(EXIT_TIMEOUT)
    if thread.is_alive():
        backend.remove_socket()
        return False
    if errors:
        raise errors[0]
    return True
