"""A console device (virtio 1.4, section 5.3): a terminal and named ports of a guest.

Every port is a stream in both directions. What the guest writes goes to a descriptor or a callback;
what comes from a descriptor, or from :meth:`ConsolePort.send`, goes into the buffers that the guest
has made available. Nothing is read or taken before there is room for it: a guest that does not read
stops its writer, and a reader that does not read stops the guest, or loses output if it is a
console, whose Linux driver spins while it waits.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import struct
import threading
import time
import tty
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, Literal

from guestio._core.virtio.chain import Chain
from guestio.addr import check_int
from guestio.budgets import (
    CONSOLE_INPUT,
    CONSOLE_OUTPUT,
    CONSOLE_PATIENCE,
    CONTROL_TURN,
    DEVICE_STATE,
    TURN_SECONDS,
)
from guestio.errors import DeviceError, GuestioError
from guestio.memory.backing import close_fd
from guestio.virtio import saved
from guestio.virtio.device import Device, DeviceId

if TYPE_CHECKING:
    from guestio.virtio.host import DeviceHost
    from guestio.virtio.loop import Timer
    from guestio.virtio.queue import DeviceQueue

F_SIZE: Final = 1 << 0
F_MULTIPORT: Final = 1 << 1

DEVICE_READY: Final = 0
DEVICE_ADD: Final = 1
PORT_READY: Final = 3
CONSOLE_PORT: Final = 4
RESIZE: Final = 5
PORT_OPEN: Final = 6
PORT_NAME: Final = 7

_SENT: Final = frozenset({DEVICE_ADD, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME})
"""Control messages of the device to its driver."""

CONTROL_RECEIVE: Final = 2
CONTROL_TRANSMIT: Final = 3

_CONFIG: Final = struct.Struct("<HHII")  # cols, rows, max_nr_ports, emerg_wr
_CONTROL: Final = struct.Struct("<IHH")  # id, event, value
_SIZE: Final = struct.Struct("<HH")  # cols, rows
_READ: Final = 4096
_MAX_NAME: Final = 128

ACCEPT_PAUSE: Final = 0.25
"""Seconds until the next attempt if a client cannot be accepted, for want of descriptors say."""


class _Stream:
    """Descriptors that a port reads from and writes to, neither of which makes the loop wait.

    Args:
        port: Is called when there is something to do.
        reading: Read from; None for nothing.
        writing: Written to; None for nothing.
        owned: Descriptors that are closed at the end.
        ended: Called once when the other end is gone.
        hang_up: A byte that ends the stream when it is read, as if the other end was gone.
    """

    def __init__(
        self,
        port: ConsolePort,
        host: DeviceHost,
        reading: int | None,
        writing: int | None,
        owned: Iterable[int],
        ended: Callable[[], object] | None,
        hang_up: int | None,
    ) -> None:
        self._port = port
        self._host = host
        self._reading = reading
        self._writing = writing
        self._owned = list(owned)
        self._ended = ended
        self._hang_up = hang_up
        self._watched = False
        self._poller: select.epoll | None = None
        self._waiting = False
        self.closed = False

    def resume(self) -> None:
        """Have the port called when there is something to read."""
        if self._watched or self._reading is None:
            return
        try:
            self._host.add_reader(self._reading, self._port.readable)
            self._watched = True
        except PermissionError:
            # A regular file is always readable, and epoll does not take it.
            self._port.schedule("read")

    def pause(self) -> None:
        """Leave unread what there is to read."""
        if self._watched and self._reading is not None:
            self._host.remove_reader(self._reading)
            self._watched = False

    def read(self) -> bytes:
        """What there is to read, up to a page; b"" for nothing."""
        if self._reading is None:
            return b""
        try:
            data = os.read(self._reading, _READ)
        except (BlockingIOError, InterruptedError):
            return b""
        except OSError:
            data = b""
        end = len(data) if self._hang_up is None else data.find(self._hang_up)
        if not data or 0 <= end < len(data):
            self.end(keep_writing=not data)
        return data if end < 0 else data[:end]

    def write(self, data: bytes) -> int:
        """Write; how much. 0: the port is called when there is room again."""
        if self._writing is None:
            return len(data)
        try:
            return os.write(self._writing, data)
        except (BlockingIOError, InterruptedError):
            self._wait()
            return 0
        except OSError:
            self.end()
            return len(data)

    def _wait(self) -> None:
        if self._waiting or self._writing is None:
            return
        if self._poller is None:
            # Of its own: the loop waits for what is readable, which this becomes with room.
            self._poller = select.epoll()
            self._poller.register(self._writing, select.EPOLLOUT)
        self._waiting = True
        self._host.add_reader(self._poller.fileno(), self._writable)

    def _writable(self) -> None:
        self._stop_waiting()
        self._port.writable()

    def _stop_waiting(self) -> None:
        if self._waiting and self._poller is not None:
            self._host.remove_reader(self._poller.fileno())
        self._waiting = False

    def gone(self) -> bool:
        """Whether the other end has hung up, as far as is known without reading."""
        if self._reading is None:
            return False
        poll = select.poll()
        poll.register(self._reading, select.POLLRDHUP)
        return bool(poll.poll(0))

    def end(self, *, keep_writing: bool = False) -> None:
        """The other end is gone: let the port know, unless it may still be written to.

        Args:
            keep_writing: Whether the input alone has ended. A separate output goes on then.
        """
        if keep_writing and self._writing is not None and self._writing != self._reading:
            self.pause()
            self._reading = None
            return
        if not self.closed:
            ended = self._ended
            self._port.drop(self)
            if ended is not None:
                ended()

    def close(self) -> None:
        """Watch nothing any more and close what is owned."""
        if self.closed:
            return
        self.closed = True
        self.pause()
        self._stop_waiting()
        if self._poller is not None:
            self._poller.close()
        self._reading = self._writing = None
        for fd in self._owned:
            close_fd(fd)
        self._owned.clear()


class ConsolePort:
    """One stream of a :class:`ConsoleDevice`, in both directions.

    Attributes:
        number: Its number in the device.
        name: What the guest calls it (``/dev/virtio-ports/NAME`` with udev); may be empty.
        console: Whether it is a terminal of the guest (``/dev/hvcN``).
        lost: Bytes of output that were dropped: nothing was attached, or its reader took nothing.

    Threads: :meth:`send` from any; the others before the device is served, or in the loop's thread
    (``host.call_soon_threadsafe``).
    """

    def __init__(self, device: ConsoleDevice, number: int, name: str, *, console: bool) -> None:
        self.number = number
        self.name = name
        self.console = console
        self.lost = 0
        self._device = device
        self._receive = 0 if not number else 2 + 2 * number
        self._transmit = self._receive + 1
        self._lock = threading.Lock()
        self._in = bytearray()
        self._along = 0  # bytes of it that a state has, which may come back with its guest
        self._out = b""
        self._chain: Chain | None = None
        self._offset = self._total = 0
        self._stream: _Stream | None = None
        self._starting: Callable[[DeviceHost], None] | None = None
        self._listener: socket.socket | None = None
        self._callback: Callable[[bytes], object] | None = None
        self._scheduled: set[str] = set()
        self._impatient: Timer | None = None
        self._dropping = False
        self.ready = False
        self.guest_open = False

    def __repr__(self) -> str:
        kind = "console" if self.console else "port"
        return f"<ConsolePort {self.number} {self.name!r}: {kind}, {self.lost} bytes lost>"

    @property
    def connected(self) -> bool:
        """Whether there is anything on this side: descriptors, a client or a callback."""
        return self._stream is not None or self._callback is not None

    def send(self, data: bytes) -> int:
        """Send bytes to the guest.

        Returns:
            How many of them were taken: 64 KiB may wait for a guest that does not read.

        Threads: from any.
        """
        with self._lock:
            taken = data[: max(CONSOLE_INPUT - len(self._in), 0)]
            self._in += taken
        self.schedule("deliver")
        return len(taken)

    def on_output(self, callback: Callable[[bytes], object] | None) -> None:
        """Have what the guest writes handed to a function, up to 64 KiB at a time.

        It is called in the loop's thread and should return at once; what it raises is logged.
        """
        self._callback = callback
        self._device.port_changed(self)

    def attach(
        self,
        reading: int | None,
        writing: int | None,
        *,
        owned: Sequence[int] = (),
        ended: Callable[[], object] | None = None,
        hang_up: int | None = None,
    ) -> None:
        """Connect the port to descriptors, instead of those before.

        Args:
            reading: What is read here goes to the guest. None for nothing. At its end the output
                goes on, unless it is the same descriptor.
            writing: What the guest writes goes here; should not block. None drops it.
            owned: Descriptors that the port closes when it is done with them.
            ended: Called in the loop's thread when the other end is gone.
            hang_up: A byte that, when it is read, ends the connection.
        """

        def start(host: DeviceHost) -> None:
            self.detach()
            self._starting = start
            self._stream = _Stream(self, host, reading, writing, owned, ended, hang_up)
            self._stream.resume()
            self._dropping = False
            self._device.port_changed(self)
            self.writable()

        self._starting = start
        if self._device.host is not None:
            start(self._device.host)

    def detach(self) -> None:
        """Disconnect the port from its descriptors."""
        self._starting = None
        if self._stream is not None:
            self.drop(self._stream)

    def listen(self, listener: socket.socket) -> None:
        """Connect the port to one client of a listening socket after the other.

        Args:
            listener: Owned by the port from here on.
        """
        listener.setblocking(False)
        self._listener = listener
        if self._device.host is not None:
            self._device.host.add_reader(listener.fileno(), self._accept)

    def open_pty(self) -> str:
        """Connect the port to a new pseudoterminal; its path."""
        master, slave = os.openpty()
        try:
            tty.setraw(slave)
            os.set_blocking(master, False)
            path = os.ttyname(slave)
        except BaseException:
            close_fd(master)
            close_fd(slave)
            raise
        # The other end stays open here: a master without one would be readable for ever.
        self.attach(master, master, owned=(master, slave))
        return path

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            self._device.report("port %d: a client cannot be accepted: %s", self, error)
            self._pause_accepting()
            return
        if self._stream is not None and not self._stream.gone():
            self._device.report("port %d: a client is refused: another one is connected", self)
            client.close()
            return
        client.setblocking(False)
        fd = client.detach()
        self.attach(fd, fd, owned=(fd,))

    def _pause_accepting(self) -> None:
        """Look for clients later: there is no descriptor for one now, say."""
        host, listener = self._device.host, self._listener
        assert host is not None
        assert listener is not None
        host.remove_reader(listener.fileno())

        def go_on() -> None:
            if self._listener is not None:
                host.add_reader(self._listener.fileno(), self._accept)

        host.call_later(ACCEPT_PAUSE, go_on)

    # Called by the device, the stream and the loop, in the loop's thread.

    def begin(self, host: DeviceHost) -> None:
        """Begin with a host."""
        host.queue(self._receive).on_available(self._buffers_available)
        host.queue(self._transmit).on_available(lambda: self.schedule("pump"))
        if self._starting is not None:
            self._starting(host)
        if self._listener is not None:
            host.add_reader(self._listener.fileno(), self._accept)

    def _buffers_available(self) -> None:
        self._device.tell_size(self, 0)
        self.schedule("deliver")

    def drop(self, stream: _Stream) -> None:
        """Have nothing to do with a stream any more."""
        stream.close()
        if self._stream is stream:
            self._stream = self._starting = None
            self._device.port_changed(self)
            self.schedule("pump")

    def close(self) -> None:
        """Close everything."""
        self.detach()
        if self._listener is not None:
            if self._device.host is not None:
                self._device.host.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def reset(self) -> None:
        """Forget what the driver said; what it wrote before is written on."""
        self.ready = self.guest_open = False
        self._chain = None

    def waiting_input(self) -> bytes:
        """Input that the guest has not taken, and takes along if it moves."""
        with self._lock:
            self._along = len(self._in)
            return bytes(self._in)

    def put_before(self, data: bytes) -> None:
        """Have a guest that arrives get what it brings before what has come here.

        What it took along when it was here before is not for it again.
        """
        with self._lock:
            self._in[: self._along] = data
            self._along = 0

    def uses(self, queue: int) -> bool:
        """Whether a queue is this port's output."""
        return queue == self._transmit

    def stopping(self) -> None:
        """Let go of the buffer that is being written out."""
        chain, self._chain = self._chain, None
        if chain is None:
            return
        left = self._total - self._offset
        if left <= CONSOLE_OUTPUT:
            with contextlib.suppress(GuestioError):
                self._out += chain.readable.read(self._offset, left)
                left = 0
        self.lost += left
        self._device.queue(self._transmit).complete(chain, 0)

    def schedule(self, what: Literal["read", "deliver", "pump"]) -> None:
        """Have something done soon, in the loop's thread, once for all that ask for it."""
        host = self._device.host
        if host is None or what in self._scheduled:
            return
        self._scheduled.add(what)

        def run() -> None:
            # Before it is done: what comes meanwhile asks again.
            self._scheduled.discard(what)
            if what == "pump":
                self._pump()
            elif what == "deliver":
                self._deliver()
            else:
                self.readable()

        host.call_soon_threadsafe(run)

    def readable(self) -> None:
        """Take input that has come."""
        stream = self._stream
        if stream is not None:
            with self._lock:
                full = len(self._in) >= CONSOLE_INPUT
            data = b"" if full else stream.read()
            with self._lock:
                self._in += data
        self._deliver()

    def _deliver(self) -> None:
        """Put input into buffers of the guest."""
        until = time.monotonic() + TURN_SECONDS
        while self._in and self._device.listens(self):
            queue = self._device.queue(self._receive)
            chain = queue.take()
            if chain is None:
                break
            with self._lock:
                data = bytes(self._in[: chain.writable.total])
            try:
                chain.writable.write(data)
            except GuestioError as error:
                self._device.report("port %d: a buffer cannot be written: %s", self, error)
                data = b""
            with self._lock:
                del self._in[: len(data)]
                self._along = max(self._along - len(data), 0)
            queue.complete(chain, len(data))
            if time.monotonic() >= until:
                self.schedule("deliver")
                break
        if self._stream is not None:
            if self._in:
                self._stream.pause()
            else:
                self._stream.resume()

    def writable(self) -> None:
        """Go on with output: there is room for it, or another reader."""
        self._dropping = False
        self._have_patience()
        self.schedule("pump")

    def _have_patience(self) -> None:
        timer, self._impatient = self._impatient, None
        if timer is not None:
            timer.cancel()

    def _pump(self) -> None:
        """Write out what the guest has written, and take more of it."""
        until = time.monotonic() + TURN_SECONDS
        while self._write_out():
            data = self._next_output()
            if data is None:
                return
            self._out = data
            if time.monotonic() >= until:
                self.schedule("pump")
                return

    def _write_out(self) -> bool:
        """Write what was taken; whether nothing of it is left."""
        if self._out and self._callback is not None:
            data, self._out = self._out, b""
            self._device.call(self._callback, data)
        while self._out:
            stream = self._stream
            if stream is None or self._dropping:
                self.lost += len(self._out)
                self._out = b""
                break
            count = stream.write(self._out)
            if not count:
                self._lose_patience_later()
                return False
            self._have_patience()
            self._out = self._out[count:]
        return True

    def _lose_patience_later(self) -> None:
        host = self._device.host
        if self.console and self._impatient is None and host is not None:
            self._impatient = host.call_later(CONSOLE_PATIENCE, self._lose_patience)

    def _lose_patience(self) -> None:
        self._impatient = None
        self._dropping = True
        self._device.report(
            "port %d: its reader has taken nothing for %g s; output is dropped until it does",
            self,
            CONSOLE_PATIENCE,
        )
        self.schedule("pump")

    def _next_output(self) -> bytes | None:
        """More of what the guest has written; None if it has written nothing."""
        queue = self._device.queue(self._transmit)
        chain = self._chain
        if chain is None:
            chain = queue.take()
            if chain is None:
                return None
            # Once it is given up, for a translation that is gone, it has no bytes any more.
            self._offset, self._total = 0, chain.readable.total
            self._device.tell_size(self, 1)
        total = self._total
        try:
            data = chain.readable.read(self._offset, min(CONSOLE_OUTPUT, total - self._offset))
        except GuestioError as error:
            self._device.report("port %d: output is lost: %s", self, error)
            data, self._offset = b"", total
        self._offset += len(data)
        self._chain = chain if self._offset < total else None
        if self._chain is None:
            queue.complete(chain, 0)
        return data


class ConsoleDevice(Device):
    """A terminal for a guest, and named ports beside it.

    Args:
        ports: Names of more ports after the first, ``/dev/virtio-ports/NAME`` in a Linux guest with
            udev. With any, VIRTIO_CONSOLE_F_MULTIPORT is offered; a driver that does not accept it
            has the console alone.
        size: Columns and rows of the terminal.
        name: Of the first port, with MULTIPORT.

    Attributes:
        ports: All ports; the first is the console.

    Raises:
        ValueError: A name is empty, too long or used twice, or the size is not in 0..65535.

    Threads: :meth:`resize` from any. Queues 0 and 1 are the console's; 2 and 3 carry control
    messages; each port more has two.
    """

    device_id = DeviceId.CONSOLE

    def __init__(
        self,
        ports: Iterable[str] = (),
        *,
        size: tuple[int, int] = (80, 25),
        name: str = "console",
    ) -> None:
        names = [name, *ports]
        for each in names:
            if not isinstance(each, str) or not 0 < len(each.encode()) <= _MAX_NAME or "\0" in each:
                raise ValueError(f"port name {each!r} is not a text of 1 to {_MAX_NAME} bytes")
        if len(set(names)) < len(names):
            raise ValueError(f"port names {names} are not all different")
        self._size = _check_size(*size)
        self._lock = threading.Lock()
        self._pending: dict[tuple[int, int], bytes] = {}
        self._flushing = False
        self._told: set[int] = set()
        self._multiport = False
        self.host: DeviceHost | None = None
        self.ports = tuple(
            ConsolePort(self, number, each, console=not number) for number, each in enumerate(names)
        )
        several = len(names) > 1
        # Input is a text of twice its length in a state.
        self.max_state = DEVICE_STATE + 2 * CONSOLE_INPUT * len(names)
        # Who saved a state: the input that waits is still there when a pause is over.
        self._origin = os.urandom(8)
        self.num_queues = 2 + 2 * len(names) if several else 2
        self.device_queues = frozenset(range(self.num_queues)) - {CONTROL_TRANSMIT}
        self.features = F_SIZE | (F_MULTIPORT if several else 0)

    def resize(self, cols: int, rows: int) -> None:
        """Tell the guest another size of the terminal.

        Raises:
            ValueError: They are not in 0..65535.

        Threads: from any.
        """
        self._size = _check_size(cols, rows)
        self._tell_size_again()

    def _tell_size_again(self) -> None:
        if self.host is not None:
            self.host.config_changed()
        if self._multiport and self.ports[0].ready:
            self._post(0, RESIZE, 0, _SIZE.pack(*self._size))

    def config(self) -> bytes:
        """See :class:`Device`."""
        return _CONFIG.pack(*self._size, len(self.ports), 0)

    def attached(self, host: DeviceHost) -> None:
        """See :class:`Device`."""
        self.host = host
        for port in self.ports:
            port.begin(host)
        if len(self.ports) > 1:
            host.queue(CONTROL_RECEIVE).on_available(self._flush_soon)

    def negotiated(self, features: int) -> None:
        """See :class:`Device`."""
        self._multiport = bool(features & F_MULTIPORT)

    def reset(self) -> None:
        """See :class:`Device`."""
        self._multiport = False
        self._told.clear()
        with self._lock:
            self._pending.clear()
        for port in self.ports:
            port.reset()

    def save(self) -> bytes:
        """What the driver said of its ports, and what waits for it; see :class:`Device`.

        What the guest wrote is not part of it: that is written out where it was taken.
        """
        with self._lock:
            pending = [saved.text(message) for message in self._pending.values()]
        return saved.pack(
            ports=[port.name for port in self.ports],
            multiport=self._multiport,
            ready=[port.ready for port in self.ports],
            open=[port.guest_open for port in self.ports],
            input=[saved.text(port.waiting_input()) for port in self.ports],
            pending=pending,
            origin=saved.text(self._origin),
        )

    def restore(self, state: bytes) -> None:
        """Take over the ports of a console with the same ones; see :class:`Device`.

        The driver is told the terminal's size here, and which ports something is connected to.
        """
        fields = saved.Fields(state)
        names, count = [port.name for port in self.ports], len(self.ports)
        there = fields.take("ports", saved.words)
        if there != names:
            raise DeviceError(f"the state is of a console with ports {there}; here are {names}")
        multiport = fields.take("multiport", saved.flag)
        ready, opened = (
            fields.take(name, lambda value: [saved.flag(each) for each in _just(value, count)])
            for name in ("ready", "open")
        )
        data = fields.take(
            "input",
            lambda value: [saved.data(each, CONSOLE_INPUT) for each in _just(value, count)],
        )
        pending = fields.take("pending", lambda value: _messages_of(value, count))
        origin = fields.take("origin", lambda value: saved.data(value, len(self._origin)))
        self._multiport = multiport
        for port, is_ready, is_open, waits in zip(self.ports, ready, opened, data, strict=True):
            port.ready, port.guest_open = is_ready, is_open
            if origin != self._origin:
                port.put_before(waits)
            port.schedule("deliver")
        with self._lock:
            self._pending.update(pending)
        for port in self.ports:
            self.port_changed(port)
        self._tell_size_again()

    def stopping(self, queue: int) -> None:
        """See :class:`Device`."""
        # The next driver begins without the size, and not every front-end resets before it.
        self._told.clear()
        for port in self.ports:
            if port.uses(queue):
                port.stopping()

    def process(self, queue: int, chain: Chain) -> int:
        """Take a control message; see :class:`Device`."""
        if chain.readable.total < _CONTROL.size:
            raise DeviceError(
                f"a control message of {chain.readable.total} bytes; it has {_CONTROL.size}"
            )
        number, event, value = _CONTROL.unpack(chain.readable.read(0, _CONTROL.size))
        if not self._multiport:
            raise DeviceError("a control message, but VIRTIO_CONSOLE_F_MULTIPORT is not negotiated")
        if event == DEVICE_READY:
            if value:
                for port in self.ports:
                    self._post(port.number, DEVICE_ADD, 1)
            return 0
        if number >= len(self.ports):
            raise DeviceError(f"control message {event} for port {number} of {len(self.ports)}")
        port = self.ports[number]
        if event == PORT_READY:
            port.ready = bool(value)
            if value:
                self._introduce(port)
        elif event == PORT_OPEN:
            port.guest_open = bool(value)
            port.schedule("deliver")
        else:
            raise DeviceError(f"control message {event} for port {number} is unknown")
        return 0

    def _introduce(self, port: ConsolePort) -> None:
        """Tell the driver what a port is."""
        if port.console:
            self._post(port.number, CONSOLE_PORT, 1)
            self._post(port.number, RESIZE, 0, _SIZE.pack(*self._size))
        self._post(port.number, PORT_NAME, 1, port.name.encode())
        self._post(port.number, PORT_OPEN, int(port.connected or port.console))

    def _post(self, number: int, event: int, value: int, more: bytes = b"") -> None:
        """Have a control message sent; one of the same kind that waits is replaced."""
        with self._lock:
            self._pending.pop((number, event), None)
            self._pending[number, event] = _CONTROL.pack(number, event, value) + more
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self.host is not None and not self._flushing:
            self._flushing = True
            self.host.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        """Send control messages as long as the driver has buffers for them."""
        self._flushing = False
        queue = self.queue(CONTROL_RECEIVE)
        for _ in range(CONTROL_TURN):
            with self._lock:
                if not self._pending:
                    return
                key, message = next(iter(self._pending.items()))
            chain = queue.take()
            if chain is None:
                return
            written = 0
            if chain.writable.total < len(message):
                self.report(
                    "port %d: the driver's buffer for control messages has %d bytes; %d are needed",
                    self.ports[key[0]],
                    chain.writable.total,
                    len(message),
                )
            else:
                with contextlib.suppress(GuestioError):
                    chain.writable.write(message)
                    written = len(message)
            if written:
                with self._lock:
                    if self._pending.get(key) is message:
                        del self._pending[key]
            queue.complete(chain, written)
        self._flush_soon()

    # Called by ports.

    def queue(self, index: int) -> DeviceQueue:
        """A queue of the device."""
        assert self.host is not None
        return self.host.queue(index)

    def tell_size(self, port: ConsolePort, event: int) -> None:
        """Tell a driver that has begun of the terminal's size, once for each sign of that.

        Linux does not ask for it when it begins (drivers/char/virtio_console.c): it waits for a
        change, and has no terminal to change before it has written to it.
        """
        if port.console and event not in self._told and self.host is not None:
            self._told.add(event)
            self.host.config_changed()

    def listens(self, port: ConsolePort) -> bool:
        """Whether the guest takes what is sent to a port."""
        return port.console or (self._multiport and port.guest_open)

    def port_changed(self, port: ConsolePort) -> None:
        """Tell the driver whether anything is connected to a port."""
        if self._multiport and port.ready and not port.console:
            self._post(port.number, PORT_OPEN, int(port.connected))

    def report(self, message: str, port: ConsolePort, *args: object) -> None:
        """Log what happened to a port."""
        if self.host is not None:
            self.host.log.report(f"{type(self).__name__}: {message}", port.number, *args)

    def call(self, callback: Callable[[bytes], object], data: bytes) -> None:
        """Call a user's function."""
        assert self.host is not None
        try:
            callback(data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self.host.log.report(
                "the on_output callback of %s raised %s: %s",
                type(self).__name__,
                type(error).__name__,
                error,
                trace=True,
            )

    def close(self) -> None:
        """Close what the ports own. Calling it again does nothing."""
        for port in self.ports:
            port.close()


def _just(value: object, count: int) -> list[object]:
    """The list of a saved state that has an entry for each port."""
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"not one for each of {count} ports")
    return value


def _messages_of(value: object, count: int) -> dict[tuple[int, int], bytes]:
    """The control messages of a saved state, each one that this device sends."""
    if not isinstance(value, list) or len(value) > count * len(_SENT):
        raise ValueError("not a list of control messages")
    found: dict[tuple[int, int], bytes] = {}
    for each in value:
        message = saved.data(each, _CONTROL.size + _MAX_NAME)
        if len(message) < _CONTROL.size:
            raise ValueError(f"a control message of {len(message)} bytes")
        number, event, _ = _CONTROL.unpack_from(message)
        if number >= count or event not in _SENT:
            raise ValueError(f"control message {event} for port {number}")
        found[number, event] = message
    return found


def _check_size(cols: int, rows: int) -> tuple[int, int]:
    for value, what in ((cols, "columns"), (rows, "rows")):
        if not 0 <= check_int(value, what) <= 0xFFFF:
            raise ValueError(f"{value} {what} are not in 0..65535")
    return cols, rows


def open_again(fd: int, mode: int) -> int:
    """Another descriptor of a file that does not block, without changing that for others.

    Args:
        fd: Of a terminal or pipe, for example standard input.
        mode: ``os.O_RDONLY`` or ``os.O_WRONLY``.

    Returns:
        A descriptor that is the caller's to close. Of a socket it is a copy that does not block,
        as ``fd`` does not any more either.
    """
    kind = os.fstat(fd).st_mode
    if stat.S_ISSOCK(kind):
        copy = os.dup(fd)
        os.set_blocking(copy, False)
        return copy
    if stat.S_ISREG(kind):
        return os.dup(fd)
    try:
        return os.open(f"/proc/self/fd/{fd}", mode | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        # A terminal of another user, after su.
        return os.dup(fd)
