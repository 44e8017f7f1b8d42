"""A virtio-iommu behind its socket: requests, fault records, and drivers that lie."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestio import CannotResolveError
from guestio.virtio.iommu import FaultRecord, Status, VirtioIommu, wire
from tests.kit.iommu_driver import MSI, PAGE, LedgerTarget, attach, map_, probe, unmap
from tests.kit.rings import WRITE, Desc
from tests.kit.serving import WAIT, Driver, Serving, nothing_left, until

REQUESTS, EVENTS = 0, 1
NOWHERE = 1 << 30
"""An address beyond the guest's memory."""
ALL = VirtioIommu().offered_features


class Guest(Driver):
    """A driver of a virtio-iommu."""

    def __init__(self, serving: Serving, features: int = ALL, **options: Any) -> None:
        super().__init__(serving.path, queues=2, features=features, **options)

    def send(self, request: bytes, room: int = 4, *, announce: bool = True) -> int:
        """Begin a request; its number."""
        ring = self.rings[REQUESTS]
        number = ring.offered
        place = self.buffer(REQUESTS, number)
        self.memory.write(place, request)
        self.memory.write(place + PAGE, b"\xee" * room)
        ring.offer(
            ring.put_chain(
                2 * number % self.size,
                Desc(place, len(request)),
                Desc(place + PAGE, room, WRITE),
            )
        )
        if announce:
            self.handles[REQUESTS].kick()
        return number

    def answer(self, number: int) -> bytes:
        """What a request was answered with."""
        self.wait(REQUESTS, number)
        _, written = self.rings[REQUESTS].used_entry(number)
        return self.memory.read(self.buffer(REQUESTS, number) + PAGE, written)

    def ask(self, request: bytes, room: int = 4) -> bytes:
        return self.answer(self.send(request, room))

    def check(self, *requests: bytes) -> None:
        """Send requests that are answered OK."""
        for request in requests:
            assert self.ask(request) == bytes(4)

    def post(self, room: int = FaultRecord.SIZE, addr: int | None = None) -> int:
        """Give a buffer for an event; its number."""
        ring = self.rings[EVENTS]
        number = ring.offered
        place = self.buffer(EVENTS, number) if addr is None else addr
        ring.offer(ring.put_chain(number % self.size, Desc(place, room, WRITE)))
        self.handles[EVENTS].kick()
        return number

    def event(self, number: int) -> FaultRecord:
        """What is in the event buffer that came back as the ``number``-th."""
        self.wait(EVENTS, number)
        head, written = self.rings[EVENTS].used_entry(number)
        return FaultRecord(self.memory.read(self.buffer(EVENTS, head), written))


@pytest.fixture
def iommu() -> VirtioIommu:
    return VirtioIommu(endpoints=[8, 9], reserved=[MSI], revoke_after=None)


@pytest.fixture(params=[False, True], ids=["one thread", "queue threads"])
def serving(
    iommu: VirtioIommu, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Serving]:
    # A stop has time for what it waits for, on a busy machine as well.
    options = {"queue_threads": request.param, "stop_timeout": WAIT}
    with Serving(iommu, tmp_path / "socket", **options) as made:
        yield made


@pytest.fixture
def guest(serving: Serving) -> Iterator[Guest]:
    with Guest(serving) as made:
        yield made


def fault(iommu: VirtioIommu, guest: Guest, iova: int) -> None:
    """An access by endpoint 8 that faults."""
    with pytest.raises(CannotResolveError):
        iommu.endpoint(8).memory(guest.memory).read(iova, 1)


def test_requests(iommu: VirtioIommu, guest: Guest) -> None:
    guest.check(attach(8, 1), map_(1, 0x1000, 0x1FFF, 0x8000))
    guest.memory.write(0x8000, b"hello")
    assert iommu.endpoint(8).memory(guest.memory).read(0x1000, 5) == b"hello"
    assert guest.ask(map_(1, 0x1000, 0x1FFF, 0x9000)) == bytes([Status.INVAL, 0, 0, 0])
    assert guest.ask(probe(8), 516)[:8] == b"\1\0\x14\0\1\0\0\0"
    guest.check(unmap(1, 0x1000, 0x1FFF))
    fault(iommu, guest, 0x1000)


def test_features_and_configuration(iommu: VirtioIommu, serving: Serving) -> None:
    without = ALL & ~wire.F_MMIO & ~wire.F_BYPASS_CONFIG
    with Guest(serving, without) as guest:
        assert iommu.features == without
        assert iommu.offered_features == ALL
        assert guest.frontend.get_config(0, 40) == iommu.config()
        guest.check(attach(8, 1))
        assert guest.ask(map_(1, 0, PAGE - 1, 0, 7)) == bytes([Status.INVAL, 0, 0, 0])
    with Guest(serving) as guest:
        assert iommu.features == ALL
        assert not iommu.bypass
        guest.frontend.set_config(wire.BYPASS_OFFSET, b"\1")
        guest.frontend.sync()
        assert iommu.bypass


def test_a_fault_record_arrives_in_a_buffer(iommu: VirtioIommu, guest: Guest) -> None:
    posted = guest.post()
    guest.check(attach(8, 1))
    fault(iommu, guest, 0x5000)
    assert guest.event(posted) == FaultRecord.make(2, 0x101, 8, 0x5000)
    guest.handles[EVENTS].wait_call(WAIT)


def test_fault_records_wait_for_buffers(iommu: VirtioIommu, guest: Guest) -> None:
    for number in range(20):
        fault(iommu, guest, number * PAGE)
    posted = [guest.post() for _ in range(20)]
    assert [guest.event(number).address for number in posted] == [n * PAGE for n in range(20)]
    # None is left for the next.
    posted = [guest.post()]
    fault(iommu, guest, 0x7000)
    assert guest.event(posted[0]).address == 0x7000
    assert iommu.endpoint(8).fault_stats.reported == 21


def test_small_and_unreachable_event_buffers_go_back(iommu: VirtioIommu, guest: Guest) -> None:
    for room, addr in ((23, None), (1, None), (24, NOWHERE), (24, guest.SIZE - 12)):
        guest.post(room, addr)
    last = guest.post()
    fault(iommu, guest, 0x5000)
    assert guest.event(last).address == 0x5000
    assert [guest.rings[EVENTS].used_entry(n)[1] for n in range(last)] == [0] * last
    assert iommu.short_buffers == last


def test_an_answer_that_waits(iommu: VirtioIommu, guest: Guest) -> None:
    guest.check(attach(8, 1), attach(9, 2), map_(1, 0, PAGE - 1, 0))
    session = iommu.endpoint(8).open_session()
    session.export(0, 1)
    waiting = guest.send(unmap(1, 0, PAGE - 1))
    behind = guest.send(map_(2, 0, PAGE - 1, 0))
    until(lambda: len(iommu.endpoint(9).iotlb), "what is behind is not carried out")
    assert not guest.done(REQUESTS, waiting)
    thread = threading.Thread(target=session.close)
    thread.start()
    assert guest.answer(waiting) == guest.answer(behind) == bytes(4)
    thread.join()


def test_more_requests_than_may_wait(
    iommu: VirtioIommu, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver never sees that their number is limited."""
    for module in ("serving", "device"):
        monkeypatch.setattr(f"guestio.virtio.iommu.{module}.IOMMU_WAITING_REQUESTS", 4)
    guest.check(attach(8, 1), map_(1, 0, PAGE - 1, 0))
    session = iommu.endpoint(8).open_session()
    session.export(0, 1)
    sent = [guest.send(unmap(1, 0, PAGE - 1))]
    # In any other order some of them would be refused.
    toggles = [map_(1, PAGE, 2 * PAGE - 1, 0), unmap(1, PAGE, 2 * PAGE - 1)] * 100
    sent += [guest.send(request) for request in toggles[:24]]
    until(lambda: len(iommu._server._backlog) == 21)
    assert iommu._requests.waiting == 4
    session.close()
    for request in toggles[24:]:
        assert guest.answer(sent[-24]) == bytes(4)
        sent.append(guest.send(request))
    for number in sent[-24:]:
        assert guest.answer(number) == bytes(4)
    assert iommu.snapshot()["domains"][0]["mappings"] == []


def test_requests_that_have_not_begun_fail_at_a_stop(
    iommu: VirtioIommu, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("serving", "device"):
        monkeypatch.setattr(f"guestio.virtio.iommu.{module}.IOMMU_WAITING_REQUESTS", 2)
    guest.check(attach(8, 1), map_(1, 0, PAGE - 1, 0))
    session = iommu.endpoint(8).open_session()
    session.export(0, 1)
    sent = [guest.send(unmap(1, 0, PAGE - 1))]
    sent += [guest.send(map_(1, n * PAGE, (n + 1) * PAGE - 1, 0)) for n in range(1, 5)]
    until(lambda: len(iommu._server._backlog) == 3)
    guest.stop(REQUESTS)
    # The client was revoked, so those that had begun were carried out.
    assert [guest.answer(number)[0] for number in sent] == [0, 0, *[Status.DEVERR] * 3]
    assert len(iommu.snapshot()["domains"][0]["mappings"]) == 1
    assert iommu._server._waiting == 0


def test_a_stop_does_not_wait_for_clients(iommu: VirtioIommu, guest: Guest) -> None:
    guest.check(attach(8, 1), map_(1, 0, PAGE - 1, 0))
    session = iommu.endpoint(8).open_session()
    session.export(0, 1)
    waiting = guest.send(unmap(1, 0, PAGE - 1))
    until(lambda: session.fault.is_set)
    base = guest.stop(REQUESTS)
    # The client was revoked, so the mapping is gone for good.
    assert session.revoked.is_set
    assert guest.answer(waiting) == bytes(4)
    assert base == waiting + 1


def test_a_reset(iommu: VirtioIommu, guest: Guest) -> None:
    guest.check(attach(8, 1), map_(1, 0, PAGE - 1, 0))
    fault(iommu, guest, 0x5000)
    session = iommu.endpoint(8).open_session()
    session.export(0, 1)
    guest.frontend.reset_device()
    guest.frontend.sync()
    # What the client held is not used any more, once the driver knows that the reset is done.
    assert session.revoked.is_set
    assert iommu.endpoint(8).domain is None
    assert iommu.event_records() == []
    assert iommu.snapshot()["domains"] == []


def test_a_front_end_that_goes_and_the_next(
    iommu: VirtioIommu, serving: Serving, tmp_path: Path
) -> None:
    for number in range(3):
        with Guest(serving) as guest:
            guest.check(attach(8, 1), map_(1, 0, PAGE - 1, 0))
            posted = guest.post()
            fault(iommu, guest, 0x5000 + number)
            assert guest.event(posted).address == 0x5000 + number
        until(lambda: iommu.endpoint(8).domain is None)


def test_nothing_is_left(tmp_path: Path) -> None:
    iommu = VirtioIommu(endpoints=[8])
    with nothing_left(), Serving(iommu, tmp_path / "socket") as serving, Guest(serving) as guest:
        guest.check(attach(8, 1))
        guest.post()


def test_a_target_that_raises_is_a_device_error(iommu: VirtioIommu, guest: Guest) -> None:
    target = LedgerTarget()
    guest.check(attach(8, 1))
    iommu.endpoint(8).add_target(target, guest.memory)
    target.fail_next(TypeError("a mistake"))
    assert guest.ask(map_(1, 0, PAGE - 1, 0)) == bytes([Status.DEVERR, 0, 0, 0])
    guest.check(map_(1, 0, PAGE - 1, 0))
    target.fail_next(OSError(5, "no"))
    assert guest.ask(unmap(1, 0, PAGE - 1)) == bytes([Status.DEVERR, 0, 0, 0])
    target.fail_next(GeneratorExit())
    assert guest.ask(unmap(1, 0, PAGE - 1)) == bytes([Status.DEVERR, 0, 0, 0])
    guest.check(unmap(1, 0, PAGE - 1))


def test_a_device_error_of_a_probe_is_at_its_end(
    iommu: VirtioIommu, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iommu._state, "probe", lambda *_: 1 / 0)
    assert guest.ask(probe(8), 516) == bytes(512) + bytes([Status.DEVERR, 0, 0, 0])


END = Driver.SIZE
DEVERR = bytes([Status.DEVERR, 0, 0, 0])


@pytest.mark.parametrize(
    ("descriptors", "status"),
    [
        pytest.param([Desc(NOWHERE, 20), Desc(0x60000, 4, WRITE)], 0x60000, id="no request"),
        pytest.param(
            [Desc(NOWHERE, 72), Desc(0x60000, 512, WRITE), Desc(0x60200, 4, WRITE)],
            0x60200,
            id="no probe",
        ),
        pytest.param([Desc(0x50000, 20), Desc(END - 1, 4, WRITE)], END - 1, id="one byte of it"),
        pytest.param(
            [Desc(0x50000, 20), Desc(END - 3, 8, WRITE), Desc(0x60000, 4, WRITE)],
            0x60000,
            id="no middle",
        ),
    ],
)
def test_a_failed_request_has_its_status(
    guest: Guest, descriptors: list[Desc], status: int
) -> None:
    """The driver sees DEVERR where its status can be reached, and a length of 0 in any case."""
    guest.memory.write(0x50000, attach(8, 1))
    guest.memory.write(status, b"\xee")
    assert guest.run_raw(REQUESTS, *descriptors)[1] == 0
    assert guest.memory.read(status, 1)[0] == Status.DEVERR


def test_garbage(iommu: VirtioIommu, guest: Guest) -> None:
    rng = random.Random(1)
    for _ in range(200):
        kind = rng.choice((1, 2, 3, 4, 5, rng.randrange(256)))
        request = bytes([kind]) + rng.randbytes(rng.choice((0, 3, 19, 23, 35, 71, 200)))
        room = rng.choice((1, 3, 4, 5, 515, 516, PAGE))
        answer = guest.ask(request, room)
        assert len(answer) in {0, 4, min(room, 516)}
    for descriptors in (
        [Desc(0x50000, 20)],
        [Desc(0x60000, 4, WRITE)],
        [Desc(0x50000, 1 << 20), Desc(0x60000, 4, WRITE)],
    ):
        assert guest.run_raw(REQUESTS, *descriptors)[1] in {0, 4}
    # Whatever they were, it goes on.
    number = guest.post()
    fault(iommu, guest, 0x1234000)
    assert guest.event(number).address == 0x1234000


@pytest.mark.parametrize("queue", [REQUESTS, EVENTS])
def test_a_broken_ring_leaves_the_other_queue_alone(
    iommu: VirtioIommu, guest: Guest, serving: Serving, queue: int
) -> None:
    guest.rings[queue].set_avail_idx(0x7FFF)
    guest.handles[queue].kick()
    fault(iommu, guest, 0x5000)
    until(lambda: serving.stats.queue_errors == 1)
    if queue == EVENTS:
        guest.check(attach(8, 1))
    else:
        assert guest.event(guest.post()).address == 0x5000
    assert struct.unpack("<B", bytes([guest.frontend.get_status()]))[0] & 64
