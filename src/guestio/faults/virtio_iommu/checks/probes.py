"""PROBE and its properties."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Final, NamedTuple

from guestio.faults.report import Severity
from guestio.faults.virtio_iommu.catalogue import iommu, register
from guestio.faults.virtio_iommu.trial import DOMAIN, PHYS, RW, TAIL, IommuTrial
from guestio.virtio.iommu import Status, wire

_PROBE: Final = iommu("6.7.2, Device Requirements: PROBE request")
_RESERVED: Final = iommu("6.8.1.2, Device Requirements: Property RESV_MEM")
_HEAD: Final = 4
_RESV_MEM: Final = 1


class _Property(NamedTuple):
    kind: int
    reserved: int
    value: bytes


class _Region(NamedTuple):
    first: int
    last: int
    subtype: int
    reserved: bytes


def _properties(t: IommuTrial) -> tuple[list[_Property], bytes]:
    """The properties of an endpoint, and what lies behind them."""
    t.need(wire.F_PROBE, "PROBE")
    t.begin()
    (endpoint,) = t.endpoints()
    listed = t.succeeds(wire.Probe(endpoint)).data[:-TAIL]
    found: list[_Property] = []
    at = 0
    while at + _HEAD <= len(listed):
        kind, length = struct.unpack_from("<HH", listed, at)
        if not kind & 0xFFF:
            break
        end = at + _HEAD + length
        t.expect(end <= len(listed), f"the property at {at} has {length} bytes, beyond the list")
        found.append(_Property(kind & 0xFFF, kind >> 12, listed[at + _HEAD : end]))
        at = end
    return found, listed[at:]


def _regions(t: IommuTrial) -> list[_Region]:
    """The reserved regions of an endpoint; the check is skipped if there are none."""
    found = []
    for each in _properties(t)[0]:
        if each.kind == _RESV_MEM:
            t.expect(len(each.value) >= 20, f"a RESV_MEM property has {len(each.value)} bytes")
            subtype, reserved, first, last = struct.unpack_from("<B3sQQ", each.value)
            found.append(_Region(first, last, subtype, reserved))
    if not found:
        t.skip("the endpoint has no reserved memory")
    return found


@register("probe.answer", _PROBE, "PROBE is answered with a list of whole properties.")
def _answer(t: IommuTrial) -> None:
    _properties(t)


@register("probe.reserved", _PROBE, "The reserved bytes of PROBE are ignored.")
def _reserved(t: IommuTrial) -> None:
    t.need(wire.F_PROBE, "PROBE")
    t.begin()
    (endpoint,) = t.endpoints()
    request = wire.pack(wire.Probe(endpoint))
    answer = t.raw(request[:-64] + b"\xff" * 64, t.probe_size + TAIL)
    t.expect(answer.status == Status.OK, f"answered with {answer}")


@register(
    "probe.no-endpoint",
    _PROBE,
    "PROBE of an endpoint that does not exist should get NOENT.",
    severity=Severity.SHOULD,
)
def _no_endpoint(t: IommuTrial) -> None:
    t.need(wire.F_PROBE, "PROBE")
    t.begin()
    t.refused(wire.Probe(t.absent_endpoint()), Status.NOENT)


@register(
    "probe.wide-endpoint",
    _PROBE,
    "PROBE of an endpoint whose number differs in the upper 16 bits should get NOENT.",
    severity=Severity.SHOULD,
)
def _wide(t: IommuTrial) -> None:
    t.need(wire.F_PROBE, "PROBE")
    t.begin()
    (endpoint,) = t.endpoints()
    t.refused(wire.Probe(endpoint | 0x10000), Status.NOENT)


@register(
    "probe.not-offered",
    _PROBE,
    "PROBE should have a zero-length answer if it is not offered.",
    severity=Severity.SHOULD,
)
def _not_offered(t: IommuTrial) -> None:
    if t.offered & wire.F_PROBE:
        t.skip("PROBE is offered")
    t.begin()
    (endpoint,) = t.endpoints()
    answer = t.raw(wire.pack(wire.Probe(endpoint)), 512 + TAIL)
    t.expect(answer.written == 0, f"answered with {answer}")


@register(
    "probe.property-reserved",
    _PROBE,
    "The reserved bits of a property should be zero.",
    severity=Severity.SHOULD,
)
def _property_reserved(t: IommuTrial) -> None:
    for each in _properties(t)[0]:
        t.expect(not each.reserved, f"they are {each.reserved:#x} in one of type {each.kind}")


@register(
    "probe.rest",
    _PROBE,
    "What the properties leave of the list should be zero.",
    severity=Severity.SHOULD,
)
def _rest(t: IommuTrial) -> None:
    t.expect(not any(_properties(t)[1]), "the rest is not zero")


@register(
    "probe.little-room",
    _PROBE,
    "PROBE with room for less than probe_size should get INVAL, and no property.",
    severity=Severity.SHOULD,
)
def _little_room(t: IommuTrial) -> None:
    t.need(wire.F_PROBE, "PROBE")
    t.begin()
    (endpoint,) = t.endpoints()
    for missing in (1, t.probe_size // 2, t.probe_size):
        room = t.probe_size - missing + TAIL
        answer = t.raw(wire.pack(wire.Probe(endpoint)), room)
        t.expect(
            answer.written == room and answer.status == Status.INVAL,
            f"with {missing} bytes less: {answer}, {answer.written} of {room} bytes written",
        )
        t.expect(not any(answer.data[:-TAIL]), f"with {missing} bytes less: a property is there")


@register(
    "resv-mem.reserved",
    _RESERVED,
    "The reserved bytes of RESV_MEM should be zero.",
    severity=Severity.SHOULD,
)
def _resv_reserved(t: IommuTrial) -> None:
    for region in _regions(t):
        t.expect(not any(region.reserved), f"they are {region.reserved.hex()}")


@register(
    "resv-mem.one-msi",
    _RESERVED,
    "An endpoint should have no more than one MSI region.",
    severity=Severity.SHOULD,
)
def _one_msi(t: IommuTrial) -> None:
    count = sum(region.subtype == wire.RESV_MEM_MSI for region in _regions(t))
    t.expect(count <= 1, f"there are {count}")


@register(
    "resv-mem.overlap",
    _RESERVED,
    "Reserved regions of an endpoint should not overlap.",
    severity=Severity.SHOULD,
)
def _overlap(t: IommuTrial) -> None:
    regions = sorted(_regions(t))
    for low, high in pairwise(regions):
        t.expect(low.last < high.first, f"{low.first:#x} and {high.first:#x} do")


@register(
    "resv-mem.map",
    _RESERVED,
    "MAP that overlaps a reserved region should be rejected.",
    severity=Severity.SHOULD,
)
def _map(t: IommuTrial) -> None:
    regions = _regions(t)
    (endpoint,) = t.endpoints()
    t.attach(endpoint)
    page = t.page
    for region in regions:
        inside = region.first // page * page
        for first, count in ((inside, 1), (inside - page, 2)):
            if first < 0:
                continue
            answer = t.ask(wire.Map(DOMAIN, first, first + count * page - 1, PHYS, RW))
            t.expect(answer.status != Status.OK, f"{count} pages at {first:#x} are mapped")
