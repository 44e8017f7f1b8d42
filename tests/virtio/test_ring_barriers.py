"""Each side of a ring stores, passes a full barrier, and only then looks at what the other stored.

Without the barrier a processor may look first; then both sides miss what the other stored, and
both sleep. No test that runs shows this reliably: the window is some nanoseconds wide. So this is
a test of the source.
"""

import re
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src" / "guestio"
FENCE = r"__atomic_thread_fence\(__ATOMIC_SEQ_CST\)"


def statements(file: str, function: str) -> list[str]:
    """The lines of a function of the core, in order."""
    source = (SOURCES / file).read_text()
    found = re.search(rf"^( *)(?:cdef|cpdef|def) .*\b{function}\(.*:$", source, re.MULTILINE)
    assert found is not None, f"{function} has moved"
    body = source[found.end() :].lstrip("\n").splitlines()
    indented = len(found[1]) + 4
    lines = []
    for line in body:
        if line.strip() and len(line) - len(line.lstrip()) < indented:
            break
        lines.append(line.strip())
    return lines


def positions(lines: list[str], pattern: str) -> list[int]:
    return [at for at, line in enumerate(lines) if re.search(pattern, line)]


@pytest.mark.parametrize(
    ("file", "function", "store", "barrier", "look"),
    [
        # The device asks for kicks, then looks for requests.
        (
            "_core/virtio/split.pyx",
            "more_beyond",
            r"store16\(self\.used",
            "full_barrier",
            r"load16\(",
        ),
        # The device shows requests, then looks whether the driver wants to be told.
        (
            "_core/virtio/ring.pyx",
            "publish_pending",
            r"publish_used\(",
            "wants_notification",
            "",
        ),
        ("_core/virtio/split.pyx", "wants_notification", "", "full_barrier", r"load16\("),
        # The driver's side, in the load generator.
        (
            "guest/_load/driver.pyx",
            "ring_publish",
            r"ring_store16\(",
            "ring_barrier",
            r"ring_load16\(",
        ),
        ("guest/_load/driver.pyx", "ring_arm", r"ring_store16\(", "ring_barrier", r"ring_has\("),
    ],
)
def test_store_barrier_look(file: str, function: str, store: str, barrier: str, look: str) -> None:
    lines = statements(file, function)
    (at,) = positions(lines, rf"\b{barrier}\(")
    if store:
        assert positions(lines, store)
        assert max(positions(lines, store)) < at
    if look:
        assert positions(lines, look)
        assert min(positions(lines, look)) > at


@pytest.mark.parametrize(
    ("file", "name"),
    [("_core/virtio/split.pyx", "full_barrier"), ("guest/_load/driver.pyx", "ring_barrier")],
)
def test_the_barrier_is_a_full_one(file: str, name: str) -> None:
    assert re.search(rf"#define {name}\(\) {FENCE}$", (SOURCES / file).read_text(), re.MULTILINE)
