"""Faults of endpoints on their way to the guest."""

import struct
import threading

import pytest

from guestio import CannotResolveError, GuestRegionCollection, IommuMemory, Permissions
from guestio.virtio.iommu import FaultReason, FaultRecord, VirtioIommu
from tests.kit.iommu_driver import PAGE, RW, R, W, attach, map_, send_all, unmap

READ, WRITE, ADDRESS = 1, 2, 0x100


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def physical():
    return GuestRegionCollection.from_ranges([(0, 0x10000)])


def fault(memory, iova, length=1, write=False):
    with pytest.raises(CannotResolveError) as caught:
        if write:
            memory.write(iova, bytes(length))
        else:
            memory.read(iova, length)
    return caught.value


def test_record_layout():
    record = FaultRecord.make(2, 0x101, 8, 0x1122334455667788)
    assert record == struct.pack("<B3xIIIQ", 2, 0x101, 8, 0, 0x1122334455667788)
    assert len(record) == FaultRecord.SIZE == 24
    assert (record.reason, record.flags, record.endpoint, record.address) == (
        FaultReason.MAPPING,
        0x101,
        8,
        0x1122334455667788,
    )


@pytest.mark.parametrize(("write", "flag"), [(False, READ), (True, WRITE)])
def test_reasons_and_flags(physical, write, flag):
    iommu = VirtioIommu(endpoints=[8])
    memory = iommu.endpoint(8).memory(physical)
    error = fault(memory, 0x1234, write=write)
    assert "not attached" in str(error)
    send_all(iommu, attach(8, 1), map_(1, PAGE, 2 * PAGE - 1, 0, R if write else W))
    assert "domain 1" in str(fault(memory, 0x3000, write=write))
    error = fault(memory, 0x1ABC, write=write)
    assert "does not allow" in str(error)
    assert error.iova_range == (0x1ABC, 1)
    assert [(r.reason, r.flags, r.endpoint, r.address) for r in iommu.event_records()] == [
        (FaultReason.DOMAIN, flag | ADDRESS, 8, 0x1234),
        (FaultReason.MAPPING, flag | ADDRESS, 8, 0x3000),
        (FaultReason.MAPPING, flag | ADDRESS, 8, 0x1ABC),
    ]
    assert iommu.event_records() == []


def test_a_record_for_each_hole_and_each_forbidden_mapping(physical):
    iommu = VirtioIommu(endpoints=[8])
    # Two read-only mappings that continue each other, which the IOTLB keeps as one.
    send_all(
        iommu,
        attach(8, 1),
        map_(1, PAGE, 2 * PAGE - 1, PAGE, R),
        map_(1, 2 * PAGE, 3 * PAGE - 1, 2 * PAGE, R),
        map_(1, 4 * PAGE, 5 * PAGE - 1, 0, RW),
    )
    memory = iommu.endpoint(8).memory(physical)
    error = fault(memory, 0x800, 0x4800, write=True)
    assert error.iova_range == (0x800, 0x800)
    assert [r.address for r in iommu.event_records()] == [0x800, 0x1000, 0x2000, 0x3000]
    assert physical.read(0, 0x10000) == bytes(0x10000)


def test_one_access_causes_only_so_many(physical):
    iommu = VirtioIommu(endpoints=[8])
    send_all(iommu, attach(8, 1))
    send_all(iommu, *(map_(1, n * PAGE, (n + 1) * PAGE - 1, 0) for n in range(0, 200, 2)))
    fault(iommu.endpoint(8).memory(physical), 0, 200 * PAGE)
    assert len(iommu.event_records()) == 16


def test_a_question_is_no_fault(physical):
    iommu = VirtioIommu(endpoints=[8])
    memory = iommu.endpoint(8).memory(physical)
    assert isinstance(memory, IommuMemory)
    assert not memory.check_range(0, 1, Permissions.READ)
    assert memory.check_range(0, 0)
    assert not memory.with_replaced_backend(physical).check_range(0, 1)
    with pytest.raises(ValueError):
        memory.check_range(-1, 1)
    assert iommu.event_records() == []


def test_an_empty_access_is_none(physical):
    iommu = VirtioIommu(endpoints=[8])
    assert iommu.endpoint(8).memory(physical).read(0x5000, 0) == b""
    assert iommu.event_records() == []


def test_memory_that_is_not_there_is_no_fault_of_the_iommu(physical):
    iommu = VirtioIommu(endpoints=[8], bypass=True)
    with pytest.raises(ValueError, match="no memory"):
        iommu.endpoint(8).memory(physical).read(0x20000, 1)
    assert iommu.event_records() == []


def test_limits_and_accounts(physical):
    clock = Clock()
    iommu = VirtioIommu(
        endpoints=[8, 9], fault_rate=10, fault_burst=5, fault_capacity=8, clock=clock
    )
    memory = {n: iommu.endpoint(n).memory(physical) for n in (8, 9)}
    for _ in range(7):
        fault(memory[8], 0)
    stats = iommu.endpoint(8).fault_stats
    assert (stats.total, stats.reported, stats.limited, stats.dropped) == (7, 0, 2, 0)
    # Another endpoint has a burst of its own, but room is shared.
    for _ in range(5):
        fault(memory[9], 0)
    stats = iommu.endpoint(9).fault_stats
    assert (stats.total, stats.limited, stats.dropped) == (5, 0, 2)
    assert len(iommu.event_records(3)) == 3
    assert iommu.endpoint(8).fault_stats.reported == 3
    clock.now += 0.25
    for _ in range(5):
        fault(memory[8], 0)
    stats = iommu.endpoint(8).fault_stats
    assert (stats.total, stats.limited) == (12, 5)
    assert len(iommu.event_records()) == 7
    for number in (8, 9):
        stats = iommu.endpoint(number).fault_stats
        assert stats.total == stats.reported + stats.limited + stats.dropped


def test_a_reset_drops_and_counts_what_waits(physical):
    iommu = VirtioIommu(endpoints=[8])
    fault(iommu.endpoint(8).memory(physical), 0)
    iommu.reset()
    assert iommu.event_records() == []
    stats = iommu.endpoint(8).fault_stats
    assert (stats.total, stats.reported, stats.dropped) == (1, 0, 1)


def test_arrival(physical):
    iommu = VirtioIommu(endpoints=[8])
    memory = iommu.endpoint(8).memory(physical)
    arrival = iommu.event_arrival
    thread = threading.Thread(target=fault, args=(memory, 0))
    thread.start()
    assert arrival.wait(10)
    thread.join()
    assert iommu.event_arrival.is_set
    iommu.event_records()
    assert not iommu.event_arrival.is_set


def test_an_export_of_what_is_not_mapped_is_reported(physical):
    iommu = VirtioIommu(endpoints=[8])
    send_all(iommu, attach(8, 1), map_(1, 0, PAGE - 1, 0))
    session = iommu.endpoint(8).open_session()
    with pytest.raises(CannotResolveError):
        session.export(0x800, 0x1000)
    (record,) = iommu.event_records()
    assert (record.reason, record.flags, record.address) == (FaultReason.MAPPING, ADDRESS, 0x1000)


def test_write_only_is_write_only(physical):
    iommu = VirtioIommu(endpoints=[8])
    send_all(iommu, attach(8, 1), map_(1, 0, PAGE - 1, 0, W))
    memory = iommu.endpoint(8).memory(physical)
    memory.write(0, b"secret")
    fault(memory, 0)
    send_all(iommu, unmap(1, 0, PAGE - 1))
    fault(memory, 0, write=True)
