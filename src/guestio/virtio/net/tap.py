"""A tap: a network interface of the host whose other end is a descriptor.

Source: Linux, Documentation/networking/tuntap.rst and include/uapi/linux/if_tun.h.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from contextlib import suppress
from typing import Final

from guestio.errors import DeviceError
from guestio.ratelog import LOG
from guestio.virtio.net.features import Net
from guestio.virtio.net.port import Port

log = logging.getLogger("guestio.virtio")

TUN: Final = "/dev/net/tun"

_TUNSETIFF: Final = 0x400454CA
_TUNGETFEATURES: Final = 0x800454CF
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUNSETQUEUE: Final = 0x400454D9
_TUNSETVNETLE: Final = 0x400454DC
_IFF_TAP: Final = 0x0002
_IFF_MULTI_QUEUE: Final = 0x0100
_IFF_ATTACH_QUEUE: Final = 0x0200
_IFF_DETACH_QUEUE: Final = 0x0400
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_IFREQ: Final = struct.Struct("16sH22x")
_HEADER_BYTES: Final = 12
_IFNAMSIZ: Final = 16

_F_CSUM: Final = 0x01
_OFFLOADS: Final = (
    (_F_CSUM, Net.GUEST_CSUM),
    (0x02, Net.GUEST_TSO4),
    (0x04, Net.GUEST_TSO6),
    (0x08, Net.GUEST_ECN),
)
"""What a tap may hand us, and the feature by which the driver takes it."""

_TRANSIENT: Final = frozenset({errno.EAGAIN, errno.EINTR, errno.EIO, errno.ENOBUFS, errno.ENOMEM})
"""Errors after which a tap that is still there works again: it is down, or memory is short."""


class TapPort(Port):
    """Connects a `NetDevice` to a tap of the host.

    Checksums and segmentation are passed on both ways: the driver sends what the kernel completes,
    and gets from the kernel what it said it can complete.

    Args:
        name: The interface. It is created unless it exists, and is gone then when the port is
            closed, unless it was made persistent (``ip tuntap add NAME mode tap``).
        pairs: Queue pairs; a tap that exists must have been made with ``multi_queue`` exactly if
            there are several.

    Raises:
        DeviceError: There is no such tap, or no right to open it.

    Attributes:
        name: The interface.
    """

    def __init__(self, name: str, *, pairs: int = 1) -> None:
        if not 0 < len(os.fsencode(name)) < _IFNAMSIZ or "/" in name or not name.isprintable():
            raise DeviceError(f"{name!r} is no name of an interface: it has 1 to 15 characters")
        self.name, self.pairs = name, pairs
        self._fds: list[int] = []
        self._attached = [True] * pairs
        try:
            for _ in range(pairs):
                self._fds.append(_open_tap(name, multi=pairs > 1))
            self.offloads = self._probe_offloads()
            for pair in range(pairs):
                self.running(pair, False)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<TapPort {self.name}: {self.pairs} queue pairs>"

    def descriptor(self, pair: int) -> int:
        """The tap's descriptor of a queue pair, -1 once it is closed."""
        return self._fds[pair] if self._fds else -1

    def negotiated(self, features: int) -> None:
        """Have the kernel hand over unfinished frames only as the driver takes them."""
        flags = 0
        if features & Net.GUEST_CSUM:
            for flag, feature in _OFFLOADS:
                flags |= flag if features & feature else 0
        for fd in self._fds:
            # A tap that is gone has none.
            with suppress(OSError):
                fcntl.ioctl(fd, _TUNSETOFFLOAD, flags)

    def running(self, pair: int, running: bool) -> None:
        """Have the kernel use a queue of the tap exactly while the driver does.

        It would spread its frames over the others too. A tap with a single queue has no such
        switch: what arrives while no driver is there waits, up to the interface's ``txqueuelen``.
        """
        if self.pairs == 1 or not self._fds or self._attached[pair] == running:
            return
        flag = _IFF_ATTACH_QUEUE if running else _IFF_DETACH_QUEUE
        try:
            fcntl.ioctl(self._fds[pair], _TUNSETQUEUE, _IFREQ.pack(b"", flag))
        except OSError as error:
            LOG.report(
                log,
                logging.ERROR,
                "tap %s: queue %d cannot be %s: %s",
                self.name,
                pair,
                "attached" if running else "detached",
                os.strerror(error.errno or 0),
            )
            return
        self._attached[pair] = running

    def failed(self, error: int) -> bool:
        """Whether the tap is gone: it was deleted, most likely."""
        if error in _TRANSIENT:
            return False
        LOG.report(
            log,
            logging.ERROR,
            "tap %s: reading failed: %s; was the interface deleted? Its driver is told that the "
            "link is down. Start again once it is there",
            self.name,
            os.strerror(error),
        )
        return True

    def _probe_offloads(self) -> int:
        """The features that this kernel's taps have."""
        usable = 0
        for flag, feature in _OFFLOADS:
            with suppress(OSError):
                fcntl.ioctl(self._fds[0], _TUNSETOFFLOAD, _F_CSUM | flag | (flag == 0x08) * 0x02)
                usable |= feature
        fcntl.ioctl(self._fds[0], _TUNSETOFFLOAD, 0)
        if not usable & Net.GUEST_CSUM:
            return 0
        # What it can hand over it can take.
        usable |= Net.CSUM
        for guest, host in (
            (Net.GUEST_TSO4, Net.HOST_TSO4),
            (Net.GUEST_TSO6, Net.HOST_TSO6),
            (Net.GUEST_ECN, Net.HOST_ECN),
        ):
            usable |= host if usable & guest else 0
        return usable

    def close(self) -> None:
        """Close the tap. Calling it again does nothing."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


def _open_tap(name: str, *, multi: bool) -> int:
    """Open or create one queue of a tap."""
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        hint = "" if error.errno == errno.EACCES else " (is the module tun loaded?)"
        raise DeviceError(f"cannot open the tap {name}: {TUN}: {error.strerror}{hint}") from error
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if multi else 0)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(os.fsencode(name), flags))
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", _HEADER_BYTES))
        fcntl.ioctl(fd, _TUNSETVNETLE, struct.pack("i", 1))
    except OSError as error:
        os.close(fd)
        why = {
            errno.EPERM: "it takes CAP_NET_ADMIN, or a tap made for its user (ip tuntap add)",
            errno.EBUSY: "another process has it open",
            errno.EINVAL: "it exists and is no tap, or it was made "
            + ("without" if multi else "with")
            + " multi_queue",
        }.get(error.errno or 0, error.strerror)
        raise DeviceError(f"cannot open the tap {name}: {why}") from error
    except BaseException:
        os.close(fd)
        raise
    return fd
