"""Frames between a driver's rings and a tap: `guestio net`, and a C program that only moves them.

The driver's rings are filled and emptied by C code in this process, which takes the place of a
guest; the host's side of the tap is flooded by it, or drops what comes. `guestio net` runs in a
process of its own. The C program makes the same system calls, one for each frame, and touches no
ring. Both are measured in turn, in CPU time for each frame (user and system, softirqs that their
calls cause included) and in frames a second. Needs root and gcc.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guestio.addr import Permissions
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user import Frontend
from guestio.virtio.layout import RingLayout
from guestio.virtio.net import TapPort
from guestio.virtio.net.features import Net

TAP = "guestio-bench"
SIZE = 256
STRIDE = 2048
RINGS, BUFFERS = 0, 1 << 20
MEMORY = 4 << 20
TICK = os.sysconf("SC_CLK_TCK")
PEER = b"\x02\0\0\0\0\1"
MAC = b"\x52\x54\0\x12\x34\x56"


class Ring(ctypes.Structure):
    """As ``struct ring`` of net.c."""

    _fields_ = (
        ("desc", ctypes.c_void_p),
        ("avail", ctypes.c_void_p),
        ("used", ctypes.c_void_p),
        ("size", ctypes.c_uint32),
        ("kick", ctypes.c_int),
        ("buffers", ctypes.c_uint64),
        ("stride", ctypes.c_uint64),
        ("added", ctypes.c_uint16),
        ("seen", ctypes.c_uint16),
    )


def build(directory: Path) -> Any:
    """Compile net.c and load it."""
    made = directory / "net.so"
    source = Path(__file__).with_name("net.c")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", made, source], check=True)
    library = ctypes.CDLL(str(made))
    for name in ("ring_run", "flood", "plain_send", "plain_receive"):
        getattr(library, name).restype = ctypes.c_uint64
    return library


class Guest:
    """Shared memory with a receive and a transmit ring, served by a back-end."""

    def __init__(self, library: Any, path: Path, length: int, iommu: bool) -> None:
        self.frontend = Frontend(path, timeout=10)
        self.library = library
        backing = Backing.memfd(MEMORY)
        region = MmapRegion(0, backing)
        self.memory = GuestRegionCollection.from_regions([region])
        features = 1 << 32 | Net.MRG_RXBUF | (1 << 33 if iommu else 0)
        self.frontend.negotiate(int(features))
        self.frontend.set_memory(self.memory)
        if iommu:
            self.frontend.iotlb.map(0, 0, MEMORY, Permissions.READ_WRITE)
        self._view = memoryview(region.slice())
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self._view))
        self.rings = []
        for index in (0, 1):
            layout = RingLayout.contiguous(RINGS + 0x10000 * index, SIZE)
            handle = self.frontend.start_queue(index, layout)
            ring = Ring(
                *(self.base + at for at in (layout.desc, layout.avail, layout.used)),
                size=SIZE,
                kick=handle.kick_fd,
                buffers=BUFFERS + index * SIZE * STRIDE,
                stride=STRIDE,
            )
            self.rings.append(ring)
        self._view[BUFFERS + SIZE * STRIDE + 12 :][:12] = PEER + MAC
        for i in range(SIZE):
            at = BUFFERS + (SIZE + i) * STRIDE
            self._view[at : at + 26] = bytes(12) + PEER + MAC + b"\x88\xb5"
        library.ring_fill(ctypes.byref(self.rings[0]), STRIDE, 1)
        self.length = length

    def send(self, seconds: float) -> int:
        ring = ctypes.byref(self.rings[1])
        if not self.rings[1].added:
            self.library.ring_fill(ring, 12 + self.length, 0)
        return int(self.library.ring_run(ring, ctypes.c_double(seconds), ctypes.c_uint64(1 << 62)))

    def receive(self, seconds: float) -> int:
        ring = ctypes.byref(self.rings[0])
        return int(self.library.ring_run(ring, ctypes.c_double(seconds), ctypes.c_uint64(1 << 62)))


def cpu_of(pid: int) -> float:
    """Seconds of CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def prepare_tap() -> None:
    Path(f"/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6").write_text("1")
    subprocess.run(["ip", "link", "set", TAP, "arp", "off", "txqueuelen", "1000", "up"], check=True)


class Flood:
    """Frames into the host's side of the tap, from a process of its own."""

    def __init__(self, library: Any, length: int, seconds: float) -> None:
        self._pid = os.fork()
        if self._pid:
            return
        try:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
                sender.bind((TAP, 0))
                frame = (MAC + PEER + b"\x88\xb5").ljust(length, b"x")
                library.flood(sender.fileno(), frame, len(frame), ctypes.c_double(seconds))
        finally:
            os._exit(0)

    def wait(self) -> None:
        os.waitpid(self._pid, 0)


def measure(run: Callable[[], int], pid: int | None) -> tuple[float, float]:
    """Frames a second, and microseconds of CPU time for each."""
    began, cpu = time.monotonic(), cpu_of(pid) if pid else time.thread_time()
    frames = run()
    used = (cpu_of(pid) if pid else time.thread_time()) - cpu
    return frames / (time.monotonic() - began), used / max(frames, 1) * 1e6


def run_guestio(
    library: Any, directory: Path, length: int, seconds: float, *, iommu: bool
) -> dict[str, tuple[float, float]]:
    path, log = directory / "net.sock", directory / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "guestio", "net", "--tap", TAP, "--socket", path],
            stderr=stderr,
        )
    try:
        while f"listening on {path}" not in log.read_text():
            time.sleep(0.05)
        prepare_tap()
        guest = Guest(library, path, length, iommu)
        found = {"send": measure(lambda: guest.send(seconds), process.pid)}
        flood = Flood(library, length, seconds + 0.2)
        found["receive"] = measure(lambda: guest.receive(seconds), process.pid)
        flood.wait()
        guest.frontend.close()
    finally:
        process.terminate()
        process.wait()
    return found


def run_plain(library: Any, length: int, seconds: float) -> dict[str, tuple[float, float]]:
    tap = TapPort(TAP)
    prepare_tap()
    memory = ctypes.create_string_buffer(2 * SIZE * STRIDE)
    for i in range(SIZE):
        ctypes.memmove(ctypes.byref(memory, i * STRIDE + 12), PEER + MAC + b"\x88\xb5", 14)
    arguments = (tap.descriptor(0), memory, SIZE, ctypes.c_uint64(STRIDE), ctypes.c_size_t(length))
    limit = ctypes.c_uint64(1 << 62)
    duration = ctypes.c_double(seconds)
    found = {"send": measure(lambda: int(library.plain_send(*arguments, duration, limit)), None)}
    flood = Flood(library, length, seconds + 0.2)
    found["receive"] = measure(lambda: int(library.plain_receive(*arguments, duration)), None)
    flood.wait()
    tap.close()
    return found


def main() -> None:
    """Measure in turn and print medians."""
    parser = argparse.ArgumentParser(prog="./run bench net", description=__doc__)
    parser.add_argument("--size", type=int, default=1500, help="bytes of a frame (1500)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (2)")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    options = parser.parse_args()
    rows: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        library = build(Path(name))
        for _ in range(options.rounds):
            for who, found in (
                ("C program", run_plain(library, options.size, options.seconds)),
                (
                    "guestio net",
                    run_guestio(library, Path(name), options.size, options.seconds, iommu=False),
                ),
                (
                    "guestio net, static IOMMU",
                    run_guestio(library, Path(name), options.size, options.seconds, iommu=True),
                ),
            ):
                for way, measured in found.items():
                    rows.setdefault((way, who), []).append(measured)
    print(f"{'':34} {'frames/s':>10} {'us CPU':>8} {'of C frames':>12} {'of C CPU':>9}")
    for (way, who), figures in sorted(rows.items()):
        pairs = list(zip(figures, rows[way, "C program"], strict=True))
        rate, cpu = (statistics.median(f[i] for f in figures) for i in (0, 1))
        rates = statistics.median(ours[0] / plain[0] for ours, plain in pairs)
        cpus = statistics.median(plain[1] / ours[1] for ours, plain in pairs)
        print(f"{way + ', ' + who:34} {rate:10,.0f} {cpu:8.2f} {rates:12.2f} {cpus:9.2f}")


if __name__ == "__main__":
    main()
