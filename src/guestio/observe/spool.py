"""The file of a recording while it runs: an Arrow IPC stream of records as they are.

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
from guestio.trace import RECORD, VERSION, Records

_SCHEMA: Final = pa.schema(
    [pa.field("record", pa.binary(RECORD.itemsize), nullable=False)],
    metadata={"guestio.trace": str(VERSION)},
)

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

    def write(self, records: Records, description: Description | None = None) -> None:
        """Append records, and how the recording is described from now on unless it is as before.

        Raises:
            OSError: There is no room, for example.
        """
        data = pa.py_buffer(np.ascontiguousarray(records).view(np.uint8))
        array = pa.FixedSizeBinaryArray.from_buffers(_SCHEMA[0].type, len(records), [None, data])
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
    """What was written, batch by batch, up to the last whole one.

    Raises:
        ValueError: It is no such file, or of another version.
    """
    with pa.OSFile(os.fspath(path)) as file:
        try:
            reader = pa.ipc.open_stream(file)
        except (pa.ArrowException, OSError) as error:
            # Which of them junk leads to is a matter of chance.
            raise ValueError(str(error)) from None
        if reader.schema.names != _SCHEMA.names:
            raise ValueError("its columns are not those of records")
        found = (reader.schema.metadata or {}).get(b"guestio.trace", b"").decode()
        if found != str(VERSION) or reader.schema.field(0).type != _SCHEMA[0].type:
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
            records = np.frombuffer(memoryview(data)[begin:end], RECORD)
            described = None
            if metadata is not None and METADATA_KEY in metadata:
                described = json.loads(metadata[METADATA_KEY])
            yield records, described
