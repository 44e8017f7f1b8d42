"""Files that Wireshark reads: pcapng with times in nanoseconds, and a card's frames in one.

:func:`begin_section` and :func:`packet` are the format, which recordings are converted to as well.

Source: draft-ietf-opsawg-pcapng, sections 4.1 (section header), 4.2 (interface description) and
4.3 (enhanced packet).
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from typing import Final

from guestio.budgets import NET_CAPTURE_BYTES
from guestio.errors import DeviceError

log = logging.getLogger("guestio.virtio")

_SECTION_HEADER: Final = 0x0A0D0D0A
_INTERFACE: Final = 1
_ENHANCED_PACKET: Final = 6
_BYTE_ORDER: Final = 0x1A2B3C4D
LINKTYPE_ETHERNET: Final = 1
_OPT_IF_NAME: Final = 2
_OPT_IF_DESCRIPTION: Final = 3
_OPT_IF_TSRESOL: Final = 9
_OPT_EPB_FLAGS: Final = 2
_NANOSECONDS: Final = 9
_INBOUND, _OUTBOUND = 1, 2
_PACKET: Final = struct.Struct("<IIIIIII")
_LENGTH: Final = struct.Struct("<I")


def begin_section(linktype: int, name: str, description: str = "") -> bytes:
    """What a file begins with: one interface, whose times are in nanoseconds.

    Args:
        linktype: What its packets are, as https://www.tcpdump.org/linktypes.html numbers it.
        name: The interface's name.
        description: More about it.
    """
    interface = struct.pack("<HHI", linktype, 0, 0) + _option(_OPT_IF_NAME, name.encode())
    if description:
        interface += _option(_OPT_IF_DESCRIPTION, description.encode())
    interface += _option(_OPT_IF_TSRESOL, bytes([_NANOSECONDS])) + _option(0, b"")
    section = _block(_SECTION_HEADER, struct.pack("<IHHq", _BYTE_ORDER, 1, 0, -1))
    return section + _block(_INTERFACE, interface)


def packet(data: bytes, time_ns: int, flags: int = 0, *, original: int | None = None) -> bytes:
    """A packet of the section's interface.

    Args:
        data: What it holds.
        time_ns: When it passed, in nanoseconds since 1970.
        flags: Its `epb_flags`; 0 for none.
        original: How many bytes it had; None for as many as it holds.
    """
    size = len(data)
    whole = size if original is None else original
    options = _option(_OPT_EPB_FLAGS, _LENGTH.pack(flags)) + _option(0, b"") if flags else b""
    padding = -size % 4
    length = _PACKET.size + size + padding + len(options) + _LENGTH.size
    high, low = time_ns >> 32, time_ns & 0xFFFFFFFF
    head = _PACKET.pack(_ENHANCED_PACKET, length, 0, high, low, size, whole)
    return b"".join((head, data, bytes(padding), options, _LENGTH.pack(length)))


class CaptureFile:
    """Records frames in a pcapng file as they pass, with nanoseconds.

    Inbound frames are those that the driver receives. A file that cannot be written any more, or
    has become NET_CAPTURE_BYTES long, is left as it is, and frames pass on unrecorded; that is
    logged.

    Args:
        path: The file; replaced if it exists. A pipe must have a reader already.
        name: The interface's name in the capture.

    Raises:
        DeviceError: It cannot be opened.

    Threads: from any. Cost: a system call for each frame.
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str = "guestio") -> None:
        self.path = os.fspath(path)
        self._lock = threading.Lock()
        self._size = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self._fd = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise DeviceError(f"cannot write the capture {self.path}: {error.strerror}") from error
        self._write(begin_section(LINKTYPE_ETHERNET, name))

    def write(self, frame: bytes, *, sent: bool) -> None:
        """Record a frame.

        Args:
            frame: From the destination address on.
            sent: Whether the driver sent it; it receives it otherwise.
        """
        if self._fd < 0:
            return
        self._write(packet(frame, time.time_ns(), _OUTBOUND if sent else _INBOUND))

    def _write(self, block: bytes) -> None:
        with self._lock:
            if self._fd < 0:
                return
            if self._size + len(block) > NET_CAPTURE_BYTES:
                self._end(f"it is {self._size} bytes long")
                return
            try:
                written = os.write(self._fd, block)
            except OSError as error:
                self._end(error.strerror or "it cannot be written")
                return
            self._size += written
            if written < len(block):
                self._end("it takes no more; its last frame is cut off")

    def _end(self, why: str) -> None:
        """Stop recording. Needs the lock."""
        log.error("the capture %s ends: %s", self.path, why)
        fd, self._fd = self._fd, -1
        os.close(fd)

    def close(self) -> None:
        """Close the file. Calling it again does nothing."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def _block(kind: int, body: bytes) -> bytes:
    length = 12 + len(body)
    return struct.pack("<II", kind, length) + body + struct.pack("<I", length)
