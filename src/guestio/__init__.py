"""The memory side of virtual machines."""

from guestio.addr import IovaRange as IovaRange
from guestio.addr import MappedRange as MappedRange
from guestio.addr import Ordering as Ordering
from guestio.addr import Permissions as Permissions
from guestio.errors import IotlbFails as IotlbFails
