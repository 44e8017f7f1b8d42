"""What the IOTLB has beyond the original: capacity, pins, counters, batches, explanations."""

import contextlib
import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestio import Iotlb, IotlbFails, IovaRange, MappedRange, Permissions
from guestio._core.iommu.address_space import AddressSpace
from guestio._core.memory.vector import RegionTable

NONE, R, W, RW = map(Permissions, range(4))
TOP = 2**64
PAGE = 0x1000
CELLS = 5


def pages(iotlb):
    """The pages at which mappings begin."""
    return [source.base // PAGE for source, _, _ in iotlb]


def fill(iotlb, *numbers):
    """Map pages, none of which can be joined with a neighbor."""
    for number in numbers:
        iotlb.set_mapping(number * PAGE, (number * 7 + 1) << 20, PAGE, RW)


def test_the_least_recently_used_is_evicted_whatever_used_it():
    iotlb = Iotlb(3)
    fill(iotlb, 0, 2, 4)
    iotlb.lookup(0, 1, R)
    fill(iotlb, 6)
    assert pages(iotlb) == [0, 4, 6]
    iotlb.lookup_many([4 * PAGE], 1, R)
    fill(iotlb, 8)
    assert pages(iotlb) == [4, 6, 8]
    # A use, although it fails as a whole.
    with pytest.raises(IotlbFails):
        iotlb.lookup(4 * PAGE, 2 * PAGE, R)
    with iotlb.guard(6 * PAGE, 1, R):
        pass
    fill(iotlb, 10)
    assert pages(iotlb) == [4, 6, 10]
    fill(iotlb, 4)
    fill(iotlb, 12)
    assert pages(iotlb) == [4, 10, 12]
    assert iotlb.stats().evictions == 4


def test_what_looks_without_using_does_not_keep_an_entry():
    iotlb = Iotlb(2)
    fill(iotlb, 0, 2)
    iotlb.explain(0, PAGE, R)
    assert 0 in iotlb
    list(iotlb)
    fill(iotlb, 4)
    assert pages(iotlb) == [2, 4]


def test_a_capacity_of_one():
    iotlb = Iotlb(1)
    iotlb.set_mapping(0, 0x10000, 3 * PAGE, RW)
    iotlb.invalidate_mapping(PAGE, PAGE)
    assert len(iotlb) == 1
    fill(iotlb, 8)
    assert pages(iotlb) == [8]
    iotlb.set_mapping(0, 0, TOP, R)
    assert list(iotlb) == [(IovaRange(0, TOP), MappedRange(0, TOP), R)]
    # Mapping the middle anew leaves three, of which the last one stays.
    iotlb.set_mapping(PAGE, 0x5000, PAGE, RW)
    assert pages(iotlb) == [1]
    assert iotlb.stats().evictions == 4


def test_a_merge_needs_no_room():
    iotlb = Iotlb(1)
    for number in range(100):
        iotlb.set_mapping(number * PAGE, 0x100000 + number * PAGE, PAGE, RW)
    assert len(iotlb) == 1
    assert iotlb.lookup(0, 100 * PAGE, RW) == [MappedRange(0x100000, 100 * PAGE)]
    assert iotlb.stats().evictions == 0


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_neighbors_become_one_that_ends_where_they_ended(order):
    iotlb = Iotlb()
    for number in order:
        iotlb.set_mapping((2 + number) * PAGE, 0x100000 + number * PAGE, PAGE, RW)
    assert list(iotlb) == [
        (IovaRange(2 * PAGE, 3 * PAGE), MappedRange(0x100000, 3 * PAGE), RW),
    ]
    for beside in (2 * PAGE - 1, 5 * PAGE):
        with pytest.raises(IotlbFails):
            iotlb.lookup(beside, 1, R)


@pytest.mark.parametrize("beside", [9, 11])
def test_an_entry_that_grows_was_used(beside):
    iotlb = Iotlb(2)
    iotlb.set_mapping(10 * PAGE, 0x100000, PAGE, RW)
    fill(iotlb, 20)
    iotlb.set_mapping(beside * PAGE, 0x100000 + (beside - 10) * PAGE, PAGE, RW)
    fill(iotlb, 30)
    assert pages(iotlb) == [min(beside, 10), 30]


def test_full_of_pinned_entries():
    """They stay, and whatever else comes is the first to go."""
    iotlb = Iotlb(2)
    iotlb.pin(0, 4 * PAGE)
    fill(iotlb, 0, 2)
    fill(iotlb, 8)
    assert pages(iotlb) == [0, 2]
    fill(iotlb, 10, 12)
    assert pages(iotlb) == [0, 2]
    assert iotlb.stats().evictions == 3
    # More of them than there is room for.
    fill(iotlb, 1, 3)
    assert pages(iotlb) == [0, 1, 2, 3]
    iotlb.unpin(0, 4 * PAGE)
    assert pages(iotlb) == [0, 1, 2, 3]
    fill(iotlb, 20)
    assert pages(iotlb) == [3, 20]


def test_pins_hold_places_not_entries():
    iotlb = Iotlb(1)
    iotlb.pin(TOP - 1, 1)
    iotlb.pin(TOP - 1, 1)
    iotlb.set_mapping(TOP - PAGE, 0, PAGE, RW)
    fill(iotlb, 0)
    assert pages(iotlb) == [TOP // PAGE - 1]
    # A pinned entry can be replaced and taken away, and what comes back is pinned again.
    iotlb.invalidate_mapping(TOP - PAGE, PAGE)
    assert len(iotlb) == 0
    iotlb.set_mapping(TOP - PAGE, 0x9000, PAGE, R)
    fill(iotlb, 0)
    assert iotlb.lookup(TOP - 1, 1, R) == [MappedRange(0x9FFF, 1)]
    # Of an entry that is cut, only the part that is pinned.
    iotlb.set_mapping(TOP - PAGE + 16, 0, 16, W)
    assert [source for source, _, _ in iotlb] == [IovaRange(TOP - PAGE + 32, PAGE - 32)]
    iotlb.invalidate_all()
    iotlb.unpin(TOP - 1, 1)
    iotlb.set_mapping(TOP - PAGE, 0x9000, PAGE, R)
    fill(iotlb, 0)
    assert pages(iotlb) == [TOP // PAGE - 1]
    iotlb.unpin(TOP - 1, 1)
    fill(iotlb, 2)
    assert pages(iotlb) == [2]


def test_pins_without_a_capacity_are_harmless():
    iotlb = Iotlb()
    iotlb.pin(0, TOP)
    fill(iotlb, *range(0, 40, 2))
    iotlb.unpin(0, TOP)
    assert len(iotlb) == 20


def counted(iotlb, call):
    """What a call adds to the counters: hits, misses, access fails, evictions, invalidations."""
    before = iotlb.stats()[2:]
    with contextlib.suppress(IotlbFails, ValueError):
        call()
    return tuple(now - then for now, then in zip(iotlb.stats()[2:], before, strict=True))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda t: t.lookup(0, PAGE, R), (1, 0, 0, 0, 0)),
        (lambda t: t.lookup(0, 2 * PAGE, R), (1, 0, 0, 0, 0)),
        (lambda t: t.lookup(0, 0, R), (0, 0, 0, 0, 0)),
        (lambda t: t.lookup(8 * PAGE, 1, R), (0, 1, 0, 0, 0)),
        (lambda t: t.lookup(0, PAGE, W), (0, 0, 1, 0, 0)),
        # Missing somewhere and forbidden elsewhere: what is missing must be asked for first.
        (lambda t: t.lookup(0, 3 * PAGE, W), (0, 1, 0, 0, 0)),
        (lambda t: t.guard(0, PAGE, R), (1, 0, 0, 0, 0)),
        (lambda t: t.guard(0, PAGE, W), (0, 0, 1, 0, 0)),
        (lambda t: t.lookup_many([0, PAGE, 8 * PAGE, 0], [1, 1, 1, 0], W), (2, 1, 1, 0, 0)),
        (lambda t: t.lookup_many([], 1, W), (0, 0, 0, 0, 0)),
        (lambda t: t.invalidate_mapping(0, PAGE), (0, 0, 0, 0, 1)),
        (lambda t: t.invalidate_mapping(50 * PAGE, PAGE), (0, 0, 0, 0, 1)),
        (lambda t: t.invalidate_mapping(0, 0), (0, 0, 0, 0, 0)),
        (lambda t: t.invalidate_all(), (0, 0, 0, 0, 1)),
        (lambda t: fill(t, 8, 10), (0, 0, 0, 1, 0)),
        (lambda t: fill(t, 1, 1, 1), (0, 0, 0, 0, 0)),
        (lambda t: t.explain(0, 9 * PAGE, W), (0, 0, 0, 0, 0)),
        (lambda t: t.check_drain(0, PAGE), (0, 0, 0, 0, 0)),
    ],
)
def test_what_each_call_counts(call, expected):
    iotlb = Iotlb(3)
    iotlb.set_mapping(0, 0x10000, PAGE, R)
    iotlb.set_mapping(PAGE, 0x90000, PAGE, RW)
    assert counted(iotlb, lambda: call(iotlb)) == expected


NEAR_THE_EDGES = Iotlb()
NEAR_THE_EDGES.set_mapping(0, 0x5000, 2, R)
NEAR_THE_EDGES.set_mapping(4, TOP - 1, 4, RW)
NEAR_THE_EDGES.set_mapping(TOP - 2, 0x7000, 1, W)
NEAR_THE_EDGES.set_mapping(TOP - 1, 0x9000, 1, RW)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (
            (0, 1, R),
            """0x0+0x1 for READ succeeds
              0x0+0x1 -> 0x5000 READ: ok
              before: nothing is mapped
              after: 0x4+0x4 -> 0xffffffffffffffff READ_WRITE""",
        ),
        (
            (1, 4, RW),
            """0x1+0x4 for READ_WRITE fails: 1 ranges not mapped, 1 refused
              0x1+0x1 -> 0x5001 READ: READ_WRITE is refused
              0x2+0x2 is not mapped
              0x4+0x1 -> 0xffffffffffffffff READ_WRITE: ok
              before: nothing is mapped
              after: 0xfffffffffffffffe+0x1 -> 0x7000 WRITE""",
        ),
        (
            (5, 1, R),
            """0x5+0x1 for READ succeeds
              0x5+0x1 -> 0x0 READ_WRITE: ok
              before: 0x0+0x2 -> 0x5000 READ
              after: 0xfffffffffffffffe+0x1 -> 0x7000 WRITE""",
        ),
        (
            (TOP - 1, 1, W),
            """0xffffffffffffffff+0x1 for WRITE succeeds
              0xffffffffffffffff+0x1 -> 0x9000 READ_WRITE: ok
              before: 0xfffffffffffffffe+0x1 -> 0x7000 WRITE
              after: nothing is mapped""",
        ),
        (
            (TOP - 3, 3, R),
            """0xfffffffffffffffd+0x3 for READ fails: 1 ranges not mapped, 1 refused
              0xfffffffffffffffd+0x1 is not mapped
              0xfffffffffffffffe+0x1 -> 0x7000 WRITE: READ is refused
              0xffffffffffffffff+0x1 -> 0x9000 READ_WRITE: ok
              before: 0x4+0x4 -> 0xffffffffffffffff READ_WRITE
              after: nothing is mapped""",
        ),
        (
            (TOP - 1, 0, W),
            """0xffffffffffffffff+0x0 for WRITE succeeds: an access of 0 bytes touches nothing
              before: 0xfffffffffffffffe+0x1 -> 0x7000 WRITE
              after: nothing is mapped""",
        ),
        (
            (0, TOP, NONE),
            """0x0+0x10000000000000000 for NONE fails: 2 ranges not mapped, 0 refused
              0x0+0x2 -> 0x5000 READ: ok
              0x2+0x2 is not mapped
              0x4+0x4 -> 0xffffffffffffffff READ_WRITE: ok
              0x8+0xfffffffffffffff6 is not mapped
              0xfffffffffffffffe+0x1 -> 0x7000 WRITE: ok
              0xffffffffffffffff+0x1 -> 0x9000 READ_WRITE: ok
              before: nothing is mapped
              after: nothing is mapped""",
        ),
    ],
)
def test_explanations_near_the_ends_of_the_space(question, answer):
    lines = NEAR_THE_EDGES.explain(*question).splitlines()
    assert [line.strip() for line in lines] == [line.strip() for line in answer.splitlines()]


mappings = st.lists(
    st.tuples(
        st.integers(0, 60),
        st.integers(1, 20),
        st.sampled_from((0, 1, 30, 64, TOP - 40)),
        st.sampled_from((NONE, R, W, RW)),
    ),
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(
    mappings,
    st.sampled_from((0, TOP - 80)),
    st.lists(st.tuples(st.integers(0, 79), st.integers(0, 90)), max_size=80),
    st.sampled_from((NONE, R, W, RW)),
)
def test_batches_agree_with_a_model_of_every_byte(chosen, base, asked, access):
    """All mixtures of permissions, gaps and jumps; more than one search goes down at a time."""
    iotlb, model = Iotlb(), {}
    for at, length, target, perm in chosen:
        iotlb.set_mapping(base + at, (target + at) % TOP, length, perm)
        model.update({at + i: ((target + at + i) % TOP, perm) for i in range(length)})
    starts = np.array([base + at for at, _ in asked], np.uint64)
    targets, status = iotlb.lookup_many(starts, [length for _, length in asked], access)
    for (at, length), target, got in zip(asked, targets.tolist(), status.tolist(), strict=True):
        cells = [model.get(at + i) for i in range(length)]
        if base + at + length > TOP or None in cells:
            expected = 1
        elif not all(cell[1].allows(access) for cell in cells):
            expected = 2
        elif any(cell[0] != (cells[0][0] + i) % TOP for i, cell in enumerate(cells)):
            expected = 3
        else:
            expected = 0
        assert got == expected, (at, length)
        if expected or not length:
            assert target == 0
        else:
            assert target == cells[0][0]


def test_what_a_batch_returns():
    iotlb = Iotlb()
    iotlb.set_mapping(0, 0x1000, 16, RW)
    starts = np.arange(4, dtype=np.uint64)
    starts.flags.writeable = False
    targets, status = iotlb.lookup_many(starts, 1, R)
    assert (targets.dtype, status.dtype) == (np.uint64, np.uint8)
    assert targets.shape == status.shape == (4,)
    targets[:] = 0
    assert iotlb.lookup_many(starts, 1, R)[0].tolist() == [0x1000, 0x1001, 0x1002, 0x1003]
    assert iotlb.lookup_many(3, 1, R)[0].tolist() == [0x1003]


@pytest.mark.parametrize(
    ("starts", "lengths"),
    [
        (np.zeros((2, 2), np.uint64), 1),
        (np.zeros((2, 2), np.uint64), np.ones((2, 2), np.uint64)),
        (np.zeros(4, np.uint64), np.ones((2, 2), np.uint64)),
        (np.zeros(2, np.uint64), np.ones(3, np.uint64)),
        (np.zeros(2, np.uint64), np.ones(0, np.uint64)),
        (np.zeros(0, np.uint64), np.ones(1, np.uint64)),
    ],
)
def test_batches_of_another_shape_are_refused(starts, lengths):
    with pytest.raises(ValueError, match=r"dimension|lengths"):
        Iotlb().lookup_many(starts, lengths, R)


def failures(call):
    """What a call finds missing and forbidden."""
    try:
        call()
    except IotlbFails as fails:
        return fails.misses, fails.access_fails
    return [], []


@pytest.mark.parametrize("start", [0, 1 << 40, TOP - CELLS])
def test_an_access_lacks_what_a_lookup_says(start):
    """Accesses have a way of their own through the map, which does not stop at each entry."""
    spans = list(itertools.combinations(range(CELLS + 1), 2))
    for cells in itertools.product([None, R, RW], repeat=CELLS):
        iotlb = Iotlb()
        for at, perm in enumerate(cells):
            if perm is not None:
                iotlb.set_mapping(start + at, at << 20, 1, perm)
        space = AddressSpace(RegionTable([]), iotlb._map)
        for first, end in spans:
            wanted = start + first, end - first, W
            look, reach = partial(iotlb.lookup, *wanted), partial(space.gather, *wanted)
            assert failures(reach) == failures(look)
            assert counted(iotlb, reach) == counted(iotlb, look)
