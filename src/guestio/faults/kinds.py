"""What a check must know of a type of device: an honest request, and which features exist.

Source: virtio 1.4 chapter 5, by type.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

SECTOR: Final = 512


@dataclass(frozen=True, slots=True)
class Request:
    """An honest request, and what is wrong with an answer to it.

    Attributes:
        readable: What the device reads.
        room: Bytes that it may write.
        complaint: Given those bytes and the length in the used ring, says what is wrong, if
            anything.
    """

    readable: bytes
    room: int
    complaint: Callable[[bytes, int], str | None]


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of device.

    Attributes:
        name: As it is named to the command.
        title: For people.
        queue: The queue whose requests a device completes by itself.
        queues: The least number of queues.
        features: Feature bits that its type defines in virtio 1.4; None if that is unknown.
        request: Makes an honest request for that queue.
        beside: Queues that are started with it, and stay empty, for a back-end that serves none
            without them: DPDK wants a pair of a card's.
    """

    name: str
    title: str
    queue: int
    queues: int
    features: int | None
    request: Callable[[], Request]
    beside: tuple[int, ...] = ()


def bits(*numbers: int) -> int:
    """A mask of bits."""
    return sum(1 << number for number in numbers)


def _any_answer(_data: bytes, _length: int) -> str | None:
    return None


def blk_header(kind: int, sector: int = 0) -> bytes:
    """The header of a block request."""
    return struct.pack("<IIQ", kind, 0, sector)


def _blk() -> Request:
    def complaint(data: bytes, _length: int) -> str | None:
        if data[-1]:
            return f"reading sector 0 has status {data[-1]}"
        return None

    return Request(blk_header(0), SECTOR + 1, complaint)


def net_header(extra: int = 0) -> bytes:
    """A virtio_net_hdr without offloads."""
    return bytes(12 + extra)


def frame(payload: int = 46) -> bytes:
    """An Ethernet frame of an experimental type to all, from a locally administered address."""
    return b"\xff" * 6 + b"\x02\x67\x75\x65\x73\x74" + b"\x88\xb5" + bytes(payload)


def _net() -> Request:
    return Request(net_header() + frame(), 0, _any_answer)


def _console() -> Request:
    return Request(b".", 0, _any_answer)


def _rng() -> Request:
    def complaint(_data: bytes, length: int) -> str | None:
        return None if length else "gave no random bytes"

    return Request(b"", 64, complaint)


def _input() -> Request:
    # A change of an LED that most devices do not have: EV_LED, LED_MAX, off.
    return Request(struct.pack("<HHI", 0x11, 0x0F, 0), 0, _any_answer)


def _fs() -> Request:
    init = struct.pack("<IIII", 7, 31, 0, 0)
    head = struct.pack("<IIQQIIII", 40 + len(init), 26, 1, 0, 0, 0, 0, 0)

    def complaint(data: bytes, length: int) -> str | None:
        answered, _, unique = struct.unpack_from("<IiQ", data)
        if length < 16 or unique != 1 or answered > length:
            return f"FUSE_INIT was answered with {length} bytes for request {unique}"
        return None

    return Request(head + init, 16 + 64, complaint)


def _unknown() -> Request:
    return Request(bytes(64), 64, _any_answer)


KINDS: Final[dict[str, Kind]] = {
    kind.name: kind
    for kind in (
        Kind("blk", "block device", 0, 1, bits(1, 2, 4, 5, 6, *range(9, 18), 0, 7), _blk),
        Kind(
            "net",
            "network card",
            1,
            2,
            bits(*range(4), 5, *range(6, 24), *range(50, 64)),
            _net,
            beside=(0,),
        ),
        Kind("console", "console", 1, 2, bits(0, 1, 2), _console),
        Kind("rng", "entropy device", 0, 1, 0, _rng),
        Kind("input", "input device", 1, 2, 0, _input),
        Kind("fs", "file system", 1, 2, bits(0), _fs),
        Kind("any", "device of any type", 0, 1, None, _unknown),
    )
}
"""The types that can be named."""
