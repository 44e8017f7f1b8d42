"""What the compiled core does by itself, and the Python that does the same when it does not.

Both get the same random streams, hostile ones too, and must agree in everything that others can
see: answers, translations, counters, statuses, bytes in memory and image, dirty marks.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestio.addr import ADDRESS_SPACE, IovaRange
from guestio.errors import GuestioError, ProtocolError, QueueError
from guestio.memory import AtomicBitmap, Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user.backend_channel import BackendChannel
from guestio.vhost_user.channel import Channel, PeerGoneError
from guestio.vhost_user.memory import SharedMemory
from guestio.vhost_user.messages import (
    FrontendRequest,
    IotlbMessage,
    IotlbType,
    MemoryRegion,
    ProtocolFeature,
)
from guestio.vhost_user.session import Session
from guestio.vhost_user.translator import VhostUserTranslator
from guestio.virtio.blk import S_IOERR, S_OK, S_UNSUPP, T_GET_ID, T_IN, T_OUT, BlockDevice
from guestio.virtio.device import settled
from guestio.virtio.loop import EventLoop
from guestio.virtio.statistics import Statistics
from tests.kit.recording import ACCESS_PLATFORM, VIRTIO_F_VERSION_1, RecordingHandler
from tests.kit.rings import INDIRECT, NEXT, WRITE, Desc, Rig, linked, table

PAGE = 4096
USER = 0x7F00_0000_0000
IOVA = 0x10_0000
TOP = ADDRESS_SPACE - PAGE

# IOTLB messages

REGIONS = (
    # Two that lie in a row for the front-end and the guest, one that does not for the guest, and,
    # after a hole, one more.
    MemoryRegion(0, 4 * PAGE, USER, 0),
    MemoryRegion(4 * PAGE, 4 * PAGE, USER + 4 * PAGE, 0),
    MemoryRegion(32 * PAGE, 2 * PAGE, USER + 8 * PAGE, 0),
    MemoryRegion(16 * PAGE, 2 * PAGE, USER + 12 * PAGE, 0),
)


class _Handler(RecordingHandler):
    """Gives IOTLB messages to translations."""

    def __init__(self, translations: VhostUserTranslator) -> None:
        super().__init__()
        self._translations = translations

    def iotlb(self, message: IotlbMessage) -> None:
        assert self._translations.apply(message, seconds=10)


class Side:
    """A connection whose messages take one of the two ways.

    Args:
        fast: Whether plain messages are for the core.
    """

    def __init__(self, *, fast: bool) -> None:
        self.fast = fast
        self.loop, self.stats = EventLoop(), Statistics()
        self.woken: list[int] = []
        self.refused = 0
        self.translations = VhostUserTranslator(
            self.loop,
            BackendChannel(self.loop, self.stats, lambda: False),
            self.stats,
            self._wake,
            lambda: None,
            60.0,
        )
        memory = os.memfd_create("fast-and-slow")
        os.truncate(memory, 4 * PAGE)
        self.shared = SharedMemory().replaced([(region, memory) for region in REGIONS])
        os.close(memory)
        self.translations._change_memory(self.shared)
        ours, self.peer = socket.socketpair()
        self.peer.setblocking(False)
        self.channel = Channel(ours)
        handler = _Handler(self.translations)
        self.session = Session(handler)
        self.session.features = VIRTIO_F_VERSION_1 | ACCESS_PLATFORM
        self.session.protocol_features = int(ProtocolFeature.REPLY_ACK | ProtocolFeature.STATUS)
        self.translations.serve(self.channel)
        self.error: str | None = None
        self.by_core = 0

    def _wake(self, waiters: Any) -> None:
        self.woken += waiters

    def send(self, data: bytes) -> bytes:
        """Have bytes arrive; what is answered."""
        if self.error is None:
            self.peer.sendall(data)
            try:
                self._receive()
            except (ProtocolError, PeerGoneError) as error:
                self.error = f"{type(error).__name__}: {error}"
        answer = b""
        with contextlib.suppress(BlockingIOError):
            while part := self.peer.recv(1 << 16):
                answer += part
        return answer

    def _receive(self) -> None:
        """As the back-end does."""
        while True:
            before = self.stats.iotlb_updates + self.stats.iotlb_invalidations
            if self.fast and self.translations.receive(self.channel):
                self.by_core += self.stats.iotlb_updates + self.stats.iotlb_invalidations - before
                continue
            message = self.channel.recv()
            if message is None:
                return
            reply = self.session.handle(message)
            if self.session.last_refusal is not None:
                self.refused += 1
                self.session.last_refusal = None
            if reply is not None:
                self.channel.send(reply, self.session.reply_fds)

    def ask(self, waiter: int, iova: int, length: int, access: int) -> None:
        """A waiter needs a translation."""
        self.translations._misses.request(
            waiter, [(IovaRange(iova, length), access)], 0.0, acknowledged=True
        )

    def seen(self) -> dict[str, Any]:
        """Everything that is visible from outside."""
        iotlb, stats = self.translations.iotlb, self.stats
        return {
            "mappings": list(iotlb),
            "invalidations of the IOTLB": iotlb.stats().invalidations,
            "updates": stats.iotlb_updates,
            "invalidations": stats.iotlb_invalidations,
            "misses": stats.iotlb_misses,
            "open": len(self.translations._misses),
            "woken": self.woken,
            "refused": self.refused,
            "error": self.error,
        }

    def close(self) -> None:
        self.translations.close()
        self.translations.iotlb.invalidate_all()
        self.channel.close()
        self.peer.close()
        self.loop.close()


def encoded(
    request: int, flags: int, size: int, iova: int, length: int, uaddr: int, perm: int, kind: int
) -> bytes:
    """A message with any numbers."""
    body = struct.pack("<QQQBB6x", iova, length, uaddr, perm, kind)
    return struct.pack("<III", request, flags, size) + (body + bytes(64))[:size]


pages = st.integers(0, 12).map(lambda page: IOVA + page * PAGE)
iovas = st.one_of(
    *(pages, pages, pages),
    st.sampled_from([0, 1, PAGE - 1, TOP, ADDRESS_SPACE - 1, 1 << 63, IOVA + 7, IOVA + PAGE - 1]),
)
lengths = st.one_of(
    *(st.just(PAGE), st.just(PAGE), st.integers(1, 10).map(lambda count: count * PAGE)),
    st.sampled_from([0, 1, 7, PAGE - 1, PAGE + 1, 1 << 63, ADDRESS_SPACE - 1, 3 * PAGE + 5]),
)
uaddrs = st.one_of(
    *(st.integers(0, 15).map(lambda page: USER + page * PAGE) for _ in range(3)),
    st.sampled_from([0, USER - 1, USER + 5, TOP, ADDRESS_SPACE - 1, USER + 8 * PAGE - 1]),
)
kinds = st.sampled_from([*[IotlbType.UPDATE] * 6, *[IotlbType.INVALIDATE] * 3, 0, 1, 4, 5, 255])
perms = st.sampled_from([1, 2, 3, 3, 3, 0, 4, 7, 255])
# Mostly as front-ends send them; a header that is wrong ends the connection.
headers = st.one_of(
    *(st.just((int(FrontendRequest.IOTLB_MSG), 9, 32)) for _ in range(12)),
    st.just((int(FrontendRequest.IOTLB_MSG), 1, 32)),
    st.just((int(FrontendRequest.GET_FEATURES), 1, 0)),
    st.just((int(FrontendRequest.GET_STATUS), 9, 0)),
    st.tuples(
        st.sampled_from([22, 1, 0, 99]),
        st.sampled_from([0, 1, 2, 5, 9, 13, 0x11, 0x19, 0x8000_0009]),
        st.sampled_from([32, 31, 33, 0, 40]),
    ),
)


class Send(NamedTuple):
    """Messages, of which so many bytes arrive first."""

    data: bytes
    first: int


class Ask(NamedTuple):
    """A waiter that needs a range."""

    waiter: int
    iova: int
    length: int
    access: int


messages = st.builds(
    lambda header, *rest: encoded(*header, *rest), headers, iovas, lengths, uaddrs, perms, kinds
)
steps = st.one_of(
    st.builds(Send, st.lists(messages, min_size=1, max_size=8).map(b"".join), st.integers(0, 400)),
    st.builds(
        Ask,
        st.integers(0, 3),
        pages,
        st.sampled_from([1, PAGE, 3 * PAGE]),
        st.sampled_from([1, 2, 3]),
    ),
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.lists(steps, max_size=12))
def test_iotlb_messages(script: list[Send | Ask]) -> None:
    with contextlib.ExitStack() as stack:
        fast, slow = Side(fast=True), Side(fast=False)
        for side in (fast, slow):
            stack.callback(side.close)
        for step in script:
            if isinstance(step, Ask):
                for side in (fast, slow):
                    side.ask(*step)
                continue
            for part in (step.data[: step.first], step.data[step.first :]):
                assert fast.send(part) == slow.send(part)
                assert fast.seen() == slow.seen()


def test_plain_messages_are_for_the_core_and_no_others() -> None:
    """Otherwise the test above would compare Python with itself."""
    side = Side(fast=True)
    request = int(FrontendRequest.IOTLB_MSG)
    update, invalidate = int(IotlbType.UPDATE), int(IotlbType.INVALIDATE)
    for iova, length, uaddr, perm, kind, core in (
        (IOVA, PAGE, USER, 3, update, True),
        (IOVA, 6 * PAGE, USER + PAGE, 3, update, True),  # over two regions that lie in a row
        (IOVA, 2 * PAGE, USER + 7 * PAGE, 3, update, False),  # over two that do not
        (IOVA, PAGE, USER + 11 * PAGE, 3, update, False),  # not shared
        (IOVA, PAGE, USER, 4, update, False),
        (IOVA, PAGE, 0, 0, invalidate, True),
        (0, 0, 0, 0, invalidate, False),  # everything
    ):
        before = side.by_core
        side.send(encoded(request, 9, 32, iova, length, uaddr, perm, kind))
        assert (side.by_core > before) == core, (iova, length, uaddr)
    side.close()


def test_a_refused_update_is_not_counted() -> None:
    for fast in (False, True):
        side = Side(fast=fast)
        for uaddr in (USER + 11 * PAGE, USER + 9 * PAGE):
            side.send(encoded(22, 9, 32, IOVA, 2 * PAGE, uaddr, 3, int(IotlbType.UPDATE)))
        assert (side.refused, side.stats.iotlb_updates) == (2, 0)
        assert list(side.translations.iotlb) == []
        side.close()


# Block requests

IMAGE = 16 * 512
HIGH = 0x4_0000
LOW_SIZE, HIGH_SIZE = 0x2_0000, 0x2000
TABLE = 0x1_0000
BUFFERS = 0x1_8000


class Disk:
    """A disk whose requests take one of the ways.

    Args:
        way: `served` where the ring is walked, `processed` by the device, or `late` by its threads.
        image: The image; it is made.
        read_only: Whether writes are refused.
    """

    def __init__(self, way: str, image: Path, *, read_only: bool) -> None:
        self.way, self.image = way, image
        image.write_bytes(bytes(range(256)) * (IMAGE // 256))
        self.device = BlockDevice(
            image, read_only=read_only, serial="disk", io_threads=1 if way == "late" else 0
        )
        self.bitmaps = [AtomicBitmap(LOW_SIZE), AtomicBitmap(HIGH_SIZE)]
        self.memory = GuestRegionCollection.from_regions(
            MmapRegion(start, Backing.memfd(size), bitmap=bitmap)
            for start, size, bitmap in zip(
                (0, HIGH), (LOW_SIZE, HIGH_SIZE), self.bitmaps, strict=True
            )
        )
        self.memory.write(BUFFERS, bytes(i % 251 for i in range(LOW_SIZE - BUFFERS)))
        self.memory.write(HIGH, bytes(i % 241 for i in range(HIGH_SIZE)))
        self.rig = Rig(self.memory._space, self.memory, size=64, indirect=True)
        self.error: str | None = None

    def run(self, chain: list[Desc], source: bytes, *, indirect: bool) -> None:
        """Run one request, whose first readable bytes are the source's."""
        at = 0
        for each in chain:
            if not each.flags & WRITE and at < len(source):
                part = source[at : at + each.length]
                at += len(part)
                with contextlib.suppress(GuestioError):
                    self.memory.write(each.addr, part)
        for bitmap in self.bitmaps:
            bitmap.reset()
        if indirect:
            self.memory.write(TABLE, table(*linked(*chain)))
            self.rig.put(0, Desc(TABLE, 16 * len(chain), INDIRECT))
        else:
            for i, each in enumerate(linked(*chain)):
                self.rig.put(i, each._replace(next=i + 1 if each.flags & NEXT else 0))
        self.rig.offer(0)
        ring, device = self.rig.ring, self.device
        try:
            chains, misses, _, _ = ring.run_once(device.server if self.way == "served" else None)
            assert not misses
            for taken in chains:
                failed = taken.fault is not None
                answer = device.fail(0, taken) if failed else device.process(0, taken)
                ring.complete(taken, settled(answer))
            ring.publish()
        except QueueError as error:
            self.error = str(error)

    def seen(self) -> dict[str, Any]:
        """Everything that is visible from outside."""
        return {
            "memory": self.memory.read(0, LOW_SIZE) + self.memory.read(HIGH, HIGH_SIZE),
            "image": self.image.read_bytes(),
            "dirty": [bitmap.peek().tolist() for bitmap in self.bitmaps],
            "errors": self.device.errors,
            "used": self.rig.used_idx,
            "broken": self.error,
        }

    def close(self) -> None:
        self.device.close()


class Shape(NamedTuple):
    """A request: what it says, and where it lies.

    Attributes:
        kind: Its type.
        sector: Its sector.
        header: Bytes of the header that there are.
        readable: Address and length of what the device reads.
        writable: The same of what it writes.
        indirect: Whether it lies in a table of its own.
    """

    kind: int
    sector: int
    header: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]
    indirect: bool


addresses = st.one_of(
    st.integers(BUFFERS, BUFFERS + 0x1000),
    # Around the ends of regions, and where there is no memory.
    st.sampled_from([LOW_SIZE - 1, LOW_SIZE - 16, LOW_SIZE - 512, HIGH, HIGH + 100, HIGH - 1]),
    st.sampled_from([HIGH + HIGH_SIZE - 1, HIGH + HIGH_SIZE, LOW_SIZE, 1 << 62]),
)
sizes = st.one_of(st.sampled_from([1, 15, 16, 17, 511, 512, 513, 1024, 4096]), st.integers(1, 600))
usual = st.integers(BUFFERS, BUFFERS + 0x1000)
shapes = st.one_of(
    st.builds(
        Shape,
        st.sampled_from([T_IN, T_OUT, T_IN, T_OUT, T_GET_ID, 7, 0xFFFF_FFFF]),
        st.one_of(st.integers(0, 18), st.sampled_from([1 << 32, 1 << 55, ADDRESS_SPACE - 1])),
        st.sampled_from([16, 16, 16, 15, 1]),
        st.lists(st.tuples(addresses, sizes), min_size=1, max_size=4),
        st.lists(st.tuples(addresses, sizes), max_size=4),
        st.booleans(),
    ),
    # Those that may well succeed, cut anywhere, the status in a piece with data.
    st.builds(
        lambda kind, sector, cut, at, count, indirect: Shape(
            kind,
            sector,
            16,
            [(at, cut), (at + 0x100, 16 - cut + (512 * count if kind == T_OUT else 0))],
            [(at + 0x2000, 100), (at + 0x3000, 512 * count - 99)] if kind == T_IN else [(at, 1)],
            indirect,
        ),
        st.sampled_from([T_IN, T_OUT]),
        st.integers(0, 17),
        st.integers(1, 15),
        usual,
        st.integers(1, 4),
        st.booleans(),
    ),
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(read_only=st.booleans(), script=st.lists(shapes, min_size=1, max_size=8))
def test_block_requests(
    tmp_path_factory: pytest.TempPathFactory, read_only: bool, script: list[Shape]
) -> None:
    directory = tmp_path_factory.mktemp("disks")
    with contextlib.ExitStack() as stack:
        disks = [
            Disk(way, directory / way, read_only=read_only)
            for way in ("served", "processed", "late")
        ]
        for disk in disks:
            stack.callback(disk.close)
        for shape in script:
            source = struct.pack("<IIQ", shape.kind & 0xFFFF_FFFF, 0, shape.sector)[: shape.header]
            chain = [Desc(at, size) for at, size in shape.readable]
            chain += [Desc(at, size, WRITE) for at, size in shape.writable]
            for disk in disks:
                disk.run(chain, source, indirect=shape.indirect)
            fast, *others = (disk.seen() for disk in disks)
            assert all(other == fast for other in others)


def test_the_ways_are_different_ones(tmp_path: Path) -> None:
    """And each answers as the specification says."""
    for way in ("served", "processed", "late"):
        disk = Disk(way, tmp_path / way, read_only=False)
        for kind, sector, size, status, used in (
            (T_IN, 0, 513, S_OK, 513),
            (T_IN, 15, 513, S_OK, 513),
            (T_IN, 16, 513, S_IOERR, 0),
            (T_IN, 16, 1, S_OK, 1),
            (T_IN, 17, 1, S_IOERR, 1),
            (T_IN, 0, 512, S_IOERR, 0),
            (7, 0, 513, S_UNSUPP, 0),
        ):
            position = disk.rig.offered
            chain = [Desc(BUFFERS, 16), Desc(BUFFERS + 0x1000, size, WRITE)]
            disk.run(chain, struct.pack("<IIQ", kind, 0, sector), indirect=False)
            where = (way, kind, sector, size)
            assert disk.memory.read(BUFFERS + 0x1000 + size - 1, 1)[0] == status, where
            assert disk.rig.used_entry(position)[1] == used, where
        disk.close()
