"""What an address of a device leads to, and what happened to it last."""

from __future__ import annotations

import time
from typing import Final

import numpy as np

from guestio.addr import Permissions
from guestio.budgets import CONTROL_EXPLAIN_BYTES
from guestio.control import schema
from guestio.errors import InvalidAddressError
from guestio.iommu import Iotlb
from guestio.trace import RECORD, Records, TraceReader, What

MOST_MAPPINGS: Final = 64
MOST_EVENTS: Final = 20

_MAKES: Final = (What.UPDATE, What.DMA_MAP, What.REGION_ADDED)
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
    records = _about(address, length, origin)
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
    last = address + (length - 1)
    ends = records["address"] + np.maximum(records["length"], 1) - np.uint64(1)
    found = (
        np.isin(records["what"], _ABOUT_ADDRESSES)
        & (records["origin"] == origin)
        & (records["address"] <= np.uint64(last))
        & (ends >= np.uint64(address))
    )
    chosen: Records = records[found]
    return chosen


def _since(records: Records, address: int, now: float) -> float | None:
    """For how long an address has been mapped, if the event that mapped it is known."""
    for i in range(len(records) - 1, -1, -1):
        record = records[i]
        first, length = int(record["address"]), int(record["length"])
        if int(record["what"]) in _MAKES and first <= address < first + length:
            return now - int(record["time"]) / 1e9
    return None


def _recorded(record: np.void) -> schema.Recorded:
    return {
        "time_s": int(record["time"]) / 1e9,
        "what": What(int(record["what"])).name.lower(),
        "address": int(record["address"]),
        "length_bytes": int(record["length"]),
        "detail": int(record["detail"]),
        "access": access_text(int(record["access"])),
    }
