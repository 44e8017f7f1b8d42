"""A relay between two rings by hand, and recordings that a proxy makes with it."""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestio._core.virtio.observer import RingObserver
from guestio.budgets import PROXY_OWN_QUEUES
from guestio.control.record import groups_of
from guestio.errors import ProtocolError
from guestio.faults.proxy.own_rings import PLACE, SIZE, OwnRings
from guestio.memory import GuestRegionCollection, MmapRegion
from guestio.observe import Recorder, open_recording
from guestio.testing import ScriptedGuest, replay
from guestio.trace import TraceReader, Tracing, What
from guestio.vhost_user.messages import MemoryRegion, MemoryTable, VringAddr
from guestio.virtio import BlockDevice
from lab.reloads import served
from tests.kit.proxying import Proxying
from tests.kit.rings import WRITE, Desc, HandRing
from tests.kit.serving import Driver, Mirror, Serving, nothing_left, until

ENTRIES = 8
PLACES = (0x1000, 0x2000, 0x3000)
BASE = 65530


class Relay(HandRing):
    """A driver's ring, and the two that a device has of it; all sides are the test."""

    def __init__(self, driver_used: int = BASE, **options: Any) -> None:
        self.memory = GuestRegionCollection.from_regions([MmapRegion.memfd(0, 1 << 16)])
        desc, avail, used = PLACES
        super().__init__(self.memory, size=ENTRIES, base=BASE, desc=desc, avail=avail, used=used)
        self.own = OwnRings()
        self.own.reset(0, BASE)
        self.set_avail_idx(BASE)
        self.memory.write(self.used + 2, struct.pack("<H", driver_used))
        self.returned = BASE
        self.observer = RingObserver(
            self.memory._space, ENTRIES, *PLACES, indirect=True, base=BASE,
            own=self.own.space, own_avail=self.own.avail(0), own_used=self.own.used(0), **options,
        )  # fmt: skip

    def request(self, head: int, *descriptors: Desc) -> None:
        self.offer(self.put_chain(head, *(descriptors or (Desc(0x8000, 16),))))

    def device_sees(self) -> tuple[int, list[int]]:
        """The available ring as the device has it: index, and the entries of one round."""
        words = struct.unpack(f"<{2 + ENTRIES}H", self.read_own(self.own.avail(0), 4 + 2 * ENTRIES))
        return words[1], list(words[2:])

    def give_back(self, head: int, written: int = 0) -> None:
        slot = self.own.used(0) + 4 + 8 * (self.returned % ENTRIES)
        self.write_own(slot, struct.pack("<II", head, written))
        self.set_returned(self.returned + 1)

    def set_returned(self, index: int) -> None:
        self.returned = index & 0xFFFF
        self.write_own(self.own.used(0) + 2, struct.pack("<H", self.returned))

    def read_own(self, at: int, length: int) -> bytes:
        found = self.own.space.read(at, length)
        assert found is not None
        return found

    def write_own(self, at: int, data: bytes) -> None:
        assert self.own.space.write(at, data)

    def signals(self) -> tuple[bool, bool]:
        observer = self.observer
        found = bool(observer.to_kick), bool(observer.to_call)
        observer.to_kick = observer.to_call = False
        return found


def test_the_device_gets_what_was_looked_at_and_the_driver_what_came_back() -> None:
    relay = Relay()
    relay.request(3, Desc(0x8000, 16), Desc(0x9000, 8, WRITE))
    assert relay.device_sees()[0] == BASE
    assert relay.observer.look()
    index, entries = relay.device_sees()
    assert index == BASE + 1
    assert entries[BASE % ENTRIES] == 3
    assert relay.signals() == (True, False)

    relay.give_back(3, 5)
    assert relay.used_idx == BASE
    relay.observer.look()
    assert relay.used_idx == BASE + 1
    assert relay.used_entry(BASE) == (3, 5)
    assert relay.signals() == (False, True)
    assert (relay.observer.taken, relay.observer.completed, relay.observer.unseen) == (1, 1, 0)


def test_neither_side_is_notified_of_what_it_does_not_want_to_be() -> None:
    relay = Relay()
    relay.set_avail_flags(1)
    relay.write_own(relay.own.used(0), b"\1\0")
    relay.request(0)
    relay.observer.look()
    relay.give_back(0)
    relay.observer.look()
    assert relay.signals() == (False, False)
    assert relay.used_idx == BASE + 1


def test_both_used_rings_go_on_where_they_were() -> None:
    """A ring in which requests were in flight when its device went."""
    relay = Relay(driver_used=BASE - 3)
    relay.request(1)
    relay.observer.look()
    relay.give_back(1, 0)
    relay.observer.look()
    assert relay.used_idx == BASE - 2
    assert relay.used_entry(BASE - 3) == (1, 0)


@pytest.mark.parametrize(
    ("lie", "who", "what"),
    [
        (lambda relay: relay.set_avail_idx((BASE + ENTRIES + 1) & 0xFFFF), "driver", "runs ahead"),
        (lambda relay: relay.offer(ENTRIES), "driver", "names descriptor 8"),
        (lambda relay: relay.request(0, Desc(0x9000, 1, WRITE), Desc(0x9000, 1)), "driver", "read"),
        (lambda relay: relay.set_returned(BASE + 1), "device", "ahead of the available"),
        (lambda relay: relay.give_back(ENTRIES), "device", "used"),
    ],
)
def test_who_lies_is_named_and_nothing_of_it_is_passed_on(lie: Any, who: str, what: str) -> None:
    relay = Relay()
    before = relay.device_sees()
    lie(relay)
    relay.observer.look()
    assert relay.observer.violation is not None
    assert relay.observer.violation[0] == who
    assert what in relay.observer.violation[1]
    assert relay.device_sees()[0] == before[0]
    assert relay.used_idx == BASE
    assert relay.signals() == (False, False)


def test_a_device_that_writes_too_much_or_gives_back_twice_is_named() -> None:
    for lie in ((0, 9), (0, 8, 0)):
        relay = Relay()
        relay.request(0, Desc(0x8000, 16), Desc(0x9000, 8, WRITE))
        relay.request(2)
        relay.observer.look()
        relay.give_back(lie[0], lie[1])
        if len(lie) == 3:
            relay.give_back(lie[2], 0)
        relay.observer.look()
        assert relay.observer.violation is not None
        assert relay.observer.violation[0] == "device"


def test_content_is_read_before_the_driver_or_the_device_can_change_it() -> None:
    relay = Relay(queue=3, origin=7)
    with Tracing(groups_of("all")), TraceReader() as reader:
        relay.memory.write(0x8000, b"what is given   ")
        relay.request(1, Desc(0x8000, 16), Desc(0x9000, 8, WRITE))
        relay.observer.look()
        relay.memory.write(0x8000, b"overwritten     ")
        relay.memory.write(0x9000, b"answer\0\7")
        relay.give_back(1, 8)
        relay.observer.look()
        records = reader.read().records
    mine = records[records["origin"] == 7]
    assert [What(int(each)).name for each in mine["what"]] == [
        *("AVAILABLE", "TAKEN", "BUFFER", "BUFFER", "CONTENT", "DATA"),
        *("CONTENT", "DATA", "COMPLETED"),
    ]
    assert mine[5].tobytes()[8:24] == b"what is given   "
    assert mine[7].tobytes()[8:16] == b"answer\0\7"
    assert mine[6]["result"] == 7


def test_any_order_of_two_honest_sides_is_passed_on_whole() -> None:
    """A model of both rings; every request and every answer arrives once, in its order."""
    for seed in range(40):
        rng = random.Random(seed)
        relay = Relay()
        free, offered, device, answered, back = list(range(ENTRIES)), [], [], [], []
        seen_by_device, seen_by_driver = BASE, BASE
        for _ in range(300):
            move = rng.randrange(4)
            if move == 0 and free:
                head = free.pop(rng.randrange(len(free)))
                relay.request(head, Desc(0x8000, 100))
                offered.append(head)
            elif move == 1:
                index, entries = relay.device_sees()
                while seen_by_device != index:
                    head = entries[seen_by_device % ENTRIES]
                    assert head == offered[(seen_by_device - BASE) & 0xFFFF]
                    device.append(head)
                    seen_by_device = (seen_by_device + 1) & 0xFFFF
            elif move == 2 and device:
                head = device.pop(rng.randrange(len(device)))
                relay.give_back(head)
                answered.append(head)
            else:
                relay.observer.look()
                assert relay.observer.violation is None, seed
                while seen_by_driver != relay.used_idx:
                    back.append(relay.used_entry(seen_by_driver)[0])
                    free.append(back[-1])
                    seen_by_driver = (seen_by_driver + 1) & 0xFFFF
                assert back == answered
        assert relay.observer.unseen == 0


def test_rings_of_a_proxy_that_have_no_place_are_refused() -> None:
    own = OwnRings()
    with pytest.raises(ProtocolError, match=f"rings for {PROXY_OWN_QUEUES} queues"):
        own.avail(PROXY_OWN_QUEUES)
    regions = tuple(MemoryRegion(n << 20, 4096, n << 20, 0) for n in range(8))
    with pytest.raises(ProtocolError, match="no room"):
        own.table(MemoryTable(regions).encode())
    for region in (MemoryRegion(PLACE, 4096, 0, 0), MemoryRegion(0, 1 << 63, PLACE - 4096, 0)):
        with pytest.raises(ProtocolError, match="where a proxy has its rings"):
            own.table(MemoryTable((region,)).encode())
    table = MemoryTable.decode(own.table(MemoryTable(regions[:2]).encode()))
    assert table.regions == (*regions[:2], MemoryRegion(PLACE, SIZE, PLACE, 0))
    address = VringAddr.decode(own.address(VringAddr(2, 1, 0x10, 0x20, 0x30, 0x40).encode()))
    assert (address.index, address.flags, address.desc) == (2, 0, 0x10)
    assert (address.avail, address.used) == (own.avail(2), own.used(2))
    assert own.translation(PLACE - 1) is None
    assert own.translation(own.used(1)) is not None


def test_a_ring_that_makes_no_sense_ends_the_connection_and_the_next_is_served(
    tmp_path: Path,
) -> None:
    front, back = tmp_path / "front", tmp_path / "back"
    with (
        nothing_left(),
        Serving(Mirror(), back),
        Proxying(front, back, notifications="relay") as proxying,
    ):
        with Driver(front) as driver:
            assert driver.run(0, b"some")[1] == b"emos"
            driver.rings[0].offer(200)
            driver.handles[0].kick()
            until(lambda: proxying.proxy._connection is None)
        proxying.check_serves()
        assert proxying.stats.violations == 1


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A disk that is served, and a copy of it as it was."""
    image, before = tmp_path / "disk.img", tmp_path / "before.img"
    image.write_bytes(random.Random(1).randbytes(1 << 20))
    shutil.copyfile(image, before)
    # In a process of its own: a recorder sees all servers of its process.
    with served(image, tmp_path, "--serial", "recorded") as (socket, _):
        yield socket, before


@pytest.mark.parametrize("iommu", ["off", "strict"])
def test_a_recording_of_a_proxy_is_repeated(
    iommu: Any, disk: tuple[Path, Path], tmp_path: Path
) -> None:
    """Sixteen requests at a time, of a driver and a device that both look without being told."""
    back, before = disk
    front, file, rng = tmp_path / "front", tmp_path / "recording", random.Random(2)
    with Proxying(front, back, notifications="relay", device="blk") as proxying:
        with (
            Recorder(proxying.proxy, file, payload="all"),
            ScriptedGuest(front, iommu=iommu, polling=True, timeout=60) as guest,
        ):
            for _ in range(12):
                sectors = rng.sample(range(128), 16)
                made = [
                    guest.submit_write(16 * sector, rng.randbytes(4096))
                    if rng.random() < 0.5
                    else guest.submit_read(16 * sector, 4096)
                    for sector in sectors
                ]
                guest.publish()
                guest.wait(*made)
            guest.flush()
        counts = proxying.stats.counts()
    assert counts["requests"] == counts["completed"] == 12 * 16 + 1
    assert counts["unseen_requests"] == counts["violations"] == 0
    with open_recording(file) as recording:
        assert recording.description["lost"] == 0
        assert recording.requests().num_rows == counts["requests"]
    result = replay(file, BlockDevice(before, serial="recorded"))
    assert result.requests == counts["requests"]
    assert result.compared["data"] > 50
    assert before.read_bytes() == (tmp_path / "disk.img").read_bytes()
