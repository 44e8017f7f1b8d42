"""The virtio-iommu on real rings, driven by the driver's side of them."""

import select
import threading

import pytest

from guestio import QueueError
from guestio.virtio.iommu import FaultRecord, Status
from tests.kit.iommu_driver import PAGE, attach, map_, probe, send_all, unmap
from tests.kit.iommu_guest import BUFFERS, RINGS, SIZE, Guest

BIG = 0x80000


@pytest.fixture
def guests():
    """Makes guests, whose queues are closed at the end."""
    made = []

    def make(**options):
        made.append(Guest(**options))
        return made[-1]

    yield make
    for guest in made:
        guest.queues.close()


@pytest.mark.parametrize("event_idx", [False, True])
def test_requests(guests, event_idx):
    guest = guests(event_idx=event_idx)
    guest.send(attach(8, 1))
    guest.send(map_(1, 0, PAGE - 1, 0), cuts=(1, 5, 17), room_cuts=(1, 2))
    guest.send(probe(8), 516, cuts=(70,), room_cuts=(13, 514))
    guest.send(bytes([77]), 4)
    guest.queues.serve()
    answers = guest.answers()
    assert [written for _, written in answers] == [4, 4, 516, 0]
    assert answers[0][0] == answers[1][0] == bytes(4)
    assert answers[2][0][:4] == b"\1\0\x14\0"
    assert 0 in guest.notified
    assert guest.iommu.snapshot()["domains"][0]["mappings"] == [[0, PAGE - 1, 0, 3]]


def test_no_writable_tail_and_only_a_writable_one(guests):
    guest = guests()
    guest.driver[0].add([(BUFFERS, 64)], [])
    guest.driver[0].add([], [(BIG, 4)])
    guest.driver[0].publish()
    guest.queues.serve()
    assert [done.written for done in guest.driver[0].collect()] == [0, 0]


def test_a_huge_request_is_not_read_whole(guests):
    guest = guests()
    guest.driver[0].add([(0, 0x80000)] * 10, [(BIG, 4)], None)
    guest.driver[0].publish()
    guest.queues.serve()
    assert [done.written for done in guest.driver[0].collect()] == [0]


def test_memory_that_is_not_there(guests):
    guest = guests()
    guest.driver[0].add([(0x200000, 20)], [(BIG, 4)], None)
    guest.driver[0].publish()
    guest.queues.serve()
    assert [done.written for done in guest.driver[0].collect()] == [0]


def test_answers_that_come_later(guests):
    guest = guests()
    send_all(guest.iommu, attach(8, 1), attach(9, 2), map_(1, 0, PAGE - 1, 0))
    session = guest.iommu.endpoint(8).open_session()
    session.export(0, 1)
    guest.send(unmap(1, 0, PAGE - 1))
    guest.send(map_(2, 0, PAGE - 1, 0))
    guest.queues.serve()
    assert guest.queues.waiting == 1
    assert len(guest.answers()) == 1
    assert not guest.wakes()
    thread = threading.Thread(target=session.close)
    thread.start()
    assert select.select([guest.queues], [], [], 10)[0]
    thread.join()
    guest.queues.serve()
    assert guest.answers() == [(bytes(4), 4)]
    assert guest.queues.waiting == 0
    assert not guest.wakes()


def test_answers_after_close_go_nowhere(guests):
    guest = guests()
    send_all(guest.iommu, attach(8, 1), map_(1, 0, PAGE - 1, 0))
    session = guest.iommu.endpoint(8).open_session()
    session.export(0, 1)
    guest.send(unmap(1, 0, PAGE - 1))
    guest.queues.serve()
    guest.queues.close()
    # It fails, so that its driver does not take the memory for released.
    assert guest.answers() == [(bytes([Status.DEVERR, 0, 0, 0]), 4)]
    guest.iommu.reset()
    session.close()
    guest.queues.serve()
    assert guest.answers() == []


@pytest.mark.parametrize("event_idx", [False, True])
def test_faults_wait_for_buffers_and_buffers_for_faults(guests, event_idx):
    guest = guests(event_idx=event_idx)
    guest.fault(0x5000)
    assert guest.wakes()
    guest.queues.serve()
    assert guest.events() == []
    assert not guest.wakes()
    guest.add_event_buffer()
    guest.add_event_buffer(64)
    guest.queues.serve()
    assert guest.events() == [FaultRecord.make(1, 0x101, 8, 0x5000)]
    assert 1 in guest.notified
    guest.fault(0x6000)
    assert guest.wakes()
    guest.queues.serve()
    assert [FaultRecord(event).address for event in guest.events()] == [0x6000]


def test_short_event_buffers_go_back_empty(guests):
    guest = guests()
    for length in (23, 1):
        guest.add_event_buffer(length)
    guest.driver[1].add([], [(0x200000, 24)], 0)
    guest.driver[1].add([(BUFFERS, 24)], [], 0)
    guest.add_event_buffer(24)
    guest.fault()
    guest.queues.serve()
    assert [len(event) for event in guest.events()] == [0, 0, 0, 0, 24]
    assert guest.queues.short_buffers == guest.iommu.short_buffers == 4


def test_buffers_are_left_alone_without_faults(guests):
    guest = guests()
    guest.add_event_buffer()
    for _ in range(5):
        guest.queues.serve()
    assert guest.events() == []


def test_a_driver_that_breaks_its_ring(guests):
    guest = guests()
    guest.physical.write(RINGS + 16 * SIZE + 2, b"\xff\x7f")
    with pytest.raises(QueueError):
        guest.queues.serve()


def test_status_of_a_request_that_waits_is_written_where_it_belongs(guests):
    guest = guests()
    send_all(guest.iommu, attach(8, 1), map_(1, 0, PAGE - 1, 0))
    session = guest.iommu.endpoint(8).open_session()
    session.export(0, 1)
    guest.send(unmap(1, 0, PAGE - 1), 8, room_cuts=(3,))
    guest.send(unmap(1, 0, 0), 8)
    guest.send(map_(1, 0, 0, 0), 8)
    guest.queues.serve()
    session.close()
    guest.queues.serve()
    assert [answer[0] for answer, _ in guest.answers()] == [Status.OK, Status.OK, Status.RANGE]


def test_a_busy_driver_does_not_keep_the_loop(guests):
    guest = guests()
    answered = 0

    def again(queue):
        nonlocal answered
        guest.next = BUFFERS
        answered += len(guest.answers())
        guest.send(attach(8, 1))

    guest.interrupt = again
    again(0)
    guest.queues.serve()
    assert answered
    assert guest.wakes()
