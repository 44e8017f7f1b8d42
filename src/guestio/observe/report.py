"""What recordings say, put together: sizes, patterns, latencies by stage, translations, faults."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from guestio.control.summary import printable
from guestio.observe.queries import STAGES, TIMELINE_NS, ask, bucket_range, connected, merge
from guestio.observe.recording import RecordingError, open_recording
from guestio.trace import NO_QUEUE, What

QUANTILES: Final = {"p50_s": 0.5, "p90_s": 0.9, "p99_s": 0.99, "p999_s": 0.999}

Report = dict[str, Any]
"""A report as JSON: see ``docs/recordings.md``."""

Answers = Mapping[str, Sequence[Mapping[str, Any]]]


@contextlib.contextmanager
def data_set(place: str | os.PathLike[str]) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """The Parquet files of a recording, or of all of a directory, and what describes them.

    What is not finished is made a Parquet file in a temporary directory.

    Args:
        place: A file, or a directory whose files named ``*.parquet`` are recordings.

    Raises:
        RecordingError: There is none, or one that cannot be read.
        OSError: As from `open_recording`.
    """
    path = Path(place)
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not paths:
        raise RecordingError(f"{path} has no recording: no file there is named *.parquet")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_recording(each)) for each in paths]
        yield (
            [os.fspath(each.parquet) for each in opened],
            [{"path": os.fspath(each.path), **each.description} for each in opened],
        )


def report(place: str | os.PathLike[str]) -> Report:
    """What happened in a recording, or in all recordings of a directory.

    Raises:
        RecordingError, OSError: As from `data_set`.

    Cost: a second for a million requests or so; memory within a GiB, whatever their number.
    """
    with data_set(place) as (files, descriptions), connected(files) as connection:
        return assemble_report(merge([ask(connection)]), descriptions)


def table(place: str | os.PathLike[str], sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The answer to a question of one's own: names of columns, and rows.

    Args:
        place: As for :func:`report`.
        sql: DuckDB's SQL, over the views ``requests``, ``mappings`` and ``events``.

    Raises:
        RecordingError: As from `data_set`; or DuckDB refuses the question.
    """
    import duckdb

    with data_set(place) as (files, _), connected(files) as connection:
        try:
            answer = connection.execute(sql)
            columns = [each[0] for each in answer.description or ()]
            return columns, answer.fetchall()
        except duckdb.Error as error:
            raise RecordingError(f"DuckDB says: {error}") from None


def assemble_report(answers: Answers, descriptions: Sequence[Mapping[str, Any]]) -> Report:
    """A report of the answers to all questions."""
    requests = answers["requests"]
    first = min((row["first_ns"] for row in requests if row["first_ns"] is not None), default=0)
    last = max((row["last_ns"] for row in requests if row["last_ns"] is not None), default=0)
    whole = {name: _sum(requests, name) for name in ("requests", "completed", "failed", "bytes")}
    whole |= {name: _sum(requests, name) for name in ("stalled", "misses", "sequential", "placed")}
    seconds = (last - first) / 1e9
    return {
        "report": 1,
        "recordings": list(descriptions),
        "seconds": seconds,
        "totals": whole | {"impossible_rows": _sum(answers["impossible"], "rows")},
        "queues": [dict(row) for row in requests],
        "sizes": [dict(row) for row in answers["sizes"]],
        "latencies": _latencies(answers["latencies"]),
        "timeline": _timeline(answers["timeline"]),
        "misses_per_request": [dict(row) for row in answers["misses"]],
        "mappings": {
            "ended": _lifetimes(answers["mappings"]),
            "kept": _sum(answers["kept_mappings"], "mappings"),
        },
        "hot_pages": [dict(row) for row in answers["pages"]],
        "hot_places": [dict(row) for row in answers["places"]],
        "events": {_name(row["what"]): row["events"] for row in answers["events"]},
        "faults": [
            {**row, "what": _name(row["what"]), "queue": _queue(row["queue"])}
            for row in answers["faults"]
        ],
    }


def _sum(rows: Iterable[Mapping[str, Any]], name: str) -> int:
    return sum(row[name] or 0 for row in rows)


def _name(what: int) -> str:
    """An event by name; a number that none has, as it is."""
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
    groups = _groups(rows, ("stage", "operation"))
    order = list(STAGES)
    return [
        {
            "stage": stage,
            "meaning": STAGES[stage][2],
            "operation": operation,
            **_histogram(groups[stage, operation], "requests"),
        }
        for stage, operation in sorted(groups, key=lambda key: (order.index(key[0]), key[1] or ""))
    ]


def _lifetimes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"ended_by": _name(ended_by), **_histogram(found, "mappings")}
        for (ended_by,), found in _groups(rows, ("ended_by",)).items()
    ]


MOST_STEPS: Final = 200


def _timeline(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Requests over time, in at most MOST_STEPS steps."""
    if not rows:
        return []
    begin, end = rows[0]["step"], rows[-1]["step"]
    width = -(-(end - begin + 1) // MOST_STEPS)
    found: dict[tuple[int, str], list[int]] = {}
    for row in rows:
        at = found.setdefault(((row["step"] - begin) // width, row["operation"]), [0, 0])
        at[0] += row["requests"]
        at[1] += row["bytes"] or 0
    seconds = width * TIMELINE_NS / 1e9
    return [
        {
            "begins_s": step * seconds,
            "seconds": seconds,
            "operation": operation,
            "requests": requests,
            "bytes": size,
        }
        for (step, operation), (requests, size) in sorted(
            found.items(), key=lambda item: (item[0][0], item[0][1] or "")
        )
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
                [str(row["misses"]), f"{row['requests']:,}"]
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
    if len(found["recordings"]) > 20:
        lines.append(f"and {len(found['recordings']) - 20} recordings more")
    seconds = found["seconds"]
    rate = f", {totals['requests'] / seconds:,.0f} a second" if seconds > 0 else ""
    lines.append(
        f"{totals['requests']:,} requests in {seconds:,.3f} s{rate}; {totals['failed']:,} failed; "
        f"{size_text(totals['bytes'])}"
    )
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
