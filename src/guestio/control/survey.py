"""What a range of addresses has, in equal parts: what a map of it is drawn from.

The cost depends on the parts, not on how many mappings there are: of each part, a limited number of
mappings is looked at, without the GIL, and a change of the map waits for a few parts at most.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from guestio._core.iommu.intervals import IntervalMap
from guestio.addr import Permissions
from guestio.budgets import CONTROL_SURVEY_ENTRIES, CONTROL_SURVEY_PARTS
from guestio.control import schema
from guestio.control.explain import access_text
from guestio.errors import InvalidAddressError
from guestio.memory import AtomicBitmap
from guestio.trace import Records, TraceReader, What

_MAKES: Final = [int(what) for what in (What.UPDATE, What.DMA_MAP, What.REGION_ADDED)]
MOST_RECORDS: Final = 1 << 16
"""Records that are looked at, the newest: rings are larger while a recording is made."""
WIDE_RECORDS: Final = 512
"""Records that touch several parts, of which the newest are noted one by one."""


def check_surveyed(address: int, length: int, parts: int) -> None:
    """Refuse a range that has no such parts.

    Raises:
        InvalidAddressError: It is empty, passes 2**64, or is not so many equal parts.
    """
    if not 2 <= parts <= CONTROL_SURVEY_PARTS:
        raise InvalidAddressError(
            address, length, None, f"a survey has 2 to {CONTROL_SURVEY_PARTS} parts, not {parts}"
        )
    if not 0 <= address < 2**64 or not 1 <= length <= 2**64 - address or length % parts:
        raise InvalidAddressError(
            address, length, None, f"a survey is of {parts} equal parts of a range below 2**64"
        )


def survey_of(
    table: IntervalMap, address: int, length: int, parts: int, *, translated: bool
) -> schema.Survey:
    """What lies in a range, without its history.

    Args:
        table: The mappings.
        address: Where the range begins.
        length: Its bytes.
        parts: How many parts; all three as checked by :func:`check_surveyed`.
        translated: Whether these are translations.
    """
    rows, extent = table.survey(address, length, parts, CONTROL_SURVEY_ENTRIES)
    index = np.flatnonzero(rows[:, 0])
    entries, mapped, unseen, kinds, first, target = rows[index].T
    return {
        "address": address,
        "length_bytes": length,
        "parts": parts,
        "translated": translated,
        "entries": len(table),
        "extent": extent,
        "cells": {
            "index": index.tolist(),
            "entries": entries.tolist(),
            "mapped_bytes": mapped.tolist(),
            "unseen_bytes": unseen.tolist(),
            "access": [_kinds_text(bits) for bits in kinds.tolist()],
            "address": first.tolist(),
            "target": target.tolist(),
        },
        "recorded_s": 0.0,
        "age_s": None,
        "hits": None,
        "hits_s": 0.0,
        "dirty_pages": None,
    }


def survey_memory(
    regions: Iterable[tuple[int, int, AtomicBitmap | None]], address: int, length: int, parts: int
) -> schema.Survey:
    """What memory lies in a range, and how much of it was written.

    Args:
        regions: Address, bytes, and the pages that were written, if they are counted.
        address: Where the range begins.
        length: Its bytes.
        parts: How many parts; all three as checked by :func:`check_surveyed`.
    """
    table, counted = IntervalMap(merge=False), False
    dirty = np.zeros(parts, np.uint64)
    for start, size, bitmap in regions:
        table.add(start, size, start, Permissions.READ_WRITE)
        if bitmap is not None:
            counted = True
            _add_dirty(dirty, bitmap, start, size, address, length // parts)
    found = survey_of(table, address, length, parts, translated=False)
    if counted:
        found["dirty_pages"] = dirty[found["cells"]["index"]].tolist()
    return found


def _add_dirty(
    dirty: NDArray[np.uint64], bitmap: AtomicBitmap, start: int, size: int, address: int, part: int
) -> None:
    """Add a region's written pages to the parts of a range from ``address`` on that it touches."""
    first = max(start - address, 0) // part
    end = min((start + size - 1 - address) // part + 1, len(dirty))
    if end <= first:
        return
    if address + first * part < start:
        # It begins inside of a part.
        head = min(address + (first + 1) * part, start + size) - start
        dirty[first] += bitmap.counts(0, head, 1)[0]
        first += 1
    if first < end:
        begin = address + first * part - start
        dirty[first:end] += bitmap.counts(begin, (end - first) * part, end - first)


def add_history(
    found: schema.Survey, origin: int, *, recorded_s: float | None, uses_s: float | None
) -> None:
    """Add what the rings of records say: how old mappings are, and what requests used.

    Args:
        found: A survey.
        origin: The server's number in records.
        recorded_s: For how long changes have been recorded; None to leave ages out.
        uses_s: The same for the buffers of requests; None to leave hits out.
    """
    if recorded_s is None and uses_s is None:
        return
    with TraceReader(from_start=True) as reader:
        records = reader.read().records[-MOST_RECORDS:]
    records = records[records["origin"] == origin]
    index = np.asarray(found["cells"]["index"], np.int64)
    if recorded_s is not None:
        found["recorded_s"] = recorded_s
        now = time.monotonic_ns()
        made = _newest(found, records[np.isin(records["what"], _MAKES)])[index]
        found["age_s"] = [max(now - ns, 0) / 1e9 if ns else None for ns in made.tolist()]
    if uses_s is not None:
        uses = records[records["what"] == What.BUFFER]
        found["hits"] = _touched(found, uses)[index].tolist()
        if len(uses):
            found["hits_s"] = (int(uses["time"][-1]) - int(uses["time"][0])) / 1e9


def _parts_of(
    found: schema.Survey, records: Records
) -> tuple[Records, NDArray[np.int64], NDArray[np.int64]]:
    """The records that touch a survey's range, and the first and last part that each touches."""
    low, part = found["address"], np.uint64(found["length_bytes"] // found["parts"])
    high = np.uint64(low + found["length_bytes"] - 1)
    starts = records["address"]
    ends = starts + (np.maximum(records["length"], 1) - np.uint64(1))
    ends = np.where(ends < starts, np.uint64(2**64 - 1), ends)
    touching = (starts <= high) & (ends >= np.uint64(low))
    first = (np.maximum(starts[touching], np.uint64(low)) - np.uint64(low)) // part
    last = (np.minimum(ends[touching], high) - np.uint64(low)) // part
    return records[touching], first.astype(np.int64), last.astype(np.int64)


def _newest(found: schema.Survey, records: Records) -> NDArray[np.uint64]:
    """When the last one of some records, which ascend in time, touched each part; 0 if none did."""
    newest = np.zeros(found["parts"], np.uint64)
    records, first, last = _parts_of(found, records)
    times = records["time"]
    np.maximum.at(newest, first, times)
    np.maximum.at(newest, last, times)
    for i in np.flatnonzero(last - first > 1)[-WIDE_RECORDS:].tolist():
        inside = newest[first[i] : last[i] + 1]
        np.maximum(inside, times[i], out=inside)
    return newest


def _touched(found: schema.Survey, records: Records) -> NDArray[np.int64]:
    """How many of some records touch each part."""
    edges = np.zeros(found["parts"] + 1, np.int64)
    _, first, last = _parts_of(found, records)
    np.add.at(edges, first, 1)
    np.add.at(edges, last + 1, -1)
    touched: NDArray[np.int64] = np.cumsum(edges[:-1])
    return touched


def _kinds_text(bits: int) -> str:
    """Kinds of permissions, a bit each, as ``r``, ``w``, ``rw``, ``none``, joined by ``+``."""
    return "+".join(access_text(perm) or "none" for perm in range(4) if bits >> perm & 1)
