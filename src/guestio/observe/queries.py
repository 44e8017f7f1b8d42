"""What a report asks of recordings, by SQL on DuckDB.

Each question is a GROUP BY whose aggregates can be put together again, so the answer is the same
whether it is asked of all rows at once or of parts of them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import duckdb
import pyarrow as pa

from guestio.budgets import REPORT_MEMORY_BYTES
from guestio.observe.schema import (
    EVENT,
    EVENT_COLUMNS,
    MAPPING,
    MAPPING_COLUMNS,
    REQUEST,
    REQUEST_COLUMNS,
)
from guestio.trace import What

TIMELINE_NS: Final = 100_000_000
"""Width of a step of the time line."""

POSSIBLE: Final = """
    (taken IS NULL OR available IS NULL OR taken >= available)
    AND (taken IS NULL OR served IS NULL OR served >= taken)
    AND (served IS NULL OR completed IS NULL OR completed >= served)
    AND (taken IS NULL OR completed IS NULL OR completed >= taken)
    AND (available IS NULL OR completed IS NULL OR completed >= available)
    AND (interrupted IS NULL OR completed IS NULL OR interrupted >= completed)
    AND (written IS NULL OR writable IS NULL OR written <= writable)
"""
"""Of requests. Rows for which it is not so are left out, and counted."""

DATA: Final = """
    CASE operation WHEN 'read' THEN greatest(writable, 1) - 1
                   WHEN 'write' THEN greatest(readable, 16) - 16
                   ELSE readable + writable END
"""
"""Bytes of a request: of a disk's data, or all that it gave."""

STAGES: Final = {
    "translation": ("stalled", "taken", "waiting for translations"),
    "take": ("available", "taken", "from being found to being taken"),
    "core": ("taken", "served", "being served by the core"),
    "device": ("taken", "completed", "from being taken to being given back"),
    "notify": ("completed", "interrupted", "from being given back to the notification"),
    "total": ("available", "completed", "from being found to being given back"),
}
"""Stages of a request: where each begins and ends, and what it is."""


def bucket_of(time: str) -> str:
    """SQL for the bucket of a time in ns, eight for each doubling, as `Latencies` has them."""
    octave = f"CAST(floor(log2({time})) AS BIGINT)"
    return (
        f"CASE WHEN {time} < 8 THEN CAST({time} AS BIGINT) "
        f"ELSE 8 * ({octave} - 2) + (({time} >> ({octave} - 3)) & 7) END"
    )


def bucket_range(bucket: int) -> tuple[int, int]:
    """Where a bucket begins and ends, in ns."""

    def floor(at: int) -> int:
        return at if at < 8 else (8 + at % 8) << (at // 8 - 1)

    return floor(bucket), floor(bucket + 1)


class Query(NamedTuple):
    """A question.

    Attributes:
        source: What is asked, a view or an expression for FROM.
        keys: Names of groups, and SQL that says which one a row belongs to.
        values: Names of aggregates, with ``sum``, ``min`` or ``max`` and the SQL of what.
        order: How the answer is ordered.
    """

    source: str
    keys: dict[str, str]
    values: dict[str, tuple[str, str]]
    order: str

    def sql(self) -> str:
        """The question to rows."""
        keys = [f"{sql} AS {name}" for name, sql in self.keys.items()]
        values = [
            f"TRY_CAST({how}({sql}) AS BIGINT) AS {name}"
            for name, (how, sql) in self.values.items()
        ]
        return f"SELECT {', '.join(keys + values)} FROM {self.source} GROUP BY ALL"

    def merge(self, source: str) -> str:
        """The question to answers of parts."""
        values = [
            f"TRY_CAST({how}({name}) AS BIGINT) AS {name}" for name, (how, _) in self.values.items()
        ]
        return (
            f"SELECT {', '.join([*self.keys, *values])} FROM {source} GROUP BY ALL "
            f"ORDER BY {self.order}"
        )


_COUNT = ("sum", "1")


def _stage_queries() -> str:
    parts = []
    for stage, (begin, end, _) in STAGES.items():
        time = f"CAST({end} - {begin} AS BIGINT)"
        parts.append(
            f"SELECT '{stage}' AS stage, operation, {bucket_of('t')} AS bucket, count(*) AS n, "
            f"sum(t) AS ns, max(t) AS longest FROM (SELECT operation, {time} AS t FROM requests "
            f"WHERE {begin} IS NOT NULL AND {end} IS NOT NULL AND {end} >= {begin}) GROUP BY ALL"
        )
    return "(" + " UNION ALL ".join(parts) + ")"


_WHAT = {"what": "what"}

QUERIES: Final = {
    "requests": Query(
        "requests",
        {"origin": "origin", "queue": "queue", "operation": "operation"},
        {
            "requests": _COUNT,
            "completed": ("sum", "(completed IS NOT NULL)::BIGINT"),
            "failed": ("sum", "(failed OR coalesce(status, 0) <> 0)::BIGINT"),
            "bytes": ("sum", DATA),
            "sequential": ("sum", "(gap = 0)::BIGINT"),
            "placed": ("sum", "(gap IS NOT NULL)::BIGINT"),
            "stalled": ("sum", "(stalled IS NOT NULL)::BIGINT"),
            "misses": ("sum", "misses"),
            "first_ns": ("min", "coalesce(stalled, available, taken, completed)"),
            "last_ns": ("max", "coalesce(completed, taken)"),
        },
        "origin, queue, operation",
    ),
    "impossible": Query(
        f"(SELECT 1 FROM all_requests WHERE NOT ({POSSIBLE}))", {"part": "0"},
        {"rows": _COUNT}, "part",
    ),
    "sizes": Query(
        f"(SELECT operation, {DATA} AS size FROM requests)",
        {
            "operation": "operation",
            "at_least": "CASE WHEN size = 0 THEN 0 ELSE 1 << CAST(floor(log2(size)) AS INT) END",
        },
        {"requests": _COUNT, "bytes": ("sum", "size")},
        "operation, at_least",
    ),
    "latencies": Query(
        _stage_queries(),
        {"stage": "stage", "operation": "operation", "bucket": "bucket"},
        {"requests": ("sum", "n"), "ns": ("sum", "ns"), "longest": ("max", "longest")},
        "stage, operation, bucket",
    ),
    "timeline": Query(
        "(SELECT * FROM requests WHERE completed IS NOT NULL)",
        {"step": f"completed // {TIMELINE_NS}", "operation": "operation"},
        {"requests": _COUNT, "bytes": ("sum", DATA)},
        "step, operation",
    ),
    "misses": Query(
        "requests", {"misses": "misses"}, {"requests": _COUNT}, "misses",
    ),
    "mappings": Query(
        "(SELECT *, CAST(unmapped - mapped AS BIGINT) AS t FROM mappings "
        "WHERE unmapped IS NOT NULL AND unmapped >= mapped)",
        {"ended_by": "ended_by", "bucket": bucket_of("t")},
        {"mappings": _COUNT, "bytes": ("sum", "length"), "ns": ("sum", "t"),
         "longest": ("max", "t")},
        "ended_by, bucket",
    ),
    "kept_mappings": Query(
        "(SELECT * FROM mappings WHERE unmapped IS NULL)", {"access": "access"},
        {"mappings": _COUNT, "bytes": ("sum", "length")}, "access",
    ),
    "pages": Query(
        "(SELECT address FROM requests WHERE address IS NOT NULL)",
        {"page": "address & ~4095::UBIGINT"}, {"requests": _COUNT}, "requests DESC, page",
    ),
    "places": Query(
        f'(SELECT "offset", {DATA} AS size FROM requests WHERE "offset" IS NOT NULL)',
        {"place": '"offset" & ~1048575::UBIGINT'},
        {"requests": _COUNT, "bytes": ("sum", "size")}, "requests DESC, place",
    ),
    "events": Query("events", _WHAT, {"events": _COUNT}, "what"),
    "faults": Query(
        "(SELECT * FROM events WHERE what IN "
        f"({int(What.FAILED)}, {int(What.REFUSED)}, {int(What.QUEUE_BROKEN)}, {int(What.ERROR)}))",
        {"what": "what", "queue": "queue", "address": "address", "access": "access"},
        {"faults": _COUNT, "first_ns": ("min", "time"), "last_ns": ("max", "time")},
        "faults DESC, what, queue, address, access",
    ),
}  # fmt: skip
"""All questions, by name."""

TOP: Final = {"pages": 20, "places": 20, "faults": 100}
"""Of what may have very many groups, so many are kept in a report."""


def _columns(columns: Sequence[Any]) -> str:
    return ", ".join(f'"{column.name}"' for column in columns)


def make_views(connection: duckdb.DuckDBPyConnection, source: str) -> None:
    """Make the views that questions are asked of.

    Args:
        connection: Of DuckDB.
        source: What has all rows of recordings, for FROM.
    """
    for name, kind, columns in (
        ("all_requests", REQUEST, REQUEST_COLUMNS),
        ("mappings", MAPPING, MAPPING_COLUMNS),
        ("events", EVENT, EVENT_COLUMNS),
    ):
        connection.execute(
            f"CREATE VIEW {name} AS SELECT {_columns(columns)} FROM {source} WHERE kind = {kind}"
        )
    connection.execute(f"CREATE VIEW requests AS SELECT * FROM all_requests WHERE {POSSIBLE}")


@contextlib.contextmanager
def connected(files: Sequence[str]) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB with the views over Parquet files, whose memory is limited to REPORT_MEMORY_BYTES.

    Args:
        files: Their names, as DuckDB takes them.
    """
    with tempfile.TemporaryDirectory(prefix="guestio-") as directory:
        connection = duckdb.connect(
            config={
                "memory_limit": f"{REPORT_MEMORY_BYTES >> 20}MiB",
                "temp_directory": directory,
                "preserve_insertion_order": "false",
                "threads": str(min(len(os.sched_getaffinity(0)), 8)),
            }
        )
        try:
            quoted = ", ".join("'" + name.replace("'", "''") + "'" for name in files)
            # It would go to standard output, between the lines of the report.
            connection.execute("SET enable_progress_bar = false")
            make_views(connection, f"read_parquet([{quoted}], hive_partitioning = false)")
            yield connection
        finally:
            connection.close()


def ask(connection: duckdb.DuckDBPyConnection) -> dict[str, pa.Table]:
    """The answers to all questions, not ordered."""
    return {name: connection.sql(query.sql()).to_arrow_table() for name, query in QUERIES.items()}


def merge(parts: Sequence[dict[str, pa.Table]]) -> dict[str, list[dict[str, Any]]]:
    """Answers of parts put together, ordered, as rows."""
    found = {}
    connection = duckdb.connect()
    try:
        connection.execute("SET enable_progress_bar = false")
        for name, query in QUERIES.items():
            together = pa.concat_tables([part[name] for part in parts])
            connection.register("part", together)
            sql = query.merge("part")
            if name in TOP:
                sql += f" LIMIT {TOP[name]}"
            table = connection.sql(sql).to_arrow_table()
            found[name] = table.to_pylist()
            connection.unregister("part")
    finally:
        connection.close()
    return found
