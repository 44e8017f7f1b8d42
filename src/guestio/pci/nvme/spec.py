"""Numbers of the NVMe specification, revision 1.4: registers, opcodes, status codes, ...."""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

VERSION: Final = 0x00010400
PAGE: Final = 4096
"""Bytes of a memory page: CC.MPS is 0, the only one that CAP allows."""
ENTRY_BITS: Final = 6
COMPLETION_BITS: Final = 4
ALL_NAMESPACES: Final = 0xFFFFFFFF
DOORBELLS: Final = 0x1000


class Register(enum.IntEnum):
    """Offsets of the controller's registers (section 3.1)."""

    CAP = 0x00
    VS = 0x08
    INTMS = 0x0C
    INTMC = 0x10
    CC = 0x14
    CSTS = 0x1C
    NSSR = 0x20
    AQA = 0x24
    ASQ = 0x28
    ACQ = 0x30


CC_ENABLE: Final = 1
CC_SHUTDOWN: Final = 3 << 14
CSTS_READY: Final = 1
CSTS_FATAL: Final = 2
CSTS_SHUTTING_DOWN: Final = 1 << 2
CSTS_SHUT_DOWN: Final = 2 << 2


class Admin(enum.IntEnum):
    """Opcodes of admin commands (section 5)."""

    DELETE_SQ = 0x00
    CREATE_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_CQ = 0x04
    CREATE_CQ = 0x05
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT = 0x0C
    DOORBELL_BUFFER = 0x7C


class Io(enum.IntEnum):
    """Opcodes of I/O commands (section 6)."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    COMPARE = 0x05
    WRITE_ZEROES = 0x08
    DATASET = 0x09
    VERIFY = 0x0C


class Status(enum.IntEnum):
    """Status codes, with their types from bit 8 on (section 4.6.1)."""

    SUCCESS = 0x00
    INVALID_OPCODE = 0x01
    INVALID_FIELD = 0x02
    TRANSFER_ERROR = 0x04
    INTERNAL = 0x06
    ABORTED = 0x07
    ABORTED_QUEUE_DELETED = 0x08
    INVALID_NAMESPACE = 0x0B
    INVALID_SGL_SEGMENT = 0x0D
    INVALID_SGL_COUNT = 0x0E
    SGL_LENGTH = 0x0F
    SGL_TYPE = 0x11
    PRP_OFFSET = 0x13
    WRITE_PROTECTED = 0x20
    LBA_RANGE = 0x80
    CQ_INVALID = 0x100
    QUEUE_ID = 0x101
    QUEUE_SIZE = 0x102
    EVENT_LIMIT = 0x105
    INTERRUPT_VECTOR = 0x108
    LOG_PAGE = 0x109
    QUEUE_DELETION = 0x10C
    NOT_SAVEABLE = 0x10D
    NOT_CHANGEABLE = 0x10E
    NOT_NAMESPACE_SPECIFIC = 0x10F
    WRITE_FAULT = 0x280
    READ_ERROR = 0x281
    COMPARE_FAILURE = 0x285


DO_NOT_RETRY: Final = 1 << 14

RETRIED: Final = frozenset(
    {Status.INTERNAL, Status.ABORTED, Status.ABORTED_QUEUE_DELETED, Status.WRITE_FAULT}
)
"""What may go well another time; every other failure will not, and says so."""


class Feature(enum.IntEnum):
    """Identifiers of features (section 5.21.1)."""

    ARBITRATION = 0x01
    POWER = 0x02
    TEMPERATURE = 0x04
    ERROR_RECOVERY = 0x05
    WRITE_CACHE = 0x06
    QUEUES = 0x07
    COALESCING = 0x08
    VECTOR = 0x09
    ATOMICITY = 0x0A
    EVENTS = 0x0B
    TIMESTAMP = 0x0E


class Log(enum.IntEnum):
    """Identifiers of log pages (section 5.14.1)."""

    ERRORS = 0x01
    HEALTH = 0x02
    FIRMWARE = 0x03
    CHANGED_NAMESPACES = 0x04
    EFFECTS = 0x05


class Event(NamedTuple):
    """An asynchronous event (section 5.2).

    Attributes:
        kind: 0 error, 1 health, 2 notice.
        info: Which one.
        log: The log page that tells more; reading it lets the next event of the kind come.
    """

    kind: int
    info: int
    log: Log

    @property
    def result(self) -> int:
        """Dword 0 of the completion."""
        return self.kind | self.info << 8 | self.log << 16


INVALID_DOORBELL: Final = Event(0, 0, Log.ERRORS)
INVALID_DOORBELL_VALUE: Final = Event(0, 1, Log.ERRORS)
NAMESPACE_CHANGED: Final = Event(2, 0, Log.CHANGED_NAMESPACES)
TEMPERATURE_EVENT: Final = Event(1, 1, Log.HEALTH)


class Failed(Exception):  # noqa: N818 - not an error of ours but the driver's answer
    """A command fails with a status.

    Attributes:
        status: Which.
        place: The byte of the command that is wrong; None if none is.
    """

    def __init__(self, status: Status, place: int | None = None) -> None:
        super().__init__(status)
        self.status, self.place = status, place


class Command:
    """A submission queue entry (section 4.2).

    Attributes:
        queue: Its submission queue.
        data: Its 64 bytes.
        life: Of the controller, which begins anew with each reset.
    """

    def __init__(self, queue: int, data: bytes, life: int = 0) -> None:
        self.queue = queue
        self.data = data
        self.life = life
        self.opcode = data[0]
        self.flags = data[1]
        self.cid = int.from_bytes(data[2:4], "little")
        self.nsid = self.word(1)

    def word(self, number: int) -> int:
        """A dword of the command."""
        return int.from_bytes(self.data[4 * number : 4 * number + 4], "little")

    def quad(self, number: int) -> int:
        """Two dwords from a number on."""
        return int.from_bytes(self.data[4 * number : 4 * number + 8], "little")
