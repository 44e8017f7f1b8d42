"""Names in documents: what a dotted name leads to, and which tests a file has."""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, something in one, or an attribute of its instances."""
    names = dotted.split(".")
    for count in range(len(names), 0, -1):
        try:
            found: object = importlib.import_module(".".join(names[:count]))
        except ImportError:
            continue
        for i, name in enumerate(names[count:], count + 1):
            if not hasattr(found, name):
                return i == len(names) and name in instance_attributes(found)
            found = getattr(found, name)
        return True
    return False


@cache
def instance_attributes(kind: object) -> frozenset[str]:
    """What a class declares, or assigns to ``self`` somewhere in its source."""
    found: set[str] = set()
    for base in inspect.getmro(kind) if isinstance(kind, type) else ():
        found.update(vars(base).get("__annotations__", {}))
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
        found.update(
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        )
    return frozenset(found)


@cache
def pytest_names(path: Path) -> frozenset[str]:
    """The tests of a file as pytest names them: ``test_name``, ``TestClass::test_name``."""

    def under(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                yield from under(node.body, f"{prefix}{node.name}::")
            elif getattr(node, "name", "").startswith("test_"):
                yield prefix + node.name

    return frozenset(under(ast.parse(path.read_text()).body, ""))
