"""A guest without a virtual machine, to drive vhost-user block devices with.

``disk`` is the guest, ``blkqueue`` the queues of its driver, ``dma`` the memory management of its
kernel. The command's demonstration and benchmark use it; so may anybody's tests.
"""

from guestio.guest.blkqueue import BlkError, Request, Shape
from guestio.guest.disk import BlkConfig, ScriptedGuest
from guestio.guest.dma import GuestBuffer, IommuMode

__all__ = [
    "BlkConfig",
    "BlkError",
    "GuestBuffer",
    "IommuMode",
    "Request",
    "ScriptedGuest",
    "Shape",
]
