"""DMA targets for tests: one that remembers what it was told, one that fails on demand.

They hold their caller to the contract of :class:`~guestio.dma.DmaTarget`: mapping over a mapping,
or unmapping what is not mapped exactly so, is an error.
"""

from __future__ import annotations

import errno
from bisect import bisect_left
from typing import TYPE_CHECKING, Literal, NamedTuple

from guestio.addr import check_int
from guestio.dma import DmaError, DmaMapRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

Call = Literal["map", "unmap", "replace"]


class DmaEvent(NamedTuple):
    """A call that a target carried out."""

    call: Call
    start: int
    size: int


class RecordingTarget:
    """A target that carries everything out and writes it down. Not thread-safe by itself.

    Attributes:
        events: Every call that succeeded, in order.
        held: The mappings it holds now, by their start.
    """

    def __init__(self) -> None:
        self.events: list[DmaEvent] = []
        self.held: dict[int, DmaMapRequest] = {}
        # Ascending, so that a neighbor is found without looking at all.
        self._starts: list[int] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self.held)} mappings held, {len(self.events)} calls>"

    def map_dma(self, request: DmaMapRequest) -> None:
        """Hold a mapping.

        Raises:
            DmaError: Another one is there (``EEXIST``).
        """
        after = bisect_left(self._starts, request.end)
        other = self.held[self._starts[after - 1]] if after else None
        if other is not None and request.start < other.end:
            reason = f"{other.start:#x}+{other.size:#x} is mapped there"
            raise DmaError("map", request.start, request.size, reason, errno=errno.EEXIST)
        self._starts.insert(after, request.start)
        self.held[request.start] = request
        self.events.append(DmaEvent("map", request.start, request.size))

    def unmap_dma(self, start: int, size: int) -> None:
        """Let go of a mapping.

        Raises:
            DmaError: There is none of exactly this range (``ENOENT``).
        """
        self._check_held("unmap", start, size)
        del self.held[start]
        del self._starts[bisect_left(self._starts, start)]
        self.events.append(DmaEvent("unmap", start, size))

    def _check_held(self, call: Call, start: int, size: int) -> None:
        if start not in self.held or self.held[start].size != size:
            raise DmaError(call, start, size, "it is not mapped so", errno=errno.ENOENT)


class ReplacingTarget(RecordingTarget):
    """A recording target that can exchange mappings."""

    def replace_dma(self, old: DmaMapRequest, new: DmaMapRequest) -> None:
        """RequestChannel a mapping.

        Raises:
            DmaError: The old one is not held (``ENOENT``).
        """
        self._check_held("replace", old.start, old.size)
        assert (old.start, old.size) == (new.start, new.size)
        self.held[new.start] = new
        self.events.append(DmaEvent("replace", new.start, new.size))


class FailAfter(ReplacingTarget):
    """A target that carries out a number of calls and then fails.

    Try it with every number from 0 up to the calls that an operation makes: that is every way in
    which the operation can fail.

    Args:
        n: How many calls succeed first.
        calls: Which calls count, and fail.
        times: How many of them fail then; None for all that follow.
        error: Makes the exception; by default a :class:`~guestio.dma.DmaError` with ``ENOMEM``.
        replacing: Whether it can exchange mappings.

    Attributes:
        remaining: Calls that will still succeed.
        failures: Calls that have failed.
    """

    def __init__(
        self,
        n: int,
        *,
        calls: Collection[Call] = ("map", "replace"),
        times: int | None = None,
        error: Callable[[Call, int, int], BaseException] | None = None,
        replacing: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("n", n), ("times", 0 if times is None else times)):
            if check_int(value, name) < 0:
                raise ValueError(f"{name} {value} must be >= 0")
        self.remaining = n
        self.failures = 0
        self._calls = frozenset(calls)
        self._times = times
        self._error = error or _out_of_memory
        if not replacing:
            # Hides the method from hasattr().
            self.replace_dma = None  # type: ignore[method-assign, assignment]

    def map_dma(self, request: DmaMapRequest) -> None:
        """Hold a mapping, or fail."""
        self._count("map", request.start, request.size)
        super().map_dma(request)

    def unmap_dma(self, start: int, size: int) -> None:
        """Let go of a mapping, or fail."""
        self._count("unmap", start, size)
        super().unmap_dma(start, size)

    def replace_dma(self, old: DmaMapRequest, new: DmaMapRequest) -> None:
        """RequestChannel a mapping, or fail."""
        self._count("replace", new.start, new.size)
        super().replace_dma(old, new)

    def _count(self, call: Call, start: int, size: int) -> None:
        if call not in self._calls or (self._times is not None and self.failures >= self._times):
            return
        if self.remaining:
            self.remaining -= 1
            return
        self.failures += 1
        raise self._error(call, start, size)


def _out_of_memory(call: Call, start: int, size: int) -> DmaError:
    return DmaError(call, start, size, "made to fail by a test", errno=errno.ENOMEM)
