"""Lookups in an IOTLB: merged entries, permissions, misses, and ends of the address space."""

from itertools import pairwise

import numpy as np
import pytest

from guestio import InvalidAddressError, Iotlb, IotlbFails, IovaRange, MappedRange, Permissions

MAX = 2**64 - 1
NONE, R, W, RW = map(Permissions, range(4))


def outcome(iotlb, iova, length, access):
    """What a lookup gives: the targets, or (misses, access fails)."""
    try:
        return iotlb.lookup(iova, length, access)
    except IotlbFails as fails:
        return fails.misses, fails.access_fails


READ_ONLY = [(0x1000, 0x1000, 0x8000, R)]
WITH_A_HOLE = [*READ_ONLY, (0x3000, 0x1000, 0x20000, RW)]
SPLIT = [*WITH_A_HOLE, (0x1400, 0x100, 0x9000, RW)]
WRAPPING = [(0x1000, 0x200, MAX - 0xFF, R)]
PERMS = [(42, 123, 87, R), (165, 234, 210, W)]
MERGE = [(42, 123, 87, RW), (165, 234, 210, RW)]
INVAL = [(42, 123, 87, RW)]

CASES = [
    ("merge-1", MERGE, [], (42, 357, RW), [(87, 357)]),
    ("merge-2", MERGE, [], (164, 2, RW), [(209, 2)]),
    (
        "targets-apart",
        [(42, 123, 87, RW), (165, 234, 87, RW)],
        [],
        (42, 357, RW),
        [(87, 123), (87, 234)],
    ),
    ("perms-1", PERMS, [], (42, 357, RW), ([], [(42, 123), (165, 234)])),
    ("perms-2", PERMS, [], (42, 357, R), ([], [(165, 234)])),
    ("perms-3", PERMS, [], (42, 357, W), ([], [(42, 123)])),
    ("perms-4", PERMS, [], (42, 357, NONE), [(87, 123), (210, 234)]),
    ("perms-5", PERMS, [], (42, 123, R), [(87, 123)]),
    ("perms-5", PERMS, [], (165, 234, W), [(210, 234)]),
    ("inval-1", INVAL, [], (42, 123, RW), [(87, 123)]),
    ("inval-2", INVAL, [(103, 3)], (42, 61, RW), [(87, 61)]),
    ("inval-3", INVAL, [(103, 3)], (42, 123, RW), ([(103, 3)], [])),
    ("inval-4", INVAL, [(103, 3)], (106, 59, RW), [(151, 59)]),
    ("inval-5", INVAL, ["all"], (42, 123, RW), ([(42, 123)], [])),
    # vm-memory fails here.
    ("nothing-in-a-forbidding-entry", READ_ONLY, [], (0x1800, 0, W), []),
    ("nothing-at-its-start", READ_ONLY, [], (0x1000, 0, W), []),
    ("nothing-at-its-end", READ_ONLY, [], (0x2000, 0, W), []),
    ("nothing-in-a-hole", READ_ONLY, [], (0x5000, 0, RW), []),
    (
        "misses-and-refusals",
        WITH_A_HOLE,
        [],
        (0x800, 0x4000, W),
        ([(0x800, 0x800), (0x2000, 0x1000), (0x4000, 0x800)], [(0x1000, 0x1000)]),
    ),
    ("a-hole", WITH_A_HOLE, [], (0x1000, 0x3000, R), ([(0x2000, 0x1000)], [])),
    (
        "replaced-within",
        SPLIT,
        [],
        (0x1000, 0x1000, R),
        [(0x8000, 0x400), (0x9000, 0x100), (0x8500, 0xB00)],
    ),
    (
        "replaced-within-by-more-rights",
        SPLIT,
        [],
        (0x1000, 0x1000, W),
        ([], [(0x1000, 0x400), (0x1500, 0xB00)]),
    ),
    ("put-back", [*SPLIT, (0x1400, 0x100, 0x8400, R)], [], (0x1000, 0x1000, R), [(0x8000, 0x1000)]),
    (
        "put-back-and-continued",
        [*SPLIT, (0x1400, 0x100, 0x8400, R), (0x2000, 0x1000, 0x9000, RW)],
        [],
        (0x1000, 0x2000, R),
        [(0x8000, 0x1000), (0x9000, 0x1000)],
    ),
    ("target-wraps", WRAPPING, [], (0x1080, 0x100, R), [(0xFFFFFFFFFFFFFF80, 0x100)]),
    ("target-has-wrapped", WRAPPING, [], (0x1100, 0x10, R), [(0, 0x10)]),
    ("no-rights-needed", [(0, 0x10, 0x5000, NONE)], [], (0, 0x10, NONE), [(0x5000, 0x10)]),
    ("no-rights-granted", [(0, 0x10, 0x5000, NONE)], [], (0, 0x10, R), ([], [(0, 0x10)])),
    (
        "invalidated-at-both-ends",
        WRAPPING,
        [(0x1010, 0x10), (0x1100, 0x1000)],
        (0x1000, 0x200, R),
        ([(0x1010, 0x10), (0x1100, 0x100)], []),
    ),
]


@pytest.mark.parametrize(
    ("mappings", "invalidations", "lookup", "expected"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_lookups(mappings, invalidations, lookup, expected):
    iotlb = Iotlb()
    for iova, length, to, perm in mappings:
        iotlb.set_mapping(iova, to, length, perm)
    for what in invalidations:
        if what == "all":
            iotlb.invalidate_all()
        else:
            iotlb.invalidate_mapping(*what)
    assert outcome(iotlb, *lookup) == expected
    iotlb._map.check()
    _, status = iotlb.lookup_many([lookup[0]], [lookup[1]], lookup[2])
    if isinstance(expected, tuple):
        assert status[0] == (1 if expected[0] else 2)
    else:
        runs = all((a[0] + a[1]) % 2**64 == b[0] for a, b in pairwise(expected))
        assert status[0] == (0 if runs else 3)


@pytest.mark.parametrize(
    ("iova", "length", "fits"),
    [
        (0x1000, 0, False),
        (MAX, 2, False),
        (MAX - 0xFFF, 0x1000, True),
        (MAX - 0xFFF, 0xFFF, True),
        (MAX, 1, True),
        (0, 2**64, True),
        (1, 2**64, False),
    ],
)
def test_where_a_mapping_may_end(iova, length, fits):
    """x1 to x3: the original panics, and cannot map the last byte."""
    iotlb = Iotlb()
    if fits:
        iotlb.set_mapping(iova, 0x5000, length, RW)
        assert iotlb.lookup(iova, length, RW) == [MappedRange(0x5000, length)]
        assert list(iotlb) == [(IovaRange(iova, length), MappedRange(0x5000, length), RW)]
        iotlb.invalidate_mapping(iova, length)
        assert outcome(iotlb, iova, length, R) == ([IovaRange(iova, length)], [])
        return
    for refused in (
        lambda: iotlb.set_mapping(iova, 0x5000, length, RW),
        lambda: iotlb.invalidate_mapping(iova, length),
    ):
        with pytest.raises(ValueError, match=r"greater than 0|passes"):
            refused()
    if length:
        with pytest.raises(InvalidAddressError):
            iotlb.lookup(iova, length, R)
    assert len(iotlb) == 0
    assert iotlb.stats().invalidations == 0


def test_targets_of_batches_that_span_entries():
    """Contiguous, but split by different permissions: one target, that of the first byte."""
    iotlb = Iotlb()
    iotlb.set_mapping(0, 0x1000, 16, R)
    iotlb.set_mapping(16, 0x1010, 16, RW)
    targets, status = iotlb.lookup_many(np.array([4, 20, 4], np.uint64), 8, R)
    assert (targets.tolist(), status.tolist()) == ([0x1004, 0x1014, 0x1004], [0, 0, 0])
    targets, status = iotlb.lookup_many([4, 4, 4], [20, 28, 29], R)
    assert (targets.tolist(), status.tolist()) == ([0x1004, 0x1004, 0], [0, 0, 1])
    targets, status = iotlb.lookup_many([4], [20], W)
    assert (targets.tolist(), status.tolist()) == ([0], [2])


def test_every_range_of_the_space_can_be_mapped():
    """vm-memory panics at a length of 0 and at an end of 2**64."""
    top, iotlb = 2**64, Iotlb()
    for start, length in ((top - 1, 1), (top - 0x1000, 0x1000), (0, top)):
        iotlb.set_mapping(start, 0x5000, length, RW)
        assert iotlb.lookup(top - 1, 1, RW) == [((0x5000 + top - 1 - start) % top, 1)]
        iotlb.invalidate_mapping(top - 1, 1)
        with pytest.raises(IotlbFails) as caught:
            iotlb.lookup(top - 1, 1, R)
        assert caught.value.misses == [(top - 1, 1)]
        iotlb.invalidate_all()
    iotlb.set_mapping(0x1000, 0, 0x1000, RW)
    before = list(iotlb)
    for refused in (
        lambda: iotlb.set_mapping(0x1000, 0, 0, RW),
        lambda: iotlb.set_mapping(top - 1, 0, 2, RW),
        lambda: iotlb.invalidate_mapping(0x1000, 0),
        lambda: iotlb.invalidate_mapping(top - 1, 2),
        lambda: iotlb.lookup(top - 1, 2, R),
    ):
        with pytest.raises(ValueError, match=r"greater than 0|passes 2\*\*64"):
            refused()
    assert list(iotlb) == before
