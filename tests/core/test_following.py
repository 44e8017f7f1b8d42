"""Interval maps that show the mappings of another one: each with its own users and counters."""

import gc
import threading
import weakref

import numpy as np
import pytest

from guestio import IotlbFails, Permissions
from guestio._core.iommu.intervals import IntervalMap, follow, users_of

R, RW = Permissions.READ, Permissions.READ_WRITE
PAGE = 0x1000


class Map(IntervalMap):
    """One that can be referred to weakly and have attributes."""

    def counts(self):
        counted = self.hits, self.misses, self.access_fails, self.evictions, self.invalidations
        return (len(self), self.capacity, *counted)


def followers(count, source):
    made = [Map() for _ in range(count)]
    for follower in made:
        follow(follower, source)
    return made


def test_every_lookup_sees_the_source():
    source = Map()
    one, other = followers(2, source)
    source.overwrite(0x1000, PAGE, 0x8000, RW)
    for follower in (one, other):
        assert len(follower) == 1
        assert follower.lookup(0x1004, 4, RW) == [(0x8004, 4)]
        assert follower.overlapping(0, 1 << 64) == source.overlapping(0, 1 << 64)
        assert follower.neighbours(0)[1] == (0x1000, PAGE, 0x8000, RW)
        assert list(follower) == list(source)
        found, states = follower.lookup_many(np.array([0x1000, 0]), 1, R)
        assert (list(found), list(states)) == ([0x8000, 0], [0, 1])
        follower.check()
    source.cut(0x1000, PAGE)
    for follower in (one, other):
        with pytest.raises(IotlbFails):
            follower.lookup(0x1004, 4, R)


def test_from_one_to_the_next_and_to_nothing():
    first, second = Map(), Map()
    first.overwrite(0, PAGE, 0x10000, RW)
    second.overwrite(0, PAGE, 0x20000, RW)
    follower = Map()
    seen = []
    for source, where in ((first, 0x10000), (second, 0x20000), (None, None), (first, 0x10000)):
        follow(follower, source)
        seen.append(follower.generation)
        if where is None:
            assert len(follower) == 0
            follower.overwrite(0, PAGE, 0x30000, RW)
            follower.clear()
        else:
            assert follower.lookup(0, 1, R) == [(where, 1)]
    assert seen[0] == seen[3]
    assert len(set(seen)) == 3


def test_generations_are_those_of_the_source_and_never_anothers():
    """A ring looks its areas up again when the number is another one than before."""
    source, other = Map(), Map()
    (follower,) = followers(1, source)
    assert follower.generation == source.generation != other.generation
    source.overwrite(0, PAGE, 0, RW)
    before = follower.generation
    source.cut(0, PAGE)
    assert follower.generation == source.generation != before
    other.overwrite(0, PAGE, 0, RW)
    other.cut(0, PAGE)
    assert other.generation != source.generation


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.overwrite(0, PAGE, 0, RW),
        lambda m: m.overwrite(0, PAGE, 0, RW, drain=True),
        lambda m: m.cut(0, PAGE),
        lambda m: m.cut(0, PAGE, drain=True),
        lambda m: m.clear(),
        lambda m: m.clear(drain=True),
        lambda m: m.add(0x100000, PAGE, 0, RW),
        lambda m: m.take(0, 1 << 64),
    ],
)
def test_a_follower_is_not_changed(change):
    source = Map()
    source.overwrite(0, PAGE, 0x8000, RW)
    (follower,) = followers(1, source)
    before = list(source), follower.counts(), follower.generation
    with pytest.raises(RuntimeError, match="another"):
        change(follower)
    assert (list(source), follower.counts(), follower.generation) == before


def test_what_cannot_be_followed():
    source, follower = Map(), Map()
    follow(follower, source)
    mapped = Map()
    mapped.overwrite(0, 1, 0, R)
    for map_, refused in (
        (Map(), follower),
        (Map(), Map(capacity=4)),
        (Map(capacity=4), source),
        (mapped, source),
        (source, source),
    ):
        with pytest.raises(ValueError, match="follow"):
            follow(map_, refused)
    with pytest.raises(TypeError):
        follow(source, object())


def test_each_has_its_own_counters():
    source = Map()
    source.overwrite(0, PAGE, 0, R)
    source.overwrite(PAGE, PAGE, 0, R)
    one, other = followers(2, source)
    one.lookup(0, 1, R)
    one.lookup_many([0, 0], 1, R)
    for addr, access in ((0, RW), (2 * PAGE, R)):
        with pytest.raises(IotlbFails):
            one.lookup(addr, 1, access)
    source.cut(0, 1)
    assert one.counts() == (2, None, 3, 1, 1, 0, 2)
    assert other.counts() == (2, None, 0, 0, 0, 0, 2)
    follow(other, None)
    source.cut(1, 1)
    assert (one.invalidations, other.invalidations) == (3, 3)
    follow(one, source)
    source.clear()
    assert (one.invalidations, other.invalidations) == (5, 3)


class TestUsers:
    def test_each_waits_for_its_own(self):
        source = Map()
        source.overwrite(0, 4 * PAGE, 0, RW)
        one, other, idle = followers(3, source)
        by_number = {1: one, 2: other, 3: idle}
        with one.guard(0, PAGE, R), other.guard(2 * PAGE, PAGE, R):
            assert users_of(by_number, 0, 1 << 64) == [one, other]
            assert users_of(by_number, 0, PAGE) == [one]
            assert users_of(by_number, PAGE, PAGE) == []
            # The source and the third one have no users.
            source.clear()
            assert idle.drain(0, 1 << 64, 0)
            for busy in (one, other):
                with pytest.raises(RuntimeError, match="itself"):
                    busy.drain(0, 1 << 64, 0)
                follow(busy, None)
                with pytest.raises(RuntimeError, match="itself"):
                    busy.drain(0, 1 << 64, 0)
        assert users_of(by_number, 0, 1 << 64) == []
        assert one.drain(0, 1 << 64, 0)

    def test_bad_ranges(self):
        for start, length in ((0, 0), (-1, 1), (1, 1 << 64), (0.5, 1)):
            with pytest.raises((TypeError, ValueError)):
                users_of({}, start, length)
        with pytest.raises(TypeError):
            users_of({1: object()}, 0, 1)


def test_the_source_lives_as_long_as_it_is_followed():
    source = Map()
    source.overwrite(0, PAGE, 0x8000, RW)
    gone = weakref.ref(source)
    (follower,) = followers(1, source)
    # A cycle through both, as a device's objects may form.
    follower.cycle = source.cycle = [follower, source]
    del source
    gc.collect()
    assert follower.lookup(0, 1, R) == [(0x8000, 1)]
    del follower
    gc.collect()
    assert gone() is None


def test_batches_while_it_changes_what_it_follows():
    """A batch that has begun is done with the map that it began with, which may go meanwhile."""
    pages = 20_000
    starts = np.arange(pages, dtype=np.uint64) * np.uint64(PAGE)
    follower = Map()
    stop = threading.Event()
    wrong = []

    def look():
        while not stop.is_set():
            found, states = follower.lookup_many(starts, 1, R)
            if not (states == 1).all() and not (
                (states == 0).all() and len(set(found - starts)) == 1
            ):
                wrong.append(states)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(200):
        source = Map()
        source.overwrite(0, pages * PAGE, number << 32, R)
        follow(follower, source)
        del source
        follow(follower, None)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
