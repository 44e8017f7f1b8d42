"""A real back-end in a thread, front-ends by hand, and what they must not leave behind."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import socket
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from guestio._core.base.syscalls import close_aside
from guestio._core.virtio.chain import Chain
from guestio.addr import Permissions
from guestio.errors import DeviceError
from guestio.memory import AtomicBitmap, Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user import Backend, Frontend
from guestio.vhost_user.frontend import PROTOCOL_FEATURES
from guestio.vhost_user.messages import Inflight, ProtocolFeature
from guestio.virtio.device import Device, DeviceId
from guestio.virtio.layout import RingLayout
from tests.kit.rings import PAGE, WRITE, Desc, HandRing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

    from guestio.vhost_user.frontend import FrontendQueue

WAIT = 30.0
SERVED_WITHIN = 1.0
"""Seconds within which a front-end is served, whatever the one before it did."""
SLACK = 3.0
"""How much longer than promised things may take here: the machine may be busy."""
PRESSURE = [Path("/proc/pressure/cpu"), Path("/proc/pressure/io")]
VERSION_1, EVENT_IDX, INDIRECT, PLATFORM = 1 << 32, 1 << 29, 1 << 28, 1 << 33

DESC, AVAIL, USED = 0x10000, 0x20000, 0x30000
BUFFERS = 0x40000
QUEUE_STEP = 0x1000
IOVA = 0x7000_0000
"""Where guest memory is in I/O virtual addresses, if a :class:`Driver` uses them."""

OK, FAILED = 0x55, 0xEE


def until(condition: Callable[[], Any], what: str = "") -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, what or "it did not come about"
        time.sleep(0.002)


def stalled() -> float:
    """Seconds since the boot in which a thread waited for a processor or a disk; 0 if not known."""
    found = 0
    for path in PRESSURE:
        with contextlib.suppress(OSError):
            found += int(path.read_text().partition("total=")[2].split()[0])
    return found / 1e6


@contextlib.contextmanager
def lasting(least: float, most: float) -> Iterator[None]:
    """Check how many seconds something takes; those that the machine is overloaded are extra."""
    started, before = time.monotonic(), stalled()
    yield
    took, waited = time.monotonic() - started, stalled() - before
    assert least <= took < most + waited, f"{took:.2f} s, {waited:.2f} s of them overloaded"


def promptly(seconds: float) -> contextlib.AbstractContextManager[None]:
    """Check that something takes hardly longer than promised."""
    return lasting(0.0, seconds * SLACK)


def footprint() -> tuple[frozenset[str], int, int]:
    """Open fds, mapped files and threads of this process, those that close descriptors included."""
    fds = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            fds.append(f"{fd.name} {fd.readlink()}")
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if line.split()[4] != "0"
    ]
    return (
        frozenset(entry for entry in fds if "/proc/" not in entry),
        len(mapped),
        threading.active_count() + close_aside([], 0, 1),
    )


def left_since(before: tuple[frozenset[str], int, int]) -> bool:
    """Whether there is anything that was not there before.

    What belonged to an earlier front-end may have been still there, and gone meanwhile.
    """
    fds, mapped, threads = footprint()
    return not fds <= before[0] or mapped > before[1] or threads > before[2]


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Check that no fd, mapping or thread is left, without help of the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        before = footprint()
        yield
        until(lambda: not left_since(before), f"left behind: {before} {footprint()}")
    finally:
        gc.enable()


class Serving:
    """A back-end in a thread.

    Args:
        device: What it serves.
        path: Its socket, or where that is.
        options: More arguments for the back-end. Unless they say otherwise, indirect tables are
            offered even behind an IOMMU.
    """

    def __init__(self, device: Device, path: Path | socket.socket, **options: Any) -> None:
        self.backend = Backend(device, path, **{"indirect": "on", **options})
        self.path = Path(self.backend.path)
        self.stats = self.backend.statistics
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="serving")

    def _run(self) -> None:
        try:
            self.backend.serve()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.stop()
        self._thread.join(WAIT)
        assert not self._thread.is_alive(), "the back-end does not stop"
        self.backend.close()
        assert self.error is None, self.error

    @property
    def alive(self) -> bool:
        """Whether it still serves."""
        return self._thread.is_alive()

    def connect(self) -> socket.socket:
        """A bare connection."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.connect(str(self.path))
        made.settimeout(WAIT)
        return made

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the back-end's thread from doing anything."""
        holds, go = threading.Event(), threading.Event()

        def hold() -> None:
            holds.set()
            go.wait(WAIT)

        self.backend._loop.call_soon_threadsafe(hold)
        assert holds.wait(WAIT)
        try:
            yield
        finally:
            go.set()

    def let_go(self) -> None:
        """Wait until the back-end has done away with a front-end that left."""
        until(lambda: self.backend._connection is None or not self.alive, "the back-end holds on")

    def check_serves(self) -> None:
        """Have one honest front-end served, in time and to the end."""
        with promptly(SERVED_WITHIN), Driver(self.path) as driver:
            assert driver.run(0, b"honest") == (OK, b"tsenoh")
        self.let_go()


class Mirror(Device):
    """Writes what it reads in reverse, and a status after it.

    Requests that begin with a word in capitals do something else; see the methods.
    """

    device_id = DeviceId.ENTROPY

    def __init__(self, queues: int = 2) -> None:
        self.num_queues = queues
        self.features = 0b101
        self.seen: list[tuple[int, bytes]] = []
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.space = bytes(range(64))
        self.resets = 0
        self.negotiated_features: list[int] = []
        self.fail_error: Exception | None = None
        self.error: Exception | None = None

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        source = chain.readable.read()
        self.seen.append((queue, source))
        if source.startswith(b"RAISE"):
            assert self.error is not None
            raise self.error
        if source.startswith(b"RETURN"):
            return eval(source[6:])
        if source.startswith(b"WAIT"):
            self.entered.set()
            assert self.go_on.wait(WAIT)
        if not chain.writable.total:
            return 0
        chain.writable.write(source[::-1][: chain.writable.total - 1])
        chain.writable.write(bytes([OK]), chain.writable.total - 1)
        return chain.writable.total

    def fail(self, queue: int, chain: Chain) -> int:
        if self.fail_error is not None:
            raise self.fail_error
        if chain.tail is not None:
            chain.tail.write(bytes([FAILED]))
        return 0

    def config(self) -> bytes:
        return self.space

    def write_config(self, offset: int, data: bytes) -> None:
        if offset + len(data) > len(self.space):
            raise DeviceError("there is no such byte")
        self.space = self.space[:offset] + data + self.space[offset + len(data) :]

    def negotiated(self, features: int) -> None:
        self.negotiated_features.append(features)

    def reset(self) -> None:
        self.resets += 1


class Later(Mirror):
    """Answers requests that begin with LATE when it is told to.

    Attributes:
        begun: Those that wait for it: what they say, their memory and what was promised for it.
    """

    def __init__(self, queues: int = 2) -> None:
        super().__init__(queues)
        self.begun: dict[bytes, tuple[Chain, Future[int]]] = {}

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        source = chain.readable.read()
        if source.startswith(b"LATE"):
            promised: Future[int] = Future()
            self.begun[source] = chain, promised
            return promised
        if source.startswith(b"FINISH"):
            self.finish(source[6:])
        return super().process(queue, chain)

    def expect(self, *sources: bytes) -> None:
        """Wait until requests have begun."""
        until(lambda: set(sources) <= set(self.begun), f"{sources} did not begin")

    def finish(self, source: bytes) -> None:
        """Answer a request, in the calling thread."""
        chain, promised = self.begun.pop(source)
        chain.writable.write(source[::-1] + bytes([OK]))
        promised.set_result(len(source) + 1)

    def give_up(self) -> None:
        """Fail what is not answered, so that no stop waits for it."""
        while self.begun:
            self.begun.popitem()[1][1].cancel()

    def promised(self, source: bytes) -> Future[int]:
        """Take a request over that the test answers itself."""
        return self.begun.pop(source)[1]


class Shifted:
    """Memory at I/O virtual addresses that are the physical ones and a constant."""

    def __init__(self, memory: GuestRegionCollection) -> None:
        self.memory = memory

    def read(self, addr: int, length: int) -> bytes:
        return self.memory.read(addr - IOVA, length)

    def write(self, addr: int, data: bytes) -> None:
        self.memory.write(addr - IOVA, data)


class Driver:
    """A front-end and rings by hand, two descriptors of its own for every request in flight.

    Args:
        target: The back-end's socket.
        queues: How many to start.
        size: Entries of each.
        iommu: Whether there is one; everything is mapped then, unless told otherwise.
        map_all: False to have nothing mapped but the rings.
        features: Virtio features beside VERSION_1.
        tracked: Whether memory has a bitmap of what the driver writes.
        queue_options: More arguments for starting queues.
        inflight: Whether to have the requests in flight noted; or where that was done already, as
            from :attr:`region`, which stays the caller's then.
        frontend: More arguments for the front-end.
    """

    SIZE = 0x200000

    def __init__(
        self,
        target: Path | socket.socket,
        *,
        queues: int = 1,
        size: int = 64,
        iommu: bool = False,
        map_all: bool = True,
        features: int = 0,
        tracked: bool = False,
        queue_options: dict[str, Any] | None = None,
        inflight: bool | tuple[Inflight, int] = False,
        **frontend: Any,
    ) -> None:
        frontend.setdefault("timeout", WAIT)
        self.frontend = Frontend(target, **frontend)
        self.iommu = iommu
        self.size = size
        self.handles: dict[int, FrontendQueue] = {}
        self.rings: dict[int, HandRing] = {}
        self.region: tuple[Inflight, int] | None = None
        self._keep_region = not isinstance(inflight, bool)
        self._options = queue_options or {}
        self._wanted = VERSION_1 | features | (PLATFORM if iommu else 0)
        self._protocol = PROTOCOL_FEATURES | (ProtocolFeature.INFLIGHT_SHMFD if inflight else 0)
        try:
            self.backing = Backing.memfd(self.SIZE)
            written = AtomicBitmap(self.SIZE) if tracked else None
            self.memory = GuestRegionCollection.from_regions(
                [MmapRegion(0, self.backing, bitmap=written)]
            )
            self.frontend.negotiate(self._wanted, self._protocol)
            self.features = self.frontend.features
            self.frontend.set_memory(self.memory)
            if map_all:
                self.map_memory()
            if isinstance(inflight, tuple):
                self.region = inflight
                self.frontend.set_inflight(*inflight)
            elif inflight:
                self.region = self.frontend.get_inflight(max(queues, 1), size)
            for index in range(queues):
                self.add_queue(index)
        except BaseException:
            self.close()
            raise

    def reconnect(self, target: Path, base: int = 0, **frontend: Any) -> None:
        """Go on with another back-end: the same memory, rings and notes of what is in flight."""
        self.frontend.close()
        self.frontend = Frontend(target, timeout=WAIT, connect_wait=WAIT, **frontend)
        self.frontend.negotiate(self._wanted, self._protocol)
        self.frontend.set_memory(self.memory)
        self.map_memory()
        if self.region is not None:
            self.frontend.set_inflight(*self.region)
        for index in self.rings:
            self.start(index, base)

    def map_memory(self) -> None:
        """Let the device reach all memory, if there is an IOMMU."""
        if self.iommu:
            self.frontend.iotlb.map(IOVA, 0, self.SIZE, Permissions.READ_WRITE)

    def close(self) -> None:
        self.frontend.close()
        if self.region is not None and not self._keep_region:
            os.close(self.region[1])
        self.region = None
        self.handles.clear()
        self.rings.clear()
        self.frontend.iotlb.memory = None
        self.__dict__.pop("memory", None)
        backing = self.__dict__.pop("backing", None)
        if backing is not None:
            # A test may still look at the ring; the memory goes with the last who does.
            with contextlib.suppress(BufferError):
                backing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def at(self, gpa: int) -> int:
        """The address of guest memory for the device."""
        return gpa + IOVA if self.iommu else gpa

    def layout(self, index: int) -> RingLayout:
        """Where a queue's ring is, for the device."""
        step = QUEUE_STEP * index
        return RingLayout(
            self.size, self.at(DESC + step), self.at(AVAIL + step), self.at(USED + step)
        )

    def add_queue(self, index: int) -> None:
        """Make an empty ring and start it."""
        layout = self.layout(index)
        for at, length in ((DESC, 16), (AVAIL, 2), (USED, 8)):
            self.memory.write(at + QUEUE_STEP * index, bytes(length * self.size + 6))
        if self.iommu:
            for at in (layout.desc, layout.avail, layout.used):
                self.frontend.iotlb.map(at, at - IOVA, PAGE, Permissions.READ_WRITE)
        self.rings[index] = HandRing(
            Shifted(self.memory) if self.iommu else self.memory,
            size=self.size,
            desc=layout.desc,
            avail=layout.avail,
            used=layout.used,
            event_idx=bool(self.features & EVENT_IDX),
        )
        self.start(index)

    def start(self, index: int, base: int = 0, **options: Any) -> None:
        """Start a ring where it stopped."""
        self.handles[index] = self.frontend.start_queue(
            index, self.layout(index), base=base, **(self._options | options)
        )

    def stop(self, index: int) -> int:
        """Stop a ring; where it stopped."""
        self.handles.pop(index)
        return self.frontend.stop_queue(index)

    def buffer(self, index: int, number: int) -> int:
        """Two pages for a request: the first is read, the second is written."""
        return BUFFERS + (index * 64 + number % 32) * 2 * PAGE

    def prepare(self, index: int, source: bytes, reply: int | None = None) -> int:
        """Put a request into the ring without announcing it; its number."""
        ring = self.rings[index]
        number = ring.offered
        place = self.buffer(index, number)
        room = (len(source) if reply is None else reply) + 1
        self.memory.write(place, source)
        self.memory.write(place + PAGE, bytes(room))
        ring.offer(
            ring.put_chain(
                2 * number % self.size,
                Desc(self.at(place), len(source)),
                Desc(self.at(place + PAGE), room, WRITE),
            )
        )
        return number

    def submit(self, index: int, source: bytes, reply: int | None = None) -> int:
        """Begin a request; its number."""
        number = self.prepare(index, source, reply)
        self.handles[index].kick()
        return number

    def done(self, index: int, number: int) -> bool:
        """Whether so many requests are finished."""
        return (self.rings[index].used_idx - number - 1) & 0xFFFF < 0x8000

    def wait(self, index: int, number: int) -> None:
        """Wait until a request and those before it are finished."""
        until(lambda: self.done(index, number), f"request {number} of queue {index} hangs")

    def result(self, index: int, number: int, length: int) -> tuple[int, bytes]:
        """Status and answer of a finished request."""
        place = self.buffer(index, number) + PAGE
        return self.memory.read(place + length, 1)[0], self.memory.read(place, length)

    def run(self, index: int, source: bytes) -> tuple[int, bytes]:
        """Run one request; its status and answer."""
        number = self.submit(index, source)
        self.wait(index, number)
        return self.result(index, number, len(source))

    def run_raw(self, index: int, *descriptors: Desc) -> tuple[int, int]:
        """Run a request of any descriptors; its used entry."""
        ring = self.rings[index]
        number = ring.offered
        ring.offer(ring.put_chain(0, *descriptors))
        self.handles[index].kick()
        self.wait(index, number)
        return ring.used_entry(number)


class Load:
    """Keeps a queue busy, checks every answer, and that each comes once.

    Args:
        driver: Whose queue.
        index: Which one.
        seed: Of the choices made.

    Attributes:
        offered: Requests begun so far.
        done: Those of them that were answered.
        failed: Those of these that the device could not serve.
        pending: What the others say, by their heads.
    """

    SLOTS = 32

    def __init__(self, driver: Driver, index: int, seed: int = 0) -> None:
        self.driver, self.index = driver, index
        self.done = self.failed = 0
        self._rng = random.Random(seed)
        self.offered = 0
        self._seen = driver.rings[index].used_idx
        self._free = list(range(self.SLOTS))
        self.pending: dict[int, bytes] = {}

    def place(self, slot: int) -> int:
        """Two pages of a slot: what is read, and what is written."""
        return BUFFERS + (self.index * 64 + slot) * 2 * PAGE

    def submit(self, count: int, word: bytes = b"") -> None:
        """Begin requests, as many as there is room for."""
        driver, ring = self.driver, self.driver.rings[self.index]
        for _ in range(min(count, len(self._free))):
            slot = self._free.pop(self._rng.randrange(len(self._free)))
            source = word + b"%d.%d" % (self.index, self.offered) * self._rng.randint(1, 9)
            self.offered += 1
            place = self.place(slot)
            driver.memory.write(place, source)
            driver.memory.write(place + PAGE, bytes(len(source) + 1))
            self.pending[2 * slot] = source
            ring.offer(
                ring.put_chain(
                    2 * slot,
                    Desc(driver.at(place), len(source)),
                    Desc(driver.at(place + PAGE), len(source) + 1, WRITE),
                )
            )
        driver.handles[self.index].kick()

    def reap(self) -> None:
        """Look at what was answered."""
        ring = self.driver.rings[self.index]
        while self._seen != ring.used_idx:
            head, written = ring.used_entry(self._seen)
            source = self.pending.pop(head)
            self._seen = (self._seen + 1) & 0xFFFF
            self._free.append(head // 2)
            self.done += 1
            answer = self.driver.memory.read(self.place(head // 2) + PAGE, len(source) + 1)
            if answer[-1] == FAILED or (source.startswith(b"RAISE") and not any(answer)):
                self.failed += 1
            else:
                assert (written, answer) == (len(source) + 1, source[::-1] + bytes([OK]))

    def finish(self) -> None:
        """Wait until everything is answered."""

        def idle() -> bool:
            self.reap()
            return not self.pending

        until(idle, f"{len(self.pending)} requests of queue {self.index} hang")


def errors_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as an error."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as a warning."""
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def memfd(size: int) -> int:
    """A file to share, with some bytes in it."""
    fd = os.memfd_create("hostile")
    os.ftruncate(fd, size)
    return fd
