"""The test kit: what users need to test devices and mapping targets of their own.

The guest without a virtual machine comes from :mod:`guestio.guest`.
"""

from guestio.guest import BlkConfig, BlkError, IommuMode, Request, ScriptedGuest, Shape

__all__ = ["BlkConfig", "BlkError", "IommuMode", "Request", "ScriptedGuest", "Shape"]
