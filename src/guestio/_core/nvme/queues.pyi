from collections.abc import Callable, Iterable, Sequence
from typing import final

from guestio._core.memory.image import ImageFile
from guestio._core.pci.doorbell import Doorbell
from guestio.memory import GuestMemory

INVALID_REGISTER: int
INVALID_VALUE: int
BROKEN: int

@final
class Namespace:
    """What reads and writes of a namespace are served from.

    Args:
        image: The file.
        shift: Bits of a block's size.
        writable: Whether writes are served.
    """
    def __init__(self, image: ImageFile, shift: int, writable: bool) -> None: ...

@final
class NvmeQueues(Doorbell):
    """The queues of a controller, and the doorbell for all of them.

    Args:
        memory: What the function reaches by DMA, a `BusMemory`.
        most: Queues of each kind, that of the admin commands included; 2 to 64.
        command: Called with the queue's number and the entry's 64 bytes for each command that is
            not served here. It ends with :meth:`complete` or :meth:`forget`, at once or later.
        interrupt: Called with a vector when completions were posted, if it has no eventfd; see
            :meth:`set_calls`.
        fault: Called with INVALID_REGISTER, INVALID_VALUE or BROKEN and what happened, when a
            doorbell is wrong, or a queue cannot be accessed: then all queues stand still.
        max_transfer: Bytes of a command's data at most.
        turn_bytes: Bytes that are moved in a turn; the last command may exceed it.
        turn_seconds: Seconds that a turn takes, but for the command that is served then.

    Attributes:
        fast: Whether reads and writes are served here at all.
        write_through: Whether writes are left to the controller, which flushes them.
        commands: Commands fetched.
        origin: The server's number in records of tracepoints.
        served: Those of them that were served here.
        reads: Reads served here.
        writes: Writes served here.
        bytes_read: Bytes of them.
        bytes_written: The same of writes.

    Threads: one, that of the event loop.
    """

    fast: bool
    write_through: bool
    origin: int
    def __init__(
        self,
        memory: GuestMemory,
        *,
        most: int,
        command: Callable[[int, bytes], object],
        interrupt: Callable[[int], object],
        fault: Callable[[int, str], object],
        max_transfer: int,
        turn_bytes: int,
        turn_seconds: float,
    ) -> None: ...
    @property
    def commands(self) -> int: ...
    @property
    def served(self) -> int: ...
    @property
    def reads(self) -> int: ...
    @property
    def writes(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    def set_calls(self, fds: Sequence[int]) -> None:
        """Signal eventfds for completions of the first vectors, -1 for one that has none.

        They stay the caller's, and are open until others are set.
        """
    @property
    def masked(self) -> int:
        """Bits of the vectors that are masked."""
    def reset(self) -> None:
        """Forget all queues, the shadow doorbells and what is not completed."""
    def set_namespaces(self, namespaces: Iterable[Namespace]) -> None:
        """Serve reads and writes of these from now on; the first has the number 1."""
    def create_completion_queue(self, number: int, address: int, size: int, vector: int) -> None:
        """Make a completion queue; ``vector`` is -1 for none."""
    def create_submission_queue(
        self, number: int, address: int, size: int, completions: int
    ) -> None:
        """Make a submission queue, whose commands complete in a queue that exists."""
    def delete_submission_queue(self, number: int) -> None:
        """Take a submission queue away, and the commands in it; none is outstanding any more."""
    def stop_submission_queue(self, number: int) -> None:
        """Fetch nothing more from a submission queue, which is to be deleted."""
    def delete_completion_queue(self, number: int) -> None:
        """Take a completion queue away that no submission queue uses."""
    def has_submission_queue(self, number: int) -> bool:
        """Whether there is such a queue."""
    def has_completion_queue(self, number: int) -> bool:
        """Whether there is such a queue."""
    def users(self, number: int) -> int:
        """Submission queues that complete in a completion queue."""
    def outstanding(self, number: int) -> int:
        """Commands of a submission queue that are neither completed nor forgotten."""
    def set_shadow(self, doorbells: int, events: int) -> None:
        """Use shadow doorbells and event indices at these addresses; 0 for none."""
    def mask(self, bits: int) -> None:
        """Raise no interrupts of these vectors, as INTMS wants it."""
    def unmask(self, bits: int) -> None:
        """Undo :meth:`mask`; what was posted meanwhile is interrupted for now."""
    def complete(
        self, number: int, cid: int, status: int, result: int = 0, *, counted: bool = True
    ) -> bool:
        """Post a completion, and interrupt for it unless a batch is being served.

        Args:
            number: The submission queue.
            cid: The command's identifier.
            status: Status code, and its type from bit 8 on; bit 14 says not to try again.
            result: Dword 0 of the entry.
            counted: Whether the command is outstanding; not one that was forgotten.

        Returns:
            False if there is no free entry, which only happens to one that is not counted.
        """
    def forget(self, number: int) -> None:
        """Stop counting a command that is completed some time, or never: it keeps no entry free."""
    def resume(self) -> bool:
        """Go on where the function was not bus master; whether there is more to do."""
