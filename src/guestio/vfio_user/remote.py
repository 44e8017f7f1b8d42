"""Memory that a client does not share: each access is a message to the client, and its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from guestio.addr import ADDRESS_SPACE, Permissions
from guestio.errors import InvalidAddressError
from guestio.vfio_user.messages import DMA_ACCESS, MAX_DATA, Command, RefusalError


class Asker(Protocol):
    """Asks the client for something and waits for the answer."""

    def ask(self, command: int, payload: bytes) -> bytes:
        """The payload of the answer.

        Raises:
            RefusalError: The client refuses, does not answer, or cannot be asked now.
        """
        ...


class ClientMemory:
    """Reads and writes memory by DMA_READ and DMA_WRITE; a `RemoteMemory`.

    Args:
        asker: Where to ask.
        under_way: Called with whether accesses are under way, when that changes: each unmap must
            :meth:`end` those that it overlaps.

    Attributes:
        most: Bytes of one message at most, as the client said.
    """

    def __init__(self, asker: Asker, under_way: Callable[[bool], None]) -> None:
        self._asker = asker
        self._under_way = under_way
        self.most = MAX_DATA
        self._begun: list[ClientAccess] = []

    def begin(self, addr: int, length: int) -> ClientAccess:
        """See :class:`~guestio.pci.memory.RemoteMemory`."""
        access = ClientAccess(self, addr, length)
        self._begun.append(access)
        self._under_way(True)
        return access

    def end(self, reason: str, addr: int = 0, length: int = ADDRESS_SPACE) -> None:
        """See :class:`~guestio.pci.memory.RemoteMemory`."""
        for access in tuple(self._begun):
            if access.addr < addr + length and addr < access.addr + access.length:
                access.ended = access.ended or reason

    def close(self, access: ClientAccess) -> None:
        """Forget an access that is done."""
        if access in self._begun:
            self._begun.remove(access)
            self._under_way(bool(self._begun))

    def ask(self, command: int, payload: bytes, addr: int, size: int, access: Permissions) -> bytes:
        """Ask for one message's bytes. Raises as the methods of :class:`ClientAccess`."""
        try:
            return self._asker.ask(command, payload)
        except RefusalError as refusal:
            raise InvalidAddressError(addr, size, access, str(refusal)) from None


class ClientAccess:
    """One access by messages, during each of which the client may unmap the rest of the range.

    Args:
        memory: Where.
        addr, length: What is accessed.

    Attributes:
        ended: Why nothing more is read or written; empty while all is as at the beginning.
    """

    def __init__(self, memory: ClientMemory, addr: int, length: int) -> None:
        self._memory = memory
        self.addr, self.length = addr, length
        self.ended = ""

    def read(self) -> bytearray:
        """See :class:`~guestio.pci.memory.RemoteAccess`."""
        found = bytearray()
        most = self._memory.most
        while len(found) < self.length:
            at, size = self.addr + len(found), min(most, self.length - len(found))
            self._check(at, size, Permissions.READ)
            asked = DMA_ACCESS.pack(at, size)
            answer = self._memory.ask(Command.DMA_READ, asked, at, size, Permissions.READ)
            if answer[: DMA_ACCESS.size] != asked or len(answer) != DMA_ACCESS.size + size:
                raise InvalidAddressError(
                    at, size, Permissions.READ, "the client answered with other data"
                )
            found += answer[DMA_ACCESS.size :]
        return found

    def write(self, data: memoryview) -> None:
        """See :class:`~guestio.pci.memory.RemoteAccess`."""
        most = self._memory.most
        for start in range(0, len(data), most):
            part = data[start : start + most]
            at = self.addr + start
            self._check(at, len(part), Permissions.WRITE)
            payload = DMA_ACCESS.pack(at, len(part)) + part
            self._memory.ask(Command.DMA_WRITE, payload, at, len(part), Permissions.WRITE)

    def close(self) -> None:
        """See :class:`~guestio.pci.memory.RemoteAccess`."""
        self._memory.close(self)

    def _check(self, addr: int, size: int, access: Permissions) -> None:
        """Raise if the range is not to be accessed any more: what it was is answered for."""
        if self.ended:
            raise InvalidAddressError(addr, size, access, self.ended)
