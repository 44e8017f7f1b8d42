"""Memory that a client does not share: each access is a message to the client, and its answer."""

from __future__ import annotations

from typing import Protocol

from guestio.addr import Permissions
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

    Attributes:
        most: Bytes of one message at most, as the client said.
    """

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self.most = MAX_DATA

    def read(self, addr: int, length: int) -> bytearray:
        """See :class:`~guestio.pci.memory.RemoteMemory`."""
        found = bytearray()
        while len(found) < length:
            at, size = addr + len(found), min(self.most, length - len(found))
            asked = DMA_ACCESS.pack(at, size)
            answer = self._ask(Command.DMA_READ, asked, at, size, Permissions.READ)
            if answer[: DMA_ACCESS.size] != asked or len(answer) != DMA_ACCESS.size + size:
                raise InvalidAddressError(
                    at, size, Permissions.READ, "the client answered with other data"
                )
            found += answer[DMA_ACCESS.size :]
        return found

    def write(self, addr: int, data: memoryview) -> None:
        """See :class:`~guestio.pci.memory.RemoteMemory`."""
        for start in range(0, len(data), self.most):
            part = data[start : start + self.most]
            payload = DMA_ACCESS.pack(addr + start, len(part)) + part
            self._ask(Command.DMA_WRITE, payload, addr + start, len(part), Permissions.WRITE)

    def _ask(
        self, command: int, payload: bytes, addr: int, size: int, access: Permissions
    ) -> bytes:
        try:
            return self._asker.ask(command, payload)
        except RefusalError as refusal:
            raise InvalidAddressError(addr, size, access, str(refusal)) from None
