"""Recordings in parts: each is asked by itself, in threads here or by a cluster's workers."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final, NamedTuple

import duckdb
import pyarrow as pa

from guestio.budgets import REPORT_PART_ROWS
from guestio.observe.finish import finish
from guestio.observe.places import copied, for_duckdb, has_ranges, opened, reaching, reason
from guestio.observe.queries import SAME, Answers, ask, connected, make_views, quoted
from guestio.observe.recording import MAGIC, RecordingError, describe

ROW_BYTES: Final = 256
"""Memory for a row that is looked at, with what is made of it."""

MOST_SHIFT_NS: Final = 1 << 61

Description = dict[str, Any]


class Part(NamedTuple):
    """Rows of a recording that are looked at together.

    Attributes:
        path: Of the recording, or its URL.
        groups: Rows of each of its row groups, or None for all of a recording whose file is not
            finished, or comes from a server that knows no ranges.
        begin: Rows before them.
        shift_ns: What is added to times.
        align: Whether times are to be those of CLOCK_REALTIME, if `groups` is None.
    """

    path: str
    groups: tuple[int, ...] | None = None
    begin: int = 0
    shift_ns: int = 0
    align: bool = False

    @property
    def rows(self) -> int:
        """How many rows, if it is known."""
        return sum(self.groups or ())

    def __str__(self) -> str:
        if self.groups is None:
            return self.path
        return f"{self.path}, rows {self.begin} to {self.begin + self.rows - 1}"


class Unreadable(NamedTuple):
    """What is left out of a report, and why."""

    path: str
    why: str


class PartAnswer(NamedTuple):
    """What was found in a part.

    Attributes:
        answers: The answers, if any of it could be read.
        unreadable: What could not be read of it.
        description: Of the recording, if it is all in this part.
        same: `SAME` of where it was asked.
    """

    answers: Answers | None
    unreadable: list[Unreadable]
    description: Description | None = None
    same: str = SAME


def shift_of(description: Description) -> int:
    """What makes times of a recording those of CLOCK_REALTIME; 0 if it does not say."""
    began = description.get("began")
    try:
        shift = int(began["realtime_ns"]) - int(began["monotonic_ns"])  # type: ignore[index] # checked by trying
    except (KeyError, TypeError, ValueError):
        return 0
    return shift if abs(shift) < MOST_SHIFT_NS else 0


def part_rows(memory: int) -> int:
    """Rows of a part for so many bytes of memory."""
    return max(min(memory // ROW_BYTES, REPORT_PART_ROWS), 1)


def split(path: str, groups: Sequence[int], rows: int, shift_ns: int) -> Iterator[Part]:
    """A recording in parts of so many rows, but for row groups that are larger."""
    begin, held = 0, 0
    waiting: list[int] = []
    for group in groups:
        if waiting and held + group > rows:
            yield Part(path, tuple(waiting), begin, shift_ns)
            begin, held, waiting = begin + held, 0, []
        waiting.append(group)
        held += group
    if waiting:
        yield Part(path, tuple(waiting), begin, shift_ns)


def look_at(path: str) -> tuple[Description | None, list[int]]:
    """What describes a recording, and its row groups; None if it is to be asked as a whole.

    Raises:
        RecordingError: It is no recording, or of another version.
        OSError: It cannot be read.
    """
    with opened(path) as file, reaching():
        if not file.seekable() or not has_ranges(path) or file.read(len(MAGIC)) != MAGIC:
            return None, []
        return describe(file, path)


@contextlib.contextmanager
def finished(path: str) -> Iterator[Path]:
    """The Parquet file of a recording on this machine, made of what is unfinished.

    Raises:
        RecordingError: It is no recording.
        OSError: It cannot be read, or there is no room for a copy.
    """
    with copied(path) as file:
        with file.open("rb") as head:
            if head.read(len(MAGIC)) == MAGIC:
                yield file
                return
        with tempfile.TemporaryDirectory(prefix="guestio-") as directory:
            made = Path(directory, "recording.parquet")
            try:
                finish(file, made)
            except ValueError as error:
                raise RecordingError(f"{path} is no recording: {reason(error)}") from None
            yield made


class Asker:
    """Asks parts, one after the other.

    Args:
        connection: A DuckDB, for this alone.
        memory: Bytes that it may use.

    Threads: one at a time.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, memory: int) -> None:
        self._connection, self._memory = connection, memory

    def ask(self, part: Part) -> PartAnswer:
        """What is found in a part, and what could not be read of it.

        Raises:
            RecordingError: The memory does not suffice.
        """
        if part.groups is None:
            return self._ask_whole(part)
        found = self._try(part, part.path)
        if isinstance(found, Unreadable):
            return self._pieces(part, part.path, found)
        return PartAnswer(found, [])

    def _ask_whole(self, part: Part) -> PartAnswer:
        try:
            with finished(part.path) as file:
                description, groups = describe(file, part.path)
                shift = shift_of(description) if part.align else 0
                found: list[Answers] = []
                unreadable: list[Unreadable] = []
                for each in split(part.path, groups, part_rows(self._memory), shift):
                    answer = self._try(each, str(file))
                    if isinstance(answer, Unreadable):
                        pieces = self._pieces(each, str(file), answer)
                        unreadable += pieces.unreadable
                        found += [pieces.answers] if pieces.answers is not None else []
                    else:
                        found.append(answer)
        except (RecordingError, OSError) as error:
            return PartAnswer(None, [Unreadable(part.path, reason(error))])
        return PartAnswer(_together(found), unreadable, description)

    def _pieces(self, part: Part, file: str, why: Unreadable) -> PartAnswer:
        """The row groups one by one, as one of them cannot be read."""
        if part.groups is None or len(part.groups) == 1:
            return PartAnswer(None, [why])
        found, unreadable = [], []
        for group, before in zip(
            part.groups, itertools.accumulate(part.groups, initial=0), strict=False
        ):
            each = part._replace(groups=(group,), begin=part.begin + before)
            answer = self._try(each, file)
            if isinstance(answer, Unreadable):
                unreadable.append(answer)
            else:
                found.append(answer)
        return PartAnswer(_together(found), unreadable)

    def _try(self, part: Part, file: str) -> Answers | Unreadable:
        end = part.begin + part.rows
        try:
            name = quoted(for_duckdb(self._connection, file))
            make_views(
                self._connection,
                # Row groups without such rows are not read.
                f"(SELECT * FROM read_parquet({name}, hive_partitioning = false, "
                f"file_row_number = true) WHERE file_row_number >= {part.begin} "
                f"AND file_row_number < {end})",
                quoted(part.path),
                str(part.shift_ns),
            )
            return ask(self._connection)
        except duckdb.OutOfMemoryException:
            raise RecordingError(
                f"{self._memory >> 20} MiB of memory do not suffice for {part}; allow more"
            ) from None
        except duckdb.Error as error:
            return Unreadable(str(part), reason(error))


def _together(found: Sequence[Answers]) -> Answers | None:
    if not found:
        return None
    return {name: pa.concat_tables([each[name] for each in found]) for name in found[0]}


Progress = Callable[[int, int], None]
"""Told of rows that were looked at, and of all."""


class Portion(NamedTuple):
    """A part, and what was found in it."""

    part: Part
    answer: PartAnswer


Portions = Generator[Portion, None, None]


def ask_here(parts: Iterable[Part], memory: int, threads: int) -> Portions:
    """Parts and what was found in them, in any order, asked by threads of this process.

    Args:
        parts: What to ask.
        memory: Bytes for all threads together.
        threads: How many.

    Raises:
        RecordingError: The memory does not suffice for a part.
    """
    share = memory // threads
    waiting = iter(parts)
    with contextlib.ExitStack() as stack:
        askers = [Asker(stack.enter_context(connected(share, 1)), share) for _ in range(threads)]
        pool = stack.enter_context(ThreadPoolExecutor(threads, "guestio-report"))
        running: dict[Future[PartAnswer], tuple[Part, Asker]] = {}
        try:
            while True:
                for part in itertools.islice(waiting, len(askers)):
                    asker = askers.pop()
                    running[pool.submit(asker.ask, part)] = part, asker
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    part, asker = running.pop(future)
                    askers.append(asker)
                    yield Portion(part, future.result())
        finally:
            for future in running:
                future.cancel()
