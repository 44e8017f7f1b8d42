"""A back-end's memory table that follows a region manager, against the real session."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from guestio.dma import DmaError, MappingType, RegionManager
from guestio.errors import DeviceError
from guestio.memory import Backing
from guestio.vhost_user.frontend import PROTOCOL_FEATURES, Frontend
from guestio.vhost_user.messages import ProtocolFeature
from guestio.vhost_user.sharing import MemoryTableTarget
from tests.kit.peer import WAIT, SessionPeer, nothing_left

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guestio.dma import Region

PAGE = 0x1000
SLOTS = int(PROTOCOL_FEATURES)
TABLE = SLOTS & ~int(ProtocolFeature.CONFIGURE_MEM_SLOTS)
SILENT = TABLE & ~int(ProtocolFeature.REPLY_ACK)


class Peer:
    """A front-end joined to a session, and the memory that session knows from its messages."""

    def __init__(self, protocol: int) -> None:
        ours, theirs = socket.socketpair()
        self.session = SessionPeer(theirs)
        self.session.__enter__()
        self.frontend = Frontend(ours, timeout=WAIT)
        # Without acknowledgements there is no IOMMU.
        self.frontend.negotiate(1 if protocol == SILENT else 2**64 - 1, protocol)
        self.target = MemoryTableTarget(self.frontend)

    @property
    def memory(self) -> list[tuple[int, int, int]]:
        """Address, size and offset in the file of each region, as the back-end was told."""
        known: dict[int, Any] = {}
        for name, *arguments in self.session.handler.calls:
            if name == "set_memory_table":
                known = {region.guest_addr: region for region, _fd in arguments[0]}
            elif name == "add_memory_region":
                known[arguments[0].guest_addr] = arguments[0]
            elif name == "remove_memory_region":
                del known[arguments[0].guest_addr]
        return [(start, r.size, r.mmap_offset) for start, r in sorted(known.items())]

    def close(self) -> None:
        self.frontend.close()
        self.frontend.iotlb.memory = None
        self.session.__exit__(None, None, None)
        assert self.session.error is None


@pytest.fixture(params=[SLOTS, TABLE, SILENT], ids=["slots", "table", "unacknowledged"])
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    with nothing_left():
        made = Peer(request.param)
        yield made
        made.close()


@pytest.fixture
def memory() -> Iterator[Backing]:
    with Backing.memfd(16 * PAGE) as made:
        yield made


@pytest.fixture
def manager(peer: Peer, memory: Backing) -> Iterator[RegionManager]:
    with RegionManager() as made:
        yield made


def new_ram(manager: RegionManager, memory: Backing) -> Region:
    ram = manager.new_region("ram", 0x100000, 16 * PAGE)
    ram.add_mapping(0, 4 * PAGE, memory)
    ram.map()
    return ram


def test_the_table_follows(peer: Peer, manager: RegionManager, memory: Backing) -> None:
    ram = new_ram(manager, memory)
    with manager.add_target(peer.target, needs_fd=True):
        assert peer.memory == [(0x100000, 4 * PAGE, 0)]
        ram.add_mapping(8 * PAGE, 2 * PAGE, memory, 6 * PAGE)
        first = (0x100000, 4 * PAGE, 0)
        assert peer.memory == [first, (0x108000, 2 * PAGE, 6 * PAGE)]
        ram.remove_mappings(0, 4 * PAGE)
        assert peer.memory == [(0x108000, 2 * PAGE, 6 * PAGE)]
        ram.move(0x400000)
        assert peer.memory == [(0x408000, 2 * PAGE, 6 * PAGE)]
        ram.unmap()
        assert peer.memory == []
        ram.map()
        assert peer.memory == [(0x408000, 2 * PAGE, 6 * PAGE)]
        assert [r.start for r in peer.target.shared] == [0x408000]
    assert peer.memory == []


def test_a_back_end_that_takes_its_time_is_waited_for(
    peer: Peer, manager: RegionManager, memory: Backing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing is acknowledged: memory is let go of only when the back-end has."""
    handler = peer.session.handler
    record = handler._record

    def slowly(*arguments: Any) -> None:
        time.sleep(0.1)
        record(*arguments)

    monkeypatch.setattr(handler, "_record", slowly)
    ram = new_ram(manager, memory)
    with manager.add_target(peer.target):
        assert len(peer.memory) == 1
        ram.unmap()
        assert peer.memory == []


def test_two_back_ends(peer: Peer, manager: RegionManager, memory: Backing) -> None:
    other = Peer(SLOTS)
    ram = new_ram(manager, memory)
    with manager.add_target(peer.target), manager.add_target(other.target):
        ram.add_mapping(8 * PAGE, PAGE, memory)
        assert len(peer.memory) == 2
        assert peer.memory == other.memory
    other.close()


def test_device_memory_is_not_shared(peer: Peer, manager: RegionManager, memory: Backing) -> None:
    bar = manager.new_region("bar", 0x100000, PAGE, kind=MappingType.DEVICE)
    bar.add_mapping(0, PAGE, memory)
    bar.map()
    with manager.add_target(peer.target) as handle:
        assert peer.memory == []
        (failed,) = handle.stats().failed
        assert "never shared" in str(failed.error)


def test_memory_that_may_only_be_read_is_not_shared(
    peer: Peer, manager: RegionManager, memory: Backing
) -> None:
    rom = manager.new_region("rom", 0x100000, PAGE)
    rom.add_mapping(0, PAGE, memory, writable=False)
    rom.map()
    with manager.add_target(peer.target):
        assert peer.memory == []
        assert [request.start for request in peer.target.unshared] == [0x100000]
        rom.unmap()
        assert peer.target.unshared == ()


def test_memory_without_a_file_is_refused(peer: Peer, manager: RegionManager) -> None:
    with Backing.anonymous(PAGE) as private:
        ram = manager.new_region("ram", 0, PAGE)
        ram.add_mapping(0, PAGE, private)
        ram.map()
        for needs_fd in (True, False):
            with pytest.raises(DmaError, match="memfd"):
                manager.add_target(peer.target, needs_fd)
        ram.close()
    assert peer.memory == []


def test_more_regions_than_the_back_end_takes(
    peer: Peer, manager: RegionManager, memory: Backing
) -> None:
    peer.session.handler.max_mem_slots = 8
    limit = peer.frontend.max_memory_slots()
    assert limit == 8
    peer.target = MemoryTableTarget(peer.frontend)
    ram = manager.new_region("ram", 0, 16 * PAGE)
    ram.map()
    with manager.add_target(peer.target):
        for page in range(limit):
            ram.add_mapping(page * PAGE, PAGE, memory)
        with pytest.raises(DmaError, match=f"takes {limit} memory regions"):
            ram.add_mapping(limit * PAGE, PAGE, memory)
        assert len(peer.memory) == len(ram.mappings) == limit


def test_a_back_end_that_refuses(manager: RegionManager, memory: Backing) -> None:
    with nothing_left():
        peer = Peer(SLOTS)
        ram = new_ram(manager, memory)
        handle = manager.add_target(peer.target)
        peer.session.handler.error = DeviceError("no room")
        with pytest.raises(DmaError, match="refused ADD_MEM_REG"):
            ram.add_mapping(8 * PAGE, PAGE, memory)
        assert len(ram.mappings) == 1
        assert [r.start for r in peer.target.shared] == [0x100000]
        ram.add_mapping(8 * PAGE, PAGE, memory)
        assert len(peer.memory) == 2
        # One that does not confirm that it let go: the memory is kept until it does.
        peer.session.handler.error = DeviceError("busy")
        with pytest.raises(DmaError, match="refused REM_MEM_REG"):
            ram.unmap()
        assert handle.broken
        assert len(handle.stats().quarantined) == 1
        ram.close()
        with pytest.raises(BufferError):
            memory.close()
        assert not handle.retry()
        assert peer.memory == []
        handle.close()
        peer.close()


def test_a_back_end_that_went_away(manager: RegionManager, memory: Backing) -> None:
    with nothing_left():
        peer = Peer(SLOTS)
        ram = new_ram(manager, memory)
        handle = manager.add_target(peer.target)
        peer.frontend.close()
        with pytest.raises(DmaError):
            ram.unmap()
        # It is gone, and the memory is out of reach.
        handle.forget()
        ram.close()
        peer.close()
        peer.target.close()


def test_unsharing_what_is_not_shared(peer: Peer) -> None:
    with pytest.raises(DmaError, match="exactly there"):
        peer.target.unmap_dma(0, PAGE)
