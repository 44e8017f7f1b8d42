"""What an address of a device leads to, and what happened to it last."""

from __future__ import annotations

import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from guestio.addr import Permissions
from guestio.budgets import CONTROL_EXPLAIN_BYTES
from guestio.control import schema
from guestio.errors import DeviceError, InvalidAddressError
from guestio.iommu import Iotlb
from guestio.trace import RECORD, Records, TraceReader, What

MOST_MAPPINGS: Final = 64
MOST_EVENTS: Final = 20
_MOST_LOOKED_AT: Final = CONTROL_EXPLAIN_BYTES // 4096 + 2
"""Mappings of whole pages that a range can touch."""

_MAKES: Final = (What.UPDATE, What.DMA_MAP, What.DOMAIN_MAP, What.REGION_ADDED)
_ABOUT_ADDRESSES: Final = [
    int(what)
    for what in (
        What.BUFFER,
        What.STALLED,
        What.MISS,
        What.UPDATE,
        What.INVALIDATE,
        What.REFUSED,
        What.EVICTED,
        What.DMA_MAP,
        What.DMA_UNMAP,
        What.REGION_ADDED,
        What.REGION_REMOVED,
    )
]


def check_explained(address: int, length: int) -> None:
    """Refuse a range that is none, or that takes too long to look at.

    Raises:
        InvalidAddressError: It is empty, passes 2**64, or is longer than CONTROL_EXPLAIN_BYTES.
    """
    if not 0 <= address < 2**64 or not 1 <= length <= min(CONTROL_EXPLAIN_BYTES, 2**64 - address):
        raise InvalidAddressError(
            address,
            length,
            None,
            f"explain takes 1 to {CONTROL_EXPLAIN_BYTES} bytes below 2**64",
        )


def explain_range(
    address: int,
    length: int,
    mappings: list[tuple[int, int, int, Permissions]],
    *,
    origin: int,
    translated: bool,
    pending: bool = False,
    asks: bool = True,
    refused: str = "",
    endpoint: schema.EndpointInfo | None = None,
) -> schema.Explanation:
    """Put together what is known of a range.

    Args:
        address: Where the range begins.
        length: Its bytes; both as checked by :func:`check_explained`.
        mappings: Those that touch it: address, bytes, target, what is allowed; ascending.
        origin: The server's number in records of tracepoints.
        translated: Whether they are translations, rather than memory.
        pending: Whether an answer about it is still to come.
        asks: Whether the peer is asked for a translation that is not there.
        refused: Why every access is refused at the moment; empty if it is not.
        endpoint: Whose access it is, if the server is a virtio-iommu that was asked about one.
    """
    if not translated:
        lacking = "fails: there is no memory at {:#x}"
    elif asks:
        lacking = "waits: {:#x} is not mapped, the front-end is asked for it"
    else:
        lacking = "fails: {:#x} is not mapped"

    def verdict(wanted: Permissions) -> str:
        if refused:
            return f"refused: {refused}"
        return _verdict(address, length, mappings, wanted, lacking)

    now = time.monotonic()
    if endpoint is None:
        records = _about(address, length, origin)
    else:
        records = _about_endpoint(address, length, origin, endpoint)
    return {
        "address": address,
        "length_bytes": length,
        "translated": translated,
        "mapped": [
            {
                "address": start,
                "length_bytes": size,
                "target": target,
                "access": access_text(int(perm)),
                "since_s": _since(records, max(start, address), now),
            }
            for start, size, target, perm in mappings[:MOST_MAPPINGS]
        ],
        "read": verdict(Permissions.READ),
        "write": verdict(Permissions.WRITE),
        "pending": pending,
        "endpoint": endpoint,
        "recorded_s": 0.0,
        "last": [_recorded(records[i]) for i in range(len(records) - 1, -1, -1)[:MOST_EVENTS]],
    }


def explain_iotlb(
    iotlb: Iotlb,
    address: int,
    length: int,
    *,
    origin: int,
    pending: bool = False,
    asks: bool = True,
    refused: str = "",
) -> schema.Explanation:
    """What a range of I/O virtual addresses leads to; arguments as of :func:`explain_range`."""
    check_explained(address, length)
    return explain_range(
        address,
        length,
        iotlb._map.overlapping(address, length),
        origin=origin,
        translated=True,
        pending=pending,
        asks=asks,
        refused=refused,
    )


def explain_endpoint(device: object, number: int, address: int, length: int) -> schema.Explanation:
    """What a range of I/O virtual addresses leads to for an endpoint of a virtio-iommu.

    It is no access and causes no fault. From any thread, and without waiting.

    Args:
        device: What a server serves.
        number: The endpoint's id.
        address: Where the range begins.
        length: Its bytes.

    Raises:
        DeviceError: The device is no virtio-iommu, or has no such endpoint.
        InvalidAddressError: As from :func:`check_explained`.
    """
    check_explained(address, length)
    # Only a process that serves one has it imported.
    from guestio.virtio.iommu import VirtioIommu

    while device is not None and not isinstance(device, VirtioIommu):
        device = getattr(device, "device", None)  # one that misbehaves, or a PCI function
    if device is None:
        raise DeviceError(
            f"endpoint {number} cannot be explained: this server is no virtio-iommu; leave the "
            "endpoint out to ask about the device that it serves"
        )
    try:
        endpoint = device.endpoint(number)
    except ValueError as error:
        known = device.endpoint_ids
        listed = ", ".join(map(str, known[:MOST_EVENTS])) + (", ..." * (len(known) > MOST_EVENTS))
        raise DeviceError(f"{error}; there are: {listed or 'none'}") from None
    space, end = endpoint.space, address + length
    reserved: list[schema.Reserved] = [
        {"address": low, "length_bytes": high - low + 1, "subtype": subtype}
        for low, high, subtype in endpoint.reserved
        if low < end and address <= high
    ]
    held: list[schema.Held] = [
        {"address": base, "length_bytes": size, "broken": session.broken}
        for session in endpoint.sessions
        for base, size in session.exports
        if base < end and address < base + size
    ]
    info: schema.EndpointInfo = {
        "number": number,
        "domain": space.id,
        "bypass": space.bypass,
        "others": sorted(each for each in [*space.endpoints] if each != number)[:MOST_MAPPINGS],
        "reserved": reserved[:MOST_MAPPINGS],
        "held": held[:MOST_MAPPINGS],
    }
    if space.id is None:
        info["others"] = []
    return explain_range(
        address,
        length,
        space.mapper.mappings(address, length, limit=_MOST_LOOKED_AT),
        origin=device.origin,
        translated=True,
        asks=False,
        refused="" if space.id is not None or space.bypass else "it is attached to no domain",
        endpoint=info,
    )


def access_text(access: int) -> str:
    """Permissions as ``r``, ``w``, ``rw`` or nothing."""
    return ("r" if access & 1 else "") + ("w" if access & 2 else "")


def _verdict(
    address: int,
    length: int,
    mappings: list[tuple[int, int, int, Permissions]],
    wanted: Permissions,
    lacking: str,
) -> str:
    """What an access to the whole range would meet; ``lacking`` is for where it ends early."""
    at, end = address, address + length
    for start, size, _, perm in mappings:
        if start > at:
            break
        if wanted not in perm:
            allowed = access_text(int(perm)) or "nothing"
            return f"refused: {max(start, address):#x} allows {allowed}"
        at = max(at, start + size)
    if at >= end:
        return "succeeds"
    return lacking.format(at)


def _about(address: int, length: int, origin: int) -> Records:
    """The events about a range that are still in the rings, oldest first."""
    with TraceReader(from_start=True) as reader:
        records = reader.read().records
    if not len(records):
        return np.zeros(0, RECORD)
    found = (
        np.isin(records["what"], _ABOUT_ADDRESSES)
        & (records["origin"] == origin)
        & _touching(records, address, length)
    )
    chosen: Records = records[found]
    return chosen


def _about_endpoint(
    address: int, length: int, origin: int, endpoint: schema.EndpointInfo
) -> Records:
    """What happened to a range in an endpoint's domain, to its accesses, and where it went."""
    with TraceReader(from_start=True) as reader:
        records = reader.read().records
    if not len(records):
        return np.zeros(0, RECORD)
    ours = records["origin"] == origin
    there = ours & _touching(records, address, length)
    domain = -1 if endpoint["domain"] is None else endpoint["domain"]
    number = endpoint["number"]
    what, result = records["what"], records["result"]
    changed = (what == What.DOMAIN_MAP) | (what == What.DOMAIN_UNMAP)
    found = there & changed & (result == domain)
    found |= there & (what == What.FAULT) & (result == number)
    found |= ours & (what == What.ATTACHED) & (records["detail"] == np.uint64(number))
    chosen: Records = records[found]
    return chosen


def _touching(records: Records, address: int, length: int) -> NDArray[np.bool_]:
    """Which events concern a range."""
    last = address + (length - 1)
    ends = records["address"] + np.maximum(records["length"], 1) - np.uint64(1)
    found: NDArray[np.bool_] = (records["address"] <= np.uint64(last)) & (
        ends >= np.uint64(address)
    )
    return found


def _since(records: Records, address: int, now: float) -> float | None:
    """For how long an address has been mapped, if the event that mapped it is known."""
    for i in range(len(records) - 1, -1, -1):
        record = records[i]
        first, length = int(record["address"]), int(record["length"])
        what = int(record["what"])
        # A domain's mappings are seen from the endpoint's coming on.
        if what == What.ATTACHED or (what in _MAKES and first <= address < first + length):
            return now - int(record["time"]) / 1e9
    return None


def _recorded(record: np.void) -> schema.Recorded:
    return {
        "time_s": int(record["time"]) / 1e9,
        "what": What(int(record["what"])).name.lower(),
        "address": int(record["address"]),
        "length_bytes": int(record["length"]),
        "detail": int(record["detail"]),
        "result": int(record["result"]),
        "access": access_text(int(record["access"])),
    }
