"""Recordings for other programs: Perfetto's timeline, and packets for Wireshark.

Both are made of the recording's events in the order of time. The rows of requests are taken apart
into the events that they were put together from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from guestio.budgets import RECORD_CONVERTED
from guestio.errors import DeviceError
from guestio.observe import pcapng
from guestio.observe.perfetto import PerfettoTrace
from guestio.trace import FIELDS, RECORD, Records, What

if TYPE_CHECKING:
    import pyarrow as pa

    from guestio.observe.recording import Recording

_AT_ONCE: Final = 1 << 16
_ACCESS: Final = {"read": 1, "write": 2, "flush": 3}


def events_of(
    recording: Recording, *, contents: bool = False
) -> tuple[Records, Mapping[int, bytes]]:
    """All events of a recording in the order of time, those of requests included.

    Args:
        recording: The recording.
        contents: Whether what requests carry is wanted as well.

    Returns:
        The events; and by the index of some of them, what the request gave to read (at TAKEN) or
        was answered (at COMPLETED), as far as it was recorded.

    Raises:
        DeviceError: There are more than RECORD_CONVERTED.

    Memory: 150 bytes for each.
    """
    requests, others = recording.requests(), recording.events()
    if 3 * len(requests) + len(others) > RECORD_CONVERTED:
        raise DeviceError(
            f"{recording.path} has {len(requests)} requests and {len(others)} other events; "
            f"{RECORD_CONVERTED} events at most can be converted"
        )
    parts = [_of_requests(requests, what) for what in _STAGES]
    rest = np.zeros(len(others), RECORD)
    for field in FIELDS:
        rest[field.name] = _numbers(others, field.name)
    joined = np.concatenate([records for records, _ in parts] + [rest])
    order = np.argsort(joined["time"], kind="stable")
    held: dict[int, bytes] = {}
    if contents:
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        begin = 0
        for what, (records, rows) in zip(_STAGES, parts, strict=True):
            column = {What.TAKEN: "content", What.COMPLETED: "answer"}.get(what)
            if column is not None:
                values = requests.column(column).take(rows)
                for number, value in enumerate(values.to_pylist()):
                    if value:
                        held[int(place[begin + number])] = value
            begin += len(records)
    return joined[order], held


_STAGES: Final = (What.LACKING, What.TAKEN, What.SERVED, What.COMPLETED)
_TIMES: Final = {
    What.LACKING: "stalled",
    What.TAKEN: "taken",
    What.SERVED: "served",
    What.COMPLETED: "completed",
}


def _of_requests(table: pa.Table, what: What) -> tuple[Records, NDArray[np.int64]]:
    """The events of one kind that requests were put together from, and the rows they are of."""
    rows = np.flatnonzero(table.column(_TIMES[what]).is_valid().to_numpy())
    chosen = table.take(rows)
    found = np.zeros(len(rows), RECORD)
    found["what"] = what
    found["time"] = _numbers(chosen, _TIMES[what])
    for name in ("origin", "queue", "head", "thread"):
        found[name] = _numbers(chosen, name)
    if what == What.LACKING:
        found["detail"] = _numbers(chosen, "misses")
        return found, rows
    found["since"] = _numbers(chosen, "available")
    operations = chosen.column("operation").to_pylist()
    if what == What.COMPLETED:
        found["length"] = _numbers(chosen, "written")
        found["detail"] = _numbers(chosen, "offset")
        found["access"] = [_ACCESS.get(each, 0) for each in operations]
        return found, rows
    found["address"] = _numbers(chosen, "address")
    found["length"], found["detail"] = _numbers(chosen, "readable"), _numbers(chosen, "writable")
    if what == What.SERVED:
        found["result"] = _numbers(chosen, "written")
        found["access"] = [_ACCESS.get(each, 0) for each in operations]
    else:
        found["result"] = _numbers(chosen, "position")
    return found, rows


def _numbers(table: pa.Table, name: str) -> NDArray[Any]:
    """A column as integers, 0 for null."""
    column = table.column(name).combine_chunks()
    found: NDArray[Any] = column.fill_null(0).to_numpy(zero_copy_only=False)
    return found


def write_perfetto(recording: Recording, path: str | os.PathLike[str]) -> int:
    """Write a recording as a trace for https://ui.perfetto.dev; how many events it has.

    Args:
        recording: The recording.
        path: The file; replaced if it exists.

    Raises:
        DeviceError: It is too long, see :func:`events_of`.
        OSError: The file cannot be written.

    Cost: 60 us and 320 bytes of the file for a request.
    """
    records, _ = events_of(recording)
    trace = PerfettoTrace(_name(recording), _process(recording))
    with Path(path).open("wb") as file:
        for begin in range(0, len(records), _AT_ONCE):
            file.writelines(trace.feed(records[begin : begin + _AT_ONCE]))
        file.writelines(trace.end())
    return len(records)


def write_pcapng(recording: Recording, path: str | os.PathLike[str]) -> int:
    """Write a recording as packets for Wireshark with the dissector; how many there are.

    What requests carry is in them as far as it was recorded.

    Args:
        recording: The recording.
        path: The file; replaced if it exists.

    Raises:
        DeviceError: It is too long, see :func:`events_of`.
        OSError: The file cannot be written.

    Cost: 0.3 us for an event, some more for one with content.
    """
    records, held = events_of(recording, contents=True)
    began = recording.description.get("began") or {}
    shift = began.get("realtime_ns", 0) - began.get("monotonic_ns", 0)
    with Path(path).open("wb") as file:
        file.write(pcapng.begin("guestio", _name(recording)))
        chunks: dict[int, dict[int, bytes]] = {}
        for at, data in held.items():
            chunks.setdefault(at // _AT_ONCE, {})[at % _AT_ONCE] = data
        for number, begin in enumerate(range(0, len(records), _AT_ONCE)):
            part = records[begin : begin + _AT_ONCE]
            file.write(pcapng.packets(part, shift, chunks.get(number)))
    return len(records)


def _name(recording: Recording) -> str:
    device = recording.description.get("device") or {}
    kind, path = str(device.get("kind", "device")), str(device.get("path", ""))
    return f"{kind} at {path}" if path else kind


def _process(recording: Recording) -> int:
    process = recording.description.get("process") or {}
    return int(process.get("pid", 1))
