"""A vfio-user server's device under a region manager: what it reaches is what the model says."""

from __future__ import annotations

import errno
import tempfile
from concurrent.futures import Future
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from guestio import Backing
from guestio.dma import DmaError, MappingType, RegionManager
from guestio.errors import AccessError
from guestio.vfio_user import Client, VfioUserTarget
from guestio.vfio_user.messages import Command
from tests.dma.test_regions_stateful import BASE, PAGES, RegionsMachine
from tests.kit.serving import WAIT, until
from tests.kit.vfio_client import PAGE, ServingPci, Toy
from tests.kit.vfio_server import Answer, HandServer, usual


def reach(toy: Toy, address: int, write: bytes | None = None) -> bytes | None:
    """A device's access, in its own thread; None if it was refused."""
    done: Future[bytes | None] = Future()

    def access() -> None:
        try:
            if write is not None:
                toy.host.memory.write(address, write)
            done.set_result(toy.host.memory.read(address, 8))
        except AccessError:
            done.set_result(None)

    toy.host.call_soon_threadsafe(access)
    return done.result(WAIT)


class VfioUserMachine(RegionsMachine):
    """A region manager whose targets fail, and a device behind a wire that must not notice."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.toy = Toy()
        self.serving = ServingPci(self.toy, Path(self.directory.name) / "s")
        self.serving.__enter__()
        self.client = Client(self.serving.server.path)
        self.client.bus_master = True
        self.device_handle = None

    @precondition(lambda self: hasattr(self, "model") and self.device_handle is None)
    @rule(share=st.booleans())
    def add_the_device(self, share: bool) -> None:
        self.device_handle = self.manager.add_target(VfioUserTarget(self.client, share=share))

    @precondition(lambda self: self.device_handle is not None)
    @rule()
    def remove_the_device(self) -> None:
        self.device_handle.close()
        self.device_handle = None
        assert not len(self.client._mapped)

    @invariant()
    def targets_equal_truth(self) -> None:
        """As that of every target; of the device what it holds is told by its handle."""
        if not hasattr(self, "model"):
            return
        handle = self.device_handle
        if handle is not None:
            truth = set(self.truth().values())
            assert handle.broken is None
            assert not handle.diff()
            assert {each.request for each in self.client._mapped.all()} == truth

    @precondition(lambda self: hasattr(self, "model") and self.device_handle is not None)
    @invariant()
    def the_device_reaches_what_the_model_says(self) -> None:
        reachable = {}
        for request in self.truth().values():
            skip = (request.host_address - self.backing.host_address) // PAGE
            first = (request.start - BASE) // PAGE
            for page in range(request.size // PAGE):
                reachable[first + page] = (skip + page, request.writable)
        for page in range(PAGES):
            seen = reach(self.toy, BASE + page * PAGE)
            assert seen == (b"page %03d" % reachable[page][0] if page in reachable else None)
        for page, (skip, writable) in list(reachable.items())[:2]:
            written = reach(self.toy, BASE + page * PAGE, b"page %03d" % skip)
            assert (written is not None) == writable

    def teardown(self) -> None:
        if self.device_handle is not None:
            self.device_handle.close()
        self.client.close()
        self.serving.__exit__()
        self.directory.cleanup()
        super().teardown()


VfioUserMachine.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestVfioUserTarget = VfioUserMachine.TestCase


def test_what_the_device_reaches_follows_the_regions(toy: Toy, serving: ServingPci) -> None:
    memory, bar = Backing.memfd(4 * PAGE), Backing.memfd(PAGE)
    with Client(serving.server.path) as client, RegionManager() as manager:
        client.bus_master = True
        ram = manager.new_region("ram", 0, 4 * PAGE)
        ram.add_mapping(0, 4 * PAGE, memory)
        ram.map()
        handle = manager.add_target(VfioUserTarget(client))
        window = manager.new_region("bar", 0x100000, PAGE, kind=MappingType.DEVICE)
        window.add_mapping(0, PAGE, bar)
        window.map()
        assert reach(toy, 0x1000, b"in ram..") == b"in ram.."
        # The file of a BAR is not shared: it is reached by messages.
        assert serving.stats.dma_messages == 0
        assert reach(toy, 0x100000, b"in a bar") == b"in a bar"
        assert serving.stats.dma_messages == client.served_requests == 2
        assert bytes(memoryview(bar._mapping)[:8]) == b"in a bar"
        window.move(0x200000)
        assert reach(toy, 0x100000) is None
        assert reach(toy, 0x200000) == b"in a bar"
        ram.map(writable=False)
        assert reach(toy, 0x1000, b"refused.") is None
        assert reach(toy, 0x1000) == b"in ram.."
        ram.unmap()
        assert reach(toy, 0x1000) is None
        stats = handle.stats()
        assert (stats.mappings, stats.map_failures, stats.unmap_failures) == (1, 0, 0)
        handle.close()
        assert reach(toy, 0x200000) is None


def test_ram_that_a_server_refuses_fails_the_operation() -> None:
    memory = Backing.memfd(4 * PAGE)
    maps = 0

    def refuse_the_third(server: HandServer, asked: object) -> Answer:
        nonlocal maps
        maps += 1
        return Answer(b"", errno.ENOMEM if maps == 3 else 0)

    special = {Command.DMA_MAP: refuse_the_third}
    with HandServer(special) as server, server.client() as client, RegionManager() as manager:
        handle = manager.add_target(VfioUserTarget(client))
        ram = manager.new_region("ram", 0, 4 * PAGE)
        for page in range(4):
            ram.add_mapping(page * PAGE, PAGE, memory, page * PAGE)
        with pytest.raises(DmaError, match="ENOMEM"):
            ram.map()
        assert not ram.mapped
        assert not handle.diff()
        assert not len(client._mapped)
        commands = [asked.command for asked in server.seen[-5:]]
        assert commands == [2, 2, 2, Command.DMA_UNMAP, Command.DMA_UNMAP]
        ram.map()
        assert handle.stats().mappings == 4


def test_a_bar_that_a_server_refuses_is_recorded() -> None:
    bar = Backing.memfd(PAGE)
    refusing = [True]

    def refuse(server: HandServer, asked: object) -> Answer:
        return Answer(b"", errno.EOPNOTSUPP if refusing[0] else 0)

    special = {Command.DMA_MAP: refuse}
    with HandServer(special) as server, server.client() as client, RegionManager() as manager:
        handle = manager.add_target(VfioUserTarget(client))
        window = manager.new_region("bar", 0, PAGE, kind=MappingType.DEVICE)
        window.add_mapping(0, PAGE, bar)
        window.map()
        (failed,) = handle.stats().failed
        assert "ENOTSUP" in str(failed.error)
        assert handle.broken is None
        refusing[0] = False
        assert not handle.retry()
        assert handle.stats().mappings == 1
        # No descriptor of a BAR leaves the process.
        assert not any(asked.fds for asked in server.seen)


def test_an_unmap_that_a_server_refuses_breaks_the_target() -> None:
    memory = Backing.memfd(PAGE)
    refusing = [True]
    special = {
        Command.DMA_UNMAP: lambda server, asked: (
            Answer(b"", errno.EBUSY) if refusing[0] else usual(server, asked)
        )
    }
    with HandServer(special) as server, server.client() as client, RegionManager() as manager:
        handle = manager.add_target(VfioUserTarget(client))
        ram = manager.new_region("ram", 0, PAGE)
        ram.add_mapping(0, PAGE, memory)
        ram.map()
        with pytest.raises(DmaError, match="EBUSY"):
            ram.unmap()
        assert handle.broken is not None
        with pytest.raises(BufferError):
            ram.close()
            memory.close()
        refusing[0] = False
        assert not handle.retry()
        until(lambda: not len(client._mapped))
