"""The exception tree is written down, all of it."""

import importlib
import pkgutil
import re

import guestio
from guestio import errors


def subclasses(kind):
    for each in kind.__subclasses__():
        if each.__module__.startswith("guestio."):
            yield each
            yield from subclasses(each)


def test_the_tree_lists_every_error_under_its_parent():
    for module in pkgutil.walk_packages(guestio.__path__, "guestio."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    tree = re.findall(
        r"^ {4}([│ ]*)(?:├── |└── )?(\w+)(?: +(\S.*))?$", errors.__doc__, re.MULTILINE
    )
    parents, path = {}, []
    for bars, name, said in tree:
        depth = 0 if name == "GuestioError" else len(bars) // 4 + 1
        del path[depth:]
        parents[name] = path[-1] if path else None, said
        path.append(name)
    found = set(subclasses(errors.GuestioError))
    assert {each.__name__ for each in found} | {"GuestioError"} == set(parents)
    for each in found:
        parent, said = parents[each.__name__]
        assert parent in [base.__name__ for base in each.__bases__], each
        if each.__module__ != "guestio.errors":
            assert said.startswith(each.__module__.removeprefix("guestio.") + ":"), each
