"""The exception tree: everything that guestio raises on purpose is a GuestioError.

Those that any part may raise are here. Those of one part are defined there, which is said below.

    GuestioError
    ├── AccessError                 an access to guest memory was refused
    │   ├── InvalidAddressError     no memory there
    │   ├── PermissionDeniedError   memory is there, the access is not allowed
    │   ├── MisalignedError         an atomic access off its natural alignment
    │   ├── PartialAccessError      some bytes moved, then the access failed
    │   ├── MemoryVanishedError     the file behind the memory was truncated
    │   ├── CannotResolveError      an IOMMU could not translate
    │   └── DmaFaultError           testing.host_iommu: a simulated device's access was not mapped
    ├── IotlbFails                  a lookup missed; lists every missing and forbidden sub-range
    ├── RegionError                 a collection of regions would be invalid
    │   ├── NoMemoryRegionError
    │   ├── MemoryRegionOverlapError
    │   └── UnsortedMemoryRegionsError
    ├── BackingError                host memory could not be made or adopted
    ├── QueueError                  the driver broke the rules of its virtqueue
    ├── ProtocolError               a peer broke the protocol
    ├── DeviceError                 a device cannot be built or cannot do what it was asked
    │   ├── DeviceMethodError       a method of the device raised something else
    │   ├── ServerGoneError         vfio_user.exchange: the connection to a server has ended
    │   ├── DeviceRestartedError    vfio_user.client: it is another server's device now
    │   └── NotReplayableError      observe.script: a recording lacks what its requests carried
    ├── DmaError                    dma.target: a DMA target refused or failed
    ├── ReentrantCallError          dma.changes: a DMA target called its manager back
    ├── AddonError                  faults.proxy.addon: a file that is no addon of a proxy
    ├── CaseError                   faults.fuzz.steps: a file holds no case that can be played
    ├── ExportError                 iommu.mapper: memory cannot be exported, or no more
    ├── Refused                     virtio.iommu.targets: a request's status; stays inside
    ├── PeerGoneError               peer.channel: the connection ended
    │   └── ConnectionLostError     peer.channel: it failed, as by a reset
    ├── RefusalError                vfio_user.messages: a request is refused, with an errno
    ├── RefusedError                vhost_user.request_channel: the back-end refused a request
    ├── InvariantError              testing.simulation.workload: a simulated device breaks a rule
    ├── NoAnswerError               vhost_user.request_channel: the back-end did not answer in time
    ├── RecordingError              observe.recording: a file holds no recording that can be read
    ├── BlkError                    guest.blkqueue: a disk answered a request with an error
    └── CorruptionError             guest.load: a disk returned other data than was written

Misuse by the caller of the API is ``TypeError`` or ``ValueError`` and raises before anything
changes. What a guest or a peer may cause is always a :class:`GuestioError`.
"""

from __future__ import annotations

import contextlib
import errno
from operator import index
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guestio.addr import IovaRange, Permissions


_E = TypeVar("_E", bound=BaseException)


class GuestioError(Exception):
    """Root of everything that guestio raises on purpose.

    Errors can be pickled, for another process; the region of an :class:`AccessError` is its text
    there.
    """

    def __reduce__(self) -> tuple[object, ...]:
        state = dict(vars(self))
        if state.get("region") is not None:
            state["region"] = str(state["region"])
        if isinstance(self, OSError):
            state["errno"] = self.errno
        return _restore, (type(self), self.args, state)


def _restore(kind: type[_E], args: tuple[object, ...], state: dict[str, object]) -> _E:
    """An error as it was pickled, without its constructor, whose arguments are others."""
    error = kind.__new__(kind, *args)
    error.args = args
    for name, value in state.items():
        setattr(error, name, value)
    return error


class AccessError(GuestioError):
    """An access to guest memory was refused.

    Attributes:
        addr: First address of the access, in the address space that was accessed.
        length: Bytes asked for.
        access: What the access wanted to do; None where it does not matter.
        reason: Why it was refused, without the address.
        target: The address behind a translation where the refusal happened; None without one, and
            where it is ``addr`` itself.
        region: The memory region that refused the access; None where there is none, or where it
            is not a region that refuses.
    """

    def __init__(
        self,
        addr: int,
        length: int,
        access: Permissions | None,
        reason: str,
        *,
        target: int | None = None,
        region: object | None = None,
    ) -> None:
        # Callers may have numpy's integers, whose sums wrap or become floats.
        addr, length = index(addr), index(length)
        self.addr = addr
        self.length = length
        self.access = access
        self.reason = reason
        self.target = target
        self.region = region
        wanted = f" for {access.name}" if access is not None and access.name else ""
        behind = f" (translated to {target:#x})" if target is not None else ""
        where = f" in {region}" if region is not None else ""
        super().__init__(f"cannot access {addr:#x}+{length:#x}{behind}{wanted}{where}: {reason}")


class InvalidAddressError(AccessError, ValueError):
    """No memory at ``addr``, or the range leaves memory or the address space."""


class PermissionDeniedError(AccessError):
    """Memory is there, but not for this kind of access."""


class MisalignedError(AccessError):
    """An atomic access whose address is not a multiple of its width."""


class MemoryVanishedError(AccessError, OSError):
    """The file behind this memory no longer reaches this far: its owner truncated it.

    What was moved before the end was found is unknown. It is an OSError too, with ``errno``
    EFAULT, which is what the kernel says when it meets such memory in a system call.
    """

    def __init__(
        self,
        addr: int,
        length: int,
        access: Permissions | None,
        reason: str,
        *,
        target: int | None = None,
        region: object | None = None,
    ) -> None:
        super().__init__(addr, length, access, reason, target=target, region=region)
        self.errno = errno.EFAULT


class PartialAccessError(AccessError):
    """An exact transfer that stopped early; ``completed`` bytes were moved.

    The cause of the stop is the exception's ``__cause__``.
    """

    def __init__(
        self,
        addr: int,
        length: int,
        access: Permissions | None,
        completed: int,
        reason: str,
        *,
        target: int | None = None,
        region: object | None = None,
    ) -> None:
        self.completed = completed
        moved = f"only {completed:#x} bytes moved: {reason}"
        super().__init__(addr, length, access, moved, target=target, region=region)


class CannotResolveError(AccessError):
    """An IOMMU could not translate a range for the wanted access.

    Attributes:
        iova_range: The sub-range that could not be resolved.
    """

    def __init__(self, iova_range: IovaRange, access: Permissions | None, reason: str) -> None:
        self.iova_range = iova_range
        super().__init__(iova_range.base, iova_range.length, access, reason)


class IotlbFails(GuestioError):  # noqa: N818 - the field's name for it
    """A lookup that was not a full hit: everything that is missing, everything forbidden.

    Attributes:
        misses: Sub-ranges without any mapping, ascending, clipped to the request.
        access_fails: Sub-ranges whose mapping forbids the access, ascending, clipped.
    """

    def __init__(self, misses: Sequence[IovaRange], access_fails: Sequence[IovaRange]) -> None:
        self.misses = list(misses)
        self.access_fails = list(access_fails)

        def show(ranges: list[IovaRange]) -> str:
            shown = ", ".join(f"{r.base:#x}+{r.length:#x}" for r in ranges[:4])
            return shown + (f" and {len(ranges) - 4} more" if len(ranges) > 4 else "")

        parts = []
        if self.misses:
            parts.append(f"not mapped: {show(self.misses)}")
        if self.access_fails:
            parts.append(f"access not allowed: {show(self.access_fails)}")
        super().__init__("; ".join(parts))


class RegionError(GuestioError):
    """A collection of memory regions would be invalid."""


class NoMemoryRegionError(RegionError):
    """There is no such region, or no region at all."""


class MemoryRegionOverlapError(RegionError):
    """Two regions claim the same addresses."""


class UnsortedMemoryRegionsError(RegionError):
    """Regions must be given in ascending order of their start."""


class BackingError(GuestioError):
    """Host memory could not be allocated, mapped or adopted."""


class QueueError(GuestioError):
    """The driver wrote something into its virtqueue that no driver may write.

    The queue stops; the device reports it (error eventfd, DEVICE_NEEDS_RESET).
    """


class ProtocolError(GuestioError):
    """The peer broke the protocol; its connection must be closed."""


class DeviceError(GuestioError):
    """A device cannot be built from what it was given, or cannot do what it was asked."""


class DeviceMethodError(DeviceError):
    """A method of a device raised what is no :class:`GuestioError`, which is the cause."""


@contextlib.contextmanager
def naming(device: object, method: str) -> Iterator[None]:
    """Have what a device's own method raises name its class and the method.

    Raises:
        DeviceMethodError: Something other than a `GuestioError` was raised inside.
    """
    try:
        yield
    except (GuestioError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise DeviceMethodError(
            f"{type(device).__name__}.{method} raised {type(error).__name__}: {error}"
        ) from error


def again(error: _E) -> _E:
    """A copy of an error that is kept, to be raised once more.

    The kept one would collect the traceback of each time, and keep alive whatever the functions in
    it refer to.
    """
    made = type(error).__new__(type(error))
    made.args = error.args
    made.__dict__.update(error.__dict__)
    return made
