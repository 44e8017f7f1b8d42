"""A vfio-user connection on which anything can be sent.

Source: QEMU docs/interop/vfio-user.rst, "Header" and "Message sequence".
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from guestio.faults.outcomes import FailError, HungUpError, SilentError
from guestio.faults.raw_link import RawLink
from guestio.vfio_user.messages import (
    HEADER_SIZE,
    REGION_ACCESS,
    Command,
    Header,
    HeaderFlag,
    command_name,
)

_HEADER: Final = struct.Struct("<HHIII")
_LONGEST: Final = 1 << 21
"""Bytes of a message that are taken at most."""
CAPABILITIES: Final = {
    "max_msg_fds": 16,
    "max_data_xfer_size": 1048576,
    "pgsizes": 4096,
    "max_dma_maps": 65535,
    "write_multiple": True,
}
"""What is said of this client, as QEMU does."""


@dataclass(slots=True)
class Answer:
    """A message of the server.

    Attributes:
        number: Its message ID.
        command: Its command.
        flags: Of its header.
        error: The error number of its header.
        payload: What follows the header.
        fds: Descriptors that came with it; the link closes them.
    """

    number: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether it says that the request failed."""
        return bool(self.flags & HeaderFlag.ERROR)


class VfioLink(RawLink):
    """One connection to a vfio-user server. For one thread; see :class:`RawLink`.

    What the server asks for itself (DMA_READ, DMA_WRITE) is refused.

    Attributes:
        capabilities: What the server said it can do; empty before VERSION.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._number = 0
        self.capabilities: dict[str, Any] = {}

    def message(
        self,
        command: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
        number: int | None = None,
        size: int | None = None,
    ) -> int:
        """Send a message; its ID.

        Args:
            command: Its command.
            payload: What follows the header.
            fds: Descriptors, which stay the caller's.
            flags: Of the header.
            number: Its ID; None for the next one.
            size: The size that the header says, if not the true one.
        """
        if number is None:
            number = self._number = (self._number + 1) % (1 << 16)
        said = HEADER_SIZE + len(payload) if size is None else size
        self.send(_HEADER.pack(number, command, said, flags, 0) + payload, fds)
        return number

    def receive(self, timeout: float | None = None) -> Answer:
        """Wait for the next answer.

        Raises:
            HungUpError: The server has closed the connection.
            SilentError: Nothing came in time.
            FailError: What came is no message.
        """
        limit = self._patience if timeout is None else timeout
        deadline = time.monotonic() + limit
        while True:
            self._fill(HEADER_SIZE, deadline, limit)
            number, command, size, flags, error = _HEADER.unpack_from(self._came)
            if not HEADER_SIZE <= size <= _LONGEST:
                raise FailError(f"sent a message that says it has {size} bytes")
            self._fill(size, deadline, limit)
            payload = bytes(self._came[HEADER_SIZE:size])
            del self._came[:size]
            fds, self._came_fds = self._came_fds, []
            if flags & HeaderFlag.TYPE == HeaderFlag.REPLY:
                return Answer(number, command, flags, error, payload, fds)
            if command not in (Command.DMA_READ, Command.DMA_WRITE):
                raise FailError(f"asked for {command_name(command)}, which no server asks for")
            if not flags & HeaderFlag.NO_REPLY:
                self.send(Header(number, command, 0).refuse(14))

    def ask(
        self,
        command: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        number: int | None = None,
    ) -> Answer:
        """Send a command and wait for its answer, whose header is judged.

        Raises:
            FailError: The header is wrong.
            HungUpError: The connection was closed instead.
            SilentError: Nothing came in time.
        """
        name = command_name(command)
        sent = self.message(command, payload, fds, number=number)
        try:
            answer = self.receive()
        except SilentError:
            raise SilentError(f"{name} was not answered within {self._patience:g} s") from None
        except HungUpError:
            raise HungUpError(f"closed the connection at {name}") from None
        self.judge(answer, sent, command)
        return answer

    @staticmethod
    def judge(answer: Answer, number: int, command: int) -> None:
        """Judge the header of an answer.

        Raises:
            FailError: It is another's, or its error flag and number disagree.
        """
        name = command_name(command)
        if answer.number != number:
            raise FailError(f"{name} with ID {number} was answered with ID {answer.number}")
        if answer.command != command:
            raise FailError(f"{name} was answered with {command_name(answer.command)}")
        if answer.failed and not answer.error:
            raise FailError(f"{name} failed without an error number")

    def do(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send an honest command, which must not fail; what its answer has.

        Raises:
            FailError: It was refused.
        """
        answer = self.ask(command, payload, fds)
        if answer.failed:
            raise FailError(f"{command_name(command)} was refused with error {answer.error}")
        return answer.payload

    def version(self, minor: int = 1, data: bytes | None = None, *, major: int = 0) -> Answer:
        """Ask for a version, with version data of our own or of the caller's."""
        if data is None:
            data = json.dumps({"capabilities": CAPABILITIES}).encode() + b"\0"
        return self.ask(Command.VERSION, struct.pack("<HH", major, minor) + data)

    def negotiate(self) -> None:
        """Agree on a version, as any client does.

        Raises:
            FailError: That was refused, or the answer makes no sense.
        """
        answer = self.version()
        if answer.failed:
            raise FailError(f"VERSION was refused with error {answer.error}")
        text = answer.payload[4:].rstrip(b"\0")
        try:
            said = json.loads(text) if text else {}
            found = said.get("capabilities", {})
            self.capabilities = dict(found)
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise FailError(
                f"the version data is no JSON with capabilities: {text[:60]!r}"
            ) from None

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Read from a region, which must not fail.

        Raises:
            FailError: It was refused, or the answer is of another size.
        """
        answer = self.do(Command.REGION_READ, REGION_ACCESS.pack(offset, region, count))
        if len(answer) != REGION_ACCESS.size + count:
            raise FailError(
                f"a read of {count} bytes was answered with {len(answer)}, not "
                f"{REGION_ACCESS.size + count}"
            )
        return answer[REGION_ACCESS.size :]

    def write(self, region: int, offset: int, data: bytes) -> bytes:
        """Write to a region, which must not fail; what the answer has."""
        return self.do(Command.REGION_WRITE, REGION_ACCESS.pack(offset, region, len(data)) + data)
