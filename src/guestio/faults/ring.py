"""A split ring that is written by hand, and the notifications beside it.

A driver's ring keeps its rules; this one breaks them when it is told to. What the device puts into
the used ring is read as it is, and judged by the checks.

Source: virtio 1.4 section 2.7.
"""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from guestio.faults.outcomes import FailError, HungUpError, SilentError
from guestio.vhost_user.messages import FrontendRequest, VringAddr, VringFd, VringState

if TYPE_CHECKING:
    from guestio.faults.link import Link
    from guestio.faults.memory import Ram

NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4

_F = FrontendRequest
_DESC: Final = struct.Struct("<QIHH")
_USED: Final = struct.Struct("<II")
_TICK: Final = 0.002


class Desc(NamedTuple):
    """A descriptor, as it lies in a table."""

    address: int
    length: int
    flags: int = 0
    next: int = 0


@dataclass(slots=True)
class Buffer:
    """A request that was made available.

    Attributes:
        head: Its first descriptor.
        readable: What the device is to read: guest address and content of each piece.
        writable: What it may write: guest address and length of each piece.
        chain: All its descriptors in the ring's table.
        table: Guest address and content of its indirect table, if it has one.
        written: What the used ring says, once it is used.
    """

    head: int
    readable: list[tuple[int, bytes]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)
    chain: list[int] = field(default_factory=list)
    table: tuple[int, bytes] | None = None
    written: int | None = None

    @property
    def room(self) -> int:
        """Bytes that the device may write."""
        return sum(length for _, length in self.writable)


class Used(NamedTuple):
    """An entry of the used ring."""

    id: int
    length: int


class Queue:
    """A ring in guest memory, its eventfds, and the messages that start and stop it.

    Args:
        link: The connection.
        ram: Where it lies.
        index: Number of the queue.
        size: Entries.
        base: Available index that it begins with.
        shift: What is added to a guest address to make it one that the device knows; with an
            IOMMU that is what its translations are about.
        iommu: Whether ring addresses are such addresses as well, instead of user addresses.

    Attributes:
        desc: Guest address of the descriptor table.
        avail: Guest address of the available ring.
        used: Guest address of the used ring.
        offered: The available index that was published last.
        seen: The used index up to which entries were taken.
    """

    def __init__(
        self,
        link: Link,
        ram: Ram,
        index: int,
        size: int,
        *,
        base: int = 0,
        shift: int = 0,
        iommu: bool = False,
    ) -> None:
        self.link, self.ram, self.index, self.size = link, ram, index, size
        self.shift, self.iommu = shift, iommu
        self.desc = ram.take(16 * size, 4096)
        self.avail = ram.take(6 + 2 * size, 4096)
        self.used = ram.take(6 + 8 * size, 4096)
        ram.write(self.desc, bytes(16 * size))
        ram.write(self.avail, bytes(6 + 2 * size))
        ram.write(self.used, bytes(6 + 8 * size))
        self.base = self.offered = self.seen = base
        ram.store16(self.avail + 2, base)
        ram.store16(self.used + 2, base)
        self._free = list(range(size - 1, -1, -1))
        self.buffers: dict[int, Buffer] = {}
        self.kick_fd: int | None = _eventfd()
        self.call_fd: int | None = _eventfd()
        self.err_fd: int | None = _eventfd()
        self._owned = [self.kick_fd, self.call_fd, self.err_fd]

    def close(self) -> None:
        """Close the eventfds."""
        fds, self._owned = self._owned, []
        for fd in fds:
            os.close(fd)

    def new_eventfd(self) -> int:
        """Another eventfd, which lives as long as the queue."""
        self._owned.append(_eventfd())
        return self._owned[-1]

    # Messages

    @property
    def addresses(self) -> VringAddr:
        """Where it is, as SET_VRING_ADDR says it."""
        at = self.device_address if self.iommu else self.ram.user
        return VringAddr(self.index, 0, at(self.desc), at(self.used), at(self.avail))

    def device_address(self, address: int) -> int:
        """A guest address as the device knows it."""
        return address + self.shift & (1 << 64) - 1

    def set_fd(self, request: int, fd: int | None) -> None:
        """Send a kick, call or error descriptor, or that there is none."""
        self.link.do(
            request, VringFd(self.index, has_fd=fd is not None), [] if fd is None else [fd]
        )

    def set_up(self) -> None:
        """Tell the device all about it but the kick descriptor, which may start it."""
        self.link.do(_F.SET_VRING_NUM, VringState(self.index, self.size))
        self.link.do(_F.SET_VRING_BASE, VringState(self.index, self.base))
        self.link.do(_F.SET_VRING_ADDR, self.addresses)
        self.set_fd(_F.SET_VRING_ERR, self.err_fd)
        self.set_fd(_F.SET_VRING_CALL, self.call_fd)

    def start(self, *, enable: bool = True) -> None:
        """Set it up, hand over the kick descriptor, and enable it where that is negotiated."""
        self.set_up()
        self.set_fd(_F.SET_VRING_KICK, self.kick_fd)
        if enable and self.link.features >> 30 & 1:
            self.enable()

    def enable(self, value: int = 1) -> None:
        """Enable or disable it."""
        self.link.do(_F.SET_VRING_ENABLE, VringState(self.index, value))

    def stop(self) -> int:
        """Stop it; the available index that the device says.

        Raises:
            FailError: The reply is of another ring, or malformed.
        """
        reply = self.link.ask(_F.GET_VRING_BASE, VringState(self.index, 0))
        if len(reply.payload) != 8:
            raise FailError(f"the reply to GET_VRING_BASE has {len(reply.payload)} bytes, not 8")
        state = VringState.decode(reply.payload)
        if state.index != self.index:
            raise FailError(f"GET_VRING_BASE of ring {self.index} answered for {state.index}")
        return state.num

    def restart(self, base: int) -> None:
        """Start it again at an index."""
        self.base = base
        self.start()

    # The driver's areas

    def put(self, index: int, descriptor: Desc) -> None:
        """Write a descriptor into the table as it is."""
        self.ram.write(self.desc + 16 * index, _DESC.pack(*descriptor))

    def reserve(self, count: int) -> list[int]:
        """Take free descriptors.

        Raises:
            ValueError: There are not so many; a check that needs them is wrong.
        """
        if count > len(self._free):
            raise ValueError(f"ring {self.index} has no {count} free descriptors")
        return [self._free.pop() for _ in range(count)]

    def lay_out(
        self, readable: Sequence[bytes], writable: Sequence[int], align: int = 16
    ) -> tuple[list[Desc], Buffer]:
        """Put the pieces of a request into memory; descriptors for them, and what it is."""
        buffer = Buffer(-1)
        pieces: list[Desc] = []
        for data in readable:
            address = self.ram.place(data, align)
            buffer.readable.append((address, data))
            pieces.append(Desc(self.device_address(address), len(data)))
        for length in writable:
            address = self.ram.take(length, align)
            buffer.writable.append((address, length))
            pieces.append(Desc(self.device_address(address), length, WRITE))
        return pieces, buffer

    def post(
        self,
        readable: Sequence[bytes],
        writable: Sequence[int],
        *,
        indirect: bool = False,
        order: Sequence[int] | None = None,
        align: int = 16,
        publish: bool = True,
    ) -> Buffer:
        """Make a request available.

        Args:
            readable: The pieces that the device reads.
            writable: Lengths of the pieces that it writes.
            indirect: Whether the pieces are in an indirect table.
            order: Which free descriptors to use, for a chain whose order is not that of the table.
            align: Of each piece.
            publish: Whether the available index is moved; else with the next one.
        """
        pieces, buffer = self.lay_out(readable, writable, align)
        if indirect:
            table = b"".join(_DESC.pack(*each) for each in linked(pieces))
            address = self.ram.place(table)
            buffer.table = (address, table)
            pieces = [Desc(self.device_address(address), len(table), INDIRECT)]
        if order is None:
            order = self.reserve(len(pieces))
        else:
            self._free = [each for each in self._free if each not in order]
        for position, piece in enumerate(pieces):
            last = position + 1 == len(pieces)
            flags = piece.flags if last else piece.flags | NEXT
            following = 0 if last else order[position + 1]
            self.put(order[position], Desc(piece.address, piece.length, flags, following))
        buffer.chain = list(order[: len(pieces)])
        buffer.head = order[0]
        self.buffers[buffer.head] = buffer
        self.offer(buffer.head, publish=publish)
        return buffer

    def offer(self, *heads: int, publish: bool = True) -> None:
        """Write heads into the available ring, and move its index."""
        for head in heads:
            slot = self.avail + 4 + 2 * (self.offered % self.size)
            self.ram.write(slot, (head & 0xFFFF).to_bytes(2, "little"))
            self.offered = self.offered + 1 & 0xFFFF
        if publish:
            self.publish(self.offered)

    def publish(self, index: int) -> None:
        """Write the available index, whatever it is."""
        self.ram.store16(self.avail + 2, index & 0xFFFF)

    def set_avail_flags(self, value: int) -> None:
        """Write the flags of the available ring: 1 to be sent no notifications."""
        self.ram.store16(self.avail, value)

    def set_used_event(self, value: int) -> None:
        """Write the used index at which the driver wants to be notified."""
        self.ram.store16(self.avail + 4 + 2 * self.size, value & 0xFFFF)

    # The device's area

    @property
    def used_flags(self) -> int:
        """Flags of the used ring."""
        return self.ram.load16(self.used)

    @property
    def used_index(self) -> int:
        """The used index."""
        return self.ram.load16(self.used + 2)

    @property
    def avail_event(self) -> int:
        """The available index at which the device wants to be kicked."""
        return self.ram.load16(self.used + 4 + 8 * self.size)

    @property
    def ready(self) -> int:
        """How many entries of the used ring were not taken yet, modulo 2^16."""
        return self.used_index - self.seen & 0xFFFF

    def take_used(self) -> list[Used]:
        """The entries of the used ring that are new.

        Raises:
            FailError: There are more than the ring has.
        """
        count = self.ready
        if count > self.size:
            raise FailError(
                f"the used index went from {self.seen} to {self.used_index} in a ring of "
                f"{self.size} entries"
            )
        entries = []
        for _ in range(count):
            slot = self.used + 4 + 8 * (self.seen % self.size)
            entries.append(Used(*_USED.unpack(self.ram.read(slot, 8))))
            self.seen = self.seen + 1 & 0xFFFF
        return entries

    def settle(self, entry: Used) -> Buffer:
        """The request that a used entry is about, whose descriptors are free again.

        Raises:
            FailError: There is none, or the length is more than it has room for.
        """
        buffer = self.buffers.pop(entry.id, None)
        if buffer is None:
            raise FailError(f"used descriptor {entry.id}, which was not made available")
        if entry.length > buffer.room:
            raise FailError(f"says it wrote {entry.length} bytes into a buffer of {buffer.room}")
        buffer.written = entry.length
        self._free += reversed(buffer.chain)
        return buffer

    # Notifications

    def kick(self) -> None:
        """Notify the device."""
        if self.kick_fd is not None:
            os.eventfd_write(self.kick_fd, 1)

    def called(self, timeout: float) -> bool:
        """Wait so long for a notification of the device, and take it; whether one came."""
        assert self.call_fd is not None
        return take(self.call_fd, timeout)

    def failed(self, timeout: float = 0) -> bool:
        """Wait so long for the error descriptor, and take that; whether it was signaled."""
        return self.err_fd is not None and take(self.err_fd, timeout)

    def wait(self, count: int = 1, timeout: float = 1.0) -> list[Buffer]:
        """Wait until so many requests were used, in whatever order, and take them.

        Raises:
            FailError: An entry makes no sense, or the device says that the ring is broken.
            HungUpError: The connection was closed.
            SilentError: It took longer.
        """
        deadline = time.monotonic() + timeout
        done: list[Buffer] = []
        while True:
            done += [self.settle(entry) for entry in self.take_used()]
            if len(done) >= count:
                return done
            if self.failed():
                raise FailError("signals an error for its ring")
            if time.monotonic() >= deadline:
                raise SilentError(
                    f"used {len(done)} of {count} requests of queue {self.index} within "
                    f"{timeout:g} s"
                )
            if self._doze() and not self.ready:
                raise HungUpError("closed the connection with requests in a ring")

    def wait_one(self, timeout: float) -> Buffer:
        """Wait until one request was used, and no other; raises as :meth:`wait`."""
        done = self.wait(1, timeout)
        if len(done) > 1:
            raise FailError(f"used {len(done)} requests where one was to be used")
        return done[0]

    def take_one(self) -> Used:
        """The one entry of the used ring that is new.

        Raises:
            FailError: There is none, or there are several.
        """
        entries = self.take_used()
        if len(entries) != 1:
            raise FailError(f"used {len(entries)} requests where one was to be used")
        return entries[0]

    def outcome(self, timeout: float) -> str:
        """Wait so long for the device to react to something wrong.

        Returns:
            ``used``, ``error`` (its descriptor was signaled), ``closed`` or ``quiet``.
        """
        deadline = time.monotonic() + timeout
        while True:
            if self.ready:
                return "used"
            if self.failed():
                return "error"
            if self._doze():
                return "closed"
            if time.monotonic() >= deadline:
                return "quiet"

    def stays_quiet(self, seconds: float, at: int | None = None) -> bool:
        """Whether the used index stays where it is for so long.

        Args:
            seconds: How long.
            at: Where it is; None for behind the last entry that was taken.
        """
        deadline = time.monotonic() + seconds
        before = self.seen if at is None else at
        while self.used_index == before:
            if time.monotonic() >= deadline:
                return True
            self._doze()
        return False

    def _doze(self) -> bool:
        """Wait a moment, or until the connection ends; whether it has ended."""
        poller = select.poll()
        poller.register(self.link.fileno(), select.POLLRDHUP)
        return bool(poller.poll(_TICK * 1000))


def linked(pieces: Iterable[Desc]) -> list[Desc]:
    """The descriptors as one chain in a table of their own."""
    several = list(pieces)
    last = len(several) - 1
    return [
        Desc(each.address, each.length, each.flags | NEXT, at + 1) if at < last else each
        for at, each in enumerate(several)
    ]


def encode_table(pieces: Iterable[Desc]) -> bytes:
    """The bytes of a descriptor table."""
    return b"".join(_DESC.pack(*each) for each in pieces)


def take(fd: int, timeout: float) -> bool:
    """Wait so long until an eventfd was written, and take that; whether it was."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    if not poller.poll(timeout * 1000):
        return False
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
