"""Reads recordings, finished or as a crash has left them."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from guestio.errors import GuestioError
from guestio.observe.finish import finish
from guestio.observe.schema import (
    EVENT,
    EVENT_COLUMNS,
    FILE_SCHEMA,
    MAPPING,
    MAPPING_COLUMNS,
    METADATA_KEY,
    REQUEST,
    REQUEST_COLUMNS,
    VERSION,
    Column,
)
from guestio.trace import Group, What

MAGIC: Final = b"PAR1"
"""At the beginning of a finished recording, and of any other Parquet file."""


class RecordingError(GuestioError):
    """A file holds no recording that can be read."""


_FAULTS = (What.FAILED, What.REFUSED, What.FAULT, What.QUEUE_BROKEN, What.ERROR)


class Recording:
    """A recording, made by :func:`open_recording`.

    Attributes:
        path: The file.
        description: What describes it, as ``docs/recordings.md`` lists it: the device, what each
            peer negotiated, how many records were lost.
        parquet: The Parquet file: that one, or a temporary one of what a crash has left.

    Threads: any. Each method reads the file anew, and takes memory in proportion to its rows;
    `guestio.observe.report` looks at recordings that are larger.
    """

    def __init__(self, path: Path, parquet: Path, undo: contextlib.ExitStack) -> None:
        self.path, self.parquet, self._undo = path, parquet, undo
        self.description, _ = describe(parquet, path)

    def _rows(self, kind: int, columns: Sequence[Column]) -> pa.Table:
        """All rows of a kind; groups of others are not read."""
        names = [column.name for column in columns]
        with pq.ParquetFile(self.parquet) as file:
            chosen = row_groups(file, kind)
            table = file.read_row_groups(chosen, columns=names) if chosen else _empty(names)
        return table.select(names)

    def requests(self) -> pa.Table:
        """The requests, in the order of their completion, with the columns `REQUEST_COLUMNS`."""
        return self._rows(REQUEST, REQUEST_COLUMNS)

    def events(self) -> pa.Table:
        """All events that are no part of a request's row, in the order of time.

        The columns are those of `guestio.trace.RECORD`.
        """
        return self._rows(EVENT, EVENT_COLUMNS)

    def translations(self) -> pa.Table:
        """The events that concern translations and DMA maps, in the order of time."""
        return self._events_of(what for what in What if what.group == Group.TRANSLATIONS)

    def faults(self) -> pa.Table:
        """Events that are mistakes: of drivers, front-ends, clients or the device."""
        return self._events_of(_FAULTS)

    def mappings(self) -> pa.Table:
        """Translations and DMA maps with their lifetimes, in the order of their ends."""
        return self._rows(MAPPING, MAPPING_COLUMNS)

    def _events_of(self, whats: Iterable[What]) -> pa.Table:
        events = self.events()
        chosen = pa.array([int(what) for what in whats], pa.uint16())
        return events.filter(pc.is_in(events["what"], value_set=chosen))

    def close(self) -> None:
        """Remove the temporary file, if there is one. Calling it again does nothing."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _empty(names: Sequence[str]) -> pa.Table:
    return pa.schema([FILE_SCHEMA.field(name) for name in names]).empty_table()


def row_groups(file: pq.ParquetFile, kind: int) -> list[int]:
    """The row groups that hold rows of a kind."""
    found = []
    for at in range(file.metadata.num_row_groups):
        statistics = file.metadata.row_group(at).column(0).statistics
        if statistics is None or statistics.min <= kind <= statistics.max:
            found.append(at)
    return found


def describe(parquet: Path | BinaryIO, path: Path | str) -> tuple[dict[str, Any], list[int]]:
    """What describes a finished recording, and the rows of each of its row groups.

    Args:
        parquet: The file.
        path: What to call it.

    Raises:
        RecordingError: It is none, or of another version.
    """
    try:
        with pq.ParquetFile(parquet) as file:
            schema, about = file.schema_arrow, file.metadata
            metadata = about.metadata or {}
            groups = [about.row_group(at).num_rows for at in range(about.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise RecordingError(f"{path} is no recording: {_first_line(error)}") from None
    try:
        found = json.loads(metadata[METADATA_KEY])
        version = found["version"]
    except (KeyError, ValueError, TypeError):
        raise RecordingError(f"{path} is a Parquet file, but no recording of guestio's") from None
    if version != VERSION:
        raise RecordingError(
            f"{path} is a recording of version {version!r:.20}, and this guestio reads version "
            f"{VERSION}"
        )
    for field in FILE_SCHEMA:
        at = schema.get_field_index(field.name)
        if at < 0 or not schema.field(at).type.equals(field.type):
            raise RecordingError(
                f"{path} lacks the column {field.name} of type {field.type}, which recordings of "
                f"version {VERSION} have"
            )
    description: dict[str, Any] = found
    return description, groups


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def open_recording(path: str | os.PathLike[str]) -> Recording:
    """Open a recording: a finished one, one that is being written, or what a crash has left of one.

    Args:
        path: The file.

    Raises:
        RecordingError: It is no recording, or of another version.
        OSError: It cannot be read; or it is unfinished, and there is no room for a temporary file.

    Cost: nothing for a finished recording; else about a second for a million requests.
    """
    path = Path(path)
    with path.open("rb") as file:
        is_parquet = file.read(len(MAGIC)) == MAGIC
    with contextlib.ExitStack() as undo:
        parquet = path
        if not is_parquet:
            directory = undo.enter_context(tempfile.TemporaryDirectory(prefix="guestio-"))
            parquet = Path(directory, "recording.parquet")
            try:
                finish(path, parquet)
            except ValueError as error:
                raise RecordingError(f"{path} is no recording: {_first_line(error)}") from None
        found = Recording(path, parquet, undo)
        found._undo = undo.pop_all()
        return found
