"""Arithmetic on addresses, and the algebra of permissions."""

import itertools

import pytest

from guestio import InvalidAddressError, IovaRange, MappedRange, Permissions
from guestio.addr import (
    align_down,
    align_up,
    check_address,
    check_range,
    checked_add,
    checked_sub,
    overflowing_add,
    overflowing_sub,
)

MAX = 2**64 - 1

CASES = [
    (check_address, (0,), 0),
    (check_address, (MAX,), MAX),
    (checked_sub, (0x150, 0x100), 0x50),
    (checked_sub, (0x100, 0x150), None),
    (align_up, (0x128, 8), 0x128),
    (align_up, (0x128, 16), 0x130),
    (align_up, (MAX - 0x3FFF, 0x10000), None),
    (align_down, (0x5050, 0x100), 0x5000),
    (checked_add, (10, 10), 20),
    (overflowing_add, (10, 10), (20, False)),
    (checked_add, (MAX - 1, 1), MAX),
    (overflowing_add, (MAX - 1, 1), (MAX, False)),
    (checked_add, (MAX, 1), None),
    (overflowing_add, (MAX, 1), (0, True)),
    (checked_sub, (20, 10), 10),
    (checked_sub, (1, 1), 0),
    (checked_sub, (0, 1), None),
    (overflowing_sub, (0, 1), (MAX, True)),
]


@pytest.mark.parametrize(
    ("call", "args", "expected"),
    CASES,
    ids=lambda value: getattr(value, "__name__", None),
)
def test_arithmetic(call, args, expected):
    assert call(*args) == expected


@pytest.mark.parametrize("alignment", [12, 0, -8])
def test_alignment_must_be_a_power_of_two(alignment):
    """vm-memory panics here."""
    with pytest.raises(ValueError, match="power of two"):
        align_up(0x128, alignment)
    with pytest.raises(ValueError, match="power of two"):
        align_down(0x128, alignment)


def test_addresses_are_ints():
    """They compare and mask as integers do."""
    assert 0x300 == check_address(0x300) < check_address(0x301)
    assert check_address(0x5050) & 0xFF00 == 0x5000
    assert check_address(0x5050) | 0x0005 == 0x5055
    assert check_address(0x0FF0) & 0xF00F == 0
    assert check_address(0x0FF0) | 0xF00F == 0xFFFF


def test_permission_algebra():
    """Intersection, union, and what grants a write."""
    for p, q in itertools.product(map(Permissions, range(4)), repeat=2):
        assert p & p == p | p == p
        assert p & q == q & p
        assert p | q == q | p
        assert (Permissions.NONE & p, Permissions.READ_WRITE & p) == (Permissions.NONE, p)
        assert (Permissions.NONE | p, Permissions.READ_WRITE | p) == (p, Permissions.READ_WRITE)
    assert Permissions.READ & Permissions.WRITE == Permissions.NONE
    assert Permissions.READ | Permissions.WRITE == Permissions.READ_WRITE
    assert [p.allows(Permissions.WRITE) for p in map(Permissions, range(4))] == [
        False,
        False,
        True,
        True,
    ]
    names = ("NONE", "READ", "WRITE", "READ_WRITE")
    assert [int(Permissions[name]) for name in names] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("grant", "allowed"), [(0, {0}), (1, {0, 1}), (2, {0, 2}), (3, {0, 1, 2, 3})]
)
def test_what_a_grant_allows(grant, allowed):
    assert {a for a in range(4) if Permissions(grant).allows(Permissions(a))} == allowed


@pytest.mark.parametrize("bad", [True, False, 1.0, "1", None, b"1"])
def test_only_integers_are_addresses(bad):
    for call in (check_address, checked_add, align_up, overflowing_add):
        with pytest.raises(TypeError):
            call(bad) if call is check_address else call(bad, 1)
    with pytest.raises(TypeError):
        check_range(0, bad)


@pytest.mark.parametrize("bad", [-1, 2**64, 2**70])
def test_addresses_have_64_bits(bad):
    with pytest.raises(ValueError, match="not in"):
        check_address(bad)
    with pytest.raises(ValueError, match="not in"):
        check_range(bad, 1)


def test_ranges_end_at_the_end_of_the_space():
    assert check_range(MAX, 1) == (MAX, 1)
    assert check_range(0, 2**64) == (0, 2**64)
    with pytest.raises(InvalidAddressError, match="passes"):
        check_range(MAX, 2)
    with pytest.raises(ValueError, match="passes"):
        check_range(1, 2**64)


def test_ranges_show_hexadecimal_and_behave_as_tuples():
    assert repr(IovaRange(0x1000, 0x20)) == "IovaRange(0x1000, 0x20)"
    assert repr(MappedRange(0x1000, 2**64)) == "MappedRange(0x1000, 0x10000000000000000)"
    assert MappedRange(1, 2) == (1, 2)
    base, length = IovaRange(3, 4)
    assert (base, length) == (3, 4)
    assert min(IovaRange(5, 1), IovaRange(1, 9)).base == 1
