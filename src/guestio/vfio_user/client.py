"""The VMM's side of vfio-user: a PCI device in another process, as its drivers and a VMM use it.

Source: QEMU docs/interop/vfio-user.rst (vfio-user 0.1); linux/vfio.h.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

from guestio._core.base.syscalls import notify_eventfd
from guestio.addr import check_int, check_seconds
from guestio.budgets import CLIENT_TIMEOUT
from guestio.dma import InterruptInfo, PciFunction
from guestio.dma.device import kind_name
from guestio.errors import DeviceError, GuestioError
from guestio.memory.backing import close_fd
from guestio.vfio_user.answers import IrqFacts, Limits
from guestio.vfio_user.exchange import Exchange, ServerGoneError
from guestio.vfio_user.life import Life, meet
from guestio.vfio_user.mapped import MappedMemory
from guestio.vfio_user.messages import (
    CONFIG_REGION,
    SET_IRQS,
    Command,
    IrqFlag,
    IrqSet,
    RefusalError,
)
from guestio.vfio_user.region import ClientRegion, own_fd

_CONNECT_PAUSE: Final = 0.01


class DeviceRestartedError(DeviceError):
    """The server is another one, and its device as after power-on: set it up again.

    Raised by each access until :meth:`Client.wait_restart` or :meth:`Client.reconnect` is called.
    """


class Restored(NamedTuple):
    """What a client has brought back on a new connection; the rest is the driver's to do.

    Attributes:
        mappings: How many DMA mappings.
        interrupts: How many interrupts have their eventfds again.
    """

    mappings: int
    interrupts: int


class Client(PciFunction):
    """A PCI device in another process, reached over vfio-user; a :class:`~guestio.dma.PciFunction`.

    Registers, interrupts, reset: as of an assigned device. A `VfioUserTarget` says what memory the
    device reaches. A thread of the client receives what the server sends, and serves its requests
    for memory that it has no descriptor of.

    Everything that the server sends is checked. Whatever it does, or does not do for ``timeout``
    seconds, ends the connection at the worst: then each call raises `ServerGoneError`.

    After that, :meth:`reconnect` connects to the server that is there then, and brings back
    mappings and interrupts. Registers are not brought back: the device is as after power-on, and
    its driver begins again, bus mastering included. With ``reconnect_for`` the client connects
    again by itself; each access raises `DeviceRestartedError` until :meth:`wait_restart` has been
    called, so that no driver takes the new device for the old one.

    May be used from any thread. A context manager that closes it.

    Args:
        path: Where the server listens; or a connected Unix stream socket, which is the client's
            from here on, and cannot be connected again.
        timeout: Seconds that one wait for the server may take.
        connect_wait: Seconds to go on trying while there is no server yet.
        reconnect_for: Seconds to try to connect again when the connection has ended; 0 not to.

    Attributes:
        address: The path of the socket.
        can_reset: Whether :meth:`reset` is possible.

    Raises:
        DeviceError: There is no server, or its device cannot be used.
        ServerGoneError: It does not answer, or says what cannot be.
        TypeError, ValueError: Bad arguments.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | socket.socket,
        *,
        timeout: float = CLIENT_TIMEOUT,
        connect_wait: float = 0.0,
        reconnect_for: float = 0.0,
    ) -> None:
        self._closed = True
        self._timeout = check_seconds(timeout, "timeout")
        wait = check_seconds(connect_wait, "connect_wait")
        self._reconnect_for = check_seconds(reconnect_for, "reconnect_for")
        given = path if isinstance(path, socket.socket) else None
        if given is not None and self._reconnect_for:
            raise ValueError("a client of a socket cannot connect again: give the server's path")
        self._path = None if isinstance(path, socket.socket) else os.fspath(path)
        self.address = self._path or "a socket"
        self._mapped = MappedMemory()
        self._events: dict[int, list[int]] = {}
        self._masked: dict[int, set[int]] = {}
        self._mask_events: dict[tuple[int, int, int], int] = {}
        self._operations = threading.Lock()
        self._changed = threading.Condition()
        self._restored: Restored | None = None
        self._restart_error: Exception | None = None
        self._restarting: threading.Thread | None = None
        self._ended: Life | None = None
        self._life: Life
        self._stopping = threading.Event()
        self._candidate: Exchange | None = None
        try:
            self._state_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            if given is not None:
                _close_socket(given)
            raise DeviceError(f"cannot watch {self.address}: {error.strerror}") from error
        try:
            connected = given or self._connect(time.monotonic() + wait)
            self._life = self._begin(connected)
        except BaseException:
            close_fd(self._state_fd)
            raise
        finally:
            self._candidate = None
        self._closed = False
        self.can_reset = self._life.can_reset
        itself = weakref.ref(self)

        def accessible() -> Life:
            client = itself()
            if client is None:
                raise ValueError("the client of this region is closed")
            return client._accessible()

        self._regions = [
            ClientRegion(self.address, index, facts, accessible, mapped=index in self._life.files)
            for index, facts in enumerate(self._life.regions)
        ]
        self._look_after()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "connected"
        if not self._closed and self._life.exchange.failure is not None:
            state = "server gone"
        return f"<{type(self).__name__} of {self.address}: {state}, {len(self._mapped)} mappings>"

    # The connection

    def _connect(self, until: float) -> socket.socket:
        if self._path is None:
            raise DeviceError(f"{self.address} cannot be connected again: it has no path")
        while True:
            try:
                made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            except OSError as error:
                raise DeviceError(f"cannot connect to {self._path}: {error.strerror}") from error
            try:
                # Without waiting for room among those that a server has not accepted.
                made.setblocking(False)
                made.connect(self._path)
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
                _close_socket(made)
                if time.monotonic() >= until or self._stopping.is_set():
                    raise DeviceError(
                        f"no vfio-user server listens on {self._path}: {error.strerror}"
                    ) from None
                self._stopping.wait(_CONNECT_PAUSE)
            except OSError as error:
                _close_socket(made)
                raise DeviceError(f"cannot connect to {self._path}: {error.strerror}") from error
            except BaseException:
                _close_socket(made)
                raise
            else:
                return made

    def _begin(self, connected: socket.socket) -> Life:
        """Begin on a new connection, which is closed if that fails."""
        itself = weakref.ref(self)

        def ended() -> None:
            client = itself()
            if client is not None:
                client._look_after()

        exchange = Exchange(connected, self.address, self._timeout, self._mapped.serve, ended)
        self._candidate = exchange
        try:
            if self._stopping.is_set():
                raise ServerGoneError(f"{self.address}: the client was closed")
            return meet(exchange)
        except RefusalError as error:
            exchange.close()
            raise DeviceError(f"{self.address} cannot be used: {error}") from None
        except BaseException:
            exchange.close()
            raise

    def _look_after(self) -> None:
        """Do what follows if the connection has ended; in the thread of one, or after a change."""
        with self._changed:
            # So it is also before the first one has begun.
            if self._closed:
                return
            life = self._life
            if life is self._ended or life.exchange.failure is None:
                return
            self._ended = life
            if self._reconnect_for:
                self._restart_error = None
                self._restarting = threading.Thread(
                    target=self._restart, name="guestio-vfio-user-restart", daemon=True
                )
                try:
                    self._restarting.start()
                except RuntimeError as error:
                    # The system has no thread left.
                    self._restarting = None
                    self._restart_error = ServerGoneError(f"{life.exchange.failure}; {error}")
                    self._changed.notify_all()
        self._signal()

    def _restart(self) -> None:
        try:
            self._reconnect(self._reconnect_for, automatic=True)
        except (GuestioError, ValueError, OSError) as error:
            with self._changed:
                self._restart_error = error
        with self._changed:
            self._restarting = None
            self._changed.notify_all()
            if not self._closed:
                self._signal()

    def _signal(self) -> None:
        notify_eventfd(self._state_fd)

    def reconnect(self, wait: float = 0.0) -> Restored:
        """Connect again after the connection has ended, and bring back mappings and interrupts.

        The server of before must have closed its end, as a process that ends does: otherwise its
        device could still reach memory.

        Args:
            wait: Seconds to go on trying while there is no server.

        Returns:
            What was brought back. Registers are as after power-on.

        Raises:
            DeviceError: There is no server, or its device is another one, or it refuses what the
                one before had. The client is as before, and this may be called again.
            ServerGoneError: The old server has not let go, or the new one is gone, too.
            ValueError: The client is closed, or still connected.
        """
        seconds = check_seconds(wait, "wait")
        with self._changed:
            by_itself = self._restarting is not None or self._restored is not None
        if by_itself:
            return self.wait_restart(seconds)
        return self._reconnect(seconds, automatic=False)

    def _reconnect(self, wait: float, *, automatic: bool) -> Restored:
        until = time.monotonic() + wait
        while True:
            self._check_open()
            old = self._life.exchange
            if (failure := old.failure) is None:
                raise ValueError(f"{self.address} is still connected")
            try:
                if not old.wait_hang_up(max(until - time.monotonic(), 0)):
                    raise ServerGoneError(f"{failure}, and holds memory: end its process")
                try:
                    connected = self._connect(until)
                except DeviceError as error:
                    if automatic:
                        raise ServerGoneError(str(error)) from None
                    raise
                return self._resume(connected, automatic=automatic)
            except ServerGoneError:
                # It died again; the next one may be better.
                if time.monotonic() >= until or self._stopping.wait(_CONNECT_PAUSE):
                    raise

    def _resume(self, connected: socket.socket, *, automatic: bool) -> Restored:
        begun = False
        try:
            with self._operation() as old:
                begun = True
                life = self._begin(connected)
                try:
                    if life.facts != old.facts:
                        raise DeviceError(
                            f"{self.address} has another device now: make a new client of it"
                        )
                    restored = self._replay(life)
                except BaseException:
                    life.close()
                    raise
                with self._changed:
                    self._restored = restored if automatic else None
                    self._restart_error = None
                    self._life = life
        finally:
            if not begun:
                # The client was closed meanwhile.
                _close_socket(connected)
            self._candidate = None
        old.close()
        self._look_after()
        return restored

    def _replay(self, life: Life) -> Restored:
        try:
            for mapping in self._mapped.all():
                if mapping.unwanted:
                    # The server that had it is gone.
                    self._mapped.remove(mapping)
                else:
                    life.ask(Command.DMA_MAP, *mapping.message())
            restored = 0
            for kind, events in self._events.items():
                _set_triggers(life, kind, events)
                restored += sum(event >= 0 for event in events)
            for (kind, vector, action), event in self._mask_events.items():
                _set_irqs(life, IrqSet.DATA_EVENTFD | action, kind, vector, 1, [event])
            for kind, vectors in self._masked.items():
                for vector in vectors:
                    _set_irqs(life, IrqSet.DATA_NONE | IrqSet.MASK, kind, vector, 1)
        except RefusalError as error:
            raise DeviceError(
                f"{self.address} refuses what it had before: {error}; make a new client of it"
            ) from None
        return Restored(len(self._mapped), restored)

    def wait_restart(self, timeout: float) -> Restored:
        """Wait until the client has connected again by itself; the driver begins again after that.

        Returns:
            What was brought back. Registers are as after power-on.

        Raises:
            ServerGoneError: No server was there within ``timeout``, or within ``reconnect_for``.
            DeviceError: There is one, which has another device, or refuses what it had before.
            ValueError: The client was not told to connect again, or is closed.
        """
        seconds = check_seconds(timeout, "timeout")
        if not self._reconnect_for:
            raise ValueError("the client does not connect again by itself: see reconnect_for")
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._closed or self._restored is not None or self._restart_error is not None
                ),
                seconds,
            )
            if self._closed:
                raise ValueError(f"device {self.address} is closed")
            if self._restored is not None:
                restored, self._restored = self._restored, None
                return restored
            if self._restart_error is not None:
                error = self._restart_error
                raise type(error)(str(error))
        raise self._life.exchange.failure or ServerGoneError(f"{self.address} was not restarted")

    @property
    def state_fd(self) -> int:
        """An eventfd for a loop: signalled when the server is gone, and when that has changed.

        A driver that waits for an interrupt of a server that is gone would wait for ever.
        """
        return self._state_fd

    def fileno(self) -> int:
        """The connection's descriptor.

        Raises:
            ValueError: The client is closed.
        """
        self._check_open()
        return self._life.exchange.fileno()

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._closed

    @property
    def failure(self) -> ServerGoneError | None:
        """What ended the connection, or None while it lives. From any thread, without waiting."""
        return self._life.exchange.failure

    @property
    def limits(self) -> Limits:
        """What the server takes, as negotiated."""
        return self._life.limits

    @property
    def served_bytes(self) -> int:
        """Bytes of memory that servers have read and written by message."""
        return self._mapped.served

    @property
    def served_requests(self) -> int:
        """Messages in which they did."""
        return self._mapped.requests

    def close(self) -> None:
        """Hang up. Areas that were mapped stay mapped. Calling it again does nothing."""
        if self._closed:
            return
        with self._changed:
            self._closed = True
            self._stopping.set()
            self._changed.notify_all()
            restarting = self._restarting
        if (candidate := self._candidate) is not None:
            candidate.fail("the client was closed")
        if restarting is not None and restarting is not threading.current_thread():
            restarting.join()
        with self._operations:
            self._life.close()
            self._mapped.clear()
            for events in self._events.values():
                _close_all(events)
            self._events.clear()
            _close_all(list(self._mask_events.values()))
            self._mask_events.clear()
        close_fd(self._state_fd)

    def __del__(self) -> None:
        if not self._closed:
            self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"device {self.address} is closed")

    @contextmanager
    def _operation(self) -> Iterator[Life]:
        """What changes the state of the server is done one at a time."""
        with self._operations:
            self._check_open()
            yield self._life

    def _accessible(self) -> Life:
        """The connection for an access to the device."""
        self._check_open()
        if self._restored is not None:
            raise DeviceRestartedError(
                f"{self.address} was restarted: call wait_restart(), and set the device up again"
            )
        return self._life

    # The device

    def region(self, index: int) -> ClientRegion:
        """A region by its number; see :meth:`~guestio.dma.PciFunction.region`."""
        if not 0 <= check_int(index, "index") < len(self._regions):
            raise ValueError(f"{self.address} has {len(self._regions)} regions, no number {index}")
        return self._regions[index]

    def bar(self, number: int) -> ClientRegion:
        """Base address register ``number``, 0 to 5; see :meth:`~guestio.dma.PciFunction.bar`."""
        if not 0 <= number < 6:
            raise ValueError(f"BAR {number} is not in [0, 6)")
        return self.region(number)

    @property
    def config(self) -> ClientRegion:
        """The configuration space."""
        return self.region(CONFIG_REGION)

    def reset(self) -> None:
        """Put the device into the state it has after power-on. Its eventfds stay.

        Raises:
            DeviceError: It cannot be reset, or the server refuses.
            ServerGoneError: The connection has ended.
        """
        if not self.can_reset:
            raise DeviceError(f"{self.address} offers no reset")
        with self._operation():
            try:
                self._accessible().ask(Command.DEVICE_RESET)
            except RefusalError as error:
                raise DeviceError(f"cannot reset {self.address}: {error}") from None
            self._masked.clear()

    def interrupts(self, kind: int) -> InterruptInfo:
        """What the device offers of a kind of interrupt; see :class:`~guestio.dma.PciFunction`."""
        facts = self._irqs(kind)
        return InterruptInfo(
            facts.vectors,
            bool(facts.flags & IrqFlag.EVENTFD),
            bool(facts.flags & IrqFlag.AUTOMASKED),
        )

    def _irqs(self, kind: int) -> IrqFacts:
        self._check_open()
        if not 0 <= check_int(kind, "kind") < len(self._life.irqs):
            raise DeviceError(f"{self.address} has no interrupts of kind {kind_name(kind)}")
        return self._life.irqs[kind]

    def enable_interrupts(self, kind: int, eventfds: Sequence[int]) -> None:
        """Let interrupts of a kind signal eventfds; see :class:`~guestio.dma.PciFunction`.

        Those that were enabled before and are not named are so no more. The client keeps
        descriptors of its own, for a server that is restarted.

        Raises:
            DeviceError: The device does not have so many, or the server refuses; what was enabled
                before still is.
            ServerGoneError: The connection has ended.
        """
        facts = self._irqs(kind)
        if not eventfds:
            self.disable_interrupts(kind)
            return
        if len(eventfds) > facts.vectors or not facts.flags & IrqFlag.EVENTFD:
            raise DeviceError(
                f"{self.address} has {facts.vectors} interrupts of kind {kind_name(kind)}, not "
                f"{len(eventfds)}"
            )
        if not self._life.limits.max_fds:
            raise DeviceError(f"{self.address} takes no descriptors, and so no eventfds")
        events: list[int] = []
        try:
            # Those made before one fails are in the list.
            events.extend(-1 if fd < 0 else own_fd(fd, "an eventfd") for fd in eventfds)
            self._enable(kind, events)
        except BaseException:
            _close_all(events)
            raise

    def _enable(self, kind: int, events: list[int]) -> None:
        with self._operation() as life:
            before = self._events.get(kind, [])
            try:
                _set_triggers(life, kind, events + [-1] * (len(before) - len(events)))
            except RefusalError as error:
                self._take_back(life, kind, before)
                raise DeviceError(
                    f"cannot set up {len(events)} interrupts of kind {kind_name(kind)} of "
                    f"{self.address}: "
                    f"{error}"
                ) from None
            self._events[kind] = events
            _close_all(before)

    def _take_back(self, life: Life, kind: int, before: list[int]) -> None:
        """Have a kind be as before after some of its interrupts were changed."""
        try:
            _set_irqs(life, IrqSet.DATA_NONE | IrqSet.TRIGGER, kind, 0, 0)
            _set_triggers(life, kind, before)
        except RefusalError as error:
            life.broken(f"it refuses interrupts that it had: {error}")

    def disable_interrupts(self, kind: int) -> None:
        """Disable all interrupts of a kind.

        Raises:
            DeviceError: The server refuses.
            ServerGoneError: The connection has ended.
        """
        self._irqs(kind)
        with self._operation() as life:
            self._act(life, IrqSet.TRIGGER, kind, 0, 0)
            _close_all(self._events.pop(kind, []))
            self._masked.pop(kind, None)
            for key in [key for key in self._mask_events if key[0] == kind]:
                close_fd(self._mask_events.pop(key))

    def mask_interrupt(self, kind: int, vector: int = 0) -> None:
        """Keep an interrupt pending until it is unmasked.

        Raises:
            DeviceError: There is no such interrupt, or the server refuses.
            ServerGoneError: The connection has ended.
        """
        self._check_vector(kind, vector)
        with self._operation() as life:
            self._act(life, IrqSet.MASK, kind, vector, 1)
            self._masked.setdefault(kind, set()).add(vector)

    def unmask_interrupt(self, kind: int, vector: int = 0) -> None:
        """Let an interrupt fire again: one that was masked, or an automasked one (``INTX``).

        Raises: as :meth:`mask_interrupt`.
        """
        self._check_vector(kind, vector)
        with self._operation() as life:
            self._act(life, IrqSet.UNMASK, kind, vector, 1)
            self._masked.get(kind, set()).discard(vector)

    def unmask_by(self, kind: int, eventfd: int, vector: int = 0) -> None:
        """Have an interrupt unmasked each time that an eventfd is signalled.

        That is what KVM's resample eventfd of ``INTX`` is for.

        Args:
            kind: Which kind.
            eventfd: The eventfd, which stays the caller's and is read by the server; -1 for none.
            vector: Which interrupt of the kind.

        Raises: as :meth:`mask_interrupt`.
        """
        self._mask_by(int(IrqSet.UNMASK), kind, eventfd, vector)

    def mask_by(self, kind: int, eventfd: int, vector: int = 0) -> None:
        """Have an interrupt masked each time that an eventfd is signalled; see :meth:`unmask_by`.

        After a restart of the server the interrupt is not masked.
        """
        self._mask_by(int(IrqSet.MASK), kind, eventfd, vector)

    def _mask_by(self, action: int, kind: int, eventfd: int, vector: int) -> None:
        self._check_vector(kind, vector)
        event = -1 if eventfd < 0 else own_fd(eventfd, "an eventfd")
        try:
            with self._operation() as life:
                fds = [event] if event >= 0 else []
                try:
                    _set_irqs(life, IrqSet.DATA_EVENTFD | action, kind, vector, 1, fds)
                except RefusalError as error:
                    raise DeviceError(
                        f"interrupt {vector} of kind {kind_name(kind)} of {self.address} cannot be "
                        "masked by "
                        f"an eventfd: {error}"
                    ) from None
                key = kind, vector, action
                before = self._mask_events.pop(key, -1)
                if event >= 0:
                    self._mask_events[key] = event
                _close_all([before])
        except BaseException:
            _close_all([event])
            raise

    def trigger_interrupt(self, kind: int, vector: int = 0) -> None:
        """Have an interrupt's eventfd signalled as if by the device, as a test does.

        Raises: as :meth:`mask_interrupt`.
        """
        self._check_vector(kind, vector)
        with self._operation() as life:
            self._act(life, IrqSet.TRIGGER, kind, vector, 1)

    def _check_vector(self, kind: int, vector: int) -> None:
        if not 0 <= check_int(vector, "vector") < self._irqs(kind).vectors:
            raise DeviceError(f"{self.address} has no interrupt {vector} of kind {kind_name(kind)}")

    def _act(self, life: Life, action: int, kind: int, start: int, count: int) -> None:
        try:
            _set_irqs(life, IrqSet.DATA_NONE | action, kind, start, count)
        except RefusalError as error:
            raise DeviceError(
                f"cannot change interrupt {start} of kind {kind_name(kind)} of {self.address}: "
                f"{error}"
            ) from None


def _set_irqs(
    life: Life, flags: int, kind: int, start: int, count: int, fds: Sequence[int] = ()
) -> None:
    payload = SET_IRQS.pack(SET_IRQS.size, flags, kind, start, count)
    life.ask(Command.DEVICE_SET_IRQS, payload, fds)


def _set_triggers(life: Life, kind: int, events: Sequence[int]) -> None:
    """Set the eventfds of the first interrupts of a kind; -1 for none."""
    most = life.limits.max_fds
    start = 0
    while start < len(events):
        end = start + 1
        there = events[start] >= 0
        while (
            end < len(events) and (events[end] >= 0) == there and (not there or end - start < most)
        ):
            end += 1
        flags = IrqSet.DATA_EVENTFD | IrqSet.TRIGGER
        _set_irqs(life, flags, kind, start, end - start, events[start:end] if there else ())
        start = end


def _close_socket(sock: socket.socket) -> None:
    """Close a socket, which is closed also if that fails."""
    close_fd(sock.detach())


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        if fd >= 0:
            close_fd(fd)
