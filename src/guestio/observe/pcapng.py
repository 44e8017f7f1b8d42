"""Events as packets that Wireshark reads: a pcapng file for the dissector beside this module.

A packet has the link type USER0 (147) and holds:

* four bytes, ``gio`` and the version of this format, 1;
* a little-endian number of 32 bits: how many bytes of a request's content follow the record;
* a record of a tracepoint, 64 bytes, as :data:`guestio.trace.RECORD` describes it;
* the content: with TAKEN what the driver gave to read, with COMPLETED what the device wrote.

:data:`DISSECTOR` is the path of ``wireshark/guestio.lua``, which reads these.

Source: draft-ietf-opsawg-pcapng, section 4.3 (enhanced packet).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from guestio.trace import RECORD, Records
from guestio.virtio.net.pcapng import begin_section, packet

DISSECTOR: Final = Path(__file__).parent / "wireshark" / "guestio.lua"
"""The dissector for Wireshark and tshark: ``tshark -X lua_script:PATH``."""

LINKTYPE_USER0: Final = 147

MAGIC: Final = b"gio\x01"

MOST_CONTENT: Final = 128 << 10
"""Bytes of a request's content in a packet; more is cut off. Wireshark takes packets of 256 KiB."""

_HEAD: Final = struct.Struct("<4sI")
_ENHANCED_PACKET: Final = 6

_PACKET: Final = np.dtype(
    [
        ("kind", "<u4"),
        ("length", "<u4"),
        ("interface", "<u4"),
        ("high", "<u4"),
        ("low", "<u4"),
        ("captured", "<u4"),
        ("original", "<u4"),
        ("magic", "S4"),
        ("content", "<u4"),
        ("record", RECORD),
        ("end", "<u4"),
    ]
)
"""An enhanced packet with a record and no content."""


def begin(name: str, description: str) -> bytes:
    """What a file of events begins with.

    Args:
        name: The name of the interface that packets are of.
        description: More about it, the device say.
    """
    return begin_section(LINKTYPE_USER0, name, description)


def packets(
    records: Records, to_epoch_ns: int, content: Mapping[int, bytes] | None = None
) -> bytes:
    """Events as packets, in their order.

    Args:
        records: The events.
        to_epoch_ns: What to add to a record's time for nanoseconds since 1970.
        content: Bytes that go with some of them, by their index.

    Cost: 0.2 us for an event without content, a few microseconds for one with content.
    """
    whole = np.zeros(len(records), _PACKET)
    whole["kind"] = _ENHANCED_PACKET
    whole["length"] = whole["end"] = _PACKET.itemsize
    times = records["time"] + np.uint64(to_epoch_ns % (1 << 64))
    whole["high"], whole["low"] = times >> np.uint64(32), times & np.uint64(0xFFFFFFFF)
    whole["captured"] = whole["original"] = _HEAD.size + RECORD.itemsize
    whole["magic"] = MAGIC
    whole["record"] = records
    if not content:
        return whole.tobytes()
    parts = []
    done = 0
    for index in sorted(content):
        parts.append(whole[done:index].tobytes())
        held = content[index]
        head = _HEAD.pack(MAGIC, len(held)) + records[index].tobytes()
        data = head + held[:MOST_CONTENT]
        parts.append(packet(data, int(times[index]), original=len(head) + len(held)))
        done = index + 1
    parts.append(whole[done:].tobytes())
    return b"".join(parts)
