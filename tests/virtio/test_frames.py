"""Frames between descriptors and rings, in the core: as in a model, and where memory goes away."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.virtio.frames import (
    FILLED_BROKEN,
    FILLED_BUSY,
    FILLED_FULL,
    FILLED_IDLE,
    FILLED_LACKING,
    FrameFiller,
    FrameSender,
)
from guestio._core.virtio.split import SplitRing
from guestio.addr import Permissions
from guestio.iommu import Iotlb
from guestio.memory import AtomicBitmap, Backing, GuestRegionCollection, MmapRegion
from guestio.virtio.driver import DriverQueue
from guestio.virtio.layout import RingLayout

HEADER = 12
ENTRIES = 16
BUFFERS = 0x40000
RW = Permissions.READ_WRITE


class Bench:
    """A ring with its driver, and a filler or sender with its cable.

    Args:
        event_idx: Whether the driver says when it wants to be notified by an index.
        iotlb: Translates the ring's buffers; None without an IOMMU.
        bitmap: Marks what is written.
    """

    def __init__(
        self,
        *,
        event_idx: bool = False,
        iotlb: Iotlb | None = None,
        bitmap: AtomicBitmap | None = None,
    ) -> None:
        self.backing = Backing.memfd(0x400000)
        region = MmapRegion(0, self.backing, bitmap=bitmap)
        self.memory = GuestRegionCollection.from_regions([region])
        layout = RingLayout.contiguous(0x1000, ENTRIES)
        self.driver = DriverQueue(self.memory, layout, event_idx=event_idx)
        self.ring = SplitRing(
            AddressSpace(self.memory._space.regions, iotlb and iotlb._map),
            ENTRIES,
            layout.desc,
            layout.avail,
            layout.used,
            event_idx=event_idx,
            ordered=True,
        )
        self.filler = FrameFiller(frames=3, size=1 << 20, backlog=100, backlog_bytes=1 << 24)
        self.filler.mergeable = True
        self.sender = FrameSender()
        self.near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.near.setblocking(False)
        self.far.settimeout(5)
        self._next = BUFFERS

    def room(self, size: int) -> int:
        """Memory for a buffer; each in turn."""
        if self._next + size > 0x400000:
            self._next = BUFFERS
        at, self._next = self._next, self._next + size
        return at

    def post(self, *sizes: int) -> None:
        for size in sizes:
            at = self.room(size)
            self.driver.add([], [(at, size)], (at, size))
        self.driver.publish()

    def fill(self) -> int:
        """Fill until there is nothing more to do; why."""
        while (state := self.filler.fill(self.ring)[0]) == FILLED_BUSY:
            pass
        return state

    def used(self) -> list[bytes]:
        """What the driver got since it last looked."""
        return [
            self.memory.read(token[0], written) if written else b""
            for token, written in self.driver.collect()
        ]

    def frames(self) -> list[bytes]:
        """The same put together as frames, without headers; empty buffers left out."""
        made = []
        pieces = [piece for piece in self.used() if piece]
        while pieces:
            count = int.from_bytes(pieces[0][10:12], "little")
            made.append(b"".join(pieces[:count])[HEADER:])
            del pieces[:count]
        return made

    def close(self) -> None:
        self.near.close()
        self.far.close()
        self.driver.close()


@contextlib.contextmanager
def bench(**options: Any) -> Iterator[Bench]:
    made = Bench(**options)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Threads ask for the GIL after a microsecond."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def frame(size: int, seed: int = 0) -> bytes:
    return bytes((seed + 7 * i) & 0xFF for i in range(size))


@pytest.mark.parametrize("way", ["sent", "received"])
def test_other_threads_run_while_frames_are_moved(way: str, quick_switches: None) -> None:
    """Within a call that moves many: a flood of frames leaves them their time."""
    amidst = threading.Event()
    with bench() as made:
        made.filler = FrameFiller(frames=ENTRIES, size=1 << 20, backlog=100, backlog_bytes=1 << 24)
        made.filler.fd = made.sender.fd = made.near.fileno()
        moved = made.sender if way == "sent" else made.filler
        until = time.monotonic() + 60

        def look() -> None:
            # Each call moves as many as the ring has entries.
            while time.monotonic() < until and not moved.frames % ENTRIES:
                pass
            amidst.set()

        other = threading.Thread(target=look)
        other.start()
        while not amidst.is_set():
            if way == "received":
                made.post(*[200] * ENTRIES)
                for _ in range(ENTRIES):
                    made.far.send(bytes(HEADER) + frame(100))
                made.filler.fill(made.ring)
            else:
                for _ in range(ENTRIES):
                    made.driver.add([(made.room(200), 200)], [])
                made.driver.publish()
                made.ring.run_once(made.sender, 64)
                for _ in range(ENTRIES):
                    made.far.recv(1000)
            made.driver.collect()
        other.join()
    assert time.monotonic() < until


class Model:
    """What becomes of frames and buffers, too simple to be wrong."""

    def __init__(self, mergeable: bool) -> None:
        self.mergeable = mergeable
        self.buffers: list[int] = []
        self.waiting: list[bytes] = []
        self.used: list[int] = []
        self.received: list[bytes] = []
        self.dropped = 0

    def run(self) -> int:
        while self.waiting:
            data = self.waiting[0]
            while self.buffers and self.buffers[0] < HEADER:
                self.buffers.pop(0)
                self.used.append(0)
            if not self.buffers:
                return FILLED_FULL
            room = count = 0
            for size in self.buffers:
                if room >= len(data) + HEADER:
                    break
                room, count = room + size, count + 1
            if room < len(data) + HEADER or (count > 1 and not self.mergeable):
                if self.mergeable and count < ENTRIES:
                    return FILLED_FULL
                self.dropped += 1
            else:
                left = len(data) + HEADER
                for size in self.buffers[:count]:
                    self.used.append(min(size, left))
                    left -= min(size, left)
                del self.buffers[:count]
                self.received.append(data)
            self.waiting.pop(0)
        return FILLED_IDLE


OPERATIONS = st.lists(
    st.one_of(
        st.lists(
            st.one_of(st.integers(1, 40), st.integers(1, 3000)), min_size=1, max_size=ENTRIES
        ).map(lambda sizes: ("post", sizes)),
        st.one_of(st.integers(14, 60), st.integers(14, 9000)).map(lambda size: ("frame", size)),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=150)
@given(OPERATIONS, st.booleans(), st.booleans(), st.booleans())
def test_frames_and_buffers_are_as_in_a_model(
    operations: list[tuple[str, Any]], mergeable: bool, by_fd: bool, event_idx: bool
) -> None:
    model = Model(mergeable)
    with bench(event_idx=event_idx) as made:
        made.filler.mergeable = mergeable
        if by_fd:
            made.filler.fd = made.near.fileno()
        made.far.setblocking(False)
        received: list[bytes] = []
        used: list[int] = []
        for number, (what, value) in enumerate(operations):
            if what == "post":
                sizes = value[: made.driver.free]
                if not sizes:
                    continue
                made.post(*sizes)
                model.buffers += sizes
            else:
                data = frame(value, number)
                if by_fd:
                    try:
                        made.far.send(bytes(HEADER) + data)
                    except BlockingIOError:
                        # The cable holds what its kernel lets it, and nothing takes from it
                        # while there are no buffers.
                        continue
                else:
                    assert made.filler.give(data)
                model.waiting.append(data)
            state = made.fill()
            expected = model.run()
            # Without frames a descriptor is only found empty if there is a buffer to read into.
            usable = any(size >= HEADER for size in model.buffers)
            assert state == expected or (expected == FILLED_IDLE and not usable)
            pieces = made.used()
            used += [len(piece) for piece in pieces]
            pieces = [piece for piece in pieces if piece]
            while pieces:
                count = int.from_bytes(pieces[0][10:12], "little")
                assert pieces[0][:10] == bytes(10)
                received.append(b"".join(pieces[:count])[HEADER:])
                del pieces[:count]
            # Buffers that are too small may be given back before a frame comes.
            assert received == model.received
            assert made.filler.dropped == model.dropped
        assert [n for n in used if n] == [n for n in model.used if n]


def test_a_driver_that_wants_announcements_is_asked_for_them() -> None:
    for event_idx in (False, True):
        with bench(event_idx=event_idx) as made:
            assert made.filler.give(frame(500))
            assert made.fill() == FILLED_FULL
            made.driver.add([], [(made.room(100), 100)], (0, 0))
            assert made.driver.publish()
            # It is to be told of what follows the buffer that is not enough.
            assert made.fill() == FILLED_FULL
            at = made.room(1000)
            made.driver.add([], [(at, 1000)], (at, 1000))
            assert made.driver.publish()
            assert made.fill() == FILLED_IDLE
            assert made.driver.collect()


def test_what_lacks_a_translation_keeps_its_frame() -> None:
    iotlb = Iotlb()
    iotlb.set_mapping(0, 0, BUFFERS, RW)
    for by_fd in (False, True):
        with bench(iotlb=iotlb) as made:
            made.post(100, 100)
            if by_fd:
                made.filler.fd = made.near.fileno()
                made.far.send(bytes(HEADER) + frame(150))
            else:
                made.filler.give(frame(150))
            state, missing, buffers = made.filler.fill(made.ring)
            assert (state, buffers) == (FILLED_LACKING, 0)
            # Of both, so that they are requested together.
            assert [found.base for found, _ in missing] == [BUFFERS, BUFFERS + 100]
            assert {access for _, access in missing} == {2}
            iotlb.set_mapping(BUFFERS, BUFFERS, 100, RW)
            state, missing, buffers = made.filler.fill(made.ring)
            assert (state, buffers) == (FILLED_LACKING, 0)
            assert {found.base for found, _ in missing} == {BUFFERS + 100}
            assert made.filler.waiting == 1
            iotlb.set_mapping(BUFFERS + 100, BUFFERS + 100, 100, RW)
            assert made.filler.fill(made.ring)[0] in (FILLED_IDLE, FILLED_FULL)
            assert made.frames() == [frame(150)]
            # Nothing keeps a translation in use.
            iotlb.invalidate_mapping(BUFFERS, 0x1000)


@pytest.mark.parametrize("by_fd", [False, True])
@pytest.mark.parametrize("size", [100, 6000])
def test_what_is_written_is_marked_dirty(by_fd: bool, size: int) -> None:
    bitmap = AtomicBitmap(0x400000, 4096)
    with bench(bitmap=bitmap) as made:
        made.post(4096, 4096, 4096)
        if by_fd:
            made.filler.fd = made.near.fileno()
            made.far.send(bytes(HEADER) + frame(size))
        else:
            made.filler.give(frame(size))
        made.fill()
        marked = [bitmap.is_bit_set(BUFFERS // 4096 + page) for page in range(3)]
        assert marked == [True, size == 6000, False]


def test_what_a_frame_that_is_not_wanted_overwrote_is_marked_dirty() -> None:
    bitmap = AtomicBitmap(0x400000, 4096)
    with bench(bitmap=bitmap) as made:
        made.filler.set_filter(bytes(6), promiscuous=False)
        made.filler.fd = made.near.fileno()
        made.post(4096)
        made.far.send(bytes(HEADER) + frame(100, 2))
        made.fill()
        assert (made.filler.filtered, made.filler.frames) == (1, 0)
        assert bitmap.is_bit_set(BUFFERS // 4096)


@pytest.mark.parametrize("by_fd", [False, True])
def test_memory_that_is_gone_loses_a_frame_and_not_the_process(by_fd: bool) -> None:
    with bench() as made:
        made._next = 0x200000
        made.post(1000, 1000)
        made._next = BUFFERS
        made.post(1000)
        os.ftruncate(made.backing.fd, 0x200000)
        for seed in range(3):
            if by_fd:
                made.filler.fd = made.near.fileno()
                made.far.send(bytes(HEADER) + frame(100, seed))
            else:
                made.filler.give(frame(100, seed))
        made.fill()
        assert made.filler.frames + made.filler.dropped == 3
        assert made.filler.dropped == 2
        [last] = [piece for piece in made.driver.collect() if piece.written]
        assert made.memory.read(last.token[0] + HEADER, 100) == frame(100, 2)


def send(made: Bench, *pieces: bytes) -> None:
    """Have a request served that is in these pieces."""
    places = []
    for piece in pieces:
        at = made.room(len(piece))
        made.memory.write(at, piece)
        places.append((at, len(piece)))
    made.driver.add(places, [], (0, 0))
    made.driver.publish()
    chains, _, served, _ = made.ring.run_once(made.sender)
    assert (chains, served) == ([], 1)
    assert len(made.driver.collect()) == 1


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3000), st.lists(st.integers(1, 3000), max_size=14), st.booleans())
def test_requests_in_any_pieces_are_sent(size: int, cuts: list[int], offloads: bool) -> None:
    data = bytes(range(1, 13)) + frame(size)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    with bench() as made:
        made.sender.fd, made.sender.offloads = made.near.fileno(), offloads
        send(made, *(data[a:b] for a, b in pairwise(edges)))
        if size < 14:
            assert (made.sender.frames, made.sender.dropped) == (0, 1)
        else:
            header = data[:HEADER] if offloads else bytes(HEADER)
            assert made.far.recv(1 << 17) == header + data[HEADER:]
            assert (made.sender.frames, made.sender.sent_bytes) == (1, size)


def test_errors_of_the_cable_are_kept() -> None:
    with bench() as made:
        made.sender.fd = made.filler.fd = made.near.fileno()
        made.post(100)
        made.far.close()
        assert made.fill() == FILLED_BROKEN
        assert made.filler.error == errno.EPIPE
    with bench() as made:
        made.sender.fd = made.near.fileno()
        made.far.close()
        send(made, bytes(HEADER) + frame(60))
        assert made.sender.error == errno.EPIPE
        assert made.sender.dropped == 1


def test_misuse_is_refused() -> None:
    with bench() as made:
        for size in (0, 11, 13):
            with pytest.raises(ValueError, match="10 or 12"):
                made.filler.set_header_size(size)
            with pytest.raises(ValueError, match="10 or 12"):
                made.sender.set_header_size(size)
        with pytest.raises(ValueError, match="6 bytes"):
            made.filler.set_filter(b"12345")
        with pytest.raises(ValueError, match="6 bytes"):
            made.filler.set_filter(bytes(6), table=bytes(7))
        with pytest.raises(ValueError, match="12"):
            made.filler.give(frame(60), bytes(11))
        assert not made.filler.give(frame(13))
        assert not made.filler.give(frame(65598))
        assert made.filler.give(frame(65597))
        made.filler.forget()
        assert (made.filler.waiting, made.filler.dropped) == (0, 3)
