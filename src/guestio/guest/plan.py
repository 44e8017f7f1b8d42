"""What load a guest makes, and where in its memory everything of it is.

A :class:`LoadPlan` says what :class:`~guestio.guest.load.Load` shall do; a :class:`LoadMemory` is
the guest's memory for it: rings, requests and data on pages from anywhere, and behind an IOMMU the
window of I/O virtual addresses in which the device sees them.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from guestio.addr import Permissions
from guestio.guest._load.iotlb_front import IotlbFront
from guestio.guest.dma import PAGE, IommuMode, PageAllocator
from guestio.guest.driver import HIGH_MEMORY
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.virtio.image import SECTOR
from guestio.virtio.layout import RingLayout

Workload: TypeAlias = Literal["randread", "randwrite", "read", "write", "randrw"]
"""What to do, named as fio does; ``randrw`` is half of each."""

Granularity: TypeAlias = Literal["page", "whole"]
"""What an answer to an IOTLB miss covers: a page, as QEMU's, or all that lies in a row."""

Acknowledge: TypeAlias = Literal["bulk", "each"]
"""Whether IOTLB messages go out in bulk, or each once the one before it was acknowledged."""

Row: TypeAlias = tuple[list[int], list[int], int]
"""Bytes in a row for the driver: its pages for the device and in this process, and where in the
first of them it begins."""

WORKLOADS: Final[tuple[str, ...]] = get_args(Workload)

VERIFY_SPAN: Final = 64 << 20
"""Bytes of the disk that are used to verify, unless told otherwise."""

MOST_BLOCK: Final = 4 << 20
"""Bytes of a request at most."""

MOST_ENTRIES: Final = 1024
"""Entries of a queue at most; QEMU's back-ends take no more."""

_READ_PERCENT: Final = {"randread": 100, "read": 100, "randwrite": 0, "write": 0, "randrw": 50}
_HEADER_BYTES: Final = 16
_HEAD_STRIDE: Final = 512
_USUAL_ENTRIES: Final = 256
_CUT_DESCRIPTORS: Final = 12
_LOW_TOP: Final = 1 << 32
_HIGH_WINDOW: Final = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What load to make.

    Attributes:
        workload: What to do. All but ``read`` and ``randread`` destroy what is on the disk.
        block_size: Bytes per request, a multiple of 512 up to 4 MiB.
        depth: Requests to keep in each queue.
        queues: How many queues to use.
        queue_size: Entries of each queue, a power of two; by default 256, or more where needed.
        iommu: How the IOMMU is used, see :data:`~guestio.guest.dma.IommuMode`.
        verify: Lay requests out at random and check contents; destroys what is on the disk.
        polling: Look for completions without pause, rather than sleep until notified.
        batches: Begin ``depth`` requests at once, and the next only when all of them are finished.
        acknowledge: Behind an IOMMU, whether translations are told and revoked in ``bulk``, or only
            when the acknowledgement of the one before has come (``each``), as QEMU does.
        indirect: Use indirect tables where the device can.
        event_idx: Use notification suppression by index where the device can.
        contiguous: Have each request's data in one piece of physical memory.
        separate_status: With ``strict``, map header and status apart, as Linux does, although they
            share a page; otherwise they are one mapping.
        granularity: What an answer to an IOTLB miss covers.
        span: Bytes of the disk to use, from its beginning; by default all of it, or `VERIFY_SPAN`
            to verify.
        seed: Makes the choices repeatable.

    Raises:
        ValueError: A value is out of range.
    """

    workload: Workload = "randread"
    block_size: int = 4096
    depth: int = 32
    queues: int = 1
    queue_size: int | None = None
    iommu: IommuMode = "off"
    verify: bool = False
    polling: bool = False
    batches: bool = False
    acknowledge: Acknowledge = "bulk"
    indirect: bool = True
    event_idx: bool = True
    contiguous: bool = False
    separate_status: bool = False
    granularity: Granularity = "page"
    span: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("workload", self.workload, WORKLOADS),
            ("iommu", self.iommu, get_args(IommuMode)),
            ("granularity", self.granularity, get_args(Granularity)),
            ("acknowledge", self.acknowledge, get_args(Acknowledge)),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is none of {', '.join(known)}")
        if not 0 < self.block_size <= MOST_BLOCK or self.block_size % SECTOR:
            raise ValueError(
                f"block size {self.block_size} is not a multiple of {SECTOR} up to {MOST_BLOCK}"
            )
        for name, number, most in (
            ("depth", self.depth, MOST_ENTRIES),
            ("queues", self.queues, 64),
        ):
            if not 0 < number <= most:
                raise ValueError(f"{name} {number} is not in 1..{most}")
        size = self.entries
        if not 0 < size <= MOST_ENTRIES or size & (size - 1):
            raise ValueError(
                f"a queue of {size} entries; it must be a power of two up to {MOST_ENTRIES}"
            )
        if size < self._needed_entries():
            raise ValueError(
                f"a queue of {size} entries is too short for {self.depth} requests of "
                f"{self.block_size} bytes{'' if self.indirect else ' without indirect tables'}"
            )

    @property
    def entries(self) -> int:
        """Entries of each queue."""
        if self.queue_size is not None:
            return self.queue_size
        # Room for all requests even if the device turns out to know no indirect tables.
        wanted = max(self._needed_entries(), min(self.pieces * self.depth, MOST_ENTRIES))
        return max(_USUAL_ENTRIES, 1 << (wanted - 1).bit_length())

    @property
    def writes(self) -> bool:
        """Whether anything is written to the disk."""
        return self.verify or self.read_percent < 100

    @property
    def read_percent(self) -> int:
        """How many of 100 requests read."""
        return _READ_PERCENT[self.workload]

    @property
    def pieces(self) -> int:
        """Descriptors that a request may take."""
        scattered = self.iommu == "off" and not self.contiguous
        if self.verify:
            pages = pages_for(self.block_size + _HEADER_BYTES, unaligned=True) if scattered else 1
            return pages + _CUT_DESCRIPTORS
        return (pages_for(self.block_size) if scattered else 1) + 2

    def _needed_entries(self) -> int:
        return max(self.pieces, self.depth) if self.indirect else self.pieces * self.depth


class LoadMemory:
    """Guest memory, and where in it and in the IOMMU's window everything is.

    For one thread. Loads that work on it must have ended before :meth:`close`.

    Args:
        plan: What it must have room for.

    Attributes:
        regions: All of the memory, in two pieces.
        stride: Pages of the window that the mappings of one request take; 0 unless ``strict``.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self._plan = plan
        verify = plan.verify
        size = plan.block_size
        self._first_pages = pages_for(size + _HEADER_BYTES, unaligned=True) if verify else 1
        self._second_pages = pages_for(size + 1, unaligned=True) if verify else pages_for(size)
        self._table_bytes = max(64, 1 << (16 * plan.pieces - 1).bit_length())
        if verify:
            self._table_bytes = pages_for(self._table_bytes, unaligned=True) * PAGE
        self._slots = 2 * plan.depth + 2 if verify else plan.depth
        self._iotlb: IotlbFront | None = None
        self._next = 1
        self.stride = self._stride() if plan.iommu == "strict" else 0
        per_slot = self._first_pages + self._second_pages + pages_for(self._table_bytes)
        rings = 3 + pages_for(RingLayout.contiguous_bytes(plan.entries))
        pages = plan.queues * (self._slots * per_slot + rings)
        self._backings: list[Backing] = []
        self.regions = self._make(max(16 << 20, 3 * pages * PAGE))
        self._pages = PageAllocator(self.regions, plan.seed)
        self._window_pages = 2 * pages + plan.queues * (16 + plan.depth * (self.stride + 1))

    def _make(self, size: int) -> GuestRegionCollection:
        half = pages_for(size // 2) * PAGE
        with Backing.memfd(2 * half, "guestio-load", seal=True) as whole:
            assert whole.fd is not None
            self._backings = [Backing.from_fd(whole.fd, half, at) for at in (0, half)]
        places = zip((0, HIGH_MEMORY), self._backings, ("low", "high"), strict=True)
        return GuestRegionCollection.from_regions(
            MmapRegion(start, backing, name=name) for start, backing, name in places
        )

    def close(self) -> None:
        """Give the memory up, once."""
        del self.regions, self._pages
        while self._backings:
            with contextlib.suppress(BufferError):
                self._backings.pop().close()

    def _stride(self) -> int:
        """Pages that the mappings of one request take, one that is not mapped after each."""
        # A cut in the middle of a page has it mapped twice.
        mappings = _CUT_DESCRIPTORS + 1 if self._plan.verify else 4
        pages = (
            self._first_pages + self._second_pages + pages_for(self._table_bytes, unaligned=True)
        )
        return pages + 2 * mappings

    def open_window(self, front: int, back: int) -> IotlbFront:
        """Make the IOMMU, with room for everything to come.

        Args:
            front: The front-end's socket.
            back: Our end of the back-end's channel.
        """
        pages = self._window_pages
        base = _LOW_TOP - (pages + 1) * PAGE
        if pages * PAGE > _LOW_TOP // 4:
            base = _HIGH_WINDOW
        self._iotlb = IotlbFront(
            base,
            pages,
            front,
            back,
            whole=self._plan.granularity == "whole",
            each=self._plan.acknowledge == "each",
            room=16 * self._plan.depth * self._plan.queues + 16,
        )
        return self._iotlb

    def ring_part(self, length: int) -> Row:
        """A part of a ring, which behind an IOMMU is scattered over pages like all else."""
        gpas = self._pages.take(pages_for(length), contiguous=self._iotlb is None)
        return self._row(gpas, stays=True)

    def slots(self) -> list[tuple[Row, Row, Row]]:
        """Memory for all requests of a queue."""
        count, contiguous = self._slots, self._plan.contiguous or self._iotlb is None
        tables = self._several(count, self._table_bytes, contiguous=contiguous)
        if self._plan.verify:
            firsts = self._several(count, self._first_pages * PAGE)
        else:
            firsts = self._several(count, _HEAD_STRIDE)
        seconds = self._several(count, self._second_pages * PAGE, contiguous=self._plan.contiguous)
        return list(zip(firsts, seconds, tables, strict=True))

    def strides(self) -> list[int]:
        """A range of the window for each request of a queue that may be in flight."""
        if not self.stride:
            return []
        return [self._claim(self.stride) for _ in range(self._plan.depth)]

    def _several(self, count: int, length: int, *, contiguous: bool = False) -> list[Row]:
        """Rows of a length; short ones share pages, none of those straddles two."""
        if length >= PAGE:
            take, each = self._pages.take, pages_for(length)
            return [self._row(take(each, contiguous=contiguous)) for _ in range(count)]
        share = PAGE // length
        pages = [self._row([gpa]) for gpa in self._pages.take(-(-count // share))]
        extents = []
        for i in range(count):
            device, host, _ = pages[i // share]
            extents.append((device, host, i % share * length))
        return extents

    def _row(self, gpas: list[int], *, stays: bool = False) -> Row:
        """An extent on the given pages, mapped if that is done once and for all."""
        host = [self.regions.host_address(gpa) for gpa in gpas]
        if self._iotlb is None:
            return gpas, host, 0
        if self.stride and not stays:
            return [0] * len(gpas), host, 0
        first = self._claim(len(gpas))
        for number, address in enumerate(host, first):
            self._iotlb.map(number, address, Permissions.READ_WRITE)
        return [self._iotlb.base + n * PAGE for n in range(first, first + len(gpas))], host, 0

    def _claim(self, count: int) -> int:
        """Pages of the window; the one after them is never mapped."""
        first, self._next = self._next, self._next + count + 1
        return first


def pages_for(length: int, *, unaligned: bool = False) -> int:
    """Pages for so many bytes, from any byte of the first page on if ``unaligned``."""
    return -(-(length + (PAGE - 1 if unaligned else 0)) // PAGE)
