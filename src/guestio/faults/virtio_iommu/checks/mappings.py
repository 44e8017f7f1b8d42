"""MAP and UNMAP: what is refused, and what endpoints reach."""

from __future__ import annotations

import struct
from functools import partial
from typing import Final

from guestio.faults.report import Severity
from guestio.faults.virtio_iommu.catalogue import hostile, iommu, register
from guestio.faults.virtio_iommu.trial import DOMAIN, IOVA, PHYS, RW, IommuTrial, R, W
from guestio.virtio.iommu import Status, wire

_MAP: Final = iommu("6.5.2, Device Requirements: MAP request")
_MAPPING: Final = iommu("6.5, MAP request")
_UNMAP: Final = iommu("6.6.2, Device Requirements: UNMAP request")
_UNMAPPING: Final = iommu("6.6, UNMAP request")
_RANGES: Final = iommu("6, Device operations")
_LAST: Final = (1 << 64) - 1


def _attached(t: IommuTrial, **options: bool) -> int:
    """An endpoint that is attached to the domain, which is empty."""
    t.begin(**options)
    (endpoint,) = t.endpoints()
    t.attach(endpoint)
    return endpoint


def _reaching(t: IommuTrial) -> int:
    """As :func:`_attached`; the endpoint can be made to access memory."""
    t.need_dma()
    return _attached(t)


# MAP


@register("map.translates", _MAPPING, "An access reaches the address that the mapping leads to.")
def _translates(t: IommuTrial) -> None:
    endpoint = _reaching(t)
    t.map(IOVA, 4 * t.page, PHYS + 8 * t.page)
    for offset in (0, 1, t.page - 1, 4 * t.page - 64, t.random.randrange(3 * t.page)):
        phys = PHYS + 8 * t.page + offset
        t.expect(t.reads(endpoint, IOVA + offset, phys), f"a read at offset {offset:#x} does not")
        t.expect(t.writes(endpoint, IOVA + offset, phys), f"a write at offset {offset:#x} does not")


@register("map.adjoining", _MAPPING, "An access may lie in mappings that adjoin.")
def _adjoining(t: IommuTrial) -> None:
    endpoint = _reaching(t)
    t.map(IOVA, t.page, PHYS)
    t.map(IOVA + t.page, t.page, PHYS + t.page)
    at = t.page - 32
    t.expect(t.writes(endpoint, IOVA + at, PHYS + at, 64), "a write across them does not arrive")
    t.expect(t.reads(endpoint, IOVA + at, PHYS + at, 64), "a read across them does not arrive")


@register("map.bounds", _MAPPING, "Nothing beside a mapping is reached.")
def _bounds(t: IommuTrial) -> None:
    endpoint = _reaching(t)
    t.map(IOVA, t.page, PHYS + t.page)
    for where, iova in (
        ("before", IOVA - 64),
        ("just before", IOVA - 1),
        ("just behind", IOVA + t.page),
        ("behind", IOVA + 3 * t.page),
    ):
        phys = PHYS + t.page + iova - IOVA
        length = 1 if where.startswith("just") else 64
        reached = any(t.writes(endpoint, iova, phys, length) for _ in range(3))
        t.expect(not reached, f"a write {where} the mapping arrives")


@register("map.read-only", _MAP, "What is mapped without WRITE is not written.")
def _read_only(t: IommuTrial) -> None:
    endpoint = _reaching(t)
    t.map(IOVA, t.page, PHYS, R)
    t.expect(t.reads(endpoint, IOVA, PHYS), "a read does not arrive")
    t.expect(not t.writes(endpoint, IOVA, PHYS), "a write arrives")


@register("map.write-only", _MAPPING, "What is mapped with WRITE alone is written.")
def _write_only(t: IommuTrial) -> None:
    endpoint = _reaching(t)
    answer = t.ask(wire.Map(DOMAIN, IOVA, IOVA + t.page - 1, PHYS, W))
    if answer.status != Status.OK:
        t.reject(f"write-only mappings are answered with {answer}")
    t.expect(t.writes(endpoint, IOVA, PHYS), "a write does not arrive")


@register("map.no-access", _MAP, "What is mapped without READ and WRITE is not written.")
def _no_access(t: IommuTrial) -> None:
    endpoint = _reaching(t)
    answer = t.ask(wire.Map(DOMAIN, IOVA, IOVA + t.page - 1, PHYS, 0))
    if answer.status != Status.OK:
        t.reject(f"answered with {answer}")
    t.expect(not t.writes(endpoint, IOVA, PHYS), "a write arrives")
    t.expect(not t.reads(endpoint, IOVA, PHYS), "a read arrives")


def _unaligned(start: int, end: int, phys: int, t: IommuTrial) -> None:
    _attached(t)
    request = wire.Map(DOMAIN, IOVA + start, IOVA + t.page - 1 + end, PHYS + phys, RW)
    t.refused(request, Status.RANGE)


for _name, _what, _by in (
    ("start", "virt_start", (1, 0, 0)),
    ("end", "virt_end + 1", (0, 1, 0)),
    ("half", "virt_end + 1", (0, -2048, 0)),
    ("physical", "phys_start", (0, 0, 2048)),
):
    register(
        f"map.unaligned-{_name}",
        _MAP,
        f"MAP with {_what} that is not a multiple of the granularity should get RANGE.",
        severity=Severity.SHOULD,
    )(partial(_unaligned, *_by))


def _overlapping(first: int, count: int, t: IommuTrial) -> None:
    """A MAP of pages that meets another of pages 4 to 7."""
    _attached(t)
    page = t.page
    t.map(IOVA + 4 * page, 4 * page, PHYS)
    start = IOVA + first * page
    t.refused(wire.Map(DOMAIN, start, start + count * page - 1, PHYS, RW), Status.INVAL)
    t.expect(t.is_mapped(IOVA + 4 * page, 4 * page), "the mapping of before is gone")
    if first < 4:
        t.expect(not t.is_mapped(start, page), "a part of what was refused is mapped")


for _name, _first, _count in (
    ("same", 4, 4),
    ("inside", 5, 1),
    ("around", 3, 6),
    ("begin", 3, 2),
    ("end", 7, 2),
):
    register(
        f"map.overlap-{_name}",
        _MAP,
        f"MAP where something is mapped should get INVAL: {_name}.",
        severity=Severity.SHOULD,
    )(partial(_overlapping, _first, _count))


@register("map.unknown-flag", _MAP, "MAP with a flag that is not known gets INVAL.")
def _unknown_flag(t: IommuTrial) -> None:
    _attached(t)
    for flags in (8, 0x80000000, 0xFFFFFFF8):
        t.refused(wire.Map(DOMAIN, IOVA, IOVA + t.page - 1, PHYS, RW | flags), Status.INVAL)
    t.expect(not t.is_mapped(IOVA, t.page), "it is mapped nevertheless")


@register("map.mmio-not-negotiated", _MAP, "MAP with MMIO gets INVAL if that was not accepted.")
def _mmio_not_negotiated(t: IommuTrial) -> None:
    t.begin(without=wire.F_MMIO)
    (endpoint,) = t.endpoints()
    t.attach(endpoint)
    flags = RW | wire.MAP_F_MMIO
    t.refused(wire.Map(DOMAIN, IOVA, IOVA + t.page - 1, PHYS, flags), Status.INVAL)


@register("map.mmio", _MAPPING, "MAP with MMIO is done if the feature was accepted.")
def _mmio(t: IommuTrial) -> None:
    t.need(wire.F_MMIO, "MMIO")
    _attached(t)
    t.map(IOVA, t.page, 0xFEB00000, RW | wire.MAP_F_MMIO)
    t.unmap(IOVA, t.page)


@register(
    "map.no-domain",
    _MAP,
    "MAP in a domain that does not exist should get NOENT.",
    severity=Severity.SHOULD,
)
def _no_domain(t: IommuTrial) -> None:
    t.begin()
    t.refused(wire.Map(DOMAIN, IOVA, IOVA + t.page - 1, PHYS, RW), Status.NOENT)


@register(
    "map.bypass-domain",
    _MAP,
    "MAP in a bypass domain should get INVAL.",
    severity=Severity.SHOULD,
)
def _bypass_domain(t: IommuTrial) -> None:
    t.need(wire.F_BYPASS_CONFIG, "BYPASS_CONFIG")
    t.begin()
    (endpoint,) = t.endpoints()
    t.attach(endpoint, DOMAIN, wire.ATTACH_F_BYPASS)
    t.refused(wire.Map(DOMAIN, IOVA, IOVA + t.page - 1, PHYS, RW), Status.INVAL)


@register("map.input-range", _RANGES, "MAP outside of the input range fails.")
def _input_range(t: IommuTrial) -> None:
    t.need(wire.F_INPUT_RANGE, "INPUT_RANGE")
    _attached(t)
    first, last = struct.unpack_from("<QQ", t.carrier.config(), 8)
    page = t.page
    outside = []
    if first >= page:
        outside += [(first - page, first - 1), (first - page, first + page - 1)]
    if last < _LAST - page:
        outside += [(last + 1, last + page), (last + 1 - page, last + page)]
    if not outside:
        t.skip("the input range is all of 64 bits")
    for start, end in outside:
        answer = t.ask(wire.Map(DOMAIN, start, end, PHYS, RW))
        t.expect(answer.status != Status.OK, f"{start:#x} to {end:#x} is mapped")


@register("map.edges", _RANGES, "The first and the last page of the input range can be mapped.")
def _edges(t: IommuTrial) -> None:
    _attached(t)
    first, last = 0, _LAST
    if t.offered & wire.F_INPUT_RANGE:
        first, last = struct.unpack_from("<QQ", t.carrier.config(), 8)
    for start in (-(-first // t.page) * t.page, (last + 1) // t.page * t.page - t.page):
        t.map(start, t.page, PHYS)
        t.unmap(start, t.page)


@register("map.many", _MAPPING, "A domain may have a thousand mappings.")
def _many(t: IommuTrial) -> None:
    _attached(t)
    page = t.page
    for batch in range(34):
        requests = [
            wire.pack(wire.Map(DOMAIN, at, at + page - 1, PHYS, RW))
            for at in range(IOVA + batch * 60 * page, IOVA + (batch + 1) * 60 * page, 2 * page)
        ]
        answers = t.driver.ask_all([([each], [wire.TAIL_BYTES]) for each in requests])
        bad = [str(answer) for answer in answers if answer.status != Status.OK]
        t.expect(not bad, f"MAP {batch * 30} or later is answered with {bad[:1]}")
    t.unmap(IOVA, 34 * 60 * page)
    t.expect(not t.is_mapped(IOVA, page), "one is left")


@hostile("map.no-memory", _MAPPING, "MAP of what is no guest memory does no harm.")
def _no_memory(t: IommuTrial) -> None:
    endpoint = _attached(t)
    answer = t.ask(wire.Map(DOMAIN, IOVA, IOVA + t.page - 1, 1 << 50, RW))
    if answer.status != Status.OK:
        t.reject(f"answered with {answer}")
    if t.carrier.has_dma:
        t.carrier.dma_read(endpoint, IOVA, 64)
        t.carrier.dma_write(endpoint, IOVA, 64)
    t.unmap(IOVA, t.page)


@hostile("map.inverted", _MAPPING, "MAP that ends before it begins is refused.")
def _inverted(t: IommuTrial) -> None:
    _attached(t)
    answer = t.ask(wire.Map(DOMAIN, IOVA + 2 * t.page, IOVA + t.page - 1, PHYS, RW))
    t.expect(answer.status != Status.OK, "answered with OK")


@hostile(
    "map.inverted-unmapped",
    _UNMAPPING,
    "MAP that ends before it begins, and UNMAP of everything, do not stop the device.",
)
def _inverted_unmapped(t: IommuTrial) -> None:
    _attached(t)
    t.ask(wire.Map(DOMAIN, IOVA + 2 * t.page, IOVA + t.page - 1, PHYS, RW))
    t.ask(wire.Unmap(DOMAIN, 0, _LAST, bytes(4)))
    t.ask(wire.Unmap(DOMAIN, IOVA, IOVA + 4 * t.page - 1, bytes(4)))


@hostile("map.wraps", _MAPPING, "MAP whose physical range passes 2**64 does no harm.")
def _wraps(t: IommuTrial) -> None:
    endpoint = _attached(t)
    answer = t.ask(wire.Map(DOMAIN, IOVA, IOVA + 2 * t.page - 1, (1 << 64) - t.page, RW))
    if answer.status != Status.OK:
        t.reject(f"answered with {answer}")
    if t.carrier.has_dma:
        t.carrier.dma_write(endpoint, IOVA + t.page, 64)
    t.unmap(IOVA, 2 * t.page)


# UNMAP


@register(
    "unmap.nothing",
    _UNMAP,
    "UNMAP where nothing is mapped should be answered OK.",
    severity=Severity.SHOULD,
)
def _nothing(t: IommuTrial) -> None:
    _attached(t)
    t.unmap(IOVA, 5 * t.page)


def _unmapped(mapped: tuple[tuple[int, int], ...], first: int, last: int, t: IommuTrial) -> None:
    """UNMAP of pages first to last, of a domain with these mappings; those in it are removed."""
    _attached(t)
    page = t.page
    for low, high in mapped:
        t.map(IOVA + low * page, (high - low + 1) * page, PHYS)
    t.unmap(IOVA + first * page, (last - first + 1) * page)
    for low, high in mapped:
        there = t.is_mapped(IOVA + low * page, (high - low + 1) * page)
        gone = first <= low and high <= last
        t.expect(there != gone, f"pages {low} to {high} are {'still' if there else 'not'} mapped")


for _name, _text, _mapped, _first, _last in (
    ("one", "a mapping is removed", ((0, 9),), 0, 9),
    ("two", "both mappings in it are removed", ((0, 4), (5, 9)), 0, 9),
    ("first", "a neighbor that is not in it stays", ((0, 4), (5, 9)), 0, 4),
    ("spill", "it may be larger than the mapping", ((0, 4),), 0, 9),
    ("gap", "there may be a gap in it", ((0, 4), (10, 14)), 0, 14),
):
    register(
        f"unmap.{_name}",
        _UNMAPPING,
        f"UNMAP removes all mappings in its range: {_text}.",
    )(partial(_unmapped, _mapped, _first, _last))


def _split(first: int, last: int, t: IommuTrial) -> None:
    """UNMAP of pages first to last, where 0 to 9 are one mapping."""
    _attached(t)
    page = t.page
    t.map(IOVA, 10 * page, PHYS)
    request = wire.Unmap(DOMAIN, IOVA + first * page, IOVA + (last + 1) * page - 1, bytes(4))
    t.refused(request, Status.RANGE)
    t.expect(t.is_mapped(IOVA, 10 * page), "the mapping is gone")


for _name, _first, _last in (("begin", 0, 4), ("middle", 3, 5), ("end", 5, 9), ("beyond", 5, 14)):
    register(
        f"unmap.split-{_name}",
        _UNMAP,
        f"UNMAP that would split a mapping should get RANGE: at its {_name}.",
        severity=Severity.SHOULD,
    )(partial(_split, _first, _last))


@register(
    "unmap.split-removes-none",
    _UNMAP,
    "UNMAP that would split a mapping should remove none, not even one that it covers.",
    severity=Severity.SHOULD,
)
def _split_none(t: IommuTrial) -> None:
    _attached(t)
    page = t.page
    t.map(IOVA, 2 * page, PHYS)
    t.map(IOVA + 2 * page, 4 * page, PHYS)
    t.ask(wire.Unmap(DOMAIN, IOVA, IOVA + 4 * page - 1, bytes(4)))
    t.expect(t.is_mapped(IOVA + 2 * page, 4 * page), "the mapping that it splits is gone")
    t.expect(t.is_mapped(IOVA, 2 * page), "the mapping that it covers is gone")


@register("unmap.reach", _UNMAPPING, "What is unmapped is not reached any more.")
def _reach(t: IommuTrial) -> None:
    endpoint = _reaching(t)
    t.map(IOVA, 2 * t.page, PHYS)
    for offset in (0, t.page):
        t.expect(t.writes(endpoint, IOVA + offset, PHYS + offset), "a write does not arrive before")
        t.expect(t.reads(endpoint, IOVA + offset, PHYS + offset), "a read does not arrive before")
    t.unmap(IOVA, 2 * t.page)
    for offset in (0, t.page):
        t.expect(not t.writes(endpoint, IOVA + offset, PHYS + offset), "a write arrives")
        t.expect(not t.reads(endpoint, IOVA + offset, PHYS + offset), "a read arrives")


@register("unmap.again", _UNMAPPING, "What was unmapped can be mapped elsewhere, and leads there.")
def _again(t: IommuTrial) -> None:
    endpoint = _reaching(t)
    for number in range(4):
        phys = PHYS + number * t.page
        t.map(IOVA, t.page, phys)
        t.expect(t.writes(endpoint, IOVA, phys), f"a write does not arrive, the {number}. time")
        t.unmap(IOVA, t.page)


@register("unmap.all", _UNMAPPING, "UNMAP of all 64 bits removes everything.")
def _all(t: IommuTrial) -> None:
    _attached(t)
    for at in (IOVA, 1 << 30, 1 << 38):
        t.map(at, t.page, PHYS)
    t.succeeds(wire.Unmap(DOMAIN, 0, _LAST, bytes(4)))
    for at in (IOVA, 1 << 30, 1 << 38):
        t.expect(not t.is_mapped(at, t.page), f"{at:#x} is still mapped")


@register(
    "unmap.reserved",
    _UNMAP,
    "UNMAP with reserved bytes that are not zero may get INVAL, and no other failure.",
    severity=Severity.SHOULD,
)
def _reserved(t: IommuTrial) -> None:
    _attached(t)
    t.map(IOVA, t.page, PHYS)
    answer = t.ask(wire.Unmap(DOMAIN, IOVA, IOVA + t.page - 1, b"\1\0\0\0"))
    t.expect(answer.status in {Status.OK, Status.INVAL}, f"answered with {answer}")


@register(
    "unmap.no-domain",
    _UNMAP,
    "UNMAP in a domain that does not exist should get NOENT.",
    severity=Severity.SHOULD,
)
def _unmap_no_domain(t: IommuTrial) -> None:
    t.begin()
    t.refused(wire.Unmap(DOMAIN, IOVA, IOVA + t.page - 1, bytes(4)), Status.NOENT)


@register(
    "unmap.bypass-domain",
    _UNMAP,
    "UNMAP in a bypass domain should get INVAL.",
    severity=Severity.SHOULD,
)
def _unmap_bypass(t: IommuTrial) -> None:
    t.need(wire.F_BYPASS_CONFIG, "BYPASS_CONFIG")
    t.begin()
    (endpoint,) = t.endpoints()
    t.attach(endpoint, DOMAIN, wire.ATTACH_F_BYPASS)
    t.refused(wire.Unmap(DOMAIN, IOVA, IOVA + t.page - 1, bytes(4)), Status.INVAL)


@hostile("unmap.inverted", _UNMAPPING, "UNMAP that ends before it begins removes nothing.")
def _unmap_inverted(t: IommuTrial) -> None:
    _attached(t)
    t.map(IOVA, 4 * t.page, PHYS)
    answer = t.ask(wire.Unmap(DOMAIN, IOVA + 4 * t.page, IOVA - 1, bytes(4)))
    t.expect(t.is_mapped(IOVA, 4 * t.page), f"the mapping is gone; answered with {answer}")
