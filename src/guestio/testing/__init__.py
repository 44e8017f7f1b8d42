"""The test kit: what users need to test devices and mapping targets of their own.

``guest`` is a guest without a virtual machine, ``blkqueue`` the queues of its disk, ``dma`` the
memory management of its kernel.
"""

from guestio.testing.blkqueue import BlkError, Request, Shape
from guestio.testing.dma import IommuMode
from guestio.testing.guest import BlkConfig, ScriptedGuest

__all__ = ["BlkConfig", "BlkError", "IommuMode", "Request", "ScriptedGuest", "Shape"]
