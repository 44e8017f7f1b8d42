"""Devices and their queues.

``device`` says what a device is, ``driver`` is the other side of a queue, ``blk`` and ``iommu``
are devices. Rings are walked by the compiled core.
"""

from guestio._core.virtio.chain import Chain
from guestio._core.virtio.ring import SplitRing
from guestio.virtio.device import Device, DeviceId, Status

__all__ = ["Chain", "Device", "DeviceId", "SplitRing", "Status"]
