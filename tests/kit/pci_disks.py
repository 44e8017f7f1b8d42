"""Disks on PCI behind a vfio-user server, driven by hand: virtio and NVMe, one request at a time.

Each request's data has a mapping of its own, as behind an IOMMU.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from guestio.dma import MSIX, DmaMapRequest
from guestio.errors import GuestioError
from guestio.guest.pci_frontend import PciFrontend
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.vfio_user import Client, VfioUserTarget
from guestio.virtio.layout import RingLayout

PAGE = 4096
_PAGES = 8
_DATA = 0x10_0000
"""Where the data of a request is mapped; the rest of the memory is at 0."""
_LOOK: Final = 0.0005


class DiskError(GuestioError):
    """A request failed; the next one may not."""


class NoAnswerError(GuestioError):
    """A request was not answered in time: what comes later is not known to belong to which."""


class PciDisk(Protocol):
    """A disk that a driver uses, and the connection to it."""

    def read(self, chunk: int) -> bytes:
        """4096 bytes from the disk."""
        ...

    def write(self, chunk: int, data: bytes) -> None:
        """4096 bytes to the disk."""
        ...

    def flush(self) -> None:
        """Have what was written be on the medium."""
        ...

    def reset(self) -> None:
        """Have the function reset by the client."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


class _Memory:
    """Pages of the driver, the last of which is mapped for each request anew."""

    def __init__(self) -> None:
        self.backing = Backing.memfd(_PAGES * PAGE)
        self.region = MmapRegion(0, self.backing)
        self.view = self.region.slice()

    @contextlib.contextmanager
    def data(self, target: VfioUserTarget) -> Iterator[int]:
        """Have the last page mapped; where it is."""
        at = (_PAGES - 1) * PAGE
        target.map_dma(
            DmaMapRequest(_DATA, PAGE, self.backing.host_address + at, self.backing.fd, at)
        )
        try:
            yield _DATA
        finally:
            target.unmap_dma(_DATA, PAGE)

    def put(self, data: bytes) -> None:
        self.view.write((_PAGES - 1) * PAGE, data)

    def get(self) -> bytes:
        return bytes(self.view.read((_PAGES - 1) * PAGE, PAGE))


class VirtioDisk:
    """A virtio disk. Descriptors at 0, rings behind them, a header and a status."""

    _AVAIL, _USED, _HEADER, _STATUS = 0x1000, 0x2000, 0x3000, 0x3100

    def __init__(self, path: Path, timeout: float) -> None:
        self._timeout, self._at = timeout, 0
        self._memory = _Memory()
        self._frontend = PciFrontend(path, timeout=timeout)
        try:
            self._frontend.negotiate(1 << 32 | 1 << 9)
            self._frontend.set_memory(GuestRegionCollection.from_regions([self._memory.region]))
            self._queue = self._frontend.start_queue(0, RingLayout(8, 0, self._AVAIL, self._USED))
            self._target = VfioUserTarget(self._frontend.client)
            self._frontend.set_status(15)
        except BaseException:
            self._frontend.close()
            raise

    def _request(self, kind: int, sector: int, data: int | None) -> None:
        view, writes = self._memory.view, 2 if kind == 0 else 0
        view.write(self._HEADER, struct.pack("<IIQ", kind, 0, sector))
        view.write(self._STATUS, b"\xff")
        chain = [(self._HEADER, 16, 0), (self._STATUS, 1, 2)]
        if data is not None:
            chain.insert(1, (data, PAGE, writes))
        for place, (address, length, flags) in enumerate(chain):
            more = int(place + 1 < len(chain))
            view.write(16 * place, struct.pack("<QIHH", address, length, flags | more, place + 1))
        self._at = (self._at + 1) & 0xFFFF
        view.write(self._AVAIL + 4 + 2 * ((self._at - 1) % 8), struct.pack("<H", 0))
        view.write(self._AVAIL + 2, struct.pack("<H", self._at))
        os.write(self._queue.kick_fd, self._queue.message)
        until = time.monotonic() + self._timeout
        while struct.unpack("<H", view.read(self._USED + 2, 2))[0] != self._at:
            if time.monotonic() > until:
                raise NoAnswerError("the disk does not answer")
            time.sleep(_LOOK)
        if status := view.read(self._STATUS, 1)[0]:
            raise DiskError(f"status {status}")

    def read(self, chunk: int) -> bytes:
        with self._memory.data(self._target) as at:
            self._request(0, chunk * PAGE // 512, at)
        return self._memory.get()

    def write(self, chunk: int, data: bytes) -> None:
        self._memory.put(data)
        with self._memory.data(self._target) as at:
            self._request(1, chunk * PAGE // 512, at)

    def flush(self) -> None:
        self._request(4, 0, None)

    def reset(self) -> None:
        self._frontend.client.reset()

    def close(self) -> None:
        self._frontend.close()


class NvmeDisk:
    """An NVMe disk of 512-byte blocks: an admin queue and a queue pair, of 16 entries each."""

    _ADMIN, _ADMIN_DONE, _QUEUE, _DONE, _ABOUT = (n * PAGE for n in range(5))

    def __init__(self, path: Path, timeout: float) -> None:
        self._timeout, self._number = timeout, 0
        self._tails, self._heads = [0, 0], [0, 0]
        self._memory = _Memory()
        self._call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._client: Client | None = None
        try:
            client = self._client = Client(path, timeout=timeout)
            client.memory_space = client.bus_master = True
            self._bar, self._target = client.bar(0), VfioUserTarget(client)
            client.enable_interrupts(MSIX, [self._call, self._call])
            backing = self._memory.backing
            self._target.map_dma(
                DmaMapRequest(0, (_PAGES - 1) * PAGE, backing.host_address, backing.fd)
            )
            self._enable(False)
            self._bar.store(0x24, 15 * 0x10001, 4)
            self._bar.store(0x28, self._ADMIN, 8)
            self._bar.store(0x30, self._ADMIN_DONE, 8)
            self._enable(True)
            self._command(0, 0x06, 0, self._ABOUT, 1)
            self._command(0, 0x05, 0, self._DONE, 15 << 16 | 1, 1 << 16 | 3)
            self._command(0, 0x01, 0, self._QUEUE, 15 << 16 | 1, 1 << 16 | 1)
        except BaseException:
            self.close()
            raise

    def _enable(self, on: bool) -> None:
        self._bar.store(0x14, 4 << 20 | 6 << 16 | int(on), 4)
        until = time.monotonic() + self._timeout
        while self._bar.load(0x1C, 4) & 1 != int(on):
            if time.monotonic() > until:
                raise NoAnswerError("the controller does not become ready")
            time.sleep(_LOOK)

    def _command(self, queue: int, opcode: int, space: int, prp: int, *words: int) -> None:
        view = self._memory.view
        self._number = (self._number + 1) & 0x7FFF
        command = struct.pack("<IIQQQQ", opcode | self._number << 16, space, 0, 0, prp, 0)
        command += struct.pack("<6I", *words, *[0] * (6 - len(words)))
        view.write((self._ADMIN, self._QUEUE)[queue] + 64 * (self._tails[queue] % 16), command)
        self._tails[queue] += 1
        self._bar.post(0x1000 + 8 * queue, struct.pack("<I", self._tails[queue] % 16))
        at = (self._ADMIN_DONE, self._DONE)[queue] + 16 * (self._heads[queue] % 16)
        phase = 1 ^ (self._heads[queue] // 16 & 1)
        until = time.monotonic() + self._timeout
        while True:
            _, _, _, _, number, status = struct.unpack("<IIHHHH", view.read(at, 16))
            if status & 1 == phase:
                break
            if time.monotonic() > until:
                raise NoAnswerError("the controller does not answer")
            time.sleep(_LOOK)
        self._heads[queue] += 1
        self._bar.post(0x1004 + 8 * queue, struct.pack("<I", self._heads[queue] % 16))
        assert number == self._number, "a command that was not given is completed"
        if status >> 1:
            raise DiskError(f"status {status >> 1:#x}")

    def _move(self, opcode: int, chunk: int) -> None:
        with self._memory.data(self._target) as at:
            self._command(1, opcode, 1, at, chunk * PAGE // 512, 0, PAGE // 512 - 1)

    def read(self, chunk: int) -> bytes:
        self._move(2, chunk)
        return self._memory.get()

    def write(self, chunk: int, data: bytes) -> None:
        self._memory.put(data)
        self._move(1, chunk)

    def flush(self) -> None:
        self._command(1, 0, 1, 0)

    def reset(self) -> None:
        assert self._client is not None
        self._client.reset()

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        os.close(self._call)
