"""The script's bench on the real kernel; runs in the lab guest and prints its results.

./run lab tests/vfio_lab/kernel.py type1
"""

import contextlib
import ctypes
import json
import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guestio.dma import IommufdTarget, VfioDevice, VfioType1Target
from tests.vfio_lab.script import (
    ENTRIES,
    LOCKED_PAGES,
    PAGE,
    SCRATCH,
    Bench,
    script,
)

ENTRY_LIMIT = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
CAP_IPC_LOCK = 14


def pci_address(vendor_and_device: str) -> str:
    """Where the lab's device with these numbers is, such as ``1234:11e8``."""
    for path in sorted(Path("/sys/bus/pci/devices").iterdir()):
        numbers = [(path / name).read_text().strip()[2:] for name in ("vendor", "device")]
        if ":".join(numbers) == vendor_and_device:
            return path.name
    raise LookupError(f"no PCI device {vendor_and_device}")


class Edu:
    """QEMU's `edu` device: a buffer of 4 KiB, and DMA between it and memory.

    Registers: QEMU, docs/specs/edu.rst.
    """

    SOURCE, TARGET, COUNT, COMMAND = 0x80, 0x88, 0x90, 0x98
    BUFFER = 0x40000

    def __init__(self, device: VfioDevice) -> None:
        self.device = device
        self.registers = device.bar(0)
        device.memory_space = True
        device.bus_master = True

    def fetch(self, iova: int, length: int, *, interrupt: bool = False) -> None:
        """Copy memory to the buffer."""
        self._transfer(iova, self.BUFFER, length, 1 | 4 * interrupt)

    def store(self, iova: int, length: int) -> None:
        """Copy the buffer to memory."""
        self._transfer(self.BUFFER, iova, length, 1 | 2)

    def _transfer(self, source: int, target: int, length: int, command: int) -> None:
        for register, value in (
            (self.SOURCE, source),
            (self.TARGET, target),
            (self.COUNT, length),
            (self.COMMAND, command),
        ):
            self.registers.store(register, value, 8)
        end = time.monotonic() + 10
        while self.registers.load(self.COMMAND, 8) & 1:
            if time.monotonic() > end:
                raise TimeoutError("edu does not finish its transfer")
            time.sleep(0.002)


class KernelBench(Bench):
    def __init__(self, target: VfioType1Target | IommufdTarget) -> None:
        self.edu = Edu(target.open_device(pci_address("1234:11e8")))
        self.other = target.open_device(pci_address("1af4:1110"))
        self.other.memory_space = True
        self._token_in_buffer = True
        super().__init__(target, self.other.bar(2).backing())

    def set_memory_space(self, on: bool) -> None:
        self.other.memory_space = on

    def device_read(self, iova: int, length: int) -> bytes:
        if self._token_in_buffer:
            self.scratch.write(0, bytes(length))
            self.edu.fetch(SCRATCH, length)
        self.edu.fetch(iova, length)
        self._token_in_buffer = True
        self.edu.store(SCRATCH, length)
        return bytes(self.scratch.read(0, length))

    def device_write(self, iova: int, data: bytes) -> None:
        self.scratch.write(0, data)
        self.edu.fetch(SCRATCH, len(data))
        self._token_in_buffer = False
        self.edu.store(iova, len(data))

    def close(self) -> None:
        self.memories["bar"].close()  # it keeps the device open
        self.edu.device.close()
        self.other.close()
        self.kernel.close()


@contextlib.contextmanager
def bound_by_limit(size: int) -> Iterator[None]:
    """Be a process that may lock `size` bytes (capset(2), version 3; getrlimit(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)

    def call(function: Any) -> None:
        if function(header, data):
            raise OSError(ctypes.get_errno(), function.__name__)

    call(libc.capget)
    data[0] &= ~(1 << CAP_IPC_LOCK)
    call(libc.capset)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, limit)
        data[0] |= 1 << CAP_IPC_LOCK
        call(libc.capset)


@contextlib.contextmanager
def room_for(entries: int) -> Iterator[None]:
    """Have containers opened now hold few mappings."""
    usual = ENTRY_LIMIT.read_text()
    ENTRY_LIMIT.write_text(str(entries))
    try:
        yield
    finally:
        ENTRY_LIMIT.write_text(usual)


def run_on_kernel(interface: str) -> dict[str, list[str]]:
    """The results of every phase."""
    surroundings = {
        "plain": contextlib.nullcontext,
        "entries": lambda: room_for(ENTRIES),
        "locked": lambda: bound_by_limit(LOCKED_PAGES * PAGE),
    }
    results = {}
    for phase, steps in script(interface).items():
        with surroundings[phase]():
            bench = KernelBench(VfioType1Target() if interface == "type1" else IommufdTarget())
            results[phase] = bench.run(steps)
            bench.close()
    return results


def main() -> None:
    interface = sys.argv[1]
    linux = [int(number) for number in platform.release().split(".")[:2]]
    results = run_on_kernel(interface)
    report = {"interface": interface, "linux": linux, "results": results}
    sys.stdout.write(json.dumps(report, indent=0) + "\n")


if __name__ == "__main__":
    main()
