"""The configuration space."""

from __future__ import annotations

import struct
from typing import Final

from guestio.faults.catalogue import hostile, register, user, virtio
from guestio.faults.outcomes import HungUpError
from guestio.faults.report import Severity
from guestio.faults.trial import Trial
from guestio.vhost_user.messages import U64, Config, FrontendRequest, ProtocolFeature

_F = FrontendRequest
_HEAD: Final = struct.Struct("=III")
SIZES: Final = {"blk": 96, "net": 24, "console": 12, "rng": 0, "input": 136, "fs": 40, "any": 4}
"""Bytes of the configuration space as drivers read it; later fields need their features."""


def config_size(t: Trial) -> int:
    """How many bytes of the configuration space are read; skips a device that has none."""
    t.needs(protocol=ProtocolFeature.CONFIG)
    size = SIZES[t.kind.name]
    if not size:
        t.skip(f"an {t.kind.title} has no configuration space")
    if t.kind.name == "blk":
        # What the oldest devices have is enough where a back-end has no more.
        return next((each for each in (96, 60, 56, 36, 8) if _answers(t, each)), size)
    return size


def _answers(t: Trial, size: int) -> bool:
    if not t.link.protocol:
        t.negotiate()
    return bool(t.link.ask(_F.GET_CONFIG, Config(0, bytes(size))).payload)


def read(t: Trial, offset: int, size: int) -> bytes:
    """Bytes of the configuration space.

    Raises:
        FailError: They cannot be read.
    """
    reply = t.link.ask(_F.GET_CONFIG, Config(offset, bytes(size)))
    if not reply.payload:
        t.fail(f"refuses to read {size} bytes of its configuration at {offset}")
    if len(reply.payload) != 12 + size:
        t.fail(f"answers GET_CONFIG of {size} bytes with {len(reply.payload)} bytes of payload")
    at, said, _ = _HEAD.unpack_from(reply.payload)
    if (at, said) != (offset, size):
        t.fail(f"answers GET_CONFIG of {size} bytes at {offset} with {said} at {at}")
    return reply.payload[12:]


def fields(t: Trial, size: int) -> bytes:
    """The configuration space, with zeroes behind what the device has of it."""
    t.needs(protocol=ProtocolFeature.CONFIG)
    t.negotiate()
    have = config_size(t)
    return read(t, 0, min(size, have)) + bytes(max(size - have, 0))


@register(
    "config.read",
    user("GET_CONFIG"),
    "GET_CONFIG is answered with as many bytes as were asked for.",
)
def _read(t: Trial) -> None:
    size = config_size(t)
    t.negotiate()
    read(t, 0, size)


@register(
    "config.before-features",
    virtio("2.5.2"),
    "The configuration can be read before the features are negotiated.",
)
def _before(t: Trial) -> None:
    size = config_size(t)
    t.reconnect()
    t.needs(protocol=ProtocolFeature.CONFIG)
    t.link.request(_F.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.CONFIG))
    read(t, 0, size)


@register(
    "config.parts",
    user("GET_CONFIG"),
    "A part of the configuration reads like that part of the whole.",
)
def _parts(t: Trial) -> None:
    size = config_size(t)
    t.negotiate()
    whole = read(t, 0, size)
    for _ in range(10):
        offset = t.random.randrange(size)
        length = t.random.randrange(1, size - offset + 1)
        part = read(t, offset, length)
        t.expect(
            part == whole[offset : offset + length],
            f"reads {part.hex()} at {offset}, where the whole has "
            f"{whole[offset : offset + length].hex()}",
        )


@register(
    "config.constant",
    virtio("2.5"),
    "The configuration reads the same again, unless a change is announced.",
)
def _constant(t: Trial) -> None:
    size = config_size(t)
    t.negotiate()
    first, second = read(t, 0, size), read(t, 0, size)
    t.expect(first == second, "the configuration changed between two reads")


@register(
    "config.while-running",
    user("GET_CONFIG"),
    "The configuration can be read while rings run.",
)
def _running(t: Trial) -> None:
    size = config_size(t)
    queue = t.ready()
    t.serves(queue)
    read(t, 0, size)
    t.serves(queue)


@hostile(
    "config.beyond",
    user("GET_CONFIG"),
    "Reading beyond the configuration is answered with an empty payload, or with zeroes.",
)
def _beyond(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.CONFIG)
    t.negotiate()
    for offset, size in ((240, 64), (4000, 16), (0xFFFF_FFF0, 32), (0, 256)):
        reply = t.link.ask(_F.GET_CONFIG, Config(offset, bytes(size)))
        if reply.payload:
            t.expect(
                len(reply.payload) == 12 + size,
                f"answers a read of {size} bytes at {offset} with {len(reply.payload)} bytes",
            )


@hostile(
    "config.size-lies",
    user("GET_CONFIG"),
    "A GET_CONFIG whose size is not that of its payload is refused; no more memory is shown.",
)
def _size_lies(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.CONFIG)
    for size in (0, 4, 200, 4096, 0xFFFF_FFFF):
        t.reconnect()
        t.negotiate()
        t.link.request(_F.GET_CONFIG, _HEAD.pack(0, size, 0) + bytes(8))
        t.link.request(_F.GET_FEATURES)
        try:
            reply = t.link.receive()
            while reply.request != _F.GET_FEATURES:
                t.expect(
                    len(reply.payload) <= 12 + 256, f"answered with {len(reply.payload)} bytes"
                )
                reply = t.link.receive()
        except HungUpError:
            continue


@register(
    "config.read-only",
    user("SET_CONFIG"),
    "SET_CONFIG of a read-only field changes nothing.",
    devices=("blk", "net", "console"),
)
def _read_only(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.CONFIG)
    t.negotiate()
    field = 2 if t.kind.name == "console" else 0
    if t.kind.name == "net" and t.offered() & 1 << 23 == 0 and not t.offered() & 1 << 5:
        t.skip("the first field is the address, which is not valid")
    size = {"blk": 8, "net": 6, "console": 2}[t.kind.name]
    before = read(t, field, size)
    changed = bytes(byte ^ 0x5A for byte in before)
    try:
        value = t.link.result(_F.SET_CONFIG, Config(field, changed))
        after = read(t, field, size)
    except HungUpError:
        t.reject("closed the connection at SET_CONFIG")
    t.expect(after == before, f"SET_CONFIG changed a read-only field from {before.hex()}")
    if value:
        t.reject(f"refuses SET_CONFIG of a read-only field ({value})")


@hostile(
    "config.write-beyond",
    user("SET_CONFIG"),
    "SET_CONFIG beyond the configuration is refused or ignored.",
)
def _write_beyond(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.CONFIG)
    t.negotiate()
    t.link.refuses(_F.SET_CONFIG, Config(0xFFFF_FFF0, bytes(64)))


@register(
    "config.flags",
    user("SET_CONFIG"),
    "The flags of SET_CONFIG are checked: unknown ones are refused or ignored.",
    severity=Severity.SAFETY,
    hostile=True,
)
def _flags(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.CONFIG)
    t.negotiate()
    t.link.refuses(_F.SET_CONFIG, Config(0, bytes(1), 0xFFFF))
