"""Every line of the comparisons with other projects names what exists, and the test that pins it.

A test is given as ``tests/folder/file.py::function``, or as a file in one of the page's folders.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kit.names import pytest_names, resolves

ROOT = Path(__file__).parents[2]


class Page(NamedTuple):
    """A page of comparisons, and how its names are to be read."""

    name: str
    rows: int
    """So many at least; a table that is no longer recognized must not pass."""
    modules: tuple[str, ...]
    """Where names that are not fully dotted are looked for."""
    folders: tuple[str, ...]
    """Directories of tests where files without a directory are looked for."""


PAGES = [
    Page("coming-from-vm-memory", 150, ("guestio",), ()),
    Page("coming-from-crosvm", 30, ("guestio.virtio.iommu", "guestio.iommu"), ("iommu", "virtio")),
    Page("coming-from-virtio-queue", 25, ("guestio",), ()),
    Page("coming-from-openvmm", 25, ("guestio.dma", "guestio"), ("dma",)),
    Page(
        "coming-from-libvfio-user",
        28,
        ("guestio.vfio_user", "guestio.pci", "guestio.dma", "guestio"),
        ("vfio_user",),
    ),
]
COMPLETE = {"coming-from-vm-memory"}
"""Pages whose every line names our parts in full."""
PINNED = COMPLETE | {
    "coming-from-libvfio-user",
    "coming-from-openvmm",
    "coming-from-virtio-queue",
}
"""Pages without an empty cell, whose every line names test functions."""


class Row(NamedTuple):
    page: Page
    cells: dict[str, str]

    def __str__(self) -> str:
        return f"{self.page.name}: {next(iter(self.cells.values()))[:60]}"


def rows_of(page: Page) -> list[Row]:
    """The lines of every table with a column for guestio, by their headings."""
    rows: list[Row] = []
    heading: list[str] = []
    for line in (ROOT / "docs" / f"{page.name}.md").read_text().splitlines():
        if not line.startswith("|"):
            heading = []
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not heading:
            heading = cells
        elif set("".join(cells)) - set("-: "):
            assert len(cells) == len(heading), line
            rows.append(Row(page, dict(zip(heading, cells, strict=True))))
    return [row for row in rows if "guestio" in row.cells]


ROWS = [row for page in PAGES for row in rows_of(page)]
WITH_TESTS = [row for row in ROWS if "test" in row.cells]
every_row = pytest.mark.parametrize("row", ROWS, ids=str)


def codes(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_there_are_rows(page: Page) -> None:
    assert sum(row.page == page for row in ROWS) >= page.rows


@pytest.mark.parametrize("row", [r for r in ROWS if r.page.name in PINNED], ids=str)
def test_every_line_is_pinned_by_tests(row: Row) -> None:
    assert list(row.cells)[-1] == "test"
    assert all(row.cells.values())
    assert all("::" in code for code in codes(row.cells["test"]))


@pytest.mark.parametrize("row", [r for r in ROWS if r.page.name in COMPLETE], ids=str)
def test_nothing_is_left_out(row: Row) -> None:
    assert list(row.cells) == ["vm-memory", "guestio", "difference", "test"]
    assert all(re.fullmatch(r"guestio(\.\w+)+", code) for code in codes(row.cells["guestio"]))
    assert codes(row.cells["guestio"])


@every_row
def test_names_exist(row: Row) -> None:
    for code in codes(row.cells["guestio"]):
        if code.startswith("guestio."):
            assert resolves(code), f"{code} does not exist"
        elif short := re.match(r"[A-Z]\w+[a-z]\w*(?:\.\w+)*", code):
            named = [f"{module}.{short[0]}" for module in row.page.modules]
            assert any(map(resolves, named)), f"{short[0]} is in none of {row.page.modules}"


@pytest.mark.parametrize("row", WITH_TESTS, ids=str)
def test_tests_exist(row: Row) -> None:
    named = codes(row.cells["test"])
    assert named
    for code in named:
        file, _, function = code.partition("::")
        paths = [ROOT / file, *(ROOT / "tests" / folder / file for folder in row.page.folders)]
        found = [path for path in paths if path.is_file()]
        assert found, f"{file} is not there"
        assert pytest_names(found[0]), f"{file} has no tests"
        assert not function or function in pytest_names(found[0]), f"{file} has no {function}"
