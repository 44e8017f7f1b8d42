"""What recordings say, put together: sizes, patterns, latencies by stage, translations, faults."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from guestio.budgets import (
    REPORT_LEAST_BYTES,
    REPORT_MEMORY_BYTES,
    REPORT_MERGE_BYTES,
    REPORT_MISSES,
    REPORT_RECORDINGS,
)
from guestio.control.summary import printable
from guestio.observe.parts import (
    Part,
    Progress,
    Unreadable,
    ask_here,
    finished,
    look_at,
    part_rows,
    shift_of,
    split,
)
from guestio.observe.places import for_duckdb, list_recordings, reason
from guestio.observe.queries import (
    STAGES,
    Merger,
    bucket_range,
    connected,
    make_views_of_files,
    nothing,
    processors,
)
from guestio.observe.recording import RecordingError, describe
from guestio.observe.schema import OPERATIONS
from guestio.trace import NO_QUEUE, What

QUANTILES: Final = {"p50_s": 0.5, "p90_s": 0.9, "p99_s": 0.99, "p999_s": 0.999}

Report = dict[str, Any]
"""A report as JSON: see ``docs/recordings.md``."""

Rows = Mapping[str, Sequence[Mapping[str, Any]]]

LOOK_AT_ONCE: Final = 8
"""Recordings whose ends are read at the same time, as each may take a while to come."""


class DataSet:
    """The recordings at a place: those that can be read, and why others cannot.

    Args:
        place: A file, or a directory whose files named ``*.parquet`` are recordings; or a URL of
            one, as fsspec takes it.

    Raises:
        RecordingError: There is none.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = os.fspath(place)
        self.names = list_recordings(self.place)
        self.descriptions: list[dict[str, Any]] = []
        self.unreadable: list[Unreadable] = []
        self.recordings = self.failed = 0

    def describe(self, path: str, description: Mapping[str, Any]) -> None:
        """Count a recording, and keep what describes it if it is one of the first."""
        self.recordings += 1
        if len(self.descriptions) < REPORT_RECORDINGS:
            self.descriptions.append({"path": path, **description})

    def leave_out(self, unreadable: Iterable[Unreadable]) -> None:
        """Count what cannot be read, and keep why if it is of the first."""
        for each in unreadable:
            self.failed += 1
            if len(self.unreadable) < REPORT_RECORDINGS:
                self.unreadable.append(each)

    def parts(self, rows: int) -> list[Part]:
        """The recordings in parts of so many rows; what cannot be read is left out."""
        # Of one recording, times are as in its rows; those of several are made comparable.
        align = len(self.names) > 1
        found: list[Part] = []
        with ThreadPoolExecutor(LOOK_AT_ONCE, "guestio-report") as pool:
            for name, seen in zip(self.names, pool.map(_look_at, self.names), strict=True):
                if isinstance(seen, Unreadable):
                    self.leave_out([seen])
                    continue
                description, groups = seen
                if description is None:
                    found.append(Part(name, align=align))
                    continue
                self.describe(name, description)
                found += split(name, groups, rows, shift_of(description) if align else 0)
        return found

    def check(self) -> None:
        """Raise if there is nothing to report on.

        Raises:
            RecordingError: Says why, of the first that cannot be read.
        """
        if self.recordings:
            return
        more = f"; nor can {self.failed - 1} others be read" if self.failed > 1 else ""
        raise RecordingError(self.unreadable[0].why + more)


def _look_at(path: str) -> tuple[dict[str, Any] | None, list[int]] | Unreadable:
    try:
        return look_at(path)
    except FileNotFoundError as error:
        return Unreadable(path, f"{path}: {error.strerror or 'No such file or directory'}")
    except OSError as error:
        return Unreadable(path, f"{path}: {reason(error)}")
    except RecordingError as error:
        return Unreadable(path, str(error))


def report(
    place: str | os.PathLike[str],
    *,
    scheduler: str | None = None,
    memory: int = REPORT_MEMORY_BYTES,
    progress: Progress | None = None,
) -> Report:
    """What happened in a recording, or in all recordings of a directory.

    Args:
        place: As for `DataSet`.
        scheduler: The address of a Dask cluster's scheduler, as ``tcp://host:8786``, whose workers
            are to look at the recordings; they must reach them under the same names.
        memory: Bytes for what is looked at: here, or in each worker.
        progress: Called with the rows that were looked at, and with all of them.

    Returns:
        The same for any number of threads and workers. What cannot be read is left out, and named
        under ``unreadable``.

    Raises:
        RecordingError: Nothing can be read, the memory does not suffice, or the cluster is not as
            it should be.
        ImportError: The extra ``cluster`` is needed for a scheduler.

    Cost: a second of each of two processors for four million requests or so.
    """
    if memory < REPORT_LEAST_BYTES:
        raise ValueError(
            f"a report takes at least {REPORT_LEAST_BYTES >> 20} MiB, not {memory} bytes"
        )
    found = DataSet(place)
    merging = min(REPORT_MERGE_BYTES, memory // 3)
    with contextlib.ExitStack() as stack:
        merger = Merger(stack.enter_context(connected(merging, 1)))
        if scheduler is None:
            threads, rest = processors(), memory - merging
            parts = found.parts(part_rows(rest // threads))
            portions = ask_here(parts, rest, threads)
        else:
            from guestio.observe.cluster import Cluster

            cluster = stack.enter_context(contextlib.closing(Cluster(scheduler)))
            parts = found.parts(part_rows(memory // max(cluster.threads.values())))
            portions = cluster.ask(parts, memory)
        done, whole = 0, sum(part.rows for part in parts)
        stack.enter_context(contextlib.closing(portions))
        merger.add(nothing(stack.enter_context(connected(REPORT_LEAST_BYTES, 1))))
        for part, answer in portions:
            if answer.answers is not None:
                merger.add(answer.answers)
            found.leave_out(answer.unreadable)
            if answer.description is not None:
                found.describe(part.path, answer.description)
            done += part.rows
            if progress is not None:
                progress(done, whole)
        found.check()
        return assemble_report(merger.found(), found)


def table(
    place: str | os.PathLike[str], sql: str, *, memory: int = REPORT_MEMORY_BYTES
) -> tuple[list[str], list[tuple[Any, ...]], list[Unreadable]]:
    """The answer to a question of one's own: names of columns, rows, and what could not be read.

    Args:
        place: As for :func:`report`.
        sql: DuckDB's SQL, over the views ``requests``, ``mappings`` and ``events``.
        memory: Bytes for DuckDB.

    Raises:
        RecordingError: Nothing can be read; or DuckDB refuses the question.
    """
    import duckdb

    found = DataSet(place)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(connected(memory, processors()))
        files: dict[str, tuple[str, int]] = {}
        for part in found.parts(1 << 62):
            name, shift = for_duckdb(connection, part.path), part.shift_ns
            if part.groups is None:
                try:
                    name = os.fspath(stack.enter_context(finished(part.path)))
                    description, _ = describe(Path(name), part.path)
                except (RecordingError, OSError) as error:
                    found.leave_out([Unreadable(part.path, reason(error))])
                    continue
                found.describe(part.path, description)
                shift = shift_of(description) if part.align else 0
            files[name] = part.path, shift
        found.check()
        try:
            make_views_of_files(connection, files)
            answer = connection.execute(sql)
            columns = [each[0] for each in answer.description or ()]
            return columns, answer.fetchall(), found.unreadable
        except duckdb.Error as error:
            raise RecordingError(f"DuckDB says: {error}") from None


def assemble_report(answers: Rows, found: DataSet) -> Report:
    """A report of the answers to all questions."""
    (totals,) = answers["totals"]
    return {
        "report": 1,
        "recordings": sorted(found.descriptions, key=lambda each: str(each["path"])),
        "more_recordings": found.recordings - len(found.descriptions),
        "unreadable": [each._asdict() for each in sorted(found.unreadable)],
        "more_unreadable": found.failed - len(found.unreadable),
        "seconds": ((totals["last_ns"] or 0) - (totals["first_ns"] or 0)) / 1e9,
        "totals": {
            name: totals[name]
            for name in (
                "requests",
                "completed",
                "failed",
                "bytes",
                "stalled",
                "misses",
                "sequential",
                "placed",
            )
        }
        | {"impossible_rows": _sum(answers["impossible"], "rows")},
        "queues": [_named(row) for row in answers["requests"]],
        "more_queues": totals["queues"] - len(answers["requests"]),
        "sizes": [_named(row) for row in answers["sizes"]],
        "latencies": _latencies(answers["latencies"]),
        "timeline": _timeline(answers["timeline"]),
        "misses_per_request": [dict(row) for row in answers["misses"]],
        "mappings": {
            "ended": _lifetimes(answers["mappings"]),
            "kept": _sum(answers["kept_mappings"], "mappings"),
        },
        "hot_pages": [{**row, "page": row["page"] << 12} for row in answers["pages"]],
        "hot_places": [{**row, "place": row["place"] << 20} for row in answers["places"]],
        "events": {_name(row["what"]): row["events"] for row in answers["events"]},
        "faults": [
            {**row, "what": _name(row["what"]), "queue": _queue(row["queue"])}
            for row in answers["faults"]
        ],
    }


def _sum(rows: Iterable[Mapping[str, Any]], name: str) -> int:
    return sum(row[name] or 0 for row in rows)


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose operation has a name."""
    return {**row, "operation": OPERATIONS[row["operation"]]}


def _name(what: int | None) -> str:
    """An event by name; a number that none has, as it is."""
    if what is None:
        return "other events"
    try:
        return What(what).name.lower()
    except ValueError:
        return f"event {what}"


def _queue(queue: int) -> int | None:
    return None if queue == NO_QUEUE else queue


def quantiles(buckets: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Quantiles of times, in seconds, right to 6 %.

    Args:
        buckets: Number and count of each bucket that is not empty, ascending.
    """
    total = sum(count for _, count in buckets)
    found = {}
    for name, share in QUANTILES.items():
        seen = 0
        for bucket, count in buckets:
            seen += count
            if seen >= share * total:
                first, end = bucket_range(bucket)
                found[name] = (first + end - 1) / 2e9
                break
    return found


def _histogram(rows: Sequence[Mapping[str, Any]], count: str) -> dict[str, Any]:
    """Buckets of a time put together."""
    buckets = [(row["bucket"], row[count]) for row in rows]
    total = sum(number for _, number in buckets)
    return {
        "count": total,
        "mean_s": _sum(rows, "ns") / total / 1e9,
        "max_s": max(row["longest"] for row in rows) / 1e9,
        **quantiles(buckets),
        "buckets": [
            (bucket_range(bucket)[0] / 1e9, bucket_range(bucket)[1] / 1e9, number)
            for bucket, number in buckets
        ],
    }


def _groups(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def _latencies(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stages in their order, for each operation."""
    stages = list(STAGES)
    return [
        {
            "stage": stages[stage],
            "meaning": STAGES[stages[stage]][2],
            "operation": OPERATIONS[operation],
            **_histogram(found, "requests"),
        }
        for (stage, operation), found in _groups(rows, ("stage", "operation")).items()
    ]


def _lifetimes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"ended_by": _name(ended_by), **_histogram(found, "mappings")}
        for (ended_by,), found in _groups(rows, ("ended_by",)).items()
    ]


def _timeline(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Requests over time, from the first step on."""
    return [
        {
            "begins_s": row["begins_ns"] / 1e9,
            "seconds": row["ns"] / 1e9,
            "operation": OPERATIONS[row["operation"]],
            "requests": row["requests"],
            "bytes": row["bytes"],
        }
        for row in rows
    ]


def time_text(seconds: float) -> str:
    """A time with a unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:,.3g} {unit}"
    return f"{seconds * 1e9:,.0f} ns"


def size_text(size: float) -> str:
    """Bytes with a unit that suits them."""
    for unit, scale in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << scale:
            return f"{size / (1 << scale):,.4g} {unit}"
    return f"{size:,.0f} B"


Section = tuple[str, list[str], list[list[str]]]
"""Of a report as text: title, headings, rows."""


def sections(found: Report) -> list[Section]:
    """A report as tables of text; what has no rows is left out."""
    made: list[Section] = [
        (
            "requests",
            [
                "queue",
                "operation",
                "requests",
                "failed",
                "bytes",
                "sequential",
                "stalled",
                "misses",
            ],
            [
                [
                    str(row["queue"]),
                    str(row["operation"]),
                    f"{row['requests']:,}",
                    f"{row['failed']:,}",
                    size_text(row["bytes"] or 0),
                    f"{row['sequential'] / row['placed']:.0%}" if row["placed"] else "-",
                    f"{row['stalled']:,}",
                    f"{row['misses']:,}",
                ]
                for row in found["queues"]
            ],
        ),
        (
            "sizes",
            ["operation", "at least", "requests", "bytes"],
            [
                [
                    str(row["operation"]),
                    size_text(row["at_least"]),
                    f"{row['requests']:,}",
                    size_text(row["bytes"] or 0),
                ]
                for row in found["sizes"]
            ],
        ),
        (
            "latency by stage",
            ["stage", "operation", "requests", "mean", "p50", "p90", "p99", "p99.9", "max", ""],
            [
                [row["stage"], str(row["operation"]), f"{row['count']:,}"]
                + [time_text(row[name]) for name in ("mean_s", *QUANTILES, "max_s")]
                + [row["meaning"]]
                for row in found["latencies"]
            ],
        ),
        (
            "translations missing per request",
            ["misses", "requests"],
            [
                [
                    str(row["misses"]) + (" or more" if row["misses"] == REPORT_MISSES else ""),
                    f"{row['requests']:,}",
                ]
                for row in found["misses_per_request"]
                if row["misses"] or len(found["misses_per_request"]) > 1
            ],
        ),
        (
            "lifetimes of mappings",
            ["ended by", "mappings", "mean", "p50", "p90", "p99", "p99.9", "max"],
            [
                [row["ended_by"], f"{row['count']:,}"]
                + [time_text(row[name]) for name in ("mean_s", *QUANTILES, "max_s")]
                for row in found["mappings"]["ended"]
            ],
        ),
        (
            "pages of memory used most (of each request's first buffer)",
            ["page", "requests"],
            [[f"{row['page']:#x}", f"{row['requests']:,}"] for row in found["hot_pages"][:10]],
        ),
        (
            "places of the image used most (1 MiB each)",
            ["offset", "requests", "bytes"],
            [
                [f"{row['place']:#x}", f"{row['requests']:,}", size_text(row["bytes"] or 0)]
                for row in found["hot_places"][:10]
            ],
        ),
        (
            "other events",
            ["event", "times"],
            [[name, f"{count:,}"] for name, count in found["events"].items()],
        ),
        (
            "faults",
            ["what", "queue", "address", "access", "times"],
            [
                [
                    row["what"],
                    "-" if row["queue"] is None else str(row["queue"]),
                    f"{row['address']:#x}",
                    str(row["access"]),
                    f"{row['faults']:,}",
                ]
                for row in found["faults"]
            ],
        ),
    ]
    return [section for section in made if section[2]]


def heading(found: Report) -> list[str]:
    """A report in a few lines."""
    totals, lines = found["totals"], []
    for each in found["recordings"][:20]:
        device = each.get("device", {})
        lost = f", {each['lost']:,} EVENTS LOST" if each.get("lost") else ""
        ended = f", ended because {each['ended']}" if each.get("ended") else ""
        lines.append(
            printable(
                f"{each['path']}: {device.get('kind')} over {device.get('transport')}, "
                f"{len(each.get('peers', ()))} peers{lost}{ended}"
            )
        )
    more = len(found["recordings"]) + found["more_recordings"] - 20
    if more > 0:
        lines.append(f"and {more:,} recordings more")
    lines += [
        printable(f"LEFT OUT: {each['path']}: {each['why']}") for each in found["unreadable"][:20]
    ]
    more = len(found["unreadable"]) + found["more_unreadable"] - 20
    if more > 0:
        lines.append(f"and {more:,} more left out")
    seconds = found["seconds"]
    rate = f", {totals['requests'] / seconds:,.0f} a second" if seconds > 0 else ""
    lines.append(
        f"{totals['requests']:,} requests in {seconds:,.3f} s{rate}; {totals['failed']:,} failed; "
        f"{size_text(totals['bytes'])}"
    )
    if found["more_queues"]:
        lines.append(f"{found['more_queues']:,} queues and operations more are not listed")
    if totals["impossible_rows"]:
        lines.append(
            f"{totals['impossible_rows']:,} requests are left out: their times or sizes are "
            "impossible"
        )
    return lines


def text(found: Report) -> str:
    """A report as plain lines."""
    lines = heading(found)
    for title, names, rows in sections(found):
        lines += ["", title]
        table_rows = [names, *rows]
        widths = [max(len(row[at]) for row in table_rows) for at in range(len(names))]
        lines += [
            "  "
            + "  ".join(
                c.rjust(w) if at else c.ljust(w)
                for at, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table_rows
        ]
    return "\n".join(lines)
