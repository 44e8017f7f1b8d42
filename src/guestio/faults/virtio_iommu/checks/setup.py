"""Features, the configuration space, and what a reset does."""

from __future__ import annotations

import struct
from typing import Final

from guestio.faults.report import Severity
from guestio.faults.virtio_iommu.catalogue import hostile, iommu, register
from guestio.faults.virtio_iommu.ports import VERSION_1
from guestio.faults.virtio_iommu.trial import DOMAIN, IOVA, PHYS, IommuTrial
from guestio.virtio.iommu import wire

_FEATURES: Final = iommu("3.2, Device Requirements: Feature bits")
_CONFIG: Final = iommu("4.2, Device Requirements: Device configuration layout")
_LAYOUT: Final = iommu("4, Device configuration layout")
_INIT: Final = iommu("5, Device initialization")
_BYPASS: Final = iommu("6, Device operations")


@register("features.map-unmap", _FEATURES, "MAP_UNMAP should be offered.", severity=Severity.SHOULD)
def _map_unmap(t: IommuTrial) -> None:
    t.expect(t.offered & wire.F_MAP_UNMAP, "MAP_UNMAP is not offered")


@register(
    "features.bypass-superseded",
    _FEATURES,
    "BYPASS should not be offered by new devices: BYPASS_CONFIG supersedes it.",
    severity=Severity.SHOULD,
)
def _superseded(t: IommuTrial) -> None:
    t.expect(not t.offered & wire.F_BYPASS, "BYPASS is offered")


@register(
    "features.not-both-bypass",
    _FEATURES,
    "BYPASS and BYPASS_CONFIG should not both be offered.",
    severity=Severity.SHOULD,
)
def _both(t: IommuTrial) -> None:
    both = wire.F_BYPASS | wire.F_BYPASS_CONFIG
    t.expect(t.offered & both != both, "BYPASS and BYPASS_CONFIG are offered")


@register(
    "features.least",
    _FEATURES,
    "A driver that accepts MAP_UNMAP alone is served.",
)
def _least(t: IommuTrial) -> None:
    t.begin(only=VERSION_1 | wire.F_MAP_UNMAP)
    (endpoint,) = t.endpoints()
    t.attach(endpoint)
    t.map(IOVA, t.page, PHYS)
    t.unmap(IOVA, t.page)
    t.detach(endpoint)


@register("config.page-size", _CONFIG, "At least one bit of page_size_mask is set.")
def _page_size(t: IommuTrial) -> None:
    t.begin()
    t.expect(any(t.carrier.config()[:8]), "page_size_mask is 0")


@register("config.input-range", _LAYOUT, "The input range does not end before it starts.")
def _input_range(t: IommuTrial) -> None:
    t.need(wire.F_INPUT_RANGE, "INPUT_RANGE")
    t.begin()
    first, last = struct.unpack_from("<QQ", t.carrier.config(), 8)
    t.expect(first <= last, f"the input range is {first:#x} to {last:#x}")


@register("config.domain-range", _LAYOUT, "The domain range does not end before it starts.")
def _domain_range(t: IommuTrial) -> None:
    t.need(wire.F_DOMAIN_RANGE, "DOMAIN_RANGE")
    t.begin()
    first, last = struct.unpack_from("<II", t.carrier.config(), 24)
    t.expect(first <= last, f"the domain range is {first:#x} to {last:#x}")


@register("config.bypass-value", _CONFIG, "The bypass field is 0 or 1.")
def _bypass_value(t: IommuTrial) -> None:
    t.need(wire.F_BYPASS_CONFIG, "BYPASS_CONFIG")
    t.begin(bypass=None)
    value = t.carrier.config()[wire.BYPASS_OFFSET]
    t.expect(value in {0, 1}, f"bypass is {value}")


@register("config.bypass-written", _CONFIG, "A driver may write 0 and 1 to bypass.")
def _bypass_written(t: IommuTrial) -> None:
    t.need(wire.F_BYPASS_CONFIG, "BYPASS_CONFIG")
    t.begin()
    for value in (1, 0, 1):
        t.set_bypass(value)
        now = t.carrier.config()[wire.BYPASS_OFFSET]
        t.expect(now == value, f"bypass is {now} after {value} was written")


@register(
    "config.bypass-kept",
    _CONFIG,
    "A device reset should not change bypass.",
    severity=Severity.SHOULD,
)
def _bypass_kept(t: IommuTrial) -> None:
    t.need(wire.F_BYPASS_CONFIG, "BYPASS_CONFIG")
    for value in (0, 1):
        t.begin(bypass=bool(value))
        t.begin(bypass=None)
        now = t.carrier.config()[wire.BYPASS_OFFSET]
        t.expect(now == value, f"bypass is {now} after a reset, and was {value}")


@hostile(
    "config.bypass-other-value", _CONFIG, "What is neither 0 nor 1 is not presented in bypass."
)
def _bypass_other(t: IommuTrial) -> None:
    t.need(wire.F_BYPASS_CONFIG, "BYPASS_CONFIG")
    t.begin()
    for value in (2, 0x80, 0xFF):
        t.set_bypass(value)
        now = t.carrier.config()[wire.BYPASS_OFFSET]
        t.expect(now in {0, 1}, f"bypass is {now} after {value} was written")


@hostile(
    "config.bypass-not-negotiated",
    _CONFIG,
    "A driver that did not accept BYPASS_CONFIG writes bypass; the field stays 0 or 1.",
)
def _bypass_not_negotiated(t: IommuTrial) -> None:
    t.need(wire.F_BYPASS_CONFIG, "BYPASS_CONFIG")
    t.begin(without=wire.F_BYPASS_CONFIG, bypass=None)
    was = t.carrier.config()[wire.BYPASS_OFFSET]
    t.set_bypass(not was)
    now = t.carrier.config()[wire.BYPASS_OFFSET]
    t.set_bypass(was)
    t.expect(now in {0, 1}, f"bypass is {now}")
    if now == was:
        t.reject("the write has no effect")


@hostile("config.read-only", _CONFIG, "A write to another field changes nothing.")
def _read_only(t: IommuTrial) -> None:
    t.begin()
    before = t.carrier.config()
    for offset in (0, 8, 16, 24, 28, 32):
        t.carrier.write_config(offset, b"\x5a\xa5\x00\xff")
        after = t.carrier.config()
        t.expect(before == after, f"a write at {offset} changed {before.hex()} to {after.hex()}")


@register("reset.domains", _INIT, "After a reset no endpoint is attached: no domain exists.")
def _reset_domains(t: IommuTrial) -> None:
    t.begin()
    (endpoint,) = t.endpoints()
    t.attach(endpoint)
    t.begin()
    t.expect(not t.exists(DOMAIN), "the domain is there after a reset")


@register("reset.mappings", _INIT, "After a reset an endpoint reaches no mapping of before.")
def _reset_mappings(t: IommuTrial) -> None:
    t.need_dma()
    t.begin()
    (endpoint,) = t.endpoints()
    t.attach(endpoint)
    t.map(IOVA, t.page, PHYS)
    t.expect(t.writes(endpoint, IOVA, PHYS), "the endpoint does not reach the mapping before")
    t.begin()
    t.expect(not t.writes(endpoint, IOVA, PHYS), "the mapping is reached after a reset")


@register(
    "reset.unattached",
    iommu("6.2, Device Requirements: Device operations"),
    "An endpoint that is neither attached nor in bypass mode should not reach guest memory.",
    severity=Severity.SHOULD,
)
def _unattached(t: IommuTrial) -> None:
    t.need_dma()
    t.begin()
    (endpoint,) = t.endpoints()
    if t.carrier.config()[wire.BYPASS_OFFSET] and t.offered & wire.F_BYPASS_CONFIG:
        t.skip("bypass cannot be turned off")
    t.expect(not t.writes(endpoint, PHYS, PHYS), "a write of an unattached endpoint arrives")
    t.expect(not t.reads(endpoint, PHYS, PHYS), "a read of an unattached endpoint arrives")


@register("bypass.unattached", _BYPASS, "With bypass 1 an unattached endpoint reaches all memory.")
def _bypassed(t: IommuTrial) -> None:
    t.need(wire.F_BYPASS_CONFIG, "BYPASS_CONFIG")
    t.need_dma()
    t.begin(bypass=True)
    (endpoint,) = t.endpoints()
    t.expect(t.writes(endpoint, PHYS, PHYS), "a write does not arrive")
    t.expect(t.reads(endpoint, PHYS, PHYS), "a read does not arrive")


@register(
    "bypass.not-accepted",
    _BYPASS,
    "With bypass 1 that holds for a driver too that did not accept BYPASS_CONFIG.",
)
def _bypass_not_accepted(t: IommuTrial) -> None:
    t.need(wire.F_BYPASS_CONFIG, "BYPASS_CONFIG")
    t.need_dma()
    t.begin(bypass=True)
    t.begin(without=wire.F_BYPASS_CONFIG, bypass=None)
    if not t.carrier.config()[wire.BYPASS_OFFSET]:
        t.skip("bypass is 0 after the reset")
    (endpoint,) = t.endpoints()
    t.expect(t.writes(endpoint, PHYS, PHYS), "a write does not arrive")


@register("bypass.switched", _BYPASS, "Bypass holds from the write to the field on, and ends so.")
def _switched(t: IommuTrial) -> None:
    t.need(wire.F_BYPASS_CONFIG, "BYPASS_CONFIG")
    t.need_dma()
    t.begin()
    (endpoint,) = t.endpoints()
    for on in (True, False, True, False):
        t.set_bypass(on)
        t.expect(
            t.writes(endpoint, PHYS, PHYS) == on, f"a write {'is refused' if on else 'arrives'}"
        )


@register("bypass.domain", _BYPASS, "Endpoints of a bypass domain reach all memory.")
def _bypass_domain(t: IommuTrial) -> None:
    t.need(wire.F_BYPASS_CONFIG, "BYPASS_CONFIG")
    t.need_dma()
    t.begin()
    (endpoint,) = t.endpoints()
    t.attach(endpoint, DOMAIN, wire.ATTACH_F_BYPASS)
    t.expect(t.writes(endpoint, PHYS, PHYS), "a write does not arrive")
    t.expect(t.reads(endpoint, PHYS, PHYS), "a read does not arrive")
    t.detach(endpoint)
    t.expect(not t.writes(endpoint, PHYS, PHYS), "a write arrives after the DETACH")


@register("bypass.attached", _BYPASS, "With bypass 1 an attached endpoint reaches what is mapped.")
def _bypass_attached(t: IommuTrial) -> None:
    t.need(wire.F_BYPASS_CONFIG, "BYPASS_CONFIG")
    t.need_dma()
    t.begin(bypass=True)
    (endpoint,) = t.endpoints()
    t.attach(endpoint)
    t.expect(not t.writes(endpoint, PHYS, PHYS), "an attached endpoint bypasses its domain")
    t.map(IOVA, t.page, PHYS)
    t.expect(t.writes(endpoint, IOVA, PHYS), "the mapping is not reached")
    t.detach(endpoint)
    t.expect(t.writes(endpoint, PHYS, PHYS), "bypass is over after the DETACH")
