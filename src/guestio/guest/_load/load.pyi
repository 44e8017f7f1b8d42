from collections.abc import Sequence
from typing import Self

from typing_extensions import disjoint_base

from guestio.guest._load.iotlb_front import IotlbFront

@disjoint_base
class LoadDriver:
    """Keeps queues of a block device full of requests.

    Not safe for several threads at once. The memory that it is given, and the fds, must stay until
    it is gone.

    Args:
        block: Bytes per request, a multiple of 512.
        blocks: Blocks of the disk to use.
        front: The front-end's socket; with an IOMMU it is the IOMMU's.
        back: Our end of the back-end's channel, of the IOMMU; -1 without.
        iotlb: The IOMMU, or None for physical addresses.
        strict: Whether each request maps what it uses and unmaps it afterwards.
        stride: Pages of the IOMMU's window that the mappings of one request may take; see
            :meth:`add_stride`.
        separate: Whether header and status are mapped apart although they share a page.
        indirect: Whether VIRTIO_RING_F_INDIRECT_DESC was negotiated; then it is used.
        event_idx: Whether VIRTIO_RING_F_EVENT_IDX was negotiated.
        polling: Whether to look for completions without pause rather than to sleep.
        batches: Whether to begin as many requests as fit at once, and the next only when all of
            them are finished. Then what the device does for each does not depend on its speed.
        verify: Whether requests are laid out at random and contents are checked.
        timeout: Nanoseconds without any progress after which the device counts as stalled.
        seed: Of all choices, and of what is written.

    Attributes:
        reads: Requests finished since :meth:`reset_counts`.
        writes: The same.
        latency_sum: Nanoseconds that they took together.
        latency_max: That the slowest took.
        interrupts: Notifications taken.

    Raises:
        ValueError: A number is out of range.
    """
    @property
    def reads(self) -> int: ...
    @property
    def writes(self) -> int: ...
    @property
    def latency_sum(self) -> int: ...
    @property
    def latency_max(self) -> int: ...
    @property
    def interrupts(self) -> int: ...
    def __new__(
        cls,
        block: int,
        blocks: int,
        front: int,
        back: int = -1,
        *,
        iotlb: IotlbFront | None = None,
        strict: bool = False,
        stride: int = 0,
        separate: bool = False,
        indirect: bool = True,
        polling: bool = False,
        batches: bool = False,
        verify: bool = False,
        timeout: int = ...,
        seed: int = 0,
    ) -> Self: ...
    def add_queue(
        self,
        size: int,
        depth: int,
        desc: Sequence[int],
        avail: Sequence[int],
        used: Sequence[int],
        kick: int,
        call: int,
        error: int,
        *,
        event_idx: bool = True,
        message: bytes = b"",
    ) -> int:
        """Add a queue that was started, with its indices at 0.

        Args:
            size: Entries.
            depth: Requests to keep in it.
            desc: Where each page of the descriptor table is in this process.
            avail: The same of the available ring.
            used: The same of the used ring.
            kick: Eventfd to notify the device; or with ``message`` the socket to send that to.
            call: Eventfd that it notifies us by.
            error: Eventfd that tells that it found the ring broken; -1 for none.
            event_idx: Whether VIRTIO_RING_F_EVENT_IDX was negotiated.
            message: What notifies the device, at most 64 bytes; nothing for an eventfd.

        Returns:
            The queue's number here.

        Raises:
            ValueError: A number is out of range, or pages are missing.
        """
    def add_slot(
        self,
        number: int,
        first: tuple[Sequence[int], Sequence[int], int],
        second: tuple[Sequence[int], Sequence[int], int],
        table: tuple[Sequence[int], Sequence[int], int],
    ) -> None:
        """Give a queue memory for one more request.

        An extent is ``(device addresses of its pages, host addresses of them, where in the
        first page it begins)``. Without ``verify``, the first has room for header and status in one
        page, and the second for the data. With it, the first has room for header and data from any
        byte of its first page on, and the second for data and status.

        Args:
            number: Number of the queue.
            first: An extent.
            second: An extent.
            table: An extent for an indirect table; contiguous for the device unless ``strict``.

        Raises:
            ValueError: There are too many slots, an extent is short, or a request could take more
                descriptors than the ring has.
        """
    def add_stride(self, number: int, page: int) -> None:
        """Give a queue a range of the IOMMU's window for the mappings of one request.

        Args:
            number: Number of the queue.
            page: First page of it in the window.

        Raises:
            ValueError: It leaves the window.
        """
    def begin(
        self, *, read_percent: int, random: bool, limit: int | None = None, first: int = 0
    ) -> None:
        """Choose what to do from now on.

        Args:
            read_percent: How many of 100 requests read; the others write.
            random: Whether blocks are chosen at random, or one after the other.
            limit: Requests to begin; None for no limit.
            first: Block to begin at if not at random.

        Raises:
            ValueError: A number is out of range.
        """
    def run(self, nanoseconds: int) -> int:
        """Work for so long.

        Returns:
            0 when the time is over, 1 when all of the limit is done and nothing is in flight, 2
            when a signal ended a wait, 3 when something is wrong: see :attr:`trouble`.
        """
    @property
    def trouble(self) -> tuple[str, int, tuple[int, int, int, int]] | None:
        """What is wrong, or None: ``(name, queue, four numbers that say more)``.

        Names and numbers: ``used-index`` (index found, collected, outstanding), ``used-id``
        (descriptor, entry), ``used-length`` (sector, bytes told, bytes there are), ``status``
        (sector, whether a write, status), ``short`` (sector, bytes told, bytes wanted),
        ``contents`` (sector, version, sector and version found, or 2**64-1 and the first word),
        ``overrun`` (sector, whether a write, byte written, where the buffer begins), ``stalled``
        (requests in flight, nanoseconds), ``gone``, ``unasked``, ``ring-error``, ``iotlb`` (see the
        IOTLB's failure), ``system`` (errno), ``no-room`` (of ours).
        """
    @property
    def in_flight(self) -> int:
        """Requests begun and not finished."""
    @property
    def most_descriptors(self) -> int:
        """Descriptors that a request may take, header and status included."""
    @property
    def kicks(self) -> int:
        """Notifications sent."""
    def reset_counts(self) -> None:
        """Begin to count and to measure anew."""
    def histogram(self) -> list[tuple[int, int]]:
        """How long requests took: pairs of nanoseconds (the middle of a range) and how many.

        The ranges are 1/64 of their values wide. Ascending; empty ones are left out.
        """
