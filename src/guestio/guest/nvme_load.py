"""Load for an NVMe controller behind vfio-user: one queue pair kept full of pages to read or write.

The controller is set up as a guest's driver does; what runs for each command is compiled.

Source: NVM Express Base Specification 1.4, sections 3.1 (registers), 5 (admin commands), 7.6.1
(initialization).
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass
from typing import Final, Self

from guestio.dma import MSIX, DmaMapRequest
from guestio.errors import DeviceError
from guestio.guest._load.nvme import NvmeDriver
from guestio.memory import Backing, MmapRegion
from guestio.vfio_user import Client, VfioUserTarget

_PAGE: Final = 4096
_CAP, _CC, _CSTS, _AQA, _ASQ, _ACQ = 0x00, 0x14, 0x1C, 0x24, 0x28, 0x30
_DOORBELLS: Final = 0x1000
_ENABLE: Final = 1 | 6 << 16 | 4 << 20
"""Enabled, with entries of 64 and 16 bytes."""
_READY: Final = 1
_FATAL: Final = 2
_ADMIN_ENTRIES: Final = 32
_CREATE_SQ, _CREATE_CQ, _IDENTIFY = 0x01, 0x05, 0x06
_MSIX_CAPABILITY: Final = 0x11
_MSIX_ENABLE: Final = 0x8000
_PAUSE: Final = 0.001

_ADMIN_SQ, _ADMIN_CQ, _SCRATCH, _QUEUES = 0, _PAGE, 2 * _PAGE, 4 * _PAGE


@dataclass(frozen=True, slots=True)
class NvmeResult:
    """What was measured.

    Attributes:
        seconds: For how long.
        requests: Commands finished.
        doorbells: Doorbells rung: messages to the server.
        interrupts: Interrupts taken.
        mean_us: How long commands took, in microseconds.
        max_us: The slowest.
    """

    seconds: float
    requests: int
    doorbells: int
    interrupts: int
    mean_us: float
    max_us: float

    @property
    def iops(self) -> float:
        """Commands per second."""
        return self.requests / self.seconds if self.seconds else 0.0


class NvmeLoad:
    """A guest that keeps a queue pair of an NVMe controller busy. For one thread.

    Args:
        path: Where the vfio-user server listens.
        depth: Commands in flight.
        writes: Whether to write rather than to read. That overwrites the namespace.
        timeout: Seconds that the controller may take for anything.
        connect_wait: Seconds to go on trying while there is no server yet.

    Raises:
        DeviceError: There is no server, or its device is no NVMe controller that can be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        depth: int = 32,
        writes: bool = False,
        timeout: float = 10.0,
        connect_wait: float = 0.0,
    ) -> None:
        self._timeout = timeout
        self._identifier = self._tail = self._head = 0
        self._phase = 1
        entries = 1 << max(depth, 1).bit_length()
        ring = -(-64 * entries // _PAGE) * _PAGE
        self._memory = Backing.memfd(_QUEUES + 2 * ring + depth * _PAGE)
        self._view = MmapRegion(0, self._memory).slice()
        self._call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._client: Client | None = None
        try:
            client = self._client = Client(path, timeout=timeout, connect_wait=connect_wait)
            self._bar = client.bar(0)
            self._begin(client)
            sectors, pages = self._identify()
            self._create(entries, ring)
            step = 4 << (self._bar.load(_CAP, 8) >> 32 & 0xF)
            here = self._memory.host_address
            self._driver: NvmeDriver | None = NvmeDriver(
                here + _QUEUES,
                here + _QUEUES + ring,
                entries,
                depth,
                _QUEUES + 2 * ring,
                pages,
                sectors,
                client.fileno(),
                self._bar.posted(_DOORBELLS + 2 * step, bytes(4)),
                self._bar.posted(_DOORBELLS + 3 * step, bytes(4)),
                self._call,
                writes=writes,
                timeout=int(timeout * 1e9),
            )
        except BaseException:
            self.close()
            raise

    def _begin(self, client: Client) -> None:
        config = client.config
        if config.load(0x09, 4) & 0xFFFFFF != 0x010802:
            raise DeviceError(f"{client.address} is no NVMe controller")
        client.memory_space = client.bus_master = True
        at = config.load(0x34, 1)
        while at:
            number, following = config.read(at, 2)
            if number == _MSIX_CAPABILITY:
                config.store(at + 2, config.load(at + 2, 2) | _MSIX_ENABLE, 2)
            at = following
        client.enable_interrupts(MSIX, [-1, self._call])
        VfioUserTarget(client).map_dma(
            DmaMapRequest(0, self._memory.size, self._memory.host_address, self._memory.fd)
        )
        self._bar.store(_CC, 0, 4)
        self._wait_ready(ready=False)
        self._bar.store(_AQA, (_ADMIN_ENTRIES - 1) * 0x10001, 4)
        self._bar.store(_ASQ, _ADMIN_SQ, 8)
        self._bar.store(_ACQ, _ADMIN_CQ, 8)
        self._bar.store(_CC, _ENABLE, 4)
        self._wait_ready(ready=True)

    def _wait_ready(self, *, ready: bool) -> None:
        until = time.monotonic() + self._timeout
        while (status := self._bar.load(_CSTS, 4)) & _READY != int(ready):
            if status & _FATAL or time.monotonic() > until:
                raise DeviceError(f"the controller does not become ready: status {status:#x}")
            time.sleep(_PAUSE)

    def _admin(self, opcode: int, namespace: int, prp: int, *words: int) -> None:
        """Have the controller do an admin command."""
        self._identifier += 1
        command = struct.pack("<IIQQQQ", opcode | self._identifier << 16, namespace, 0, 0, prp, 0)
        command += struct.pack("<6I", *words, *[0] * (6 - len(words)))
        self._view.write(_ADMIN_SQ + 64 * self._tail, command)
        self._tail = (self._tail + 1) % _ADMIN_ENTRIES
        self._bar.store(_DOORBELLS, self._tail, 4)
        until = time.monotonic() + self._timeout
        while True:
            at = _ADMIN_CQ + 16 * self._head
            _, _, _, _, identifier, status = struct.unpack("<IIHHHH", self._view.read(at, 16))
            if status & 1 == self._phase:
                break
            if time.monotonic() > until:
                raise DeviceError(f"the controller does not finish admin command {opcode:#x}")
            time.sleep(_PAUSE)
        if identifier != self._identifier or status >> 1:
            raise DeviceError(f"admin command {opcode:#x} failed with status {status >> 1:#x}")
        self._head += 1
        if self._head == _ADMIN_ENTRIES:
            self._head, self._phase = 0, self._phase ^ 1
        step = 4 << (self._bar.load(_CAP, 8) >> 32 & 0xF)
        self._bar.store(_DOORBELLS + step, self._head, 4)

    def _identify(self) -> tuple[int, int]:
        """Logical blocks to a page, and pages, of the first namespace."""
        self._admin(_IDENTIFY, 1, _SCRATCH, 0)
        about = self._view.read(_SCRATCH, _PAGE)
        (blocks,) = struct.unpack_from("<Q", about)
        (form,) = struct.unpack_from("<I", about, 128 + 4 * (about[26] & 0xF))
        shift = form >> 16 & 0xFF
        if not 9 <= shift <= 12:
            raise DeviceError(f"logical blocks of {1 << shift} bytes cannot be used here")
        sectors = _PAGE >> shift
        if blocks < sectors:
            raise DeviceError("the namespace has not one page")
        return sectors, blocks // sectors

    def _create(self, entries: int, ring: int) -> None:
        """Create queue pair 1, with interrupt vector 1."""
        size = (entries - 1) << 16 | 1
        self._admin(_CREATE_CQ, 0, _QUEUES + ring, size, 1 << 16 | 3)
        self._admin(_CREATE_SQ, 0, _QUEUES, size, 1 << 16 | 1)

    def run(self, seconds: float) -> NvmeResult:
        """Keep the controller busy for so long, and measure.

        Raises:
            DeviceError: A command failed, or the controller stalled, went, or completed what was
                not begun.
        """
        driver = self._driver
        assert driver is not None
        driver.reset_counts()
        started = time.monotonic()
        self._check(driver.run(int(seconds * 1e9)))
        elapsed = time.monotonic() - started
        requests = driver.requests
        return NvmeResult(
            elapsed,
            requests,
            driver.doorbells,
            driver.interrupts,
            driver.latency_sum / requests / 1000 if requests else 0.0,
            driver.latency_max / 1000,
        )

    def drain(self) -> None:
        """Wait until nothing is in flight; raises as :meth:`run`."""
        assert self._driver is not None
        self._check(self._driver.run(int(self._timeout * 1e9), begin=False))

    def _check(self, fine: bool) -> None:
        if not fine:
            assert self._driver is not None
            raise DeviceError(f"the controller failed: {self._driver.trouble}")

    def close(self) -> None:
        """Hang up, and give everything up. May be called again."""
        # The driver works on the memory, so it goes first.
        self._driver = None
        client, self._client = self._client, None
        if client is not None:
            client.close()
        if self._call >= 0:
            os.close(self._call)
            self._call = -1
        if not self._memory.closed:
            del self._view
            self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
