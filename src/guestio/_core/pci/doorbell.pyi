from collections.abc import Callable

from typing_extensions import disjoint_base

@disjoint_base
class Doorbell:
    """A range of a BAR's registers where a driver's writes are handled in the core.

    A device registers it with `PciHost.add_doorbell`. It is made in Cython: a subclass overrides
    the C methods ``ring`` and ``serve``; `CallbackDoorbell` and `EventfdDoorbell` are ready-made
    ones. All is called in the thread of the event loop, with the GIL held.
    """

@disjoint_base
class EventfdDoorbell(Doorbell):
    """Adds one to an eventfd when it is rung; several times in a turn count as one.

    Args:
        fd: The eventfd, which stays the caller's and is open while the doorbell is registered.

    Raises:
        TypeError, ValueError: That is no descriptor.
    """
    def __init__(self, fd: int) -> None: ...

@disjoint_base
class CallbackDoorbell(Doorbell):
    """Calls a Python function for what was written.

    Of several writes to one offset in a turn only the last one is passed on, in the order of the
    first ones, as suits the tail of a queue.

    Args:
        callback: Called with ``(offset, size, value)``.

    Raises:
        TypeError: It cannot be called.
    """
    @property
    def callback(self) -> Callable[[int, int, int], object]: ...
    def __init__(self, callback: Callable[[int, int, int], object]) -> None: ...

@disjoint_base
class Doorbells:
    """The doorbells of a device, by BAR and offset, and those that were rung.

    Args:
        failed: Called with the name of a method of a doorbell that raised, while the exception is
            being handled.

    Attributes:
        silent: BARs whose writes ring nothing at the moment, as bits.

    For the thread of the event loop.
    """

    silent: int
    def __init__(self, failed: Callable[[str], object]) -> None: ...
    def __len__(self) -> int: ...
    def add(self, bar: int, offset: int, size: int, width: int, doorbell: Doorbell) -> None:
        """Register a doorbell.

        Args:
            bar: The BAR's index.
            offset: Where it begins.
            size: Its bytes, at least 1.
            width: Bytes of a write at most: 1, 2, 4 or 8. Wider ones do not ring it.
            doorbell: What is rung.

        Raises:
            ValueError: Bad numbers, or it overlaps another one; nothing changed.
        """
    def remove(self, bar: int, offset: int) -> None:
        """Remove the doorbell that begins at ``offset``; it is rung and served no more.

        Raises:
            ValueError: There is none.
        """
    def write(self, bar: int, offset: int, size: int, value: int) -> bool:
        """A driver's write, which may be one to a doorbell.

        Returns:
            Whether a doorbell was rung for it; :meth:`serve_rung` is to be called then.
        """
    def serve_rung(self) -> bool:
        """Have the doorbells that were rung serve; whether there is more to do."""
    def finish(self) -> None:
        """Have the doorbells that were rung serve once more, and forget the rest: before a reset.

        A reset that comes while they serve, as one of them waits for an answer, has them forget all.
        """
    def forget_rung(self) -> None:
        """Serve nothing of what was rung for so far: its driver is gone."""
