"""Every test of others that is said to be ported is named by one here, and none that is not listed.

``file.rs::test`` in a docstring names one of the tables' tests by the end of its path.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = re.findall(r"^\| (`.*) \| (.*) \|$", (HERE / "README.md").read_text(), flags=re.MULTILINE)
NAMED = {name: here for test, here in ROWS for name in re.findall(r"`(\S+::\w+)`", test)}
SOURCES = [path for path in sorted(HERE.glob("test_*.py")) if path != Path(__file__)]


def origins(path: Path) -> dict[str, set[str]]:
    """By each test of a file, the tests of others that its docstring names."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found[node.name] = set(
                re.findall(r"``([\w./-]+::\w+)``", ast.get_docstring(node) or "")
            )
    return found


ORIGINS = {name for path in SOURCES for names in origins(path).values() for name in names}


def test_there_are_tables() -> None:
    assert len(NAMED) > 50
    assert all(re.match("ported|does not apply: ", here) for _, here in ROWS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_test_says_where_it_comes_from(path: Path) -> None:
    assert [test for test, names in origins(path).items() if not names] == []


def test_every_ported_test_is_here() -> None:
    ported = {name for name, here in NAMED.items() if here.startswith("ported")}
    assert [name for name in ported if not any(name.endswith(end) for end in ORIGINS)] == []


def test_every_origin_is_in_a_table() -> None:
    assert [end for end in ORIGINS if not any(name.endswith(end) for name in NAMED)] == []
