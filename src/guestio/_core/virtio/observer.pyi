from collections.abc import Callable
from typing import Self, TypeAlias

from typing_extensions import disjoint_base

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.trace.latencies import Latencies
from guestio._core.virtio.areas import RingAreas
from guestio._core.virtio.loop import Feed

_Piece: TypeAlias = tuple[int, int, bool]
_Request: TypeAlias = tuple[int, int, bool, int | None, int | None, int, int, list[_Piece]]
_Completion: TypeAlias = tuple[int, int, int, int]

DRIVER: str
DEVICE: str

@disjoint_base
class RingObserver(RingAreas):
    """A split ring that others use.

    Args:
        space, size, desc, avail, used, event_idx: As for :class:`Ring`; nothing is written.
        indirect: VIRTIO_F_INDIRECT_DESC was negotiated.
        base: Index of the next available entry that the device takes.
        queue, origin: Its number and that of its server, for records of tracepoints.
        block: Whether requests are those of a disk, whose kind and sector are of interest.
        latencies: Where to count how long requests took, while that is measured.
        own: Where the rings are that the device has, if this relays; None if it only reads.
            Without VIRTIO_F_EVENT_IDX then.
        own_avail, own_used: Their addresses there.

    Attributes:
        next_avail: The ring position that is looked at next.
        next_used: The same of the used ring.
        taken: Requests that the driver made available.
        completed: Requests that the device gave back.
        unseen: Those of the first of which nothing is known: they were looked at too late.
        bytes: Bytes of those that were seen.
        notifications: Notifications of the driver that passed.
        relays: Whether this relays.
        kick_fd, call_fd: The eventfds by which a relay notifies the device and the driver; -1 for
            none.
        to_kick, to_call: Whether a relay has to notify the device, the driver.
        violation: ``(who, what)`` once the driver or the device has broken a rule; nothing is
            looked at any more then. Who is ``"driver"`` or ``"device"``.

    One thread at a time.
    """

    notifications: int
    kick_fd: int
    call_fd: int
    to_kick: bool
    to_call: bool
    @property
    def next_avail(self) -> int: ...
    @property
    def next_used(self) -> int: ...
    @property
    def taken(self) -> int: ...
    @property
    def completed(self) -> int: ...
    @property
    def unseen(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def queue(self) -> int: ...
    @property
    def origin(self) -> int: ...
    @property
    def violation(self) -> tuple[str, str] | None: ...
    @property
    def waits(self) -> bool:
        """Whether a translation that comes now may tell more."""
    @property
    def depth(self) -> int:
        """Requests that the device has."""
    @property
    def relays(self) -> bool: ...
    @property
    def resolved_areas(self) -> bool:
        """Whether the memory of the ring can be reached."""
    def __new__(
        cls,
        space: AddressSpace,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        event_idx: bool = ...,
        indirect: bool = ...,
        base: int = ...,
        queue: int = ...,
        origin: int = ...,
        block: bool = ...,
        latencies: Latencies | None = ...,
        own: AddressSpace | None = ...,
        own_avail: int = ...,
        own_used: int = ...,
    ) -> Self: ...
    def look(
        self, requests: list[_Request] | None = ..., completions: list[_Completion] | None = ...
    ) -> bool:
        """Find out what has happened since the last look.

        Args:
            requests: Requests are added to it, each as ``(head, position, known, kind, sector,
                readable bytes, writable bytes, pieces)``; kind and sector are those of a disk, or
                None; pieces are ``(address, bytes, whether the device writes it)``.
            completions: What was given back is added to it, as ``(head, written, since, now)``;
                times in ns, the first 0 if it is not known.

        Returns:
            Whether anything has happened.
        """
    def note_notification(self) -> None:
        """Count that the driver is notified."""
    def rebind(self, space: AddressSpace) -> None:
        """Go on in other memory."""

@disjoint_base
class EventRelay(Feed):
    """An eventfd on its way from a driver to a device, or back; the loop's thread passes it on.

    Args:
        callback: Called once a rule of the ring was broken, and where Python is to pass it on.
        source: The eventfd, which is waited for by its edge and not read.
        observer: Looks at the ring before it is passed on.
        target: The eventfd to notify instead, or -1 where the other side waits for the same one.
        call: Whether it notifies the driver.

    Attributes:
        passed: How often it was signaled, as far as that was seen.
        by_python: Whether Python passes it on: the loop then calls back for its descriptor.
    """

    by_python: bool
    @property
    def passed(self) -> int: ...
    def __init__(
        self,
        callback: Callable[[], None],
        patience: float,
        source: int,
        observer: RingObserver,
        *,
        target: int = ...,
        call: bool = ...,
    ) -> None: ...
    def pass_on(self) -> None:
        """Notify the other side, from Python."""
    def close(self) -> None:
        """Look at the descriptor no more."""
    def settle(self) -> None:
        """Learn that Python knows of a broken rule."""
