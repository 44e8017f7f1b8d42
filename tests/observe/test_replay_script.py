"""What a replay takes from a recording's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from guestio.observe.schema import EVENT_COLUMNS, REQUEST_COLUMNS
from guestio.observe.script import NotReplayableError, RecordedRequest, Script, scripts_of
from guestio.trace import What

PLATFORM = 1 << 33


class Rows:
    """A recording made of rows."""

    path = Path("made-up.parquet")

    def __init__(
        self, requests: list[dict[str, Any]], events: list[dict[str, Any]], **description: Any
    ) -> None:
        self._requests, self._events = requests, events
        self.description = {"payload": "all", "device": {"device_id": 2}} | description

    def requests(self) -> pa.Table:
        return self._table(REQUEST_COLUMNS, self._requests)

    def events(self) -> pa.Table:
        return self._table(EVENT_COLUMNS, self._events)

    @staticmethod
    def _table(columns: Any, rows: list[dict[str, Any]]) -> pa.Table:
        return pa.table(
            [
                pa.array([row.get(column.name) for row in rows], pa.string()).dictionary_encode()
                if column.name == "operation"
                else pa.array([row.get(column.name) for row in rows], column.type)
                for column in columns
            ],
            names=[column.name for column in columns],
        )


def row(number: int, taken: int, completed: int | None, **changes: Any) -> dict[str, Any]:
    """A read of sector `number` of a disk, into memory of its own."""
    place = 0x10_0000 * (number + 1)
    return {
        "queue": 0,
        "sequence": number,
        "operation": "read",
        "offset": 512 * number,
        "available": taken - 5,
        "taken": taken,
        "served": None,
        "completed": completed,
        "readable": 16,
        "writable": 513,
        "written": 513,
        "status": 0,
        "content": bytes(16),
        "answer": bytes(513),
        "read_pieces": [{"address": place, "length": 16}],
        "write_pieces": [{"address": place + 4096, "length": 513}],
    } | changes


def write(number: int, taken: int, completed: int, **changes: Any) -> dict[str, Any]:
    place = 0x10_0000 * (number + 1)
    return row(
        number,
        taken,
        completed,
        **{
            "operation": "write",
            "readable": 528,
            "writable": 1,
            "written": 1,
            "content": bytes(528),
            "answer": bytes(1),
            "read_pieces": [{"address": place, "length": 528}],
            "write_pieces": [{"address": place + 4096, "length": 1}],
        }
        | changes,
    )


def script(
    requests: list[dict[str, Any]], events: list[dict[str, Any]] | None = None, **description: Any
) -> Script:
    (found,) = scripts(requests, events, **description)
    return found


def scripts(
    requests: list[dict[str, Any]], events: list[dict[str, Any]] | None = None, **description: Any
) -> list[Script]:
    made: Any = Rows(requests, events or [], **description)
    return scripts_of(made)


def only(found: Script) -> RecordedRequest:
    (request,) = found.requests
    return request


def test_answers_of_a_batch_are_seen_together() -> None:
    """What was taken between two requests' being served and their answers' publication overlaps."""
    found = script(
        [
            row(0, 100, 200, served=110),
            row(1, 120, 200, served=150),
            row(2, 140, 300),
            row(3, 160, 300),
        ]
    )
    assert [each.end for each in found.requests] == [150, 150, 300, 300]
    # How many must be answered before each: the third was taken before the first two were seen.
    assert [found.before(each.start) for each in found.requests] == [0, 0, 0, 2]
    assert [each.found for each in found.requests] == [95, 115, 135, 155]
    assert found.began == 95


def test_a_read_of_what_is_being_written_may_be_answered_either_way() -> None:
    same = {"offset": 0}
    apart = script([write(0, 100, 200, **same), row(1, 300, 400, **same)])
    assert all(each.repeatable for each in apart.requests)
    beside = script([write(0, 100, 200, **same), row(1, 150, 400, offset=512)])
    assert all(each.repeatable for each in beside.requests)
    for rows in (
        [write(0, 100, 200, **same), row(1, 150, 400, **same)],
        [row(1, 100, 200, **same), write(0, 150, 400, **same)],
    ):
        found = {each.operation: each.repeatable for each in script(rows).requests}
        assert found == {"read": False, "write": True}
    reads = script([row(0, 100, 200, **same), row(1, 150, 400, **same)])
    assert all(each.repeatable for each in reads.requests)


def test_pieces_are_one_buffer_behind_an_iommu_alone() -> None:
    pieces = [
        {"address": 0x1F00, "length": 256},
        {"address": 0x2000, "length": 256},
        {"address": 0x2100, "length": 1},
    ]
    rows = [row(0, 100, 200, write_pieces=pieces)]
    assert len(only(script(rows)).writable) == 3
    behind = script(rows, peers=[{"feature_bits": PLATFORM}])
    assert behind.iommu
    # Where it did not end with a page the driver gave two.
    assert only(behind).writable == [(0x1F00, 512), (0x2100, 1)]


def test_refused_pages_are_those_of_the_time() -> None:
    refused = {"what": int(What.REFUSED), "address": 0x10_1000, "length": 4096, "access": 2}
    found = script([row(0, 100, 200), row(0, 300, 400)], [refused | {"time": 150}])
    assert [each.refused for each in found.requests] == [{0x10_1000}, frozenset()]
    elsewhere = script([row(0, 100, 200)], [refused | {"time": 150, "address": 0x10_2000}])
    assert only(elsewhere).refused == frozenset()


def test_sizes_are_the_largest_of_those_in_use() -> None:
    started = {"what": int(What.QUEUE_STARTED), "queue": 0}
    found = script(
        [row(0, 100, 200)],
        [started | {"length": 64}, started | {"length": 100}, started | {"length": 0}],
        peers=[{"queues": [{"index": 0, "size": 128}, {"index": 1, "size": 256}]}],
    )
    assert found.sizes == {0: 128}


def test_what_is_not_whole_is_left_out_or_refused() -> None:
    found = script([row(0, 100, 200), row(1, 150, None), row(2, 150, 300) | {"taken": None}])
    assert len(found.requests) == 1
    assert found.left_out == {
        "have no end in the recording": 1,
        "were taken before the recording began": 1,
    }
    cut = [row(0, 100, 200), row(1, 300, 400, content=bytes(15))]
    for description, advice in (
        ({"payload": "headers"}, "record with --payload all"),
        ({"lost": 7}, "7 records were lost"),
        ({}, "1048576 bytes were recorded at most"),
    ):
        with pytest.raises(NotReplayableError, match=rf"1 of its 2 requests.*15 of 16.*{advice}"):
            script(cut, **description)
    with pytest.raises(NotReplayableError, match="cannot be"):
        script([row(0, 100, 200, write_pieces=[{"address": 2**64 - 1, "length": 513}])])


def test_each_front_end_is_a_script_of_its_own() -> None:
    """Its requests, features, queues, IOMMU and revocations; numbers begin again."""

    def came(time: int, number: int) -> dict[str, Any]:
        return {"what": int(What.CONNECTED), "time": time, "detail": number}

    def revoked(time: int) -> dict[str, Any]:
        return {"what": int(What.INVALIDATE), "time": time, "address": 0, "length": 4096}

    def peer(number: int, bits: int | None, size: int) -> dict[str, Any]:
        queues = [{"index": 0, "size": size}]
        return {"number": number, "feature_bits": bits, "queues": queues}

    requests = [row(n, 100 * n, 100 * n + 50) for n in range(1, 9)]
    requests[4]["completed"] = None
    found = scripts(
        requests,
        [came(250, 4), came(450, 5), came(460, 6), came(650, 7), revoked(150), revoked(720)],
        peers=[peer(3, 1, 64), peer(4, PLATFORM, 128), peer(6, None, 32), peer(7, 7, 16)],
    )
    assert [[each.sequence for each in script.requests] for script in found] == [
        [1, 2], [3, 4], [6], [7, 8],
    ]  # fmt: skip
    assert [[each.number for each in script.requests] for script in found] == [
        [0, 1], [0, 1], [0], [0, 1],
    ]  # fmt: skip
    # Of the one that was there for a moment only the features are not known: those of the latest.
    assert [script.features for script in found] == [1, PLATFORM, 7, 7]
    assert [script.sizes for script in found] == [{0: 64}, {0: 128}, {0: 32}, {0: 16}]
    assert [script.iommu for script in found] == [True, True, False, True]
    assert [len(script.revocations) for script in found] == [1, 0, 0, 1]
    assert [script.left_out for script in found] == [
        {"have no end in the recording": 1},
        {},
        {},
        {},
    ]
    assert [script.before(10**9) for script in found] == [2, 2, 1, 2]
