"""Docstrings of the compiled core, in its stubs.

Editors and the documentation's reference read stubs, which know nothing of what the `.pyx` files
say. `python -m lab.stub_docs` writes into each stub what the compiled module's docstrings are;
with `--check` it only says which stubs differ. The `.pyx` files are where they are edited.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

SOURCE: Final = Path(__file__).resolve().parent.parent / "src"
PACKAGES: Final = ("guestio/_core", "guestio/guest/_load")
INDENT: Final = 4

Documented: TypeAlias = ast.ClassDef | ast.FunctionDef


def stubs() -> Iterator[Path]:
    """All stubs."""
    for package in PACKAGES:
        yield from sorted((SOURCE / package).rglob("*.pyi"))


def documented(stub: Path, text: str) -> str:
    """What a stub's text becomes with the docstrings of its module."""
    name = ".".join(stub.relative_to(SOURCE).with_suffix("").parts)
    module = importlib.import_module(name)
    lines = text.splitlines()
    # From the end, so that the places of those before stay as they are.
    for node, doc in sorted(_docs(ast.parse(text), module), key=lambda each: -each[0].lineno):
        _insert(lines, node, doc)
    return "\n".join(lines) + "\n"


def _docs(tree: ast.Module, module: object) -> Iterator[tuple[Documented, str | None]]:
    """Classes, functions and methods of a stub, and what their docstrings should be."""
    for node in tree.body:
        if not isinstance(node, Documented):
            continue
        owner = getattr(module, node.name, None)
        if owner is None:
            continue  # a type of the stub's own
        yield node, _doc_of(owner)
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield member, _doc_of(getattr(owner, member.name, None))


def _doc_of(value: object) -> str | None:
    if isinstance(getattr(value, "__name__", None), str) and value.__name__.startswith("__"):  # type: ignore[attr-defined]  # as the condition says
        return None  # what Python says of each special method
    # A class that was given its public name has its docstring in its dictionary alone.
    doc = vars(value).get("__doc__") if isinstance(value, type) else getattr(value, "__doc__", None)
    return inspect.cleandoc(doc) if isinstance(doc, str) and doc.strip() else None


def _insert(lines: list[str], node: Documented, doc: str | None) -> None:
    """Put a docstring first in a class or a function, in place of what is there."""
    first = node.body[0]
    old = ast.get_docstring(node, clean=False) is not None
    if old:
        del lines[first.lineno - 1 : first.end_lineno]
        if doc is None and len(node.body) == 1:
            raise SystemExit(f"{node.name} has a docstring in its stub alone")
    if doc is None:
        return
    margin = " " * (node.col_offset + INDENT)
    parts = doc.split("\n")
    text = [f'{margin}"""{parts[0]}', *((margin + part).rstrip() for part in parts[1:])]
    if len(parts) > 1:
        text.append(f'{margin}"""')
    else:
        text[0] += '"""'
    if any("\\" in part for part in parts):
        text[0] = text[0].replace('"""', 'r"""', 1)
    if old:
        lines[first.lineno - 1 : first.lineno - 1] = text
        return
    where = first.lineno - 1
    if isinstance(first, ast.FunctionDef | ast.ClassDef) and first.decorator_list:
        where = first.decorator_list[0].lineno - 1
    header = lines[where]
    if _is_dots(first) and header.rstrip().endswith("..."):
        # The dots stand behind the header, or alone: the docstring takes their place.
        before = header.rstrip()[:-3].rstrip()
        lines[where : where + 1] = ([before] if before else []) + text
    else:
        lines[where:where] = text


def _is_dots(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and node.value.value is ...
    )


def main() -> None:
    """Write the docstrings, or check them."""
    parser = argparse.ArgumentParser(prog="python -m lab.stub_docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if any differ")
    check = parser.parse_args().check
    different = []
    for stub in stubs():
        text = stub.read_text()
        if (wanted := documented(stub, text)) != text:
            different.append(str(stub.relative_to(SOURCE)))
            if not check:
                stub.write_text(wanted)
    if check and different:
        sys.exit(f"run `python -m lab.stub_docs`: docstrings differ in {', '.join(different)}")


if __name__ == "__main__":
    main()
