"""Devices and their queues, independent of any transport.

``device`` says what a device is, ``queue`` serves its queues, ``host`` is what a transport drives
and a device uses, ``loop`` waits, ``translator`` requests translations, ``layout`` says where a
ring is. ``driver`` is the other side of a queue; ``blk``, ``console``, ``net``, ``rng`` and
``iommu`` are devices. Rings are walked by the compiled core.
"""

from guestio._core.virtio.chain import Chain
from guestio._core.virtio.split import SplitRing
from guestio.virtio.blk import BlockDevice
from guestio.virtio.console import ConsoleDevice, ConsolePort
from guestio.virtio.device import Device, DeviceId, Status
from guestio.virtio.host import DeviceHost
from guestio.virtio.input import AbsInfo, InputDevice
from guestio.virtio.net import NetDevice
from guestio.virtio.queue import DeviceQueue
from guestio.virtio.rng import EntropyDevice
from guestio.virtio.statistics import Statistics

__all__ = [
    "AbsInfo",
    "BlockDevice",
    "Chain",
    "ConsoleDevice",
    "ConsolePort",
    "Device",
    "DeviceHost",
    "DeviceId",
    "DeviceQueue",
    "EntropyDevice",
    "InputDevice",
    "NetDevice",
    "SplitRing",
    "Statistics",
    "Status",
]
