"""The interval map against a model that stores one target per address."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from guestio import IotlbFails, IovaRange, MappedRange, Permissions
from guestio._core.iommu.intervals import IntervalMap

SPAN = 96
BASES = (0, 1 << 63, (1 << 64) - SPAN)


def runs(addresses):
    """Consecutive addresses as (first, length)."""
    found = []
    for addr in addresses:
        if found and found[-1][0] + found[-1][1] == addr:
            found[-1][1] += 1
        else:
            found.append([addr, 1])
    return [tuple(pair) for pair in found]


class IntervalMachine(RuleBasedStateMachine):
    """Small ranges at an edge of the address space; addresses here are offsets from the base."""

    def __init__(self):
        super().__init__()
        self.model = {}

    @initialize(base=st.sampled_from(BASES), merge=st.booleans())
    def start(self, base, merge):
        self.base = base
        self.merge = merge
        self.map = IntervalMap(merge=merge)

    spans = st.tuples(st.integers(0, SPAN - 1), st.integers(1, SPAN)).map(
        lambda s: (s[0], min(s[1], SPAN - s[0]))
    )
    perms = st.sampled_from(list(Permissions))

    def owner(self, start, length):
        return {self.model[a][2] for a in range(start, start + length) if a in self.model}

    @rule(span=spans, to=st.integers(0, SPAN), perm=perms)
    def overwrite(self, span, to, perm):
        start, length = span
        self.map.overwrite(self.base + start, length, to, perm)
        for i in range(length):
            self.model[start + i] = (to + i, perm, object())

    @rule(span=spans)
    def cut(self, span):
        start, length = span
        met = any(a in self.model for a in range(start, start + length))
        assert self.map.cut(self.base + start, length) == met
        for a in range(start, start + length):
            self.model.pop(a, None)

    @rule(span=spans, to=st.integers(0, SPAN), perm=perms)
    def add(self, span, to, perm):
        start, length = span
        free = not any(a in self.model for a in range(start, start + length))
        assert self.map.add(self.base + start, length, to, perm) == free
        if free:
            whole = object()
            for i in range(length):
                self.model[start + i] = (to + i, perm, whole)

    @rule(span=spans)
    def take(self, span):
        start, length = span
        entries = self.map.overlapping(self.base + start, length)
        splits = any(
            e[0] < self.base + start or e[0] + e[1] > self.base + start + length for e in entries
        )
        removed = self.map.take(self.base + start, length)
        assert removed == (None if splits else entries)
        if removed is not None:
            for a in range(start, start + length):
                self.model.pop(a, None)

    strides = st.tuples(
        st.integers(0, SPAN - 1), st.integers(0, SPAN), st.integers(1, 5), st.booleans()
    )

    def places(self, stride):
        """Addresses at a distance, ascending or descending."""
        start, end, step, down = stride
        return list(range(start, end, step))[:: -1 if down else 1]

    @rule(stride=strides, perm=perms)
    def fill(self, stride, perm):
        """Bytes that do not merge: what leads somewhere each time leads elsewhere."""
        for start in self.places(stride):
            self.overwrite((start, 1), 1000 - 2 * start, perm)

    @rule(stride=strides)
    def empty(self, stride):
        for start in self.places(stride):
            self.cut((start, 1))

    @rule(start=st.integers(0, SPAN - 1))
    def empty_above(self, start):
        self.cut((start, SPAN - start))

    @rule(end=st.integers(1, SPAN))
    def empty_below(self, end):
        self.cut((0, end))

    @rule()
    def clear(self):
        self.map.clear()
        self.model.clear()

    def expected(self, start, length, access):
        missing = [a for a in range(start, start + length) if a not in self.model]
        refused = [
            a
            for a in range(start, start + length)
            if a in self.model and not self.model[a][1].allows(access)
        ]
        return missing, refused

    @rule(
        span=st.tuples(st.integers(0, SPAN - 1), st.integers(0, SPAN)),
        access=perms,
    )
    def lookup(self, span, access):
        start, length = span[0], min(span[1], SPAN - span[0])
        missing, refused = self.expected(start, length, access)
        if not missing and not refused:
            found = self.map.lookup(self.base + start, length, access)
            moved = [r.base + i for r in found for i in range(r.length)]
            assert moved == [self.model[a][0] for a in range(start, start + length)]
            assert all(r.length for r in found)
        else:
            with pytest.raises(IotlbFails) as caught:
                self.map.lookup(self.base + start, length, access)
            assert [(r.base - self.base, r.length) for r in caught.value.misses] == runs(missing)
            hit = [
                r.base - self.base + i for r in caught.value.access_fails for i in range(r.length)
            ]
            assert hit == refused

    @rule(
        spans=st.lists(st.tuples(st.integers(0, SPAN - 1), st.integers(0, SPAN)), max_size=40),
        access=perms,
    )
    def lookup_many(self, spans, access):
        pairs = [(s, min(n, SPAN - s)) for s, n in spans]
        targets, status = self.map.lookup_many(
            np.array([self.base + s for s, _ in pairs], np.uint64),
            np.array([n for _, n in pairs], np.uint64),
            access,
        )
        for (start, length), target, outcome in zip(pairs, targets, status, strict=True):
            missing, refused = self.expected(start, length, access)
            cells = [self.model[a][0] for a in range(start, start + length) if a in self.model]
            if missing:
                assert outcome == 1
            elif refused:
                assert outcome == 2
            elif length and cells != list(range(cells[0], cells[0] + length)):
                assert outcome == 3
            else:
                assert outcome == 0
                assert not length or target == cells[0]

    @invariant()
    def sound(self):
        if hasattr(self, "map"):
            self.map.check()

    @precondition(lambda self: hasattr(self, "map"))
    @rule()
    def iterate(self):
        cells = {}
        for source, target, perm in self.map:
            for i in range(source.length):
                cells[source.base - self.base + i] = (target.base + i, perm)
        assert cells == {a: c[:2] for a, c in self.model.items()}


@pytest.mark.slow
def test_agrees_with_the_byte_model():
    """Every operation, at both ends and the middle of the space, with and without merging."""
    run_state_machine_as_test(
        IntervalMachine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_large_maps_stay_sound(merge, seed):
    """Thousands of entries: nodes split, join and vanish at every level."""
    rng = np.random.default_rng(seed)
    tree, model = IntervalMap(merge=merge), {}
    for step in range(12000):
        page = int(rng.integers(0, 6000))
        grow = rng.random() < (0.75 if step < 6000 else 0.2)
        if grow:
            target = int(rng.integers(0, 1 << 40))
            assert tree.overwrite(page * 16, 16, target, 3) == (page in model)
            model[page] = target
        else:
            assert tree.cut(page * 16, 16) == (page in model)
            model.pop(page, None)
        if step % 500 == 0:
            tree.check()
            if not merge:
                assert [e[0].base for e in tree] == [p * 16 for p in sorted(model)]
    tree.check()
    pages = np.array(sorted(model), np.uint64)
    targets, status = tree.lookup_many(pages * np.uint64(16), 16, Permissions.READ)
    assert not status.any()
    assert targets.tolist() == [model[int(p)] for p in pages]
    for page in list(model):
        tree.cut(page * 16, 16)
    tree.check()
    assert len(tree) == 0


def test_whole_space_and_last_byte():
    """The last byte of the space can be mapped, alone and as the end of everything."""
    tree = IntervalMap()
    tree.overwrite(0, 1 << 64, 0, 3)
    assert tree.lookup(0, 1 << 64, 3) == [MappedRange(0, 1 << 64)]
    assert list(tree) == [(IovaRange(0, 1 << 64), MappedRange(0, 1 << 64), Permissions(3))]
    tree.overwrite((1 << 64) - 1, 1, 5, 1)
    assert tree.lookup((1 << 64) - 1, 1, 1) == [MappedRange(5, 1)]
    assert tree.lookup((1 << 64) - 2, 2, 1) == [MappedRange((1 << 64) - 2, 1), MappedRange(5, 1)]
    tree.cut(0, 1 << 64)
    assert len(tree) == 0
