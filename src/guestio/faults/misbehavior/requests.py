"""What a rule can say of a request: its kind, its sectors, the bytes of its data.

Source: virtio 1.4 sections 5.1.2, 5.2.6, 5.3.2, 5.4.6, 5.8.2.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from guestio._core.virtio.chain import Chain
from guestio.errors import GuestioError
from guestio.virtio.blk import T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES
from guestio.virtio.device import DeviceId
from guestio.virtio.image import SECTOR

_BLK: Final = {
    T_IN: "read",
    T_OUT: "write",
    T_FLUSH: "flush",
    T_GET_ID: "get-id",
    T_DISCARD: "discard",
    T_WRITE_ZEROES: "write-zeroes",
}
_HEADER: Final = struct.Struct("<IIQ")
_TRIM: Final = struct.Struct("<QI4x")

OPS: Final[dict[int, tuple[str, ...]]] = {
    DeviceId.BLOCK: (*_BLK.values(), "other"),
    DeviceId.NET: ("receive", "transmit", "control"),
    DeviceId.CONSOLE: ("input", "output", "control-input", "control-output"),
    DeviceId.ENTROPY: ("fill",),
    DeviceId.INPUT: ("event", "status"),
}
"""Kinds of request, by type of device; ``request`` for the types that are not here."""

TITLES: Final[dict[int, str]] = {
    DeviceId.BLOCK: "a disk",
    DeviceId.NET: "a network card",
    DeviceId.CONSOLE: "a console",
    DeviceId.ENTROPY: "an entropy device",
    DeviceId.INPUT: "an input device",
}


class Request(NamedTuple):
    """A request, as far as rules can tell.

    Attributes:
        queue: Its queue.
        op: Its kind.
        size: Bytes of its data, in either direction.
        sector: The first and the last sector, of a disk; None if it has none.
        status: Whether its last writable byte is a status, not data.
    """

    queue: int
    op: str
    size: int
    sector: tuple[int, int] | None = None
    status: bool = False

    @property
    def where(self) -> dict[str, int | tuple[int, int]]:
        """What the selectors of a rule go by."""
        found: dict[str, int | tuple[int, int]] = {"queue": self.queue, "size": self.size}
        if self.sector is not None:
            found["sector"] = self.sector
        return found

    def __str__(self) -> str:
        sectors = ""
        if self.sector is not None:
            sectors = f", sectors {self.sector[0]} to {self.sector[1]}"
        return f"{self.op} of {self.size} bytes on queue {self.queue}{sectors}"


def ops_of(device_id: int) -> Sequence[str]:
    """Kinds of request of a type of device."""
    return OPS.get(device_id, ("request",))


def describe(device_id: int, queue: int, chain: Chain, owned: bool) -> Request:
    """What a rule can say of a request.

    Args:
        device_id: Type of the device.
        queue: Its queue.
        chain: The request, not completed yet.
        owned: Whether the queue is one of ``device_queues``.
    """
    if device_id == DeviceId.BLOCK:
        return _describe_blk(queue, chain)
    size = chain.readable.total + chain.writable.total
    return Request(queue, _op(device_id, queue, owned), size)


def _op(device_id: int, queue: int, owned: bool) -> str:
    if device_id == DeviceId.NET:
        return "transmit" if queue % 2 else "receive" if owned else "control"
    if device_id == DeviceId.CONSOLE:
        # The second pair is the control queues.
        return ("control-" if queue in (2, 3) else "") + ("output" if queue % 2 else "input")
    if device_id == DeviceId.INPUT:
        return "status" if queue else "event"
    return "fill" if device_id == DeviceId.ENTROPY else "request"


def _describe_blk(queue: int, chain: Chain) -> Request:
    readable, room = chain.readable, max(chain.writable.total - 1, 0)
    status = bool(chain.writable.total)
    try:
        kind, _, sector = _HEADER.unpack(readable.read(0, _HEADER.size))
        op = _BLK.get(kind, "other")
        if op in ("discard", "write-zeroes"):
            sector, sectors = _TRIM.unpack(readable.read(_HEADER.size, _TRIM.size))
            size = sectors * SECTOR
        else:
            size = readable.total - _HEADER.size if op == "write" else room
    except (GuestioError, struct.error):
        # Not a whole header: the device will say so.
        return Request(queue, "other", room, None, status)
    span = (sector, sector + -(-size // SECTOR) - 1) if size and op != "get-id" else None
    return Request(queue, op, size, span, status)
