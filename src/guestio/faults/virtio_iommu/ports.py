"""Virtio-iommus that are reached without a VM: in this process, and over vhost-user."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Final

from guestio.errors import AccessError, DeviceError, GuestioError, QueueError
from guestio.faults.outcomes import AbsentError, FailError, HungUpError, SilentError
from guestio.faults.virtio_iommu.driver import (
    DMA_BYTES,
    EVENTS,
    MEMORY_BYTES,
    REQUESTS,
    Carrier,
)
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user.frontend import Frontend, FrontendQueue, NoAnswerError
from guestio.virtio.device import VIRTIO_F_VERSION_1, Status
from guestio.virtio.iommu import IommuQueues, VirtioIommu
from guestio.virtio.layout import RingLayout

VERSION_1: Final = 1 << VIRTIO_F_VERSION_1
_CONFIG_BYTES: Final = 40
_FIRST_ENDPOINTS: Final = tuple(range(64))


class LocalCarrier(Carrier):
    """A device of this process.

    Args:
        iommu: The device; it must have two endpoints.
    """

    def __init__(self, iommu: VirtioIommu) -> None:
        self._iommu = iommu
        self._queues: IommuQueues | None = None
        self._broken = False
        self.offered = iommu.offered_features | VERSION_1
        self.endpoints = tuple(iommu.endpoint_ids[:2])
        self.memory = GuestRegionCollection.from_ranges([(0, MEMORY_BYTES)])
        self._buffers = {endpoint: bytearray(DMA_BYTES) for endpoint in self.endpoints}

    def reset(self) -> None:
        """See :class:`Carrier`."""
        self.release()
        self._broken = False
        pending = self._iommu.reset()
        if pending is not None and not pending.wait(10):
            raise SilentError("a reset is not done within 10 s")

    def start(self, features: int, rings: Sequence[RingLayout]) -> None:
        """See :class:`Carrier`."""
        self._iommu.negotiated(features)
        self._queues = IommuQueues.in_memory(
            self._iommu, self.memory, rings[REQUESTS], rings[EVENTS], lambda _: None
        )

    def notify(self, queue: int) -> None:
        """See :class:`Carrier`."""
        self.run()

    def run(self) -> None:
        """See :class:`Carrier`."""
        if self._queues is None or self._broken:
            return
        try:
            self._queues.serve()
        except QueueError:
            self._broken = True

    def needs_reset(self) -> bool:
        """See :class:`Carrier`."""
        return self._broken

    def config(self) -> bytes:
        """See :class:`Carrier`."""
        return self._iommu.config()

    def write_config(self, offset: int, data: bytes) -> None:
        """See :class:`Carrier`."""
        # What a driver may not write has no effect; a driver is not told.
        with contextlib.suppress(DeviceError):
            self._iommu.write_config(offset, data)

    def dma_read(self, endpoint: int, address: int, length: int) -> None:
        """See :class:`Carrier`."""
        memory = self._iommu.endpoint(endpoint).memory(self.memory)
        with contextlib.suppress(AccessError):
            self._buffers[endpoint][:length] = memory.read(address, length)

    def dma_write(self, endpoint: int, address: int, length: int) -> None:
        """See :class:`Carrier`."""
        memory = self._iommu.endpoint(endpoint).memory(self.memory)
        with contextlib.suppress(AccessError):
            memory.write(address, self._buffers[endpoint][:length])

    def release(self) -> None:
        """See :class:`Carrier`."""
        queues, self._queues = self._queues, None
        if queues is not None:
            queues.close()


class VhostUserCarrier(Carrier):
    """A device behind a vhost-user socket; its endpoints are out of reach.

    Args:
        path: The socket.
        patience: Seconds that an answer may take.

    Raises:
        AbsentError: Nothing listens.
    """

    has_dma = False
    endpoints = _FIRST_ENDPOINTS

    def __init__(self, path: str, patience: float) -> None:
        self._queues: list[FrontendQueue] = []
        try:
            self._frontend = Frontend(path, timeout=patience)
        except OSError as error:
            raise AbsentError(f"cannot connect to {path}: {error.strerror}") from None
        self._backing = Backing.memfd(MEMORY_BYTES, "guestio-check", seal=True)
        self.memory = GuestRegionCollection.from_regions(
            [MmapRegion(0, self._backing, name="memory")]
        )
        try:
            with _outcomes():
                self._frontend.negotiate((1 << 64) - 1)
                self.offered = self._frontend.offered
                self._frontend.set_memory(self.memory)
        except BaseException:
            self.release()
            raise

    def reset(self) -> None:
        """See :class:`Carrier`."""
        with _outcomes():
            while self._queues:
                self._frontend.stop_queue(self._queues.pop().index)
            self._frontend.set_status(0)

    def start(self, features: int, rings: Sequence[RingLayout]) -> None:
        """See :class:`Carrier`."""
        with _outcomes():
            self._frontend.set_features(features)
            for index, layout in enumerate(rings):
                self._queues.append(self._frontend.start_queue(index, layout))
            self._frontend.set_status(
                Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
            )

    def notify(self, queue: int) -> None:
        """See :class:`Carrier`."""
        self._queues[queue].kick()

    def run(self) -> None:
        """See :class:`Carrier`."""
        if self._frontend.failure is not None:
            raise HungUpError(f"the connection ended: {self._frontend.failure}")

    def needs_reset(self) -> bool:
        """See :class:`Carrier`."""
        return any(queue.failed() for queue in self._queues)

    def config(self) -> bytes:
        """See :class:`Carrier`."""
        with _outcomes():
            return self._frontend.get_config(0, _CONFIG_BYTES)

    def write_config(self, offset: int, data: bytes) -> None:
        """See :class:`Carrier`."""
        # A back-end may refuse it, by the acknowledgement.
        with contextlib.suppress(GuestioError):
            self._frontend.set_config(offset, data)

    def dma_read(self, endpoint: int, address: int, length: int) -> None:
        """See :class:`Carrier`."""
        raise NotImplementedError("endpoints behind a socket are out of reach")

    def dma_write(self, endpoint: int, address: int, length: int) -> None:
        """See :class:`Carrier`."""
        raise NotImplementedError("endpoints behind a socket are out of reach")

    def release(self) -> None:
        """See :class:`Carrier`."""
        self._queues.clear()
        self._frontend.close()
        self.__dict__.pop("memory", None)
        with contextlib.suppress(BufferError):
            self._backing.close()


@contextlib.contextmanager
def _outcomes() -> Iterator[None]:
    """Verdicts rather than errors of a front-end."""
    try:
        yield
    except NoAnswerError as error:
        raise SilentError(str(error)) from None
    except (ConnectionError, EOFError) as error:
        raise HungUpError(str(error)) from None
    except GuestioError as error:
        raise FailError(str(error)) from None
