"""Regions found by place: the same as looking at all of them, to the byte."""

import random
from types import SimpleNamespace

import pytest

from guestio.dma.changes import meet
from guestio.dma.regions import RegionManager, _Places

TOP = 2**64


def place(number, start, size):
    return SimpleNamespace(_number=number, start=start, size=size, end=start + size)


@pytest.mark.parametrize("span", [6, 40, 1000])
@pytest.mark.parametrize("base", [0, TOP - 1000])
@pytest.mark.parametrize("seed", range(5))
def test_as_looking_at_all(span, base, seed):
    rng = random.Random(seed)
    places, all_ = _Places(), []
    for number in range(60):
        start = rng.randrange(span)
        size = min(rng.choice([1, 2, 3, 4, 7, 8, 9, span]), span - start)
        all_.append(place(number, base + start, size))
        places.add(all_[-1])
        if rng.random() < 0.3:
            gone = all_.pop(rng.randrange(len(all_)))
            places.remove(gone)
        for first in [rng.randrange(span) for _ in range(20)]:
            length = rng.randrange(1, span - first + 1)
            found = places.meeting(base + first, length)
            assert len({id(each) for each in found}) == len(found)
            assert {each._number for each in found} == {
                each._number for each in all_ if meet(each.start, each.size, base + first, length)
            }
    for each in all_:
        places.remove(each)
    assert places._classes == {}


def test_very_many_regions_inside_one():
    """What is inside, around and beside is told apart, also by who is active."""
    with RegionManager(page_size=1) as manager:
        around = manager.new_region("around", 0, 3000, priority=1)
        inside = [manager.new_region(str(n), n, 1) for n in range(3000)]
        beside = [manager.new_region(str(n), 3000 + n, 1) for n in range(10)]
        for region in [*inside, *beside]:
            region.map()
        around.map()
        assert around.active
        assert not any(region.active for region in inside)
        assert all(region.active for region in beside)
        around.unmap()
        assert all(region.active for region in inside)
        around.move(10_000)
        around.map()
        assert all(region.active for region in [around, *inside])
