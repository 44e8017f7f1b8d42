"""What a session wants of the back-end it speaks for.

A `Session` decides what the protocol lets it decide and leaves the rest to a `SessionHandler`,
which therefore sees valid arguments only. The numbers it speaks of are those of
`guestio.vhost_user.session`.

Source: QEMU docs/interop/vhost-user.rst, "Front-end message types".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guestio.vhost_user.messages import Inflight, IotlbMessage, Log, MemoryRegion, VringAddr


class SessionHandler(Protocol):
    """What a back-end does when the front-end wants something done.

    Every fd passed to a method belongs to the handler from the call on, also if the method raises.
    Any method may raise a `GuestioError` to refuse; it must then have changed nothing. Other
    exceptions are bugs and pass through `Session.handle`.
    """

    @property
    def features(self) -> int:
        """Virtio feature bits the device offers, without VHOST_USER_F_PROTOCOL_FEATURES."""
        ...

    @property
    def protocol_features(self) -> int:
        """`ProtocolFeature` bits offered; see `SUPPORTED_PROTOCOL_FEATURES`."""
        ...

    @property
    def num_queues(self) -> int:
        """Rings the device has, 1 to `MAX_QUEUES`."""
        ...

    @property
    def max_mem_slots(self) -> int:
        """Most memory regions at a time, at least 1."""
        ...

    def set_features(self, features: int) -> None:
        """Take over the negotiated virtio features, a subset of `features`.

        Indirect tables and event indices may be among them without having been offered.

        Called again with others after a reset. No ring is started at that time unless the features
        are the same as before.
        """
        ...

    def set_memory_table(self, regions: Sequence[tuple[MemoryRegion, int]]) -> None:
        """Replace all guest memory by these regions and their fds."""
        ...

    def add_memory_region(self, region: MemoryRegion, fd: int) -> None:
        """Add a region; it overlaps no other."""
        ...

    def remove_memory_region(self, region: MemoryRegion) -> None:
        """Remove a region, one that was added or set before.

        Nothing may use its memory when this returns.
        """
        ...

    def set_vring_num(self, index: int, num: int) -> None:
        """Set a ring's size: a power of two up to `MAX_QUEUE_SIZE`."""
        ...

    def set_vring_addr(self, index: int, address: VringAddr) -> None:
        """Set where a ring is: IOVAs with VIRTIO_F_ACCESS_PLATFORM, else user addresses.

        They are aligned as virtio asks for and do not pass 2**64; whether memory is there is for
        the handler to find out. May come for a running ring.
        """
        ...

    def set_vring_base(self, index: int, base: int) -> None:
        """Set the next available index, 0 to 65535."""
        ...

    def get_vring_base(self, index: int) -> int:
        """Stop a ring and return its next available index, 0 to 65535.

        Requests in flight are finished before this returns. The kick fd is to be forgotten: the
        ring starts again with the next `set_vring_kick`. Also called for rings never started.
        """
        ...

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        """Set the eventfd that announces buffers; None asks for polling."""
        ...

    def set_vring_call(self, index: int, fd: int | None) -> None:
        """Set the eventfd to signal used buffers; None: the driver polls."""
        ...

    def set_vring_err(self, index: int, fd: int | None) -> None:
        """Set the eventfd to signal errors; None: errors are not signaled."""
        ...

    def set_vring_enable(self, index: int, enable: bool) -> None:
        """Enable or disable a ring, in every state of it; rings begin disabled."""
        ...

    def set_backend_channel(self, fd: int) -> None:
        """Take the socket for requests of our own; it replaces an earlier one."""
        ...

    def get_config(self, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes of the configuration space."""
        ...

    def set_config(self, offset: int, data: bytes, flags: int) -> None:
        """Write the configuration space; `flags` are `ConfigFlag` bits.

        Fields that are read-only for the driver are refused unless LIVE_MIGRATION is set.
        """
        ...

    def iotlb(self, message: IotlbMessage) -> None:
        """Apply an UPDATE or INVALIDATE; its ranges are not empty and do not pass 2**64.

        Whether an UPDATE's `uaddr` range is guest memory is for the handler to check. When this
        returns from an INVALIDATE, nothing uses the old translations: it is acknowledged then. The
        whole space is one INVALIDATE of `size` 2**64.
        """
        ...

    def get_status(self) -> int:
        """Return the virtio device status, 8 bits."""
        ...

    def set_status(self, status: int) -> None:
        """Take over the virtio device status, 8 bits; 0 resets like `reset_device`."""
        ...

    def reset_device(self) -> None:
        """Stop and disable all rings and forget their set-up; memory and features stay."""
        ...


@runtime_checkable
class InflightHandler(Protocol):
    """What a `SessionHandler` has if it offers INFLIGHT_SHMFD.

    Neither method is called while a ring is started. The region that came or went last is the one
    that rings use when they are started.
    """

    def get_inflight(self, num_queues: int, queue_size: int) -> tuple[Inflight, int]:
        """Make an empty region.

        Args:
            num_queues: Rings it is for, from the first on; not more than the device has.
            queue_size: Entries of the largest of them, 1 to 32768.

        Returns:
            Its description and its fd. The fd stays the handler's, which keeps it open until the
            next message comes.
        """
        ...

    def set_inflight(self, inflight: Inflight, fd: int) -> None:
        """Take over a region from an earlier connection; the fd is the handler's from here on.

        The numbers of queues and entries are as for `get_inflight`. Whether the file has
        what is described is for the handler to find out.
        """
        ...


@runtime_checkable
class LogHandler(Protocol):
    """What a `SessionHandler` has if it offers LOG_SHMFD, and with it VHOST_F_LOG_ALL.

    Both methods may be called while rings are running, and do not stop them. Pages are marked while
    logging is on and there is a log. A log stays until another one takes its place, also over a
    reset and while logging is off.
    """

    def set_log(self, log: Log, fd: int) -> None:
        """Mark in another log, from the end of the call on in that one alone.

        Whether the file has what is described is for the handler to find out.
        """
        ...

    def set_logging(self, enable: bool) -> None:
        """Switch logging on or off; it begins off."""
        ...


@runtime_checkable
class StateHandler(Protocol):
    """What a `SessionHandler` has if it offers DEVICE_STATE.

    No method is called while a ring is started. The state travels in a file of the handler's own,
    which the front-end is given; it stays the handler's and open until the next message comes.
    """

    def save_state(self) -> int:
        """Return a file to read the device's state from, to its end."""
        ...

    def load_state(self) -> int:
        """Return a file to write a device's state to; :meth:`check_state` takes it from there."""
        ...

    def check_state(self) -> None:
        """End the transfer that began last: the front-end has read or written everything.

        Raises:
            GuestioError: None has begun, or what was written is no state of this device's.
        """
        ...


@runtime_checkable
class AnnounceHandler(Protocol):
    """What a `SessionHandler` has if it offers RARP."""

    def send_rarp(self, address: bytes) -> None:
        """Have the network learn where a hardware address is, six bytes, after a migration."""
        ...
