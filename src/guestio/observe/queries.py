"""What a report asks of recordings, by SQL on DuckDB.

Each question is a GROUP BY whose aggregates can be put together again, so the answer is the same,
to the last digit, whether it is asked of all rows at once or of parts of them: counts, sums of
integers, least and greatest values. Times are counted in buckets.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import duckdb
import pyarrow as pa

from guestio.budgets import REPORT_FAULTS, REPORT_MISSES, REPORT_PLACES, REPORT_QUEUES
from guestio.observe.schema import (
    EVENT,
    EVENT_COLUMNS,
    FILE_SCHEMA,
    MAPPING,
    MAPPING_COLUMNS,
    OPERATIONS,
    REQUEST,
    REQUEST_COLUMNS,
    Column,
)
from guestio.trace import What

TIMELINE_NS: Final = 100_000_000
"""Width of a step of the time line."""

MOST_STEPS: Final = 200
"""Steps of the time line in a report; they are so many times as wide as it takes."""

_OPERATIONS: Final = ", ".join(f"'{operation}'" for operation in OPERATIONS)

POSSIBLE: Final = f"""
    (available IS NULL OR available < {1 << 62}) AND (stalled IS NULL OR stalled < {1 << 62})
    AND (taken IS NULL OR taken < {1 << 62}) AND (served IS NULL OR served < {1 << 62})
    AND (completed IS NULL OR completed < {1 << 62})
    AND (interrupted IS NULL OR interrupted < {1 << 62})
    AND (readable IS NULL OR readable < {1 << 48}) AND (writable IS NULL OR writable < {1 << 48})
    AND (operation IS NULL OR operation IN ({_OPERATIONS}))
    AND (taken IS NULL OR available IS NULL OR taken >= available)
    AND (taken IS NULL OR served IS NULL OR served >= taken)
    AND (served IS NULL OR completed IS NULL OR completed >= served)
    AND (taken IS NULL OR completed IS NULL OR completed >= taken)
    AND (available IS NULL OR completed IS NULL OR completed >= available)
    AND (interrupted IS NULL OR completed IS NULL OR interrupted >= completed)
    AND (written IS NULL OR writable IS NULL OR written <= writable)
"""
"""Of requests. Rows for which it is not so are left out, and counted."""

DATA: Final = f"""
    CASE
        WHEN command IS NOT NULL THEN coalesce(readable, 0) + coalesce(writable, 0)
        WHEN operation = {OPERATIONS.index("read")}
            THEN CASE WHEN writable > 0 THEN writable - 1 ELSE 0 END
        WHEN operation = {OPERATIONS.index("write")}
            THEN CASE WHEN readable > 16 THEN readable - 16 ELSE 0 END
        ELSE coalesce(readable, 0) + coalesce(writable, 0) END
"""
"""Bytes of a request: of a disk's data, or all that it gave; its operation is a number."""

STAGES: Final = {
    "translation": ("stalled", "taken", "waiting for translations"),
    "take": ("available", "taken", "from being found to being taken"),
    "core": ("taken", "served", "being served by the core"),
    "device": ("taken", "completed", "from being taken to being given back"),
    "notify": ("completed", "interrupted", "from being given back to the notification"),
    "total": ("available", "completed", "from being found to being given back"),
}
"""Stages of a request: where each begins and ends, and what it is."""

_OPERATION: Final = (
    "(CASE operation "
    + " ".join(f"WHEN '{name}' THEN {at}" for at, name in enumerate(OPERATIONS))
    + " ELSE 0 END)::UTINYINT"
)
"""An operation as its place in OPERATIONS: groups of small numbers are found sooner."""


_TIMES_OF_STAGES: Final = ", ".join(
    f"CASE WHEN {end} >= {begin} THEN CAST({end} - {begin} AS BIGINT) END AS {stage}_ns"
    for stage, (begin, end, _) in STAGES.items()
)

MEASURED: Final = f"""
    SELECT origin, queue, operation, CAST({DATA} AS BIGINT) AS size,
        coalesce(misses, 0) AS misses, gap = 0 AS follows, gap IS NOT NULL AS placed,
        failed OR coalesce(status, 0) <> 0 AS failed, stalled IS NOT NULL AS stalled,
        completed IS NOT NULL AS completed,
        (CAST(completed AS BIGINT) + shift_ns) // {TIMELINE_NS} AS step,
        CAST(coalesce(stalled, available, taken, completed) AS BIGINT) + shift_ns AS first_ns,
        CAST(coalesce(completed, taken) AS BIGINT) + shift_ns AS last_ns,
        address >> 12 AS page, "offset" >> 20 AS place, {_TIMES_OF_STAGES}
    FROM (SELECT * REPLACE ({_OPERATION} AS operation) FROM rows
        WHERE kind = {REQUEST} AND {POSSIBLE})
"""
"""What questions need of requests. It is worked out once, not by each of them."""


def bucket_of(time: str) -> str:
    """SQL for the bucket of a time in ns, eight for each doubling, as `Latencies` has them.

    Where a logarithm is rounded up to the next doubling, both say the same bucket.
    """
    shift = f"(CAST(floor(log2({time})) AS BIGINT) - 3)"
    return (
        f"CAST(CASE WHEN {time} < 8 THEN {time} "
        f"ELSE 8 * {shift} + ({time} >> {shift}) END AS USMALLINT)"
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
        values: Names of aggregates, with ``count``, ``sum``, ``min`` or ``max`` and the SQL of
            what. Sums are of integers, and exact.
        order: How the answer is ordered.
        limit: Of what may have very many groups, so many are kept in a report.
    """

    source: str
    keys: dict[str, str]
    values: dict[str, tuple[str, str]]
    order: str
    limit: int | None = None

    def sql(self) -> str:
        """The question to rows."""
        keys = [f"{sql} AS {name}" for name, sql in self.keys.items()]
        values = [f"{_aggregate(how, sql)} AS {name}" for name, (how, sql) in self.values.items()]
        return f"SELECT {', '.join(keys + values)} FROM {self.source} GROUP BY ALL"

    def merge(self, source: str) -> str:
        """The question to answers of parts."""
        values = [
            f"{_aggregate('sum' if how == 'count' else how, name)} AS {name}"
            for name, (how, _) in self.values.items()
        ]
        return f"SELECT {', '.join([*self.keys, *values])} FROM {source} GROUP BY ALL"

    def final(self, source: str) -> str:
        """What a report keeps of an answer that is put together."""
        limit = "" if self.limit is None else f" LIMIT {self.limit}"
        return f"SELECT * FROM {source} ORDER BY {self.order}{limit}"


def _aggregate(how: str, sql: str) -> str:
    """An aggregate of a type that is the same for rows and for answers of parts."""
    if how in {"count", "sum"}:
        # 38 digits: sums of 64-bit numbers do not overflow.
        return f"CAST(coalesce({how}({sql}), 0) AS DECIMAL(38, 0))"
    return f"CAST({how}({sql}) AS BIGINT)"


_COUNT = ("count", "*")


def _stage_queries() -> str:
    parts = [
        f"SELECT {at}::UTINYINT AS stage, operation, {bucket_of(f'{stage}_ns')} AS bucket, "
        f"count(*) AS n, sum({stage}_ns) AS ns, max({stage}_ns) AS longest FROM measured "
        f"WHERE {stage}_ns IS NOT NULL GROUP BY ALL"
        for at, stage in enumerate(STAGES)
    ]
    return "(" + " UNION ALL ".join(parts) + ")"


_TIME = f"CASE WHEN time < {1 << 62} THEN CAST(time AS BIGINT) END + shift_ns"
_LIFETIME = "CAST(unmapped - mapped AS BIGINT)"

QUERIES: Final = {
    "requests": Query(
        "measured",
        {"origin": "origin", "queue": "queue", "operation": "operation"},
        {
            "requests": _COUNT,
            "completed": ("sum", "completed::UTINYINT"),
            "failed": ("sum", "failed::UTINYINT"),
            "bytes": ("sum", "size"),
            "sequential": ("sum", "follows::UTINYINT"),
            "placed": ("sum", "placed::UTINYINT"),
            "stalled": ("sum", "stalled::UTINYINT"),
            "misses": ("sum", "misses"),
            "first_ns": ("min", "first_ns"),
            "last_ns": ("max", "last_ns"),
        },
        "origin, queue, operation",
        REPORT_QUEUES,
    ),
    "impossible": Query(
        f"(SELECT (SELECT count(*) FROM rows WHERE kind = {REQUEST}) "
        "- (SELECT count(*) FROM measured) AS n)", {"part": "0"}, {"rows": ("sum", "n")}, "part",
    ),
    "sizes": Query(
        "measured",
        {
            "operation": "operation",
            "at_least": "CASE WHEN size = 0 THEN 0 "
            "ELSE 1::BIGINT << CAST(floor(log2(size)) AS BIGINT) END",
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
        "(SELECT * FROM measured WHERE completed)",
        {"step": "step", "operation": "operation"},
        {"requests": _COUNT, "bytes": ("sum", "size")},
        "step, operation",
    ),
    "misses": Query(
        "measured", {"misses": f"least(misses, {REPORT_MISSES})"}, {"requests": _COUNT}, "misses",
    ),
    "mappings": Query(
        f"(SELECT *, {_LIFETIME} AS t FROM mappings WHERE unmapped >= mapped "
        f"AND unmapped < {1 << 62})",
        {"ended_by": "CASE WHEN ended_by < 256 THEN ended_by END", "bucket": bucket_of("t")},
        {"mappings": _COUNT, "bytes": ("sum", "length"), "ns": ("sum", "t"),
         "longest": ("max", "t")},
        "ended_by, bucket",
    ),
    "kept_mappings": Query(
        "(SELECT * FROM mappings WHERE unmapped IS NULL)", {"access": "access"},
        {"mappings": _COUNT, "bytes": ("sum", "length")}, "access",
    ),
    "pages": Query(
        "(SELECT page FROM measured WHERE page IS NOT NULL)",
        {"page": "page"}, {"requests": _COUNT}, "requests DESC, page", REPORT_PLACES,
    ),
    "places": Query(
        "(SELECT place, size FROM measured WHERE place IS NOT NULL)",
        {"place": "place"},
        {"requests": _COUNT, "bytes": ("sum", "size")}, "requests DESC, place", REPORT_PLACES,
    ),
    "events": Query("events", {"what": "what"}, {"events": _COUNT}, "what"),
    "faults": Query(
        "(SELECT * FROM events WHERE what IN "
        f"({int(What.FAILED)}, {int(What.REFUSED)}, {int(What.QUEUE_BROKEN)}, {int(What.ERROR)}))",
        {"what": "what", "queue": "queue", "address": "address", "access": "access"},
        {"faults": _COUNT, "first_ns": ("min", _TIME), "last_ns": ("max", _TIME)},
        "faults DESC, what, queue, address, access", REPORT_FAULTS,
    ),
}  # fmt: skip
"""All questions, by name. What they are asked of is made by `make_views`."""

SAME: Final = hashlib.sha256(
    "\n".join([MEASURED, *(query.sql() for query in QUERIES.values())]).encode()
).hexdigest()[:16]
"""Of the same questions. Only their answers can be put together."""


def _columns(columns: Sequence[Column]) -> str:
    return ", ".join(f'"{column.name}"' for column in columns)


def quoted(text: str) -> str:
    """A string in SQL."""
    return "'" + text.replace("'", "''") + "'"


def make_views(
    connection: duckdb.DuckDBPyConnection, source: str, recording: str, shift: str
) -> None:
    """Make the views that questions are asked of.

    Args:
        connection: Of DuckDB.
        source: What has all rows of recordings, for FROM.
        recording: SQL for the recording that a row is of.
        shift: SQL for the ns to add to a row's times.
    """
    connection.execute(
        f"CREATE OR REPLACE TEMP VIEW rows AS SELECT *, {recording} AS recording, "
        f"CAST({shift} AS BIGINT) AS shift_ns FROM {source}"
    )
    for name, kind, columns in (
        ("all_requests", REQUEST, REQUEST_COLUMNS),
        ("mappings", MAPPING, MAPPING_COLUMNS),
        ("events", EVENT, EVENT_COLUMNS),
    ):
        connection.execute(
            f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT {_columns(columns)}, recording, "
            f"shift_ns FROM rows WHERE kind = {kind}"
        )
    connection.execute(
        f"CREATE OR REPLACE TEMP VIEW requests AS SELECT * FROM all_requests WHERE {POSSIBLE}"
    )


def make_views_of_files(
    connection: duckdb.DuckDBPyConnection, files: Mapping[str, tuple[str, int]]
) -> None:
    """Make the views of whole Parquet files.

    Args:
        connection: Of DuckDB.
        files: For each file, the recording that it is of, and the ns to add to its times.
    """

    def of_file(at: int) -> str:
        """SQL for what belongs to the file of a row."""
        pairs = ", ".join(
            f"{quoted(name)}: {each[at] if at else quoted(str(each[0]))}"
            for name, each in files.items()
        )
        return f"MAP {{{pairs}}}[filename]"

    names = ", ".join(map(quoted, files))
    make_views(
        connection,
        f"read_parquet([{names}], hive_partitioning = false, filename = true)",
        of_file(0),
        of_file(1),
    )


@contextlib.contextmanager
def connected(memory: int, threads: int) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB of its own, with a directory for what does not fit in its memory.

    Args:
        memory: Bytes that it may use.
        threads: Threads that it may use.
    """
    with tempfile.TemporaryDirectory(prefix="guestio-") as directory:
        connection = duckdb.connect(
            config={
                "memory_limit": f"{memory >> 20}MiB",
                "temp_directory": directory,
                "preserve_insertion_order": "false",
                "threads": str(threads),
                # Files are read by themselves or through fsspec; nothing is fetched for it.
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
            }
        )
        try:
            # It would go to standard output, between the lines of the report.
            connection.execute("SET enable_progress_bar = false")
            yield connection
        finally:
            connection.close()


def processors() -> int:
    """Threads that a report uses on this machine."""
    return min(len(os.sched_getaffinity(0)), 8)


Answers = dict[str, pa.Table]
"""The answers to all questions, by their names."""


def ask(connection: duckdb.DuckDBPyConnection) -> Answers:
    """The answers to all questions to the rows that `make_views` was told of, not ordered."""
    connection.execute("DROP TABLE IF EXISTS measured")
    connection.execute(f"CREATE TEMP TABLE measured AS {MEASURED}")
    try:
        return {
            name: connection.sql(query.sql()).to_arrow_table() for name, query in QUERIES.items()
        }
    finally:
        connection.execute("DROP TABLE measured")


def nothing(connection: duckdb.DuckDBPyConnection) -> Answers:
    """The answers to all questions to no rows at all.

    Args:
        connection: A DuckDB, for this alone.
    """
    connection.register("no_rows", FILE_SCHEMA.empty_table())
    make_views(connection, "no_rows", "''", "0")
    return ask(connection)


class Merger:
    """Puts answers of parts together as they come, in memory that does not grow with their number.

    Args:
        connection: A DuckDB, for this alone; what does not fit in its memory goes to files.

    Threads: one at a time.
    """

    MOST_ROWS: Final = 1 << 20
    MOST_ANSWERS: Final = 256
    """Answers to a question that wait, and their rows."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self._waiting: dict[str, list[pa.Table]] = {name: [] for name in QUERIES}
        self._rows_waiting = dict.fromkeys(QUERIES, 0)
        self._made: set[str] = set()

    def add(self, answers: Answers) -> None:
        """Add the answers of a part."""
        for name, table in answers.items():
            waiting = self._waiting[name]
            waiting.append(table)
            self._rows_waiting[name] += len(table)
            if self._rows_waiting[name] >= self.MOST_ROWS or len(waiting) >= self.MOST_ANSWERS:
                self._merge(name)

    def _merge(self, name: str) -> None:
        if not self._waiting[name]:
            return
        self._connection.register("part", pa.concat_tables(self._waiting[name]))
        source = "part"
        if name in self._made:
            source = f"(SELECT * FROM answers_{name} UNION ALL SELECT * FROM part)"
        self._connection.execute(
            f"CREATE OR REPLACE TEMP TABLE answers_{name} AS {QUERIES[name].merge(source)}"
        )
        self._connection.unregister("part")
        self._waiting[name], self._rows_waiting[name] = [], 0
        self._made.add(name)

    def _read(self, sql: str) -> list[dict[str, Any]]:
        """Rows, with sums as the integers that they are."""
        rows: list[dict[str, Any]] = self._connection.sql(sql).to_arrow_table().to_pylist()
        return [
            {name: value if value is None else int(value) for name, value in row.items()}
            for row in rows
        ]

    def found(self) -> dict[str, list[dict[str, Any]]]:
        """All answers, ordered, with at most so many groups as a report keeps.

        ``totals`` are the sums over all queues; ``timeline`` has at most MOST_STEPS steps. At least
        one part was added.
        """
        for name in QUERIES:
            self._merge(name)
        found = {
            name: self._read(query.final(f"answers_{name}"))
            for name, query in QUERIES.items()
            if name != "timeline"
        }
        values = {
            name: ("sum" if how == "count" else how, name)
            for name, (how, _) in QUERIES["requests"].values.items()
        }
        totals = Query("answers_requests", {}, {**values, "queues": _COUNT}, "requests")
        found["totals"] = self._read(totals.sql().replace(" GROUP BY ALL", ""))
        found["timeline"] = self._read(
            "WITH ends AS (SELECT min(step) AS first, "
            f"(max(step) - min(step)) // {MOST_STEPS} + 1 AS width FROM answers_timeline) "
            f"SELECT (step - first) // width * width * {TIMELINE_NS} AS begins_ns, "
            f"width * {TIMELINE_NS} AS ns, operation, {_aggregate('sum', 'requests')} AS requests, "
            f"{_aggregate('sum', 'bytes')} AS bytes "
            "FROM answers_timeline, ends GROUP BY ALL ORDER BY begins_ns, operation"
        )
        return found
