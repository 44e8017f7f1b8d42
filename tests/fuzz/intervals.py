"""An interval map against a list with one place for every address of a small window."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

from guestio import IotlbFails, Permissions
from guestio._core.iommu.intervals import IntervalMap
from tests.fuzz.choices import Choices

WINDOW = 256
"""Addresses that are used: a tree of four levels where nodes have four entries."""
MAX_STEPS = 60
SPACE = 1 << 64


class Place(NamedTuple):
    """What the model knows about one address."""

    target: int
    perm: Permissions


class Run:
    """A map and its model.

    Args:
        rng: What decides.
    """

    def __init__(self, rng: Choices) -> None:
        kind = rng.randrange(8)
        self.rng = rng
        self.base = SPACE - WINDOW if kind & 1 else 1 << 33
        self.capacity = rng.choice((1, 3, 20, 100)) if kind & 2 else None
        self.merge = not kind & 4
        self.map = IntervalMap(merge=self.merge, capacity=self.capacity)
        self.model: list[Place | None] = [None] * WINDOW
        self.pinned: list[tuple[int, int]] = []
        self.crowded = False  # by what was pinned, until it is evicted

    def spot(self) -> tuple[int, int]:
        start = self.rng.randrange(WINDOW)
        return start, min(self.rng.choice((1, 1, 2, 3, 8, 64, WINDOW)), WINDOW - start)

    def perm(self) -> Permissions:
        return Permissions(self.rng.choice((3, 3, 1, 2, 0)))

    def target(self, start: int) -> int:
        """Contiguous with its neighbors, or with few of them, or with none."""
        kind, at = self.rng.randrange(4), self.base + start
        return (at, at + 4096, start * 4096, SPACE - 1 - start)[kind] % SPACE

    def note(self, start: int, length: int, target: int, perm: Permissions) -> None:
        for at in range(length):
            self.model[start + at] = Place((target + at) % SPACE, perm)

    def forget(self, start: int, length: int) -> None:
        self.model[start : start + length] = [None] * length

    def step(self) -> None:
        start, length = self.spot()
        at = self.base + start
        held = self.model[start : start + length]
        match self.rng.randrange(12):
            case 0 | 1:
                self.overwrite(start, length, self.target(start), self.perm())
            case 2:
                self.map.cut(at, length)
                self.forget(start, length)
            case 3:
                target, perm = self.target(start), self.perm()
                done = self.map.add(at, length, target, perm)
                if self.capacity is None:
                    assert done == (held == [None] * length)
                if done:
                    self.note(start, length, target, perm)
            case 4:
                taken = self.map.take(at, length)
                if taken is not None:
                    self.compare(taken, start, length)
                    self.forget(start, length)
            case 5 | 6:
                self.fill(start, length)
            case 7 | 8:
                self.empty(start, length)
            case 9:
                with contextlib.suppress(ValueError):
                    self.map.pin(at, length)
                    self.pinned.append((at, length))
                    self.crowded = True
            case 10 if self.pinned:
                self.map.unpin(*self.pinned.pop(self.rng.randrange(len(self.pinned))))
            case _:
                self.leased(start, length)

    def overwrite(self, start: int, length: int, target: int, perm: Permissions) -> None:
        if target + length > SPACE:
            target = 0
        with contextlib.suppress(ValueError):  # all that fits is pinned
            self.map.overwrite(self.base + start, length, target, perm)
            self.note(start, length, target, perm)

    def fill(self, start: int, length: int) -> None:
        """Many entries that are not one, up, down or every other one."""
        perm = self.perm()
        for at in self.order(start, length):
            self.overwrite(at, 1, at * 4096, perm)

    def empty(self, start: int, length: int) -> None:
        for at in self.order(start, length):
            self.map.cut(self.base + at, 1)
            self.forget(at, 1)

    def order(self, start: int, length: int) -> Iterable[int]:
        places = range(start, start + length, self.rng.choice((1, 1, 2, 3)))
        return places if self.rng.randrange(2) else reversed(places)

    def leased(self, start: int, length: int) -> None:
        """What changes while a translation is used is refused or waits for it; here, refused."""
        access = Permissions(self.rng.choice((1, 2, 3)))
        at = self.base + start
        with contextlib.suppress(IotlbFails), self.map.guard(at, length, access) as ranges:
            assert sum(found.length for found in ranges) == length
            assert len(self.map.leases) > 0
            other, size = self.spot()
            self.overwrite(other, size, self.target(other), self.perm())
        assert len(self.map.leases) == 0

    def compare(
        self, entries: Iterable[tuple[int, int, int, Permissions]], start: int, length: int
    ) -> None:
        """Entries of a map say what the model says; of a bounded one, not all of it."""
        found: list[Place | None] = [None] * length
        for first, size, target, perm in entries:
            for at in range(first, first + size):
                if 0 <= at - self.base - start < length:
                    assert found[at - self.base - start] is None, "entries overlap"
                    found[at - self.base - start] = Place((target + at - first) % SPACE, perm)
        for has, should in zip(found, self.model[start : start + length], strict=True):
            assert has == should or (self.capacity is not None and has is None)

    def check(self) -> None:
        self.map.check()
        entries = self.map.overlapping(self.base, WINDOW)
        assert len(self.map) == len(entries)
        assert self.capacity is None or self.crowded or len(entries) <= self.capacity
        self.compare(entries, 0, WINDOW)
        for access in (Permissions.READ, Permissions.WRITE):
            self.check_lookups(access)

    def check_lookups(self, access: Permissions) -> None:
        """One batch, and single lookups of some of it."""
        starts = [self.base + at for at in range(WINDOW)]
        targets, statuses = self.map.lookup_many(starts, 1, access)
        for at, (target, status) in enumerate(
            zip(targets.tolist(), statuses.tolist(), strict=True)
        ):
            place = self.model[at]
            if place is None or (self.capacity is not None and status == 1):
                assert status == 1
            elif place.perm.allows(access):
                assert (status, target) == (0, place.target)
            else:
                assert status == 2
        at = self.rng.randrange(WINDOW)
        try:
            (found,) = self.map.lookup(starts[at], 1, access)
        except IotlbFails:
            assert statuses[at] != 0
        else:
            assert (statuses[at], found.base) == (0, targets[at])


def fuzz(data: bytes) -> None:
    """Changes of a map, compared with the model after each few, and in the end when emptied."""
    run = Run(Choices(data))
    for number in range(MAX_STEPS):
        if not run.rng.left:
            break
        run.step()
        if number % 4 == 3:
            run.check()
    run.check()
    run.empty(0, WINDOW)
    run.map.check()
