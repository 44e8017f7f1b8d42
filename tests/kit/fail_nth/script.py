"""A whole connection of a front-end, and what it must not see whatever fails in the back-end."""

from __future__ import annotations

import contextlib
import os
import random
import time
from typing import TYPE_CHECKING, Any

from guestio.errors import GuestioError
from guestio.guest.blkqueue import BlkError
from guestio.guest.disk import ScriptedGuest
from guestio.vhost_user.frontend import PROTOCOL_FEATURES, Frontend
from guestio.vhost_user.messages import ProtocolFeature
from tests.kit.pci_disks import DiskError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.kit.pci_disks import PciDisk

CHUNK = 4096
SECTORS = CHUNK // 512
CHUNKS = 64
PATIENCE = 1.0
"""Seconds that the script waits for any answer: what fails may well be the answer."""


class Contents:
    """An image, and for each chunk what it may hold after all that was asked for and answered.

    Args:
        path: The image; it is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._random = random.Random(1)
        self.may: list[set[bytes]] = [{self.fresh()} for _ in range(CHUNKS)]
        with path.open("wb") as file:
            for (data,) in self.may:
                file.write(data)

    def fresh(self) -> bytes:
        """Contents that never were before."""
        return self._random.randbytes(CHUNK)

    @contextlib.contextmanager
    def changing(self, chunk: int, data: bytes) -> Iterator[None]:
        """The chunk is being replaced; only if that succeeds it surely holds this."""
        self.may[chunk].add(data)
        yield
        self.may[chunk] = {data}

    def check(self, chunk: int, data: bytes) -> None:
        """What a request that succeeded read."""
        assert data in self.may[chunk], f"chunk {chunk} reads as something that was never there"

    def check_image(self) -> None:
        """Nothing is under way any more: whatever the image holds now, it may."""
        with self.path.open("rb") as file:
            for chunk in range(CHUNKS):
                data = file.read(CHUNK)
                assert data in self.may[chunk], f"chunk {chunk} of the image holds something else"
                self.may[chunk] = {data}


class _Guest(ScriptedGuest):
    """One whose front-end keeps notes of the requests in flight."""

    def boot(self, **options: Any) -> None:
        self.shut_down()
        if self.frontend.protocol_features & ProtocolFeature.INFLIGHT_SHMFD:
            inflight, fd = self.frontend.get_inflight(1, 32)
            try:
                self.frontend.set_inflight(inflight, fd)
            finally:
                os.close(fd)
        super().boot(**options)


class _Kept(Frontend):
    """A front-end that uses notes of the requests in flight."""

    def negotiate(self, wanted: int, protocol: int = PROTOCOL_FEATURES) -> int:
        return super().negotiate(wanted, protocol | ProtocolFeature.INFLIGHT_SHMFD)


def whole_connection(socket: Path, contents: Contents) -> list[str]:
    """Connect, use the disk in every way there is, and disconnect.

    Returns:
        What failed on the way. Anything may; but what succeeds is checked.
    """
    failed: list[str] = []

    @contextlib.contextmanager
    def trying(what: str) -> Iterator[None]:
        """A request may be refused."""
        try:
            yield
        except BlkError as error:
            failed.append(f"{what}: {error}")

    def write(guest: ScriptedGuest, chunk: int) -> None:
        data = contents.fresh()
        with trying("write"), contents.changing(chunk, data):
            guest.write(chunk * SECTORS, data)

    def read(guest: ScriptedGuest, chunk: int) -> None:
        with trying("read"):
            contents.check(chunk, guest.read(chunk * SECTORS, CHUNK))

    try:
        frontend = _Kept(socket, timeout=PATIENCE)
        with _Guest(
            frontend,
            memory_size=1 << 20,
            queue_size=32,
            iommu="strict",
            timeout=PATIENCE,
            reuse_iovas=False,
        ) as guest:
            for chunk in range(3):
                write(guest, chunk)
            requests = [
                guest.submit_read(chunk * SECTORS, CHUNK, publish=chunk == 7) for chunk in range(8)
            ]
            guest.wait(*requests)
            for chunk, request in enumerate(requests):
                with trying("read"):
                    contents.check(chunk, request.check().data)
            with trying("flush"):
                guest.flush()
            with trying("get_id"):
                assert guest.get_id() == b"disk.img"
            zeroes = bytes(CHUNK)
            with trying("discard"), contents.changing(9, zeroes):
                guest.discard(9 * SECTORS, SECTORS)
            for chunk, unmap in ((10, False), (11, True)):
                with trying("write_zeroes"), contents.changing(chunk, zeroes):
                    guest.write_zeroes(chunk * SECTORS, SECTORS, unmap=unmap)
            guest.pause()
            guest.resume()
            read(guest, 9)
            # The next stage of the guest's boot, without an IOMMU.
            guest.boot(queue_size=32)
            write(guest, 12)
            read(guest, 12)
            guest.frontend.reset_device()
    except (GuestioError, OSError) as error:
        failed.append(f"{type(error).__name__}: {error}")
    return failed


def next_one_is_served(socket: Path, contents: Contents) -> float:
    """Connect as an unrelated front-end and use the disk; the seconds that took."""
    start = time.monotonic()
    with ScriptedGuest(socket, memory_size=1 << 20, queue_size=32, timeout=20.0) as guest:
        contents.check(3, guest.read(3 * SECTORS, CHUNK))
        data = contents.fresh()
        with contents.changing(13, data):
            guest.write(13 * SECTORS, data)
        contents.check(13, guest.read(13 * SECTORS, CHUNK))
    return time.monotonic() - start


def whole_pci_connection(
    connect: Callable[[Path, float], PciDisk], socket: Path, contents: Contents
) -> list[str]:
    """The same for a disk on PCI, as :func:`whole_connection`."""
    failed: list[str] = []

    @contextlib.contextmanager
    def trying(what: str) -> Iterator[None]:
        try:
            yield
        except DiskError as error:
            failed.append(f"{what}: {error}")

    try:
        with contextlib.closing(connect(socket, PATIENCE)) as disk:
            for chunk in range(3):
                data = contents.fresh()
                with trying("write"), contents.changing(chunk, data):
                    disk.write(chunk, data)
            for chunk in range(8):
                with trying("read"):
                    contents.check(chunk, disk.read(chunk))
            with trying("flush"):
                disk.flush()
            disk.reset()
    except (GuestioError, OSError) as error:
        failed.append(f"{type(error).__name__}: {error}")
    return failed


def next_pci_one_is_served(
    connect: Callable[[Path, float], PciDisk], socket: Path, contents: Contents
) -> float:
    """As :func:`next_one_is_served`."""
    start = time.monotonic()
    with contextlib.closing(connect(socket, 20.0)) as disk:
        contents.check(3, disk.read(3))
        data = contents.fresh()
        with contents.changing(13, data):
            disk.write(13, data)
        contents.check(13, disk.read(13))
    return time.monotonic() - start
