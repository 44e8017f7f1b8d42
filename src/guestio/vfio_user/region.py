"""A region of a device in another process: registers, memory and doorbells."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Self

from guestio._core.base.syscalls import notify_eventfd
from guestio.budgets import CLIENT_AREAS
from guestio.dma import PciRegion
from guestio.errors import DeviceError
from guestio.memory import Backing
from guestio.peer.foreign import Eventfd
from guestio.vfio_user import answers
from guestio.vfio_user.answers import NotifyArea, RegionFacts
from guestio.vfio_user.life import Life
from guestio.vfio_user.messages import (
    IO_FD,
    MAX_DATA,
    MULTI_COUNT,
    MULTI_WRITE,
    REGION_ACCESS,
    REGION_IO_FDS,
    Command,
    Header,
    HeaderFlag,
    RefusalError,
)

_REGISTER: Final = 8
"""Bytes of one write of REGION_WRITE_MULTI."""
_MULTI_WRITES: Final = 512
"""Writes of one such message."""


def own_fd(fd: int, what: str) -> int:
    """A descriptor of our own for what another one is.

    Raises:
        ValueError: It is none.
        DeviceError: There is no descriptor left.
    """
    try:
        return os.dup(fd)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise ValueError(f"{fd} is not the descriptor of {what}: {error.strerror}") from None
        raise DeviceError(f"no descriptor for {what}: {error.strerror}") from error


class Doorbell:
    """A place in a region where a write can be made by signalling an eventfd: an ioeventfd.

    A context manager that closes it.

    Attributes:
        offset: Where it is in the region.
        size: Bytes of the write that it stands for; 0 for any.
        value: The value that it stands for; None if the device does not care.
    """

    def __init__(self, area: NotifyArea, fd: int) -> None:
        self.offset, self.size, self.value = area.offset, area.size, area.value
        self._event: Eventfd | None = Eventfd(fd, f"doorbell at {area.offset:#x}")

    def fileno(self) -> int:
        """The eventfd, -1 once closed."""
        return -1 if self._event is None else self._event.fileno()

    def ring(self) -> None:
        """Tell the device. Never waits.

        Raises:
            ValueError: It is closed.
        """
        if self._event is None:
            raise ValueError("the doorbell is closed")
        notify_eventfd(self._event.fileno())

    def close(self) -> None:
        """Close the eventfd. Calling it again does nothing."""
        event, self._event = self._event, None
        if event is not None:
            event.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ClientRegion(PciRegion):
    """A region of a device in another process; see :class:`~guestio.dma.PciRegion`.

    Accesses are messages. Several threads may have accesses under way at the same time; the server
    does them in the order in which they were sent.
    """

    def __init__(
        self,
        owner: str,
        index: int,
        facts: RegionFacts,
        accessible: Callable[[], Life],
        *,
        mapped: bool,
    ) -> None:
        self._owner = owner
        self._accessible = accessible
        self.index = index
        self.size = facts.size
        self.readable = facts.readable
        self.writable = facts.writable
        self.areas = facts.areas if mapped else ()

    def __repr__(self) -> str:
        return f"<ClientRegion {self.index} of {self._owner}: {self.size:#x} bytes>"

    @property
    def owner(self) -> str:
        """See :class:`~guestio.dma.PciRegion`."""
        return self._owner

    def read(self, offset: int, length: int) -> bytes:
        """Read from the device, and wait for its answer; see :meth:`~guestio.dma.PciRegion.read`.

        Raises:
            ValueError: Outside the region, or the client is closed.
            DeviceError: The region cannot be read, or the server refuses.
            ServerGoneError: The connection has ended.
        """
        self._check(offset, length)
        life = self._accessible()
        found = bytearray()
        while len(found) < length:
            at, count = offset + len(found), min(length - len(found), life.limits.max_data)
            asked = REGION_ACCESS.pack(at, self.index, count)
            try:
                message = life.exchange.request(Command.REGION_READ, asked)
            except RefusalError as error:
                raise self._failed("read", at, count, os.strerror(error.number)) from None
            with message:
                data = message.payload
            if data[: REGION_ACCESS.size] != asked or len(data) != REGION_ACCESS.size + count:
                life.broken(f"a read of {count} bytes was answered with others")
            found += data[REGION_ACCESS.size :]
        return bytes(found)

    def write(self, offset: int, data: bytes) -> None:
        """Write to the device, and wait until it has the data; access widths as in :meth:`read`.

        Raises: as :meth:`read`.
        """
        for at, part, life in self._parts(offset, data):
            head = REGION_ACCESS.pack(at, self.index, len(part))
            try:
                life.ask(Command.REGION_WRITE, head + part, answers=(head,))
            except RefusalError as error:
                raise self._failed("write", at, len(part), os.strerror(error.number)) from None

    def post(self, offset: int, data: bytes) -> None:
        """Write to the device without waiting: a posted write, as a doorbell is.

        It is done before whatever is asked of the device next. Nothing tells that it was refused.

        Raises:
            ValueError: Outside the region, or the client is closed.
            ServerGoneError: The connection has ended, or the server does not read.
        """
        for at, part, life in self._parts(offset, data):
            head = REGION_ACCESS.pack(at, self.index, len(part))
            life.exchange.post(Command.REGION_WRITE, head + part)

    def posted(self, offset: int, data: bytes) -> bytes:
        """The message of a posted write, for a driver that sends it itself to `Client.fileno`.

        It may be sent again and again, but not while another thread uses the client: messages
        would be mixed.

        Raises:
            ValueError: Outside the region, or more than one message.
        """
        data = bytes(data)
        self._check(offset, len(data))
        if len(data) > MAX_DATA:
            raise ValueError(f"{len(data)} bytes in one message, at most {MAX_DATA}")
        payload = REGION_ACCESS.pack(offset, self.index, len(data)) + data
        header = Header(0, Command.REGION_WRITE, len(payload), int(HeaderFlag.NO_REPLY))
        return header.encode() + payload

    def post_many(self, writes: Sequence[tuple[int, bytes]]) -> None:
        """Post several writes of up to 8 bytes, as ``(offset, data)``, in few messages.

        With a server that knows REGION_WRITE_MULTI that is one message for 512 of them.

        Raises: as :meth:`post`.
        """
        for offset, data in writes:
            self._check(offset, len(data))
            if not 0 < len(data) <= _REGISTER:
                raise ValueError(f"{len(data)} bytes in one of several writes, 1 to {_REGISTER}")
        life = self._accessible()
        if not life.limits.write_multiple:
            for offset, data in writes:
                self.post(offset, data)
            return
        most = min(_MULTI_WRITES, (life.limits.max_data - MULTI_COUNT.size) // MULTI_WRITE.size)
        for start in range(0, len(writes), max(most, 1)):
            part = writes[start : start + max(most, 1)]
            payload = b"".join(
                MULTI_WRITE.pack(offset, self.index, len(data), bytes(data))
                for offset, data in part
            )
            life.exchange.post(Command.REGION_WRITE_MULTI, MULTI_COUNT.pack(len(part)) + payload)

    def _parts(self, offset: int, data: bytes) -> Iterator[tuple[int, bytes, Life]]:
        data = bytes(data)
        self._check(offset, len(data))
        life = self._accessible()
        for start in range(0, len(data), life.limits.max_data):
            yield offset + start, data[start : start + life.limits.max_data], life

    def backing(self, area: int = 0, *, writable: bool = True) -> Backing:
        """Map one of :attr:`areas` into this process; see :meth:`~guestio.dma.PciRegion.backing`.

        It is a file of the server's, which stays mapped when the server is gone; what another
        server shows must be mapped anew. A server that truncates it makes accesses fail
        (`MemoryVanishedError`).

        Raises:
            ValueError: There is no such area, or the client is closed.
            BackingError: It cannot be mapped.
            ServerGoneError: The connection has ended.
        """
        place = self._area(area)
        life = self._accessible()
        begin = life.regions[self.index].offset + place.offset
        return Backing.from_fd(life.files[self.index], place.size, begin, writable)

    def doorbells(self) -> list[Doorbell]:
        """Ask for the places where an eventfd can be signalled instead of writing (ioeventfds).

        Returns:
            Those that there are; the caller's to close.

        Raises:
            DeviceError: The server refuses.
            ServerGoneError: The connection has ended.
        """
        life = self._accessible()
        room = REGION_IO_FDS.size + CLIENT_AREAS * IO_FD.size
        asked = REGION_IO_FDS.pack(room, 0, self.index, 0)
        try:
            message = life.exchange.request(Command.DEVICE_GET_REGION_IO_FDS, asked, with_fds=True)
        except RefusalError as error:
            raise self._failed("notify", 0, self.size, os.strerror(error.number)) from None
        made: list[Doorbell] = []
        try:
            with message, life.judged():
                count = message.fd_count
                areas = answers.io_fds(message.payload, self.index, self.size, count)
                # Several may share one.
                made.extend(
                    Doorbell(area, own_fd(message.fds[area.fd_index], "a doorbell"))
                    for area in areas
                )
        except BaseException:
            for doorbell in made:
                doorbell.close()
            raise
        return made
