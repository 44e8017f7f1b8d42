"""The README's device is what it says: complete, and the same with an IOMMU and without one."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestio import GuestMemory, GuestRegionCollection, Iommu, IommuMemory, Iotlb, MmapRegion
from guestio.addr import Permissions
from guestio.vhost_user.frontend import Frontend, FrontendQueue
from guestio.virtio.device import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1
from guestio.virtio.driver import Completion, DriverQueue
from guestio.virtio.layout import RingLayout

README = Path(__file__).parents[2] / "README.md"
PAGE = 4096
RING_PAGE = 0x10000
DATA_PAGE, OTHER_PAGE, VICTIM_PAGE = 0x40000, 0x80000, 0xC0000
GUARD = b"\xaa" * PAGE


class Tables(Iommu):
    """The guest's I/O page tables."""

    def __init__(self, mappings: Iotlb) -> None:
        self._mappings = mappings

    @property
    def iotlb(self) -> Iotlb:
        return self._mappings


class EntropyDriver:
    """A guest's entropy driver, with nothing between it and the device but the socket."""

    def __init__(self, frontend: Frontend, memory: GuestRegionCollection) -> None:
        self.frontend = frontend
        self.memory = memory
        view: GuestMemory = memory
        ring = RING_PAGE
        if frontend.iommu:
            ring = 0xFEED0000
            frontend.iotlb.map(ring, RING_PAGE, PAGE, Permissions.READ_WRITE)
            view = IommuMemory(memory, Tables(frontend.iotlb.mappings))
        layout = RingLayout.contiguous(ring, 8)
        self.queue = DriverQueue(view, layout, event_idx=False, indirect=False)
        self.handle: FrontendQueue = frontend.start_queue(0, layout)

    def fill(self, *buffers: tuple[int, int]) -> Completion:
        """Have the device write to buffers at the addresses that it uses."""
        self.queue.add([], buffers, "token")
        if self.queue.publish():
            self.handle.kick()
        deadline = time.monotonic() + 60
        while not (done := self.queue.collect()):
            assert time.monotonic() < deadline, "the device did not answer"
            self.handle.wait_call(1)
        return done[0]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """The README's program, started as its reader would; its socket and its process."""
    found = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    source = next(block for block in found if "class Entropy" in block)
    script, socket = tmp_path / "rng.py", tmp_path / "rng.sock"
    script.write_text(source)
    process = subprocess.Popen([sys.executable, script, socket], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == f"listening on {socket}\n"
        yield socket, process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def drive(
    program: tuple[Path, subprocess.Popen[str]],
) -> Iterator[Callable[[bool], EntropyDriver]]:
    opened: list[EntropyDriver] = []

    def connect(iommu: bool) -> EntropyDriver:
        memory = GuestRegionCollection.from_regions([MmapRegion.memfd(0, 1 << 20)])
        frontend = Frontend(program[0])
        wanted = 1 << VIRTIO_F_VERSION_1 | (1 << VIRTIO_F_ACCESS_PLATFORM if iommu else 0)
        assert frontend.negotiate(wanted) == wanted
        frontend.set_memory(memory)
        for page in (DATA_PAGE, OTHER_PAGE, VICTIM_PAGE):
            memory.write(page - PAGE, GUARD * 3)
        opened.append(EntropyDriver(frontend, memory))
        return opened[-1]

    yield connect
    for driver in opened:
        driver.frontend.close()
        driver.queue.close()


def assert_random(data: bytes) -> None:
    """Neither a constant nor text passes."""
    assert len(set(data)) > 200
    assert max(data.count(value) for value in set(data)) < len(data) // 20


def assert_untouched(memory: GuestMemory, *pages: int) -> None:
    for page in pages:
        assert memory.read(page, PAGE) == GUARD


def test_it_serves_entropy_without_an_iommu(drive: Callable[[bool], EntropyDriver]) -> None:
    driver = drive(False)
    done = driver.fill((DATA_PAGE, PAGE))
    assert done == ("token", PAGE)
    first = driver.memory.read(DATA_PAGE, PAGE)
    assert_random(first)
    driver.fill((DATA_PAGE + 100, PAGE - 200))
    second = driver.memory.read(DATA_PAGE, PAGE)
    assert second[100:-100] != first[100:-100]
    assert (second[:100], second[-100:]) == (first[:100], first[-100:])
    assert_untouched(driver.memory, DATA_PAGE - PAGE, DATA_PAGE + PAGE, OTHER_PAGE, VICTIM_PAGE)
    assert driver.frontend.iotlb.counts.misses == 0


def test_it_serves_entropy_behind_an_iommu(drive: Callable[[bool], EntropyDriver]) -> None:
    driver = drive(True)
    iotlb = driver.frontend.iotlb
    # One buffer for the device, over two pages that lie elsewhere and the other way round.
    iotlb.map(0x5000, OTHER_PAGE, PAGE, Permissions.WRITE)
    iotlb.map(0x6000, DATA_PAGE, PAGE, Permissions.WRITE)
    done = driver.fill((0x5000, 2 * PAGE))
    assert done.written == 2 * PAGE
    assert_random(driver.memory.read(OTHER_PAGE, PAGE))
    assert_random(driver.memory.read(DATA_PAGE, PAGE))
    for page in (DATA_PAGE, OTHER_PAGE):
        assert_untouched(driver.memory, page - PAGE, page + PAGE)
    assert iotlb.counts.misses >= 3


def test_what_is_unmapped_is_out_of_its_reach(drive: Callable[[bool], EntropyDriver]) -> None:
    driver = drive(True)
    iotlb = driver.frontend.iotlb
    iotlb.map(0x5000, VICTIM_PAGE, PAGE, Permissions.WRITE)
    assert driver.fill((0x5000, PAGE)).written == PAGE
    iotlb.unmap((0x5000, PAGE))
    driver.memory.write(VICTIM_PAGE, GUARD)
    for address in (0x5000, VICTIM_PAGE):
        assert driver.fill((address, PAGE)).written == 0
    assert_untouched(driver.memory, VICTIM_PAGE)
    iotlb.map(0x5000, OTHER_PAGE, PAGE, Permissions.WRITE)
    assert driver.fill((0x5000, PAGE)).written == PAGE
    assert_random(driver.memory.read(OTHER_PAGE, PAGE))
    assert_untouched(driver.memory, VICTIM_PAGE)


def test_it_ends_as_it_should(
    program: tuple[Path, subprocess.Popen[str]], drive: Callable[[bool], EntropyDriver]
) -> None:
    socket, process = program
    drive(False).fill((DATA_PAGE, PAGE))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    assert not socket.exists()
