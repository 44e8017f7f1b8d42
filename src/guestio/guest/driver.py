"""A guest without a virtual machine: memory, and a driver for a device of any type.

A :class:`Driver` does what QEMU and a guest's kernel do together: it connects to a back-end, shares
its memory, negotiates, sets queues up, and gives the device buffers to read and to write, with or
without an IOMMU in between.

    with Driver("/run/device.sock", iommu="strict") as driver:
        driver.post(64)                      # a buffer for the device to write
        driver.send(b"hello", queue=1)       # data for the device to read
        print(driver.receive(0).data)        # what it wrote

:class:`GuestDriver` is what it has in common with the driver of a disk,
:class:`~guestio.guest.disk.ScriptedGuest`.

Source: virtio 1.4 section 3.1 (initialization); the order of set-up after QEMU's hw/virtio/vhost.c.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar

from guestio.addr import check_int, check_seconds
from guestio.errors import DeviceError
from guestio.guest.dma import PAGE, DmaSpace, IommuMode, PageAllocator
from guestio.guest.queue import GuestQueue, Placement, Shape
from guestio.iommu import Iommu, IommuMemory, Iotlb
from guestio.memory import Backing, GuestMemory, GuestRegionCollection, MmapRegion
from guestio.vhost_user.frontend import Frontend, NoAnswerError
from guestio.vhost_user.messages import ProtocolFeature
from guestio.virtio.device import (
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
    Status,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

HIGH_MEMORY: Final = 1 << 32
"""Where the second half of guest memory begins; the first is at 0."""

DEVICE_FEATURES: Final = (1 << 24) - 1 | ((1 << 64) - (1 << 50))
"""Feature bits that belong to the device's type (section 2.2)."""

_Q = TypeVar("_Q", bound=GuestQueue[Any])


class GuestDriver(Generic[_Q]):
    """A guest with a driver of one device: its connection, its memory and its queues.

    Abstract: a subclass names the class of its queues, and calls :meth:`_set_up`.

    Args:
        target: Path of the back-end's socket, a connected socket, or a front-end, which it owns
            from here on.
        queue_type: Class of the queues.
        features: Feature bits of the device's type that the driver knows.
        memory_size: Bytes of guest memory, a multiple of 8192; half of it lies above 4 GiB.
        iommu: How the IOMMU is used, see :data:`~guestio.guest.dma.IommuMode`.
        contiguous: Whether data buffers lie in one piece physically.
        seed: Makes the choice of pages repeatable.
        timeout: Seconds that any wait may take.
        frontend: More arguments for :class:`~guestio.vhost_user.frontend.Frontend`.

    Attributes:
        frontend: The connection; ``frontend.iotlb.counts`` counts the IOMMU's traffic.
        memory: Guest physical memory.

    Raises:
        OSError: The back-end cannot be connected to.
    """

    memory: GuestRegionCollection

    def __init__(
        self,
        target: str | os.PathLike[str] | socket.socket | Frontend,
        *,
        queue_type: type[_Q],
        features: int,
        memory_size: int,
        iommu: IommuMode,
        contiguous: bool,
        seed: int,
        timeout: float,
        frontend: dict[str, Any],
    ) -> None:
        self._timeout = timeout
        self._queue_type = queue_type
        self._contiguous = contiguous
        self._known = features
        self._queues: list[_Q] = []
        self.frontend = (
            Frontend(target, timeout=timeout, **frontend)
            if isinstance(target, (str, bytes, os.PathLike, socket.socket))
            else target
        )
        self._backings: list[Backing] = []
        try:
            self._make_memory(memory_size)
            self._pages = PageAllocator(self.memory, seed)
            self.frontend.negotiate(self._wanted(iommu, indirect=True, event_idx=True))
            self.frontend.set_memory(self.memory)
        except BaseException:
            self.close()
            raise

    def _make_memory(self, size: int) -> None:
        if size <= 0 or size % (2 * PAGE):
            raise ValueError(f"memory_size {size} is not a positive multiple of {2 * PAGE}")
        half = size // 2
        with Backing.memfd(size, "guestio-guest", seal=True) as whole:
            assert whole.fd is not None
            self._backings = [Backing.from_fd(whole.fd, half, at) for at in (0, half)]
        places = zip((0, HIGH_MEMORY), self._backings, ("low", "high"), strict=True)
        self.memory = GuestRegionCollection.from_regions(
            MmapRegion(start, backing, name=name) for start, backing, name in places
        )

    def _wanted(self, iommu: IommuMode, *, indirect: bool, event_idx: bool) -> int:
        bits = [VIRTIO_F_VERSION_1]
        if iommu != "off":
            bits.append(VIRTIO_F_ACCESS_PLATFORM)
        if indirect:
            bits.append(VIRTIO_F_INDIRECT_DESC)
        if event_idx:
            bits.append(VIRTIO_F_EVENT_IDX)
        return self._known | sum(1 << bit for bit in bits)

    def _set_up(
        self,
        *,
        queues: int | None,
        queue_size: int,
        iommu: IommuMode,
        indirect: bool,
        event_idx: bool,
        polling: bool,
        reuse_iovas: bool,
    ) -> None:
        """Set the device up, anew if it was already; see the class for the arguments."""
        self.shut_down()
        wanted = self._wanted(iommu, indirect=indirect, event_idx=event_idx)
        self.frontend.set_features(self.frontend.offered & wanted)
        if iommu != "off" and not self.frontend.iommu:
            raise DeviceError("the device does not offer VIRTIO_F_ACCESS_PLATFORM (no IOMMU)")
        self._look_at_config()
        self._dma = DmaSpace(
            self.memory, self._pages, self.frontend.iotlb, iommu, reuse=reuse_iovas
        )
        view: GuestMemory = self.memory
        if iommu != "off":
            view = IommuMemory(self.memory, _GuestTables(self.frontend.iotlb.mappings))
        for index in range(self.frontend.queue_count() if queues is None else queues):
            self._queues.append(
                self._queue_type(
                    self.frontend,
                    self._dma,
                    index,
                    queue_size,
                    view,
                    polling=polling,
                    contiguous=self._contiguous,
                    timeout=self._timeout,
                )
            )
        self._set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)

    def _look_at_config(self) -> None:
        """Read what the driver must know before it sets queues up."""

    def shut_down(self) -> None:
        """Stop the device and take its queues down."""
        while self._queues:
            queue = self._queues.pop()
            if queue.started:
                queue.stop()
            queue.close()
        self._set_status(Status(0))

    def _set_status(self, status: Status) -> None:
        if self.frontend.protocol_features & ProtocolFeature.STATUS:
            self.frontend.set_status(status)

    def pause(self) -> None:
        """Stop all queues as for a snapshot; what the device has taken is finished first."""
        for queue in self._queues:
            queue.stop()

    def resume(self) -> None:
        """Start all queues again where they stopped."""
        for queue in self._queues:
            queue.start()

    def close(self) -> None:
        """Disconnect and give the memory up. May be called again."""
        self.frontend.close()
        while self._queues:
            self._queues.pop().abandon()
        self.frontend.iotlb.memory = None
        # Whatever refers to the memory keeps it mapped.
        for name in ("memory", "_dma"):
            self.__dict__.pop(name, None)
        while self._backings:
            with contextlib.suppress(BufferError):
                self._backings.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _GuestTables(Iommu):
    """The guest's own I/O page tables, for the driver's view of its rings."""

    def __init__(self, tables: Iotlb) -> None:
        self._tables = tables

    @property
    def iotlb(self) -> Iotlb:
        """The tables; they are complete."""
        return self._tables


@dataclass(slots=True, eq=False)
class DriverBuffer:
    """A buffer that a :class:`Driver` gave to the device.

    Attributes:
        queue: Which queue it is on.
        size: Bytes that the device may write.
        done: Whether the device has finished with it.
        written: Bytes that the device says it wrote.
        data: These bytes.
    """

    queue: int
    size: int
    done: bool = False
    written: int = 0
    data: bytes = b""
    placement: Placement | None = field(default=None, repr=False)


class _Queue(GuestQueue[DriverBuffer]):
    """A queue of a device of any type.

    Attributes:
        used: Buffers that the device has finished with and :meth:`Driver.receive` has not returned.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.used: deque[DriverBuffer] = deque()
        super().__init__(*args, **options)

    def submit(self, buffer: DriverBuffer, source: bytes, shape: Shape) -> None:
        placement = Placement()
        try:
            table = self.lay_out(placement, source, buffer.size, shape, 0)
            buffer.placement = placement
            self.ring.add(placement.readable, placement.writable, buffer, table=table)
        except BaseException:
            self.give_up(placement)
            raise

    def collect(self) -> list[DriverBuffer]:
        found = super().collect()
        self.used += found
        return found

    def _finish(self, request: DriverBuffer, placement: Placement) -> None:
        request.placement = None
        if placement.answer is not None:
            request.data = placement.answer.memory.read(0, request.written)


class Driver(GuestDriver[_Queue]):
    """The driver of a virtio device of any type, without a virtual machine.

    Each queue may be driven by a thread of its own; everything else is for one thread.

    Args:
        target: Path of the back-end's socket, a connected socket, or a front-end, which it owns
            from here on.
        queues: How many queues to use; None for all that the device has.
        features: Feature bits of the device's type to accept where they are offered; None for all.
        iommu: How the IOMMU is used: ``"off"`` has the device use physical addresses,
            ``"static"`` maps each buffer once, ``"strict"`` maps it before and unmaps it after use,
            as Linux does by default.
        queue_size: Entries of each queue, a power of two.
        memory_size: Bytes of guest memory, a multiple of 8192; half of it lies above 4 GiB.
        indirect: Whether to use indirect tables where the device can.
        event_idx: Whether to use notification suppression by index where the device can.
        polling: Whether to poll for used buffers rather than sleep.
        reuse_iovas: Whether freed I/O virtual addresses are used again at once.
        contiguous: Whether buffers lie in one piece physically.
        seed: Makes the choice of pages repeatable.
        timeout: Seconds that any wait may take unless told otherwise.
        frontend: More arguments for :class:`~guestio.vhost_user.frontend.Frontend`;
            ``connect_wait=5`` waits for a back-end that is being started.

    Attributes:
        frontend: The connection; ``frontend.iotlb`` is the IOMMU, to have misses go wrong with.
        memory: Guest physical memory.

    Raises:
        OSError: The back-end cannot be connected to.
        DeviceError: It does not offer an IOMMU, or has fewer queues.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | socket.socket | Frontend,
        *,
        queues: int | None = None,
        features: int | None = None,
        iommu: IommuMode = "off",
        queue_size: int = 128,
        memory_size: int = 16 << 20,
        indirect: bool = True,
        event_idx: bool = True,
        polling: bool = False,
        reuse_iovas: bool = True,
        contiguous: bool = False,
        seed: int = 0,
        timeout: float = 10.0,
        **frontend: Any,
    ) -> None:
        if queues is not None and check_int(queues, "queues") < 0:
            raise ValueError(f"queues {queues} must not be negative")
        if iommu not in ("off", "static", "strict"):
            raise ValueError(f"iommu {iommu!r} is none of 'off', 'static', 'strict'")
        self._seen_changes = 0
        self._options: dict[str, Any] = {
            "queues": queues,
            "queue_size": queue_size,
            "iommu": iommu,
            "indirect": indirect,
            "event_idx": event_idx,
            "polling": polling,
            "reuse_iovas": reuse_iovas,
        }
        super().__init__(
            target,
            queue_type=_Queue,
            features=DEVICE_FEATURES if features is None else check_int(features, "features"),
            memory_size=memory_size,
            iommu=iommu,
            contiguous=contiguous,
            seed=seed,
            timeout=check_seconds(timeout, "timeout"),
            frontend=frontend,
        )
        try:
            most = self.frontend.queue_count()
            if queues is not None and queues > most:
                raise DeviceError(f"the device has {most} queues, not {queues}")
            self._set_up(**self._options)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return (
            f"<Driver: {len(self._queues)} queues, features {self.features:#x}, "
            f"iommu {self._options['iommu']!r}>"
        )

    def _queue(self, index: int) -> _Queue:
        if not 0 <= check_int(index, "queue") < len(self._queues):
            raise ValueError(f"the driver uses {len(self._queues)} queues, not a queue {index}")
        return self._queues[index]

    @property
    def features(self) -> int:
        """Feature bits that were negotiated, those of the ring and the transport included."""
        return self.frontend.features

    @property
    def queues(self) -> int:
        """How many queues the driver uses."""
        return len(self._queues)

    def reset(self) -> None:
        """Set the device up anew, as when its driver is loaded again; what is in flight is lost."""
        self._set_up(**self._options)

    # Buffers

    def post(
        self, size: int, queue: int = 0, *, shape: Shape | None = None, publish: bool = True
    ) -> DriverBuffer:
        """Give the device a buffer to write; never waits. Arguments as for :meth:`submit`."""
        return self.submit(b"", size, queue, shape=shape, publish=publish)

    def send(
        self, data: Buffer, queue: int = 0, *, shape: Shape | None = None, publish: bool = True
    ) -> DriverBuffer:
        """Give the device data to read; never waits. Arguments as for :meth:`submit`."""
        return self.submit(data, 0, queue, shape=shape, publish=publish)

    def submit(
        self,
        data: Buffer,
        size: int,
        queue: int = 0,
        *,
        shape: Shape | None = None,
        publish: bool = True,
    ) -> DriverBuffer:
        """Give the device data to read and, behind it, a buffer to write; never waits.

        Args:
            data: What the device reads, may be empty.
            size: Bytes that it may write, may be 0; they are 0 before it does.
            queue: Which queue to use.
            shape: How it lies in memory; by default on pages from anywhere, one descriptor for
                each piece.
            publish: False to have the device see it only with the next one that is published.

        Returns:
            The buffer; :meth:`wait` and :meth:`receive` say when it was used.

        Raises:
            QueueError: The queue is full: receive something first.
            DeviceError: The guest is out of memory.
        """
        own = self._queue(queue)
        source = memoryview(data).tobytes()
        if check_int(size, "size") < 0 or not (size or source):
            raise ValueError(f"a buffer of {size} bytes to write and {len(source)} to read")
        own.collect()
        buffer = DriverBuffer(queue, size)
        own.submit(buffer, source, shape or Shape())
        if publish:
            own.publish()
        return buffer

    def publish(self, queue: int = 0) -> None:
        """Publish the buffers that were given with ``publish=False``."""
        self._queue(queue).publish()

    def receive(self, queue: int = 0, timeout: float | None = None) -> DriverBuffer:
        """Wait until the device has used a buffer of a queue, and return it, the oldest first.

        Those that :meth:`wait` or :meth:`request` waited for are not returned again.

        Args:
            queue: Which queue.
            timeout: Seconds to wait at most; None for the driver's own limit.

        Raises:
            DeviceError: The device has no buffer of this queue that it could use.
            NoAnswerError: The time is over.
            PeerGoneError: The back-end went away.
            QueueError: Device or driver found the queue broken.
        """
        own = self._queue(queue)
        limit = self._limit(timeout)
        deadline = time.monotonic() + limit
        while not own.used:
            if not own.ring.outstanding:
                raise DeviceError(
                    f"queue {queue}: the device has no buffer that it could use; give it one first"
                )
            own.progress(deadline, limit)
        return own.used.popleft()

    def poll(self, queue: int = 0) -> list[DriverBuffer]:
        """The buffers that :meth:`receive` would return without waiting."""
        own = self._queue(queue)
        own.collect()
        found = list(own.used)
        own.used.clear()
        return found

    def wait(self, buffer: DriverBuffer, timeout: float | None = None) -> DriverBuffer:
        """Wait until the device has used a buffer, and return that; raises as :meth:`receive`."""
        own = self._queue(buffer.queue)
        limit = self._limit(timeout)
        deadline = time.monotonic() + limit
        while not buffer.done:
            if not own.ring.outstanding:
                raise DeviceError(f"queue {buffer.queue}: the device does not have this buffer")
            own.progress(deadline, limit)
        with contextlib.suppress(ValueError):
            own.used.remove(buffer)
        return buffer

    def request(
        self,
        data: Buffer,
        size: int = 0,
        queue: int = 0,
        *,
        shape: Shape | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """Have the device serve a request, and return what it wrote.

        Args:
            data: What the device reads.
            size: Bytes that it may write.
            queue: Which queue to use.
            shape: As for :meth:`submit`.
            timeout: As for :meth:`receive`.

        Raises:
            GuestioError: As :meth:`submit` and :meth:`receive`.
        """
        return self.wait(self.submit(data, size, queue, shape=shape), timeout).data

    def in_flight(self, queue: int = 0) -> int:
        """How many buffers of a queue the device has."""
        return self._queue(queue).ring.outstanding

    def _limit(self, timeout: float | None) -> float:
        return self._timeout if timeout is None else check_seconds(timeout, "timeout")

    # Configuration

    def config(self, offset: int = 0, size: int = 256) -> bytes:
        """Bytes of the device's configuration space; what is beyond its end is the device's choice.

        Raises:
            RefusedError: The device has no such bytes.
        """
        self._seen_changes = self.frontend.config_changes
        return self.frontend.get_config(offset, size)

    def write_config(self, offset: int, data: Buffer) -> None:
        """Write to the device's configuration space.

        Raises:
            RefusedError: The device refused it.
        """
        self.frontend.set_config(offset, memoryview(data).tobytes())

    def wait_config_change(self, timeout: float | None = None) -> None:
        """Wait until the device says that its configuration space has changed.

        Changes since :meth:`config` was called last count, so none is missed in between.

        Raises:
            NoAnswerError: It did not within the time.
            GuestioError: The connection is broken.
        """
        limit = self._limit(timeout)
        if not self.frontend.wait_config_change(limit, seen=self._seen_changes):
            raise NoAnswerError(
                f"the device did not announce a change of its configuration for {limit:g} s"
            )
        self._seen_changes = self.frontend.config_changes
