"""Requests that must wait: for exported memory, for accesses that have begun, for each other."""

import asyncio
import select
import threading
import time

import pytest

from guestio import CannotResolveError, DeviceError, GuestRegionCollection, Permissions
from guestio.iommu import ExportError
from guestio.virtio.iommu import Pending, VirtioIommu
from tests.kit.iommu_driver import (
    INVAL,
    NOENT,
    OK,
    PAGE,
    RANGE,
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


def held(**settings):
    """Endpoint 8 in domain 1 with two pages mapped, the first held by a client; 9 in domain 2."""
    iommu = VirtioIommu(**{"endpoints": [8, 9, 10], "revoke_after": None, **settings})
    send_all(iommu, attach(8, 1), attach(9, 2))
    for domain in (1, 2):
        send_all(iommu, *(map_(domain, at, at + PAGE - 1, at) for at in (0, PAGE)))
    endpoint = iommu.endpoint(8)
    fault = endpoint.start_export_session()
    assert endpoint.export(0, 16) == [(0, 16, Permissions.READ_WRITE)]
    return iommu, endpoint, fault


RELEASING = {
    "unmap": unmap(1, 0, 2 * PAGE - 1),
    "detach": detach(8, 1),
    "attach-elsewhere": attach(8, 3),
    "attach-to-another": attach(8, 2),
}


@pytest.mark.parametrize("request_", RELEASING.values(), ids=RELEASING.keys())
def test_answered_after_the_release(request_):
    iommu, endpoint, fault = held()
    pending = pend(iommu, request_)
    assert fault.is_set
    endpoint.release(0, 16)
    assert pending.done
    assert status(pending.result(0)) is OK


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (1, 1, RANGE),
        (0, 0, RANGE),
        (1, 3, RANGE),
        (2, 2, RANGE),
        (0, 1, OK),
        (0, 3, OK),
        (4, 9, OK),
    ],
)
def test_what_was_mapped_as_one_is_not_cut(first, last, expected):
    """At either end of the range, or in its middle; two mappings of two pages each."""
    iommu = VirtioIommu(endpoints=[8])
    send_all(iommu, attach(8, 1))
    send_all(iommu, *(map_(1, at, at + 2 * PAGE - 1, at) for at in (0, 2 * PAGE)))
    before = iommu.snapshot()
    assert send(iommu, unmap(1, first * PAGE, last * PAGE + PAGE - 1)) is expected
    if expected is RANGE:
        assert iommu.snapshot() == before


def test_what_is_not_held_is_answered_at_once():
    iommu, _, fault = held()
    assert send(iommu, unmap(1, PAGE, 2 * PAGE - 1)) is OK
    assert send(iommu, unmap(1, 0, 7)) is RANGE
    assert not fault.is_set


def test_other_domains_go_on():
    iommu, endpoint, _ = held()
    pending = pend(iommu, unmap(1, 0, PAGE - 1))
    send_all(iommu, unmap(2, 0, PAGE - 1), map_(2, 0, PAGE - 1, 0), detach(9, 2), attach(9, 2))
    assert send(iommu, attach(10, 3)) is OK
    assert send(iommu, probe(8), 516) is OK
    assert send(iommu, map_(77, 0, PAGE - 1, 0)) is NOENT
    assert not pending.done
    endpoint.release(0, 16)
    assert pending.done


def test_the_order_within_a_domain_is_kept():
    iommu, endpoint, _ = held()
    done = []
    pending = [
        pend(iommu, request)
        for request in (
            unmap(1, 0, PAGE - 1),
            map_(1, 0, PAGE - 1, 0x8000),
            map_(1, 0, PAGE - 1, 0x9000),
            attach(10, 1),
            unmap(1, PAGE, PAGE),
            detach(8, 1),
        )
    ]
    for number, answer in enumerate(pending):
        answer.add_callback(lambda number=number: done.append(number))
    # Something else of the endpoint that is on its way to the domain waits behind that.
    behind = pend(iommu, attach(10, 3))
    assert iommu.endpoint(10).domain is None
    endpoint.release(0, 16)
    assert [status(p.result(0)) for p in pending] == [OK, OK, INVAL, OK, RANGE, OK]
    assert done == list(range(6))
    assert status(behind.result(0)) is OK
    assert iommu.endpoint(10).domain == 3


def test_a_move_waits_in_both_domains():
    iommu, endpoint, _ = held()
    first = pend(iommu, unmap(1, 0, PAGE - 1))
    move = pend(iommu, attach(9, 1))
    # Domain 2 loses endpoint 9 with that, so its requests wait too, in order.
    last = pend(iommu, map_(2, 0x8000, 0x8FFF, 0))
    endpoint.release(0, 16)
    assert [status(p.result(0)) for p in (first, move, last)] == [OK, OK, NOENT]


def test_a_release_in_another_thread():
    iommu, endpoint, fault = held()

    def client():
        fault.wait(10)
        endpoint.release(0, 16)

    thread = threading.Thread(target=client)
    thread.start()
    answer = iommu.handle_request(unmap(1, 0, PAGE - 1), 4)
    if isinstance(answer, Pending):
        answer = answer.result(10)
    thread.join()
    assert status(answer) is OK


def test_pending_in_asyncio_and_in_a_loop_of_descriptors():
    async def run():
        iommu, endpoint, fault = held()
        pending = pend(iommu, unmap(1, 0, PAGE - 1))
        assert select.select([pending, fault], [], [], 0)[0] == [fault]

        async def client():
            await fault
            endpoint.release(0, 16)

        answer, _ = await asyncio.gather(pending, client())
        assert status(answer) is OK
        assert select.select([pending], [], [], 0)[0] == [pending]

    asyncio.run(asyncio.wait_for(run(), 10))


def test_result_gives_up_after_its_time():
    iommu, _, _ = held()
    with pytest.raises(TimeoutError):
        pend(iommu, unmap(1, 0, PAGE - 1)).result(0.01)


def test_a_client_that_never_releases_is_revoked():
    iommu, endpoint, _ = held(revoke_after=0.05)
    (session,) = endpoint.sessions
    order = []
    session.revoked.add_callback(lambda: order.append("revoked"))
    pending = pend(iommu, unmap(1, 0, PAGE - 1))
    pending.add_callback(lambda: order.append("answered"))
    behind = pend(iommu, map_(1, 0, PAGE - 1, 0))
    assert status(pending.result(10)) is OK
    assert status(behind.result(10)) is OK
    assert order == ["revoked", "answered"]
    assert session.exports == []
    with pytest.raises(ExportError, match="broken"):
        endpoint.export(PAGE, 1)
    endpoint.release(0, 16)
    endpoint.start_export_session()
    assert endpoint.export(PAGE, 1)


def test_a_session_follows_its_endpoint():
    iommu, endpoint, fault = held()
    endpoint.release(0, 16)
    send_all(iommu, attach(8, 3), map_(3, 0x9000, 0x9FFF, 0x3000))
    assert endpoint.export(0x9000, 1) == [(0x3000, 1, Permissions.READ_WRITE)]
    with pytest.raises(CannotResolveError):
        endpoint.export(0, 1)
    assert not fault.is_set


def test_sessions_of_one_domain_fault_apart():
    iommu = VirtioIommu(endpoints=[8, 9], revoke_after=None)
    send_all(iommu, attach(8, 1), attach(9, 1), map_(1, 0, PAGE - 1, 0))
    sessions = [iommu.endpoint(number).open_session() for number in (8, 9)]
    for session in sessions:
        session.export(0, 1)
    pending = pend(iommu, detach(9, 1))
    assert [s.fault.is_set for s in sessions] == [False, True]
    assert sessions[0].export(0, 8)
    sessions[0].release(0, 8)
    sessions[1].close()
    assert status(pending.result(0)) is OK
    pending = pend(iommu, unmap(1, 0, PAGE - 1))
    sessions[0].release(0, 1)
    assert status(pending.result(0)) is OK


class TestAccessesThatHaveBegun:
    """Invariant L1: the answer waits for them, and no later access gets through."""

    def memory(self, iommu):
        physical = GuestRegionCollection.from_ranges([(0, 0x10000)])
        return iommu.endpoint(8).memory(physical)

    @pytest.mark.parametrize("request_", RELEASING.values(), ids=RELEASING.keys())
    def test_of_this_thread(self, request_):
        iommu, endpoint, _ = held()
        endpoint.release(0, 16)
        memory = self.memory(iommu)
        with memory.gather(0, 16, Permissions.WRITE) as vector:
            pending = pend(iommu, request_)
            vector.write(b"x")
            time.sleep(0.02)
            assert not pending.done
            with pytest.raises(CannotResolveError):
                memory.read(0, 1)
        assert status(pending.result(10)) is OK

    def test_of_another_thread(self):
        iommu, endpoint, _ = held()
        endpoint.release(0, 16)
        memory = self.memory(iommu)
        begun, end = threading.Event(), threading.Event()

        def access():
            with memory.gather(0, 16, Permissions.READ):
                begun.set()
                end.wait(10)

        thread = threading.Thread(target=access)
        thread.start()
        begun.wait(10)
        pending = pend(iommu, unmap(1, 0, PAGE - 1))
        send_all(iommu, unmap(2, 0, PAGE - 1))
        end.set()
        thread.join()
        assert status(pending.result(10)) is OK

    def test_no_access_after_the_answer(self):
        """Threads write through the device while pages are unmapped, checked and mapped again."""
        iommu = VirtioIommu(endpoints=[8])
        send_all(iommu, attach(8, 1))
        physical = GuestRegionCollection.from_ranges([(0, 0x10000)])
        memory = iommu.endpoint(8).memory(physical)
        stop, wrote = threading.Event(), [0]

        def write():
            while not stop.is_set():
                try:
                    memory.write(0x100, b"\xff" * 64)
                    wrote[0] += 1
                except CannotResolveError:
                    pass

        threads = [threading.Thread(target=write) for _ in range(2)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 1.0
        rounds = 0
        while time.monotonic() < end or not wrote[0] or rounds <= 10:
            send_all(iommu, map_(1, 0, PAGE - 1, 0x4000))
            time.sleep(0)
            answer = iommu.handle_request(unmap(1, 0, PAGE - 1), 4)
            if isinstance(answer, Pending):
                answer = answer.result(10)
            assert status(answer) is OK
            physical.fill(0x4100, 64, 0)
            for _ in range(20):
                assert physical.read(0x4100, 64) == bytes(64)
            rounds += 1
        stop.set()
        for thread in threads:
            thread.join()


class TestReset:
    def test_forgets_domains_and_attachments(self):
        iommu = VirtioIommu(endpoints=[8, 9])
        send_all(iommu, attach(8, 1), attach(9, 1), map_(1, 0, PAGE - 1, 0))
        assert iommu.reset() is None
        assert iommu.snapshot()["domains"] == []
        assert [iommu.endpoint(n).domain for n in (8, 9)] == [None, None]
        assert len(iommu.endpoint(8).iotlb) == 0
        assert send(iommu, map_(1, 0, PAGE - 1, 0)) is NOENT

    def test_waits_for_what_is_held(self):
        iommu, endpoint, fault = held()
        reset = iommu.reset()
        assert fault.is_set
        assert not reset.done
        # The old mappings are out of reach meanwhile, and new requests wait.
        assert len(endpoint.iotlb) == 0
        behind = pend(iommu, attach(9, 2))
        endpoint.release(0, 16)
        assert reset.done
        assert status(behind.result(0)) is OK

    def test_cancels_what_has_not_begun(self):
        iommu, endpoint, _ = held()
        begun = pend(iommu, unmap(1, 0, PAGE - 1))
        waiting = pend(iommu, map_(1, 0, PAGE - 1, 0))
        reset = iommu.reset()
        assert waiting.cancelled
        assert waiting.result(0) == b""
        endpoint.release(0, 16)
        assert begun.done
        assert reset.done
        assert iommu.snapshot()["domains"] == []

    def test_brings_bypass_back(self):
        iommu = VirtioIommu(endpoints=[8], bypass=True)
        physical = GuestRegionCollection.from_ranges([(0, 0x8000)])
        memory = iommu.endpoint(8).memory(physical)
        memory.write(0x5000, b"a")
        send_all(iommu, attach(8, 1))
        with pytest.raises(CannotResolveError):
            memory.read(0x5000, 1)
        iommu.reset()
        assert memory.read(0x5000, 1) == b"a"


class TestBypass:
    def test_switches_unattached_endpoints_only(self):
        iommu = VirtioIommu(endpoints=[8, 9, 10])
        physical = GuestRegionCollection.from_ranges([(0, 0x8000)])
        memory = {n: iommu.endpoint(n).memory(physical) for n in (8, 9, 10)}
        send_all(iommu, attach(8, 1), attach(9, 2, flags=1))
        for on in (True, False, True):
            iommu.bypass = on
            assert memory[10].check_range(0, 0x8000, Permissions.READ_WRITE) is on
            assert memory[9].check_range(0, 0x8000, Permissions.READ_WRITE)
            assert not memory[8].check_range(0, 1)

    def test_written_by_the_driver(self):
        iommu = VirtioIommu(endpoints=[8])
        iommu.write_config(36, b"\1")
        assert iommu.bypass is True
        for offset, data in ((36, b"\2"), (36, b"\0\0"), (0, b"\0"), (37, b"\0"), (36, b"")):
            with pytest.raises(DeviceError):
                iommu.write_config(offset, data)
        assert iommu.bypass is True
        iommu.features = 1 << 2
        with pytest.raises(DeviceError):
            iommu.write_config(36, b"\0")

    def test_the_old_feature(self):
        iommu = VirtioIommu(endpoints=[8], features=[2, 3])
        physical = GuestRegionCollection.from_ranges([(0, 0x8000)])
        memory = iommu.endpoint(8).memory(physical)
        assert memory.check_range(0, 0x8000)
        iommu.features = [2]
        assert not memory.check_range(0, 0x8000)

    def test_turned_off_revokes_what_clients_hold(self):
        iommu = VirtioIommu(endpoints=[8], bypass=True, revoke_after=None)
        session = iommu.endpoint(8).open_session()
        session.export(0x1000, 16)
        iommu.bypass = False
        assert session.revoked.is_set
        assert session.exports == []

    def test_turned_off_while_this_thread_is_at_it(self, monkeypatch):
        monkeypatch.setattr("guestio.virtio.iommu.device.IOMMU_BYPASS_WAIT", 0.05)
        iommu = VirtioIommu(endpoints=[8], bypass=True)
        memory = iommu.endpoint(8).memory(GuestRegionCollection.from_ranges([(0, 0x8000)]))
        with memory.gather(0, 1, Permissions.READ):
            iommu.bypass = False
            with pytest.raises(CannotResolveError):
                memory.read(0, 1)
        assert iommu.bypass is False


class TestEndpoints:
    def test_removal_leaves_the_domain_to_the_others(self):
        iommu, endpoint, fault = held()
        send_all(iommu, attach(10, 1))
        pending = iommu.remove_endpoint(8)
        assert fault.is_set
        assert send(iommu, probe(8), 516) is NOENT
        endpoint.release(0, 16)
        assert pending.done
        assert endpoint.sessions == []
        assert iommu.endpoint_ids == [9, 10]
        memory = iommu.endpoint(10).memory(GuestRegionCollection.from_ranges([(0, 0x8000)]))
        assert memory.check_range(0, 2 * PAGE)
        with pytest.raises(ValueError, match="endpoint 8"):
            iommu.endpoint(8)

    def test_the_last_one_takes_the_domain_with_it(self):
        iommu = VirtioIommu(endpoints=[8])
        send_all(iommu, attach(8, 1))
        assert iommu.remove_endpoint(8) is None
        assert iommu.snapshot()["domains"] == []
        iommu.add_endpoint(8)
        assert iommu.endpoint(8).domain is None

    def test_one_that_is_gone_reaches_nothing_and_reports_nothing(self):
        iommu = VirtioIommu(endpoints=[8], bypass=True)
        memory = iommu.endpoint(8).memory(GuestRegionCollection.from_ranges([(0, 0x8000)]))
        iommu.remove_endpoint(8)
        with pytest.raises(CannotResolveError):
            memory.read(0, 1)
        assert iommu.event_records() == []

    def test_ids_are_unique(self):
        iommu = VirtioIommu(endpoints=[8])
        with pytest.raises(ValueError, match="exists"):
            iommu.add_endpoint(8)


class TestSnapshot:
    def test_round_trip(self):
        iommu, endpoint, _ = held(
            reserved=[(0xFEE00000, 0xFEEFFFFF, 1)], max_domains=9, bypass=True, probe_size=64
        )
        send_all(iommu, attach(10, 7, flags=1), map_(1, 0x7000, 0x7FFF, 0, 6))
        iommu.endpoint(8).memory(GuestRegionCollection.from_ranges([(0, 1)])).check_range(0, 1)
        with pytest.raises(CannotResolveError):
            endpoint.export(0x5000, 1)
        state = iommu.snapshot()
        again = VirtioIommu.restore(state)
        assert again.snapshot() == state
        # It behaves as before: the client still holds its page.
        pending = pend(again, unmap(1, 0, PAGE - 1))
        (session,) = again.endpoint(8).sessions
        session.release(0, 16)
        assert status(pending.result(0)) is OK
        assert again.event_records() == iommu.event_records()

    def test_sessions_of_every_kind(self):
        """What a session holds, whether it is broken, and its own time limit survive."""
        iommu, _, _ = held(revoke_after=7.0)
        state = iommu.snapshot()
        kinds = [
            {"broken": broken, "time_limit": limit, "exports": exports}
            for broken in (False, True)
            for limit in (None, 7.0, 0.5, 3600.0)
            for exports in ([], [[0, 16]], [[0, 16], [0, 16], [0x10, 0x800]])
        ]
        state["endpoints"][1]["sessions"] = kinds
        again = VirtioIommu.restore(state)
        assert again.snapshot() == state
        sessions = again.endpoint(9).sessions
        assert [s.broken for s in sessions] == [kind["broken"] for kind in kinds]
        assert [s.fault.is_set for s in sessions] == [kind["broken"] for kind in kinds]
        for session in sessions:
            session.close()

    def test_a_broken_session_has_its_time_limit_again(self):
        iommu, _, _ = held(revoke_after=0.05)
        state = iommu.snapshot()
        (session,) = state["endpoints"][0]["sessions"]
        session["broken"] = True
        again = VirtioIommu.restore(state)
        (restored,) = again.endpoint(8).sessions
        assert restored.revoked.wait(10)
        assert send(again, unmap(1, 0, PAGE - 1)) is OK

    def test_settings_that_are_given_anew(self):
        iommu, _, _ = held(max_mappings=5)
        state = iommu.snapshot()
        again = VirtioIommu.restore(state, revoke_after=2.5, max_mappings=9, fault_burst=3)
        settings = again.snapshot()["settings"]
        assert settings == {**state["settings"], "revoke_after": 2.5, "max_mappings": 9}
        assert again.snapshot()["domains"] == state["domains"]
        with pytest.raises(TypeError, match="nonsense"):
            VirtioIommu.restore(state, nonsense=1)
        with pytest.raises(ValueError, match="stop_timeout"):
            VirtioIommu.restore(state, stop_timeout=-1)

    def test_not_while_requests_wait(self):
        iommu, endpoint, _ = held()
        pend(iommu, unmap(1, 0, PAGE - 1))
        with pytest.raises(DeviceError, match="1 requests"):
            iommu.snapshot()
        endpoint.release(0, 16)
        iommu.snapshot()

    @pytest.mark.parametrize(
        "damage",
        [
            lambda s: s.update(version=2),
            lambda s: s.pop("domains"),
            lambda s: s["domains"].append(dict(s["domains"][0])),
            lambda s: s["domains"][0]["mappings"].append(s["domains"][0]["mappings"][0]),
            lambda s: s["domains"].append({"id": 99, "bypass": False, "mappings": []}),
            lambda s: s["endpoints"][0].update(domain=55),
            lambda s: s["endpoints"].append(s["endpoints"][0]),
            lambda s: s["settings"].update(nonsense=1),
        ],
    )
    def test_damaged(self, damage):
        iommu, _, _ = held()
        state = iommu.snapshot()
        damage(state)
        with pytest.raises(ValueError):
            VirtioIommu.restore(state)


def test_explain():
    iommu, endpoint, _ = held(reserved=[(0xFEE00000, 0xFEEFFFFF, 1)])
    text = endpoint.explain(0x1800, 0x1000, Permissions.WRITE)
    assert "endpoint 8 is attached to domain 1" in text
    assert "0x1800+0x800 -> 0x1800 READ_WRITE: ok" in text
    assert "0x2000+0x800 is not mapped" in text
    assert "held by a session: 0x0+0x10" in endpoint.explain(0)
    assert "reserved: 0xfee00000..0xfeefffff" in endpoint.explain(0xFEE00000)
    assert "not attached and not in bypass mode" in iommu.endpoint(10).explain(0)
    assert iommu.event_records() == []
