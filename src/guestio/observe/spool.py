"""The file of a recording while it runs: an Arrow IPC stream of records as rings hold them.

They are not put in order, nor is a request that was written as one made three records, before the
file is read: while it is written the server may be waiting for the processor.

Each batch has what describes the recording at that time as its metadata, so what a crash leaves can
be read up to the last whole batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from guestio.observe.schema import METADATA_KEY
from guestio.trace import RECORD, VERSION, Records, Slots, spell_out

_SCHEMA: Final = pa.schema(
    [pa.field("record", pa.binary(RECORD.itemsize), nullable=False)],
    metadata={"guestio.trace": str(VERSION)},
)

_READABLE: Final = ("1", str(VERSION))
"""Versions of records that can be read: those of version 1 are of version 2, too."""

SLOTS_AT_ONCE: Final = 1 << 17
"""Slots that are read at a time: up to 200 MiB of memory until they are rows."""

LATE_NS: Final = 250_000_000
"""How much earlier than one that was written before it a record may be and is put in order."""

Description = dict[str, Any]
"""What describes a recording, as JSON."""


class Spool:
    """Writes records to a new file.

    Args:
        path: Where; only this user may read it.

    Raises:
        OSError: It is there already, or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(fd, "wb", buffering=0)
        self._writer = pa.ipc.new_stream(self._file, _SCHEMA)

    @property
    def bytes(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def write(self, slots: Slots, description: Description | None = None) -> None:
        """Append records, and how the recording is described from now on unless it is as before.

        Raises:
            OSError: There is no room, for example.
        """
        data = pa.py_buffer(np.ascontiguousarray(slots).view(np.uint8))
        array = pa.FixedSizeBinaryArray.from_buffers(_SCHEMA[0].type, len(slots), [None, data])
        batch = pa.record_batch([array], schema=_SCHEMA)
        metadata = None
        if description is not None:
            metadata = {METADATA_KEY: json.dumps(description)}
        self._writer.write_batch(batch, custom_metadata=metadata)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
        self._file.close()


def read_spool(path: Path) -> Iterator[tuple[Records, Description | None]]:
    """What was written, up to the last whole batch: all records in the order of time, in portions.

    Raises:
        ValueError: It is no such file, or of another version.
    """
    late: Records = np.zeros(0, RECORD)
    waiting: list[Slots] = []
    latest: Description | None = None
    for slots, described in _read_batches(path):
        latest = latest if described is None else described
        waiting.append(slots)
        if sum(map(len, waiting)) >= SLOTS_AT_ONCE:
            records = _in_order(late, np.concatenate(waiting))
            until = max(int(records["time"][-1]) - LATE_NS, 0)
            end = int(np.searchsorted(records["time"], until, "right"))
            yield records[:end], latest
            late, waiting = records[end:].copy(), []
    yield _in_order(late, np.concatenate(waiting) if waiting else np.zeros(0, RECORD)), latest


def _in_order(late: Records, slots: Slots) -> Records:
    """The records that slots stand for, together with those that may be later than some of them."""
    records = spell_out(slots)
    if not len(late):
        return records
    records = np.concatenate([late, records])
    if np.all(records["time"][1:] >= records["time"][:-1]):
        return records
    return records[np.argsort(records["time"], kind="stable")]


def _read_batches(path: Path) -> Iterator[tuple[Slots, Description | None]]:
    """What was written, batch by batch, up to the last whole one."""
    with pa.OSFile(os.fspath(path)) as file:
        try:
            reader = pa.ipc.open_stream(file)
        except (pa.ArrowException, OSError) as error:
            # Which of them junk leads to is a matter of chance.
            raise ValueError(str(error)) from None
        if reader.schema.names != _SCHEMA.names:
            raise ValueError("its columns are not those of records")
        found = (reader.schema.metadata or {}).get(b"guestio.trace", b"").decode()
        if found not in _READABLE or reader.schema.field(0).type != _SCHEMA[0].type:
            raise ValueError(f"its records are of version {found[:20]!r}, not {VERSION}")
        while True:
            try:
                batch, metadata = reader.read_next_batch_with_custom_metadata()
            except (StopIteration, pa.ArrowException, OSError):
                # The end, or where a crash has left it.
                return
            array = batch.column(0)
            data = array.buffers()[1]
            begin, end = (at * RECORD.itemsize for at in (array.offset, array.offset + len(array)))
            slots = np.frombuffer(memoryview(data)[begin:end], RECORD)
            described = None
            if metadata is not None and METADATA_KEY in metadata:
                described = json.loads(metadata[METADATA_KEY])
            yield slots, described
