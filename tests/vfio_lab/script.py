"""One sequence of kernel calls and device accesses, for the real kernel and for the simulated one.

A step is a tuple of plain values, its result a string; a *bench* carries steps out. The host runs
the script on the simulation, the lab guest on the kernel, and the results must be the same.

Steps:
    ("map", iova, size, memory, offset, writable)       by address
    ("map_file", iova, size, memory, offset, writable)  by descriptor; iommufd only
    ("unmap", iova, size)
    ("read", iova)             a device reads: which page of which memory it saw
    ("write", iova)            a device writes: where that arrived
    ("memory_space", on)       at the device whose BAR is the memory "bar"
    ("room",)                  entries left
    ("target_map", ...), ("target_unmap", ...)          as map and unmap, through the DMA target
"""

import errno
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

from guestio import Backing, MmapRegion
from guestio.dma import DmaError, DmaMapRequest, MappingType

PAGE = 0x1000
TOP = 1 << 64
MSI = 0xFEE00000
LIMIT = 1 << 48
SCRATCH = 0x7F000000
BAR_SIZE = 1 << 20
ENTRIES = 6
LOCKED_PAGES = 8
# The kernel picks no address this low by itself; one where memory merely was may be reused
# by the time it is used.
UNMAPPED = 0x8000

Step: TypeAlias = tuple[object, ...]


class Bench(ABC):
    """Carries steps out on some kernel; the parts that are the same for all.

    Args:
        kernel: A DMA target with the kernel's calls.
        bar: A device's memory.
    """

    def __init__(self, kernel: Any, bar: Backing) -> None:
        self.kernel = kernel
        self.bar_answers = True
        self.memories = {
            "ram": Backing.memfd(16 * PAGE, "ram"),
            "anon": Backing.anonymous(8 * PAGE),
            "bar": bar,
        }
        writable = Backing.memfd(4 * PAGE, "read-only")
        self.memories["read_only"] = Backing.from_fd(_fd(writable), 4 * PAGE, writable=False)
        self._writable = writable
        short = Backing.memfd(4 * PAGE, "short")
        self.memories["short"] = short
        for name, memory in [*self.memories.items(), ("read_only", writable)]:
            if memory.writable:
                view = MmapRegion(0, memory).slice()
                for page in range(memory.size // PAGE):
                    view.write(page * PAGE, _token(name, page))
                del view
        _truncate(short, 2 * PAGE)
        self.read_only_fd = _reopen(writable)
        self._pipe = os.pipe()
        self._number = 0
        self._scratch = Backing.memfd(PAGE, "scratch")
        self.scratch = MmapRegion(0, self._scratch).slice()
        kernel.kernel_map(SCRATCH, PAGE, self._scratch.host_address, True)

    def address(self, name: str, offset: int) -> int:
        """Where a byte of a memory is; of ``unmapped``, where no memory is."""
        if name == "unmapped":
            return UNMAPPED + offset
        return self.memories[name.removesuffix("_fd")].host_address + offset

    def fd(self, name: str) -> int:
        """A descriptor of a memory; of ``pipe`` and ``closed``, one that holds none."""
        if name == "closed":
            return 1000
        if name == "read_only_fd":
            return self.read_only_fd
        if name == "pipe":
            return self._pipe[0]
        return _fd(self.memories[name])

    def run(self, steps: list[Step]) -> list[str]:
        """Carry steps out; a result for each."""
        return [self.step(step) for step in steps]

    def step(self, step: Step) -> str:
        """Carry one step out."""
        kind, *arguments = step
        method: Callable[..., str] = getattr(self, f"do_{kind}")
        try:
            return method(*arguments)
        except (OSError, DmaError) as error:
            return errno.errorcode.get(error.errno or 0, str(error))

    def do_map(self, iova: int, size: int, memory: str, offset: int, writable: bool) -> str:
        self.kernel.kernel_map(iova, size, self.address(memory, offset), writable)
        return "ok"

    def do_map_file(self, iova: int, size: int, memory: str, offset: int, writable: bool) -> str:
        if memory == "bar":
            exported = self.kernel.kernel_export(
                self.fd("bar"), self.offset_in_file("bar") + offset, size
            )
            try:
                self.kernel.kernel_map_file(iova, size, exported, 0, writable)
            finally:
                os.close(exported)
        else:
            self.kernel.kernel_map_file(iova, size, self.fd(memory), offset, writable)
        return "ok"

    def do_unmap(self, iova: int, size: int) -> str:
        return f"ok {self.kernel.kernel_unmap(iova, size):#x}"

    def do_room(self) -> str:
        return str(self.kernel.info().available)

    def do_target_map(self, iova: int, size: int, memory: str, offset: int, writable: bool) -> str:
        by_address = memory in {"anon", "unmapped"}
        request = DmaMapRequest(
            start=iova,
            size=size,
            host_address=self.address(memory, offset),
            fd=None if by_address else self.fd(memory),
            file_offset=0 if by_address else self.offset_in_file(memory) + offset,
            writable=writable,
            kind=MappingType.DEVICE if memory == "bar" else MappingType.RAM,
        )
        self.kernel.map_dma(request)
        return "ok"

    def do_target_unmap(self, iova: int, size: int) -> str:
        self.kernel.unmap_dma(iova, size)
        return "ok"

    def do_read(self, iova: int) -> str:
        data = self.device_read(iova, 16)
        name, _, page = data.rstrip(b"\0").decode(errors="replace").partition(" ")
        return f"{name} {page}" if name in self.memories else "nothing"

    def do_write(self, iova: int) -> str:
        self._number += 1
        mark = f"mark {self._number:011d}".encode()
        # Beyond the token, which later reads look for.
        self.device_write(iova + 64, mark)
        for name, memory in self.memories.items():
            # What is cut off, or switched off, cannot be looked at.
            limit = 2 * PAGE if name == "short" else memory.size
            if name == "bar" and not self.bar_answers:
                continue
            view = MmapRegion(0, memory).slice()
            for page in range(limit // PAGE):
                if view.read(page * PAGE + 64, 16) == mark:
                    return f"{name} {page}"
        return "nowhere"

    def offset_in_file(self, name: str) -> int:
        """Where a memory begins in its file."""
        return self.memories[name.removesuffix("_fd")].file_offset or 0

    def do_memory_space(self, on: bool) -> str:
        self.set_memory_space(on)
        self.bar_answers = on
        return "ok"

    @abstractmethod
    def set_memory_space(self, on: bool) -> None:
        """Switch the device with the BAR off or on."""

    @abstractmethod
    def device_read(self, iova: int, length: int) -> bytes:
        """A device reads; zeros where that faults."""

    @abstractmethod
    def device_write(self, iova: int, data: bytes) -> None:
        """A device writes; without effect where that faults."""


def plain_steps(interface: str) -> list[Step]:
    """Most of the rules, then a random part."""
    steps: list[Step] = [("room",)]
    # What cannot be mapped at all.
    for iova, size, memory, offset in (
        (1, PAGE, "ram", 0),
        (0x800, PAGE, "ram", 0),
        (0, 1, "ram", 0),
        (0, PAGE + 1, "ram", 0),
        (0, 0, "ram", 0),
        (0, PAGE, "ram", 0x800),
        (0, PAGE, "ram", 1),
        (MSI, PAGE, "ram", 0),
        (MSI - PAGE, 2 * PAGE, "ram", 0),
        (MSI + 0xFF000, 2 * PAGE, "ram", 0),
        (LIMIT, PAGE, "ram", 0),
        (LIMIT - PAGE, 2 * PAGE, "ram", 0),
        (TOP - PAGE, PAGE, "ram", 0),
        (TOP - PAGE, 2 * PAGE, "ram", 0),
        (TOP - 1, PAGE, "ram", 0),
        (0, PAGE, "unmapped", 0),
        (0, PAGE, "read_only", 0),
        (0, 4 * PAGE, "short", 0),
        (PAGE, 2 * PAGE, "short", PAGE),
    ):
        steps.append(("map", iova, size, memory, offset, True))
    # Edges that can.
    for iova in (MSI - PAGE, MSI + 0x100000, LIMIT - PAGE):
        steps += [("map", iova, PAGE, "ram", 0, True), ("unmap", iova, PAGE)]
    # What overlaps: identical, head, tail, inner, around; what only touches.
    steps.append(("map", 0x10000, 4 * PAGE, "ram", 0, True))
    for iova, size in (
        (0x10000, 4 * PAGE),
        (0xF000, 2 * PAGE),
        (0x13000, 2 * PAGE),
        (0x11000, PAGE),
        (0xF000, 6 * PAGE),
        (0x10000, PAGE),
        (0xF000, PAGE),
        (0x14000, PAGE),
    ):
        steps.append(("map", iova, size, "ram", 4 * PAGE, False))
    # What cuts, what is a hole, what covers several.
    for iova, size in (
        (0x11000, PAGE),
        (0x10000, PAGE),
        (0x13000, PAGE),
        (0xE000, 3 * PAGE),
        (0x13000, 2 * PAGE),
        (0x30000, PAGE),
        (0, 0),
        (1, PAGE),
        (0x10000, 1),
        (TOP - PAGE, 2 * PAGE),
        (TOP - PAGE, PAGE),
        (0xF000, 3 * PAGE),
        (0xF000, PAGE),
        (0xE000, 8 * PAGE),
        (0xE000, 8 * PAGE),
    ):
        steps.append(("unmap", iova, size))
    steps += [
        ("map", 0x20000, 4 * PAGE, "ram", 0, True),
        ("map", 0x26000, 2 * PAGE, "ram", 8 * PAGE, True),
        ("map", 0x29000, 4 * PAGE, "ram", 12 * PAGE, True),
        ("unmap", 0x20000, 10 * PAGE),
        ("unmap", 0x20000, 9 * PAGE),
        ("unmap", 0x20000, 13 * PAGE),
        ("unmap", 0x20000, 13 * PAGE),
    ]
    # What devices reach.
    steps += [
        ("map", 0x40000, 4 * PAGE, "ram", 2 * PAGE, True),
        ("map", 0x44000, 2 * PAGE, "anon", PAGE, True),
        ("map", 0x48000, 2 * PAGE, "ram", 10 * PAGE, False),
        ("map", 0x4C000, 4 * PAGE, "read_only", 0, False),
        ("map", 0x50000, 2 * PAGE, "short", 0, True),
        ("room",),
    ]
    for iova in (0x40000, 0x43000, 0x44000, 0x48000, 0x4D000, 0x51000, 0x3F000, 0x46000):
        steps += [("read", iova), ("write", iova)]
    steps += [
        ("unmap", 0x44000, 2 * PAGE),
        ("read", 0x44000),
        ("write", 0x45000),
        ("map", 0x44000, PAGE, "ram", 0, True),
        ("read", 0x44000),
        ("unmap", 0x40000, 0x14000),
        ("read", 0x40000),
    ]
    steps += bar_steps(interface)
    if interface == "iommufd":
        steps += file_steps()
    steps += target_steps()
    steps += random_steps(150)
    return steps


def bar_steps(interface: str) -> list[Step]:
    """Another device's memory."""
    by = "map" if interface == "type1" else "map_file"
    return [
        ("map", 0x200000, BAR_SIZE, "bar", 0, True),
        *([("unmap", 0x200000, BAR_SIZE)] if interface == "type1" else []),
        (by, 0x300000, 4 * PAGE, "bar", 2 * PAGE, True),
        (by, 0x302000, PAGE, "bar", 0, True),
        ("read", 0x301000),
        ("write", 0x301000),
        ("unmap", 0x301000, PAGE),
        (by, 0x310000, PAGE, "bar", 9 * PAGE, False),
        ("read", 0x310000),
        ("write", 0x310000),
        ("memory_space", False),
        ("write", 0x301000),
        ("map_file", 0x320000, PAGE, "bar", 0, True) if interface == "iommufd" else ("room",),
        ("memory_space", True),
        ("write", 0x302000),
        ("read", 0x310000),
        (by, 0x300000, PAGE, "bar", 0, True),
        ("unmap", 0x300000, 4 * PAGE),
        (by, 0x300000, 4 * PAGE, "bar", 4 * PAGE, True),
        ("write", 0x300000),
        ("read", 0x303000),
        ("unmap", 0x300000, 0x20000),
        ("write", 0x300000),
    ]


def file_steps() -> list[Step]:
    """Memory by its descriptor."""
    steps: list[Step] = [
        ("map_file", 0x400000, 4 * PAGE, "ram", 4 * PAGE, True),
        ("read", 0x401000),
        ("write", 0x402000),
        ("unmap", 0x400000, 4 * PAGE),
        ("map_file", 0x400000, 2 * PAGE, "read_only", 0, True),
        ("write", 0x400000),
        ("unmap", 0x400000, 2 * PAGE),
        ("map_file", 0x400000, 2 * PAGE, "read_only_fd", 0, True),
        ("write", 0x400000),
        ("unmap", 0x400000, 2 * PAGE),
        ("map_file", 0x400000, 2 * PAGE, "ram", 0, False),
        ("write", 0x400000),
        ("unmap", 0x400000, 2 * PAGE),
    ]
    for iova, size, memory, offset in (
        (0x400000, PAGE, "ram", 16 * PAGE),
        (0x400000, 2 * PAGE, "ram", 15 * PAGE),
        (0x400000, PAGE, "ram", 1),
        (0x400001, PAGE, "ram", 0),
        (0x400000, PAGE + 1, "ram", 0),
        (0x400000, 0, "ram", 0),
        (0x400000, 4 * PAGE, "short", 0),
        (0x400000, PAGE, "pipe", 0),
        (0x400000, PAGE, "closed", 0),
        (MSI, PAGE, "ram", 0),
        (LIMIT, PAGE, "ram", 0),
        (TOP - PAGE, PAGE, "ram", 0),
        (0x400000, PAGE, "bar", BAR_SIZE),
        (0x400000, PAGE, "bar", 0x800),
    ):
        steps.append(("map_file", iova, size, memory, offset, True))
    return steps


def target_steps() -> list[Step]:
    """What the DMA target makes of it: checks before the call, choices, fallbacks."""
    steps: list[Step] = []
    for iova, size, memory, offset, writable in (
        (0x500000, 2 * PAGE, "ram", PAGE, True),
        (0x502000, 2 * PAGE, "anon", 0, True),
        (0x504000, PAGE, "bar", 5 * PAGE, True),
        (0x506000, PAGE, "read_only", 0, False),
        (0x500000, PAGE, "ram", 0, True),
        (0x508001, PAGE, "ram", 0, True),
        (0x508000, PAGE, "ram", 0x800, True),
        (MSI, PAGE, "ram", 0, True),
        (LIMIT, PAGE, "ram", 0, True),
        (TOP - PAGE, PAGE, "ram", 0, True),
        (0x508000, PAGE, "unmapped", 0, True),
    ):
        steps.append(("target_map", iova, size, memory, offset, writable))
    steps += [
        ("read", 0x501000),
        ("read", 0x502000),
        ("read", 0x504000),
        ("write", 0x504000),
        ("write", 0x506000),
        ("target_unmap", 0x500000, PAGE),
        ("target_unmap", 0x500000, 2 * PAGE),
        ("target_unmap", 0x502000, 2 * PAGE),
        ("target_unmap", 0x504000, PAGE),
        ("target_unmap", 0x506000, PAGE),
        ("target_unmap", 0x500000, 2 * PAGE),
    ]
    return steps


def random_steps(count: int) -> list[Step]:
    """Maps and unmaps in a small space, so that they often meet, and an access now and then."""
    dice = random.Random(20250521)
    steps: list[Step] = []
    for number in range(count):
        iova, size = 0x600000 + dice.randrange(24) * PAGE, dice.randrange(1, 6) * PAGE
        if dice.random() < 0.55:
            offset = dice.randrange(16 - size // PAGE + 1) * PAGE
            steps.append(("map", iova, size, "ram", offset, dice.random() < 0.7))
        else:
            steps.append(("unmap", iova, size))
        if number % 15 == 14:
            steps.append((dice.choice(["read", "write"]), iova))
    return steps


def entry_steps() -> list[Step]:
    """A container with room for few mappings; one is taken already."""
    steps: list[Step] = [("room",)]
    for number in range(ENTRIES):
        steps.append(("map", 0x100000 + number * PAGE, PAGE, "ram", 0, True))
    steps += [
        ("room",),
        ("map", 0x100000, PAGE, "ram", 0, True),
        ("map", MSI, PAGE, "ram", 0, True),
        ("target_map", 0x110000, PAGE, "ram", 0, True),
        ("unmap", 0x100000, 2 * PAGE),
        ("room",),
        ("map", 0x100000, 2 * PAGE, "ram", 0, True),
        ("map", 0x110000, PAGE, "ram", 0, True),
        ("map", 0x111000, PAGE, "ram", 0, True),
    ]
    return steps


def locked_steps() -> list[Step]:
    """A process that may lock few pages; one is taken already."""
    return [
        ("map", 0x100000, LOCKED_PAGES * PAGE, "ram", 0, True),
        ("map", 0x100000, (LOCKED_PAGES - 1) * PAGE, "ram", 0, True),
        ("map", 0x110000, PAGE, "anon", 0, True),
        ("target_map", 0x110000, PAGE, "anon", 0, True),
        ("map", 0x120000, PAGE, "bar", 0, True),
        ("unmap", 0x100000, (LOCKED_PAGES - 1) * PAGE),
        ("map", 0x110000, 4 * PAGE, "anon", 0, True),
        # The same memory counts again.
        ("map", 0x114000, 3 * PAGE, "anon", 0, True),
        ("map", 0x118000, PAGE, "anon", 0, True),
    ]


def script(interface: str) -> dict[str, list[Step]]:
    """All phases; each runs on a new container or address space."""
    phases = {"plain": plain_steps(interface), "locked": locked_steps()}
    if interface == "type1":
        phases = {"plain": phases["plain"], "entries": entry_steps(), "locked": phases["locked"]}
    return phases


def _token(name: str, page: int) -> bytes:
    return f"{name} {page}".encode().ljust(16, b"\0")


def _fd(memory: Backing) -> int:
    assert memory.fd is not None
    return memory.fd


def _truncate(memory: Backing, size: int) -> None:
    os.ftruncate(_fd(memory), size)


def _reopen(memory: Backing) -> int:
    return os.open(f"/proc/self/fd/{_fd(memory)}", os.O_RDONLY | os.O_CLOEXEC)
