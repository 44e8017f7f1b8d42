"""What the endpoints of a virtio-iommu domain cost: MAP, UNMAP, attachment, memory, restore.

Each row is a process of its own. Times are of the CPU: medians of batches of 1,000 requests, of
five attachments of one endpoint more, and one restore of the whole.

    ./run bench domains
    ./run bench domains --endpoints 1 1000 --mappings 10000
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from guestio.virtio.iommu import VirtioIommu, wire

PAGE = 4096
BATCH = 1000


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _per_request(iommu: VirtioIommu, requests: list[bytes]) -> float:
    """CPU seconds per request, median of the batches."""
    times = []
    for first in range(0, len(requests), BATCH):
        batch = requests[first : first + BATCH]
        begun = time.process_time()
        for request in batch:
            if iommu.handle_request(request, 4) != bytes(4):
                raise RuntimeError(f"refused: {request.hex()}")
        times.append((time.process_time() - begun) / len(batch))
    return statistics.median(times)


def _once(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def measure(endpoints: int, mappings: int) -> dict[str, float]:
    """The figures of one row."""
    iommu = VirtioIommu(endpoints=range(endpoints + 1), max_total_mappings=1 << 40)
    ends = [wire.pack(wire.Attach(1, n, 0, bytes(4))) for n in range(endpoints + 1)]
    _per_request(iommu, ends[:endpoints])
    # Where neighbors lead does not merge, as with a guest's pages.
    places = [(n * PAGE, (n * 7919) % mappings * PAGE) for n in range(mappings)]
    maps = [wire.pack(wire.Map(1, iova, iova + PAGE - 1, gpa, 3)) for iova, gpa in places]
    unmaps = [wire.pack(wire.Unmap(1, iova, iova + PAGE - 1, bytes(4))) for iova, _ in places]
    before = _resident()
    found = {"map": _per_request(iommu, maps), "memory": _resident() - before}
    detach = [wire.pack(wire.Detach(1, endpoints))]
    rounds = [
        (_per_request(iommu, ends[endpoints:]), _per_request(iommu, detach)) for _ in range(5)
    ]
    found["attach"] = statistics.median(attach for attach, _ in rounds)
    found["detach"] = statistics.median(detach for _, detach in rounds)
    state = iommu.snapshot()
    found["restore"] = _once(lambda: VirtioIommu.restore(state))
    found["unmap"] = _per_request(iommu, unmaps)
    return found


def main() -> None:
    """Measure the rows and print them."""
    parser = argparse.ArgumentParser(prog="bench domains", description=__doc__)
    parser.add_argument("--endpoints", type=int, nargs="*", default=[1, 10, 100])
    parser.add_argument("--mappings", type=int, default=100_000)
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        print(json.dumps(measure(options.row, options.mappings)))
        return
    print(
        "| endpoints | MAP, us | UNMAP, us | attach, ms | detach, ms | memory, MiB | restore, s |"
    )
    print("|---|---|---|---|---|---|---|")
    for endpoints in options.endpoints:
        command = [sys.executable, "-m", "bench", "domains", "--row", str(endpoints)]
        command += ["--mappings", str(options.mappings)]
        row = json.loads(subprocess.check_output(command, env=os.environ))
        print(
            f"| {endpoints} | {row['map'] * 1e6:.1f} | {row['unmap'] * 1e6:.1f} "
            f"| {row['attach'] * 1e3:.3f} | {row['detach'] * 1e3:.3f} "
            f"| {row['memory'] / 2**20:.1f} | {row['restore']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
