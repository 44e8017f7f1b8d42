"""Guest memory of a replay: the addresses of a recording, over memory of its own.

Without an IOMMU the regions of guest memory are laid where the recorded addresses are; with one,
recorded addresses are I/O virtual, and each page lies on any page of guest memory, another one each
time it is mapped.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

from guestio.addr import ADDRESS_SPACE, Permissions
from guestio.budgets import REPLAY_MEMORY, REPLAY_PAGES, REPLAY_REGIONS
from guestio.errors import DeviceError
from guestio.guest.dma import PAGE, Segment
from guestio.memory import Backing, GuestRegionCollection, IoVector, MmapRegion
from guestio.observe.script import RecordedRequest, pages_of
from guestio.vhost_user.frontend import Frontend
from guestio.vhost_user.iotlb_service import IotlbService

_BOTH: Final = Permissions.READ_WRITE


class ReplayMemory(ABC):
    """Memory of the replayed requests, and apart from it of rings and indirect tables.

    Attributes:
        regions: Guest physical memory.
    """

    regions: GuestRegionCollection

    def __init__(self) -> None:
        self._backings: list[Backing] = []

    def _lay(self, places: Sequence[Segment]) -> None:
        """Make the regions, of one file that takes only the memory that is written."""
        total = sum(size for _, size in places)
        if total > REPLAY_MEMORY:
            raise DeviceError(
                f"the recorded addresses span {total:#x} bytes of guest memory, more than "
                f"{REPLAY_MEMORY:#x}"
            )
        with Backing.memfd(total, "guestio-replay", seal=True) as whole:
            assert whole.fd is not None  # a memfd has one
            at = 0
            for _, size in places:
                self._backings.append(Backing.from_fd(whole.fd, size, at))
                at += size
        self.regions = GuestRegionCollection.from_regions(
            MmapRegion(start, backing)
            for (start, _), backing in zip(places, self._backings, strict=True)
        )

    @abstractmethod
    def connect(self, frontend: Frontend) -> None:
        """Share it with a back-end; rings can be laid out afterwards."""

    @abstractmethod
    def own(self, size: int) -> tuple[int, int]:
        """Memory for a ring or a table: its guest physical address, and that for the device.

        Args:
            size: Bytes; it begins on a page.
        """

    @abstractmethod
    def admit(self, request: RecordedRequest) -> None:
        """Have the device reach the memory of a request."""

    @abstractmethod
    def leave(self, requests: Sequence[RecordedRequest]) -> None:
        """These requests have been answered."""

    @abstractmethod
    def revoke(self, address: int, length: int) -> None:
        """Translations were revoked in the recording."""

    @abstractmethod
    def _pieces(self, address: int, length: int) -> Iterable[Segment]:
        """Where a range is in guest physical memory; pages that are not mapped are left out."""

    def write(self, segments: Sequence[Segment], data: bytes) -> None:
        """Put bytes where a request gives them to read."""
        at = 0
        for address, length in segments:
            for gpa, size in self._pieces(address, length):
                self.regions.write(gpa, data[at : at + size])
                at += size

    def fill(self, segments: Sequence[Segment], value: int) -> None:
        """Fill what a request gives to write."""
        for address, length in segments:
            for gpa, size in self._pieces(address, length):
                self.regions.fill(gpa, size, value)

    def read(self, segments: Sequence[Segment], most: int) -> bytes:
        """The first bytes of what a request gave to write."""
        found = bytearray()
        for address, length in segments:
            for gpa, size in self._pieces(address, min(length, most - len(found))):
                found += self.regions.read(gpa, size)
            if len(found) >= most:
                break
        return bytes(found)

    def vector(self, gpa: int, size: int) -> IoVector:
        """Memory of :meth:`own`, to write to."""
        return self.regions.gather(gpa, size, _BOTH)

    def close(self) -> None:
        """Give it up; the device must not use it any more."""
        self.__dict__.pop("regions", None)
        while self._backings:
            with contextlib.suppress(BufferError):
                self._backings.pop().close()


class PhysicalMemory(ReplayMemory):
    """Without an IOMMU: guest memory lies where the recorded addresses are.

    Args:
        requests: Whose addresses.
        own: Bytes for rings and tables, with each on pages of its own.

    Raises:
        DeviceError: The addresses are too far apart.
    """

    def __init__(self, requests: Iterable[RecordedRequest], own: int) -> None:
        super().__init__()
        spans = _spans(requests, REPLAY_REGIONS)
        base = _gap(spans, own)
        self._lay(sorted([*spans, (base, own)]))
        self._next, self._end = base, base + own

    def connect(self, frontend: Frontend) -> None:
        """See `ReplayMemory`."""
        frontend.set_memory(self.regions)

    def own(self, size: int) -> tuple[int, int]:
        """See `ReplayMemory`."""
        gpa = self._next
        self._next += _whole(size)
        assert self._next <= self._end
        return gpa, gpa

    def admit(self, request: RecordedRequest) -> None:
        """All memory can be reached."""

    def leave(self, requests: Sequence[RecordedRequest]) -> None:
        """And stays so."""

    def revoke(self, address: int, length: int) -> None:
        """There is nothing to revoke."""

    def _pieces(self, address: int, length: int) -> Iterable[Segment]:
        return ((address, length),)


class MappedMemory(ReplayMemory):
    """Behind an IOMMU: recorded addresses are I/O virtual.

    Args:
        requests: Whose addresses.
        own: As for `PhysicalMemory`.
        strict: Whether each request maps its memory and unmaps it afterwards; otherwise memory
            stays mapped until that was revoked in the recording.
    """

    def __init__(self, requests: Sequence[RecordedRequest], own: int, *, strict: bool) -> None:
        super().__init__()
        self._strict = strict
        self._iotlb: IotlbService | None = None
        pages = _access_of(requests)
        # Some more, so that a page is not used again at once.
        count = len(pages) + min(len(pages), 64)
        self._access = pages
        self._lay([(0, _whole(own)), (1 << 32, count * PAGE)])
        self._next = 0
        iova = _gap(_spans(requests, 1 << 62), own)
        self._own_iova = iova - iova % PAGE
        self._free = deque((1 << 32) + number * PAGE for number in range(count))
        # Of each mapped page: where it lies, and how many requests in flight use it.
        self._mapped: dict[int, int] = {}
        self._users: dict[int, int] = {}

    def connect(self, frontend: Frontend) -> None:
        """See `ReplayMemory`."""
        frontend.set_memory(self.regions)
        self._iotlb = frontend.iotlb

    @property
    def _service(self) -> IotlbService:
        assert self._iotlb is not None, "connect() comes first"
        return self._iotlb

    def own(self, size: int) -> tuple[int, int]:
        """See `ReplayMemory`."""
        gpa = self._next
        self._next += _whole(size)
        self._service.map(self._own_iova + gpa, gpa, _whole(size), _BOTH)
        return gpa, self._own_iova + gpa

    def admit(self, request: RecordedRequest) -> None:
        """See `ReplayMemory`."""
        unwanted = [page for page in request.refused if page in self._mapped]
        if unwanted:
            self._unmap(unwanted)
        for page in _pages(request):
            if page in request.refused:
                continue
            if page not in self._mapped:
                gpa = self._free.popleft()
                self._mapped[page] = gpa
                self._service.map(page, gpa, PAGE, self._access[page])
            self._users[page] = self._users.get(page, 0) + 1

    def leave(self, requests: Sequence[RecordedRequest]) -> None:
        """See `ReplayMemory`."""
        unused = []
        for request in requests:
            for page in _pages(request):
                if page in request.refused:
                    continue
                left = self._users[page] - 1
                if left:
                    self._users[page] = left
                else:
                    del self._users[page]
                    unused.append(page)
        if self._strict and unused:
            self._unmap([page for page in unused if page in self._mapped])

    def _unmap(self, pages: list[int]) -> None:
        """Take mappings away, from the back-end too; neighbors with one message."""
        self._service.unmap(*_runs(pages))
        for page in pages:
            self._free.append(self._mapped.pop(page))

    def revoke(self, address: int, length: int) -> None:
        """See `ReplayMemory`."""
        if self._strict:
            return
        first = address - address % PAGE
        end = min(address + (length or ADDRESS_SPACE), ADDRESS_SPACE)
        pages: Iterable[int] = range(first, end, PAGE)
        if (end - first) // PAGE > len(self._mapped):
            pages = [page for page in self._mapped if first <= page < end]
        # What is being used stays mapped: a guest may have all its translations forgotten.
        for page in [p for p in pages if p in self._mapped and p not in self._users]:
            self._service.mappings.invalidate_mapping(page, PAGE)
            self._free.append(self._mapped.pop(page))
        self._service.invalidate((address, end - address))

    def _pieces(self, address: int, length: int) -> Iterable[Segment]:
        for page in pages_of(address, length):
            gpa = self._mapped.get(page)
            first, last = max(address, page), min(address + length, page + PAGE)
            if gpa is not None:
                yield gpa + first - page, last - first


def _pages(request: RecordedRequest) -> set[int]:
    return {
        page
        for address, length in request.readable + request.writable
        for page in pages_of(address, length)
    }


def _access_of(requests: Iterable[RecordedRequest]) -> dict[int, Permissions]:
    """What requests do with each page.

    Raises:
        DeviceError: They use more than REPLAY_PAGES.
    """
    found: dict[int, Permissions] = {}
    for request in requests:
        for segments, access in (
            (request.readable, Permissions.READ),
            (request.writable, Permissions.WRITE),
        ):
            for address, length in segments:
                for page in pages_of(address, length):
                    found[page] = found.get(page, Permissions.NONE) | access
        if len(found) > REPLAY_PAGES:
            raise DeviceError(
                f"the recorded requests use more than {REPLAY_PAGES} pages of I/O virtual "
                "addresses; replay with --iommu off"
            )
    return found


def _runs(pages: Iterable[int]) -> list[Segment]:
    """Pages as ranges."""
    return _joined((page, PAGE) for page in sorted(pages))


def _joined(ranges: Iterable[Segment]) -> list[Segment]:
    """Ranges in the order of their beginnings, those that touch as one."""
    found: list[Segment] = []
    for start, size in ranges:
        if found and start <= sum(found[-1]):
            first, length = found[-1]
            found[-1] = first, max(length, start + size - first)
        else:
            found.append((start, size))
    return found


def _spans(requests: Iterable[RecordedRequest], most: int) -> list[Segment]:
    """Ranges of whole pages that cover the addresses of requests, ``most`` at most."""
    touched = {
        (address - address % PAGE, _whole(address % PAGE + length))
        for request in requests
        for address, length in request.readable + request.writable
    }
    runs = _joined(sorted(touched))
    gaps = sorted(
        (after[0] - sum(before), number) for number, (before, after) in enumerate(pairwise(runs))
    )
    cuts = {number for _, number in gaps[max(0, len(gaps) - (most - 1)) :]}
    found: list[Segment] = []
    for number, (start, size) in enumerate(runs):
        if found and number - 1 not in cuts:
            found[-1] = found[-1][0], start + size - found[-1][0]
        else:
            found.append((start, size))
    return found


def _gap(spans: Sequence[Segment], size: int) -> int:
    """The beginning of so many bytes that are in none of these ranges, on a page."""
    start = 1 << 20
    for first, length in spans:
        if start + _whole(size) <= first:
            break
        start = max(start, first + length)
    return start


def _whole(size: int) -> int:
    return -(-size // PAGE) * PAGE
