"""Translation by an IOMMU: IOTLB messages, misses, and what must not be reached."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Final

from guestio.faults.catalogue import hostile, register, user
from guestio.faults.link import Link, Reply
from guestio.faults.outcomes import FailError, HungUpError, SilentError
from guestio.faults.report import Severity
from guestio.faults.ring import WRITE, Buffer, Desc, Queue, linked
from guestio.faults.trial import ACCESS_PLATFORM, PLAIN, QUIET, Trial
from guestio.vhost_user.messages import (
    BackendRequest,
    FrontendRequest,
    IotlbMessage,
    IotlbType,
    ProtocolFeature,
    encode_ack,
)

_F = FrontendRequest
_SHIFT: Final = 0x20_0000_0000
"""I/O virtual address minus guest physical address."""
_PAGE: Final = 4096
_NEEDED: Final = ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK
_MASK: Final = (1 << 64) - 1
_READ, _WRITE = 1, 2


class Translated:
    """A back-end behind an IOMMU that is this side.

    Attributes:
        queue: The ring, at I/O virtual addresses.
        misses: What was asked for, in order.
        answered: Whether misses are answered.
        permission: What is mapped when a miss is answered.
        exactly: Whether what was asked for is mapped instead, and no more.
    """

    def __init__(self, t: Trial, *, start: bool = True) -> None:
        t.needs(features=ACCESS_PLATFORM, protocol=_NEEDED)
        self.t = t
        self.link = t.negotiate(ACCESS_PLATFORM, PLAIN | _NEEDED)
        mine, theirs = t.socket_pair()
        self.back = Link(mine, t.patience)
        self.link.do(_F.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        theirs.close()
        t.share()
        self.misses: list[IotlbMessage] = []
        self.fails: list[IotlbMessage] = []
        self.answered = True
        self.permission = _READ | _WRITE
        self.exactly = False
        self.granted: dict[int, int] = {}
        self.queue = Queue(self.link, t.ram, t.index, 64, shift=_SHIFT, iommu=True)
        t.adopt(self.queue)
        if start:
            self.start()

    def start(self) -> None:
        """Start the ring, whose translations are told as QEMU tells them: that of the used ring."""
        self.queue.set_up()
        self.queue.set_fd(_F.SET_VRING_KICK, self.queue.kick_fd)
        self.update(self.queue.used & ~(_PAGE - 1))
        if self.link.features >> 30 & 1:
            self.queue.enable()

    def tell(self, message: IotlbMessage) -> int:
        """Send an IOTLB message; what it was answered with. Misses that come meanwhile wait."""
        return self.link.ask(_F.IOTLB_MSG, message, need_reply=True).u64

    def update(self, address: int, length: int = _PAGE, permission: int = 3) -> None:
        """Map guest memory."""
        message = IotlbMessage.update(
            address + _SHIFT & _MASK, length, self.t.ram.user(address), permission
        )
        if value := self.tell(message):
            raise FailError(f"refuses an IOTLB update ({value})")

    def invalidate(self, address: int, length: int = _PAGE) -> None:
        """Unmap guest memory."""
        if value := self.tell(IotlbMessage.invalidate(address + _SHIFT & _MASK, length)):
            raise FailError(f"refuses an IOTLB invalidation ({value})")

    def listen(self, seconds: float) -> IotlbMessage | None:
        """Wait so long for the back-end to ask for something, and note it."""
        try:
            message = self.back.receive(seconds)
        except SilentError:
            return None
        return self._note(message)

    def _note(self, message: Reply) -> IotlbMessage | None:
        wants_reply = message.flags >> 3 & 1
        asked = None
        if message.request == BackendRequest.IOTLB_MSG:
            if len(message.payload) != 32:
                raise FailError(f"sent an IOTLB message of {len(message.payload)} bytes")
            asked = IotlbMessage.decode(message.payload)
            if asked.type == IotlbType.MISS:
                self.misses.append(asked)
                if self.answered:
                    self._answer(asked)
            elif asked.type == IotlbType.ACCESS_FAIL:
                self.fails.append(asked)
            else:
                raise FailError(f"sent an IOTLB message of type {asked.type}")
        if wants_reply:
            self.back.send(encode_ack(message.request, 0))
        return asked

    def _answer(self, miss: IotlbMessage) -> None:
        start = miss.iova - _SHIFT & ~(_PAGE - 1)
        end = miss.iova - _SHIFT + max(miss.size, 1)
        ram = self.t.ram
        for page in range(start, min(end, start + 64 * _PAGE), _PAGE):
            if ram.start <= page < ram.end:
                asked = self.granted.get(page, 0) | miss.perm
                self.granted[page] = asked
                self.update(page, _PAGE, asked if self.exactly else self.permission)

    def wait(self, count: int) -> list[Buffer]:
        """Answer misses until so many requests were used, and judge these."""
        deadline = time.monotonic() + self.t.patience
        done: list[Buffer] = []
        while True:
            done += [self.queue.settle(entry) for entry in self.queue.take_used()]
            if len(done) >= count:
                for buffer in done:
                    self.t.judge(self.queue, buffer)
                return done
            if self.queue.failed():
                raise FailError("signals an error for its ring")
            if time.monotonic() >= deadline:
                raise SilentError(
                    f"used {len(done)} of {count} requests, after {len(self.misses)} misses"
                )
            self.listen(0.005)

    def serve(self, count: int = 1) -> None:
        """Make honest requests and judge their answers."""
        self.t.post(self.queue, count)
        self.wait(count)

    def let_be(self, seconds: float) -> None:
        """Listen for so long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.listen(left)


def _new_page(t: Trial) -> int:
    """Have the next buffers begin on a page of their own; its guest address."""
    t.ram.take(1, _PAGE)
    return t.ram.take(1, _PAGE)


_USER_IOTLB: Final = user("IOTLB_MSG")


@register("iotlb.update", _USER_IOTLB, "An update that can be applied is answered with 0.")
def _update(t: Trial) -> None:
    Translated(t, start=False).update(t.ram.start)


@register("iotlb.invalidate", _USER_IOTLB, "An invalidation is answered with 0.")
def _invalidate(t: Trial) -> None:
    side = Translated(t, start=False)
    side.update(t.ram.start)
    side.invalidate(t.ram.start)
    side.invalidate(t.ram.start)


@register(
    "iotlb.invalidate-all",
    _USER_IOTLB,
    "An invalidation of everything that was mapped is answered with 0.",
)
def _invalidate_all(t: Trial) -> None:
    side = Translated(t, start=False)
    side.update(t.ram.start)
    side.invalidate(t.ram.start, t.ram.size)


@register(
    "iotlb.served",
    user("IOMMU support"),
    "Requests at I/O virtual addresses are served once their misses are answered.",
)
def _served(t: Trial) -> None:
    Translated(t).serve(5)


@register(
    "iotlb.miss",
    user("BACKEND_IOTLB_MSG"),
    "A translation that is missing is asked for: address, needed permission, type miss.",
)
def _miss(t: Trial) -> None:
    side = Translated(t)
    side.serve()
    t.expect(bool(side.misses), "served a request without asking for its translation")
    for miss in side.misses:
        address = miss.iova - _SHIFT & _MASK
        t.expect(
            t.ram.start <= address < t.ram.end,
            f"asks for {miss.iova:#x}, which the driver has not used",
        )
        t.expect(miss.perm in {1, 2, 3}, f"asks with permission {miss.perm}")


@register(
    "iotlb.miss-permission",
    user("BACKEND_IOTLB_MSG"),
    "A miss for something that is written asks for the permission to write.",
)
def _miss_permission(t: Trial) -> None:
    if not t.request().room:
        t.skip("requests of this queue have nothing to write")
    side = Translated(t)
    side.exactly = True
    _new_page(t)
    (buffer,) = t.post(side.queue, kick=False)
    (at, _), *_ = buffer.writable
    side.queue.kick()
    side.wait(1)
    page = at & ~(_PAGE - 1)
    asked = [
        miss.perm
        for miss in side.misses
        if miss.iova - _SHIFT & _MASK <= at < (miss.iova - _SHIFT & _MASK) + max(miss.size, 1)
        or (miss.iova - _SHIFT & _MASK) & ~(_PAGE - 1) == page
    ]
    t.expect(
        not asked or any(perm & _WRITE for perm in asked),
        f"asks for a writable buffer with permissions {asked}",
    )


@register(
    "iotlb.known-not-missed",
    user("IOMMU support"),
    "What the back-end was told while the ring runs is not asked for.",
    severity=Severity.SHOULD,
)
def _known(t: Trial) -> None:
    side = Translated(t)
    side.serve()
    side.update(t.ram.start, t.ram.size)
    side.misses.clear()
    _new_page(t)
    side.serve(5)
    t.expect(not side.misses, f"asked {len(side.misses)} times for what it had been told")


@register(
    "iotlb.overwrites",
    _USER_IOTLB,
    "An update of what is mapped already replaces it.",
)
def _overwrites(t: Trial) -> None:
    side = Translated(t, start=False)
    # First to a wrong place, the end of memory, which holds no ring.
    wrong = t.ram.end - _PAGE
    for page in range(t.ram.start, t.ram.start + 16 * _PAGE, _PAGE):
        message = IotlbMessage.update(page + _SHIFT, _PAGE, t.ram.user(wrong), 3)
        t.expect(side.tell(message) == 0, "refuses an IOTLB update")
    side.update(t.ram.start, t.ram.size)
    side.start()
    side.serve(3)


@register(
    "iotlb.scattered",
    user("IOMMU support"),
    "Pages that adjoin for the driver may be anywhere in memory.",
)
def _scattered(t: Trial) -> None:
    side = Translated(t)
    request = t.request()
    queue = side.queue
    total = max(request.room, len(request.readable))
    first, second = t.ram.end - _PAGE, t.ram.end - 4 * _PAGE
    iova = 0x5_0000_0000
    edge = iova + _PAGE - total // 2
    for at, page in ((iova, first), (iova + _PAGE, second)):
        message = IotlbMessage.update(at, _PAGE, t.ram.user(page), 3)
        t.expect(side.tell(message) == 0, "refuses an IOTLB update")

    def place(data: bytes) -> None:
        head = data[: total // 2]
        t.ram.write(first + _PAGE - total // 2, head)
        t.ram.write(second, data[total // 2 :])

    pieces: list[Desc] = []
    if request.room:
        if request.readable:
            pieces, _ = queue.lay_out([request.readable], [])
        pieces.append(Desc(edge, request.room, WRITE))
    else:
        place(request.readable)
        pieces = [Desc(edge, len(request.readable))]
    for at, each in enumerate(linked(pieces)):
        queue.put(at, each)
    queue.offer(0)
    queue.kick()
    deadline = time.monotonic() + t.patience
    while not queue.ready:
        if time.monotonic() >= deadline:
            raise SilentError("did not use a buffer across two pages")
        side.listen(0.005)
    entry = queue.take_one()
    if request.room:
        data = t.ram.read(first + _PAGE - total // 2, total // 2)
        data += t.ram.read(second, request.room - total // 2)
        complaint = request.complaint(data, entry.length)
        t.expect(complaint is None, complaint or "")


@register(
    "iotlb.invalidated-not-reached",
    user("IOMMU support"),
    "What was invalidated is not touched any more, and asked for again.",
)
def _revoked(t: Trial) -> None:
    if not t.request().room:
        t.skip("requests of this queue have nothing to write")
    side = Translated(t)
    side.serve(3)
    # The next buffers are on a page that was mapped once, and is not any more.
    page = _new_page(t)
    side.update(page)
    side.invalidate(t.ram.start, t.ram.size)
    side.update(side.queue.desc & ~(_PAGE - 1))
    side.update(side.queue.avail & ~(_PAGE - 1))
    side.update(side.queue.used & ~(_PAGE - 1))
    side.answered = False
    side.misses.clear()
    (buffer,) = t.post(side.queue, kick=False)
    before = t.ram.snapshot()
    side.queue.kick()
    side.let_be(QUIET)
    at = t.ram.stray(before, [(side.queue.used, 6 + 8 * 64)])
    t.expect(at is None, f"wrote to {at or 0:#x}, whose translation was invalidated")
    t.expect(bool(side.misses), "does not ask for a translation that was invalidated")
    del buffer


@register(
    "iotlb.invalidated-not-written",
    user("IOMMU support"),
    "A buffer that was used is left alone once its invalidation was acknowledged.",
)
def _left_alone(t: Trial) -> None:
    if not t.request().room:
        t.skip("requests of this queue have nothing to write")
    side = Translated(t)
    _new_page(t)
    side.serve(3)
    # What belongs to those requests, the rearming of notifications for example, is over then.
    side.let_be(QUIET)
    before = t.ram.snapshot()
    side.answered = False
    side.invalidate(t.ram.start, t.ram.size)
    side.let_be(QUIET)
    at = t.ram.stray(before, [(side.queue.used, 6 + 8 * 64)])
    t.expect(at is None, f"wrote to {at or 0:#x} after its translation was invalidated")


@register(
    "iotlb.read-only-not-written",
    user("An IOTLB message"),
    "What is mapped for reading is not written.",
)
def _read_only(t: Trial) -> None:
    if not t.request().room:
        t.skip("requests of this queue have nothing to write")
    side = Translated(t)
    side.serve()
    side.permission = _READ
    page = _new_page(t)
    t.post(side.queue, kick=False)
    before = t.ram.snapshot()
    side.update(page, _PAGE, _READ)
    side.queue.kick()
    side.let_be(QUIET)
    at = t.ram.stray(before, [(side.queue.used, 6 + 8 * 64)])
    t.expect(at is None, f"wrote to {at or 0:#x}, which is mapped for reading")


@register(
    "iotlb.unanswered-miss-stops",
    user("GET_VRING_BASE"),
    "A ring that waits for a translation can be stopped, and loses nothing.",
)
def _unanswered(t: Trial) -> None:
    side = Translated(t)
    side.answered = False
    t.post(side.queue, 3)
    side.let_be(QUIET)
    t.expect(side.queue.used_index == 0, "used requests that have no translation")
    base = side.queue.stop()
    t.expect(base == 0, f"stopped at {base}, with nothing used")
    side.answered = True
    side.queue.base = base
    side.start()
    side.queue.kick()
    side.wait(3)


@register(
    "iotlb.refused-miss",
    user("IOMMU support"),
    "A miss that is answered with nothing harms neither the ring's stop nor the connection.",
)
def _refused_miss(t: Trial) -> None:
    side = Translated(t)
    side.serve()
    side.answered = False
    _new_page(t)
    t.post(side.queue)
    side.let_be(QUIET)
    side.queue.stop()
    side.link.ask(_F.GET_FEATURES)


@register(
    "iotlb.many",
    _USER_IOTLB,
    "A thousand updates and invalidations are answered, in order.",
)
def _many(t: Trial) -> None:
    side = Translated(t, start=False)
    messages = [
        IotlbMessage.update(0x7_0000_0000 + n * _PAGE, _PAGE, t.ram.user(t.ram.start), 3)
        if n % 3
        else IotlbMessage.invalidate(0x7_0000_0000 + n * _PAGE, _PAGE)
        for n in range(1000)
    ]
    for first in range(0, 1000, 50):
        for message in messages[first : first + 50]:
            side.link.request(_F.IOTLB_MSG, message, need_reply=True)
        for _ in range(50):
            reply = side.link.receive()
            side.link.judge(reply, _F.IOTLB_MSG)
            t.expect(reply.u64 == 0, f"answers {reply.u64}")


@register(
    "iotlb.restart-forgets",
    user("Suspended device state"),
    "After a stop, what changed meanwhile without a message is not used: QEMU sends none then.",
)
def _restart(t: Trial) -> None:
    side = Translated(t)
    side.serve(2)
    base = side.queue.stop()
    side.misses.clear()
    side.queue.base = base
    side.start()
    side.serve(2)
    if not side.misses:
        t.reject("keeps translations of before the stop")


def _odd(t: Trial, *messages: IotlbMessage) -> None:
    side = Translated(t)
    refused = [value for message in messages if (value := side.tell(message))]
    side.serve()
    if refused:
        t.reject(f"answers with {refused[0]}")


@hostile("iotlb.empty", _USER_IOTLB, "An update of 0 bytes is refused or ignored.")
def _empty(t: Trial) -> None:
    _odd(t, IotlbMessage.update(0x9_0000_0000, 0, t.ram.user(t.ram.start), 3))


@hostile("iotlb.wraps", _USER_IOTLB, "An update that passes 2^64 is refused.")
def _wraps(t: Trial) -> None:
    _odd(
        t,
        IotlbMessage.update(_MASK - 4095, 8192, t.ram.user(t.ram.start), 3),
        IotlbMessage.update(0x9_0000_0000, 8192, _MASK - 4095, 3),
        IotlbMessage.update(0x9_0000_0000, _MASK, 0x1000, 3),
    )


@hostile(
    "iotlb.outside-memory",
    user("IOMMU support"),
    "An update to addresses that are no memory is refused, or nothing is reached by it.",
)
def _outside(t: Trial) -> None:
    _odd(t, IotlbMessage.update(0x9_0000_0000, _PAGE, 0x1000, 3))


@hostile("iotlb.unknown-type", _USER_IOTLB, "A message of an unknown type is refused.")
def _unknown_type(t: Trial) -> None:
    _odd(t, IotlbMessage(0x9_0000_0000, _PAGE, t.ram.user(t.ram.start), 3, 77))


@hostile("iotlb.miss-to-back-end", _USER_IOTLB, "A miss that a front-end sends is refused.")
def _wrong_way(t: Trial) -> None:
    _odd(t, IotlbMessage.miss(0x9_0000_0000, _PAGE, 1))


@hostile("iotlb.permissions", _USER_IOTLB, "Permissions that do not exist are refused or cut.")
def _permissions(t: Trial) -> None:
    _odd(t, IotlbMessage.update(0x9_0000_0000, _PAGE, t.ram.user(t.ram.start), 0xFF))


@hostile(
    "iotlb.not-negotiated",
    _USER_IOTLB,
    "An update without ACCESS_PLATFORM negotiated is refused, or has no effect.",
)
def _not_negotiated(t: Trial) -> None:
    t.needs(protocol=_NEEDED)
    t.negotiate(0, PLAIN | _NEEDED)
    t.share()
    message = IotlbMessage.update(0x9_0000_0000, _PAGE, t.ram.user(t.ram.start), 3)
    try:
        reply = t.link.ask(_F.IOTLB_MSG, message, need_reply=True)
    except HungUpError:
        t.reject("closed the connection")
    if reply.u64:
        t.reject(f"answers with {reply.u64}")


@hostile(
    "iotlb.channel-closed",
    user("SET_BACKEND_REQ_FD"),
    "A back-end channel that the front-end closes ends no more than the connection.",
)
def _channel_closed(t: Trial) -> None:
    side = Translated(t)
    side.serve()
    side.back.close()
    t.ram.take(1, _PAGE)
    t.post(side.queue)
    with contextlib.suppress(HungUpError):
        side.link.quiet(QUIET)
        side.queue.stop()


@hostile(
    "iotlb.channel-full",
    user("SET_BACKEND_REQ_FD"),
    "A back-end channel that nothing reads does not keep the back-end from answering.",
)
def _channel_full(t: Trial) -> None:
    t.needs(features=ACCESS_PLATFORM, protocol=_NEEDED)
    side = Translated(t)
    mine, theirs = t.socket_pair()
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    with contextlib.suppress(BlockingIOError):
        theirs.setblocking(False)
        while True:
            theirs.send(bytes(4096))
    side.link.refuses(_F.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
    t.post(side.queue, 4)
    side.link.quiet(QUIET)
    side.queue.stop()
