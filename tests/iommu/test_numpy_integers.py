"""Addresses and lengths that are numpy's integers: the same outcome as with Python's.

Sums of those wrap, overflow or become floats, so none may enter arithmetic of ours, nor come back
in a result or an error.
"""

import itertools

import numpy as np
import pytest

from guestio import (
    GuestioError,
    GuestRegionCollection,
    Iommu,
    IommuMemory,
    Iotlb,
    MmapRegion,
    Permissions,
)
from guestio.iommu import BasicMemoryMapper
from guestio.memory import SliceMemory

R, RW = Permissions.READ, Permissions.READ_WRITE
PAGE, TOP = 0x1000, 2**64
TYPES = (np.uint64, np.int64, np.uint32, np.int16, np.uint8)
ADDRESSES = (0, 1, 0xFFF, PAGE, 0x2FFF, 0x3000, 0x3FFF, 0x4FFF, 2**63, TOP - PAGE, TOP - 1)
LENGTHS = (0, 1, 200, PAGE + 1)


class Identity(Iommu):
    iotlb = Iotlb()


Identity.iotlb.set_mapping(0, 0, 0x5000, RW)
Identity.iotlb.set_mapping(TOP - PAGE, 0, PAGE, R)
MEMORY = GuestRegionCollection.from_ranges([(0, PAGE), (0x3000, PAGE)])
HIGH = GuestRegionCollection.from_regions([MmapRegion.anonymous(TOP - PAGE, PAGE)])


MEMORIES = {
    "memory": MEMORY,
    "high": HIGH,
    "iommu": IommuMemory(MEMORY, Identity()),
    "slice": SliceMemory(MEMORY.whole_slice(0, PAGE, RW)),
}
CALLS = {
    "read": lambda m, a, n: m.read(a, n),
    "read_some": lambda m, a, n: m.read_some(a, bytearray(int(n))),
    "readinto": lambda m, a, n: m.readinto(a, bytearray(int(n))),
    "write": lambda m, a, n: m.write(a, bytes(int(n))),
    "write_some": lambda m, a, n: m.write_some(a, bytes(int(n))),
    "fill": lambda m, a, n: m.fill(a, n),
    "check_range": lambda m, a, n: m.check_range(a, n, R),
    "slices": lambda m, a, n: [len(piece) for piece in m.slices(a, n)],
    "gather": lambda m, a, n: m.gather(a, n, R).close(),
    "load": lambda m, a, n: m.load(a, 4),
    "store": lambda m, a, n: m.store(a, 0, 4),
}
PHYSICAL = {
    "to_region_addr": lambda m, a, n: (m.to_region_addr(a) or ())[1:],
    "host_address": lambda m, a, n: m.host_address(a),
    "check_address": lambda m, a, n: m.check_address(a),
    "checked_offset": lambda m, a, n: m.checked_offset(a, n),
    "regions_in": lambda m, a, n: m.regions_in(a, n),
    "whole_slice": lambda m, a, n: len(m.whole_slice(a, n, R)),
}


def mapper():
    made = BasicMemoryMapper()
    made.add_range(0, PAGE, 0x5000, RW)
    made.add_range(TOP - PAGE, PAGE, 0, R)
    return made


MAPPINGS = {
    "add_range": lambda m, a, n: (m.add_range(a, n, a, R), m.mappings()),
    "remove_map": lambda m, a, n: (m.remove_map(a, n), m.mappings()),
    "mappings": lambda m, a, n: m.mappings(a, n),
    "limited": lambda m, a, n: m.mappings(a, n, limit=n),
    "is_free": lambda m, a, n: m.is_free(a, n),
    "export": lambda m, a, n: m.open_session().export(a, n),
    "release": lambda m, a, n: m.open_session().release(a, n),
}


def outcome(call, *arguments):
    try:
        return repr(call(*arguments))
    except (GuestioError, TypeError, ValueError) as error:
        shown = {k: v for k, v in vars(error).items() if not k.startswith("_")}
        return repr((type(error), str(error), shown))


def variants(address, length):
    """The same numbers, one or both of them as each type that can hold them."""
    for kind, which in itertools.product(TYPES, (1, 2, 3)):
        limit = np.iinfo(kind).max
        if (which & 1 and address > limit) or (which & 2 and length > limit):
            continue
        yield (
            kind(address) if which & 1 else address,
            kind(length) if which & 2 else length,
        )


def agree(make, call):
    for address, length in itertools.product(ADDRESSES, LENGTHS):
        expected = outcome(call, make(), address, length)
        for variant in variants(address, length):
            assert outcome(call, make(), *variant) == expected, (address, length, variant)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_accesses(memory, call):
    agree(lambda: MEMORIES[memory], CALLS[call])


@pytest.mark.parametrize("call", PHYSICAL)
@pytest.mark.parametrize("memory", ["memory", "high"])
def test_physical_memory(memory, call):
    agree(lambda: MEMORIES[memory], PHYSICAL[call])


@pytest.mark.parametrize("call", MAPPINGS)
def test_mappers(call, caplog):
    agree(mapper, MAPPINGS[call])
