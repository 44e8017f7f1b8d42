"""DMA maps: what keeping targets in step costs on top of the targets' own calls.

Each operation on N mappings, with one to three targets that do nothing, in microseconds for one
mapping at one target; beside it the same calls made directly, without regions, undo or records.

    ./run bench dma
    ./run bench dma --growth                                 how costs grow with what is there
    ./run lab bench/dma.py --target type1                    on a real kernel
    ./run lab --kernel iommufd bench/dma.py --target iommufd

On a kernel, pinning and the IOMMU's tables dominate; the guest of the lab is 10 to 20 times slower
than its host, so compare columns, not machines.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from guestio import Backing, GuestRegionCollection
from guestio.dma import DmaMapRequest, DmaTarget, IommufdTarget, RegionManager, VfioType1Target
from guestio.testing import RecordingTarget, SimulatedHostIommu
from guestio.virtio.iommu import VirtioIommu, wire

PAGE = 0x1000
START = 0x1_0000_0000
BEYOND = 0x100_0000_0000
GROWTH = (128, 512, 2048, 8192)
Series = dict[str, list[float]]


class Nothing:
    """A target that does nothing."""

    def map_dma(self, request: DmaMapRequest) -> None:
        """Do nothing."""

    def unmap_dma(self, start: int, size: int) -> None:
        """Do nothing."""


@contextlib.contextmanager
def real_target(interface: str) -> Iterator[DmaTarget]:
    """A target of the kernel, with the lab's devices in it."""
    with contextlib.ExitStack() as stack:
        target: Any = VfioType1Target() if interface == "type1" else IommufdTarget()
        stack.enter_context(target)
        for path in Path("/sys/bus/pci/drivers/vfio-pci").glob("0000:*"):
            stack.enter_context(target.open_device(path.name))
        yield target


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(targets: list[DmaTarget], memory: Backing, count: int) -> dict[str, float]:
    """Seconds for each operation on `count` mappings."""
    manager = RegionManager()
    handles = [manager.add_target(target) for target in targets]
    ram = manager.new_region("ram", START, count * PAGE)
    ram.map()
    offsets = [number * PAGE for number in range(count)]

    def add_all() -> None:
        for offset in offsets:
            ram.add_mapping(offset, PAGE, memory, offset)

    def remove_all() -> None:
        for offset in offsets:
            ram.remove_mappings(offset, PAGE)

    found = {"add one by one": timed(add_all)}
    found["unmap region"] = timed(ram.unmap)
    found["map region"] = timed(ram.map)
    found["change permission"] = timed(lambda: ram.map(writable=False))
    found["move region"] = timed(lambda: ram.move(BEYOND))
    handles[0].close()
    found["replay to a new target"] = len(targets) * timed(lambda: manager.add_target(targets[0]))
    found["remove one by one"] = timed(remove_all)
    manager.close()
    return found


def measure_directly(targets: list[DmaTarget], memory: Backing, count: int) -> dict[str, float]:
    """Seconds for the same calls of the targets alone."""
    requests = [
        DmaMapRequest(
            START + number * PAGE,
            PAGE,
            host_address=memory.host_address + number * PAGE,
            fd=memory.fd,
            file_offset=number * PAGE,
        )
        for number in range(count)
    ]

    def map_all() -> None:
        for request in requests:
            for target in targets:
                target.map_dma(request)

    def unmap_all() -> None:
        for request in requests:
            for target in targets:
                target.unmap_dma(request.start, request.size)

    coming, going = timed(map_all), timed(unmap_all)
    return {
        "add one by one": coming,
        "unmap region": going,
        "map region": coming,
        "change permission": coming + going,
        "move region": coming + going,
        "replay to a new target": coming,
        "remove one by one": going,
    }


def report(targets: list[DmaTarget], count: int, runs: int) -> None:
    """Print medians, in microseconds for one mapping at one target."""
    with Backing.memfd(count * PAGE) as memory:
        series: Series = {}
        direct: Series = {}
        for _ in range(runs):
            for kept, found in (
                (series, measure(targets, memory, count)),
                (direct, measure_directly(targets, memory, count)),
            ):
                for name, seconds in found.items():
                    kept.setdefault(name, []).append(seconds)
    each = 1e6 / (count * len(targets))
    print(f"\n{count} mappings, {len(targets)} targets; medians of {runs} runs")
    print(f"  {'microseconds per mapping and target':36}{'regions':>10}{'calls alone':>14}")
    for name, samples in series.items():
        mine, alone = statistics.median(samples) * each, statistics.median(direct[name]) * each
        print(f"  {name:36}{mine:10.2f}{alone:14.2f}")


def growth() -> None:
    """Print microseconds for one operation while there are more and more of its kind."""
    print(f"\n{'microseconds for one':44}" + "".join(f"{count:>10}" for count in GROWTH))
    for name, measured in (
        ("region: made, mapped, unmapped and closed", regions_growth),
        ("mapping of a RecordingTarget", lambda n: mappings_growth(RecordingTarget(), n)),
        ("mapping of a SimulatedHostIommu", lambda n: mappings_growth(SimulatedHostIommu(), n)),
        ("MAP of a virtio-iommu, by regions of memory", map_growth),
    ):
        figures = [statistics.median(measured(count) for _ in range(3)) for count in GROWTH]
        print(f"{name:44}" + "".join(f"{figure:10.2f}" for figure in figures))


def regions_growth(count: int) -> float:
    """With so many regions side by side."""
    with Backing.memfd(PAGE) as memory:
        manager = RegionManager()

        def make_all() -> None:
            for number in range(count):
                region = manager.new_region("region", START + 2 * number * PAGE, PAGE)
                region.add_mapping(0, PAGE, memory)
                region.map()

        def close_all() -> None:
            for region in manager.regions:
                region.unmap()
                region.close()

        return 1e6 / count * (timed(make_all) + timed(close_all))


def mappings_growth(target: DmaTarget, count: int) -> float:
    """With so many mappings at a target."""
    with Backing.memfd(PAGE) as memory:
        requests = [
            DmaMapRequest(2 * number * PAGE, PAGE, memory.host_address, memory.fd)
            for number in range(count)
        ]

        def map_all() -> None:
            for request in requests:
                target.map_dma(request)

        def unmap_all() -> None:
            for request in requests:
                target.unmap_dma(request.start, request.size)

        return 1e6 / count * (timed(map_all) + timed(unmap_all))


def map_growth(count: int) -> float:
    """With so many regions of guest memory, and a target."""
    physical = GuestRegionCollection.from_ranges((2 * n * PAGE, PAGE) for n in range(count))
    iommu = VirtioIommu(endpoints=[8])
    iommu.endpoint(8).add_target(Nothing(), physical)
    iommu.handle_request(wire.pack(wire.Attach(1, 8, 0, bytes(4))), 4)
    requests = [
        wire.pack(wire.Map(1, n * PAGE, n * PAGE + PAGE - 1, 2 * (n % count) * PAGE, 3))
        for n in range(1000)
    ]

    def map_all() -> None:
        for request in requests:
            iommu.handle_request(request, 4)

    return 1e6 / len(requests) * timed(map_all)


def main() -> None:
    """See `./run bench dma --help`."""
    parser = argparse.ArgumentParser(prog="./run bench dma", description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=("nothing", "type1", "iommufd"), default="nothing")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--growth", action="store_true", help="show how costs grow")
    arguments = parser.parse_args()
    if arguments.growth:
        growth()
        return
    if arguments.target == "nothing":
        for count, targets in ((1000, 1), (1000, 3), (10000, 1)):
            report([Nothing() for _ in range(targets)], count, arguments.runs)
        return
    with real_target(arguments.target) as target:
        report([target], 500, arguments.runs)


if __name__ == "__main__":
    main()
