"""What a controller says about itself and its namespaces (NVMe 1.4, section 5.15)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from guestio.budgets import NVME_EVENTS, NVME_TRANSFER_BYTES
from guestio.pci.nvme.namespace import Namespace
from guestio.pci.nvme.spec import COMPLETION_BITS, ENTRY_BITS, PAGE, VERSION

SIZE: Final = 4096
ERROR_ENTRIES: Final = 16
"""Entries of the error log."""
ABORTS: Final = 4
TEMPERATURE: Final = 303
"""Kelvin: what a drive without a sensor reports."""
TEMPERATURE_WARNING: Final = 343
TEMPERATURE_CRITICAL: Final = 353

_FIRMWARE: Final = b"1.0"
_MODEL: Final = b"guestio NVMe"
_NAMESPACE_EVENTS: Final = 1 << 8  # OAES: namespace attribute notices
_DOORBELL_BUFFER: Final = 1 << 8  # OACS
_EFFECTS_AND_LONG_LOGS: Final = 1 << 1 | 1 << 2  # LPA
# ONCS: compare, dataset management, write zeroes, save and select, timestamp, verify.
_OPTIONAL_COMMANDS: Final = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7
_WRITE_CACHE_AND_FLUSH_ALL: Final = 7  # VWC
_SGLS: Final = 1 | 1 << 16  # of any alignment; bit buckets


@dataclass(frozen=True)
class Identity:
    """What a controller is called.

    Attributes:
        vendor_id: Of the PCI function, and of its subsystem.
        serial: Up to 20 ASCII characters.
    """

    vendor_id: int
    serial: str


def controller(identity: Identity, namespaces: Sequence[Namespace]) -> bytes:
    """The controller's data structure."""
    data = bytearray(SIZE)
    serial = identity.serial.encode("ascii").ljust(20)
    struct.pack_into("<HH", data, 0, identity.vendor_id, identity.vendor_id)
    data[4:24], data[24:64], data[64:72] = serial, _MODEL.ljust(40), _FIRMWARE.ljust(8)
    data[72] = 4  # recommended arbitration burst
    data[77] = (NVME_TRANSFER_BYTES // PAGE).bit_length() - 1
    struct.pack_into("<I", data, 80, VERSION)
    struct.pack_into("<I", data, 92, _NAMESPACE_EVENTS)
    data[111] = 1  # an I/O controller
    struct.pack_into("<H", data, 256, _DOORBELL_BUFFER)
    data[258], data[259] = ABORTS - 1, NVME_EVENTS - 1
    data[260] = 1 << 1 | 1  # one firmware slot, read-only
    data[261], data[262] = _EFFECTS_AND_LONG_LOGS, ERROR_ENTRIES - 1
    struct.pack_into("<HH", data, 266, TEMPERATURE_WARNING, TEMPERATURE_CRITICAL)
    total = sum(each.image.size for each in namespaces)
    data[280:296] = total.to_bytes(16, "little")
    data[512] = ENTRY_BITS << 4 | ENTRY_BITS
    data[513] = COMPLETION_BITS << 4 | COMPLETION_BITS
    struct.pack_into("<IH", data, 516, len(namespaces), _OPTIONAL_COMMANDS)
    data[525] = _WRITE_CACHE_AND_FLUSH_ALL
    struct.pack_into("<I", data, 536, _SGLS)
    name = f"nqn.2014-08.org.nvmexpress:uuid:{_uuid(namespaces)}"
    data[768 : 768 + len(name)] = name.encode()
    struct.pack_into("<H", data, 2048, 900)  # power state 0: 9 W at most
    return bytes(data)


def _uuid(namespaces: Sequence[Namespace]) -> str:
    digits = namespaces[0].guid.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def namespace(each: Namespace) -> bytes:
    """A namespace's data structure."""
    data = bytearray(SIZE)
    struct.pack_into("<QQQ", data, 0, each.blocks, each.blocks, each.blocks)
    data[24] = 1 << 0 | 1 << 4  # deallocated blocks give space back; preferred sizes are below
    data[33] = 1 << 3 | 1  # write zeroes may deallocate; deallocated blocks read as zeroes
    # Preferred writes and deallocations: of pages, aligned to them.
    pages = max(PAGE // each.block_size, 1) - 1
    struct.pack_into("<HHHH", data, 64, pages, pages, pages, pages)
    data[99] = 1 if each.read_only else 0
    data[104:120] = each.guid
    data[130] = each.shift
    return bytes(data)


def active_list(namespaces: Sequence[Namespace], after: int) -> bytes:
    """The identifiers of the namespaces above a number, ascending."""
    numbers = [each.number for each in namespaces if each.number > after]
    return struct.pack(f"<{len(numbers)}I", *numbers).ljust(SIZE, b"\0")


def descriptors(each: Namespace) -> bytes:
    """A namespace's identification descriptors."""
    return (b"\x02\x10\0\0" + each.guid).ljust(SIZE, b"\0")
