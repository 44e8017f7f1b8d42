"""Nonsense in the arguments of mappers, export sessions and their servers and clients."""

import socket

import numpy as np
import pytest

from guestio import GuestRegionCollection, Permissions
from guestio.iommu import BasicMemoryMapper, ExportClient, ExportedRegion, ExportServer, MappingInfo
from tests.kit.arguments import flags, numbers, refused

PAGE = 4096
R = Permissions.READ


def mapper():
    made = BasicMemoryMapper()
    made.add_range(0, PAGE, 0, R)
    return made


def session():
    return mapper().open_session()


def test_mappers():
    refused(
        lambda: BasicMemoryMapper,
        {"mask": PAGE, "time_limit": 1.0, "sibling": mapper()},
        may=[("time_limit", None), ("sibling", None), *large("time_limit")],
    )
    refused(lambda: MappingInfo, {"iova": 0, "gpa": 0, "size": PAGE, "prot": R}, may=WHOLE)
    refused(
        lambda: BasicMemoryMapper().add_range,
        {"iova": 0, "size": PAGE, "gpa": 0, "prot": R},
        may=WHOLE,
    )
    refused(lambda: mapper().add_map, {"info": MappingInfo(PAGE, 0, PAGE, R)})
    refused(lambda: mapper().remove_map, {"iova": 0, "size": PAGE}, may=WHOLE)
    refused(lambda: mapper().is_free, {"iova": 0, "size": PAGE}, may=WHOLE)
    refused(
        lambda: mapper().mappings,
        {"iova": 0, "size": PAGE, "limit": 3},
        may=[*WHOLE, ("limit", None), ("limit", 2**64)],
    )


WHOLE = [("size", 2**64)]  # from 0 that is all of the address space


def large(*names):
    """Times: any number that a thread can wait for, in whatever type."""
    return numbers(*names)


def test_sessions():
    refused(
        lambda: mapper().open_session,
        {"time_limit": 1.0},
        may=[("time_limit", None), *large("time_limit")],
    )
    refused(lambda: session().export, {"iova": PAGE - 16, "size": 16})
    refused(lambda: session().release, {"iova": 16, "size": 16})
    refused(lambda: session().hurry, {"seconds": 1.0}, may=large("seconds"))
    refused(lambda: session().move, {"mapper": None}, plain=False)
    with pytest.raises(ValueError, match="sibling"):
        session().move(mapper())
    refused(
        lambda: lambda broken: session().restore([], broken), {"broken": False}, may=flags("broken")
    )


def test_plain_integers_are_kept():
    info = MappingInfo(np.uint64(2**64 - PAGE), np.int64(0), np.uint32(PAGE), np.uint8(3))
    assert [type(n) for n in (info.iova, info.gpa, info.size)] == [int] * 3
    made = BasicMemoryMapper()
    made.add_map(info)
    assert made.mappings() == [(2**64 - PAGE, PAGE, 0, Permissions.READ_WRITE)]
    held = made.open_session()
    (piece,) = held.export(np.uint64(2**64 - 16), np.uint64(16))
    assert piece == (PAGE - 16, 16, Permissions.READ_WRITE)
    assert held.exports == [(2**64 - 16, 16)]


def test_remote():
    here, there = socket.socketpair()
    with there, here:
        refused(
            lambda: lambda sock, lookup: ExportServer(sock, lookup),
            {"sock": here, "lookup": {}.get},
            may=[("lookup", int)],
        )
        refused(
            lambda: lambda sock, timeout: ExportClient(sock, timeout=timeout).close(),
            {"sock": here, "timeout": 1.0},
            may=large("timeout"),
        )
    here, there = socket.socketpair()
    with there, ExportClient(here) as client:
        refused(lambda: client.mapper, {"endpoint": 3})
        remote = client.mapper(3)
        for name, call in (("export", remote.export), ("release", remote.release)):
            assert name
            refused(lambda call=call: call, {"iova": 16, "size": 1}, plain=False, may=WHOLE)


def test_exported_regions():
    physical = GuestRegionCollection.from_ranges([(0, PAGE)])
    holder = session()
    refused(
        lambda: lambda iova, size, physical: ExportedRegion(holder, iova, size, physical).close(),
        {"iova": 16, "size": 16, "physical": physical},
    )
    assert holder.exports == []
