"""A driver of an NVMe controller without a VM: registers and queues by hand, which may be wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from guestio._core.iommu.address_space import AddressSpace
from guestio.addr import ADDRESS_SPACE, Permissions
from guestio.pci import PciHost
from guestio.pci.interrupts import InterruptKind
from guestio.pci.nvme import NvmeController
from guestio.vfio_user.memory import DmaSpace
from guestio.virtio.loop import EventLoop
from tests.kit.serving import WAIT

PAGE = 4096
BASE = 0x10_0000_0000
"""The first I/O virtual address."""
CAP, VS, INTMS, INTMC, CC, CSTS, AQA, ASQ, ACQ = 0, 8, 12, 16, 20, 28, 36, 40, 48
DOORBELLS = 0x1000
ENABLE = 4 << 20 | 6 << 16 | 1
READY, FATAL = 1, 2
FLUSH, WRITE, READ, COMPARE, ZEROES, DATASET, VERIFY = 0, 1, 2, 5, 8, 9, 12
DNR = 1 << 14


class Completion(NamedTuple):
    """What was posted: dword 0, head and number of the submission queue, identifier, status."""

    result: int
    head: int
    queue: int
    cid: int
    status: int


@dataclass
class Queue:
    """A queue pair as the driver sees it."""

    number: int
    sq: int
    cq: int
    size: int
    cq_size: int
    tail: int = 0
    head: int = 0
    phase: int = 1


class Trigger:
    """Counts a vector's interrupts, whether Python or the core signals it.

    Attributes:
        direct: How many did not go through Python.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._noted = self._direct = 0

    @property
    def direct(self) -> int:
        with contextlib.suppress(BlockingIOError):
            self._direct += os.eventfd_read(self._fd)
        return self._direct

    @property
    def count(self) -> int:
        return self._noted + self.direct

    def fileno(self) -> int:
        return self._fd

    def notify(self) -> None:
        self._noted += 1

    def close(self) -> None:
        """Do nothing: the driver counts on, and connects again with it."""

    def discard(self) -> None:
        os.close(self._fd)


class Remote:
    """The driver's memory, for a device that cannot map it: each access is a request.

    Attributes:
        requests: How many there were.
        meanwhile: Called during the next one, which may do what a client does before it answers.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.requests = 0
        self.meanwhile: Callable[[], object] | None = None

    def _count(self) -> None:
        self.requests += 1
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()

    def begin(self, addr: int, length: int) -> RemotePiece:
        return RemotePiece(self, addr, length)

    def end(self, reason: str, addr: int = 0, length: int = ADDRESS_SPACE) -> None:
        """Do nothing: each access is one request."""

    def read(self, addr: int, length: int) -> bytearray:
        self._count()
        return bytearray(os.pread(self._fd, length, addr - BASE))

    def write(self, addr: int, data: memoryview) -> None:
        self._count()
        os.pwrite(self._fd, data, addr - BASE)


@dataclasses.dataclass
class RemotePiece:
    """An access to it."""

    memory: Remote
    addr: int
    length: int
    ended: str = ""

    def read(self) -> bytearray:
        return self.memory.read(self.addr, self.length)

    def write(self, data: memoryview) -> None:
        self.memory.write(self.addr, data)

    def close(self) -> None:
        """Do nothing: it holds nothing."""


class NvmeDriver:
    """A controller, its host and a driver, in one thread.

    Args:
        device: The controller.
        pages: Of the driver's memory.
        shared: Whether the device maps it.

    Attributes:
        memory: The driver's memory; page n is at ``BASE + n * PAGE``, unless it is unmapped.
    """

    def __init__(self, device: NvmeController, *, pages: int = 2048, shared: bool = True) -> None:
        self.device = device
        self.loop = EventLoop()
        self.host = PciHost(device, self.loop)
        device.attached(self.host)
        self.pages = pages
        self.fd = os.memfd_create("driver")
        os.ftruncate(self.fd, pages * PAGE)
        self.remote = None if shared else Remote(self.fd)
        self.triggers = [Trigger() for _ in range(device.interrupts)]
        self.connect()

    def connect(self) -> None:
        """Be a new client with the same memory, all of it mapped."""
        self.dma = DmaSpace()
        self._free = 0
        self.host.connect(self.dma.space, self.remote)
        self.map(0, self.pages)
        self.host.write_config(4, b"\x06\0")
        for number, trigger in enumerate(self.triggers):
            self.host.interrupts.set_trigger(InterruptKind.MSIX, number, trigger)
        self.queues: dict[int, Queue] = {}
        self._cid = 0

    def disconnect(self) -> None:
        self.host.disconnect()
        self.dma.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()
        self.device.close()
        self.loop.close()
        os.close(self.fd)
        for trigger in self.triggers:
            trigger.discard()

    # Memory.

    def map(self, page: int, count: int = 1, perm: Permissions = Permissions.READ_WRITE) -> None:
        fd = self.fd if self.remote is None else None
        if self.dma.map(BASE + page * PAGE, count * PAGE, perm, fd, page * PAGE):
            self.host.connect(self.dma.space, self.remote)

    def map_each(self, page: int, count: int) -> None:
        """Map pages one by one, in another order than they are in memory, as a vIOMMU would."""
        self.unmap(page, count)
        for place in range(count):
            self.dma.map(
                BASE + (page + place) * PAGE,
                PAGE,
                Permissions.READ_WRITE,
                self.fd,
                (page + count - 1 - place) * PAGE,
            )

    def unmap(self, page: int, count: int = 1) -> None:
        """Unmap pages; whatever was mapped with them is unmapped, too, and mapped again."""
        whole = [(at, end) for at, end in ((0, page), (page + count, self.pages)) if at < end]
        self.dma.unmap(0, 1 << 64).finish()
        for at, end in whole:
            self.map(at, end - at)

    @property
    def space(self) -> AddressSpace:
        return self.dma.space

    def take(self, count: int = 1) -> int:
        """The address of pages that nothing else uses."""
        at, self._free = self._free, self._free + count
        assert self._free <= self.pages, "the driver has no more memory"
        return BASE + at * PAGE

    def put(self, address: int, data: bytes) -> None:
        if self.remote is None:
            self.host.memory.write(address, data)
        else:
            os.pwrite(self.fd, data, address - BASE)

    def get(self, address: int, length: int) -> bytes:
        if self.remote is None:
            return self.host.memory.read(address, length)
        return os.pread(self.fd, length, address - BASE)

    # Registers.

    def read(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.host.read_bar(0, offset, size), "little")

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.host.write_bar(0, offset, value.to_bytes(size, "little"))

    @property
    def status(self) -> int:
        return self.read(CSTS)

    def run(self, until: Callable[[], object], what: str = "it") -> None:
        """Run the loop until something is so."""
        deadline = time.monotonic() + WAIT
        while not until():
            assert time.monotonic() < deadline, f"{what} did not happen; CSTS {self.status:#x}"
            self.loop.run_once(0.01)

    def settle(self) -> None:
        """Run the loop until it has nothing to do at once."""
        for _ in range(8):
            self.loop.run_once(0)

    def enable(self, entries: int = 32, cq_entries: int | None = None, cc: int = ENABLE) -> Self:
        cq_entries = cq_entries or entries
        sq, cq = self.take((entries * 64 + PAGE - 1) // PAGE), self.take()
        self.put(cq, bytes(cq_entries * 16))
        self.write(AQA, cq_entries - 1 << 16 | entries - 1)
        self.write(ASQ, sq, 8)
        self.write(ACQ, cq, 8)
        self.queues = {0: Queue(0, sq, cq, entries, cq_entries)}
        self.write(CC, cc)
        return self

    def ready(self) -> Self:
        self.run(lambda: self.status & READY, "ready")
        return self

    def disable(self) -> None:
        self.write(CC, 0)
        self.run(lambda: not self.status & READY, "not ready")

    # Commands.

    def command(
        self,
        opcode: int,
        *,
        nsid: int = 0,
        flags: int = 0,
        prp1: int = 0,
        prp2: int = 0,
        sgl: bytes | None = None,
        cid: int | None = None,
        **words: int,
    ) -> bytes:
        """An entry; dwords 10 to 15 as ``w10`` and so on."""
        if cid is None:
            self._cid = (self._cid + 1) % 0xFFFF
            cid = self._cid
        pointer = struct.pack("<QQ", prp1, prp2) if sgl is None else sgl
        rest = [words.get(f"w{number}", 0) for number in range(10, 16)]
        head = struct.pack("<BBHII", opcode, flags, cid, nsid, 0)
        return head + bytes(12) + pointer + struct.pack("<6I", *rest)

    def submit(self, queue: int, *entries: bytes, ring: bool = True) -> None:
        pair = self.queues[queue]
        for entry in entries:
            assert len(entry) == 64
            self.put(pair.sq + 64 * pair.tail, entry)
            pair.tail = (pair.tail + 1) % pair.size
        if ring:
            self.ring(queue)

    def ring(self, queue: int) -> None:
        self.write(DOORBELLS + 8 * queue, self.queues[queue].tail)

    def next(self, queue: int, *, consume: bool = True) -> Completion | None:
        """The next completion, if there is one."""
        pair = self.queues[queue]
        words = struct.unpack("<4I", self.get(pair.cq + 16 * pair.head, 16))
        if words[3] >> 16 & 1 != pair.phase:
            return None
        pair.head += 1
        if pair.head == pair.cq_size:
            pair.head, pair.phase = 0, pair.phase ^ 1
        if consume:
            self.consume(queue)
        return Completion(
            words[0], words[2] & 0xFFFF, words[2] >> 16, words[3] & 0xFFFF, words[3] >> 17
        )

    def consume(self, queue: int) -> None:
        self.write(DOORBELLS + 8 * queue + 4, self.queues[queue].head)

    def wait(self, queue: int) -> Completion:
        found: list[Completion] = []

        def look() -> bool:
            one = self.next(queue)
            if one is not None:
                found.append(one)
            return bool(found)

        self.run(look, f"a completion in queue {queue}")
        return found[0]

    def do(self, queue: int, opcode: int, **what: Any) -> Completion:
        """Submit a command and wait for its completion."""
        entry = self.command(opcode, **what)
        self.submit(queue, entry)
        done = self.wait(queue)
        assert done.cid == int.from_bytes(entry[2:4], "little")
        assert done.queue == queue
        return done

    def good(self, queue: int, opcode: int, **what: Any) -> Completion:
        done = self.do(queue, opcode, **what)
        assert done.status == 0, f"status {done.status:#x}"
        return done

    def create(
        self, number: int, entries: int = 64, vector: int = 0, cq_entries: int | None = None
    ) -> Queue:
        """Make an I/O queue pair."""
        cq_entries = cq_entries or entries
        sq, cq = (
            self.take((entries * 64 + PAGE - 1) // PAGE),
            self.take((cq_entries * 16 + PAGE - 1) // PAGE),
        )
        self.put(cq, bytes(cq_entries * 16))
        self.good(0, 5, prp1=cq, w10=cq_entries - 1 << 16 | number, w11=vector << 16 | 3)
        self.good(0, 1, prp1=sq, w10=entries - 1 << 16 | number, w11=number << 16 | 1)
        self.queues[number] = Queue(number, sq, cq, entries, cq_entries)
        return self.queues[number]

    def identify(self, kind: int, nsid: int = 0) -> bytes:
        page = self.take()
        self.good(0, 6, nsid=nsid, prp1=page, w10=kind)
        return self.get(page, PAGE)

    def log(self, number: int, length: int, **what: int) -> bytes:
        page = self.take()
        words = length // 4 - 1
        self.good(0, 2, prp1=page, w10=words << 16 | number, **what)
        return self.get(page, length)

    def prps(self, pages: Sequence[int], offset: int = 0) -> dict[str, int]:
        """``prp1`` and ``prp2`` for pages at these addresses."""
        first, rest = pages[0] + offset, list(pages[1:])
        if len(rest) <= 1:
            return {"prp1": first, "prp2": rest[0] if rest else 0}
        lists = [self.take() for _ in range(len(rest) // 511 + 1)]
        for place, page in enumerate(lists):
            part, rest = (rest, []) if len(rest) <= 512 else (rest[:511], rest[511:])
            if rest:
                part = [*part, lists[place + 1]]
            self.put(page, struct.pack(f"<{len(part)}Q", *part))
            if not rest:
                break
        return {"prp1": first, "prp2": lists[0]}


def move(nsid: int, block: int, count: int, **what: Any) -> dict[str, Any]:
    """The dwords of a command for ``count`` blocks from ``block`` on."""
    more = what.pop("w12", 0)
    return {
        "nsid": nsid,
        "w10": block & 0xFFFFFFFF,
        "w11": block >> 32,
        "w12": more | (count - 1),
        **what,
    }


def image_file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
