"""A guest without a virtual machine: memory, a driver, and a vhost-user-blk device to drive.

A :class:`ScriptedGuest` does what QEMU and a Linux kernel do together: it connects to a back-end,
shares its memory, sets queues up and sends block requests, with or without an IOMMU in between. How
a request lies in memory can be chosen freely (:class:`Shape`), which no real driver offers.

    with ScriptedGuest("/run/disk.sock", iommu="strict") as guest:
        guest.write(8, b"x" * 4096)
        assert guest.read(8, 4096) == b"x" * 4096

Source: virtio 1.3 section 5.2 (block device); the order of set-up after QEMU's hw/virtio/vhost.c.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from guestio.guest.blkqueue import BlkQueue, Request
from guestio.guest.dma import DmaSpace, IommuMode, Segment
from guestio.guest.driver import GuestDriver
from guestio.guest.queue import Shape
from guestio.vhost_user.frontend import Frontend
from guestio.virtio.blk import (
    F_BLK_SIZE,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_SEG_MAX,
    F_TOPOLOGY,
    F_WRITE_ZEROES,
    ID_BYTES,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

BLK_FEATURES: Final = (
    F_SEG_MAX | F_RO | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_MQ | F_DISCARD | F_WRITE_ZEROES
)
"""Features of a block device that the driver here knows."""

WRITE_ZEROES_F_UNMAP: Final = 1

_HEADER: Final = struct.Struct("<IIQ")
_TRIM: Final = struct.Struct("<QII")
_CONFIG: Final = struct.Struct("<QII4xI8xB1xHIIIIIB3x")


class BlkConfig(NamedTuple):
    """The configuration space of a block device (section 5.2.4), sizes in sectors of 512 bytes."""

    capacity: int
    size_max: int
    seg_max: int
    blk_size: int
    writeback: int
    num_queues: int
    max_discard_sectors: int
    max_discard_seg: int
    discard_sector_alignment: int
    max_write_zeroes_sectors: int
    max_write_zeroes_seg: int
    write_zeroes_may_unmap: int


class ScriptedGuest(GuestDriver[BlkQueue]):
    """A guest with one vhost-user-blk disk.

    Each queue may be driven by a thread of its own; everything else is for one thread.

    Args:
        target: Path of the back-end's socket, a connected socket, or a front-end, which it owns
            from here on.
        memory_size: Bytes of guest memory, a multiple of 8192; half of it lies above 4 GiB.
        queues: How many queues to use.
        queue_size: Entries of each.
        iommu: How the IOMMU is used, see :data:`~guestio.guest.dma.IommuMode`.
        indirect: Whether to use indirect tables where the device can.
        event_idx: Whether to use notification suppression by index where the device can.
        polling: Whether to poll for completions rather than sleep.
        reuse_iovas: Whether freed I/O virtual addresses are used again at once.
        contiguous: Whether data buffers lie in one piece physically.
        seed: Makes the choice of pages repeatable.
        timeout: Seconds that any wait may take.
        frontend: More arguments for :class:`~guestio.vhost_user.frontend.Frontend`.

    Attributes:
        frontend: The connection; ``frontend.iotlb.counts`` counts the IOMMU's traffic.
        memory: Guest physical memory.
        config: The device's configuration space when it was set up.

    Raises:
        OSError: The back-end cannot be connected to.
        DeviceError: It has no such device.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | socket.socket | Frontend,
        *,
        memory_size: int = 64 << 20,
        queues: int = 1,
        queue_size: int = 128,
        iommu: IommuMode = "off",
        indirect: bool = True,
        event_idx: bool = True,
        polling: bool = False,
        reuse_iovas: bool = True,
        contiguous: bool = False,
        seed: int = 0,
        timeout: float = 10.0,
        **frontend: Any,
    ) -> None:
        super().__init__(
            target,
            queue_type=BlkQueue,
            features=BLK_FEATURES,
            memory_size=memory_size,
            iommu=iommu,
            contiguous=contiguous,
            seed=seed,
            timeout=timeout,
            frontend=frontend,
        )
        try:
            self.boot(
                queues=queues,
                queue_size=queue_size,
                iommu=iommu,
                indirect=indirect,
                event_idx=event_idx,
                polling=polling,
                reuse_iovas=reuse_iovas,
            )
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<ScriptedGuest: {len(self._queues)} queues, {self.frontend!r}>"

    # Life and death

    def boot(
        self,
        *,
        queues: int = 1,
        queue_size: int = 128,
        iommu: IommuMode = "off",
        indirect: bool = True,
        event_idx: bool = True,
        polling: bool = False,
        reuse_iovas: bool = True,
    ) -> None:
        """Set the device up anew, as the next boot stage does: other features, other rings.

        The arguments are those of the class. Requests still in flight are forgotten.
        """
        self._set_up(
            queues=queues,
            queue_size=queue_size,
            iommu=iommu,
            indirect=indirect,
            event_idx=event_idx,
            polling=polling,
            reuse_iovas=reuse_iovas,
        )

    def _look_at_config(self) -> None:
        self.config = BlkConfig._make(_CONFIG.unpack(self.frontend.get_config(0, _CONFIG.size)))

    # Requests, one at a time

    def read(
        self, sector: int, length: int, *, queue: int = 0, shape: Shape | None = None
    ) -> bytes:
        """Read ``length`` bytes from a sector on.

        Raises:
            BlkError: The device refused.
            NoAnswerError: It did not answer in time.
        """
        return self._run(self.submit_read(sector, length, queue=queue, shape=shape)).data

    def write(
        self, sector: int, data: bytes, *, queue: int = 0, shape: Shape | None = None
    ) -> None:
        """Write bytes from a sector on; raises as :meth:`read`."""
        self._run(self.submit_write(sector, data, queue=queue, shape=shape))

    def flush(self, *, queue: int = 0, shape: Shape | None = None) -> None:
        """Have everything written reach the disk; raises as :meth:`read`."""
        self._run(self.submit(T_FLUSH, queue=queue, shape=shape))

    def get_id(self, *, queue: int = 0, shape: Shape | None = None) -> bytes:
        """The device's serial up to its first NUL; raises as :meth:`read`."""
        request = self.submit(T_GET_ID, reply=ID_BYTES, queue=queue, shape=shape)
        return self._run(request).data.partition(b"\0")[0]

    def discard(
        self, sector: int, sectors: int, *, queue: int = 0, shape: Shape | None = None
    ) -> None:
        """Give the contents of sectors up; raises as :meth:`read`."""
        segment = _TRIM.pack(sector, sectors, 0)
        self._run(self.submit(T_DISCARD, 0, segment, queue=queue, shape=shape))

    def write_zeroes(
        self,
        sector: int,
        sectors: int,
        *,
        unmap: bool = False,
        queue: int = 0,
        shape: Shape | None = None,
    ) -> None:
        """Fill sectors with zeroes, ``unmap`` if space may be freed; raises as :meth:`read`."""
        segment = _TRIM.pack(sector, sectors, WRITE_ZEROES_F_UNMAP if unmap else 0)
        self._run(self.submit(T_WRITE_ZEROES, 0, segment, queue=queue, shape=shape))

    def _run(self, request: Request) -> Request:
        self.wait(request)
        return request.check()

    # Requests, many at a time

    def submit_read(
        self,
        sector: int,
        length: int,
        *,
        queue: int = 0,
        shape: Shape | None = None,
        keep: bool = True,
        publish: bool = True,
    ) -> Request:
        """Begin to read; the arguments are those of :meth:`submit`."""
        return self.submit(
            T_IN, sector, reply=length, queue=queue, shape=shape, keep=keep, publish=publish
        )

    def submit_write(
        self,
        sector: int,
        data: bytes,
        *,
        queue: int = 0,
        shape: Shape | None = None,
        publish: bool = True,
    ) -> Request:
        """Begin to write; the arguments are those of :meth:`submit`."""
        return self.submit(T_OUT, sector, data, queue=queue, shape=shape, publish=publish)

    def submit(
        self,
        kind: int,
        sector: int = 0,
        payload: bytes = b"",
        *,
        reply: int = 0,
        queue: int = 0,
        shape: Shape | None = None,
        keep: bool = True,
        publish: bool = True,
    ) -> Request:
        """Begin a request of any kind.

        Args:
            kind: Type of the request, ``T_IN`` and so on.
            sector: Where on the disk.
            payload: What the device reads after the header.
            reply: Bytes that the device writes before the status.
            queue: Which queue to use.
            shape: How it lies in memory; by default as Linux does it.
            keep: Whether :attr:`Request.data` is wanted.
            publish: False to have the device see it only with the next one that is published.

        Raises:
            QueueError: The queue is full; wait for a request first.
        """
        request = Request(kind, sector, queue)
        self._queues[queue].submit(
            request, _HEADER.pack(kind, 0, sector), payload, reply, shape, keep=keep
        )
        if publish:
            self._queues[queue].publish()
        return request

    def submit_at(
        self,
        kind: int,
        sector: int = 0,
        *,
        readable: Sequence[Segment] = (),
        writable: Sequence[Segment] = (),
        queue: int = 0,
    ) -> Request:
        """Begin a request whose data is at device addresses of the caller's choice.

        This is how a driver misbehaves: whether the device may go there is not checked. Memory and
        mappings for it come from :attr:`dma`.

        Args:
            kind: Type of the request, ``T_IN`` and so on.
            sector: Where on the disk.
            readable: ``(address, length)`` of what the device reads after the header.
            writable: The same for what it writes before the status.
            queue: Which queue to use.
        """
        request = Request(kind, sector, queue)
        header = _HEADER.pack(kind, 0, sector)
        self._queues[queue].submit_at(request, header, readable, writable)
        self._queues[queue].publish()
        return request

    def publish(self, queue: int = 0) -> None:
        """Publish the requests that were begun with ``publish=False``."""
        self._queues[queue].publish()

    @property
    def dma(self) -> DmaSpace:
        """Where buffers and their mappings come from."""
        return self._dma

    def poll(self, queue: int = 0) -> list[Request]:
        """The requests that finished since the last call, without waiting."""
        return self._queues[queue].collect()

    def wait(self, *requests: Request) -> None:
        """Wait until all of these are done; others may be finished on the way.

        Raises:
            NoAnswerError: They were not in time.
            PeerGoneError: The back-end went away.
            QueueError: Device or driver found the queue broken.
        """
        deadline = time.monotonic() + self._timeout
        for request in requests:
            while not request.done:
                self._queues[request.queue].progress(deadline)

    def wait_some(self, queue: int = 0) -> list[Request]:
        """Wait until at least one request of a queue is finished; raises as :meth:`wait`.

        Returns:
            Those that were finished meanwhile; none if none is in flight.
        """
        deadline = time.monotonic() + self._timeout
        found: list[Request] = []
        while not found and self.in_flight(queue):
            found = self._queues[queue].progress(deadline)
        return found

    def drain(self, queue: int = 0) -> list[Request]:
        """Wait until nothing is in flight on a queue, and return what was finished."""
        found: list[Request] = []
        while self.in_flight(queue):
            found += self.wait_some(queue)
        return found

    def in_flight(self, queue: int = 0) -> int:
        """How many requests of a queue the device has."""
        return self._queues[queue].ring.outstanding
