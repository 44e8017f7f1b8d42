"""The interval core, guest memory and dirty bitmaps against what a Python user would take instead.

Every contestant does the same work on the same data, checks its answers once, and takes its turn in
every round, on one CPU; what is shown is the median of the rounds, in CPU time, and ratios of
medians of one run. The last table says whether the goals are reached.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from guestio import (
    AtomicBitmap,
    GuestRegionCollection,
    Iommu,
    IommuMemory,
    Iotlb,
    Permissions,
)

R, RW = Permissions.READ, Permissions.READ_WRITE
PAGE = 4096
STRIDE = 2 * PAGE
LENGTH = 64
OURS = "guestio"
U64 = npt.NDArray[np.uint64]


class Row(NamedTuple):
    """One line of a table: nanoseconds (or another unit) for each contestant."""

    label: str
    figures: dict[str, float | None]


class Report(NamedTuple):
    """One table; ratios are to its first column."""

    title: str
    unit: str
    note: str
    rows: list[Row]
    better: str = "lower"

    def ratio(self, label: str, column: str, base: str) -> float | None:
        """What one figure of a row is to another; None if either was not measured."""
        figures = next((row.figures for row in self.rows if row.label == label), {})
        figure, reference = figures.get(column), figures.get(base)
        return figure / reference if figure is not None and reference else None


class Goal(NamedTuple):
    """What shall be reached: the ratio of two figures of one row of a table."""

    table: str
    row: str
    column: str
    base: str
    at_least: bool
    limit: float


LOOKUP, BATCH = "Lookup, one at a time", "Lookup in batches of 200,000"
GROWTH, COPIES = "Insert and remove as the map grows", "Copies of guest memory"
BUILDS = ("in order", "at random")
GOALS = (
    Goal(BATCH, "1,000 random", "numpy", OURS, True, 2.5),
    Goal(BATCH, "100,000 random", "numpy", OURS, True, 2),
    Goal(BATCH, "1,000,000 random", "numpy", OURS, True, 2),
    Goal(LOOKUP, "100,000 random", "intervaltree", OURS, True, 5),
    Goal(LOOKUP, "100,000 random", "bisect", OURS, True, 1),
    *(
        Goal(GROWTH, f"{change}, built {order}", "1,000,000", "1,000", False, 4)
        for change in ("insert", "remove")
        for order in BUILDS
    ),
    *(
        Goal(COPIES, size, way, "numpy copy", True, 0.9)
        for size in ("64 KiB", "256 KiB", "1024 KiB")
        for way in ("read", "write")
    ),
    Goal(COPIES, "1024 KiB", "read, scattered pages", "numpy copy", True, 0.6),
)


class Workload(NamedTuple):
    """``size`` mappings of a page each, and addresses to look up, all of them hits."""

    starts: U64
    targets: U64
    queries: U64

    @classmethod
    def make(cls, size: int, queries: int, order: str) -> Workload:
        rng = np.random.default_rng(size)
        starts = np.arange(size, dtype=np.uint64) * np.uint64(STRIDE)
        targets = rng.permutation(size).astype(np.uint64) * np.uint64(PAGE)
        chosen = rng.integers(0, size, queries)
        if order == "sequential":
            chosen = np.arange(queries) % size
        inside = rng.integers(0, PAGE - LENGTH, queries).astype(np.uint64)
        return cls(starts, targets, starts[chosen] + inside)


class OurMap:
    """The IOTLB."""

    def __init__(self, load: Workload) -> None:
        self.iotlb = Iotlb()
        for start, target in zip(load.starts.tolist(), load.targets.tolist(), strict=True):
            self.iotlb.set_mapping(start, target, PAGE, RW)

    def one(self, addresses: list[int]) -> int:
        lookup = self.iotlb.lookup
        last = 0
        for address in addresses:
            last = lookup(address, LENGTH, R)[0].base
        return last

    def many(self, addresses: U64) -> U64:
        targets, status = self.iotlb.lookup_many(addresses, LENGTH, R)
        assert not status.any()
        return targets

    def insert(self, starts: list[int]) -> None:
        set_mapping = self.iotlb.set_mapping
        for start in starts:
            set_mapping(start, start, 16, RW)

    def remove(self, starts: list[int]) -> None:
        invalidate = self.iotlb.invalidate_mapping
        for start in starts:
            invalidate(start, 16)


class BisectMap:
    """Sorted lists and ``bisect``: quick to write, and every change moves half of them."""

    def __init__(self, load: Workload) -> None:
        self.starts = load.starts.tolist()
        self.rest = [
            (s + PAGE, t - s, 3) for s, t in zip(self.starts, load.targets.tolist(), strict=True)
        ]

    def one(self, addresses: list[int]) -> int:
        starts, rest = self.starts, self.rest
        last = 0
        for address in addresses:
            end, delta, perm = rest[bisect_right(starts, address) - 1]
            if address + LENGTH > end or perm & 1 != 1:
                raise KeyError(address)
            last = address + delta
        return last

    def insert(self, starts: list[int]) -> None:
        for start in starts:
            at = bisect_right(self.starts, start)
            self.starts.insert(at, start)
            self.rest.insert(at, (start + 16, 0, 3))

    def remove(self, starts: list[int]) -> None:
        for start in starts:
            at = bisect_right(self.starts, start) - 1
            del self.starts[at], self.rest[at]


class NumpyMap:
    """Sorted arrays and ``searchsorted``."""

    def __init__(self, load: Workload) -> None:
        self.starts = load.starts.copy()
        self.ends = load.starts + np.uint64(PAGE)
        self.deltas = load.targets - load.starts
        self.perms = np.full(len(load.starts), 3, np.uint8)

    def insert(self, starts: list[int]) -> None:
        for start in starts:
            at = int(self.starts.searchsorted(np.uint64(start)))
            self.starts = np.insert(self.starts, at, np.uint64(start))
            self.ends = np.insert(self.ends, at, np.uint64(start + 16))
            self.deltas = np.insert(self.deltas, at, np.uint64(0))
            self.perms = np.insert(self.perms, at, np.uint8(3))

    def remove(self, starts: list[int]) -> None:
        for start in starts:
            at = int(self.starts.searchsorted(np.uint64(start)))
            self.starts = np.delete(self.starts, at)
            self.ends = np.delete(self.ends, at)
            self.deltas = np.delete(self.deltas, at)
            self.perms = np.delete(self.perms, at)

    def one(self, addresses: list[int]) -> int:
        last = 0
        for address in addresses:
            at = int(self.starts.searchsorted(np.uint64(address), "right")) - 1
            if address + LENGTH > int(self.ends[at]) or self.perms[at] & 1 != 1:
                raise KeyError(address)
            last = (address + int(self.deltas[at])) % 2**64
        return last

    def many(self, addresses: U64) -> U64:
        at = self.starts.searchsorted(addresses, "right") - 1
        allowed = (addresses + np.uint64(LENGTH) <= self.ends[at]) & (self.perms[at] & 1 == 1)
        assert allowed.all()
        return addresses + self.deltas[at]


class SortedDictMap:
    """A sorted dictionary of the ``sortedcontainers`` package."""

    def __init__(self, load: Workload) -> None:
        self.map = import_module("sortedcontainers").SortedDict(
            (s, (s + PAGE, t - s, 3))
            for s, t in zip(load.starts.tolist(), load.targets.tolist(), strict=True)
        )

    def one(self, addresses: list[int]) -> int:
        entries, keys = self.map, self.map.keys()
        last = 0
        for address in addresses:
            end, delta, perm = entries[keys[entries.bisect_right(address) - 1]]
            if address + LENGTH > end or perm & 1 != 1:
                raise KeyError(address)
            last = address + delta
        return last

    def insert(self, starts: list[int]) -> None:
        for start in starts:
            self.map[start] = (start + 16, 0, 3)

    def remove(self, starts: list[int]) -> None:
        for start in starts:
            del self.map[start]


class IntervalTreeMap:
    """The ``intervaltree`` package."""

    def __init__(self, load: Workload) -> None:
        package = import_module("intervaltree")
        self.map = package.IntervalTree(
            package.Interval(s, s + PAGE, (t - s, 3))
            for s, t in zip(load.starts.tolist(), load.targets.tolist(), strict=True)
        )

    def one(self, addresses: list[int]) -> int:
        last = 0
        for address in addresses:
            (found,) = self.map.at(address)
            delta, perm = found.data
            if address + LENGTH > found.end or perm & 1 != 1:
                raise KeyError(address)
            last = address + delta
        return last

    def insert(self, starts: list[int]) -> None:
        for start in starts:
            self.map.addi(start, start + 16, (0, 3))

    def remove(self, starts: list[int]) -> None:
        for start in starts:
            self.map.removei(start, start + 16, (0, 3))


CONTESTANTS: dict[str, type[Any]] = {
    OURS: OurMap,
    "bisect": BisectMap,
    "numpy": NumpyMap,
    "sortedcontainers": SortedDictMap,
    "intervaltree": IntervalTreeMap,
}
SLOW_TO_BUILD = {"intervaltree": 100_000}
"""The largest map that each builds in a bearable time."""
SLOW_TO_CHANGE = {"bisect": 100, "numpy": 20}
"""How often each is changed in a round where a change moves megabytes."""


def repeated(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def timed(call: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    begun = time.thread_time()
    call()
    return time.thread_time() - begun


@contextmanager
def without_collector() -> Iterator[None]:
    """Collect garbage now, and not meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def rounds_of(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each call; every one takes its turn in every round."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with without_collector():
        for _ in range(rounds):
            for name, call in calls.items():
                taken[name].append(timed(call))
    return {name: median(times) for name, times in taken.items()}


def built(load: Workload, wanted: Callable[[type[Any]], bool]) -> dict[str, Any]:
    """The contestants that can do this, are installed, and are built in a bearable time."""
    made = {}
    for name, kind in CONTESTANTS.items():
        if len(load.starts) > SLOW_TO_BUILD.get(name, 1 << 62) or not wanted(kind):
            continue
        try:
            made[name] = kind(load)
        except ImportError:
            continue
    return made


def per_item(seconds: dict[str, float], items: int) -> dict[str, float | None]:
    shown = {name: value / items * 1e9 for name, value in seconds.items()}
    return {name: shown.get(name) for name in CONTESTANTS}


def single_lookups(sizes: list[int], rounds: int) -> Report:
    rows = []
    for size in sizes:
        for order in ("random", "sequential"):
            load = Workload.make(size, 5000, order)
            addresses = load.queries.tolist()
            maps = built(load, lambda kind: hasattr(kind, "one"))
            assert len({contestant.one(addresses) for contestant in maps.values()}) == 1
            taken = rounds_of({n: partial(m.one, addresses) for n, m in maps.items()}, rounds)
            rows.append(Row(f"{size:,} {order}", per_item(taken, len(addresses))))
    return Report(LOOKUP, "ns", "hits with a permission check", rows)


def batch_lookups(sizes: list[int], rounds: int) -> Report:
    rows = []
    for size in sizes:
        for order in ("random", "sequential"):
            load = Workload.make(size, 200_000, order)
            maps = built(load, lambda kind: hasattr(kind, "many"))
            expected = maps[OURS].many(load.queries)
            assert all(np.array_equal(expected, m.many(load.queries)) for m in maps.values())
            taken = rounds_of({n: partial(m.many, load.queries) for n, m in maps.items()}, rounds)
            rows.append(Row(f"{size:,} {order}", per_item(taken, len(load.queries))))
    note = "lookup_many against searchsorted, gather and check"
    return Report(BATCH, "ns a lookup", note, rows)


def gap_after(page: int) -> int:
    """An address that is free in a workload and next to nothing."""
    return page * STRIDE + PAGE + 64


def changes(sizes: list[int], rounds: int) -> list[Report]:
    inserts: list[Row] = []
    removes: list[Row] = []
    for size in sizes:
        maps = built(Workload.make(size, 10, "random"), lambda kind: hasattr(kind, "insert"))
        rng = np.random.default_rng(size)
        many = min(size // 2, 1000)
        for order in ("random", "sequential"):
            taken: dict[str, list[list[float]]] = {name: [[], []] for name in maps}
            for _ in range(rounds):
                pages = size // 2 - many // 2 + np.arange(many)
                if order == "random":
                    pages = rng.choice(size, many, replace=False)
                starts = [gap_after(page) for page in pages.tolist()]
                for name, contestant in maps.items():
                    few = SLOW_TO_CHANGE.get(name, many) if size >= 100_000 else many
                    for way, call in enumerate((contestant.insert, contestant.remove)):
                        seconds = rounds_of({name: partial(call, starts[:few])}, 1)[name]
                        taken[name][way].append(seconds / few)
            for way, rows in enumerate((inserts, removes)):
                medians = {name: median(times[way]) for name, times in taken.items()}
                rows.append(Row(f"{size:,} {order}", per_item(medians, 1)))
    return [
        Report("Insert into n mappings", "ns", "each between two others", inserts),
        Report("Remove from n mappings", "ns", "the same again", removes),
    ]


def growth(sizes: list[int], rounds: int) -> Report:
    """Our own changes, at other random places each time; nothing else uses the caches meanwhile.

    The maps grow by a tenth at most, and shrink again.
    """
    rng = np.random.default_rng(1)
    rows: dict[str, Row] = {}
    for order in BUILDS:
        maps = {}
        for size in sizes:
            load = Workload.make(size, 10, "random")
            if order == "at random":
                mixed = rng.permutation(size)
                load = load._replace(starts=load.starts[mixed], targets=load.targets[mixed])
            maps[size] = OurMap(load)
        taken: dict[tuple[str, int], list[float]] = {}
        with without_collector():
            for size, ours in [*maps.items()] * rounds:
                many = min(size // 10, 1000)
                spent = {"insert": 0.0, "remove": 0.0}
                for batch in np.split(rng.choice(size, 1000, replace=False), 1000 // many):
                    starts = [gap_after(page) for page in batch.tolist()]
                    spent["insert"] += timed(partial(ours.insert, starts))
                    spent["remove"] += timed(partial(ours.remove, starts))
                for name, seconds in spent.items():
                    taken.setdefault((name, size), []).append(seconds / 1000)
        for name in ("insert", "remove"):
            figures = {f"{size:,}": median(taken[name, size]) * 1e9 for size in maps}
            rows[f"{name}, built {order}"] = Row(f"{name}, built {order}", dict(figures))
    note = "1,000 random places a round, other ones in every round"
    return Report(GROWTH, "ns", note, [rows[label] for label in sorted(rows)])


def evictions(rounds: int) -> Report:
    """An insertion into a full map of which some entries may not go."""
    rows = []
    for size in (1000, 10_000, 100_000):
        figures: dict[str, float | None] = {}
        for label, share, leased in (
            ("nothing kept", 0.0, False),
            ("half pinned", 0.5, False),
            ("nine tenths pinned", 0.9, False),
            ("all in use", 0.0, True),
        ):
            iotlb = Iotlb(size)
            for page in range(size):
                iotlb.set_mapping(page * PAGE, page * 2 * PAGE, PAGE, RW)
            for page in range(int(size * share)):
                iotlb.pin(page * PAGE, PAGE)
            fresh = iter(range(1 << 40, 1 << 50, 2 * PAGE))

            def insert(iotlb: Iotlb = iotlb, fresh: Iterator[int] = fresh) -> None:
                for _ in range(200):
                    iotlb.set_mapping(next(fresh), 0, PAGE, RW)

            with iotlb.guard(0, size * PAGE, R) if leased else nullcontext():
                figures[label] = rounds_of({label: insert}, rounds)[label] / 200 * 1e9
        rows.append(Row(f"{size:,}", figures))
    return Report("Eviction", "ns", "an insertion, by capacity", rows)


MEMORY_PROBE = """
import gc, sys
import bench.tables as tables
def resident():
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096
load = tables.Workload.make(int(sys.argv[2]), 10, "random")
kind = tables.CONTESTANTS[sys.argv[1]]
kind(tables.Workload.make(1000, 10, "random"))
times = max(1, 200_000 // len(load.starts))
before = resident()
made = [kind(load) for _ in range(times)]
print((resident() - before) / len(load.starts) / times)
"""


def memory_per_entry(sizes: list[int]) -> Report:
    """Resident memory of a process of its own for each."""
    rows = []
    for size in sizes:
        figures: dict[str, float | None] = {}
        for name in CONTESTANTS:
            figures[name] = None
            if size <= SLOW_TO_BUILD.get(name, 1 << 62):
                done = subprocess.run(
                    [sys.executable, "-c", MEMORY_PROBE, name, str(size)],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode == 0:
                    figures[name] = float(done.stdout)
        rows.append(Row(f"{size:,}", figures))
    return Report("Memory", "bytes an entry", "resident memory after building in order", rows)


class Tables(Iommu):
    """An IOMMU whose IOTLB holds everything."""

    def __init__(self) -> None:
        self._iotlb = Iotlb()

    @property
    def iotlb(self) -> Iotlb:
        return self._iotlb


def scattered_memory(size: int) -> IommuMemory:
    """Memory behind an IOMMU in which no two neighboring pages are neighbors."""
    pages = 2 * size // PAGE
    backend = GuestRegionCollection.from_ranges([(0, pages * PAGE)])
    iommu = Tables()
    for page, target in enumerate(np.random.default_rng(1).permutation(pages).tolist()):
        iommu.iotlb.set_mapping(page * PAGE, target * PAGE, PAGE, RW)
    backend.fill(0, pages * PAGE, 7)
    return IommuMemory(backend, iommu)


def copies(rounds: int) -> Report:
    """Bytes a second, the same buffers in every round; a copy of numpy is a memcpy."""
    limit = 1 << 20
    plain = GuestRegionCollection.from_ranges([(0, 2 * limit)])
    plain.fill(0, 2 * limit, 7)
    scattered = scattered_memory(limit)
    source, buffer = np.full(limit, 7, np.uint8), np.zeros(limit, np.uint8)
    rows = []
    for size in (64, 1024, PAGE, 16 << 10, 64 << 10, 256 << 10, limit):
        view, origin = buffer[:size], source[:size]
        calls: dict[str, Callable[[], object]] = {
            "numpy copy": partial(np.copyto, view, origin),
            "read": partial(plain.readinto, 0, view.data),
            "write": partial(plain.write, 0, view.data),
            "read, scattered pages": partial(scattered.readinto, 0, view.data),
            "write, scattered pages": partial(scattered.write, 0, view.data),
        }
        repeat = max(1, (4 << 20) // (size + 2048))
        for call in calls.values():
            call()
        taken = rounds_of({n: partial(repeated, c, repeat) for n, c in calls.items()}, rounds)
        shown = f"{size} B" if size < 1024 else f"{size >> 10} KiB"
        rows.append(Row(shown, {n: size * repeat / t / 1e9 for n, t in taken.items()}))
    note = "scattered: behind an IOMMU, every page elsewhere"
    return Report(COPIES, "GB/s", note, rows, better="higher")


def harvests(rounds: int) -> Report:
    """A bitmap of a guest of 1 TiB in pages of 4 KiB: 32 MiB of bits."""
    bitmap = AtomicBitmap(1 << 40)
    rng = np.random.default_rng(1)
    bits = np.ones(4 << 20, np.uint64)
    other = np.zeros_like(bits)
    rows = []
    for label, chosen in (
        ("nothing dirty", np.zeros(0, np.int64)),
        ("20,000 pages", np.unique(rng.integers(0, 1 << 28, 20_000))),
        ("2,000,000 pages", np.unique(rng.integers(0, 1 << 28, 2_000_000))),
    ):
        taken: dict[str, list[float]] = {}
        for _ in range(rounds):
            for page in chosen.tolist():
                bitmap.set_bit(page)
            calls: dict[str, Callable[[], object]] = {
                "copy of 32 MiB": partial(np.copyto, other, bits),
                "peek at pages": bitmap.dirty_pages,
                "take words": bitmap.get_and_reset,
                "take pages": partial(bitmap.dirty_pages, clear=True),
            }
            for name, call in calls.items():
                if name == "take pages":
                    for page in chosen.tolist():
                        bitmap.set_bit(page)
                taken.setdefault(name, []).append(rounds_of({name: call}, 1)[name])
        rows.append(Row(label, {name: median(times) * 1e3 for name, times in taken.items()}))
    return Report("Harvest of the dirty bitmap of 1 TiB", "ms", "pages of 4 KiB", rows)


def harvests_in_larger_pages(rounds: int) -> Report:
    """A bitmap of a guest of 64 GiB in pages of 4 KiB, listed in those and in larger ones.

    Larger pages are fewer, so that listing them must not cost more.
    """
    guest = 64 << 30
    rng = np.random.default_rng(1)
    rows = []
    for label, chosen in (
        ("nothing dirty", np.zeros(0, np.int64)),
        ("20,000 pages", np.unique(rng.integers(0, guest >> 12, 20_000))),
        ("everything dirty", None),
    ):
        bitmap = AtomicBitmap(guest)
        if chosen is None:
            bitmap.set_range(0, guest)
        else:
            for page in chosen.tolist():
                bitmap.set_bit(page)
        calls = {
            f"pages of {name}": partial(bitmap.dirty_pages, page_size=size)
            for name, size in (("4 KiB", 1 << 12), ("64 KiB", 1 << 16), ("2 MiB", 1 << 21))
        }
        taken = rounds_of(calls, rounds)
        rows.append(Row(label, {name: seconds * 1e3 for name, seconds in taken.items()}))
    return Report(
        "Harvest of the dirty bitmap of 64 GiB in larger pages", "ms", "bits for 4 KiB", rows
    )


def all_reports(quick: bool) -> Iterator[tuple[str, Callable[[], list[Report]]]]:
    """What is measured, and how."""
    sizes = [1000, 100_000] if quick else [1000, 10_000, 100_000, 1_000_000]
    rounds = 5 if quick else 11
    yield "lookups", lambda: [single_lookups(sizes, rounds)]
    yield "batches", lambda: [batch_lookups(sizes, rounds)]
    yield "changes", lambda: changes(sizes, rounds)
    yield "growth", lambda: [growth(sizes, 3 * rounds)]
    yield "evictions", lambda: [evictions(rounds)]
    yield "memory", lambda: [memory_per_entry(sizes)]
    yield "copies", lambda: [copies(3 * rounds)]
    yield (
        "harvests",
        lambda: [
            harvests(3 if quick else rounds),
            harvests_in_larger_pages(3 if quick else rounds),
        ],
    )


def show(report: Report) -> Table:
    """A table with a ratio to the first column that is not ours beside each figure."""
    columns = list(report.rows[0].figures)
    base = columns[0]
    table = Table(
        title=f"{report.title} ({report.unit})", caption=report.note, title_justify="left"
    )
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for row in report.rows:
        reference = row.figures[base]
        cells = []
        for name in columns:
            figure = row.figures[name]
            if figure is None:
                cells.append("-")
            elif name == base or not reference:
                cells.append(f"{figure:,.1f}")
            else:
                cells.append(f"{figure:,.1f} [dim]({figure / reference:.2f}x)[/dim]")
        table.add_row(row.label, *cells)
    return table


def show_goals(reports: list[Report]) -> Table | None:
    """Which goals of the tables that were measured are reached; None if there are none."""
    table = Table(title="Goals", title_justify="left")
    for name in ("", "figure", "wanted", "measured", ""):
        table.add_column(name)
    known = {report.title: report for report in reports}
    for goal in GOALS:
        report = known.get(goal.table)
        if report is None:
            continue
        ratio = report.ratio(goal.row, goal.column, goal.base)
        if ratio is None:
            verdict = "[yellow]not measured[/]"
        elif ratio >= goal.limit if goal.at_least else ratio <= goal.limit:
            verdict = "[green]reached[/]"
        else:
            verdict = "[bold red]not reached[/]"
        table.add_row(
            f"{goal.table}: {goal.row}",
            f"{goal.column} / {goal.base}",
            f"{'>=' if goal.at_least else '<='} {goal.limit:.2f}",
            "-" if ratio is None else f"{ratio:.2f}",
            verdict,
        )
    return table if table.row_count else None


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print tables or JSON."""
    parser = argparse.ArgumentParser(prog="bench tables", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[name for name, _ in all_reports(True)],
        help="measure only these",
    )
    options = parser.parse_args(arguments)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    console = Console(stderr=options.json)
    parts = [
        (name, measure)
        for name, measure in all_reports(options.quick)
        if not options.only or name in options.only
    ]
    reports: list[Report] = []
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("measuring", total=None)
        for number, (name, measure) in enumerate(parts):
            progress.update(task, description=f"{number + 1} of {len(parts)}: {name}")
            for report in measure():
                reports.append(report)
                if not options.json:
                    progress.console.print(show(report))
    if options.json:
        json.dump(
            [
                report._asdict() | {"rows": [row._asdict() for row in report.rows]}
                for report in reports
            ],
            sys.stdout,
            indent=1,
        )
        sys.stdout.write("\n")
    elif goals := show_goals(reports):
        console.print(goals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
