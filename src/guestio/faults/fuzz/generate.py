"""Makes cases of seeds: valid beginnings, and then something that is wrong.

A case is a few scenes. Each begins on a connection of its own, which is brought to some depth
honestly (nothing, features, memory, a started ring, an IOMMU); then come steps that are honest or
not, and an end. Honest steps are judged for as long as nothing wrong was sent on the connection.
"""

from __future__ import annotations

import functools
import itertools
import random
import struct
from collections.abc import Callable
from typing import Any, Final

from guestio.faults.catalogue import catalogue, select
from guestio.faults.fuzz.steps import FORMAT, Case, Step
from guestio.faults.kinds import KINDS, Kind, frame, net_header
from guestio.faults.memory import BASE, SIZE, USER
from guestio.faults.report import Severity
from guestio.vhost_user.messages import (
    U64,
    FrontendRequest,
    Inflight,
    IotlbMessage,
    Log,
    MemoryRegion,
    MemoryTable,
    SingleMemoryRegion,
    StateTransfer,
    VringAddr,
    VringState,
)

_F = FrontendRequest
_MOST: Final = (1 << 64) - 1
_PAGE: Final = 4096
IOVA_SHIFT: Final = 0x20_0000_0000
"""I/O virtual address minus guest physical address, as the checks of translation have it."""

INTERESTING: Final = (
    0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 63, 64, 65, 127, 128, 255, 256, 257, 511, 512, 513, 1023, 1024,
    4095, 4096, 4097, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x10001, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 32, (1 << 32) + 1, (1 << 47) - 1, 1 << 47, (1 << 63) - 1, 1 << 63,
    _MOST - 4095, _MOST - 7, _MOST - 1, _MOST,
)  # fmt: skip
"""Numbers at which arithmetic goes wrong."""
PLACES: Final = (
    BASE, BASE + 1, BASE + 8, BASE + _PAGE, BASE + SIZE // 2, BASE + SIZE - _PAGE, BASE + SIZE - 16,
    BASE + SIZE - 1, BASE + SIZE, BASE - 1,
)  # fmt: skip
"""Guest addresses in and beside the memory of a case."""
FDS: Final = (
    "ram", "memfd", "empty", "read-only", "eventfd", "full", "pipe", "socket", "own", "null",
    "directory",
)  # fmt: skip
"""Kinds of descriptors that a step can send."""
_FD_MESSAGES: Final = {
    _F.SET_MEM_TABLE: "ram", _F.ADD_MEM_REG: "ram", _F.REM_MEM_REG: "", _F.SET_LOG_BASE: "memfd",
    _F.SET_LOG_FD: "eventfd", _F.SET_VRING_KICK: "eventfd", _F.SET_VRING_CALL: "eventfd",
    _F.SET_VRING_ERR: "eventfd", _F.SET_BACKEND_REQ_FD: "socket", _F.SET_INFLIGHT_FD: "memfd",
    _F.SET_DEVICE_STATE_FD: "pipe", _F.GPU_SET_SOCKET: "socket",
}  # fmt: skip
_CODES: Final = tuple(int(code) for code in FrontendRequest)
SIZES: Final = (1, 2, 4, 16, 64, 64, 128, 256)


@functools.cache
def judging_checks(device: str) -> tuple[str, ...]:
    """Names of the checks that a case may contain: demands and safety, no recommendations."""
    return tuple(
        each.id
        for each in select(catalogue(device), ())
        if each.severity is not Severity.SHOULD and each.applies_to(device)
    )


def make_case(device: str, seed: int) -> Case:
    """The case of a seed; the same for ever, for this device and :data:`FORMAT`.

    Raises:
        KeyError: There is no such type of device.
    """
    # Not for secrets: the point is that it can be repeated.
    dice = random.Random(f"guestio-fuzz:{FORMAT}:{device}:{seed}")  # noqa: S311 - as said
    return _Author(KINDS[device], dice).case(seed)


class _Author:
    """Writes one case; see :func:`make_case`."""

    def __init__(self, kind: Kind, dice: random.Random) -> None:
        self.kind, self.dice = kind, dice
        self.steps: list[Step] = []
        self.queue = kind.queue

    def case(self, seed: int) -> Case:
        for _ in range(self.dice.choice((1, 1, 2, 3))):
            self._scene()
        if self.dice.random() < 0.5:
            self._check()
        return Case(self.kind.name, seed, tuple(self.steps))

    def _add(self, name: str, **arguments: Any) -> None:
        self.steps.append(Step(name, arguments))

    def _scene(self) -> None:
        dice = self.dice
        scene = dice.choices(
            (self._talk, self._rings, self._requests, self._lives, self._translated, self._check),
            (4, 3, 3, 2, 1.5, 1.5),
        )[0]
        if scene == self._check:
            self._check()
            return
        self._add("connect")
        scene()
        self._end()

    def _end(self) -> None:
        match self.dice.randrange(6):
            case 0:
                self._add("stop", queue=self.queue)
            case 1:
                self._message(int(_F.SET_STATUS), U64(0).encode())
            case 2:
                self._message(int(_F.RESET_DEVICE), b"")
            case 3:
                self._add("half", data=self._some_message().hex(), sent=self.dice.randrange(1, 20))
            case _:
                pass

    def _check(self) -> None:
        self._add("check", check=self.dice.choice(judging_checks(self.kind.name)))

    # Scenes

    def _talk(self) -> None:
        """Messages, at any depth."""
        self._begin(self.dice.randrange(4))
        for _ in range(self.dice.randint(2, 12)):
            if self.dice.random() < 0.15:
                self._honest()
            else:
                self._any_message()

    def _rings(self) -> None:
        """Rings that lie."""
        self._begin(3)
        for _ in range(self.dice.randint(1, 5)):
            match self.dice.randrange(10):
                case 0 | 1:
                    self._honest()
                case 2:
                    self._scribble()
                case 3:
                    self._add("publish", queue=self.queue, ahead=self._number16())
                    self._add("kick", queue=self.queue)
                case 4:
                    self._add(
                        "truncate", size=self.dice.choice((0, _PAGE, SIZE // 2, SIZE - _PAGE))
                    )
                case _:
                    self._descriptors()

    def _requests(self) -> None:
        """Requests of the device type: any content, cut anywhere."""
        self._begin(3)
        for _ in range(self.dice.randint(1, 6)):
            if self.dice.random() < 0.3:
                self._honest()
            else:
                self._request()

    def _lives(self) -> None:
        """Starts, stops, resets; nothing need be wrong with any of them."""
        self._begin(self.dice.choice((2, 3, 3)))
        for _ in range(self.dice.randint(2, 8)):
            match self.dice.randrange(9):
                case 0 | 1:
                    self._add("stop", queue=self.queue)
                case 2:
                    self._start()
                case 3:
                    self._honest()
                case 4:
                    self._add("post", queue=self.queue, count=self.dice.randint(1, 20))
                case 5:
                    self._message(
                        int(self.dice.choice((_F.SET_STATUS, _F.RESET_DEVICE, _F.RESET_OWNER))),
                        b"" if self.dice.random() < 0.5 else U64(0).encode(),
                    )
                case 6:
                    self._message(
                        int(_F.SET_VRING_ENABLE),
                        VringState(self.queue, self.dice.randrange(2)).encode(),
                    )
                case 7:
                    self._add("connect")
                    self._begin(self.dice.choice((2, 3, 3)))
                case _:
                    self._add("share")

    def _translated(self) -> None:
        """Behind an IOMMU, which is this side."""
        self._add("translate")
        for _ in range(self.dice.randint(1, 6)):
            match self.dice.randrange(5):
                case 0:
                    self._add("translated", count=self.dice.randint(1, 8))
                case 1:
                    self._add("revoke")
                case 2:
                    self._add("refuse", count=self.dice.randint(1, 4))
                case _:
                    kind = self.dice.choice((1, 2, 2, 2, 3, 3, 4, 5, 6, 0, 255))
                    at = self.dice.choice((*PLACES, self._number(64)))
                    message = IotlbMessage(
                        (at + self.dice.choice((0, IOVA_SHIFT))) & _MOST,
                        self.dice.choice((0, 1, _PAGE, SIZE, _MOST, self._number(64))),
                        self.dice.choice((USER + BASE, USER + at & _MOST, self._number(64))),
                        self.dice.choice((0, 1, 2, 3, 3, 4, 255)),
                        kind,
                    )
                    self._message(int(_F.IOTLB_MSG), message.encode())

    # Honest beginnings

    def _begin(self, depth: int) -> None:
        if depth >= 1:
            features = sum(1 << bit for bit in (28, 29, 35) if self.dice.random() < 0.5)
            self._add("negotiate", features=features, protocol=self._protocol())
        if depth >= 2:
            self._add("share")
        if depth >= 3:
            self._start()

    def _protocol(self) -> int:
        plain = 1 << 0 | 1 << 3 | 1 << 9
        more = 0
        for bit in (1, 5, 12, 13, 15, 16, 19):
            more |= (self.dice.random() < 0.3) << bit
        return plain | more if self.dice.random() < 0.8 else more

    def _start(self) -> None:
        self._add(
            "start",
            queue=self.queue,
            size=self.dice.choice(SIZES),
            base=self.dice.choice((0, 0, 0, 1, 65535)),
        )

    def _honest(self) -> None:
        if self.dice.random() < 0.4:
            self._add("remembers", queue=self.queue, sector=self.dice.randrange(48))
        else:
            self._add("serves", queue=self.queue, count=self.dice.randint(1, 4))

    # Numbers

    def _number(self, bits: int) -> int:
        mask = (1 << bits) - 1
        match self.dice.randrange(8):
            case 0:
                return self.dice.getrandbits(bits)
            case 1:
                return 1 << self.dice.randrange(bits)
            case 2 if bits == 64:
                return (self.dice.choice(PLACES) + self.dice.choice((0, USER))) & mask
            case _:
                return self.dice.choice(INTERESTING) & mask

    def _number16(self) -> int:
        return self._number(16)

    # Messages

    def _valid(self, code: int) -> bytes:
        """A payload that this message may have."""
        dice, queue = self.dice, self.queue
        region = MemoryRegion(BASE, SIZE, USER + BASE, 0)
        match code:
            case _F.SET_FEATURES:
                more = dice.choice((0, 1 << 28, 1 << 29, 1 << 33))
                return U64(1 << 32 | 1 << 30 | more).encode()
            case _F.SET_PROTOCOL_FEATURES:
                return U64(self._protocol()).encode()
            case _F.SET_MEM_TABLE:
                return MemoryTable((region,)).encode()
            case _F.ADD_MEM_REG | _F.REM_MEM_REG:
                return SingleMemoryRegion(region).encode()
            case _F.SET_LOG_BASE:
                return Log(_PAGE, 0).encode()
            case _F.SET_VRING_NUM:
                return VringState(queue, dice.choice(SIZES)).encode()
            case _F.SET_VRING_BASE | _F.GET_VRING_BASE | _F.GET_VRING_BASE_SKIP_DRAIN:
                return VringState(queue, 0).encode()
            case _F.SET_VRING_ENABLE | _F.SET_VRING_ENDIAN | _F.VRING_KICK:
                return VringState(queue, 1).encode()
            case _F.SET_VRING_ADDR:
                # Where the rings of a case begin, as the player lays them out.
                at = USER + BASE
                return VringAddr(queue, 0, at, at + 3 * _PAGE, at + 2 * _PAGE).encode()
            case _F.SET_VRING_KICK | _F.SET_VRING_CALL | _F.SET_VRING_ERR:
                return U64(queue).encode()
            case _F.GET_CONFIG | _F.SET_CONFIG:
                size = dice.choice((0, 1, 8, 60, 256, 300))
                return struct.pack("=III", dice.choice((0, 0, 4, 60, 255)), size, 0) + bytes(size)
            case _F.GET_INFLIGHT_FD | _F.SET_INFLIGHT_FD:
                return Inflight(_PAGE, 0, dice.choice((1, 2)), dice.choice(SIZES)).encode()
            case _F.IOTLB_MSG:
                return IotlbMessage.update(BASE + IOVA_SHIFT, _PAGE, USER + BASE, 3).encode()
            case _F.SET_DEVICE_STATE_FD:
                return StateTransfer(dice.randrange(2), 0).encode()
            case _F.SET_STATUS | _F.NET_SET_MTU | _F.SEND_RARP:
                return U64(dice.choice((0, 1, 3, 11, 15, 128, 1500))).encode()
            case _:
                return b"" if dice.random() < 0.7 else U64(self._number(64)).encode()

    def _wrong(self, payload: bytes) -> bytes:
        """The payload with something about it that need not be right."""
        dice = self.dice
        for _ in range(dice.choice((1, 1, 2))):
            if not payload:
                return dice.randbytes(dice.choice((1, 4, 8, 40)))
            match dice.randrange(8):
                case 0:
                    payload = payload[: dice.randrange(len(payload))]
                case 1:
                    payload += dice.randbytes(dice.choice((1, 4, 8, 32)))
                case 2:
                    at = dice.randrange(len(payload) * 8)
                    flipped = bytearray(payload)
                    flipped[at // 8] ^= 1 << at % 8
                    payload = bytes(flipped)
                case 3:
                    payload = dice.randbytes(len(payload))
                case _:
                    width = dice.choice((4, 8, 8))
                    if len(payload) < width:
                        continue
                    at = dice.randrange(len(payload) // width) * width
                    field = self._number(8 * width).to_bytes(width, "little")
                    payload = payload[:at] + field + payload[at + width :]
        return payload[:4000]

    def _some_message(self) -> bytes:
        code = self.dice.choice(_CODES)
        payload = self._valid(code)
        return struct.pack("=III", code, 1, len(payload)) + payload

    def _any_message(self) -> None:
        dice = self.dice
        if dice.random() < 0.05:
            data = dice.randbytes(dice.choice((1, 11, 12, 13, 40, 400)))
            self._add("noise", data=data.hex())
            return
        code = dice.choice(_CODES) if dice.random() < 0.95 else self._number(32)
        payload = self._valid(code)
        if dice.random() < 0.65:
            payload = self._wrong(payload)
        self._message(code, payload, honest=dice.random() < 0.7)

    def _message(self, code: int, payload: bytes, *, honest: bool = True) -> None:
        """A message; its header and descriptors may be wrong unless they are to be honest."""
        dice = self.dice
        usual = _FD_MESSAGES.get(_F(code), "") if code in _CODES else ""
        fds = [usual] if usual else []
        arguments: dict[str, Any] = {"code": code, "payload": payload.hex()}
        if dice.random() < 0.4:
            arguments["flags"] = 1 | 8
        if not honest:
            match dice.randrange(4):
                case 0:
                    fds = [dice.choice(FDS) for _ in range(dice.choice((0, 1, 1, 2, 8, 9)))]
                case 1:
                    arguments["flags"] = self._number(32)
                case 2:
                    arguments["size"] = self._number(32)
                case _:
                    fds = []
        if fds:
            arguments["fds"] = fds
        self._add("message", **arguments)

    # Rings

    def _descriptors(self) -> None:
        """A chain that is written by hand, its numbers wrong here and there."""
        dice = self.dice
        request = self.kind.request()
        table: list[list[int]] = []
        pieces = dice.randint(1, 5)
        for number in range(pieces):
            # Relative to a page of the player's; far ones wrap to where they want.
            write = number >= pieces // 2
            length = request.room if write else len(request.readable)
            table.append([number, number * 1024, length or 16, 2 * write, number + 1])
            if number < pieces - 1:
                table[-1][3] |= 1
        for _ in range(dice.choice((0, 1, 1, 2, 3))):
            row = dice.choice(table)
            match dice.randrange(6):
                case 0:
                    row[1] = -1 - (self._number(64))
                case 1:
                    row[2] = self._number(32)
                case 2:
                    row[3] = dice.choice((0, 1, 2, 3, 4, 5, 6, 7, self._number16()))
                case 3:
                    row[4] = dice.choice((0, 1, 2, pieces, 63, 64, 255, 0xFFFF))
                case 4:
                    row[0] = dice.choice((0, 1, 63))
                case _:
                    row[1], row[3] = -1 - dice.choice(PLACES), row[3] ^ 2
        heads = [0]
        if dice.random() < 0.25:
            heads = [
                dice.choice((0, 0, 1, 63, 64, 0x7FFF, 0xFFFF)) for _ in range(dice.randint(1, 4))
            ]
        self._add(
            "descriptors",
            queue=self.queue,
            table=table,
            heads=heads,
            content=request.readable.hex() or "00",
            indirect=dice.random() < 0.2,
            cut=dice.choice((0, 0, 0, 1, 8, 17)),
        )

    def _scribble(self) -> None:
        area = self.dice.choice(("desc", "avail", "used"))
        self._add(
            "scribble",
            queue=self.queue,
            area=area,
            offset=self.dice.choice((0, 2, 4, 4, 8, 16, 130, 134)),
            data=self.dice.randbytes(self.dice.choice((1, 2, 4, 16))).hex(),
            kicks=self.dice.randrange(4),
        )

    # Requests

    def _request(self) -> None:
        dice = self.dice
        data, room = _CONTENTS.get(self.kind.name, _anything)(dice, self._number)
        readable = _cut(dice, data)
        writable = [len(each) for each in _cut(dice, bytes(room))]
        self._add(
            "request",
            queue=self.queue,
            readable=[each.hex() for each in readable],
            writable=writable,
            indirect=dice.random() < 0.3,
        )


def _cut(dice: random.Random, data: bytes) -> list[bytes]:
    """The data in one to five pieces."""
    if not data:
        return []
    cuts = sorted(dice.randrange(len(data) + 1) for _ in range(dice.choice((0, 0, 0, 1, 2, 4))))
    edges = [0, *cuts, len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if b > a]


Number = Callable[[int], int]


def _blk(dice: random.Random, number: Number) -> tuple[bytes, int]:
    kind = dice.choice((0, 0, 0, 1, 1, 4, 8, 10, 11, 13, 14, 2, 5, 24, number(32)))
    # Those below 64 are for requests whose answers are judged.
    sector = dice.choice((64, 65, 100, 2047, 2048, 2**55 - 1, 2**55, _MOST, max(64, number(64))))
    if kind == 0 and dice.random() < 0.5:
        sector = dice.randrange(64)
    size = dice.choice((0, 1, 511, 512, 512, 1024, 4096, 20, 65536))
    data = struct.pack("<IIQ", kind, dice.choice((0, 0, 1, 0xFFFFFFFF)), sector)
    if kind in {11, 13, 14}:
        segments = [
            struct.pack(
                "<QII",
                dice.choice((64, 128, 2048, max(64, number(64)))),
                dice.choice((0, 1, 8, number(32))),
                dice.choice((0, 0, 1, 2, number(32))),
            )
            for _ in range(dice.choice((0, 1, 1, 2, 16, 64)))
        ]
        data += b"".join(segments)
        return data, 1
    if kind in {0, 8, 10}:
        return data, size + 1
    return data + dice.randbytes(size), 1


def _net(dice: random.Random, number: Number) -> tuple[bytes, int]:
    header = bytearray(net_header())
    for _ in range(dice.choice((0, 0, 1, 2))):
        at = dice.choice((0, 1, 2, 4, 6, 8, 10))
        header[at : at + 2] = number(16).to_bytes(2, "little")
    body = dice.choice((frame(), frame(1500), dice.randbytes(14), dice.randbytes(60), b"", b"\0"))
    if dice.random() < 0.2:
        # ARP and IPv4 that a stack on the other side would have to read.
        body = frame()[:12] + dice.choice((b"\x08\x06", b"\x08\x00")) + dice.randbytes(50)
    return bytes(header[:12]) + body, 0


def _console(dice: random.Random, _number: Number) -> tuple[bytes, int]:
    return dice.randbytes(dice.choice((1, 2, 80, 4096))), 0


def _input(dice: random.Random, number: Number) -> tuple[bytes, int]:
    count = dice.choice((1, 1, 2, 3))
    events = b"".join(
        struct.pack("<HHI", dice.choice((0, 0x11, 0x12, number(16))), number(16), number(32))
        for _ in range(count)
    )
    return events[: dice.choice((8, 8, len(events), 3))], 0


def _rng(dice: random.Random, _number: Number) -> tuple[bytes, int]:
    return b"", dice.choice((1, 2, 64, 4096, 65536))


def _fs(dice: random.Random, number: Number) -> tuple[bytes, int]:
    body = dice.randbytes(dice.choice((0, 8, 16, 64)))
    head = struct.pack(
        "<IIQQIIII",
        dice.choice((40 + len(body), number(32))),
        dice.choice((1, 2, 3, 14, 15, 16, 26, 28, number(32))),
        number(64), dice.choice((1, number(64))), 0, 0, 0, 0,
    )  # fmt: skip
    return head + body, dice.choice((0, 16, 80, 4096))


def _anything(dice: random.Random, _number: Number) -> tuple[bytes, int]:
    return dice.randbytes(dice.choice((1, 16, 64, 512))), dice.choice((0, 1, 64, 512))


_CONTENTS: Final[dict[str, Callable[[random.Random, Number], tuple[bytes, int]]]] = {
    "blk": _blk,
    "net": _net,
    "console": _console,
    "input": _input,
    "rng": _rng,
    "fs": _fs,
}
"""What a request of each type is to read, and how much there is to write."""
