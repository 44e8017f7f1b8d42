"""Interval maps of 900 to 100,000 entries against a model that is too simple to be wrong.

The model has a target for each page. A map is filled in some order, emptied in some way, and agrees
with it at every stage: in batches of lookups, in single lookups, and in what it lists.
"""

import itertools
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from guestio import Iotlb, IotlbFails, Permissions
from guestio._core.base.variant import NAME
from guestio._core.iommu.intervals import IntervalMap

PAGE = 4096
R, RW = Permissions.READ, Permissions.READ_WRITE
SINGLES = 50


class Modelled:
    """A map and its model; pages are numbered from some place of the address space.

    Args:
        pages: How many there are.
        contiguous: Whether targets of neighbors are neighbors, too, in runs of 7 pages.
        merge: Whether the map merges those.
    """

    def __init__(self, pages, *, contiguous, merge, base=0):
        self.base = base
        self.rng = np.random.default_rng(pages)
        self.map = IntervalMap(merge=merge)
        self.merge = merge
        order = np.arange(pages)
        self.targets = (order + order // 7 * 100 if contiguous else self.rng.permutation(pages)) + 1
        self.mapped = np.zeros(pages, bool)

    def at(self, page):
        return self.base + page * PAGE

    def put(self, page):
        self.map.overwrite(self.at(page), PAGE, int(self.targets[page]) * PAGE, RW)
        self.mapped[page] = True

    def cut(self, first, end):
        assert self.map.cut(self.at(first), (end - first) * PAGE) == self.mapped[first:end].any()
        self.mapped[first:end] = False

    def entries(self):
        """How many the map should have: runs of pages whose targets go on, or pages."""
        if not self.merge:
            return int(self.mapped.sum())
        both = self.mapped[1:] & self.mapped[:-1]
        return int(self.mapped.sum() - (both & (np.diff(self.targets) == 1)).sum())

    def check(self):
        self.map.check()
        pages = np.arange(len(self.mapped), dtype=np.uint64)
        starts = pages * np.uint64(PAGE) + np.uint64(self.base)
        shuffled = self.rng.permutation(len(starts))
        targets, status = self.map.lookup_many(starts[shuffled], PAGE, R)
        assert (status == np.where(self.mapped, 0, 1)[shuffled]).all()
        wanted = np.where(self.mapped, self.targets, 0).astype(np.uint64) * np.uint64(PAGE)
        assert (targets == wanted[shuffled]).all()
        assert len(self.map) == self.entries()
        for page in shuffled[:SINGLES].tolist():
            if self.mapped[page]:
                assert self.map.lookup(self.at(page), 8, R) == [(int(wanted[page]), 8)]
            else:
                with pytest.raises(IotlbFails):
                    self.map.lookup(self.at(page), 8, R)


def fill(model, order):
    pages = np.arange(len(model.mapped))
    if order == "up":
        chosen = pages
    elif order == "down":
        chosen = pages[::-1]
    elif order == "random":
        chosen = model.rng.permutation(pages)
    else:
        chosen = np.concatenate([pages[i::5] for i in (3, 0, 4, 1, 2)])
    for i, page in enumerate(chosen.tolist()):
        model.put(page)
        if i in (len(chosen) // 3, len(chosen) // 2):
            model.check()
    model.check()


def empty(model, way):
    pages = len(model.mapped)
    step = max(pages // 5, 1)
    if way == "below":
        for page in range(pages):
            model.cut(page, page + 1)
            if page % step == 0:
                model.check()
    elif way == "above":
        for page in range(pages - 1, -1, -1):
            model.cut(page, page + 1)
            if page % step == 0:
                model.check()
    elif way == "middle":
        for reach in range(1, pages // 2 + 1):
            model.cut(pages // 2 - reach, pages // 2 - reach + 1)
            model.cut(pages // 2 + reach - 1, pages // 2 + reach)
            if reach % step == 0:
                model.check()
        model.cut(0, pages)
    elif way == "one cut":
        model.cut(1, pages - 1)
        model.check()
    elif way == "strides":
        for stride in (13, 5, 2, 1):
            for page in range(0, pages, stride):
                model.cut(page, page + 1)
            model.check()
    else:
        choose = random.Random(pages)
        for i in range(pages * 2):
            page = choose.randrange(pages)
            if choose.random() < 0.35:
                model.put(page)
            else:
                model.cut(page, min(page + choose.choice([1, 1, 1, 3, 9]), pages))
            if i % (2 * step) == 0:
                model.check()
    model.cut(0, pages)
    model.check()
    assert len(model.map) == 0


ORDERS = ["up", "down", "random", "strides"]
WAYS = ["below", "above", "middle", "one cut", "strides", "churn"]


@pytest.mark.parametrize("contiguous", [False, True], ids=["scattered", "contiguous"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", ORDERS)
def test_a_thousand_pages(order, way, contiguous):
    for merge in (True, False):
        model = Modelled(900, contiguous=contiguous, merge=merge)
        fill(model, order)
        empty(model, way)
        # What is left of an emptied map is as good as a new one.
        fill(model, order)


@pytest.mark.slow
@pytest.mark.parametrize(("order", "way"), list(zip(ORDERS * 3, WAYS * 2, strict=True)))
def test_ten_thousand_pages(order, way):
    model = Modelled(10_000, contiguous=False, merge=True, base=(1 << 64) - 10_000 * PAGE)
    fill(model, order)
    empty(model, way)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "way"),
    [("up", "below"), ("random", "churn"), ("down", "one cut"), ("strides", "middle")],
)
def test_a_hundred_thousand_pages(order, way):
    model = Modelled(100_000, contiguous=order == "random", merge=True)
    fill(model, order)
    empty(model, way)


def test_a_mapping_is_cut_into_thousands():
    """Each cut may need a node; nothing but cuts makes room for it."""
    pages = 20_000
    iotlb = IntervalMap()
    iotlb.overwrite(0, pages * PAGE, 1 << 40, RW)
    for page in range(0, pages, 2):
        iotlb.cut(page * PAGE, PAGE)
    iotlb.check()
    assert len(iotlb) == pages // 2
    starts = np.arange(pages, dtype=np.uint64) * np.uint64(PAGE)
    assert iotlb.lookup_many(starts, PAGE, R)[1].tolist() == [1, 0] * (pages // 2)


def single_lookup(iotlb, start, length, access):
    """What a batch should say: the status, and the target or 0."""
    try:
        found = iotlb.lookup(start, length, access)
    except IotlbFails as fails:
        return 1 if fails.misses else 2, 0
    if any(a.base + a.length != b.base for a, b in itertools.pairwise(found)):
        return 3, 0
    return 0, found[0].base if found else 0


def test_batches_say_what_single_lookups_say():
    """Ranges within entries, over borders of entries and nodes, of nothing, and past the end."""
    rng = np.random.default_rng(11)
    iotlb = Iotlb()
    for page in range(700):
        # Some neighbors lead on to each other without being one, and there are holes.
        if page % 9:
            target = page * PAGE if page % 3 else page * PAGE + (1 << 33)
            iotlb.set_mapping(page * PAGE, target, PAGE, [R, RW][page // 3 % 2])
    iotlb._map.check()
    starts = rng.integers(0, 702 * PAGE, 4000)
    lengths = rng.choice([0, 1, 8, PAGE, 2 * PAGE, 3 * PAGE, 40 * PAGE], 4000)
    starts[:1000] = starts[:1000] // PAGE * PAGE
    for access in (R, Permissions.WRITE, RW):
        targets, status = iotlb.lookup_many(starts, lengths, access)
        for start, length, target, outcome in zip(
            starts.tolist(), lengths.tolist(), targets.tolist(), status.tolist(), strict=True
        ):
            assert (outcome, target) == single_lookup(iotlb, start, length, access)


@pytest.mark.parametrize("offset", range(3))
def test_an_entry_that_reaches_into_the_next_node(offset):
    """A node keeps its bounds when its first entry goes; the one before may grow past them then."""
    pages = 600
    iotlb = IntervalMap()
    for page in range(0, pages, 2):
        iotlb.overwrite(page * PAGE, PAGE, page << 40, RW)
    reached = []
    for page in range(2 * offset, pages - 4, 6):
        iotlb.cut((page + 2) * PAGE, PAGE)
        iotlb.overwrite((page + 1) * PAGE, 2 * PAGE, (page << 40) + PAGE, RW)
        reached.append((page + 2, (page << 40) + 2 * PAGE))
    iotlb.check()
    starts = np.array([page for page, _ in reached], np.uint64) * np.uint64(PAGE)
    for length in (1, PAGE):
        targets, status = iotlb.lookup_many(starts, length, R)
        assert status.tolist() == [0] * len(reached)
        assert targets.tolist() == [target for _, target in reached]
    for start, (_, target) in zip(starts.tolist(), reached, strict=True):
        assert iotlb.lookup(start + 5, 1, R) == [(target + 5, 1)]
        before, after = iotlb.neighbours(start)
        assert before is None or before[0] + before[1] < start
        assert after[0] == start + 2 * PAGE


@pytest.mark.skipif(
    "asan" in NAME, reason="a sanitizer reserves more addresses than a limit allows"
)
@pytest.mark.parametrize("change", ["cut", "overwrite", "add"])
def test_a_change_that_lacks_memory_changes_nothing(change):
    """In a process whose memory is limited until a change fails; then all is as before."""
    program = f"from {__name__} import run_out_of_memory; print(run_out_of_memory({change!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout) == (0, "as before\n"), done.stderr


def run_out_of_memory(change):
    pages = 200_000
    whole = IntervalMap()
    if change == "cut":
        whole.overwrite(0, pages * PAGE, 0, RW)
    targets = [(page * 7919 % pages + pages) * PAGE for page in range(pages)]
    starts = [page * PAGE for page in range(pages)]
    size = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    # Python's own pools have room for a while; the tree needs more than that.
    resource.setrlimit(resource.RLIMIT_AS, (size + (3 << 19), hard))
    done = 0
    try:
        for page in range(1, pages, 2):
            if change == "cut":
                whole.cut(starts[page], PAGE)
            elif change == "overwrite":
                whole.overwrite(starts[page], PAGE, targets[page], RW)
            else:
                whole.add(starts[page], PAGE, targets[page], RW)
            done = page
    except MemoryError:
        pass
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if done >= pages - 2:
        return "it never failed"
    whole.check()
    wanted = np.zeros(pages, np.uint64)
    if change == "cut":
        wanted = np.arange(pages, dtype=np.uint64) * np.uint64(PAGE)
        lost = np.arange(1, done + 1, 2)
        status = np.zeros(pages, np.uint8)
        wanted[lost], status[lost] = 0, 1
    else:
        kept = np.arange(1, done + 1, 2)
        status = np.ones(pages, np.uint8)
        wanted[kept], status[kept] = np.array(targets, np.uint64)[kept], 0
    found = whole.lookup_many(np.array(starts, np.uint64), 1, R)
    if not ((found[0] == wanted).all() and (found[1] == status).all()):
        return "it differs"
    whole.cut(0, pages * PAGE)
    whole.check()
    return "as before" if not len(whole) else "it is not empty"
