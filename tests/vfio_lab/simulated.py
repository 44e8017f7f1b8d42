"""The script's bench on a simulated kernel."""

import contextlib

from guestio.testing.host_iommu import DmaFaultError, Interface, SimulatedHostIommu
from tests.vfio_lab.script import BAR_SIZE, ENTRIES, LOCKED_PAGES, PAGE, Bench, script


class SimulatedBench(Bench):
    def __init__(self, kernel: SimulatedHostIommu) -> None:
        self.bar = kernel.new_bar(BAR_SIZE)
        super().__init__(kernel, self.bar.backing)

    def set_memory_space(self, on: bool) -> None:
        self.bar.memory_space = on

    def device_read(self, iova: int, length: int) -> bytes:
        with contextlib.suppress(DmaFaultError):
            return self.kernel.read(iova, length)
        return bytes(length)

    def device_write(self, iova: int, data: bytes) -> None:
        with contextlib.suppress(DmaFaultError):
            self.kernel.write(iova, data)


def simulate(interface: Interface, linux: tuple[int, int]) -> dict[str, list[str]]:
    """The results of every phase."""
    results = {}
    for phase, steps in script(interface).items():
        kernel = SimulatedHostIommu(
            interface,
            linux=linux,
            entries=ENTRIES if phase == "entries" else 65535,
            locked_limit=LOCKED_PAGES * PAGE if phase == "locked" else None,
        )
        results[phase] = SimulatedBench(kernel).run(steps)
    return results
