"""ATTACH and DETACH."""

from __future__ import annotations

import struct
from typing import Final

from guestio.faults.report import Severity
from guestio.faults.virtio_iommu.catalogue import hostile, iommu, register
from guestio.faults.virtio_iommu.trial import DOMAIN, IOVA, OTHER, PHYS, IommuTrial
from guestio.virtio.iommu import Status, wire

_ATTACH: Final = iommu("6.3.2, Device Requirements: ATTACH request")
_ATTACHING: Final = iommu("6.3, ATTACH request")
_DETACH: Final = iommu("6.4.2, Device Requirements: DETACH request")
_DETACHING: Final = iommu("6.4, DETACH request")
_RANGES: Final = iommu("6, Device operations")
_BYPASS: Final = wire.ATTACH_F_BYPASS


@register("attach.creates", _ATTACHING, "ATTACH creates a domain that does not exist.")
def _creates(t: IommuTrial) -> None:
    t.begin()
    (endpoint,) = t.endpoints()
    t.expect(not t.exists(DOMAIN), "the domain is there before")
    t.attach(endpoint)
    t.expect(t.exists(DOMAIN), "the domain is not there")


@register("attach.reserved", _ATTACH, "ATTACH with reserved bytes that are not zero gets INVAL.")
def _reserved(t: IommuTrial) -> None:
    t.begin()
    (endpoint,) = t.endpoints()
    for reserved in (b"\1\0\0\0", b"\0\0\0\x80"):
        t.refused(wire.Attach(DOMAIN, endpoint, 0, reserved), Status.INVAL)
    t.expect(not t.exists(DOMAIN), "the domain was created")


@register("attach.unknown-flag", _ATTACH, "ATTACH with a flag that is not known gets INVAL.")
def _flag(t: IommuTrial) -> None:
    t.begin()
    (endpoint,) = t.endpoints()
    for flags in (2, 0x80000000, 0xFFFFFFFE):
        t.refused(wire.Attach(DOMAIN, endpoint, flags, bytes(4)), Status.INVAL)
    t.expect(not t.exists(DOMAIN), "the domain was created")


@register(
    "attach.flag-not-negotiated",
    _ATTACH,
    "ATTACH with BYPASS gets INVAL if BYPASS_CONFIG was not accepted.",
)
def _flag_not_negotiated(t: IommuTrial) -> None:
    t.begin(without=wire.F_BYPASS_CONFIG, bypass=None)
    (endpoint,) = t.endpoints()
    t.refused(wire.Attach(DOMAIN, endpoint, _BYPASS, bytes(4)), Status.INVAL)


@register("attach.no-endpoint", _ATTACH, "ATTACH of an endpoint that does not exist gets NOENT.")
def _no_endpoint(t: IommuTrial) -> None:
    t.begin()
    t.refused(wire.Attach(DOMAIN, t.absent_endpoint(), 0, bytes(4)), Status.NOENT)


@register(
    "attach.wide-endpoint",
    _ATTACH,
    "An endpoint's number has 32 bits: ATTACH of one that differs in the upper ones gets NOENT.",
)
def _wide(t: IommuTrial) -> None:
    t.begin()
    (endpoint,) = t.endpoints()
    t.refused(wire.Attach(DOMAIN, endpoint | 0x10000, 0, bytes(4)), Status.NOENT)


@register(
    "attach.second-endpoint",
    _ATTACH,
    "A second endpoint may be attached to a domain; otherwise it gets UNSUPP.",
)
def _second(t: IommuTrial) -> None:
    t.begin()
    first, second = t.endpoints(2)
    t.attach(first)
    answer = t.ask(wire.Attach(DOMAIN, second, 0, bytes(4)))
    if answer.status == Status.UNSUPP:
        t.reject("UNSUPP")
    t.expect(answer.status == Status.OK, f"answered with {answer}")


@register("attach.shared", iommu("6.5, MAP request"), "All endpoints of a domain reach a mapping.")
def _shared(t: IommuTrial) -> None:
    t.need_dma()
    t.begin()
    endpoints = t.endpoints(2)
    t.attach(endpoints[0])
    if t.ask(wire.Attach(DOMAIN, endpoints[1], 0, bytes(4))).status == Status.UNSUPP:
        t.skip("a second endpoint cannot be attached")
    t.map(IOVA, t.page, PHYS)
    for endpoint in endpoints:
        t.expect(t.writes(endpoint, IOVA, PHYS), f"endpoint {endpoint} does not reach it")


@register("attach.isolated", _ATTACHING, "Endpoints of different domains are isolated.")
def _isolated(t: IommuTrial) -> None:
    t.need_dma()
    t.begin()
    first, second = t.endpoints(2)
    t.attach(first, DOMAIN)
    t.attach(second, OTHER)
    t.map(IOVA, t.page, PHYS, domain=DOMAIN)
    t.expect(t.writes(first, IOVA, PHYS), "the endpoint does not reach its domain's mapping")
    t.expect(not t.writes(second, IOVA, PHYS), "the mapping is reached from another domain")


@register(
    "attach.bypass-to-mapped",
    _ATTACH,
    "ATTACH with BYPASS to a domain that is none should get INVAL.",
    severity=Severity.SHOULD,
)
def _bypass_to_mapped(t: IommuTrial) -> None:
    t.need(wire.F_BYPASS_CONFIG, "BYPASS_CONFIG")
    t.begin()
    first, second = t.endpoints(2)
    t.attach(first)
    t.refused(wire.Attach(DOMAIN, second, _BYPASS, bytes(4)), Status.INVAL)


@register(
    "attach.mapped-to-bypass",
    _ATTACH,
    "ATTACH without BYPASS to a bypass domain should get INVAL.",
    severity=Severity.SHOULD,
)
def _mapped_to_bypass(t: IommuTrial) -> None:
    t.need(wire.F_BYPASS_CONFIG, "BYPASS_CONFIG")
    t.begin()
    first, second = t.endpoints(2)
    t.attach(first, DOMAIN, _BYPASS)
    t.refused(wire.Attach(DOMAIN, second, 0, bytes(4)), Status.INVAL)


@register(
    "attach.again-other-flag",
    _ATTACH,
    "ATTACH to the endpoint's own domain with the other bypass flag should get INVAL.",
    severity=Severity.SHOULD,
)
def _again_other_flag(t: IommuTrial) -> None:
    t.need(wire.F_BYPASS_CONFIG, "BYPASS_CONFIG")
    t.begin()
    first, second = t.endpoints(2)
    t.attach(first)
    t.attach(second)
    t.refused(wire.Attach(DOMAIN, first, _BYPASS, bytes(4)), Status.INVAL)


@register(
    "attach.moves",
    _ATTACH,
    "ATTACH to another domain should detach from the one before, or gets UNSUPP.",
    severity=Severity.SHOULD,
)
def _moves(t: IommuTrial) -> None:
    t.begin()
    (endpoint,) = t.endpoints()
    t.attach(endpoint, DOMAIN)
    t.map(IOVA, t.page, PHYS)
    answer = t.ask(wire.Attach(OTHER, endpoint, 0, bytes(4)))
    if answer.status == Status.UNSUPP:
        t.reject("UNSUPP")
    t.expect(answer.status == Status.OK, f"answered with {answer}")
    t.expect(not t.exists(DOMAIN), "the domain that nothing is attached to is still there")
    t.expect(not t.is_mapped(IOVA, t.page, OTHER), "the mapping came along")


@register(
    "attach.moved-reach",
    _ATTACH,
    "An endpoint that was moved reaches its domain's mappings, not those of the one before.",
)
def _moved_reach(t: IommuTrial) -> None:
    t.need_dma()
    t.begin()
    first, second = t.endpoints(2)
    t.attach(first, DOMAIN)
    t.attach(second, OTHER)
    t.map(IOVA, t.page, PHYS, domain=DOMAIN)
    t.map(IOVA + t.page, t.page, PHYS, domain=OTHER)
    if t.ask(wire.Attach(OTHER, first, 0, bytes(4))).status == Status.UNSUPP:
        t.skip("endpoints cannot be moved")
    t.expect(t.writes(first, IOVA + t.page, PHYS), "the new domain's mapping is not reached")
    t.expect(not t.writes(first, IOVA, PHYS), "the old domain's mapping is reached")


@register("attach.again", _ATTACHING, "ATTACH to the endpoint's own domain leaves its mappings.")
def _again(t: IommuTrial) -> None:
    t.begin()
    first, second = t.endpoints(2)
    t.attach(first)
    if t.ask(wire.Attach(DOMAIN, second, 0, bytes(4))).status == Status.UNSUPP:
        t.skip("a second endpoint cannot be attached")
    t.map(IOVA, t.page, PHYS)
    t.attach(first)
    t.expect(t.is_mapped(IOVA, t.page), "the mapping is gone")


@hostile("attach.domain-range", _RANGES, "ATTACH to a domain outside of the range fails.")
def _domain_range(t: IommuTrial) -> None:
    t.need(wire.F_DOMAIN_RANGE, "DOMAIN_RANGE")
    t.begin()
    first, last = struct.unpack_from("<II", t.carrier.config(), 24)
    (endpoint,) = t.endpoints()
    outside = [domain for domain in (first - 1, last + 1) if 0 <= domain < 1 << 32]
    if not outside:
        t.skip("the range is all that a domain's number can be")
    for domain in outside:
        t.refused(wire.Attach(domain, endpoint, 0, bytes(4)))


@register("attach.refused-moves-nothing", _ATTACH, "ATTACH that is rejected leaves the endpoint.")
def _refused(t: IommuTrial) -> None:
    t.begin()
    (endpoint,) = t.endpoints()
    t.attach(endpoint, DOMAIN)
    t.map(IOVA, t.page, PHYS)
    t.refused(wire.Attach(OTHER, endpoint, 0x80, bytes(4)))
    t.expect(t.is_mapped(IOVA, t.page), "the mapping is gone")
    t.expect(not t.exists(OTHER), "the domain was created")
    t.detach(endpoint, DOMAIN)


@register("detach.last", _DETACHING, "A domain ceases to exist with its last DETACH.")
def _last(t: IommuTrial) -> None:
    t.begin()
    first, second = t.endpoints(2)
    t.attach(first)
    shared = t.ask(wire.Attach(DOMAIN, second, 0, bytes(4))).status == Status.OK
    t.map(IOVA, t.page, PHYS)
    t.detach(first)
    if shared:
        t.expect(t.is_mapped(IOVA, t.page), "the mapping is gone with the first of two endpoints")
        t.detach(second)
    t.expect(not t.exists(DOMAIN), "the domain is still there")
    t.attach(first)
    t.expect(not t.is_mapped(IOVA, t.page), "a domain of the same number has the old mapping")


@register("detach.reserved", _DETACH, "The reserved bytes of DETACH are ignored.")
def _detach_reserved(t: IommuTrial) -> None:
    t.begin()
    (endpoint,) = t.endpoints()
    t.attach(endpoint)
    request = wire.pack(wire.Detach(DOMAIN, endpoint))
    answer = t.raw(request[:-8] + b"\xff" * 8)
    t.expect(answer.status == Status.OK, f"answered with {answer}")


@register("detach.no-endpoint", _DETACH, "DETACH of an endpoint that does not exist gets NOENT.")
def _detach_no_endpoint(t: IommuTrial) -> None:
    t.begin()
    (endpoint,) = t.endpoints()
    t.attach(endpoint)
    t.refused(wire.Detach(DOMAIN, t.absent_endpoint()), Status.NOENT)


def _may_be_invalid(t: IommuTrial, domain: int, endpoint: int) -> None:
    answer = t.ask(wire.Detach(domain, endpoint))
    if answer.status not in {Status.OK, Status.INVAL}:
        t.reject(f"answered with {answer}, where INVAL is provided for")


@register(
    "detach.no-domain",
    _DETACH,
    "DETACH from a domain that does not exist may get INVAL.",
    severity=Severity.SHOULD,
)
def _detach_no_domain(t: IommuTrial) -> None:
    t.begin()
    (endpoint,) = t.endpoints()
    _may_be_invalid(t, DOMAIN, endpoint)


@register(
    "detach.not-attached",
    _DETACH,
    "DETACH of an endpoint that is not attached to the domain may get INVAL.",
    severity=Severity.SHOULD,
)
def _detach_not_attached(t: IommuTrial) -> None:
    t.begin()
    first, second = t.endpoints(2)
    t.attach(first)
    _may_be_invalid(t, DOMAIN, second)


@register(
    "detach.other-domain",
    _DETACH,
    "DETACH from another domain than the endpoint's leaves it attached.",
)
def _detach_other(t: IommuTrial) -> None:
    t.begin()
    first, second = t.endpoints(2)
    t.attach(first, DOMAIN)
    t.attach(second, OTHER)
    t.map(IOVA, t.page, PHYS, domain=DOMAIN)
    answer = t.ask(wire.Detach(OTHER, first))
    t.expect(t.exists(DOMAIN), f"the endpoint's own domain is gone; answered with {answer}")
    t.expect(t.is_mapped(IOVA, t.page, DOMAIN), "the endpoint's own domain was begun anew")


@register("detach.reach", _DETACH, "A detached endpoint reaches no mapping of the domain.")
def _detach_reach(t: IommuTrial) -> None:
    t.need_dma()
    t.begin()
    first, second = t.endpoints(2)
    t.attach(first)
    shared = t.ask(wire.Attach(DOMAIN, second, 0, bytes(4))).status == Status.OK
    t.map(IOVA, t.page, PHYS)
    t.expect(t.writes(first, IOVA, PHYS), "the mapping is not reached before")
    t.detach(first)
    t.expect(not t.writes(first, IOVA, PHYS), "a write arrives")
    if shared:
        t.expect(t.writes(second, IOVA, PHYS), "the other endpoint does not reach it any more")
