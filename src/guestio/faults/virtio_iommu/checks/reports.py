"""Faults of endpoints, as they are reported on the event queue."""

from __future__ import annotations

from typing import Final

from guestio.faults.report import Severity
from guestio.faults.virtio_iommu.catalogue import hostile, iommu, register
from guestio.faults.virtio_iommu.trial import DOMAIN, IOVA, PHYS, IommuTrial, R
from guestio.virtio.iommu import FaultReason, FaultRecord, wire

_REPORTING: Final = iommu("6.9, Fault reporting")
_REPORTS: Final = iommu("6.9.2, Device Requirements: Fault reporting")
_FLAGS: Final = wire.FAULT_F_READ | wire.FAULT_F_WRITE | wire.FAULT_F_ADDRESS


def _fault(t: IommuTrial, *, attached: bool = True, write: bool = True) -> FaultRecord:
    """The report of an access to what is not mapped; the check is skipped if none comes."""
    t.need_dma()
    t.begin()
    (endpoint,) = t.endpoints()
    if attached:
        t.attach(endpoint)
    for _ in range(8):
        t.driver.post(FaultRecord.SIZE)
    access = t.carrier.dma_write if write else t.carrier.dma_read
    access(endpoint, IOVA, 16)
    records = t.records()
    if not records:
        t.skip("faults are not reported")
    t.expect(len(records[0]) >= FaultRecord.SIZE, f"a report has {len(records[0])} bytes")
    return records[0]


@register("fault.mapping", _REPORTING, "An access to what is not mapped is reported as MAPPING.")
def _mapping(t: IommuTrial) -> None:
    reason = _fault(t)[0]
    t.expect(reason == FaultReason.MAPPING, f"the reason is {reason}")


@register("fault.domain", _REPORTING, "An access of an unattached endpoint is reported as DOMAIN.")
def _domain(t: IommuTrial) -> None:
    reason = _fault(t, attached=False)[0]
    t.expect(reason == FaultReason.DOMAIN, f"the reason is {reason}")


@register("fault.permission", _REPORTING, "A write to what is read-only is reported as MAPPING.")
def _permission(t: IommuTrial) -> None:
    t.need_dma()
    t.begin()
    (endpoint,) = t.endpoints()
    t.attach(endpoint)
    t.map(IOVA, t.page, PHYS, R)
    t.driver.post(FaultRecord.SIZE)
    t.carrier.dma_write(endpoint, IOVA, 16)
    records = t.records()
    if not records:
        t.skip("faults are not reported")
    t.expect(records[0][0] == FaultReason.MAPPING, f"the reason is {records[0][0]}")


@register(
    "fault.endpoint",
    _REPORTS,
    "A report should name the endpoint.",
    severity=Severity.SHOULD,
)
def _endpoint(t: IommuTrial) -> None:
    (endpoint,) = t.endpoints()
    found = _fault(t).endpoint
    t.expect(found == endpoint, f"it names {found}, and {endpoint} had the fault")


@register("fault.address", _REPORTING, "The address of a report, if there is one, is the access's.")
def _address(t: IommuTrial) -> None:
    record = _fault(t)
    if not record.flags & wire.FAULT_F_ADDRESS:
        t.reject("reports have no address")
    t.expect(record.address == IOVA, f"it is {record.address:#x}, not {IOVA:#x}")


@register("fault.direction", _REPORTING, "READ and WRITE of a report, if set, are the access's.")
def _direction(t: IommuTrial) -> None:
    silent = False
    for write in (False, True):
        flags = _fault(t, write=write).flags & (wire.FAULT_F_READ | wire.FAULT_F_WRITE)
        wanted = wire.FAULT_F_WRITE if write else wire.FAULT_F_READ
        silent |= not flags
        t.expect(
            not flags or flags & wanted,
            f"the flags of a {'write' if write else 'read'} are {flags:#x}",
        )
    if silent:
        t.reject("reports do not say whether it was a read or a write")


@register(
    "fault.reserved",
    _REPORTS,
    "The reserved fields of a report should be zero.",
    severity=Severity.SHOULD,
)
def _reserved(t: IommuTrial) -> None:
    record = _fault(t)
    t.expect(not any(record[1:4]), f"reserved is {record[1:4].hex()}")
    t.expect(not any(record[12:16]), f"reserved1 is {record[12:16].hex()}")


@register(
    "fault.flags",
    _REPORTS,
    "Undefined flags of a report should be zero.",
    severity=Severity.SHOULD,
)
def _flags(t: IommuTrial) -> None:
    flags = _fault(t).flags
    t.expect(not flags & ~_FLAGS, f"the flags are {flags:#x}")


@register("fault.none", _REPORTING, "An access that is allowed is not reported.")
def _none(t: IommuTrial) -> None:
    t.need_dma()
    t.begin()
    (endpoint,) = t.endpoints()
    t.attach(endpoint)
    t.map(IOVA, t.page, PHYS)
    t.driver.post(FaultRecord.SIZE)
    t.carrier.dma_write(endpoint, IOVA, 64)
    t.expect(not t.records(0), "it is reported")


@register(
    "fault.small-buffer",
    _REPORTS,
    "A report that does not fit into a buffer should not take several.",
    severity=Severity.SHOULD,
)
def _small(t: IommuTrial) -> None:
    t.need_dma()
    t.begin()
    (endpoint,) = t.endpoints()
    t.attach(endpoint)
    for _ in range(3):
        t.driver.post(8)
    t.carrier.dma_write(endpoint, IOVA, 16)
    with_data = [each for each in t.records(0) if each]
    t.expect(len(with_data) <= 1, f"{len(with_data)} buffers hold it")


@hostile("fault.no-buffer", _REPORTING, "Faults without a buffer for them do not stop the device.")
def _no_buffer(t: IommuTrial) -> None:
    t.need_dma()
    t.begin()
    (endpoint,) = t.endpoints()
    t.attach(endpoint)
    for number in range(100):
        t.carrier.dma_write(endpoint, IOVA + number * t.page, 16)
    t.map(IOVA, t.page, PHYS)
    t.expect(t.writes(endpoint, IOVA, PHYS), "a write to a mapping does not arrive afterwards")
    t.succeeds(wire.Detach(DOMAIN, endpoint))
