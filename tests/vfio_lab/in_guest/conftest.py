"""What the tests in the lab guest share: the two assigned devices on either interface."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio import Backing, MmapRegion, VolatileSlice
from guestio.dma import IommufdTarget, RegionManager, VfioType1Target
from tests.vfio_lab.kernel import Edu, pci_address
from tests.vfio_lab.mock_device import kernel_has_it
from tests.vfio_lab.script import PAGE

# Where the kernel has no devices for it nothing of it can run; the host counts what did.
collect_ignore = [] if kernel_has_it() else ["test_dirty_bits.py"]

INTERFACES = ["type1"] + ["iommufd"] * Path("/dev/iommu").exists()
# Where the tests keep a page through which they see edu's buffer.
WINDOW = 0x7F000000


class Lab:
    """Devices in an address space of their own."""

    def __init__(self, interface: str) -> None:
        self.interface = interface
        self.target = VfioType1Target() if interface == "type1" else IommufdTarget()
        self.edu_device = self.target.open_device(pci_address("1234:11e8"))
        self.edu = Edu(self.edu_device)
        self.other = self.target.open_device(pci_address("1af4:1110"))
        self.other.memory_space = True
        self.bar = self.other.bar(2).backing()
        self._window = Backing.memfd(PAGE)
        self.window = MmapRegion(0, self._window).slice()
        self.target.kernel_map(WINDOW, PAGE, self._window.host_address, True)

    def device_writes(self, iova: int, data: bytes) -> None:
        """Edu writes memory; without effect if that faults."""
        self.window.write(0, data)
        self.edu.fetch(WINDOW, len(data))
        self.edu.store(iova, len(data))

    def device_reads(self, iova: int, length: int) -> bytes:
        """Edu reads memory; dots where that faults."""
        self.window.write(0, b"." * length)
        self.edu.fetch(WINDOW, length)
        self.edu.fetch(iova, length)
        self.edu.store(WINDOW, length)
        data = bytes(self.window.read(0, length))
        # What edu then holds is QEMU's choice: nothing new, or zeros.
        return None if data in {b"." * length, bytes(length)} else data

    def room(self) -> int | None:
        return self.target.info().available

    def close(self) -> None:
        self.bar.close()
        self.edu_device.close()
        self.other.close()
        self.target.close()


@pytest.fixture(params=INTERFACES)
def lab(request) -> Iterator[Lab]:
    made = Lab(request.param)
    yield made
    made.close()


@pytest.fixture
def memory() -> Iterator[Backing]:
    with Backing.memfd(16 * PAGE) as made:
        yield made


@pytest.fixture
def manager(lab: Lab, memory: Backing) -> Iterator[RegionManager]:
    with RegionManager() as made:
        yield made


def bytes_of(backing: Backing) -> VolatileSlice:
    return MmapRegion(0, backing).slice()
