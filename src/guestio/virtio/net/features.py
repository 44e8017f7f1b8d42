"""Numbers of the network device type (virtio 1.4, sections 5.1.3 to 5.1.6)."""

from __future__ import annotations

import enum
from typing import Final


class Net(enum.IntFlag):
    """Feature bits (section 5.1.3)."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    MTU = 1 << 3
    MAC = 1 << 5
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16
    CTRL_VQ = 1 << 17
    CTRL_RX = 1 << 18
    CTRL_RX_EXTRA = 1 << 20
    GUEST_ANNOUNCE = 1 << 21
    MQ = 1 << 22
    CTRL_MAC_ADDR = 1 << 23


GUEST_OFFLOADS: Final = Net.GUEST_CSUM | Net.GUEST_TSO4 | Net.GUEST_TSO6 | Net.GUEST_ECN
"""What a driver may receive unfinished."""
HOST_OFFLOADS: Final = Net.CSUM | Net.HOST_TSO4 | Net.HOST_TSO6 | Net.HOST_ECN
"""What a driver may send unfinished."""


class LinkStatus(enum.IntFlag):
    """The ``status`` field of the configuration space (section 5.1.4)."""

    LINK_UP = 1
    ANNOUNCE = 2


class Class(enum.IntEnum):
    """Classes of control commands (section 5.1.6.5)."""

    RX = 0
    MAC = 1
    ANNOUNCE = 3
    MQ = 4


ACK_OK: Final = 0
ACK_ERR: Final = 1

MIN_MTU: Final = 68
"""Bytes (section 5.1.4.1)."""
MAX_MTU: Final = 65535
