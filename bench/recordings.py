"""Recordings of many generated requests: what a disk of four queues of depth 32 would leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from guestio.observe.finish import ROW_GROUP, RecordingFile
from guestio.observe.schema import EVENT, FILE_SCHEMA, MAPPING, OPERATIONS, REQUEST, VERSION
from guestio.trace import NO_HEAD, What

_Array = NDArray[Any]

DEPTH: Final = 32
QUEUES: Final = 4
BATCH_NS: Final = 80_000
"""From one batch of a queue to the next one's."""
BEGAN_NS: Final = 1_000_000_000


def _table(kind: int, rows: int, columns: dict[str, Any]) -> pa.Table:
    """Rows with the columns of a recording's file; what is not given is null."""
    made = []
    for field in FILE_SCHEMA:
        values = columns.get(field.name)
        if field.name == "kind":
            values = np.full(rows, kind, np.uint8)
        if values is None:
            made.append(pa.nulls(rows, field.type))
        elif isinstance(values, pa.Array):
            made.append(values)
        else:
            made.append(pa.array(np.broadcast_to(values, rows), field.type))
    return pa.table(made, schema=FILE_SCHEMA)


def requests(count: int, first: int, random: np.random.Generator) -> pa.Table:
    """Requests of batches that a driver makes available at once, and that complete together."""
    number = first + np.arange(count)
    batch, at = number // DEPTH, number % DEPTH
    begin = BEGAN_NS + batch * BATCH_NS
    size = 512 << random.integers(3, 8, count)
    reads = random.random(count, np.float32) < 0.7
    nearly = random.random(count, np.float32) < 0.5
    offset = np.where(nearly, number * 4096 % (1 << 40), random.integers(0, 1 << 24, count) * 512)
    taken = begin + 500 + at * 1500
    took = 60_000 + (random.standard_exponential(count, np.float32) * 3000).astype(np.int64)
    firsts = np.flatnonzero(np.r_[True, batch[1:] != batch[:-1]])
    completed = begin + np.maximum.reduceat(took, firsts)[batch - batch[0]]
    misses = (random.random(count, np.float32) < 0.01).astype(np.uint32)
    lost = random.random(count, np.float32) < 0.001
    operation = pa.DictionaryArray.from_arrays(
        pa.array(np.where(reads, OPERATIONS.index("read"), OPERATIONS.index("write")), pa.int8()),
        pa.array(OPERATIONS),
    )
    return _table(
        REQUEST,
        count,
        {
            "origin": 1, "queue": batch % QUEUES, "head": at,
            "sequence": batch // QUEUES * DEPTH + at, "position": number % 65536, "thread": 4711,
            "operation": operation, "offset": offset,
            "gap": np.where(nearly, 0, offset - number * 4096), "available": begin,
            "stalled": pa.array(begin + 100, pa.uint64(), mask=misses == 0), "taken": taken,
            "served": taken + 900, "completed": completed,
            "interrupted": pa.array(completed + 700, pa.uint64(), mask=lost),
            "address": (1 << 32) + random.integers(0, 1 << 16, count) * 4096,
            "readable": np.where(reads, 16, size + 16), "writable": np.where(reads, size + 1, 1),
            "written": np.where(reads, size + 1, 1), "misses": misses,
            "failed": random.random(count, np.float32) < 1e-5,
        },
    )  # fmt: skip


def mappings(count: int, first: int, random: np.random.Generator) -> pa.Table:
    """Pages that are mapped and unmapped again."""
    begin = BEGAN_NS + (first + np.arange(count)) * 20_000
    return _table(
        MAPPING,
        count,
        {
            "origin": 1, "address": random.integers(0, 1 << 30, count) * 4096, "length": 4096,
            "detail": random.integers(0, 1 << 20, count) * 4096, "access": 3, "mapped": begin,
            "unmapped": begin + 5000 + random.integers(0, 1 << 20, count),
            "ended_by": int(What.INVALIDATE),
        },
    )  # fmt: skip


def events(count: int, first: int, random: np.random.Generator) -> pa.Table:
    """Notifications, and a few refused accesses."""
    number = first + np.arange(count)
    refused = random.random(count, np.float32) < 1e-4
    return _table(
        EVENT,
        count,
        {
            "what": np.where(refused, int(What.REFUSED), int(What.INTERRUPT)), "origin": 1,
            "queue": number % QUEUES, "head": NO_HEAD,
            "time": BEGAN_NS + number * BATCH_NS + 61_000,
            "address": np.where(refused, random.integers(0, 50, count) * 4096, 0), "access": 1,
        },
    )  # fmt: skip


def generate(path: Path, count: int, seed: int = 0) -> None:
    """Write a recording.

    Args:
        path: A new file.
        count: Requests; there are a mapping for each 4 of them, and an event for each 32.
        seed: Of what is random, and the recording's number: they began a minute apart.
    """
    random = np.random.default_rng(seed)
    out = RecordingFile(path)
    kinds = (requests, count), (mappings, count // 4), (events, count // DEPTH)
    for make, rows in kinds:
        for first in range(0, rows, ROW_GROUP):
            out.add([make(min(ROW_GROUP, rows - first), first, random)])
    out.close(
        {
            "version": VERSION, "guestio": "generated", "payload": "none", "lost": 0, "ended": None,
            "began": {"monotonic_ns": BEGAN_NS,
                      "realtime_ns": (1_800_000_000 + 60 * seed) * 10**9},
            "peers": [],
            "device": {"kind": "BlockDevice", "transport": "vhost-user", "path": "", "origin": 1,
                       "device_id": 2, "config": ""},
            "rows": {}, "counts": {}, "incomplete": 0,
        }
    )  # fmt: skip
