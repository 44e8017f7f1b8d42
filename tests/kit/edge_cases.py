"""Every public call of a class, found by inspection, with one bad argument at a time.

A parameter is judged by its name, since names here are the field's and mean one thing. A name that
is not listed fails the test, so nothing new escapes it.
"""

import ctypes
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from guestio import NoMemoryRegionError

NO_INT = (True, False, 1.0, 0.0, "1", b"1", None, 1j, [1], {1: 1}, np.float64(1), np.True_)
NO_U64 = (-1, -(2**63), 2**64, 2**64 + 1, 2**100)
BEYOND = tuple(number for number in NO_U64 if number != 2**64)
NO_OBJECT = (1, True, 1.5, "x", b"x", None, [], object(), int)
NO_BUFFER = (1, True, 1.5, "text", None, [1, 2], object())
NO_STREAM = (True, 1.5, "name", None, -1, 2**31, [], object())


class Record(ctypes.Structure):
    """Something with an address in it, which no guest may choose."""

    _fields_ = (("length", ctypes.c_uint32), ("next", ctypes.POINTER(ctypes.c_uint8)))


NUMBERS = (
    *("addr", "iova", "base", "start", "offset", "middle", "page", "target", "map_to"),
    *("count", "extra", "size", "page_size", "hugetlb", "value", "expected", "new"),
    *("fd", "file_offset"),
)
"""Numbers of at most 64 bits."""
SPANS = ("length",)
"""Lengths: ``2**64`` is one, where the range may begin at 0."""
STRICT = (*NUMBERS, *SPANS, "access", "perm", "width", "capacity")
"""What is no integer at all is a TypeError here."""
FLAGS = ("writable", "seal", "drain", "once", "clear", "enabled", "merge")
"""Taken for what they are worth, as everywhere in Python."""

BAD: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(NUMBERS, (*NO_INT, *NO_U64)),
    **dict.fromkeys(SPANS, (*NO_INT, *BEYOND)),
    **dict.fromkeys(("access", "perm"), (*NO_INT, *NO_U64, 4, 8)),
    **dict.fromkeys(FLAGS, ()),
    "width": (*NO_INT, *NO_U64, 0, 3, 5, 16),
    "ordering": (*NO_INT, *NO_U64, 1, 4, 77),
    "capacity": (*NO_INT, *NO_U64, 0, 2**63),
    "timeout": ("soon", b"1", [], object()),
    "starts": (
        [1.0],
        [True],
        ["1"],
        [None],
        [2**64],
        [-1],
        [[1], [2]],
        1.0,
        "1",
        b"12345678",
        None,
        True,
        object(),
        {1: 1},
        np.array([1.0]),
        np.array([True]),
        np.array([-1]),
        np.array([1], object),
        np.array(["1"]),
        np.array([1, 2]),
    ),
    "buffer": (*NO_BUFFER, memoryview(bytearray(8))[::2]),
    "data": (*NO_BUFFER, memoryview(bytes(8))[::2]),
    "source": NO_STREAM,
    "sink": NO_STREAM,
    "kind": (
        None,
        1,
        1.5,
        "nonsense",
        object,
        object(),
        "O",
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_int),
        Record,
        Record * 2,
    ),
    "path": (1, True, 1.5, None, [], object()),
    "ranges": (1, None, [1], [(0,)], [(0, 1, 2)], ["ab"], [(0, "1")], [(None, 1)]),
    "regions": (1, None, [1], [None], ["x"]),
    "slices": (1, None, [None], [1], [bytearray(8)]),
    **dict.fromkeys(
        ("backing", "region", "memory", "other", "backend", "iommu", "dirty", "bitmap", "guard"),
        NO_OBJECT,
    ),
    "VolatileSlice.copy_to.other": NO_BUFFER,
    "VolatileSlice.copy_from.source": NO_BUFFER,
    "VolatileSlice.with_bitmap.bitmap": tuple(bad for bad in NO_OBJECT if bad is not None),
    "with_replaced_backend.new": NO_OBJECT,
    "replace.new": NO_OBJECT,
    "write_obj.value": (
        1,
        True,
        1.5,
        "x",
        b"x",
        None,
        [],
        object(),
        ctypes.c_void_p(1),
        Record(),
        np.zeros(2, object),
    ),
    "Backing.memfd.name": (1, 1.5, None, [], object()),
    **dict.fromkeys(
        (f"Backing.{name}.guard" for name in ("anonymous", "memfd", "from_fd", "from_file")), ()
    ),
    # Only ever shown.
    "region.name": (),
}
BAD["lengths"] = BAD["starts"]
BAD["parts"] = BAD["most"] = BAD["size"]
BAD["words"] = (
    *(1, 1.5, None, "x", [1], b"12345678"),
    *(np.zeros(1, np.uint32), np.zeros((1, 1), np.uint64), np.zeros(4, np.uint64)[::2]),
)
# A number of bytes to move may be anything that a range may be long.
BAD["write_to.count"] = BAD["write_all_to.count"] = BAD["length"]
BAD["read_from.count"] = BAD["read_exact_from.count"] = BAD["length"]

ANSWERS = {("check_range", "length"): False}
"""What is a question has an answer for numbers that are merely too large."""


class Case(NamedTuple):
    """One parameter of one call."""

    owner: str
    call: str
    parameter: str

    def __str__(self) -> str:
        return f"{self.owner}.{self.call}-{self.parameter}"

    def bad(self, default: Any) -> list[Any]:
        """What must be refused; the default never is."""
        for key in (f"{self.owner}.{self.call}.{self.parameter}", f"{self.call}.{self.parameter}"):
            if key in BAD:
                break
        else:
            key = self.parameter
        assert key in BAD, f"{self}: say in borders.py what is bad for it"
        return [bad for bad in BAD[key] if not (bad is None and default is None)]


def public_calls(subject: Any) -> dict[str, Callable[..., Any]]:
    """The public methods of an object, and functions of a table as they are."""
    if isinstance(subject, dict):
        return subject
    found = {}
    for name in dir(subject):
        kept = inspect.getattr_static(type(subject), name, None)
        # Constructors of other kinds are listed apart, with the rest that makes objects.
        if name.startswith("_") or isinstance(kept, property | classmethod | staticmethod):
            continue
        if callable(kept):
            found[name] = getattr(subject, name)
    return found


def cases(owner: str, subject: Any) -> Iterator[Case]:
    """Every parameter of every public call."""
    for name, call in public_calls(subject).items():
        for parameter in inspect.signature(call).parameters:
            yield Case(owner, name, parameter)


def check_refusals(
    case: Case, subject: Any, good: dict[str, Any], state: Callable[[], Any]
) -> None:
    """Call with every bad value of one parameter, then with none: only the last may do anything."""
    call = public_calls(subject)[case.call]
    parameters = inspect.signature(call).parameters
    arguments = {
        name: good.get(f"{case.call}.{name}", good.get(name, parameter.default))
        for name, parameter in parameters.items()
    }
    unknown = [name for name, value in arguments.items() if value is inspect.Parameter.empty]
    assert not unknown, f"{case}: say what is good for {unknown}"
    before = state()
    for bad in case.bad(parameters[case.parameter].default):
        judge(case, bad, outcome(call, {**arguments, case.parameter: bad}))
        assert state() == before, f"{bad!r} left a trace"
    done = outcome(call, arguments)
    assert not isinstance(done, Exception), done


def outcome(call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What a call answers or raises."""
    try:
        answer = call(**arguments)
        return list(answer) if isinstance(answer, Iterator) else answer
    except Exception as raised:
        return raised


def judge(case: Case, bad: Any, answer: Any) -> None:
    """Whether this is the way to refuse that."""
    if (case.call, case.parameter) in ANSWERS and type(bad) is int and bad > 0:
        assert answer == ANSWERS[case.call, case.parameter]
    elif case.call == "remove_region" and isinstance(answer, NoMemoryRegionError):
        assert isinstance(bad, int)
    elif isinstance(answer, BufferError):
        assert isinstance(bad, memoryview)
    elif case.parameter in STRICT and any(bad is one for one in NO_INT):
        assert isinstance(answer, TypeError), (bad, answer)
    else:
        assert isinstance(answer, TypeError | ValueError), (bad, answer)
