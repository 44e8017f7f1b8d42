"""What a guest's requests may cost, and who may be held up by what: each limit and its answer."""

import gc
import subprocess
import sys
import threading
import time

import pytest

from guestio import (
    DeviceError,
    GuestRegionCollection,
    InvalidAddressError,
    MmapRegion,
    Permissions,
)
from guestio.budgets import IOMMU_RECORDS_PER_ACCESS, LOG_BURST
from guestio.dma import DmaError
from guestio.ratelog import LOG
from guestio.testing.targets import FailAfter, RecordingTarget
from guestio.virtio.iommu import VirtioIommu, wire
from guestio.virtio.iommu.serving import FaultReporter
from tests.kit.iommu_driver import (
    DEVERR,
    MMIO,
    NOMEM,
    OK,
    PAGE,
    RW,
    attach,
    detach,
    map_,
    pend,
    probe,
    send,
    send_all,
    status,
    unmap,
)
from tests.kit.iommu_guest import Guest

WAIT = 10


def page(number, domain=1, flags=RW):
    return map_(domain, number * PAGE, number * PAGE + PAGE - 1, number * PAGE, flags)


class TestMappings:
    def test_of_one_domain(self):
        iommu = VirtioIommu(endpoints=[8], max_mappings=3)
        send_all(iommu, attach(8, 1), page(1), page(2), page(3))
        before = iommu.snapshot()
        assert send(iommu, page(4)) is NOMEM
        assert iommu.snapshot() == before
        send_all(iommu, unmap(1, PAGE, 2 * PAGE - 1), page(4))

    def test_of_all_domains_and_their_targets(self):
        """Endpoints share their domain's mappings; each DMA target has a list of its own."""
        physical = GuestRegionCollection.from_ranges([(0, 0x10000)])
        iommu = VirtioIommu(endpoints=[8, 9, 10], max_total_mappings=6)
        iommu.endpoint(8).add_target(RecordingTarget(), physical)
        iommu.endpoint(10).add_target(RecordingTarget(), physical)
        send_all(iommu, attach(8, 1), attach(9, 1))
        send_all(iommu, page(1), page(2))  # 2, and 2 of the target
        send_all(iommu, attach(10, 1))  # 2 more
        before = iommu.snapshot()
        assert send(iommu, page(3)) is NOMEM
        send_all(iommu, detach(10, 1), page(3))
        assert send(iommu, attach(10, 1)) is NOMEM
        with pytest.raises(DeviceError, match="6 mappings"):
            iommu.endpoint(9).add_target(RecordingTarget(), physical)
        send_all(iommu, attach(10, 2))
        assert send(iommu, page(1, domain=2)) is NOMEM
        send_all(iommu, attach(10, 3), detach(10, 3), unmap(1, 3 * PAGE, 4 * PAGE - 1))
        send_all(iommu, attach(10, 1))
        assert iommu.snapshot() == before

    def test_endpoints_cost_nothing(self):
        iommu = VirtioIommu(endpoints=range(50), max_total_mappings=3)
        send_all(iommu, *(attach(number, 1) for number in range(25)))
        send_all(iommu, page(1), page(2), page(3))
        send_all(iommu, *(attach(number, 1) for number in range(25, 50)))
        assert iommu._state.total_mappings == 3
        assert send(iommu, page(4)) is NOMEM

    def test_the_count_follows_every_way_out(self):
        physical = GuestRegionCollection.from_ranges([(0, 0x10000)])
        iommu = VirtioIommu(endpoints=[8, 9, 10], max_total_mappings=6)
        handles = {}

        def close_handles():
            while handles:
                handles.popitem()[1].close()

        def remove():
            close_handles()
            for number in (8, 9):
                iommu.remove_endpoint(number)

        for way_out in (
            lambda: send_all(iommu, detach(8, 1), detach(9, 1)),
            iommu.reset,
            remove,
            lambda: send_all(iommu, attach(10, 3), attach(8, 3), attach(9, 3)),
            lambda: send_all(iommu, attach(8, 4, flags=1), attach(9, 4, flags=1)),
            lambda: [close_handles(), iommu.reset()],
        ):
            for number in (8, 9):
                if number not in iommu.endpoint_ids:
                    iommu.add_endpoint(number)
                if number not in handles:
                    target = RecordingTarget()
                    handles[number] = iommu.endpoint(number).add_target(target, physical)
            send_all(iommu, attach(8, 1), attach(9, 1), page(1), page(2))
            assert iommu._state.total_mappings == 6
            way_out()
            assert iommu._state.total_mappings == 0

    def test_a_target_that_comes_late_is_counted(self):
        physical = GuestRegionCollection.from_ranges([(0, 0x10000)])
        iommu = VirtioIommu(endpoints=[8, 9], max_total_mappings=5)
        send_all(iommu, attach(8, 1), attach(9, 1), page(1), page(2))
        assert iommu._state.total_mappings == 2
        handle = iommu.endpoint(9).add_target(RecordingTarget(), physical)
        assert iommu._state.total_mappings == 4
        assert send(iommu, page(3)) is NOMEM
        handle.close()
        assert iommu._state.total_mappings == 2
        send_all(iommu, page(3))

    def test_a_refused_request_is_not_counted(self):
        physical = GuestRegionCollection.from_ranges([(0, 0x10000)])
        iommu = VirtioIommu(endpoints=[8, 9], max_total_mappings=8)
        target = FailAfter(0, times=1)
        iommu.endpoint(8).add_target(target, physical)
        send_all(iommu, attach(8, 1), attach(9, 2))
        assert send(iommu, page(1)) is NOMEM
        assert iommu._state.total_mappings == 0
        send_all(iommu, page(1), page(2), page(3, domain=2))
        assert iommu._state.total_mappings == 5
        target._times, target.failures, target.remaining = 1, 0, 0
        assert send(iommu, attach(8, 2)) is not OK
        assert iommu._state.total_mappings == 5

    def test_a_bypass_domain_costs_nothing(self):
        iommu = VirtioIommu(endpoints=[8, 9], bypass=True, max_total_mappings=0)
        send_all(iommu, attach(8, 1, flags=1), attach(9, 2))
        assert send(iommu, page(1, domain=2)) is NOMEM

    def test_domains(self):
        iommu = VirtioIommu(endpoints=[8, 9, 10], max_domains=2)
        send_all(iommu, attach(8, 1), attach(9, 2))
        assert send(iommu, attach(10, 3)) is NOMEM
        send_all(iommu, attach(9, 3), attach(10, 3))


class TestWaiting:
    """Requests that wait for a client of exported memory, which lets go late or never."""

    def held(self, **options):
        guest = Guest(**options)
        send_all(guest.iommu, attach(8, 1), page(1), page(2))
        guest.session = guest.iommu.endpoint(8).open_session()
        guest.session.export(PAGE, 1)
        return guest

    def test_beyond_the_limit_a_request_is_refused(self, monkeypatch):
        monkeypatch.setattr("guestio.virtio.iommu.device.IOMMU_WAITING_REQUESTS", 3)
        iommu = self.held().iommu
        waiting = [pend(iommu, unmap(1, PAGE, 2 * PAGE - 1))]
        waiting += [pend(iommu, page(number)) for number in (3, 4)]
        assert send(iommu, page(5)) is NOMEM
        assert send(iommu, probe(8), 516) is OK
        iommu.endpoint(8).sessions[0].release(PAGE, 1)
        assert [status(p.result(0)) for p in waiting] == [OK] * 3
        send_all(iommu, page(5))

    def test_beyond_the_limit_requests_of_a_queue_are_not_begun(self, monkeypatch):
        for module in ("serving", "device"):
            monkeypatch.setattr(f"guestio.virtio.iommu.{module}.IOMMU_WAITING_REQUESTS", 2)
        guest = self.held()
        guest.send(unmap(1, PAGE, 2 * PAGE - 1))
        for number in range(3, 8):
            guest.send(page(number))
        for _ in range(2):
            guest.queues.serve()
            assert guest.queues.waiting == 6
            assert guest.iommu._requests.waiting == 2
        assert guest.answers() == []
        guest.session.release(PAGE, 1)
        assert guest.wakes()
        guest.queues.serve()
        assert guest.answers() == [(bytes(4), 4)] * 6
        assert guest.queues.waiting == 0

    def test_closed_queues_let_go_of_what_is_never_answered(self):
        """The memory of the ring can be closed although the answer is still to come."""
        guest = self.held()
        guest.send(unmap(1, PAGE, 2 * PAGE - 1))
        chains = []
        process = guest.iommu.process
        guest.iommu.process = lambda queue, chain: chains.append(chain) or process(queue, chain)
        guest.queues.serve()
        (chain,) = chains
        chain.writable.write(b"x")
        guest.queues.close()
        with pytest.raises(InvalidAddressError):
            chain.writable.write(b"x")
        assert guest.answers() == [(wire.tail(DEVERR), 4)]
        guest.session.release(PAGE, 1)
        assert not guest.iommu._requests.waiting
        assert guest.answers() == []

    @pytest.mark.parametrize("revoke_after", [None, 60.0])
    @pytest.mark.parametrize("waiting", [False, True])
    def test_a_reset_waits_only_for_so_long(self, revoke_after, waiting):
        """Whatever UNMAP may wait for: a reset must end."""
        iommu = self.held(revoke_after=revoke_after, stop_timeout=0.05).iommu
        (session,) = iommu.endpoint(8).sessions
        answer = pend(iommu, unmap(1, PAGE, 2 * PAGE - 1)) if waiting else None
        done = iommu.reset()
        assert session.fault.is_set
        if done is not None:  # or this machine was too busy to see it wait
            done.result(WAIT)
        assert session.revoked.is_set
        assert answer is None or answer.done
        assert iommu.snapshot()["domains"] == []

    def test_a_shorter_limit_is_not_made_longer_by_a_reset(self):
        iommu = self.held(revoke_after=0.5, stop_timeout=3600.0).iommu
        iommu.handle_request(unmap(1, PAGE, 2 * PAGE - 1), 4)
        done = iommu.reset()
        if done is not None:
            done.result(WAIT)
        assert iommu.snapshot()["domains"] == []

    @pytest.mark.parametrize("revoke_after", [None, 7200.0])
    def test_a_client_that_lets_go_in_time_is_not_revoked(self, revoke_after):
        """And whatever counted its time is gone."""
        iommu = self.held(revoke_after=revoke_after, stop_timeout=3600.0).iommu
        (session,) = iommu.endpoint(8).sessions
        threads = threading.active_count()
        done = iommu.reset()
        session.release(PAGE, 1)
        assert done.done
        assert not session.revoked.is_set
        deadline = time.monotonic() + WAIT
        while threading.active_count() > threads and time.monotonic() < deadline:
            time.sleep(0.001)
        assert threading.active_count() <= threads

    def test_an_access_that_does_not_end_is_reported(self, monkeypatch, caplog):
        """It cannot be taken away, so the guest waits; whose fault it is must be seen."""
        monkeypatch.setattr("guestio.virtio.iommu.state.STOP_TIMEOUT", 0.02)
        guest = self.held()
        guest.session.close()
        memory = guest.iommu.endpoint(8).memory(guest.physical)
        with memory.gather(PAGE, 1, Permissions.READ):
            done = guest.iommu.reset()
            deadline = time.monotonic() + WAIT
            while not caplog.records and time.monotonic() < deadline:
                time.sleep(0.001)
            assert "has not ended for 0.02 s" in caplog.text
            assert not done.done
        done.result(WAIT)

    def test_a_process_ends_all_the_same(self):
        script = """if True:
            from guestio import GuestRegionCollection, Permissions
            from guestio.virtio.iommu import VirtioIommu
            from tests.kit.iommu_driver import *
            iommu = VirtioIommu(endpoints=[8, 9], revoke_after=None)
            send_all(iommu, attach(8, 1), attach(9, 2))
            send_all(iommu, map_(1, 0, 4095, 0), map_(2, 0, 4095, 0))
            iommu.endpoint(8).open_session().export(0, 1)
            memory = iommu.endpoint(9).memory(GuestRegionCollection.from_ranges([(0, 4096)]))
            held = memory.gather(0, 1, Permissions.READ)
            pend(iommu, unmap(1, 0, 4095)), pend(iommu, unmap(2, 0, 4095))
        """
        done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
        assert done.returncode == 0


class TestFailures:
    """A request whose processing raises is seen to fail, and nothing waits for it for ever."""

    def test_answered_with_a_device_error(self, monkeypatch, caplog):
        guest = Guest()
        monkeypatch.setattr(guest.iommu._state, "_attach", lambda request: 1 / 0)
        monkeypatch.setattr(guest.iommu._state, "probe", lambda request, room: 1 / 0)
        assert send(guest.iommu, attach(8, 1)) is DEVERR
        assert send(guest.iommu, probe(8), 516) is DEVERR
        guest.send(attach(8, 1))
        guest.send(probe(8), 516)
        guest.send(probe(8), 100)
        guest.queues.serve()
        answers = guest.answers()
        assert [answer[-4:] for answer, _ in answers] == [wire.tail(DEVERR)] * 3
        assert [written for _, written in answers] == [4, 516, 100]
        assert "ZeroDivisionError" in caplog.text

    def test_a_flood_of_them_does_not_fill_the_log(self, monkeypatch, caplog):
        iommu = VirtioIommu(endpoints=[8])
        monkeypatch.setattr(iommu._state, "probe", lambda request, room: 1 / 0)
        for _ in range(LOG_BURST + 50):
            assert send(iommu, probe(8), 516) is DEVERR
        assert len(caplog.messages) == LOG_BURST
        LOG.flush()
        assert caplog.messages[-1].startswith("50 more lines like this")

    def test_a_device_that_is_someone_elses_too(self):
        class Broken(VirtioIommu):
            def handle_request(self, request, writable):
                raise RuntimeError("a bug")

        guest = Guest()
        guest.iommu.__class__ = Broken
        guest.send(attach(8, 1))
        guest.queues.serve()
        assert guest.answers() == [(wire.tail(DEVERR), 4)]

    @pytest.mark.parametrize("error", [TypeError, RuntimeError, MemoryError])
    @pytest.mark.parametrize("flags", [RW, RW | MMIO])
    def test_a_bug_of_a_target_is_a_device_error(self, error, flags):
        """Also for registers, without which a guest can do: a bug says nothing about those."""
        iommu = VirtioIommu(endpoints=[8])
        physical = GuestRegionCollection.from_ranges([(0, 0x10000)])
        target = FailAfter(0, times=1, error=lambda *_: error("a bug"))
        handle = iommu.endpoint(8).add_target(target, physical)
        send_all(iommu, attach(8, 1))
        assert send(iommu, page(1, flags=flags)) is DEVERR
        assert handle.stats().missing == {}
        send_all(iommu, page(1, flags=flags))

    def test_an_interrupt_is_undone_and_blocks_no_request(self):
        iommu = VirtioIommu(endpoints=[8, 9])
        physical = GuestRegionCollection.from_ranges([(0, 0x10000)])
        good = RecordingTarget()
        bad = FailAfter(0, times=1, error=lambda *_: KeyboardInterrupt())
        iommu.endpoint(8).add_target(good, physical)
        iommu.endpoint(9).add_target(bad, physical)
        send_all(iommu, attach(8, 1), attach(9, 1))
        with pytest.raises(KeyboardInterrupt):
            iommu.handle_request(page(1), 4)
        assert good.held == bad.held == {}
        assert iommu.snapshot()["domains"][0]["mappings"] == []
        send_all(iommu, page(1))
        assert good.held.keys() == bad.held.keys() == {PAGE}

    def test_an_interrupt_blocks_no_request_behind_it(self):
        iommu = VirtioIommu(endpoints=[8], revoke_after=None)
        physical = GuestRegionCollection.from_ranges([(0, 0x10000)])
        target = FailAfter(1, times=1, error=lambda *_: KeyboardInterrupt())
        iommu.endpoint(8).add_target(target, physical)
        send_all(iommu, attach(8, 1), page(1))
        session = iommu.endpoint(8).open_session()
        session.export(PAGE, 1)
        waiting = [
            pend(iommu, request) for request in (unmap(1, PAGE, 2 * PAGE - 1), page(2), page(3))
        ]
        with pytest.raises(KeyboardInterrupt):
            session.release(PAGE, 1)
        assert [status(p.result(0)) for p in waiting] == [OK, DEVERR, OK]
        assert list(target.held) == [3 * PAGE]


class TestFaults:
    def test_an_access_over_very_many_mappings_looks_at_few(self, monkeypatch):
        """A driver chooses how long a buffer is; what one fault costs must not grow with it."""
        iommu = VirtioIommu(endpoints=[8])
        send_all(iommu, attach(8, 1), *(page(n, flags=2) for n in range(3000)))
        endpoint = iommu.endpoint(8)
        looked_at = []
        real = endpoint.space.mapper.mappings

        def mappings(*args, **options):
            looked_at.append(len(found := real(*args, **options)))
            return found

        monkeypatch.setattr(endpoint.space.mapper, "mappings", mappings)
        memory = endpoint.memory(GuestRegionCollection.from_ranges([(0, 3000 * PAGE)]))
        with pytest.raises(Exception, match="does not allow"):
            memory.read(PAGE, 2900 * PAGE)
        assert looked_at == [IOMMU_RECORDS_PER_ACCESS]
        records = iommu.event_records()
        assert [r.address for r in records] == [
            n * PAGE for n in range(1, 1 + IOMMU_RECORDS_PER_ACCESS)
        ]

    def test_buffers_that_are_too_small_and_never_end(self, monkeypatch):
        """A driver gives them back as fast as they come: the caller has its turn all the same."""
        monkeypatch.setattr("guestio.virtio.iommu.serving.IOMMU_EVENTS_PER_TURN", 8)
        guest = Guest()
        guest.fault()
        fill = FaultReporter._fill_one

        def refilled(*args):
            fill(*args)
            guest.driver[1].collect()
            guest.add_event_buffer(4)

        monkeypatch.setattr(FaultReporter, "_fill_one", refilled)
        guest.add_event_buffer(4)
        guest.queues.serve()
        filled = guest.queues.short_buffers
        assert filled
        assert guest.wakes()
        guest.queues.serve()
        assert guest.queues.short_buffers == 2 * filled
        guest.queues.close()


class TestMemoryThatChanges:
    """A target that follows guest memory: RAM is plugged and unplugged under it."""

    def regions(self, *starts):
        return [MmapRegion.memfd(start, 0x10000) for start in starts]

    def test_plugged_and_unplugged(self):
        low, high = self.regions(0, 0x100000)
        target = RecordingTarget()
        iommu = VirtioIommu(endpoints=[8])
        one = GuestRegionCollection.from_regions([low])
        handle = iommu.endpoint(8).add_target(target, one)
        send_all(iommu, attach(8, 1), page(1))
        plugged = map_(1, 0x200000, 0x200FFF, 0x100000)
        assert send(iommu, plugged) is not OK
        both = one.insert_region(high)
        events = len(target.events)
        handle.change_memory(both)
        assert target.events[events:] == [], "what stays is not touched"
        send_all(iommu, plugged)
        assert target.held[0x200000].host_address == high.host_address()
        handle.change_memory(one)
        assert list(target.held) == [PAGE]
        handle.change_memory(both)
        assert sorted(target.held) == [PAGE, 0x200000]
        send_all(iommu, unmap(1, 0, 2**64 - 1))
        assert target.held == {}

    def test_unattached_in_bypass_mode(self):
        low, high = self.regions(0, 0x100000)
        target = RecordingTarget()
        iommu = VirtioIommu(endpoints=[8], bypass=True)
        one = GuestRegionCollection.from_regions([low])
        handle = iommu.endpoint(8).add_target(target, one)
        handle.change_memory(one.insert_region(high))
        assert sorted(target.held) == [0, 0x100000]
        assert len(target.events) == 2

    def test_memory_that_was_exchanged(self):
        old, new = self.regions(0, 0)
        target = RecordingTarget()
        iommu = VirtioIommu(endpoints=[8])
        handle = iommu.endpoint(8).add_target(target, GuestRegionCollection.from_regions([old]))
        send_all(iommu, attach(8, 1), page(1), page(2))
        handle.change_memory(GuestRegionCollection.from_regions([new]))
        assert target.held[PAGE].host_address == new.host_address(PAGE)
        assert [e.call for e in target.events[2:]] == ["unmap", "map"] * 2

    @pytest.mark.parametrize("after", range(5))
    def test_all_or_nothing(self, after):
        old, new = self.regions(0, 0)
        target = FailAfter(99, calls=("map", "unmap"))
        iommu = VirtioIommu(endpoints=[8])
        before = GuestRegionCollection.from_regions([old])
        handle = iommu.endpoint(8).add_target(target, before)
        send_all(iommu, attach(8, 1), page(1), page(2))
        held = dict(target.held)
        target.remaining, target._times = after, 1
        change = GuestRegionCollection.from_regions([new])
        if after == 4:
            handle.change_memory(change)
            assert target.held != held
            return
        with pytest.raises(DmaError):
            handle.change_memory(change)
        assert target.held == held
        send_all(iommu, page(3))
        assert target.held[3 * PAGE].host_address == old.host_address(3 * PAGE)

    def test_memory_of_what_is_stuck_is_kept(self):
        (old, new) = self.regions(0, 0)
        target = FailAfter(0, calls=("unmap",), times=1)
        iommu = VirtioIommu(endpoints=[8])
        handle = iommu.endpoint(8).add_target(target, GuestRegionCollection.from_regions([old]))
        send_all(iommu, attach(8, 1), page(1))
        iommu.reset()
        assert list(handle.stats().stuck) == [PAGE]
        handle.change_memory(GuestRegionCollection.from_regions([new]))
        backing = old.backing
        del old
        gc.collect()
        with pytest.raises(BufferError):
            backing.close()
        handle.close()
        gc.collect()
        backing.close()

    def test_not_for_anything_else(self):
        iommu = VirtioIommu(endpoints=[8])
        physical = GuestRegionCollection.from_ranges([(0, 0x10000)])
        handle = iommu.endpoint(8).add_target(RecordingTarget(), physical)
        for bad in (None, [], GuestRegionCollection, physical.slices(0, 1)):
            with pytest.raises(TypeError, match="physical"):
                handle.change_memory(bad)
            with pytest.raises(TypeError, match="physical"):
                iommu.endpoint(8).add_target(RecordingTarget(), bad)
