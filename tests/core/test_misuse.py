"""The compiled classes used as no one should: it is refused, and the process goes on."""

from __future__ import annotations

import enum
import importlib
import inspect
import pkgutil
import subprocess
import sys
from types import GetSetDescriptorType, MethodDescriptorType
from typing import Any

import pytest

import guestio._core


def compiled_classes() -> list[type[Any]]:
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(guestio._core.__path__, "guestio._core.")
    ]
    # Classes of the public interface have its name as their module; others are imported by several.
    found = {
        value: None
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__.startswith("guestio.")
        and not issubclass(value, enum.Enum)
        and any(isinstance(each, MethodDescriptorType) for each in vars(value).values())
    }
    return list(found)


CLASSES = compiled_classes()


@pytest.mark.parametrize("made", CLASSES, ids=lambda made: made.__qualname__)
def test_on_something_else(made: type[Any]) -> None:
    for name, attribute in vars(made).items():
        if isinstance(attribute, staticmethod | classmethod) or name == "__new__":
            continue
        if isinstance(attribute, GetSetDescriptorType):
            with pytest.raises(TypeError, match=r"^descriptor "):
                attribute.__get__(object())
        elif callable(attribute):
            with pytest.raises(TypeError, match=r"^descriptor "):
                attribute(object(), 0, 0)


UNPREPARED = """
import contextlib, faulthandler, importlib, itertools, sys
faulthandler.enable()
made = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
values = [0, 1, b"abc", [], None, [(0, 1)]]
for name in dir(made):
    if name in dir(object) and name not in ("__repr__", "__eq__", "__hash__"):
        continue
    with contextlib.suppress(Exception):
        alone = made.__new__(made)
        attribute = getattr(alone, name)
        for count in range(5):
            for arguments in itertools.product(values, repeat=count) if count < 3 else [
                [value] * count for value in values
            ]:
                with contextlib.suppress(Exception):
                    attribute(*arguments)
"""


@pytest.mark.parametrize("made", CLASSES, ids=lambda made: made.__qualname__)
def test_a_subclass_forgets_to_prepare_it(made: type[Any]) -> None:
    """As one does whose ``__init__`` does not call that of the class."""
    done = subprocess.run(
        [sys.executable, "-c", UNPREPARED, made.__module__, made.__qualname__],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("made", CLASSES, ids=lambda made: made.__qualname__)
def test_help_shows_what_a_method_takes(made: type[Any]) -> None:
    for name, attribute in vars(made).items():
        if isinstance(attribute, MethodDescriptorType) and not name.startswith("_"):
            assert next(iter(inspect.signature(attribute).parameters)) == "self"
