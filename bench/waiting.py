"""What receive buffers that wait in a ring delay: an invalidation of another page, a disconnect.

`guestio net --responder` is served in a process of its own, to a driver behind a strict IOMMU that
posts its buffers and sends nothing. An invalidation is timed until it is acknowledged, a disconnect
until the next front-end has its first answer. Wall time: a busy machine adds to it.

    ./run bench waiting
    ./run bench waiting --buffers 0
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from guestio.addr import Permissions
from guestio.testing import Driver
from guestio.vhost_user import Frontend

PAGE = 4096
ELSEWHERE = 1 << 40
"""A page of the I/O address space that no buffer is in."""


def _driver(path: Path, buffers: int, size: int) -> Driver:
    # Scattered on pages of their own, a buffer takes up to two entries.
    driver = Driver(path, iommu="strict", features=0, queue_size=1024)
    for _ in range(buffers):
        driver.post(size, publish=False)
    driver.publish()
    # The device knows a translation of the other page, too, so that there is one to forget.
    driver.frontend.iotlb.map(ELSEWHERE, 0, PAGE, Permissions.READ_WRITE)
    driver.frontend.sync()
    return driver


def invalidations(path: Path, buffers: int, size: int, rounds: int) -> list[float]:
    """Seconds until each invalidation was acknowledged."""
    times = []
    with _driver(path, buffers, size) as driver:
        for _ in range(rounds):
            driver.frontend.iotlb.push(ELSEWHERE)
            begun = time.perf_counter()
            driver.frontend.iotlb.invalidate((ELSEWHERE, PAGE))
            times.append(time.perf_counter() - begun)
        if driver.in_flight() != buffers:
            raise RuntimeError("the buffers did not wait")
    return times


def disconnects(path: Path, buffers: int, size: int, rounds: int) -> list[float]:
    """Seconds from each disconnect until the next front-end had its first answer."""
    times = []
    for _ in range(rounds):
        driver = _driver(path, buffers, size)
        # Closed without a word, as by a crash.
        begun = time.perf_counter()
        driver.frontend.close()
        with Frontend(path) as following:
            following.sync()
            times.append(time.perf_counter() - begun)
        driver.close()
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="bench/waiting.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--buffers", type=int, default=256, help="that wait (256)")
    parser.add_argument("--size", type=int, default=600, help="of each, in bytes (600)")
    parser.add_argument("--rounds", type=int, default=1000, help="invalidations (1000)")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    shape = arguments.buffers, arguments.size
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "net.sock"
        command = ["net", "--responder", "10.0.2.1/24", "--socket", str(path)]
        with subprocess.Popen(
            [sys.executable, "-m", "guestio", *command], stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stderr is not None
                line = process.stderr.readline()
                if "listening" not in line:
                    raise RuntimeError(line + process.stderr.read())
                times = max(rounds // 20, 1)
                rows = (
                    ("invalidation acknowledged after", invalidations(path, *shape, rounds)),
                    ("next front-end served after", disconnects(path, *shape, times)),
                )
            finally:
                process.terminate()
    print(f"{arguments.buffers} buffers of {arguments.size} bytes wait")
    for name, times in rows:
        median, longest = statistics.median(times) * 1000, max(times) * 1000
        print(f"{name:32} {median:7.3f} ms median, {longest:7.3f} ms longest, {len(times)} times")


if __name__ == "__main__":
    main()
