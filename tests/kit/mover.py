"""A guest that migrates between two disks' servers while either may die at any message.

What a VMM does is here: it copies memory as the dirty log tells, moves the ring, and goes on where
the guest still is when a server is gone. The guest has requests in flight all the time. It checks
that each is completed once, that memory which only the disk writes keeps what was read, and that
the disk has what was acknowledged.

    ./run killed-migrations         each server dies at every message, before and after it
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self

from guestio.errors import GuestioError
from guestio.memory import AtomicBitmap, Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user import Frontend
from guestio.vhost_user.frontend import PROTOCOL_FEATURES
from guestio.vhost_user.messages import Inflight, ProtocolFeature
from guestio.virtio.layout import RingLayout
from tests.kit.mortal import Mortal, Mortals, When
from tests.kit.rings import PAGE, WRITE, Desc, HandRing
from tests.kit.serving import VERSION_1, WAIT, until

SIZE: Final = 16
LAYOUT: Final = RingLayout(SIZE, 0x1000, 0x2000, 0x3000)
SLOTS: Final = SIZE // 2
BUFFERS: Final = 0x10000
MEMORY: Final = 0x40000
BLOCK: Final = 4096
BLOCKS: Final = 12
HEADER: Final = struct.Struct("<IIQ")
READ, WRITTEN = 0, 1
OK: Final = 0


def contents(block: int, generation: int) -> bytes:
    """What a block has in a generation."""
    return random.Random(block << 20 | generation).randbytes(BLOCK)


def make_image(path: Path) -> None:
    """A disk with the first generation of each block."""
    path.write_bytes(b"".join(contents(block, 0) for block in range(BLOCKS)))


class Memory:
    """The memory of one place, which a guest is in or not."""

    def __init__(self) -> None:
        self.backing = Backing.memfd(MEMORY)
        self.written = AtomicBitmap(MEMORY)
        self.memory = GuestRegionCollection.from_regions(
            [MmapRegion(0, self.backing, bitmap=self.written)]
        )

    def page(self, number: int) -> bytes:
        """A page, without marking anything."""
        assert self.backing.fd is not None
        return os.pread(self.backing.fd, PAGE, number * PAGE)

    def set_page(self, number: int, data: bytes) -> None:
        assert self.backing.fd is not None
        os.pwrite(self.backing.fd, data, number * PAGE)


class Guest:
    """A driver with requests in flight, wherever its memory is."""

    def __init__(self, place: Memory, seed: int) -> None:
        self.place = place
        self._rng = random.Random(seed)
        self.generations = [0] * BLOCKS
        self._flying: dict[int, tuple[int, int, int]] = {}
        self._holds: dict[int, tuple[int, int]] = {}
        self.seen = 0
        self.completed = 0
        self.ring = self._ring()

    def _ring(self) -> HandRing:
        return HandRing(
            self.place.memory, size=SIZE, desc=LAYOUT.desc, avail=LAYOUT.avail, used=LAYOUT.used
        )

    def arrive(self, place: Memory) -> None:
        """Be in another place's memory, which has all that this one had."""
        offered = self.ring.offered
        self.place = place
        self.ring = self._ring()
        self.ring.offered = offered

    def slot(self, number: int) -> int:
        return BUFFERS + 3 * PAGE * number

    def submit(self) -> None:
        """Fill the ring with requests, each of a block that no other one is about."""
        taken = {block for _, block, _ in self._flying.values()}
        for number in range(SLOTS):
            if number in self._flying:
                continue
            block = self._rng.choice([each for each in range(BLOCKS) if each not in taken])
            taken.add(block)
            self.check_held(number)
            self._holds.pop(number, None)
            at = self.slot(number)
            kind = self._rng.choice((READ, READ, WRITTEN))
            generation = self.generations[block] + (kind == WRITTEN)
            header = HEADER.pack(kind, 0, block * BLOCK // 512)
            memory = self.place.memory
            if kind == WRITTEN:
                memory.write(at, header + contents(block, generation))
                chain = Desc(at, HEADER.size + BLOCK), Desc(at + 2 * PAGE, 1, WRITE)
                memory.write(at + 2 * PAGE, b"\xee")
            else:
                memory.write(at, header)
                chain = Desc(at, HEADER.size), Desc(at + PAGE, BLOCK + 1, WRITE)
                memory.write(at + PAGE, b"\xee" * (BLOCK + 1))
            self._flying[number] = kind, block, generation
            self.ring.offer(self.ring.put_chain(2 * number, *chain))

    def reap(self) -> int:
        """Take what was completed, each request once; how many."""
        count = 0
        while self.seen != self.ring.used_idx:
            head, _ = self.ring.used_entry(self.seen)
            self.seen = (self.seen + 1) & 0xFFFF
            number = head // 2
            assert number in self._flying, f"request {number} was completed twice"
            kind, block, generation = self._flying.pop(number)
            at = self.slot(number)
            memory = self.place.memory
            status = memory.read(at + 2 * PAGE, 1)[0]
            assert status == OK, f"request {number} has status {status:#x}"
            if kind == READ:
                # The block may have been written since; then this is the older generation.
                self._holds[number] = block, generation
                self.check_held(number)
            else:
                self.generations[block] = generation
            count += 1
        self.completed += count
        return count

    def check_held(self, number: int) -> None:
        """A slot that only the disk writes has what was read into it, however long ago."""
        if number in self._holds:
            found = self.place.memory.read(self.slot(number) + PAGE, BLOCK)
            assert found == contents(*self._holds[number]), f"slot {number} is stale"

    def work(self, kick: Callable[[], object], requests: int) -> None:
        """Have so many requests completed, with the ring full all the time."""
        goal = self.completed + requests

        def step() -> bool:
            if self.reap():
                self.submit()
            kick()
            return self.completed >= goal

        self.submit()
        kick()
        until(step, "requests hang")

    def finish(self, kick: Callable[[], object], image: Path) -> None:
        """Wait for all requests, and compare all of memory and of the disk."""

        def step() -> bool:
            self.reap()
            kick()
            return not self._flying

        until(step, "requests hang")
        for number in range(SLOTS):
            self.check_held(number)
        data = image.read_bytes()
        for block, generation in enumerate(self.generations):
            found = data[block * BLOCK : (block + 1) * BLOCK]
            assert found == contents(block, generation), f"block {block} is not as acknowledged"


class Link:
    """A VMM's connection to one server.

    Args:
        tracked: Whether requests in flight are noted, for a successor.
    """

    def __init__(self, server: Mortal, *, tracked: bool) -> None:
        self.server = server
        self._tracked = tracked
        self.frontend = Frontend(server.path, timeout=WAIT, connect_wait=WAIT)
        self._queue = None
        try:
            wanted = PROTOCOL_FEATURES
            if tracked:
                wanted |= ProtocolFeature.INFLIGHT_SHMFD
            self.frontend.negotiate(VERSION_1, wanted)
        except BaseException:
            self.close()
            raise

    def start(self, place: Memory, base: int, region: Region) -> None:
        """Have it serve the ring in a place's memory."""
        self.frontend.set_memory(place.memory)
        if self._tracked:
            region.use(self.frontend)
        self._queue = self.frontend.start_queue(0, LAYOUT, base=base)

    def kick(self) -> None:
        """Announce requests.

        Raises:
            ConnectionError: The server is gone.
        """
        poller = select.poll()
        poller.register(self.frontend.fileno(), select.POLLRDHUP)
        if poller.poll(0):
            raise ConnectionError("the server is gone")
        assert self._queue is not None
        self._queue.kick()

    def stop(self) -> int:
        self._queue = None
        return self.frontend.stop_queue(0)

    def close(self) -> None:
        self.frontend.close()
        self.frontend.iotlb.memory = None


class Region:
    """The notes of requests in flight, which outlive servers of one place."""

    def __init__(self) -> None:
        self._region: tuple[Inflight, int] | None = None

    def use(self, frontend: Frontend) -> None:
        """Have a server go on with them; the first one makes them."""
        if self._region is None:
            self._region = frontend.get_inflight(1, SIZE)
        frontend.set_inflight(*self._region)

    def close(self) -> None:
        region, self._region = self._region, None
        if region is not None:
            os.close(region[1])


class Migration:
    """One guest, which is to go from one server to another.

    Args:
        make: Makes a server, "source" or "target"; the first of each may die.
        tracked: Whether requests in flight are noted.
        onwards: Whether to go on at the destination, rather than at the source, if the source dies
            while the guest runs there.

    Attributes:
        deaths: How often a server was found dead.
    """

    def __init__(
        self, make: Callable[[str], Mortal], *, tracked: bool, onwards: bool, seed: int = 1
    ) -> None:
        self._make = make
        self._tracked = tracked
        self._onwards = onwards
        self.deaths = 0
        with contextlib.ExitStack() as undo:
            self._here, self._there = Memory(), Memory()
            self._regions = {"source": Region(), "target": Region()}
            for region in self._regions.values():
                undo.callback(region.close)
            self.guest = Guest(self._here, seed)
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        backings = [self._here.backing, self._there.backing]
        del self._here, self._there, self.guest
        for backing in backings:
            with contextlib.suppress(BufferError):
                backing.close()

    def _link(self, name: str) -> Link:
        return Link(self._make(name), tracked=self._tracked)

    @contextlib.contextmanager
    def _dying(self) -> Iterator[list[bool]]:
        """Notes whether a server was gone inside."""
        died: list[bool] = []
        try:
            yield died
        except (GuestioError, OSError):
            died.append(True)
            self.deaths += 1
            if self.deaths > 3:
                raise

    def _begin(self, name: str, place: Memory) -> Link:
        """Start, or go on after a death: the used index says where, or the notes do."""
        while True:
            with self._dying():
                link = self._link(name)
                try:
                    link.start(place, self.guest.ring.used_idx, self._regions[name])
                except BaseException:
                    link.close()
                    raise
                return link

    def run(self, image: Path) -> None:
        """Have the guest work, migrate, and work."""
        guest = self.guest
        source = self._begin("source", self._here)
        while True:
            with self._dying() as died:
                guest.work(source.kick, 20)
            if not died:
                break
            source.close()
            source = self._begin("source", self._here)
        target: Link | None = None
        while target is None:
            source, target = self._migrate(source)
        while True:
            with self._dying() as died:
                guest.work(target.kick, 40)
                target.kick()
                guest.finish(target.kick, image)
                target.stop()
            target.close()
            if not died:
                break
            target = self._begin("target", self._there)
        source.close()

    def _migrate(self, source: Link) -> tuple[Link, Link | None]:
        """Try to; where the guest is then, and where it has arrived if it has."""
        target = self._try_target()
        if target is None:
            return source, None
        with self._dying() as died:
            log = source.frontend.start_logging()
            self._here.written.reset()
            for page in range(MEMORY // PAGE):
                self._there.set_page(page, self._here.page(page))
            for _ in range(3):
                self.guest.work(source.kick, 10)
                self._copy(log.take().tolist())
            base = source.stop()
            self._copy(log.take().tolist())
        if died:
            if self._onwards:
                # What the log has, and the used ring, which may have been written and not marked.
                self._copy([*self._logged(source), LAYOUT.used // PAGE])
                source.close()
                # They say what was published out of order, and go along (inflight-migration).
                self._regions["target"] = self._regions["source"]
                return source, self._arrive(target, None)
            source.close()
            target.close()
            return self._begin("source", self._here), None
        return self._hand_over(source, target, base)

    @staticmethod
    def _logged(source: Link) -> list[int]:
        log = source.frontend._log
        return [] if log is None else log[0].take().tolist()

    def _try_target(self) -> Link | None:
        """Connect to the destination, before anything is asked of the source."""
        with self._dying():
            return self._link("target")
        return None

    def _copy(self, logged: list[int]) -> None:
        """One pass: what the disk has written, and what the guest has."""
        for page in {*logged, *self._here.written.dirty_pages(clear=True).tolist()}:
            self._there.set_page(page, self._here.page(page))

    def _hand_over(self, source: Link, target: Link, base: int) -> tuple[Link, Link | None]:
        """The guest stands still; it goes on where that works."""
        state = b""
        with self._dying() as died:
            state = source.frontend.save_state()
        if died:
            source.close()
            target.close()
            return self._begin("source", self._here), None
        with self._dying() as died:
            target.frontend.load_state(state)
        if not died:
            return source, self._arrive(target, base)
        # The destination is gone before the guest was there: the source goes on.
        target.close()
        with self._dying() as died:
            source.frontend.stop_logging()
            source.start(self._here, base, self._regions["source"])
        if died:
            source.close()
            source = self._begin("source", self._here)
        return source, None

    def _arrive(self, target: Link, base: int | None) -> Link:
        """Go on at the destination, which has all of memory, whatever dies there."""
        self.guest.arrive(self._there)
        with self._dying() as died:
            if base is None:
                base = self.guest.ring.used_idx
            target.start(self._there, base, self._regions["target"])
        if died:
            target.close()
            target = self._begin("target", self._there)
        return target


CASES: Final = [
    (tracked, name, onwards, when)
    for tracked in (False, True)
    for name, onwards in (("source", False), ("source", True), ("target", False))
    for when in ("before", "unanswered")
]
"""Whether requests are noted, which server dies, whether the guest goes on at the destination then,
and how far it comes with its last message."""


def migrate(
    mortals: Mortals,
    directory: Path,
    *,
    tracked: bool,
    onwards: bool = False,
    dies: str = "",
    at: int = 0,
    when: When = "before",
) -> dict[str, list[str]]:
    """Have a guest migrate, a server of which dies at a message.

    Returns:
        What the first server on each side was told.

    Raises:
        AssertionError: Something was lost or done twice, or the server did not die there.
    """
    image = directory / "disk.img"
    make_image(image)
    made: dict[str, list[Mortal]] = {"source": [], "target": []}

    def make(name: str) -> Mortal:
        servers = made[name]
        die_at = at if name == dies and not servers else 0
        path = directory / f"{name}-{len(servers)}"
        servers.append(mortals.make(path, image, die_at, when))
        return servers[-1]

    try:
        with Migration(make, tracked=tracked, onwards=onwards, seed=at) as migration:
            migration.run(image)
            assert migration.deaths == bool(dies), f"{migration.deaths} servers have died"
        return {name: servers[0].messages for name, servers in made.items()}
    finally:
        for server in (*made["source"], *made["target"]):
            server.close()
            server.path.unlink(missing_ok=True)


def main() -> int:
    """Try all; a line for each case on standard output."""
    failed = 0
    with Mortals() as mortals, tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        for tracked, name, onwards, when in CASES:
            messages = migrate(mortals, directory, tracked=tracked)[name]
            what = f"{'noted' if tracked else 'in order'}, the {name} dies {when}"
            what += ", the guest goes on at the destination" if onwards else ""
            wrong = 0
            for at, message in enumerate(messages, 1):
                try:
                    migrate(
                        mortals,
                        directory,
                        tracked=tracked,
                        onwards=onwards,
                        dies=name,
                        at=at,
                        when=when,
                    )
                except AssertionError as error:
                    wrong += 1
                    print(f"  at message {at}, {message}: {error}", flush=True)
            failed += wrong
            print(f"{what}: {len(messages)} messages, {wrong} failures", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
