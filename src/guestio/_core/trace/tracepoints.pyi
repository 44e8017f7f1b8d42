from collections.abc import Container
from typing import Self

from typing_extensions import Buffer, disjoint_base

VERSION: int
RECORD_BYTES: int
MOST_RINGS: int
NORMAL_CAPACITY: int
NO_QUEUE: int
NO_HEAD: int
GROUPS: dict[str, int]
CORE_WHAT: dict[str, int]

def wanted() -> int:
    """The groups that are written at this moment: bits of ``GROUPS``."""

def want(groups: int) -> None:
    """Have these groups written from now on, and no others."""

def set_capacity(records: int) -> None:
    """Have the rings of threads that write their first record from now on hold so many.

    Raises:
        ValueError: Not in 1..2**24.
    """

def enlarge(records: int) -> None:
    """Have all threads go on in rings that hold so many at least, until all rings are released.

    The GIL keeps every thread from writing at this moment.

    Raises:
        ValueError: Not in 1..2**24.
    """

def unheld() -> int:
    """Records that were lost because their thread has no ring: there were too many, or no memory."""

def told() -> int:
    """How many records :func:`put` has written: events of Python code, which are rare."""

def put(
    what: int,
    *,
    origin: int = 0,
    queue: int = 0xFFFF,
    head: int = 0xFFFFFFFF,
    address: int = 0,
    length: int = 0,
    detail: int = 0,
    access: int = 0,
    result: int = 0,
    since: int = 0,
    time: int = 0,
) -> None:
    """Write a record in the calling thread's ring, whatever groups are wanted.

    Raises:
        OverflowError: A value does not fit its field.
    """

def put_whole(
    *,
    time: int,
    since: int,
    taken: int,
    served: int,
    address: int,
    offset: int,
    readable: int,
    writable: int,
    written: int,
    position: int,
    head: int,
    origin: int,
    queue: int,
    access: int,
) -> None:
    """Write a request in place of its records TAKEN, SERVED and COMPLETED, as rings of queues do.

    Raises:
        OverflowError: A value does not fit its field.
    """

def spell_out(found: Buffer) -> bytes:
    """The records that what was read from a ring stands for.

    Args:
        found: What :meth:`RingReader.read` returned, or several of them one after the other.

    Returns:
        Bytes of 64 for each, in the order of time if that is the order of what was given.

    Raises:
        ValueError: It is no whole number of records.

    Cost: two passes; the GIL is released.
    """

def release() -> None:
    """Give the memory of all rings back. Readers keep what they have; threads that write get others.

    The GIL keeps every thread from writing at this moment.
    """

def rings() -> list[tuple[int, int]]:
    """``(number, fd)`` of each ring of this process, the newest first. The descriptors stay its."""

def open_rings(known: Container[int] = ()) -> list[RingReader]:
    """A :class:`RingReader` of each ring of this process whose number is not among ``known``."""

@disjoint_base
class RingReader:
    """Reads one ring, of this process or another, from the oldest record that is there.

    Args:
        fd: The ring's descriptor; it is not kept.

    Attributes:
        number: Of the ring in its process.
        process: The process that writes it.
        capacity: Records that it holds.
        lost: Records that were written over before they were read, so far.
        position: Number of the record that is read next; so many were read or lost.

    Raises:
        OSError: It cannot be mapped; EPROTO if it is no ring of this version.

    One thread at a time. The writer is never stopped.
    """
    def __new__(cls, fd: int) -> Self: ...
    @property
    def number(self) -> int: ...
    @property
    def process(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def lost(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def written(self) -> int:
        """Records written to the ring so far."""
    def skip(self) -> None:
        """Read from what is written next; what was written before counts as neither."""
    def read(self, most: int = ...) -> bytes:
        """The records that were not read yet, oldest first, as bytes of 64 each; see `spell_out`.

        Args:
            most: Records at most.

        Cost: a copy; the GIL is released.
        """
