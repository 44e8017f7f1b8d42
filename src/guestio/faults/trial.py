"""What a check works with: connections, memory and rings that are gone when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from guestio.faults import base_trial
from guestio.faults.base_trial import BaseTrial
from guestio.faults.memory import Bytes, Ram
from guestio.faults.outcomes import (
    HungUpError,
    SilentError,
)
from guestio.faults.ring import Buffer, Queue
from guestio.vhost_user.messages import U64, FrontendRequest, ProtocolFeature

if TYPE_CHECKING:
    from guestio.faults.kinds import Kind, Request
    from guestio.faults.link import Link

_F = FrontendRequest

PROTOCOL_BIT: Final = 1 << 30
"""VHOST_USER_F_PROTOCOL_FEATURES."""
VERSION_1: Final = 1 << 32
INDIRECT_DESC: Final = 1 << 28
EVENT_IDX: Final = 1 << 29
ACCESS_PLATFORM: Final = 1 << 33
RING_PACKED: Final = 1 << 34
IN_ORDER: Final = 1 << 35
LOG_ALL: Final = 1 << 26

PLAIN: Final = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG
"""Protocol features that are negotiated unless a check says otherwise, where they are offered."""

QUIET: Final = base_trial.QUIET
ENTRIES: Final = 64
"""Entries of a ring, unless a check says otherwise."""


class Trial(BaseTrial):
    """One run of one check against a vhost-user back-end.

    Everything that it opens is closed by :meth:`close`. Its methods raise the errors of
    :mod:`guestio.faults.outcomes`, which end the check.

    Args:
        connect: Makes a connection to the back-end, with so much patience.
        kind: Type of the device.
        queue: The queue that requests are made on; None for that of the type.
        patience: Seconds that an answer may take.
        seed: Of everything random.
        writable: Whether the disk may be written.
        in_pairs: Whether the queues beside that one are started with it; see ``Kind.beside``.

    Attributes:
        kind: Type of the device.
        index: The queue that requests are made on.
        writable: Whether the disk may be written.
    """

    def __init__(
        self,
        connect: Callable[[float], Link],
        kind: Kind,
        *,
        queue: int | None = None,
        patience: float = 1.0,
        seed: str = "0",
        writable: bool = False,
        in_pairs: bool = False,
    ) -> None:
        super().__init__(patience, seed)
        self._connect = connect
        self.kind = kind
        self.index = kind.queue if queue is None else queue
        self.writable = writable
        self._in_pairs = in_pairs
        self._link: Link | None = None
        self._ram: Ram | None = None
        self._before: Bytes | None = None
        self._beside: Link | None = None

    def close(self) -> None:
        """Close every connection and give everything back. May be called again."""
        super().close()
        self._link = self._ram = self._beside = None

    def probe(self) -> None:
        """Make an honest request, which must be served."""
        self.serves(self.ready())

    # Connections

    @property
    def link(self) -> Link:
        """The first connection, which is made when it is first asked for."""
        if self._link is None:
            self._link = self.connect()
        return self._link

    @property
    def ram(self) -> Ram:
        """The guest's memory, which is made when it is first asked for."""
        if self._ram is None:
            self._ram = self.new_ram()
        return self._ram

    def connect(self) -> Link:
        """Another connection."""
        link = self._connect(self.patience)
        self._open.callback(link.close)
        return link

    def reconnect(self) -> Link:
        """Hang up, and connect anew; rings and memory of before stay as they are."""
        self.link.close()
        self._link = self.connect()
        return self._link

    def new_ram(self, **place: int) -> Ram:
        """More guest memory; see :class:`~guestio.faults.memory.Ram`."""
        ram = Ram(**place)
        self._open.callback(ram.close)
        return ram

    # Negotiation

    def offered(self) -> int:
        """The feature bits that the device offers."""
        return self.link.u64(_F.GET_FEATURES)

    def offered_protocol(self) -> int:
        """The protocol features that the back-end offers.

        Raises:
            SkipError: It has none.
        """
        if not self.offered() & PROTOCOL_BIT:
            self.skip("protocol features are not offered")
        return self.link.u64(_F.GET_PROTOCOL_FEATURES)

    def needs(self, *, features: int = 0, protocol: int = 0) -> None:
        """Skip the check unless the device offers these features.

        Raises:
            SkipError: It does not.
        """
        offered = self.offered()
        if missing := features & ~offered:
            names = ", ".join(_feature_name(bit) for bit in _bits(missing))
            self.skip(f"{names} is not offered")
        if protocol and (missing := protocol & ~self.offered_protocol()):
            names = ", ".join(str(ProtocolFeature(1 << bit).name) for bit in _bits(missing))
            self.skip(f"protocol feature {names} is not offered")

    def negotiate(self, features: int = 0, protocol: int = PLAIN) -> Link:
        """Agree on features, honestly.

        Args:
            features: Bits besides VERSION_1; those that are not offered are left out.
            protocol: Protocol features; those that are not offered are left out.

        Returns:
            The connection.
        """
        link = self.link
        offered = self.offered()
        chosen = offered & (VERSION_1 | PROTOCOL_BIT | features)
        if offered & PROTOCOL_BIT:
            usable = link.u64(_F.GET_PROTOCOL_FEATURES) & protocol
            link.request(_F.SET_PROTOCOL_FEATURES, U64(usable))
            link.protocol = usable
        link.do(_F.SET_OWNER)
        link.do(_F.SET_FEATURES, U64(chosen))
        link.features = chosen
        return link

    def share(self) -> None:
        """Share the guest's memory by SET_MEM_TABLE, and start the queues beside the one used."""
        self.link.do(_F.SET_MEM_TABLE, self.ram.table, [self.ram.fd])
        if not self._in_pairs or self._beside is self.link:
            return
        if self.link.features & ACCESS_PLATFORM:
            return
        self._beside = self.link
        for index in self.kind.beside:
            if index != self.index:
                self.new_queue(index).start()

    def new_queue(self, index: int | None = None, size: int = ENTRIES, *, base: int = 0) -> Queue:
        """A ring in the guest's memory, which the device is not told of yet."""
        number = self.index if index is None else index
        queue = Queue(self.link, self.ram, number, size, base=base)
        self._open.callback(queue.close)
        return queue

    def adopt(self, queue: Queue) -> None:
        """Close a ring's descriptors when the check ends."""
        self._open.callback(queue.close)

    def ready(
        self,
        features: int = 0,
        protocol: int = PLAIN,
        *,
        size: int = ENTRIES,
        base: int = 0,
    ) -> Queue:
        """Negotiate, share memory, and start the ring that requests are made on."""
        self.negotiate(features, protocol)
        self.share()
        queue = self.new_queue(size=size, base=base)
        queue.start()
        return queue

    # Requests

    def request(self) -> Request:
        """An honest request for the ring that requests are made on."""
        return self.kind.request()

    def post(self, queue: Queue, count: int = 1, *, kick: bool = True) -> list[Buffer]:
        """Make honest requests available, and notify the device."""
        buffers = []
        for _ in range(count):
            request = self.request()
            readable = [request.readable] if request.readable else []
            writable = [request.room] if request.room else []
            buffers.append(queue.post(readable, writable))
        if kick:
            queue.kick()
        return buffers

    def serves(self, queue: Queue, count: int = 1) -> list[Buffer]:
        """Make honest requests and judge their answers.

        Raises:
            FailError: One is wrong.
            SilentError: They were not used in time.
        """
        self.post(queue, count)
        done = queue.wait(count, self.patience)
        for buffer in done:
            self.judge(queue, buffer)
        return done

    def judge(self, queue: Queue, buffer: Buffer) -> None:
        """Judge the answer to an honest request.

        Raises:
            FailError: It is wrong.
        """
        assert buffer.written is not None
        complaint = self.request().complaint(self.answer(queue, buffer), buffer.written)
        if complaint is not None:
            self.fail(complaint)

    @staticmethod
    def answer(queue: Queue, buffer: Buffer) -> bytes:
        """What is in the writable part of a request."""
        return b"".join(queue.ram.read(at, length) for at, length in buffer.writable)

    def aftermath(
        self,
        queue: Queue,
        allowed: Iterable[tuple[int, int]] = (),
        heads: Sequence[int] = (),
        *,
        seconds: float | None = None,
    ) -> None:
        """Look at what a device made of a broken ring, which was kicked, and that it can stop.

        Args:
            queue: The ring. What the driver writes itself, the available ring, is not compared.
            allowed: Addresses and lengths, besides the used ring, that it may have written.
            heads: What it may have used.
            seconds: How long it may take; half of the patience, at most 2, by default.

        Raises:
            FailError: It wrote elsewhere, used what was not offered, or cannot be stopped.
            RejectError: It refused: by its error descriptor, by hanging up, or by doing nothing.
        """
        before = self._before
        outcome = queue.outcome(self.reaction if seconds is None else seconds)
        entries = queue.take_used() if outcome == "used" else []
        for entry in entries:
            if entry.id not in heads:
                self.fail(f"used descriptor {entry.id}, which was not made available")
        rings = [(queue.used, 6 + 8 * queue.size), (queue.avail, 6 + 2 * queue.size)]
        if before is not None and (at := queue.ram.stray(before, [*rings, *allowed])) is not None:
            self.fail(f"wrote to guest memory at {at:#x}, which no buffer has")
        if outcome == "closed":
            self.reject("closed the connection")
        try:
            queue.stop()
        except HungUpError:
            self.reject("closed the connection at GET_VRING_BASE")
        except SilentError:
            self.fail("does not answer GET_VRING_BASE after a broken ring")
        if outcome == "error":
            self.reject("signaled an error for the ring")
        if outcome == "quiet":
            self.reject("does not serve the ring any more")

    @property
    def reaction(self) -> float:
        """Seconds that a back-end may take to react to something wrong, if it does at all."""
        return min(self.patience / 2, 2.0)

    def remember(self) -> None:
        """Note what memory is like, for :meth:`aftermath` to find out what was written since."""
        self._before = self.ram.snapshot()


def _bits(mask: int) -> Iterator[int]:
    return (bit for bit in range(mask.bit_length()) if mask >> bit & 1)


_NAMES: Final = {
    26: "VHOST_F_LOG_ALL",
    28: "VIRTIO_F_INDIRECT_DESC",
    29: "VIRTIO_F_EVENT_IDX",
    30: "VHOST_USER_F_PROTOCOL_FEATURES",
    32: "VIRTIO_F_VERSION_1",
    33: "VIRTIO_F_ACCESS_PLATFORM",
    34: "VIRTIO_F_RING_PACKED",
    35: "VIRTIO_F_IN_ORDER",
}


def _feature_name(bit: int) -> str:
    return _NAMES.get(bit, f"feature {bit}")
