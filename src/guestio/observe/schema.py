"""What a recording holds: one Parquet file, a row for each request, mapping and other event.

The three kinds share one table, each in row groups of its own, and leave the columns of the others
null. ``docs/recordings.md`` is written from the tables here.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import pyarrow as pa

from guestio.trace import FIELDS

VERSION: Final = 1
"""Of the columns and their meaning. Columns may be added; a reader of version 1 ignores them."""

METADATA_KEY: Final = b"guestio"
"""Under which the file's metadata has the JSON object that describes a recording."""

EVENT: Final = 0
REQUEST: Final = 1
MAPPING: Final = 2
"""Kinds of rows, in the column ``kind``."""

INTERRUPT_WITHIN_NS: Final = 100_000_000
"""A notification that comes later than this after a completion is not taken as its."""

PIECES: Final = pa.list_(pa.struct([("address", pa.uint64()), ("length", pa.uint64())]))

OPERATIONS: Final = ("other", "read", "write", "flush")


class Column(NamedTuple):
    """A column: its name, Arrow type, unit, and what it says."""

    name: str
    type: pa.DataType
    unit: str
    meaning: str


_TIME = "null if it did not happen, or not while it was recorded"

REQUEST_COLUMNS: Final = (
    Column("origin", pa.uint16(), "", "the server in its process"),
    Column("queue", pa.uint16(), "", "the queue"),
    Column("head", pa.uint32(), "", "identifies the request in its queue while it is in flight"),
    Column("sequence", pa.uint64(), "", "requests of this queue that were taken before it"),
    Column("position", pa.uint16(), "", "its position in the available ring"),
    Column("thread", pa.uint32(), "", "the thread that took it"),
    Column("operation", pa.dictionary(pa.int8(), pa.string()), "", "read, write, flush or other"),
    Column(
        "offset", pa.uint64(), "byte", "where in the image a read or write begins, if that is known"
    ),
    Column(
        "gap",
        pa.int64(),
        "byte",
        "from the end of the read or write that its queue completed before; 0 is sequential",
    ),
    Column("available", pa.uint64(), "ns", "when its batch was found; " + _TIME),
    Column("stalled", pa.uint64(), "ns", "when a translation was first missing; " + _TIME),
    Column("taken", pa.uint64(), "ns", "when it was taken; " + _TIME),
    Column("served", pa.uint64(), "ns", "when the core had served it; null if the device did"),
    Column("completed", pa.uint64(), "ns", "when it was published; " + _TIME),
    Column(
        "interrupted",
        pa.uint64(),
        "ns",
        "when its driver was notified next, within 100 ms; " + _TIME,
    ),
    Column("address", pa.uint64(), "byte", "where its first buffer is"),
    Column("readable", pa.uint64(), "byte", "what it gave to read"),
    Column("writable", pa.uint64(), "byte", "what it gave to write"),
    Column("written", pa.uint64(), "byte", "what the device said it had written"),
    Column("misses", pa.uint32(), "", "translations that it lacked when it was looked at"),
    Column("failed", pa.bool_(), "", "whether it was answered with an error by the device host"),
    Column(
        "status",
        pa.uint8(),
        "",
        "the last byte of what it gave to write, once it was served (payload headers or all)",
    ),
    Column("command", pa.uint8(), "", "the opcode of an NVMe command; null of other requests"),
    Column("namespace", pa.uint32(), "", "the namespace of an NVMe command"),
    Column(
        "code", pa.uint16(), "", "the status of an NVMe command: code, and its type from bit 8 on"
    ),
    Column(
        "answer_hash",
        pa.uint64(),
        "",
        "XXH64 with seed 0 of the bytes written, of the first 8 MiB (payload headers or all)",
    ),
    Column(
        "content",
        pa.large_binary(),
        "",
        "the first bytes it gave to read, when it was taken: 64 (payload headers) or 8 MiB (all)",
    ),
    Column("answer", pa.large_binary(), "", "the bytes written to it, up to 8 MiB (payload all)"),
    Column("read_pieces", PIECES, "byte", "the memory it gave to read (payload headers or all)"),
    Column("write_pieces", PIECES, "byte", "the memory it gave to write (payload headers or all)"),
)
"""Columns of requests. All times are of CLOCK_MONOTONIC of the server's machine."""

MAPPING_COLUMNS: Final = (
    Column("origin", pa.uint16(), "", "the server in its process"),
    Column("address", pa.uint64(), "byte", "I/O virtual"),
    Column("length", pa.uint64(), "byte", "how long it was"),
    Column("detail", pa.uint64(), "byte", "where it led to"),
    Column("access", pa.uint16(), "", "1 read, 2 write, 3 both"),
    Column("mapped", pa.uint64(), "ns", "when it came"),
    Column(
        "unmapped", pa.uint64(), "ns", "when the first of it went; null if it was there at the end"
    ),
    Column("ended_by", pa.uint16(), "", "the event that ended it, a `guestio.trace.What`"),
)
"""Columns of mappings: translations that came and went, with their lifetimes."""

_ARROW = {"<u8": pa.uint64(), "<i8": pa.int64(), "<u4": pa.uint32(), "<u2": pa.uint16()}

EVENT_COLUMNS: Final = tuple(
    Column(field.name, _ARROW[field.type], field.unit, field.meaning) for field in FIELDS
)
"""Columns of other events: the fields of `guestio.trace.RECORD`."""


def _file_schema() -> pa.Schema:
    fields: dict[str, pa.Field] = {"kind": pa.field("kind", pa.uint8(), nullable=False)}
    for column in (*EVENT_COLUMNS, *REQUEST_COLUMNS, *MAPPING_COLUMNS):
        known = fields.setdefault(column.name, pa.field(column.name, column.type))
        assert known.type == column.type, column.name
    return pa.schema(list(fields.values()))


FILE_SCHEMA: Final = _file_schema()
"""All columns of the file."""
