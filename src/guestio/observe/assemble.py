"""Rows of a recording, put together from records of tracepoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from guestio.budgets import RECORD_OPEN_REQUESTS
from guestio.observe.mappings import Mappings
from guestio.observe.schema import (
    EVENT,
    EVENT_COLUMNS,
    FILE_SCHEMA,
    INTERRUPT_WITHIN_NS,
    MAPPING,
    OPERATIONS,
    PIECES,
    REQUEST,
    REQUEST_COLUMNS,
)
from guestio.trace import RECORD, Records, What

_OF_REQUESTS: Final = np.zeros(1 << 16, dtype=bool)
for _what in ("TAKEN", "SERVED", "COMPLETED", "FAILED", "BUFFER", "LACKING", "CONTENT", "DATA"):
    _OF_REQUESTS[What[_what]] = True

CHUNK: Final = RECORD.fields["since"][1]  # type: ignore[index] # it has fields
"""Where in a DATA record its bytes begin."""
CHUNK_BYTES: Final = 40

_NVME: Final = 1 << 15
"""Set in ``result`` of COMPLETED: it was an NVMe command."""

_Array: TypeAlias = NDArray[Any]
_TABLE: Final = pa.schema([pa.field(each.name, each.type) for each in REQUEST_COLUMNS])


class Assembler:
    """Makes rows of records that come in the order of time, in any portions.

    A request becomes a row once it is completed and its notification was seen, or cannot come any
    more. What is incomplete is kept, within RECORD_OPEN_REQUESTS.

    Attributes:
        counts: Rows so far, by kind of row.
        whats: Records so far, by kind of event.
        incomplete: Requests whose completion was not recorded, so far.
    """

    def __init__(self) -> None:
        self._open: Records = np.zeros(0, RECORD)
        self._sequences: _Array = np.zeros(0, np.uint64)
        self._next: dict[tuple[int, int], int] = {}
        self._ends: dict[tuple[int, int], int] = {}
        self._waiting: pa.Table = _TABLE.empty_table()
        self._mappings = Mappings()
        self.counts = {EVENT: 0, REQUEST: 0, MAPPING: 0}
        self.whats: _Array = np.zeros(256, np.int64)
        self.incomplete = 0

    def add(self, records: Records, *, last: bool = False) -> list[pa.Table]:
        """Take the next records.

        Args:
            records: In the order of time, none earlier than those of before.
            last: Whether no more will come: what is incomplete becomes rows as it is.

        Returns:
            Tables of rows, each of one kind, with the columns of ``FILE_SCHEMA``.
        """
        what = records["what"]
        self.whats += np.bincount(np.minimum(what, 255), minlength=256)
        of_requests = _OF_REQUESTS[what]
        others = records[~of_requests | (what == What.FAILED)]
        found = []
        rows = self._requests(records[of_requests], last=last)
        rows = self._interrupts(rows, records, last=last)
        if len(rows):
            found.append(self._file_table(REQUEST, rows))
        if len(others):
            columns = {each.name: others[each.name] for each in EVENT_COLUMNS}
            found.append(self._file_table(EVENT, pa.table(columns)))
        mappings = self._mappings.add(others, last=last)
        if len(mappings):
            found.append(self._file_table(MAPPING, mappings))
        return found

    def _file_table(self, kind: int, rows: pa.Table) -> pa.Table:
        """Rows with the columns of the file."""
        self.counts[kind] += len(rows)
        columns = []
        for field in FILE_SCHEMA:
            if field.name == "kind":
                columns.append(pa.array(np.full(len(rows), kind, np.uint8)))
            elif field.name in rows.column_names:
                columns.append(rows.column(field.name))
            else:
                columns.append(pa.nulls(len(rows), field.type))
        return pa.table(columns, schema=FILE_SCHEMA)

    def _number(self, records: Records) -> _Array:
        """The sequence number of each TAKEN among new records."""
        found = np.zeros(len(records), np.uint64)
        taken = np.flatnonzero(records["what"] == What.TAKEN)
        queues = _queue_of(records[taken])
        for queue in np.unique(queues):
            at = taken[queues == queue]
            key = (int(queue) >> 16, int(queue) & 0xFFFF)
            first = self._next.get(key, 0)
            found[at] = np.arange(first, first + len(at), dtype=np.uint64)
            self._next[key] = first + len(at)
        return found

    def _requests(self, records: Records, *, last: bool) -> pa.Table:
        """The requests that are complete with these records, in the order of their completion."""
        sequences = np.concatenate([self._sequences, self._number(records)])
        records = np.concatenate([self._open, records])
        if not len(records):
            return _TABLE.empty_table()
        key = (_queue_of(records).astype(np.uint64) << np.uint64(32)) | records["head"]
        order = np.argsort(_dense(key), kind="stable")
        key, ordered = key[order], records[order]
        what = ordered["what"]
        # A request begins where another one's head does, after a completion, and when it is taken
        # unless it was found to lack something just before.
        is_new = np.ones(len(key), dtype=bool)
        before, now = what[:-1], what[1:]
        is_new[1:] = (
            (key[1:] != key[:-1])
            | (before == What.COMPLETED)
            | ((now == What.TAKEN) & (before != What.LACKING))
            | ((now == What.LACKING) & (before != What.LACKING))
        )
        segment = np.cumsum(is_new) - 1
        count = int(segment[-1]) + 1
        completed = np.full(count, -1, np.int64)
        at = np.flatnonzero(what == What.COMPLETED)
        completed[segment[at]] = order[at]
        first = np.flatnonzero(is_new)
        # The last one of each head goes on, unless it is complete.
        open_ = completed < 0
        goes_on = np.zeros(count, dtype=bool)
        goes_on[np.append(key[first[1:]] != key[first[:-1]], True)] = True
        goes_on &= open_ & (not last)
        if np.count_nonzero(goes_on) > RECORD_OPEN_REQUESTS:
            goes_on[:] = False
        keep = np.sort(order[goes_on[segment]])
        self._open, self._sequences = records[keep], sequences[keep]
        done = np.flatnonzero(~goes_on)
        self.incomplete += int(np.count_nonzero(open_[done]))
        if not len(done):
            return _TABLE.empty_table()
        begun = records["time"][order[first]]
        # In the order of completion; what was not completed, of its beginning.
        rank = np.where(open_, np.searchsorted(records["time"], begun), completed)
        done = done[np.argsort(rank[done], kind="stable")]
        return self._table(ordered, segment, count, sequences[order], done)

    def _table(
        self, ordered: Records, segment: _Array, count: int, sequences: _Array, done: _Array
    ) -> pa.Table:
        """The rows of chosen segments."""
        what = ordered["what"]
        first = np.searchsorted(segment, done)
        taken = _Chosen(ordered, what == What.TAKEN, segment, count, done)
        lacking = _Chosen(ordered, what == What.LACKING, segment, count, done, first=True)
        served = _Chosen(ordered, what == What.SERVED, segment, count, done)
        ended = _Chosen(ordered, what == What.COMPLETED, segment, count, done)
        failed = _Chosen(ordered, what == What.FAILED, segment, count, done)
        answered = (what == What.CONTENT) & (ordered["access"] == 2)
        given = _Chosen(ordered, answered, segment, count, done)
        misses = np.zeros(count, np.uint32)
        at = np.flatnonzero(what == What.LACKING)
        np.maximum.at(misses, segment[at], ordered["detail"][at].astype(np.uint32))
        kind = np.minimum(ended["access"], 3)
        moves = ended.there & ((kind == 1) | (kind == 2))
        offset, readable, writable = ended["detail"], taken["length"], taken["detail"]
        said = ended["result"]
        is_nvme = ended.there & ((said & _NVME) != 0)
        # A virtio disk's request has a header and a status besides its data.
        extra = np.where(is_nvme, 0, np.where(kind == 1, 1, 16)).astype(np.uint64)
        length = np.where(kind == 1, writable, readable) - extra
        heads = ordered[first]
        gap, is_gap = self._gaps(_queue_of(heads), offset, length, moves & taken.there)
        since = np.where(taken.there, taken["since"], ended["since"])
        since = np.where(lacking.there & (lacking["since"] > 0), lacking["since"], since)
        status = given["result"]
        arrays = {
            "origin": heads["origin"],
            "queue": heads["queue"],
            "head": heads["head"],
            "sequence": pa.array(sequences[taken.at], mask=~taken.there),
            "position": taken.column("result", np.uint16),
            "thread": heads["thread"],
            "operation": pa.DictionaryArray.from_arrays(
                pa.array(kind.astype(np.int8), mask=~ended.there), pa.array(OPERATIONS)
            ),
            "offset": pa.array(offset, mask=~moves),
            "gap": pa.array(gap, mask=~is_gap),
            "available": pa.array(since, mask=since == 0),
            "stalled": lacking.column("time"),
            "taken": taken.column("time"),
            "served": served.column("time"),
            "completed": ended.column("time"),
            "interrupted": pa.nulls(len(done), pa.uint64()),
            "address": taken.column("address"),
            "readable": pa.array(readable, mask=~taken.there),
            "writable": pa.array(writable, mask=~taken.there),
            "written": ended.column("length"),
            "misses": misses[done],
            "failed": failed.there,
            "status": pa.array(status.astype(np.uint8), mask=~(given.there & (status >= 0))),
            "command": pa.array((said >> 16 & 0xFF).astype(np.uint8), mask=~is_nvme),
            "namespace": pa.array((said >> 32).astype(np.uint32), mask=~is_nvme),
            "code": pa.array((said & 0x7FF).astype(np.uint16), mask=~is_nvme),
            "answer_hash": given.column("since"),
            "content": _contents(ordered, segment, count, done, access=1),
            "answer": _contents(ordered, segment, count, done, access=2),
            "read_pieces": _pieces(ordered, segment, count, done, access=1),
            "write_pieces": _pieces(ordered, segment, count, done, access=2),
        }
        return pa.table(arrays, schema=_TABLE)

    def _gaps(
        self, queues: _Array, offset: _Array, length: _Array, known: _Array
    ) -> tuple[_Array, _Array]:
        """From the end of each queue's read or write before to where each begins."""
        gap, is_gap = np.zeros(len(queues), np.int64), np.zeros(len(queues), dtype=bool)
        for queue in np.unique(queues[known]):
            at = np.flatnonzero(known & (queues == queue))
            key = (int(queue) >> 16, int(queue) & 0xFFFF)
            ends = (offset[at] + length[at]).astype(np.int64)
            before = np.concatenate([[self._ends.get(key, -1)], ends[:-1]])
            is_gap[at] = before >= 0
            gap[at] = offset[at].astype(np.int64) - before
            self._ends[key] = int(ends[-1])
        return gap, is_gap

    def _interrupts(self, rows: pa.Table, records: Records, *, last: bool) -> pa.Table:
        """The rows whose notification is known, or comes no more; the others wait."""
        rows = pa.concat_tables([self._waiting, rows])
        if not len(rows):
            return rows
        interrupts = records[records["what"] == What.INTERRUPT]
        completed = _numbers(rows, "completed")
        queues = (_numbers(rows, "origin") << np.uint64(16)) | _numbers(rows, "queue")
        found = _numbers(rows, "interrupted")
        for queue in np.unique(queues):
            times = interrupts["time"][_queue_of(interrupts) == queue]
            mine = np.flatnonzero((queues == queue) & (completed > 0))
            at = np.searchsorted(times, completed[mine])
            reached = at < len(times)
            found[mine[reached]] = times[at[reached]]
        in_time = (found >= completed) & (found - completed <= INTERRUPT_WITHIN_NS)
        known = in_time & (found > 0)
        until = records["time"][-1] if len(records) else np.uint64(0)
        over = (completed == 0) | (found > 0) | (until > completed + np.uint64(INTERRUPT_WITHIN_NS))
        if last:
            over[:] = True
        # In the order of the table: nothing overtakes what waits.
        waits = np.flatnonzero(~over)
        end = int(waits[0]) if len(waits) else len(rows)
        rows = rows.set_column(
            rows.schema.get_field_index("interrupted"),
            "interrupted",
            pa.array(found, mask=~known),
        )
        self._waiting = rows.slice(end)
        return rows.slice(0, end)


def _numbers(rows: pa.Table, name: str) -> _Array:
    """A column as uint64, 0 for null."""
    column = rows.column(name).combine_chunks()
    found: _Array = column.fill_null(0).to_numpy(zero_copy_only=False)
    return found.astype(np.uint64)


def _queue_of(records: Records) -> _Array:
    """A number for each record's server and queue."""
    found: _Array = (records["origin"].astype(np.uint32) << np.uint32(16)) | records["queue"]
    return found


def _any_bits(numbers: _Array) -> int:
    """The bits that are set in any of some numbers."""
    # The stubs of numpy 2.5 refuse every call of it.
    reduce: Callable[[_Array], Any] = getattr(np.bitwise_or, "reduce")  # noqa: B009 - as said
    return int(reduce(numbers))


def _dense(key: _Array) -> _Array:
    """Numbers in the same order, of 16 bits if there are few: these are sorted ten times faster."""
    low = _any_bits(key & np.uint64(0xFFFFFFFF)).bit_length()
    high = _any_bits((key ^ key[0]) >> np.uint64(32)).bit_length()
    if _any_bits(key ^ key[0]) and low + high <= 16:
        part = (key >> np.uint64(32)) & np.uint64((1 << high) - 1)
        return ((part << np.uint64(low)) | (key & np.uint64(0xFFFFFFFF))).astype(np.uint16)
    return key


class _Chosen:
    """The last, or first, record of a kind of each segment that becomes a row.

    Attributes:
        at: Where it is; anything if there is none.
        there: Whether there is one.
    """

    def __init__(
        self,
        records: Records,
        chosen: _Array,
        segment: _Array,
        count: int,
        done: _Array,
        *,
        first: bool = False,
    ) -> None:
        self._records = records
        where = np.full(count, -1, np.int64)
        at = np.flatnonzero(chosen)
        if first:
            at = at[::-1]
        where[segment[at]] = at
        self.at = where[done]
        self.there: _Array = self.at >= 0

    def __getitem__(self, field: str) -> _Array:
        """A field of these records."""
        found: _Array = self._records[field][self.at]
        return found

    def column(self, field: str, kind: type[np.generic] | None = None) -> pa.Array:
        """The same as a column, null where there is none."""
        values = self[field] if kind is None else self[field].astype(kind)
        return pa.array(values, mask=~self.there)


def _pieces(
    records: Records, segment: _Array, count: int, done: _Array, *, access: int
) -> pa.Array:
    """The BUFFER records of each chosen segment as a list."""
    at = np.flatnonzero((records["what"] == What.BUFFER) & (records["access"] == access))
    if not len(at):
        return pa.nulls(len(done), PIECES)
    sizes = np.bincount(segment[at], minlength=count)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    values = pa.StructArray.from_arrays(
        [
            pa.array(np.ascontiguousarray(records["address"][at])),
            pa.array(np.ascontiguousarray(records["length"][at])),
        ],
        fields=list(PIECES.value_type),
    )
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=PIECES).take(pa.array(done))


def _contents(
    records: Records, segment: _Array, count: int, done: _Array, *, access: int
) -> pa.Array:
    """The bytes that DATA records of each chosen segment hold; null unless all are there."""
    mine = records["access"] == access
    announced = np.zeros(count, np.int64)
    is_there = np.zeros(count, dtype=bool)
    at = np.flatnonzero(mine & (records["what"] == What.CONTENT))
    announced[segment[at]] = records["detail"][at]
    is_there[segment[at]] = True
    if access == 2:
        is_there &= announced > 0
    at = np.flatnonzero(mine & (records["what"] == What.DATA))
    chunks = np.bincount(segment[at], minlength=count)
    is_there &= announced <= chunks * CHUNK_BYTES
    if not is_there.any():
        return pa.nulls(len(done), pa.large_binary())
    raw = np.ascontiguousarray(records[at]).view(np.uint8).reshape(-1, RECORD.itemsize)
    raw = raw[:, CHUNK : CHUNK + CHUNK_BYTES]
    begin = np.concatenate([[0], np.cumsum(chunks)])
    number = np.arange(len(at)) - begin[segment[at]]
    kept = np.where(is_there, announced, 0)
    left = kept[segment[at]] - number * CHUNK_BYTES
    content = raw[np.arange(CHUNK_BYTES) < left[:, None]]
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    array = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), count, [None, pa.py_buffer(offsets), pa.py_buffer(content)]
    )
    chosen = array.take(pa.array(done))
    if is_there[done].all():
        return chosen
    return pa.compute.if_else(pa.array(is_there[done]), chosen, pa.scalar(None, pa.large_binary()))
