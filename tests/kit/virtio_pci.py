"""The driver's side of virtio's PCI transport, by accesses to BARs and to the configuration space.

`PciFront` plays QEMU and a guest's driver at the same time: it maps memory for DMA, and sets queues
up by their registers. It has the face of a vhost-user front-end, so the drivers of the test kit use
it like one.
"""

from __future__ import annotations

import os
import select
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from guestio.addr import Permissions
from guestio.errors import DeviceError
from guestio.iommu import Iotlb
from guestio.memory import GuestRegionCollection
from guestio.pci import VirtioPci
from guestio.vhost_user.frontend import FrontendQueue
from guestio.vhost_user.messages import ProtocolFeature
from guestio.virtio.device import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_RESET, Device, Status
from guestio.virtio.layout import RingLayout
from tests.kit.serving import WAIT
from tests.kit.vfio_client import Client, ServingPci

CONFIG_REGION = 7
MSIX = 2
COMMON, NOTIFY, ISR, DEVICE, WINDOW = 1, 2, 3, 4, 5
READY = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
NO_VECTOR = 0xFFFF


class Part(NamedTuple):
    """Where a part of the transport is, as its capability says."""

    at: int
    """In the configuration space."""
    bar: int
    offset: int
    length: int


class Transport:
    """Registers of a virtio PCI function, by name, through a vfio-user client."""

    REGISTERS = {  # noqa: RUF012 - never changed
        "feature_half": (0x00, 4),
        "features": (0x04, 4),
        "driver_half": (0x08, 4),
        "driver_features": (0x0C, 4),
        "config_vector": (0x10, 2),
        "num_queues": (0x12, 2),
        "status": (0x14, 1),
        "generation": (0x15, 1),
        "select": (0x16, 2),
        "size": (0x18, 2),
        "vector": (0x1A, 2),
        "enable": (0x1C, 2),
        "notify_off": (0x1E, 2),
        "desc": (0x20, 8),
        "avail": (0x28, 8),
        "used": (0x30, 8),
        "reset": (0x3A, 2),
    }

    def __init__(self, client: Client) -> None:
        self.client = client
        self.lock = threading.RLock()
        self.capabilities: dict[int, int] = {}
        self.parts: dict[int, Part] = {}
        self.multiplier = 0
        at = self.config(0x34, 1)
        while at:
            number, following = self.config(at, 1), self.config(at + 1, 1)
            self.capabilities.setdefault(number, at)
            if number == 9:
                kind, bar = self.config(at + 3, 1), self.config(at + 4, 1)
                self.parts[kind] = Part(at, bar, self.config(at + 8, 4), self.config(at + 12, 4))
                if kind == NOTIFY:
                    self.multiplier = self.config(at + 16, 4)
            at = following

    def config(self, offset: int, size: int) -> int:
        with self.lock:
            return int.from_bytes(self.client.read(CONFIG_REGION, offset, size), "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        with self.lock:
            assert self.client.write(CONFIG_REGION, offset, value.to_bytes(size, "little")) == 0

    def peek(self, kind: int, offset: int, size: int) -> bytes:
        part = self.parts[kind]
        with self.lock:
            return self.client.read(part.bar, part.offset + offset, size)

    def poke(self, kind: int, offset: int, data: bytes) -> None:
        part = self.parts[kind]
        with self.lock:
            assert self.client.write(part.bar, part.offset + offset, data) == 0

    def get(self, name: str) -> int:
        return int.from_bytes(self.peek(COMMON, *self.REGISTERS[name]), "little")

    def set(self, name: str, value: int) -> None:
        offset, size = self.REGISTERS[name]
        self.poke(COMMON, offset, value.to_bytes(size, "little"))

    def get_of(self, queue: int, name: str) -> int:
        with self.lock:
            self.set("select", queue)
            return self.get(name)

    def set_of(self, queue: int, name: str, value: int) -> None:
        with self.lock:
            self.set("select", queue)
            self.set(name, value)

    def notify(self, queue: int) -> None:
        offset = self.get_of(queue, "notify_off") * self.multiplier
        self.poke(NOTIFY, offset, queue.to_bytes(2, "little"))

    @property
    def offered(self) -> int:
        found = 0
        with self.lock:
            for half in (0, 1):
                self.set("feature_half", half)
                found |= self.get("features") << 32 * half
        return found

    def accept(self, features: int) -> bool:
        """Reset the device and negotiate; whether it agrees."""
        with self.lock:
            self.reset()
            self.set("status", Status.ACKNOWLEDGE)
            self.set("status", Status.ACKNOWLEDGE | Status.DRIVER)
            for half in (0, 1):
                self.set("driver_half", half)
                self.set("driver_features", features >> 32 * half & 2**32 - 1)
            self.set("status", READY)
            return bool(self.get("status") & Status.FEATURES_OK)

    def reset(self) -> None:
        self.set("status", 0)
        self.wait(lambda: self.get("status") == 0)

    @staticmethod
    def wait(condition: Any) -> None:
        deadline = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < deadline

    def place(self, queue: int, layout: RingLayout) -> None:
        """Say where a queue is, and enable it."""
        with self.lock:
            self.set("select", queue)
            self.set("size", layout.size)
            self.set("desc", layout.desc)
            self.set("avail", layout.avail)
            self.set("used", layout.used)
            self.set("enable", 1)

    def enable_msix(self) -> list[int]:
        """Give each vector an eventfd and switch MSI-X on; the eventfds."""
        at = self.capabilities[0x11]
        count = (self.config(at + 2, 2) & 0x7FF) + 1
        events = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]
        with self.lock:
            for start in range(0, count, 8):
                assert self.client.triggers(MSIX, start, events[start : start + 8]) == 0
        self.write_config(at + 2, 2, 0x8000)
        return events


class PciQueue(FrontendQueue):
    """A queue that is notified by a write to a BAR or by an eventfd, and notifies by MSI-X."""

    def __init__(self, front: PciFront, index: int, event: int) -> None:
        super().__init__(index, kick=False, call=False)
        self._front = front
        self.call_fd = os.dup(event)

    def kick(self) -> None:
        bell = self._front.bells.get(self.index)
        if bell is None:
            self._front.transport.notify(self.index)
        else:
            os.eventfd_write(bell, 1)


class PciMappings:
    """The guest's IOMMU, or its lack: what is mapped for DMA."""

    answer = "thread"
    asked = 0

    def __init__(self, client: Client, lock: threading.RLock) -> None:
        self._client, self._lock = client, lock
        self.mappings = Iotlb()
        self.memory: GuestRegionCollection | None = None

    def map(self, iova: int, gpa: int, length: int, perm: Permissions) -> None:
        self.mappings.set_mapping(iova, gpa, length, perm)
        assert self.memory is not None
        region = next(each for each in self.memory if each.start <= gpa <= each.last_addr)
        place = region.file_offset
        assert place is not None
        with self._lock:
            at = place.start + gpa - region.start
            assert self._client.map(iova, length, place.fd, at, int(perm)) == 0

    def unmap(self, *ranges: tuple[int, int]) -> None:
        for iova, length in ranges:
            self.mappings.invalidate_mapping(iova, length)
            with self._lock:
                assert self._client.unmap(iova, length) == 0

    def push(self, iova: int) -> None:
        """Do nothing: what is mapped is known."""


class PciFront:
    """A client and a driver of a virtio PCI function; the face of a vhost-user front-end.

    Args:
        path: Where the server listens.

    Attributes:
        bells: Eventfds that queues are notified by instead of by messages, by number.
    """

    protocol_features = ProtocolFeature.STATUS
    failure = None

    def __init__(self, path: str | Path) -> None:
        with ExitStack() as undo:
            self.client = Client(path)
            undo.callback(self.client.socket.close)
            self.client.begin()
            self.transport = Transport(self.client)
            self.events = self.transport.enable_msix()
            self.iotlb = PciMappings(self.client, self.transport.lock)
            self.offered = self.transport.offered
            self.features = 0
            self.bells: dict[int, int] = {}
            self._changes = 0
            self._queues: dict[int, PciQueue] = {}
            self._mapped: list[tuple[int, int]] = []
            undo.pop_all()

    def take_bells(self) -> None:
        """Ask for the eventfds that stand for notifications, and use them from now on."""
        part = self.transport.parts[NOTIFY]
        with self.transport.lock:
            found = self.client.io_fds(part.bar)
        for (offset, *_), fd in zip(found.entries, found.fds, strict=True):
            self.bells[(offset - part.offset) // self.transport.multiplier] = fd

    @property
    def iommu(self) -> bool:
        return bool(self.features >> VIRTIO_F_ACCESS_PLATFORM & 1)

    def negotiate(self, wanted: int) -> None:
        self.set_features(self.offered & wanted)

    def set_features(self, features: int) -> None:
        features |= self.offered & 1 << VIRTIO_F_RING_RESET
        if not self.transport.accept(features):
            raise DeviceError(f"features {features:#x} are refused")
        self.transport.set("config_vector", 0)
        assert self.transport.get("config_vector") == 0
        self.features = features
        self._map_all()

    def set_memory(self, memory: GuestRegionCollection) -> None:
        self.iotlb.memory = memory
        self._map_all()

    def _map_all(self) -> None:
        """Map all memory as it is, unless there is an IOMMU."""
        memory = self.iotlb.memory
        if self.iommu and self._mapped:
            self.iotlb.unmap(*self._mapped)
            self._mapped.clear()
        elif not self.iommu and memory is not None and not self._mapped:
            for region in memory:
                self.iotlb.map(region.start, region.start, region.size, Permissions.READ_WRITE)
                self._mapped.append((region.start, region.size))

    def start_queue(self, index: int, layout: RingLayout, *, base: int = 0) -> PciQueue:
        assert base == 0
        self.transport.set_of(index, "vector", 1 + index)
        assert self.transport.get_of(index, "vector") == 1 + index
        self.transport.place(index, layout)
        assert self.transport.get_of(index, "enable") == 1
        queue = self._queues[index] = PciQueue(self, index, self.events[1 + index])
        return queue

    def stop_queue(self, index: int) -> int:
        """Reset a queue; there is no stop from which it goes on."""
        self.transport.set_of(index, "reset", 1)
        self.transport.wait(lambda: not self.transport.get_of(index, "reset"))
        assert self.transport.get_of(index, "enable") == 0
        self._queues.pop(index).close()
        return 0

    def set_status(self, status: Status) -> None:
        if status:
            self.transport.set("status", status)
            assert self.transport.get("status") & Status.DRIVER_OK
        else:
            self.transport.reset()

    def queue_count(self) -> int:
        return self.transport.get("num_queues")

    def get_config(self, offset: int, size: int) -> bytes:
        part = self.transport.parts.get(DEVICE)
        if part is None:
            return bytes(size)
        length = max(min(size, part.length - offset), 0)
        while True:
            before = self.transport.get("generation")
            found = self.transport.peek(DEVICE, offset, length) if length else b""
            if self.transport.get("generation") == before:
                return found.ljust(size, b"\0")

    def set_config(self, offset: int, data: bytes) -> None:
        self.transport.poke(DEVICE, offset, data)

    @property
    def config_changes(self) -> int:
        """Times that the vector of the configuration was signalled."""
        with suppress(BlockingIOError):
            self._changes += os.eventfd_read(self.events[0])
        return self._changes

    def wait_config_change(self, timeout: float, *, seen: int = 0) -> bool:
        poll = select.poll()
        poll.register(self.events[0], select.POLLIN)
        if self.config_changes == seen:
            poll.poll(timeout * 1000)
        return self.config_changes != seen

    def fileno(self) -> int:
        return self.client.socket.fileno()

    def close(self) -> None:
        self.client.socket.close()
        while self._queues:
            self._queues.popitem()[1].close()
        while self.bells:
            os.close(self.bells.popitem()[1])
        while self.events:
            os.close(self.events.pop())
        self.iotlb.memory = None


class PciPlug(PciFront):
    """A device as a PCI function, served in a thread, and its driver's side."""

    def __init__(self, device: Device, *, revoke_after: float = 0.5, **options: Any) -> None:
        with ExitStack() as undo:
            directory = undo.enter_context(tempfile.TemporaryDirectory(prefix="guestio-pci-"))
            self.function = VirtioPci(device, **options)
            path = Path(directory) / "pci.sock"
            self.serving = undo.enter_context(
                ServingPci(self.function, path, revoke_after=revoke_after)
            )
            super().__init__(path)
            undo.callback(super().close)
            self._undo = undo.pop_all()
        self.wire = SimpleNamespace(iommu=self.iotlb)

    def close(self) -> None:
        self._undo.close()
