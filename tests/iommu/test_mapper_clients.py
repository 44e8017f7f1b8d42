"""Clients of a memory mapper: events, faults, time limits, exported memory."""

import asyncio
import logging
import select
import threading
import time

import pytest

from guestio import CannotResolveError, GuestRegionCollection, InvalidAddressError, Permissions
from guestio.budgets import EXPORT_RANGES
from guestio.iommu import (
    AddMapResult,
    BasicMemoryMapper,
    Event,
    ExportedRegion,
    ExportError,
    MappingInfo,
    MemoryMapper,
)
from guestio.iommu.events import all_of

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
MAX = 2**64 - 1


def mapper_of(*entries, **settings):
    mapper = BasicMemoryMapper(**settings)
    for iova, size, gpa, prot in entries:
        assert mapper.add_map(MappingInfo(iova, gpa, size, prot)) is AddMapResult.OK
    return mapper


class TestEvent:
    def test_happens_once(self):
        event, calls = Event(), []
        event.add_callback(lambda: calls.append(1))
        assert not event.is_set
        assert not event.wait(0)
        event.set()
        event.set()
        event.add_callback(lambda: calls.append(2))
        assert calls == [1, 2]
        assert event.wait(0)

    def test_removed_callbacks_do_not_run(self):
        event, calls = Event(), []
        event.add_callback(calls.clear)
        event.remove_callback(calls.clear)
        event.remove_callback(calls.clear)
        calls.append(1)
        event.set()
        assert calls == [1]

    def test_a_callback_that_fails_does_not_stop_the_others(self, caplog):
        event, calls = Event(), []
        event.add_callback(lambda: 1 / 0)
        event.add_callback(lambda: calls.append(1))
        with caplog.at_level(logging.ERROR):
            event.set()
        assert calls == [1]
        assert "ZeroDivisionError" in caplog.text

    @pytest.mark.parametrize("early", [False, True])
    def test_in_a_loop_of_descriptors(self, early):
        event = Event()
        if early:
            event.set()
        else:
            assert select.select([event], [], [], 0)[0] == []
            threading.Timer(0.01, event.set).start()
        assert select.select([event], [], [], 10)[0] == [event]
        # It stays readable.
        assert select.select([event], [], [], 0)[0] == [event]

    def test_in_a_thread(self):
        event = Event()
        threading.Timer(0.01, event.set).start()
        assert event.wait(10)

    def test_in_asyncio(self):
        async def run():
            event = Event()
            asyncio.get_running_loop().call_later(0.01, event.set)
            assert await event is True
            assert await event is True
            other = Event()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(other, 0.01)
            threading.Timer(0.01, other.set).start()
            await other

        asyncio.run(asyncio.wait_for(run(), 10))

    def test_all_of(self):
        assert all_of([]) is None
        events = [Event() for _ in range(3)]
        assert all_of(events[:1]) is events[0]
        combined = all_of(events)
        events[1].set()
        events[0].set()
        assert not combined.is_set
        events[2].set()
        assert combined.is_set
        assert all_of(events).is_set


class TestWholeSpace:
    """The whole 64-bit space can be mapped."""

    def test_the_last_byte(self):
        mapper = mapper_of((MAX, 1, MAX, RW))
        mapper.start_export_session()
        assert mapper.export(MAX, 1) == [(MAX, 1, RW)]
        mapper.release(MAX, 1)
        assert not mapper.remove_map(MAX, 1).overlap
        assert len(mapper) == 0

    def test_all_of_it_at_once(self):
        mapper = mapper_of((0, 2**64, 0, RW))
        mapper.start_export_session()
        assert mapper.export(0, 2**64) == [(0, 2**64, RW)]
        assert mapper.remove_map(0, MAX).overlap
        assert not mapper.remove_map(0, 2**64).fault.is_set

    def test_what_wraps_is_mapped_but_not_exported(self):
        mapper = BasicMemoryMapper()
        assert mapper.add_range(0, 0x20, MAX - 0xF, RW) is AddMapResult.OK
        mapper.start_export_session()
        assert mapper.export(0, 0x10) == [(MAX - 0xF, 0x10, RW)]
        with pytest.raises(CannotResolveError):
            mapper.export(0, 0x11)


def test_is_free():
    mapper = mapper_of((10, 10, 0, R), (30, 1, 0, R))
    free = [(0, 10), (20, 10), (31, 1), (40, 2**64 - 40)]
    taken = [(0, 11), (10, 1), (19, 1), (12, 3), (0, 2**64), (20, 11), (30, 1), (0, 31)]
    assert all(mapper.is_free(*where) for where in free)
    assert not any(mapper.is_free(*where) for where in taken)


def test_failing_ranges_are_named():
    mapper = mapper_of((0x1000, 0x1000, 0, R), (0x3000, 0x1000, 0, R))
    session = mapper.open_session()
    seen = []
    session.on_unmapped = seen.append
    with pytest.raises(CannotResolveError) as caught:
        session.export(0x1800, 0x2000)
    assert caught.value.iova_range == (0x2000, 0x1800)
    assert seen == [(0x2000, 0x1800)]
    assert session.exports == []


class TestSeveralClients:
    def test_only_those_who_hold_it_fault(self):
        mapper = mapper_of((0, 0x1000, 0, RW), (0x1000, 0x1000, 0, RW))
        one, two, three = sessions = [mapper.open_session() for _ in range(3)]
        one.export(0, 1)
        two.export(0x800, 0x1000)
        three.export(0x1000, 1)
        assert mapper.sessions == sessions
        fault = mapper.remove_map(0, 0x1000).fault
        assert [s.fault.is_set for s in sessions] == [True, True, False]
        one.release(0, 1)
        assert not fault.is_set
        two.release(0x800, 0x1000)
        assert fault.is_set
        assert three.export(0x1FFF, 1)

    def test_a_second_fault_waits_for_those_that_are_new(self):
        mapper = mapper_of((0, 0x1000, 0, RW), (0x1000, 0x1000, 0, RW))
        one, two = mapper.open_session(), mapper.open_session()
        one.export(0, 0x2000)
        two.export(0x1000, 1)
        first = mapper.remove_map(0, 0x1000).fault
        second = mapper.remove_map(0x1000, 0x1000).fault
        two.close()
        assert second.is_set
        assert not first.is_set
        assert mapper.pending_faults()
        one.close()
        assert first.is_set
        assert mapper.pending_faults() == []

    def test_a_session_that_is_closed_holds_and_exports_nothing(self):
        mapper = mapper_of((0, 0x1000, 0, RW))
        with mapper.open_session() as session:
            session.export(0, 1)
        assert mapper.sessions == []
        assert mapper.remove_map(0, 0x1000).fault is None
        with pytest.raises(ExportError):
            session.export(0, 1)
        session.close()

    def test_moves_between_siblings(self):
        old = mapper_of((0, 0x1000, 0x1000, RW))
        new = mapper_of((0, 0x1000, 0x2000, RW), sibling=old)
        session = old.open_session()
        assert session.move(new) is None
        assert session.export(0, 1) == [(0x2000, 1, RW)]
        assert old.reset_domain() is None
        fault = session.move(old)
        assert session.fault.is_set
        session.release(0, 1)
        assert fault.is_set
        with pytest.raises(ValueError, match="sibling"):
            session.move(BasicMemoryMapper())

    def test_exports_are_limited(self):
        mapper = mapper_of((0, 0x10000, 0, RW))
        session = mapper.open_session()
        for at in range(EXPORT_RANGES):
            session.export(at, 1)
        with pytest.raises(ExportError, match="release some"):
            session.export(EXPORT_RANGES, 1)
        session.export(0, 1)
        session.release(1, 1)
        session.export(EXPORT_RANGES, 1)

    def test_stray_releases_are_counted(self, caplog):
        session = mapper_of((0, 1, 0, RW)).open_session()
        session.export(0, 1)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                session.release(5, 0)
        assert session.stray_releases == 3
        assert len(caplog.records) == 1
        assert session.exports == [(0, 1)]

    def test_exports_are_listed_as_often_as_made(self):
        session = mapper_of((0, 16, 0, RW)).open_session()
        for args in ((4, 4), (0, 8), (4, 4)):
            session.export(*args)
        assert session.exports == [(0, 8), (4, 4), (4, 4)]


class TestTimeLimit:
    def test_revocation_by_force(self):
        mapper = mapper_of((0, 0x1000, 0, RW), time_limit=0.05)
        session = mapper.open_session()
        session.export(0, 1)
        session.export(0, 1)
        order = []
        session.fault.add_callback(lambda: order.append("fault"))
        session.revoked.add_callback(lambda: order.append("revoked"))
        began = time.monotonic()
        fault = mapper.remove_map(0, 1 << 20).fault
        fault.add_callback(lambda: order.append("resolved"))
        assert fault.wait(10)
        assert time.monotonic() - began >= 0.05
        assert order == ["fault", "revoked", "resolved"]
        assert session.exports == []

    def test_a_release_in_time_prevents_revocation(self):
        mapper = mapper_of((0, 0x1000, 0, RW))
        session = mapper.open_session(time_limit=2.0)
        session.export(0, 1)
        fault = mapper.remove_map(0, 0x1000).fault
        session.release(0, 1)
        assert fault.is_set
        time.sleep(2.2)
        assert not session.revoked.is_set

    def test_no_revocation_without_a_limit(self):
        mapper = mapper_of((0, 0x1000, 0, RW))
        session = mapper.open_session()
        session.export(0, 1)
        assert not mapper.remove_map(0, 0x1000).fault.wait(0.1)

    def test_revoking_a_client_without_a_fault(self):
        mapper = mapper_of((0, 0x1000, 0, RW))
        session = mapper.open_session()
        session.export(0, 1)
        pending = []
        session.revoked.add_callback(lambda: pending.extend(mapper.pending_faults()))
        session.revoke()
        assert session.fault.is_set
        assert session.revoked.is_set
        # Who unmaps while the client is being cut off has something to wait for.
        assert [event.is_set for event in pending] == [True]
        assert mapper.pending_faults() == []
        assert mapper.remove_map(0, 0x1000).fault is None


class TestExportedRegion:
    """Memory that a client holds."""

    def setup_method(self):
        self.physical = GuestRegionCollection.from_ranges([(0, 0x10000)])
        self.mapper = mapper_of(
            (0x1000, 0x1000, 0x4000, RW), (0x2000, 0x1000, 0x8000, R), (0x9000, 0x1000, 0xF800, RW)
        )
        self.session = self.mapper.open_session()

    def region(self, iova, size):
        return ExportedRegion(self.session, iova, size, self.physical)

    def test_access_is_clamped_to_the_range_and_its_pieces(self):
        self.physical.write(0x4800, b"a" * 0x800 + b"b" * 0x100)
        with self.region(0x1800, 0x1000) as region:
            assert [tuple(s) for s in region.segments] == [(0x4800, 0x800, RW), (0x8000, 0x800, R)]
            # From the middle of a piece it goes on in the next one, not behind the piece.
            assert region.memory.read(0x1FFE, 4) == b"aa\0\0"
            region.memory.write(0x1800, b"xy")
            assert self.physical.read(0x4800, 2) == b"xy"
            for iova, size in ((0x17FF, 1), (0x2800, 1), (0x27FF, 2)):
                with pytest.raises(CannotResolveError):
                    region.memory.read(iova, size)
            with pytest.raises(CannotResolveError):
                region.memory.write(0x2000, b"x")

    def test_released_when_left(self):
        with self.region(0x1000, 16) as region:
            assert region.valid
            assert self.session.exports == [(0x1000, 16)]
        assert self.session.exports == []
        assert not region.valid
        with pytest.raises(CannotResolveError):
            region.memory.read(0x1000, 1)
        region.close()

    def test_memory_that_is_not_there_is_not_kept(self):
        with pytest.raises(InvalidAddressError):
            self.region(0x9000, 0x1000)
        assert self.session.exports == []
        with pytest.raises(CannotResolveError):
            self.region(0x5000, 1)
        assert self.session.exports == []

    def test_usable_until_released_after_a_fault(self):
        region = self.region(0x1000, 16)
        fault = self.mapper.remove_map(0x1000, 0x1000).fault
        region.memory.write(0x1000, b"x")
        region.close()
        assert fault.is_set

    def test_revocation_takes_it_away_before_callbacks_run(self):
        region = self.region(0x1000, 16)
        fault = self.mapper.remove_map(0x1000, 0x1000).fault
        seen = []
        fault.add_callback(lambda: seen.append(region.memory.check_range(0x1000, 1)))
        self.session.revoke()
        assert seen == [False]
        assert not region.valid
        region.close()

    def test_revocation_waits_for_an_access_that_has_begun(self):
        region = self.region(0x1000, 16)
        fault = self.mapper.remove_map(0x1000, 0x1000).fault
        vector = region.memory.gather(0x1000, 16, W)
        thread = threading.Thread(target=self.session.revoke)
        thread.start()
        assert not fault.wait(0.02)
        vector.write(b"still ours")
        vector.close()
        assert fault.wait(10)
        thread.join()

    def test_closing_while_this_thread_uses_it(self):
        region = self.region(0x1000, 16)
        with region.memory.gather(0x1000, 1, R), pytest.raises(RuntimeError):
            region.close()
        assert region.valid
        region.close()


class TestContract:
    def test_kinds_that_cannot_export(self):
        class Plain(MemoryMapper):
            add_map = remove_map = id = mask = supports_detach = None

        plain = Plain()
        assert plain.reset_domain() is None
        for call in (
            plain.start_export_session,
            lambda: plain.export(0, 1),
            lambda: plain.release(0, 1),
        ):
            with pytest.raises(ExportError, match="does not export"):
                call()

    def test_facts(self):
        mapper = BasicMemoryMapper(0x1000)
        assert (mapper.mask, mapper.supports_detach, len(mapper), bool(mapper)) == (
            0x1000,
            True,
            0,
            True,
        )
        for mask in (0, 2**64, -1):
            with pytest.raises(ValueError):
                BasicMemoryMapper(mask)

    def test_info_makes_permissions(self):
        assert MappingInfo(0, 0, 1, 2).prot is W
        with pytest.raises(ValueError):
            MappingInfo(0, 0, 1, 9)


def test_threads_that_export_while_another_unmaps():
    """Every unmap is answered, and no client holds what was unmapped when it is."""
    mapper = mapper_of((0, 0x1000, 0x8000, RW))
    stop = threading.Event()
    exported = [0]

    def client():
        session = mapper.open_session()
        while not stop.is_set():
            try:
                session.export(0, 16)
                exported[0] += 1
                session.release(0, 16)
            except CannotResolveError:
                pass
            except ExportError:
                session.close()
                session = mapper.open_session()
        session.close()

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 1
    while time.monotonic() < end or not exported[0]:
        fault = mapper.remove_map(0, 0x1000).fault
        assert fault is None or fault.wait(10)
        assert all(session.exports == [] for session in mapper.sessions)
        mapper.add_map(MappingInfo(0, 0x8000, 0x1000, RW))
        time.sleep(0)
    stop.set()
    for thread in threads:
        thread.join()
