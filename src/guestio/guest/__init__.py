"""A guest without a virtual machine, to drive vhost-user devices with.

``driver`` drives a device of any type, ``disk`` a block device; ``queue`` and ``blkqueue`` are
their queues, ``dma`` the memory management of the guest's kernel. The command's demonstration and
benchmark use it, and :mod:`guestio.testing` offers it to users' tests.
"""

from guestio.guest.blkqueue import BlkError, Request
from guestio.guest.disk import BlkConfig, ScriptedGuest
from guestio.guest.dma import GuestBuffer, IommuMode
from guestio.guest.driver import Driver, DriverBuffer
from guestio.guest.queue import Shape

__all__ = [
    "BlkConfig",
    "BlkError",
    "Driver",
    "DriverBuffer",
    "GuestBuffer",
    "IommuMode",
    "Request",
    "ScriptedGuest",
    "Shape",
]
