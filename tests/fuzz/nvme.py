"""Registers, doorbells, queues and commands of an NVMe controller, by a driver that does anything.

Whatever it does, the controller writes only to pages that are mapped for writing at that moment,
and what is in pages that it may not read never reaches the image; nothing in it raises; and
afterwards it can be enabled again and reads its image.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import struct
import time
from collections.abc import Callable
from typing import Final

from guestio.addr import Permissions
from guestio.errors import InvalidAddressError
from guestio.pci import PciHost
from guestio.pci.nvme import NvmeController
from guestio.vfio_user.memory import DmaSpace
from guestio.vfio_user.messages import RefusalError
from guestio.virtio.loop import EventLoop
from guestio.virtio.statistics import RateLimitedLog
from tests.fuzz.choices import Choices
from tests.kit.nvme_driver import ACQ, AQA, ASQ, CC, CSTS, DOORBELLS, ENABLE, FATAL, INTMS, READY
from tests.kit.serving import WAIT

PAGE: Final = 4096
PAGES: Final = 32
BASE: Final = 0x10_0000_0000
LOW: Final = PAGES - 4
"""Pages from there on are the last ones of the address space."""
IMAGE: Final = 1 << 16
QUEUES: Final = 3
SECRET: Final = b"not to be read: "
STEPS: Final = 60
READABLE, WRITABLE, UNMAPPED, REMOTE = 8, 9, 10, 11

ADMIN: Final = (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 0x7C)
IO: Final = (0, 1, 2, 2, 1, 5, 8, 9, 12)


def address_of(page: int) -> int:
    return BASE + page * PAGE if page < LOW else 2**64 - (PAGES - page) * PAGE


class _Trouble(RateLimitedLog):
    """Notes what is worth a traceback: a mistake of the controller's."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def report(self, message: str, *args: object, trace: bool | BaseException = False) -> None:
        if trace:
            self.seen.append(message % args)


@functools.cache
def parts() -> tuple[int, NvmeController, EventLoop, PciHost, int]:
    """An image and a controller of it, for all runs, and the driver's memory."""
    image = os.memfd_create("image")
    os.ftruncate(image, IMAGE)
    device = NvmeController(f"/proc/self/fd/{image}", queues=QUEUES, io_threads=0)
    loop = EventLoop()
    host = PciHost(device, loop)
    device.attached(host)
    memory = os.memfd_create("driver")
    os.ftruncate(memory, PAGES * PAGE)
    return image, device, loop, host, memory


class Remote:
    """The run's memory, for a controller that asks for each access."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def begin(self, addr: int, length: int) -> RemotePiece:
        return RemotePiece(self.run, addr, length)

    def end(self, reason: str, addr: int = 0, length: int = 1 << 64) -> None:
        """Do nothing: each access is one request."""


@dataclasses.dataclass
class RemotePiece:
    """An access to it."""

    run: Run
    addr: int
    length: int
    ended: str = ""

    def read(self) -> bytearray:
        return self.run.read_remote(self.addr, self.length)

    def write(self, data: memoryview) -> None:
        self.run.write_remote(self.addr, data)

    def close(self) -> None:
        """Do nothing: it holds nothing."""


class Run:
    """A driver of a controller that was reset.

    Args:
        choose: What decides.
    """

    def __init__(self, choose: Choices) -> None:
        self.choose = choose
        self.image, self.device, self.loop, self.host, self.fd = parts()
        self.trouble = _Trouble()
        self.host.log = self.trouble
        self.failures = self.host.failures
        os.pwrite(self.image, bytes(range(256)) * (IMAGE // 256), 0)
        os.pwrite(self.fd, SECRET * (PAGES * PAGE // len(SECRET)), 0)
        self.dma = DmaSpace()
        # What is allowed in each page, and whether the controller maps it.
        self.pages: dict[int, tuple[int, bool]] = {}
        self.written: set[int] = set()
        self.known = os.pread(self.fd, PAGES * PAGE, 0)
        self.tails = [0] * (QUEUES + 1)
        self.sizes = [0] * (QUEUES + 1)
        self.depth = 0
        self.host.connect(self.dma.space, Remote(self))
        self.host.write_config(4, b"\6\0")
        for page in range(16):
            # Among the pages of data are one of each other kind from the beginning on.
            if page != UNMAPPED:
                self.map(page, {READABLE: 1, WRITABLE: 2}.get(page, 3), shared=page != REMOTE)

    # Memory, and the client that is asked where it is not shared.

    def map(self, page: int, perm: int, *, shared: bool = True) -> None:
        """Map a page; one that the controller may read says nothing secret then."""
        if page in self.pages:
            return
        if perm & 1:
            self.put(page * PAGE, bytes(PAGE))
        try:
            if self.dma.map(
                address_of(page),
                PAGE,
                Permissions(perm),
                self.fd if shared else None,
                page * PAGE if shared else 0,
            ):
                self.host.connect(self.dma.space, Remote(self))
        except RefusalError:
            assert not perm, "a page that is not mapped is refused"
            return
        self.pages[page] = perm, shared
        if perm & 2:
            self.written.add(page)

    def unmap(self, page: int) -> None:
        """Unmap a page, from which on it does not change, and is secret."""
        if page in self.pages:
            assert self.dma.unmap(address_of(page), PAGE).finish() == 1
            assert not self.dma.in_use(address_of(page), PAGE), "a lease that nothing ends"
            del self.pages[page]
            self.check_memory()
            self.put(page * PAGE, SECRET * (PAGE // len(SECRET)))

    def put(self, at: int, data: bytes) -> None:
        """Write memory as the driver."""
        data = data[: PAGES * PAGE - at]
        os.pwrite(self.fd, data, at)
        self.known = self.known[:at] + data + self.known[at + len(data) :]

    def check_memory(self) -> None:
        """No page was written that could not be, and nothing secret is where it can be seen."""
        now = os.pread(self.fd, PAGES * PAGE, 0)
        for page in range(PAGES):
            part = now[page * PAGE : (page + 1) * PAGE]
            if page not in self.written:
                assert part == self.known[page * PAGE : (page + 1) * PAGE], f"page {page} changed"
            if self.pages.get(page, (0, False))[0] & 1:
                assert SECRET not in part, f"page {page} has what could not be read"
        assert SECRET not in os.pread(self.image, IMAGE, 0), "the image has what could not be read"
        self.known = now
        self.written = {page for page, (perm, _) in self.pages.items() if perm & 2}

    def _asked(self, addr: int, length: int, access: int) -> list[tuple[int, int]]:
        """Do something else before the client answers, and find what it is asked for."""
        if self.depth < 2 and self.choose.randrange(3) == 0:
            self.depth += 1
            self.choose.choice((self.step_mapping, self.step_doorbell, self.step_register))()
            self.depth -= 1
        found = []
        while length:
            page = (addr - BASE) // PAGE if addr < 2**63 else PAGES - (2**64 - addr - 1) // PAGE - 1
            if not self.pages.get(page, (0, False))[0] & access:
                raise InvalidAddressError(addr, length, Permissions(access), "the client refuses")
            here = min(length, PAGE - addr % PAGE)
            found.append((page * PAGE + addr % PAGE, here))
            addr, length = addr + here, length - here
        return found

    def read_remote(self, addr: int, length: int) -> bytearray:
        return bytearray().join(os.pread(self.fd, n, at) for at, n in self._asked(addr, length, 1))

    def write_remote(self, addr: int, data: memoryview) -> None:
        for at, size in self._asked(addr, len(data), 2):
            os.pwrite(self.fd, data[:size], at)
            data = data[size:]

    # Steps.

    def number(self) -> int:
        return self.choose.choice((0, 0, 1, 1, 2, 7, 15, 16, 127, 128, 0xFFFF, 1 << 25, 2**32 - 1))

    def address(self) -> int:
        page = self.choose.randrange(PAGES)
        kind = self.choose.randrange(8)
        if kind < 4:
            return address_of(page)
        if kind < 7:
            return address_of(page) + self.choose.choice((4, 8, 16, 512, 2048, 4080, 4088, 4092))
        return self.choose.choice((0, 1, PAGE, 2**63, 2**64 - 1, 2**64 - 4, 2**64 - PAGE, BASE - 4))

    def step_mapping(self) -> None:
        page = self.choose.randrange(PAGES)
        if page in self.pages:
            self.unmap(page)
        else:
            self.map(page, self.choose.choice((3, 3, 1, 2)), shared=self.choose.randrange(3) > 0)

    def step_doorbell(self) -> None:
        queue, head = self.choose.randrange(QUEUES + 2), self.choose.randrange(2)
        value = self.choose.choice((0, 1, 2, 3, 7, 8, 63, 1023, 0xFFFF, 2**32 - 1))
        self.store(DOORBELLS + 8 * queue + 4 * head, value, 4)

    def step_register(self) -> None:
        what = self.choose.randrange(8)
        if what == 0:
            self.store(CC, 0, 4)
        elif what == 1:
            self.enable()
        elif what == 2:
            self.store(CC, ENABLE | self.choose.choice((0, 1 << 14, 2 << 14, 3 << 14, 1 << 7)), 4)
        elif what == 3:
            self.host.write_config(4, self.choose.choice((b"\2\0", b"\6\0", b"\6\0", b"\6\4")))
        elif what == 4:
            self.host.reset()
        else:
            offset = self.choose.choice((0, 8, INTMS, INTMS + 4, CC, CSTS, 32, AQA, ASQ, ACQ))
            offset += self.choose.choice((0, 0, 0, 4, 0xFF8, 0x1FF0))
            size = self.choose.choice((4, 4, 8, 2, 1))
            if what == 5:
                self.host.read_bar(0, offset, size)
            else:
                self.store(offset, self.choose.getrandbits(32) & self.number(), size)

    def step_list(self) -> None:
        """PRPs or SGL descriptors, which may lead to themselves."""
        page, count = 4 + self.choose.randrange(8), 1 + self.choose.randrange(32)
        if self.choose.randrange(2):
            # At the end of the page as well: a list that goes on does so there.
            entries = [self.address() for _ in range(count)]
            place = self.choose.choice((0, PAGE - 8 * count))
            self.put(page * PAGE + place, struct.pack(f"<{count}Q", *entries))
            return
        data = b""
        for _ in range(count):
            kind = self.choose.choice((0, 0, 0, 0, 0x10, 0x20, 0x30, 0x30, 0x41))
            size = self.choose.choice((0, 1, 16, 32, 512, 512, 1024, PAGE, 2**32 - 1))
            data += struct.pack("<QI3xB", self.address(), size, kind)
        self.put(page * PAGE, data)

    def step_command(self) -> None:
        queue = self.choose.randrange(QUEUES + 1)
        size = self.sizes[queue] or 8
        for _ in range(1 + self.choose.randrange(3)):
            entry = self.admin() if queue == 0 else self.io()
            # Queue n is in page n, if the driver has made it as it should.
            self.put(queue * PAGE + 64 * self.tails[queue], entry)
            self.tails[queue] = (self.tails[queue] + 1) % size
        self.store(DOORBELLS + 8 * queue, self.tails[queue], 4)
        if self.choose.randrange(4):
            # As far as the driver can know: what it has submitted is completed, most often.
            self.settle()
            self.store(DOORBELLS + 8 * queue + 4, self.tails[queue], 4)

    def entry(self, opcode: int, pointer: bytes, words: list[int]) -> bytes:
        nsid = self.choose.choice((1, 1, 1, 0, 2, 2**32 - 1))
        flags = self.choose.choice((0, 0, 0, 0x40, 0x40, 0x80, 1, 0xC0))
        head = struct.pack("<BBHII", opcode, flags, self.choose.getrandbits(16), nsid, 0)
        return head + bytes(12) + pointer + struct.pack("<6I", *words)

    def admin(self) -> bytes:
        choose = self.choose
        opcode = choose.choice(ADMIN) if choose.randrange(16) else choose.getrandbits(8)
        words = [self.number() for _ in range(6)]
        queue = choose.randrange(QUEUES + 2)
        pointer = struct.pack("<QQ", self.address(), self.address())
        if opcode in (1, 5) and choose.randrange(8):
            # A queue that can be: it is in page n, its completions n + 16 behind it.
            size = choose.choice((2, 3, 8, 64))
            words[0] = (size - 1) << 16 | queue
            page = queue if opcode == 1 else 12 + queue
            words[1] = queue << 16 | 1 if opcode == 1 else queue << 16 | 3
            pointer = struct.pack("<QQ", address_of(page), 0)
            if opcode == 1 and queue <= QUEUES:
                self.sizes[queue], self.tails[queue] = size, 0
        elif opcode in (0, 4, 8):
            words[0] = choose.getrandbits(4) << 16 | queue
        elif opcode in (2, 6, 9, 10):
            words[0] = choose.randrange(16) | choose.choice((0, 15, 1023, 0x8000)) << 16
        return self.entry(opcode, pointer, words)

    def io(self) -> bytes:
        choose = self.choose
        if choose.randrange(2):
            # A read or write with nothing wrong but, perhaps, what is mapped.
            blocks = choose.choice((1, 8, 16, 48, 127))
            pages = [address_of(4 + choose.randrange(8)) for _ in range(2)]
            head = struct.pack("<BBHII", 1 + choose.randrange(2), 0, choose.getrandbits(16), 1, 0)
            place = choose.choice((0, 0, 512, 4092))
            pointer = struct.pack("<QQ", pages[0] + place, pages[1])
            return head + bytes(12) + pointer + struct.pack("<6I", 0, 0, blocks - 1, 0, 0, 0)
        opcode = choose.choice(IO) if choose.randrange(16) else choose.getrandbits(8)
        words = [self.number() for _ in range(6)]
        if choose.randrange(8):
            words[0], words[1] = choose.choice((0, 1, 120, 127, 128)), 0
            words[2] = choose.choice((0, 0, 7, 15, 40, 127)) | choose.choice((0, 0, 1 << 30))
        if choose.randrange(3):
            pointer = struct.pack("<QQ", self.address(), self.address())
        else:
            kind, size = choose.choice((0, 0x20, 0x30)), choose.choice((16, 64, 512, PAGE, 8192))
            pointer = struct.pack("<QI3xB", self.address(), size, kind)
        return self.entry(opcode, pointer, words)

    def store(self, offset: int, value: int, size: int) -> None:
        if offset + size <= 2 * PAGE:
            data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            self.host.write_bar(0, offset, data)

    def enable(self) -> None:
        """Enable the controller, with its admin queues in pages 0 and 12."""
        self.tails[0], self.sizes[0] = 0, 8
        self.store(CC, 0, 4)
        self.store(AQA, 7 << 16 | 7, 4)
        self.store(ASQ, address_of(0), 8)
        self.store(ACQ, address_of(12), 8)
        self.store(CC, ENABLE, 4)

    def settle(self, until: Callable[[], object] = lambda: True) -> None:
        """Run the loop until there is nothing to do, and no thread does anything."""
        deadline = time.monotonic() + WAIT
        while self.loop.busy or self.loop.pending or self.device._io.busy or not until():
            assert time.monotonic() < deadline, "there is always something to do"
            self.loop.run_once(0.02)

    def begin(self) -> None:
        """Enable the controller and make its queues, as a driver does: the way to all else."""
        self.enable()
        self.settle()
        entries = b""
        for queue in range(1, QUEUES + 1):
            size = self.sizes[queue] = self.choose.choice((2, 3, 8, 8, 64))
            for opcode, page, how in ((5, 12 + queue, 3), (1, queue, queue << 16 | 1)):
                words = [(size - 1) << 16 | queue, how, 0, 0, 0, 0]
                head = struct.pack("<BBHII", opcode, 0, queue, 0, 0)
                entries += head + bytes(12) + struct.pack("<QQ6I", address_of(page), 0, *words)
        self.put(0, entries)
        self.tails[0] = 2 * QUEUES
        self.store(DOORBELLS, self.tails[0], 4)
        self.settle()

    def run(self) -> None:
        if self.choose.randrange(8):
            self.begin()
        steps = (
            *(self.step_command,) * 5,
            *(self.step_mapping, self.step_doorbell, self.step_register),
            *(self.step_list,) * 2,
        )
        for _ in range(STEPS):
            if not self.choose.left:
                break
            self.choose.choice(steps)()
            if self.choose.randrange(4) > 0:
                self.settle()
                self.check_memory()
        self.settle()
        self.check_memory()

    def end(self) -> None:
        """Whatever was done, the next life of the controller is as good as its first."""
        self.host.reset()
        self.settle()
        self.host.write_config(4, b"\6\0")
        self.depth = 2
        self.dma.unmap(0, 1 << 64).finish()
        self.pages.clear()
        for page in range(16):
            self.map(page, 3)
        self.put(0, bytes(16 * PAGE))
        self.enable()
        self.settle(lambda: self.status & READY)
        read = bytes(12) + struct.pack("<QQ6I", address_of(5), 0, 0, 0, 0, 0, 0, 0)
        queue = [
            struct.pack("<BBHII", 5, 0, 1, 0, 0)
            + bytes(12)
            + struct.pack("<QQ6I", address_of(13), 0, 7 << 16 | 1, 1, 0, 0, 0, 0),
            struct.pack("<BBHII", 1, 0, 2, 0, 0)
            + bytes(12)
            + struct.pack("<QQ6I", address_of(1), 0, 7 << 16 | 1, 1 << 16 | 1, 0, 0, 0, 0),
        ]
        self.put(0, b"".join(queue))
        self.store(DOORBELLS, 2, 4)
        self.settle(lambda: self.completion(12, 1))
        assert (self.completion(12, 0), self.completion(12, 1)) == (1, 1)
        self.put(PAGE, struct.pack("<BBHII", 2, 0, 3, 1, 0) + read)
        self.store(DOORBELLS + 8, 1, 4)
        self.settle(lambda: self.completion(13, 0))
        assert self.completion(13, 0) == 1
        assert os.pread(self.fd, 512, 5 * PAGE) == os.pread(self.image, 512, 0)
        assert not self.status & FATAL
        assert not self.trouble.seen, self.trouble.seen
        assert self.host.failures == self.failures

    @property
    def status(self) -> int:
        return int.from_bytes(self.host.read_bar(0, CSTS, 4), "little")

    def completion(self, page: int, place: int) -> int:
        """Status and phase of an entry of a completion queue."""
        return int.from_bytes(os.pread(self.fd, 2, page * PAGE + 16 * place + 14), "little")

    def close(self) -> None:
        self.host.disconnect()
        self.settle()
        self.dma.close()


def fuzz(data: bytes) -> None:
    """A driver's life, and the next one's beginning."""
    run = Run(Choices(data))
    try:
        run.run()
        run.end()
    finally:
        run.close()
