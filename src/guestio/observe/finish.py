"""Makes the Parquet file of what was written while a recording ran."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from guestio.observe.assemble import Assembler
from guestio.observe.schema import EVENT, FILE_SCHEMA, MAPPING, METADATA_KEY, REQUEST
from guestio.observe.spool import Description, read_spool
from guestio.trace import RECORD, What

ROW_GROUP: Final = 1 << 18
"""Rows of a row group, but for the last ones of each kind."""

_FEW_VALUES: Final = [
    "kind", "origin", "queue", "thread", "what", "access", "operation", "readable", "writable",
    "written", "misses", "status", "failed", "ended_by",
]  # fmt: skip
_TIMES: Final = [
    "time", "since", "available", "stalled", "taken", "served", "completed", "interrupted",
    "sequence", "position", "mapped", "unmapped",
]  # fmt: skip


class RecordingFile:
    """Writes rows to a Parquet file, each kind in row groups of its own.

    Args:
        path: A new file.
    """

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(
            path,
            FILE_SCHEMA,
            compression="zstd",
            compression_level=1,
            use_dictionary=_FEW_VALUES,
            column_encoding=dict.fromkeys(_TIMES, "DELTA_BINARY_PACKED"),
            write_statistics=True,
        )
        self._rows: dict[int, list[pa.Table]] = {EVENT: [], REQUEST: [], MAPPING: []}

    def add(self, tables: list[pa.Table]) -> None:
        """Append tables of one kind of row each."""
        for table in tables:
            kind = table.column("kind")[0].as_py()
            waiting = self._rows[kind]
            waiting.append(table)
            if sum(map(len, waiting)) >= ROW_GROUP:
                self._flush(kind)

    def _flush(self, kind: int) -> None:
        if self._rows[kind]:
            self._writer.write_table(pa.concat_tables(self._rows[kind]), row_group_size=ROW_GROUP)
            self._rows[kind] = []

    def close(self, description: Description) -> None:
        """End the file with what describes it."""
        for kind in self._rows:
            self._flush(kind)
        self._writer.add_key_value_metadata({METADATA_KEY: json.dumps(description)})
        self._writer.close()

    def abandon(self) -> None:
        """Close it as it is."""
        self._writer.close()


def finish(path: Path, to: Path | None = None) -> Description:
    """Make a Parquet file of the file of a recording that is not running any more.

    Args:
        path: What was written while it ran.
        to: Where to; by default it takes the place of that, once it is complete.

    Returns:
        What describes the recording, with its counts.

    Raises:
        ValueError: It is no such file.
        OSError: There is no room, for example; the file of before is left as it is.
    """
    batches = read_spool(path)
    target = path.with_name(f".{path.name}.{os.getpid()}") if to is None else to
    description: Description = {}
    try:
        out = RecordingFile(target)
        try:
            assembler = Assembler()
            for records, described in batches:
                description = described or description
                out.add(assembler.add(records))
            out.add(assembler.add(np.zeros(0, RECORD), last=True))
            description = description | {
                "rows": {
                    "requests": assembler.counts[REQUEST],
                    "events": assembler.counts[EVENT],
                    "mappings": assembler.counts[MAPPING],
                },
                "incomplete": assembler.incomplete,
                "counts": {
                    what.name.lower(): int(assembler.whats[what])
                    for what in What
                    if assembler.whats[what]
                },
            }
        except BaseException:
            out.abandon()
            raise
        out.close(description)
        target.chmod(0o600)
        if to is None:
            target.replace(path)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return description
