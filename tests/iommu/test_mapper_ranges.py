"""Ranges that a memory mapper maps, exports and unmaps; crosvm's own cases are among them.

The difference from crosvm: the last byte of the address space is usable, and so is a range that
ends there.
"""

from dataclasses import dataclass, field

import pytest

from guestio import CannotResolveError, Permissions
from guestio.iommu.mapper import (
    AddMapResult,
    BasicMemoryMapper,
    ExportError,
    MappingInfo,
    MemRegion,
)

MAX = 2**64 - 1
R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
ERROR, OK, OVERLAP, EVENT, NONE = "error", "ok", "overlap", "event", "none"


@pytest.mark.parametrize(
    ("iova", "gpa", "size", "fits"),
    [
        pytest.param(MAX - 1, 1, 2, True, id="ends-at-2^64"),
        pytest.param(1, MAX - 1, 2, True, id="target-ends-at-2^64"),
        pytest.param(MAX, 1, 2, False, id="passes-2^64"),
        pytest.param(1, MAX, 2, False, id="target-passes-2^64"),
        pytest.param(5, 5, MAX, False, id="long-and-passes-2^64"),
        pytest.param(1, 5, 0, False, id="empty"),
        pytest.param(0, 0, 2**64, True, id="whole-space"),
        pytest.param(0, 0, 2**64 + 1, False, id="more-than-the-space"),
    ],
)
def test_info(iova, gpa, size, fits):
    if fits:
        assert MappingInfo(iova, gpa, size, RW).size == size
    else:
        with pytest.raises(ValueError):
            MappingInfo(iova, gpa, size, RW)


@dataclass
class Case:
    """Mappings, then steps: ``(name, arguments, expected)``."""

    id: str
    maps: list
    steps: list = field(default_factory=list)


def add(mapper, iova, size, gpa, prot=RW):
    return mapper.add_map(MappingInfo(iova, gpa, size, prot))


def run(mapper, name, args, expected):
    """One step and its expected outcome."""
    if name == "map":
        assert add(mapper, *args) is {OK: AddMapResult.OK, OVERLAP: AddMapResult.OVERLAP}[expected]
    elif name == "remove":
        result = mapper.remove_map(*args)
        assert result.overlap is (expected == OVERLAP)
        if expected == NONE:
            assert result.fault is None
        if expected == EVENT:
            assert not result.fault.is_set
    elif name == "len":
        assert len(mapper) == expected
    elif expected is ERROR:
        with pytest.raises((CannotResolveError, ExportError, ValueError)):
            mapper.export(*args)
    else:
        assert mapper.export(*args) == [MemRegion(*piece) for piece in expected]


SEVEN = [(0, 4, 1000, R), (10, 4, 50, RW)]
LEN = [
    ("export", (1, 0), ERROR),
    ("export", (1, 1), [(1000, 1, R)]),
    ("export", (1, 2), [(1000, 2, R)]),
    ("export", (1, 3), [(1000, 3, R)]),
    ("export", (2, 1), [(1001, 1, R)]),
    ("export", (2, 2), [(1001, 2, R)]),
    ("export", (1, 5), ERROR),
    ("map", (5, 4, 1004, R), OK),
    ("export", (2, 5), [(1001, 5, R)]),
    ("export", (2, 6), [(1001, 6, R)]),
    ("export", (2, 7), [(1001, 7, R)]),
    ("export", (2, 8), ERROR),
    ("export", (3, 10), ERROR),
    ("map", (11, 6, 1010, R), OK),
    ("export", (3, 10), ERROR),
    ("map", (9, 2, 1008, R), OK),
    ("export", (3, 10), [(1002, 10, R)]),
    ("export", (1, 16), [(1000, 16, R)]),
    ("export", (1, 17), ERROR),
    ("export", (0, 16), ERROR),
    ("map", (0, 1, 5, R), OK),
    ("export", (0, 1), [(5, 1, R)]),
    ("export", (0, 2), [(5, 1, R), (1000, 1, R)]),
    ("export", (0, 16), [(5, 1, R), (1000, 15, R)]),
    ("map", (17, 2, 1016, RW), OK),
    ("export", (1, 17), [(1000, 16, R), (1016, 1, RW)]),
    ("export", (2, 16), [(1001, 15, R), (1016, 1, RW)]),
    ("export", (2, 17), [(1001, 15, R), (1016, 2, RW)]),
    ("export", (2, 500), ERROR),
    ("export", (500, 5), ERROR),
]
CASES = [
    Case(
        "overlap",
        [(10, 10, 1000)],
        [("map", (start, size, 1), OVERLAP) for start, size in ((14, 1), (0, 12), (16, 6), (5, 20))]
        + [("len", (), 1), ("map", (10, 10, 1000), OVERLAP)],
    ),
    Case("remove-nothing", [], [("remove", (0, 4), NONE)]),
    Case(
        "remove-one",
        [(0, 9, 1000)],
        [
            ("export", (0, 1), [(1000, 1, RW)]),
            ("export", (8, 1), [(1008, 1, RW)]),
            ("export", (9, 1), ERROR),
            ("remove", (0, 9), EVENT),
            ("export", (0, 1), ERROR),
        ],
    ),
    Case(
        "remove-two",
        [(0, 4, 1000), (5, 4, 50)],
        [
            ("export", (0, 1), [(1000, 1, RW)]),
            ("export", (6, 1), [(51, 1, RW)]),
            ("remove", (0, 9), EVENT),
            ("export", (0, 1), ERROR),
            ("export", (6, 1), ERROR),
        ],
    ),
    Case(
        "remove-a-part",
        [(0, 9, 1000)],
        [("remove", (0, 4), OVERLAP), ("export", (5, 1), [(1005, 1, RW)]), ("len", (), 1)],
    ),
    Case(
        "remove-the-first",
        [(0, 4, 1000), (5, 4, 50)],
        [
            ("export", (0, 1), [(1000, 1, RW)]),
            ("export", (5, 1), [(50, 1, RW)]),
            ("remove", (0, 4), EVENT),
            ("export", (0, 1), ERROR),
            ("export", (4, 1), ERROR),
            ("export", (5, 1), ERROR),
            ("len", (), 1),
        ],
    ),
    Case(
        "remove-more-than-mapped",
        [(0, 4, 1000)],
        [
            ("export", (0, 1), [(1000, 1, RW)]),
            ("export", (9, 1), ERROR),
            ("remove", (0, 9), EVENT),
            ("export", (0, 1), ERROR),
            ("export", (9, 1), ERROR),
        ],
    ),
    Case(
        "remove-across-a-hole",
        SEVEN,
        [
            ("export", (0, 1), [(1000, 1, R)]),
            ("export", (3, 1), [(1003, 1, R)]),
            ("export", (4, 1), ERROR),
            ("export", (10, 1), [(50, 1, RW)]),
            ("export", (13, 1), [(53, 1, RW)]),
            ("remove", (0, 14), EVENT),
            *(("export", (at, 1), ERROR) for at in (0, 3, 4, 10, 13)),
        ],
    ),
    Case(
        "remove-parts-of-three",
        [(1, 4, 1000, R), (5, 4, 50, RW), (9, 4, 50, RW)],
        [
            *(("remove", args, OVERLAP) for args in ((0, 6), (1, 5), (1, 9), (6, 4), (6, 14))),
            ("len", (), 3),
            ("remove", (5, 4), NONE),
            ("len", (), 2),
            ("remove", (1, 9), OVERLAP),
            ("len", (), 2),
            ("remove", (0, 15), NONE),
            ("len", (), 0),
        ],
    ),
    Case("export-lengths", [(1, 4, 1000, R)], LEN),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_mapper(case):
    mapper = BasicMemoryMapper()
    mapper.start_export_session()
    for args in case.maps:
        assert add(mapper, *args) is AddMapResult.OK
    for step in case.steps:
        run(mapper, *step)


BAD_SIZES = [(0, 0), (0, 2**64 + 1), (2, 2**64 - 1), (-1, 5), (2**64, 1)]


@pytest.mark.parametrize("args", BAD_SIZES)
def test_bad_numbers_change_nothing(args):
    mapper = BasicMemoryMapper()
    mapper.start_export_session()
    add(mapper, 0x1000, 0x1000, 0)
    with pytest.raises(ValueError):
        mapper.remove_map(*args)
    with pytest.raises(ValueError):
        mapper.export(*args)
    assert mapper.mappings() == [(0x1000, 0x1000, 0, RW)]


@pytest.mark.parametrize("number", [True, 1.0, None, "1"])
def test_wrong_types_are_refused(number):
    mapper = BasicMemoryMapper()
    mapper.start_export_session()
    for call in (mapper.remove_map, mapper.export, mapper.release):
        with pytest.raises(TypeError):
            call(number, 1)
        with pytest.raises(TypeError):
            call(1, number)
    with pytest.raises(TypeError):
        MappingInfo(number, 0, 1, RW)


class TestSessionLifeCycle:
    """What needs a session, and when it breaks."""

    def test_exports_need_a_session(self):
        mapper = BasicMemoryMapper()
        add(mapper, 0, 1, 0)
        for call in (mapper.export, mapper.release):
            with pytest.raises(ExportError, match="no export session"):
                call(0, 1)

    def test_bounds_of_add(self):
        mapper = BasicMemoryMapper()
        with pytest.raises(ValueError):
            add(mapper, 0, 0, 0)
        # A range may end at 2^64, which is where crosvm reports an overflow.
        assert add(mapper, MAX - 0xFFF, 0x1000, 0) is AddMapResult.OK
        with pytest.raises(ValueError):
            add(mapper, MAX - 0xFFE, 0x1000, 0)
        assert add(mapper, 0, 0x1000, MAX - 0xFFF) is AddMapResult.OK
        with pytest.raises(ValueError):
            add(mapper, 0, 0x1000, MAX - 0xFFE)

    def test_bounds_of_remove(self):
        mapper = BasicMemoryMapper()
        for args in ((0, 0), (MAX, 2)):
            with pytest.raises(ValueError):
                mapper.remove_map(*args)
        result = mapper.remove_map(0x100, 0x100)
        assert (result.overlap, result.fault) == (False, None)

    def test_a_session_from_its_start_to_its_reset(self):
        mapper = BasicMemoryMapper()
        assert add(mapper, 0x1000, 0x1000, 0x8000) is AddMapResult.OK
        assert add(mapper, 0x2000, 0x1000, 0x9000) is AddMapResult.OK
        assert add(mapper, 0, 0x1000, 0x7000) is AddMapResult.OK
        assert add(mapper, 0x1000, 0x1000, 0x8000) is AddMapResult.OVERLAP
        fault = mapper.start_export_session()
        for _ in range(2):
            assert mapper.export(0x800, 0x2000) == [(0x7800, 0x2000, RW)]
        with pytest.raises(ExportError, match="still active"):
            mapper.start_export_session()
        mapper.release(0x800, 0x1FFF)
        result = mapper.remove_map(0x2800, 0x100)
        assert result.overlap
        assert not fault.is_set

        resolved = mapper.remove_map(0x2000, 0x1000).fault
        assert fault.is_set
        assert not resolved.is_set
        with pytest.raises(ExportError, match="broken"):
            mapper.export(0, 0x10)
        # A broken session says so before it looks at the numbers.
        with pytest.raises(ExportError, match="broken"):
            mapper.export(0, 0)
        assert mapper.remove_map(0x1000, 0x1000).fault is None
        mapper.release(0x800, 0x2000)
        assert not resolved.is_set
        mapper.release(0x800, 0x2000)
        assert resolved.is_set
        with pytest.raises(ExportError, match="broken"):
            mapper.export(0, 0x10)
        mapper.start_export_session()
        assert mapper.export(0, 0x10) == [(0x7000, 0x10, RW)]

        resolved = mapper.reset_domain()
        assert not resolved.is_set
        assert len(mapper) == 0
        mapper.release(0, 0x10)
        assert resolved.is_set

    def test_reset_without_export(self):
        mapper = BasicMemoryMapper()
        add(mapper, 0, 1, 0)
        assert mapper.reset_domain() is None
        assert len(mapper) == 0

    def test_permissions_split_pieces(self):
        mapper = BasicMemoryMapper()
        add(mapper, 0, 0x10, 0x100, RW)
        add(mapper, 0x10, 0x10, 0x110, R)
        add(mapper, 0x20, 0x10, 0x120, R)
        mapper.start_export_session()
        assert mapper.export(4, 0x28) == [(0x104, 0xC, RW), (0x110, 0x1C, R)]

    def test_unmapping_a_neighbor_does_not_fault(self):
        mapper = BasicMemoryMapper()
        add(mapper, 0, 0x10, 0x100)
        add(mapper, 0x10, 0x10, 0x110)
        fault = mapper.start_export_session()
        mapper.export(0, 0x10)
        assert mapper.remove_map(0x10, 0x10).fault is None
        assert not fault.is_set
        assert mapper.remove_map(0, 0x1000).fault is not None
        assert fault.is_set

    def test_ids_differ(self):
        assert BasicMemoryMapper().id != BasicMemoryMapper().id
