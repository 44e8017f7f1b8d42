"""Memory that is taken away from those who still use it, and leases that no one waits for."""

from __future__ import annotations

import os

import pytest

from guestio import Backing, GuestRegionCollection, Iotlb, MmapRegion, Permissions

PAGE = 4096


def file_of(pages: int) -> int:
    fd = os.memfd_create("cut")
    os.write(fd, b"\x11" * pages * PAGE)
    return fd


def test_users_of_a_range_that_was_cut_off_reach_the_file_no_more() -> None:
    fd = file_of(4)
    backing = Backing.from_fd(fd, 3 * PAGE, PAGE)
    memory = GuestRegionCollection.from_regions([MmapRegion(0, backing)])
    with memory.gather(0, 3 * PAGE, Permissions.READ_WRITE) as vector:
        backing.cut_off(PAGE, PAGE)
        assert vector.read() == b"\x11" * PAGE + bytes(PAGE) + b"\x11" * PAGE
        vector.write(b"\x22" * 3 * PAGE)
    kept = os.pread(fd, 4 * PAGE, 0)
    assert kept == b"\x11" * PAGE + b"\x22" * PAGE + b"\x11" * PAGE + b"\x22" * PAGE
    assert Backing.from_fd(fd, PAGE, 2 * PAGE).vanished is None


def test_whole_pages_are_cut_off() -> None:
    fd = file_of(3)
    backing = Backing.from_fd(fd, 3 * PAGE)
    backing.cut_off(PAGE - 1, 2)
    backing.cut_off(0, 0)
    memory = GuestRegionCollection.from_regions([MmapRegion(0, backing)])
    assert memory.read(0, 3 * PAGE) == bytes(2 * PAGE) + b"\x11" * PAGE


def test_what_cannot_be_cut_off() -> None:
    backing = Backing.from_fd(file_of(1), PAGE)
    for offset, length in ((0, PAGE + 1), (PAGE + 1, 0), (2**63, 1)):
        with pytest.raises(ValueError):
            backing.cut_off(offset, length)
    backing.close()
    with pytest.raises(ValueError):
        backing.cut_off(0, PAGE)
    with pytest.raises(ValueError):
        Backing.anonymous(PAGE).cut_off(0, PAGE)


def test_leases_that_were_abandoned_are_not_waited_for() -> None:
    iotlb = Iotlb()
    iotlb.set_mapping(0, 0, 4 * PAGE, Permissions.READ)
    held = iotlb.guard(PAGE - 1, 2, Permissions.READ)
    other = iotlb.guard(3 * PAGE, 1, Permissions.READ)
    assert iotlb._map.leases.abandon(2 * PAGE, PAGE) == []
    with pytest.raises(RuntimeError):
        iotlb.drain(0, PAGE, timeout=0)
    assert iotlb._map.leases.abandon(0, PAGE) == [(PAGE - 1, PAGE)]
    assert iotlb.drain(0, 2 * PAGE, timeout=0)
    # Not a second time; and one that is taken later counts.
    assert iotlb._map.leases.abandon(0, PAGE) == []
    again = iotlb.guard(0, 1, Permissions.READ)
    assert sorted(iotlb._map.leases.abandon(0, 4 * PAGE)) == [(0, 0), (3 * PAGE, 3 * PAGE)]
    for guard in (held, other, again):
        guard.close()
    assert len(iotlb._map.leases) == 0
