"""A queue of a device behind an endpoint, with a real block device on it."""

import os
import struct
import threading
import time
from concurrent.futures import Future

import pytest

from guestio import (
    DeviceError,
    GuestRegionCollection,
    InvalidAddressError,
    Permissions,
    QueueError,
)
from guestio.virtio.blk import S_IOERR, S_OK, T_IN, T_OUT, BlockDevice
from guestio.virtio.driver import DriverQueue
from guestio.virtio.iommu import EndpointQueue, VirtioIommu
from guestio.virtio.layout import RingLayout
from tests.kit.arguments import refused
from tests.kit.iommu_driver import PAGE, R, W, attach, map_, send_all, unmap
from tests.kit.serving import until

RING_IOVA, RING = 0x40000000, 0x8000
DATA_IOVA, DATA = 0x70000000, 0x10000
TABLE_IOVA = 0x50000000
SIZE = 16


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(n // 512 % 256 for n in range(64 * 512)))
    return path


class Rig:
    def __init__(
        self, image, *, disk=BlockDevice, event_idx=False, indirect=False, answer_timeout=5.0
    ):
        self.physical = GuestRegionCollection.from_ranges([(0, 0x40000)])
        self.iommu = VirtioIommu(endpoints=[8])
        self.disk = disk(image)
        self.interrupts = []
        self.interrupt = lambda: self.interrupts.append(1)
        self.driver = DriverQueue(
            self.physical,
            RingLayout.contiguous(RING, SIZE),
            event_idx=event_idx,
            indirect=indirect,
        )
        self.queue = EndpointQueue(
            self.disk,
            0,
            self.iommu.endpoint(8).memory(self.physical),
            RingLayout.contiguous(RING_IOVA, SIZE),
            lambda: self.interrupt(),
            event_idx=event_idx,
            indirect=indirect,
            answer_timeout=answer_timeout,
        )
        send_all(self.iommu, attach(8, 1))

    def map(self, flags=R | W, data=DATA_IOVA, pages=2):
        send_all(
            self.iommu,
            map_(1, RING_IOVA, RING_IOVA + PAGE - 1, RING),
            *(
                map_(1, data + n * PAGE, data + (n + 1) * PAGE - 1, DATA + n * PAGE, flags)
                for n in range(pages)
            ),
        )
        return self

    def add(self, kind, sector, at=0, data=DATA_IOVA, table=None):
        """A request of one sector; header, data and status at 0, 512 and 1024 of a slot."""
        self.physical.write(DATA + at, struct.pack("<IIQ", kind, 0, sector))
        self.physical.write(DATA + at + 1024, b"\xff")
        base = data + at
        header, body, status = (base, 16), (base + 512, 512), (base + 1024, 1)
        if kind == T_IN:
            self.driver.add([header], [body, status], at, table=table)
        else:
            self.driver.add([header, body], [status], at, table=table)

    def go(self):
        self.driver.publish()
        self.queue.serve()
        return [
            (self.physical.read(DATA + done.token + 1024, 1)[0], done.token)
            for done in self.driver.collect()
        ]

    def close(self):
        self.queue.close()
        self.disk.close()

    def faults(self):
        return [(r.reason.name, r.flags & 3, r.address) for r in self.iommu.event_records()]


@pytest.fixture
def rigs(image):
    """Makes rigs, which are closed at the end."""
    made = []

    def make(**options):
        made.append(Rig(image, **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.mark.parametrize("event_idx", [False, True])
def test_requests(rigs, event_idx):
    rig = rigs(event_idx=event_idx).map()
    for round_ in range(3 * SIZE):
        rig.add(T_IN, round_)
        rig.add(T_OUT, round_, 2048)
        assert rig.go() == [(S_OK, 0), (S_OK, 2048)]
        assert rig.physical.read(DATA + 512, 512) == bytes([round_]) * 512
    assert rig.interrupts
    assert rig.faults() == []


def test_an_indirect_table_is_read_through_the_mappings(rigs):
    rig = rigs(indirect=True).map()
    with rig.physical.gather(0x20000, 64, Permissions.READ_WRITE) as table:
        send_all(rig.iommu, map_(1, TABLE_IOVA, TABLE_IOVA + PAGE - 1, 0x20000, R))
        rig.add(T_IN, 1, table=(TABLE_IOVA, table))
        assert rig.go() == [(S_OK, 0)]
        send_all(rig.iommu, unmap(1, TABLE_IOVA, TABLE_IOVA + PAGE - 1))
        rig.add(T_IN, 1, table=(TABLE_IOVA, table))
        # Where its status is stands in the table.
        with pytest.raises(QueueError, match="status cannot be reached"):
            rig.go()
        assert rig.faults() == [("MAPPING", 1, TABLE_IOVA)]


def test_faults_of_one_request_leave_the_others_alone(rigs):
    rig = rigs().map()
    rig.add(T_IN, 1)
    for at in (2048, 3072):
        rig.physical.write(DATA + at + 1024, b"\xff")
        rig.driver.add(
            [(0x66600000 + at, 16)], [(0x66600200 + at, 512), (DATA_IOVA + at + 1024, 1)], at
        )
    rig.add(T_IN, 3, PAGE + 512)
    assert rig.go() == [(S_OK, 0), (S_IOERR, 2048), (S_IOERR, 3072), (S_OK, PAGE + 512)]
    # Each once, although those behind were looked at ahead.
    assert rig.faults() == [
        ("MAPPING", 1, 0x66600800),
        ("MAPPING", 2, 0x66600A00),
        ("MAPPING", 1, 0x66600C00),
        ("MAPPING", 2, 0x66600E00),
    ]
    assert rig.queue.failed == 2


def test_a_status_out_of_reach_ends_the_queue(rigs):
    """An old status would tell the driver that all went well."""
    rig = rigs().map()
    rig.add(T_IN, 2, 2048, data=0x66600000)
    for _ in range(2):
        with pytest.raises(QueueError, match="status cannot be reached"):
            rig.go()
    assert rig.faults() == [
        ("MAPPING", 1, 0x66600800),
        ("MAPPING", 2, 0x66600A00),
        ("MAPPING", 2, 0x66600C00),
    ]


def test_the_status_is_written_if_it_can_be_reached(rigs):
    rig = rigs().map()
    send_all(rig.iommu, unmap(1, DATA_IOVA, DATA_IOVA + PAGE - 1))
    # Header and data in the page that is gone, the status in the other.
    rig.physical.write(DATA + PAGE + 1024, b"\xff")
    rig.driver.add([(DATA_IOVA, 16)], [(DATA_IOVA + 512, 512), (DATA_IOVA + PAGE + 1024, 1)], PAGE)
    assert rig.go() == [(S_IOERR, PAGE)]
    assert len(rig.faults()) == 2


def test_permissions(rigs):
    rig = rigs().map(flags=R, pages=1)
    writable = DATA_IOVA + PAGE
    send_all(rig.iommu, map_(1, writable, writable + PAGE - 1, DATA + PAGE, W))
    rig.physical.write(DATA, struct.pack("<IIQ", T_IN, 0, 1))
    rig.driver.add([(DATA_IOVA, 16)], [(DATA_IOVA + 512, 512), (writable + 1024, 1)], PAGE)
    assert rig.go() == [(S_IOERR, PAGE)]
    rig.driver.add([(writable, 16)], [(writable + 512, 512), (writable + 1024, 1)], PAGE)
    assert rig.go() == [(S_IOERR, PAGE)]
    assert rig.faults() == [("MAPPING", 2, DATA_IOVA + 512), ("MAPPING", 1, writable)]


def test_an_unmapped_ring_waits_for_its_mapping(rigs):
    rig = rigs()
    rig.add(T_IN, 1)
    assert rig.go() == []
    assert {fault[0] for fault in rig.faults()} == {"MAPPING"}
    rig.map()
    assert rig.go() == [(S_OK, 0)]
    send_all(rig.iommu, unmap(1, RING_IOVA, RING_IOVA + PAGE - 1))
    rig.add(T_IN, 1)
    assert rig.go() == []
    assert rig.faults()


def test_an_unattached_device_reports_the_domain(rigs):
    rig = rigs()
    rig.iommu.reset()
    rig.add(T_IN, 1)
    assert rig.go() == []
    assert {fault[0] for fault in rig.faults()} == {"DOMAIN"}


def test_a_broken_ring(rigs):
    rig = rigs().map()
    rig.physical.write(RING + 16 * SIZE + 2, b"\xff\x7f")
    with pytest.raises(QueueError):
        rig.queue.serve()


def test_a_busy_driver_does_not_keep_the_loop(rigs):
    rig = rigs().map()

    def again():
        rig.driver.collect()
        rig.add(T_IN, 1)
        rig.driver.publish()

    rig.interrupt = again
    rig.add(T_IN, 1)
    rig.driver.publish()
    assert rig.queue.serve() is True
    rig.interrupt = rig.interrupts.clear
    assert rig.queue.serve() is False


class Answering(BlockDevice):
    """A disk whose answers to reads the test decides."""

    answer = None

    def process(self, queue, chain):
        return self.answer(chain)

    def fail(self, queue, chain):
        chain.writable.write(bytes([S_IOERR]), len(chain.writable) - 1)
        return len(chain.writable)


def cancelled(chain):
    future = Future()
    future.cancel()
    return future


def finished(error=None, result=None):
    future = Future()
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
    return future


def raising(error):
    raise error


MISTAKES = {
    "raises": lambda chain: 1 / 0,
    "raises ours": lambda chain: raising(DeviceError("no")),
    "raises no Exception": lambda chain: raising(GeneratorExit()),
    "none": lambda chain: None,
    "negative": lambda chain: -1,
    "too many": lambda chain: len(chain.writable) + 1,
    "true": lambda chain: True,
    "float": lambda chain: 513.0,
    "cancelled": cancelled,
    "raises later": lambda chain: finished(ZeroDivisionError("later")),
    "none later": lambda chain: finished(result=None),
    "out of time by itself": lambda chain: finished(TimeoutError("its own")),
}


class TestMistakesOfTheDevice:
    @pytest.fixture
    def rig(self, rigs):
        return rigs(disk=Answering).map()

    @pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
    def test_the_driver_sees_a_failure(self, rig, caplog, mistake):
        rig.disk.answer = mistake
        for at in (0, 2048):
            rig.add(T_IN, 3, at)
        assert rig.go() == [(S_IOERR, 0), (S_IOERR, 2048)]
        assert rig.queue.failed == 2
        assert all("Answering.process" in r.getMessage() for r in caplog.records)
        assert len(caplog.records) == 2

    def test_nonsense_is_named(self, rig, caplog):
        rig.disk.answer = lambda chain: None
        rig.add(T_IN, 3)
        rig.go()
        assert "Answering.process returned None; return the number of bytes written" in caplog.text

    def test_a_fail_that_raises_too(self, rig):
        rig.disk.answer = lambda chain: 1 / 0
        rig.disk.fail = lambda queue, chain: 1 / 0
        rig.add(T_IN, 3)
        assert rig.go() == [(S_IOERR, 0)]
        assert rig.queue.failed == 1

    def test_the_end_of_the_program_is_no_failure(self, rig):
        rig.disk.answer = lambda chain: raising(SystemExit(3))
        rig.add(T_IN, 3)
        with pytest.raises(SystemExit):
            rig.go()
        assert rig.driver.collect() == []

    def test_memory_that_a_system_call_moves_is_not_given_back(self, rig):
        reading, feeding = os.pipe()
        reads = []

        def answer(chain):
            thread = threading.Thread(
                target=lambda: reads.append(chain.writable.from_file(reading))
            )
            thread.start()
            deadline = time.monotonic() + 10
            while not chain.in_use():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            rig.thread = thread
            raise DeviceError("no")

        rig.disk.answer = answer
        rig.add(T_IN, 3)
        threading.Timer(0.1, os.write, (feeding, bytes(513))).start()
        assert rig.go() == [(S_IOERR, 0)]
        assert reads == [513]
        rig.thread.join()
        rig.queue._answer_timeout = 0.02
        rig.add(T_IN, 3)
        assert rig.go() == []
        os.write(feeding, bytes(513))
        rig.thread.join()
        until(lambda: rig.go() == [(S_IOERR, 0)])
        os.close(reading)
        os.close(feeding)

    def test_an_answer_that_never_comes(self, rig):
        """The request fails, in bounded time, and its memory is taken from the device."""
        rig.queue._answer_timeout = 0.02
        late = Future()
        held = []
        rig.disk.answer = lambda chain: held.append(chain) or late
        rig.add(T_IN, 3)
        assert rig.go() == [(S_IOERR, 0)]
        assert late.cancelled()
        with pytest.raises(InvalidAddressError):
            held[0].writable.write(b"x")
        rig.disk.answer = lambda chain: finished(result=1)
        rig.add(T_IN, 3)
        assert rig.go() == [(0xFF, 0)]

    def test_an_answer_that_comes_later(self, rig):
        rig.disk.answer = lambda chain: finished(result=1)
        rig.add(T_IN, 3)
        assert rig.go() == [(0xFF, 0)]
        assert rig.queue.failed == 0

    def test_nonsense_in_the_arguments(self, rig):
        memory, layout = rig.iommu.endpoint(8).memory(rig.physical), RingLayout.contiguous(0, SIZE)
        refused(
            lambda: (
                lambda device, index, notify: EndpointQueue(device, index, memory, layout, notify)
            ),
            {"device": rig.disk, "index": 0, "notify": [].append},
            may=[("notify", int)],
        )
        for bad in (1, 2**64):
            with pytest.raises(ValueError, match="index"):
                EndpointQueue(rig.disk, bad, memory, layout, [].append)
        with pytest.raises(TypeError, match="Answering"):
            EndpointQueue(Answering, 0, memory, layout, [].append)
