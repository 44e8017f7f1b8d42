"""User instructions of the core per 4 KiB read, counted by running it one instruction at a time.

What `bench instructions` counts for a whole server in minutes, this counts in seconds for one ring:
a batch of reads from being found to being published, without and with what writes records and
measures latencies. A larger batch less a smaller one, so that what a batch costs is left out. Good
for differences; the event loop is not in it. While a program is stepped, each time of a request is
a reading of the clock: the processor's counter, which tells it otherwise, has gone too far.

    ./run bench steps
    ./run bench steps --against ../before
    ./run bench steps --times 60

`--times N` times batches of 32 reads, copies of their data included, 20 times each in N alternating
rounds, and shows the percentile of them that no other process disturbs, however busy the machine
is, in ns per read, with ratios to nothing on.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent.parent
FEW, MANY, BATCH = 8, 40, 32
SINGLE_STEP = 9  # PTRACE_SINGLESTEP
GROUPS = {
    "nothing": 0,
    "measured, as with a control socket": 8 | 4,
    "recorded": 8 | 4 | 2 | 1,
}
SETUP = """
import ctypes, os, signal, struct, sys, time
from guestio._core.memory.image import ImageFile
from guestio._core.trace import tracepoints
from guestio._core.trace.latencies import Latencies
from guestio._core.virtio.block_server import BlockServer
from guestio._core.virtio.split import SplitRing
from guestio.memory import GuestRegionCollection, MmapRegion
from tests.kit.rings import WRITE, Desc, HandRing
count, *groups = map(int, sys.argv[1:])
memory = GuestRegionCollection.from_regions([MmapRegion.memfd(0, 64 << 20)])
places = {"desc": 0x10000, "avail": 0x20000, "used": 0x30000}
hand = HandRing(memory, size=256, event_idx=True, **places)
ring = SplitRing(memory._space, 256, *places.values(), event_idx=True)
ring.latencies, ring.origin = Latencies(), 1
image = os.memfd_create("image")
os.ftruncate(image, 16 << 20)
server, call = BlockServer(ImageFile(image, 16 << 20)), os.eventfd(0)
def offer():
    for i in range(count):
        at = 0x100000 + 0x4000 * i
        memory.write(at, struct.pack("<IIQ", 0, 0, 8 * i))
        pieces = Desc(at, 16), Desc(at + 0x1000, 4096, WRITE), Desc(at + 16, 1, WRITE)
        hand.put_chain(3 * i, *pieces)
    hand.offer(*range(0, 3 * count, 3))
"""
STEP = """
tracepoints.want(groups[0])
for _ in range(6):
    offer()
    ring.run_once(server, 64, call, True)
offer()
kill, process, stop = os.kill, os.getpid(), signal.SIGSTOP
ctypes.CDLL(None).ptrace(0, 0, 0, 0)
kill(process, stop)
ring.run_once(server, 64, call, True)
kill(process, stop)
"""
TIME = """
rounds = groups.pop()
now, times = time.perf_counter_ns, {each: [] for each in groups}
os.pwrite(image, os.urandom(16 << 20), 0)
for _ in range(rounds):
    for each in groups:
        tracepoints.want(each)
        for i in range(20):
            offer()
            began = now()
            ring.run_once(server, 64, call, True)
            times[each].append(now() - began)
for each in groups:
    print(sorted(times[each])[len(times[each]) // 100] / count)
"""


def _environment(tree: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": f"{tree / 'src'}:{HERE}",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def times(tree: Path, rounds: int) -> list[float]:
    """Time of a read in ns, for each of GROUPS: of the batches that nothing interrupted."""
    command = [sys.executable, "-c", SETUP + TIME]
    command += map(str, [BATCH, *GROUPS.values(), rounds])
    done = subprocess.run(
        command, env=_environment(tree), check=True, stdout=subprocess.PIPE, text=True
    )
    return [float(line) for line in done.stdout.split()]


def steps(tree: Path, clock: Path, groups: int, count: int) -> int:
    """Instructions of a batch of so many reads, and of what is around it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    environment = _environment(tree) | {"LD_PRELOAD": str(clock)}
    command = [sys.executable, "-c", SETUP + STEP, str(count), str(groups)]
    with subprocess.Popen(command, env=environment) as process:
        try:
            found = -1
            while True:
                _, status = os.waitpid(process.pid, 0)
                if not os.WIFSTOPPED(status):
                    raise SystemExit(f"it ended: {os.waitstatus_to_exitcode(status)}")
                if os.WSTOPSIG(status) == signal.SIGSTOP and found >= 0:
                    return found
                found += 1
                libc.ptrace(SINGLE_STEP, process.pid, None, None)
        finally:
            process.kill()


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(
        prog="bench/steps.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--against", type=Path, help="another checkout, with its core built")
    parser.add_argument("--only", default="", help="only what has this in its name")
    parser.add_argument("--times", type=int, metavar="N", help="time them, in N rounds")
    arguments = parser.parse_args()
    if arguments.times is not None:
        found = times(HERE, arguments.times)
        for what, ns in zip(GROUPS, found, strict=True):
            print(f"{what:36} {ns:9,.0f} ns {ns / found[0]:.3f}", flush=True)
        return
    trees = [HERE] if arguments.against is None else [HERE, arguments.against.resolve()]
    with tempfile.TemporaryDirectory() as name:
        # Time passes more slowly, as each instruction takes a thousand times longer.
        clock = Path(name, "clock.so")
        source = Path(__file__).with_name("slow_clock.c")
        compiler = shlex.split(os.environ.get("CC", "cc"))
        subprocess.run(
            [*compiler, "-O2", "-fPIC", "-shared", "-o", str(clock), str(source)], check=True
        )
        for what, groups in GROUPS.items():
            if arguments.only in what:
                counts = [
                    (steps(tree, clock, groups, MANY) - steps(tree, clock, groups, FEW))
                    / (MANY - FEW)
                    for tree in trees
                ]
                shown = " ".join(f"{count:9,.0f}" for count in counts)
                print(f"{what:36} {shown}", flush=True)


if __name__ == "__main__":
    main()
