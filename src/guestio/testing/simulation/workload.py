"""What a simulated driver asks of a device, and what it must get.

A :class:`Workload` makes jobs, is told how they ended, and finds what no device may do. That of
block devices knows what each sector may have, also after a crash; that of any other device knows
nothing of what its bytes mean.
"""

from __future__ import annotations

import hashlib
import random
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from guestio.errors import GuestioError
from guestio.testing.simulation.disk import SECTOR
from guestio.virtio.blk import (
    S_IOERR,
    S_OK,
    T_DISCARD,
    T_FLUSH,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)

if TYPE_CHECKING:
    from guestio.virtio import Device

UNTOUCHED: Final = 0xEE
"""What is in a byte that the device is to write, before it does."""


class InvariantError(GuestioError, AssertionError):
    """An invariant does not hold.

    Attributes:
        invariant: Which one: ``"L1"`` to ``"L14"``, see the architecture.
    """

    def __init__(self, invariant: str, text: str) -> None:
        self.invariant = invariant
        super().__init__(f"{invariant}: {text}")


@dataclass(eq=False)
class Job:
    """A request of the driver's.

    Attributes:
        data: What the device reads.
        room: Bytes that it may write.
        queue: On which queue.
        tag: The workload's own.
        may_fail: Whether an error would be right: the simulation kept the device from it.
        may_hang: Whether it need not be answered before its queue stops.
    """

    data: bytes
    room: int
    queue: int = 0
    tag: Any = None
    may_fail: bool = False
    may_hang: bool = False


class Workload(Protocol):
    """Makes jobs and judges their ends."""

    def next(self, rng: random.Random) -> Job | None:
        """Another job, or None if there is none now."""
        ...

    def done(self, job: Job, written: int, answer: bytes) -> None:
        """A job was given back.

        Args:
            job: As from :meth:`next`.
            written: Bytes that the device says it wrote.
            answer: All bytes that it might have written.

        Raises:
            InvariantError: That cannot be right.
        """
        ...

    def died(self, jobs: list[Job]) -> None:
        """The guest is gone; whether these jobs were done is not known."""
        ...

    def lost_power(self) -> None:
        """The host is gone with it, and with what it had not flushed. After :meth:`died`."""
        ...


class AnyWorkload:
    """Random bytes, which any device must give back once, whatever it makes of them.

    Args:
        device: What is driven.
    """

    def __init__(self, device: Device) -> None:
        self._queues = device.num_queues
        self._owned = set(device.device_queues)

    def next(self, rng: random.Random) -> Job | None:
        """See :class:`Workload`."""
        queue = rng.randrange(self._queues)
        # What a device speaks first on is filled when it has something to say.
        owned = queue in self._owned
        data = b"" if owned else rng.randbytes(rng.randrange(64))
        room = rng.randrange(0 if data else 1, 600)
        return Job(data, room, queue, may_hang=owned)

    def done(self, job: Job, written: int, answer: bytes) -> None:
        """See :class:`Workload`."""

    def died(self, jobs: list[Job]) -> None:
        """See :class:`Workload`."""

    def lost_power(self) -> None:
        """See :class:`Workload`."""


_HEADER: Final = struct.Struct("<IIQ")
_TRIM: Final = struct.Struct("<QII")
_NAMES: Final = {
    T_IN: "read",
    T_OUT: "write",
    T_FLUSH: "flush",
    T_DISCARD: "discard",
    T_WRITE_ZEROES: "write-zeroes",
}
_ZERO: Final = 0
_ANY: Final = -1


@dataclass
class _Tag:
    kind: int
    sector: int = 0
    count: int = 0
    version: int = _ZERO


class BlockWorkload:
    """A disk, of which each sector's possible contents are known.

    No two jobs in flight touch the same sector, so a sector that is read has what was written last;
    or any of what may have been written last, if a guest died with a write in flight. What a flush
    that succeeded covers must still be there after a power loss.

    Args:
        sectors: Of the disk; all zeroes at first.
        queues: How many queues to use.
    """

    def __init__(self, sectors: int, queues: int = 1) -> None:
        self._sectors = sectors
        self._queues = queues
        self._version = _ZERO
        self._found: dict[bytes, int] = {bytes(SECTOR): _ZERO}
        self._possible: list[set[int]] = [{_ZERO} for _ in range(sectors)]
        self._durable: list[set[int]] = [{_ZERO} for _ in range(sectors)]
        # What was written to a sector since each flush in flight was submitted.
        self._flushes: list[tuple[Job, list[set[int]]]] = []
        # What a job in flight is to leave in a sector; a sector of a read stays as it is.
        self._busy: dict[int, int | None] = {}

    def _content(self, version: int, sector: int) -> bytes:
        if version == _ZERO:
            return bytes(SECTOR)
        seed = b"%d %d" % (version, sector)
        made = hashlib.blake2b(seed).digest() * (SECTOR // 64)
        self._found[made] = version
        return made

    def next(self, rng: random.Random) -> Job | None:
        """See :class:`Workload`."""
        kind = rng.choices((T_IN, T_OUT, T_FLUSH, T_WRITE_ZEROES, T_DISCARD), (6, 8, 3, 1, 1))[0]
        queue = rng.randrange(self._queues)
        if kind == T_FLUSH:
            job = Job(_HEADER.pack(kind, 0, 0), 1, queue, _Tag(kind))
            covered = [set(each) for each in self._possible]
            for each, flying in self._busy.items():
                if flying is not None:
                    covered[each].add(flying)
            self._flushes.append((job, covered))
            return job
        count = rng.choice((1, 1, 2, 3, 8))
        sector = rng.randrange(self._sectors - count + 1)
        places = range(sector, sector + count)
        if any(each in self._busy for each in places):
            return None
        tag = _Tag(kind, sector, count)
        head = _HEADER.pack(kind, 0, sector if kind in (T_IN, T_OUT) else 0)
        if kind == T_IN:
            self._busy.update(dict.fromkeys(places))
            return Job(head, count * SECTOR + 1, queue, tag)
        if kind == T_OUT:
            self._version += 1
            tag.version = self._version
            head += b"".join(self._content(tag.version, each) for each in places)
        else:
            head += _TRIM.pack(sector, count, 0)
            tag.version = _ZERO if kind == T_WRITE_ZEROES else _ANY
        for each in places:
            self._busy[each] = tag.version
            self._durable[each].add(tag.version)
            for _, covered in self._flushes:
                covered[each].add(tag.version)
        return Job(head, 1, queue, tag)

    def done(self, job: Job, written: int, answer: bytes) -> None:
        """See :class:`Workload`."""
        tag: _Tag = job.tag
        status = answer[-1]
        what = f"{_NAMES[tag.kind]} of {tag.count} sectors at {tag.sector}"
        if status == UNTOUCHED:
            raise InvariantError("L13", f"a {what} was given back without a status")
        if status not in (S_OK, S_IOERR):
            raise InvariantError("L13", f"a {what} has the status {status:#x}")
        failed = status != S_OK
        if failed and not job.may_fail:
            raise InvariantError("L14", f"a {what} failed, and nothing was in its way")
        places = range(tag.sector, tag.sector + tag.count)
        for each in places:
            self._busy.pop(each, None)
        if tag.kind == T_FLUSH:
            (covered,) = [covers for each, covers in self._flushes if each is job]
            self._flushes = [each for each in self._flushes if each[0] is not job]
            if not failed:
                self._durable = [old & new for old, new in zip(self._durable, covered, strict=True)]
        elif tag.kind == T_IN:
            if not failed:
                self._check(what, tag, answer)
                if written != job.room:
                    raise InvariantError("L14", f"a {what} wrote {written} bytes, not {job.room}")
        else:
            for each in places:
                if failed:
                    self._possible[each].add(tag.version)
                else:
                    self._possible[each] = {tag.version}

    def _check(self, what: str, tag: _Tag, answer: bytes) -> None:
        for at in range(tag.count):
            sector, data = tag.sector + at, answer[at * SECTOR : (at + 1) * SECTOR]
            self.check_sector(f"a {what}", sector, data)

    def check_sector(self, what: str, sector: int, data: bytes) -> None:
        """Check what was found in a sector.

        Raises:
            InvariantError: It can have no such content.
        """
        possible = self._possible[sector]
        version = self._found.get(data)
        if _ANY in possible:
            return
        # A version's bytes differ from sector to sector.
        if version is None or self._content(version, sector) != data or version not in possible:
            found = "what was never written there" if version is None else f"version {version}"
            if data.count(data[0]) == SECTOR and version is None:
                found = f"{SECTOR} bytes {data[0]:#04x}"
            raise InvariantError(
                "L14", f"{what} finds {found} in sector {sector}, not of {sorted(possible)}"
            )
        self._possible[sector] = {version}

    def died(self, jobs: list[Job]) -> None:
        """See :class:`Workload`."""
        for job in jobs:
            tag: _Tag = job.tag
            if tag.kind not in (T_IN, T_FLUSH):
                for each in range(tag.sector, tag.sector + tag.count):
                    self._possible[each].add(tag.version)
        self._flushes.clear()
        self._busy.clear()

    def lost_power(self) -> None:
        """See :class:`Workload`."""
        self._possible = [set(each) for each in self._durable]

    def check(self, content: bytes) -> None:
        """Compare all of the image, once nothing is in flight.

        Raises:
            InvariantError: Something was lost, or written that was not to be.
        """
        for sector in range(self._sectors):
            data = content[sector * SECTOR : (sector + 1) * SECTOR]
            self.check_sector("the image", sector, data)
