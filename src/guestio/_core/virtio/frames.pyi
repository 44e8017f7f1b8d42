from typing import Final, Self, final

from guestio._core.iommu.misses import Misses
from guestio._core.virtio.chain import Server
from guestio._core.virtio.ring import Ring

FILLED_IDLE: Final = 0
FILLED_BUSY: Final = 1
FILLED_FULL: Final = 2
FILLED_LACKING: Final = 3
FILLED_BROKEN: Final = 4

@final
class FrameSender(Server):
    """Sends the requests of a transmit queue as frames, by one writev each.

    A frame that cannot be sent is dropped and counted: the driver gets its buffer back either way.

    Attributes:
        fd: Where to; each frame is written with a header of 12 bytes, as a tap with IFF_VNET_HDR
            takes it. It must not block. -1 leaves all requests to the device.
        discard: Whether to drop all frames.
        header_size: Bytes of the header that the driver writes: 10 or 12.
        offloads: Whether the header's requests for checksums and segmentation are passed on. If
            not, a header of zeros is.
        frames: Frames sent.
        sent_bytes: Their bytes, without headers.
        dropped: Frames dropped.
        error: The errno of the last write that failed.

    For one thread at a time.
    """

    fd: int
    discard: bool
    offloads: bool
    error: int
    def __init__(self) -> None: ...
    @property
    def header_size(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def sent_bytes(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    def set_header_size(self, size: int) -> None:
        """Set the bytes of the driver's header, 10 or 12."""
    def count(self, size: int) -> None:
        """Count a frame of ``size`` bytes that the device sent by itself."""
    def count_dropped(self) -> None:
        """Count a frame that the device dropped."""

@final
class FrameFiller:
    """Fills the buffers of a receive queue with frames: those of a descriptor, or given ones.

    Args:
        frames: Frames moved in one call of :meth:`fill`.
        size: Bytes of guest memory filled in one call; the last frame may exceed it.
        backlog: Frames that wait for buffers at most.
        backlog_bytes: Their bytes at most.

    Attributes:
        fd: Where frames come from, with a header of 12 bytes each, as from a tap with
            IFF_VNET_HDR; it must not block. -1 if frames are only given.
        discard: Whether to drop all frames.
        mergeable: Whether a frame may be spread over several buffers (VIRTIO_NET_F_MRG_RXBUF).
        header_size: Bytes of the header that the driver expects: 10 or 12.
        offloads: Whether a frame's header is passed on. If not, the driver gets zeros.
        frames: Frames received.
        received_bytes: Their bytes, without headers.
        dropped: Frames dropped: too long for the driver's buffers, in memory that went, or
            given while too many waited.
        filtered: Frames that the driver did not want.
        waiting: Frames that were given and not moved yet, and one that was read and waits.
        error: The errno with which reading failed.

    For one thread at a time.
    """

    fd: int
    discard: bool
    mergeable: bool
    offloads: bool
    def __new__(cls, *, frames: int, size: int, backlog: int, backlog_bytes: int) -> Self: ...
    @property
    def header_size(self) -> int: ...
    @property
    def error(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def received_bytes(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    @property
    def filtered(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    def set_header_size(self, size: int) -> None:
        """Set the bytes of the driver's header, 10 or 12."""
    def set_filter(
        self,
        address: bytes,
        *,
        promiscuous: bool = True,
        all_multicast: bool = False,
        all_unicast: bool = False,
        no_multicast: bool = False,
        no_unicast: bool = False,
        no_broadcast: bool = False,
        table: bytes = b"",
    ) -> None:
        """Set which destinations are received (section 5.1.6.5.1).

        Args:
            address: The device's own address, 6 bytes.
            promiscuous: Receive all.
            all_multicast: Receive all multicasts.
            all_unicast: Receive all unicasts.
            no_multicast: Receive no multicast.
            no_unicast: Receive no unicast.
            no_broadcast: Receive no broadcast.
            table: More addresses to receive, 6 bytes each.
        """
    def give(self, frame: bytes, header: bytes | None = None) -> bool:
        """Have a frame moved by the next :meth:`fill`.

        Args:
            frame: Without a header.
            header: Of 12 bytes, for offloads; zeros by default.

        Returns:
            Whether it will be; False if it was dropped: too many frames wait, it is no frame, or
            the driver does not want it.
        """
    def forget(self) -> None:
        """Drop the frames that wait."""
    def fill(self, ring: Ring, call: int = -1) -> tuple[int, Misses, int]:
        """Move frames into the available buffers of a ring.

        Args:
            ring: The receive queue's ring.
            call: Eventfd to notify the driver with, or -1.

        Returns:
            ``(state, missing, buffers)``: one of the ``FILLED`` constants, what lacks a
            translation, and how many buffers were given back to the driver.

        Raises:
            QueueError: The driver broke a rule of the ring.

        Cost: a system call for each frame of a descriptor, and a lookup for each piece of memory.
        """
