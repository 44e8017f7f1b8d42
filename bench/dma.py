"""DMA maps: what keeping targets in step costs on top of the targets' own calls.

Each operation on N mappings, with one to three targets that do nothing, in microseconds for one
mapping at one target; beside it the same calls made directly, without regions, undo or records.

    ./run bench dma
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

from guestio import Backing
from guestio.dma import DmaMapRequest, DmaTarget, IommufdTarget, RegionManager, VfioType1Target

PAGE = 0x1000
START = 0x1_0000_0000
BEYOND = 0x100_0000_0000
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


def main() -> None:
    """See `./run bench dma --help`."""
    parser = argparse.ArgumentParser(prog="./run bench dma", description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=("nothing", "type1", "iommufd"), default="nothing")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.target == "nothing":
        for count, targets in ((1000, 1), (1000, 3), (10000, 1)):
            report([Nothing() for _ in range(targets)], count, arguments.runs)
        return
    with real_target(arguments.target) as target:
        report([target], 500, arguments.runs)


if __name__ == "__main__":
    main()
