"""Who is told what and when: notification suppression both ways, and drivers that poll.

Rules: virtio 1.3 sections 2.7.7 (driver's wish), 2.7.10 (device's wish), 2.7.13 and 2.7.14 (order).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from tests.kit.rings import WRITE, Desc, Rig, Tables, physical

if TYPE_CHECKING:
    from collections.abc import Callable

A = 0x10000


def serve(rig: Rig, count: int = 1) -> bool | None:
    """Serve so many requests and show them at once."""
    rig.offer(*[0] * count)
    for chain in rig.ring.pop(count)[0]:
        rig.ring.complete(chain, 0)
    return rig.ring.publish()


def ready(**options: int) -> Rig:
    _, rig = physical(**options)
    rig.put(0, Desc(A, 1))
    return rig


class TestDriverIsNotified:
    def test_without_event_index_the_flag_decides(self) -> None:
        rig = ready()
        assert serve(rig) is True
        rig.set_avail_flags(1)
        assert serve(rig) is False
        rig.set_avail_flags(0xFFFE)
        assert serve(rig) is True

    def test_with_event_index_the_flag_means_nothing(self) -> None:
        rig = ready(event_idx=True)
        rig.set_avail_flags(1)
        assert serve(rig) is True

    def test_the_first_time_always(self) -> None:
        # What the driver saw before we came is unknown; a notification too many does no harm.
        rig = ready(event_idx=True)
        rig.set_used_event(7)
        assert serve(rig) is True
        assert serve(rig) is False

    def test_when_the_index_passes_the_event(self) -> None:
        rig = ready(event_idx=True)
        serve(rig)
        told = []
        rig.set_used_event(4)
        for _ in range(8):
            told.append(serve(rig))
        assert told == [False] * 3 + [True] + [False] * 4

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_when_a_batch_passes_the_event(self) -> None:
        rig = ready(event_idx=True)
        serve(rig)
        rig.set_used_event(5)
        assert serve(rig, 4) is False
        assert serve(rig, 3) is True
        assert serve(rig, 8) is False

    @settings(max_examples=200, deadline=None)
    @given(
        start=st.one_of(st.integers(0, 0xFFFF), st.integers(0xFFF0, 0xFFFF)),
        event=st.integers(0, 0xFFFF),
        count=st.integers(1, 8),
        near=st.booleans(),
    )
    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_the_formula_of_the_specification(
        self, start: int, event: int, count: int, near: bool
    ) -> None:
        rig = ready(event_idx=True, base=(start - 1) & 0xFFFF)
        rig.view.write(rig.used + 2, ((start - 1) & 0xFFFF).to_bytes(2, "little"))
        serve(rig)
        if near:
            event = (start + event % 12 - 2) & 0xFFFF
        rig.set_used_event(event)
        assert serve(rig, count) is (event in {(start + i) & 0xFFFF for i in range(count)})
        assert rig.used_idx == (start + count) & 0xFFFF

    def test_a_polling_driver_is_left_alone(self) -> None:
        rig = ready(event_idx=True)
        serve(rig)
        for i in range(3000):
            # As Linux does: an index that was just passed comes up again last.
            rig.set_used_event((1 + i - 1) & 0xFFFF)
            assert serve(rig) is False


class TestDeviceIsNotified:
    def test_without_event_index_by_a_flag(self) -> None:
        rig = ready()
        rig.ring.disable_kicks()
        assert rig.used_flags == 1
        assert rig.ring.enable_kicks() is False
        assert rig.used_flags == 0

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_with_event_index_by_the_next_index(self) -> None:
        rig = ready(event_idx=True)
        rig.ring.disable_kicks()
        assert rig.used_flags == 0
        serve(rig, 3)
        assert rig.avail_event == 0
        assert rig.ring.enable_kicks() is False
        assert rig.avail_event == 3
        assert rig.used_flags == 0

    @pytest.mark.parametrize("event_idx", [False, True])
    def test_what_is_available_already_is_reported(self, event_idx: bool) -> None:
        rig = ready(event_idx=event_idx)
        rig.offer(0, 0)
        assert rig.ring.enable_kicks() is True
        rig.ring.pop(1)
        assert rig.ring.enable_kicks() is True
        rig.ring.pop()
        assert rig.ring.enable_kicks() is False

    def test_the_event_wraps_with_the_index(self) -> None:
        rig = ready(event_idx=True, base=0xFFFF)
        rig.ring.enable_kicks()
        assert rig.avail_event == 0xFFFF
        serve(rig, 2)
        rig.ring.enable_kicks()
        assert rig.avail_event == 1

    def test_behind_a_translation_that_is_gone(self) -> None:
        tables = Tables()
        rig = tables.rig(event_idx=True)
        tables.tell_missing(rig.ring.missing())
        assert rig.ring.enable_kicks() is False
        tables.move(rig.used)
        assert rig.ring.enable_kicks() is None
        tables.tell_missing(rig.ring.missing())
        assert rig.ring.enable_kicks() is False


class Shared:
    """A ring in memory that another process maps as well."""

    SIZE = 4096

    def __init__(self) -> None:
        backing = Backing.memfd(0x40000)
        memory = GuestRegionCollection.from_regions([MmapRegion(0, backing)])
        self.rig = Rig(memory._space, memory, size=self.SIZE, desc=0, avail=0x10000, used=0x20000)
        for head in range(self.SIZE):
            self.rig.put(head, Desc(0x38000, 0x8000, WRITE))
        assert backing.fd is not None
        self._map = mmap.mmap(backing.fd, 0x40000)
        self.avail_idx = ctypes.c_uint16.from_buffer(self._map, 0x10002)
        self.used_idx = ctypes.c_uint16.from_buffer(self._map, 0x20002)
        self.used = memoryview(self._map)[0x20004 : 0x20004 + 8 * self.SIZE]

    def polling_driver(self, seconds: float) -> int:
        """Offer requests and read the used ring without pause; 0 if it never made no sense."""
        self.rig.set_avail_flags(1)
        element = struct.Struct("<II").unpack_from
        seen = offered = 0
        deadline = time.monotonic() + seconds
        while (late := time.monotonic() - deadline) < 0 or seen < offered or seen <= 20000:
            if late > 60:
                return 5  # the device has stopped
            batch = 1 + offered % 1999
            if (late < 0 or offered <= 20000) and offered - seen + batch <= self.SIZE:
                self.rig.offer(*[(offered + i) % self.SIZE for i in range(batch)])
                offered += batch
            for _ in range(200):
                ahead = (self.used_idx.value - seen) & 0xFFFF
                if ahead > offered - seen:
                    return 2  # backwards, or beyond what it was given
                # The last one first: were the index too early, that one would come latest.
                for number in range(seen + ahead - 1, seen - 1, -1):
                    # The device writes the running number of the request as its length.
                    used = element(self.used, 8 * (number % self.SIZE))
                    if used != (number % self.SIZE, number & 0x7FFF):
                        return 3  # published before it was written
                seen += ahead
        return 0


@pytest.mark.slow
def test_a_driver_that_polls_in_another_process_never_sees_an_unwritten_element() -> None:
    shared = Shared()
    child = _fork(lambda: shared.polling_driver(2.5))
    ring, served, notified = shared.rig.ring, 0, 0
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            chains, misses = ring.pop(2048)
            assert misses == []
            if not chains and os.waitid(os.P_PID, child, _EXITED) is not None:
                break
            for chain in chains:
                ring.complete(chain, served & 0x7FFF)
                served += 1
            notified += bool(ring.publish())
    finally:
        status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0
    assert served > 20000
    assert notified == 0


_EXITED = os.WEXITED | os.WNOHANG | os.WNOWAIT


def _fork(work: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        try:
            os._exit(work())
        finally:
            os._exit(99)
    return child


class TestSpinning:
    def test_until_there_is_a_request(self) -> None:
        rig = ready()
        with contextlib.closing(select.epoll()) as nothing:
            assert not rig.ring.spin(0.001, nothing.fileno())
            driver = threading.Timer(0.02, rig.offer, [0])
            driver.start()
            deadline = time.monotonic() + 60
            # The driver of this test needs the GIL, which is kept while the ring is looked at.
            while not rig.ring.spin(0.0001, nothing.fileno()):
                assert time.monotonic() < deadline
            driver.join()
        assert len(rig.ring.pop()[0]) == 1

    def test_not_while_something_else_is_due(self) -> None:
        rig = ready()
        here, there = socket.socketpair()
        with here, there, contextlib.closing(select.epoll()) as epoll:
            epoll.register(here, select.EPOLLIN | select.EPOLLET)
            there.send(b"x")
            started = time.monotonic()
            assert not rig.ring.spin(30, epoll.fileno())
            assert time.monotonic() - started < 10
            assert epoll.poll(0) == [(here.fileno(), select.EPOLLIN)], "its edge is still there"

    def test_not_without_a_translation(self) -> None:
        rig = Tables().rig()
        assert rig.ring.spin(30, 0) is False
