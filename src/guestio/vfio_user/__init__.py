"""vfio-user: PCI devices for other processes, and PCI devices in other processes.

``messages`` is the wire format, ``channel`` the socket. The device's side: ``session`` knows what a
client may ask for and nothing of devices, ``memory`` is what it has mapped, ``connection`` joins
both to a device's host, and ``server`` listens. The VMM's side: ``answers`` reads what a server
says, ``exchange`` sends requests and serves the server's, ``mapped`` is what its device may reach,
``client`` is the device as drivers use it, and ``target`` says what it may reach.
"""

from guestio.vfio_user.answers import Limits
from guestio.vfio_user.client import Client, DeviceRestartedError, Restored
from guestio.vfio_user.exchange import ServerGoneError
from guestio.vfio_user.region import ClientRegion, Doorbell
from guestio.vfio_user.server import Server
from guestio.vfio_user.statistics import Statistics
from guestio.vfio_user.target import VfioUserTarget

__all__ = [
    "Client",
    "ClientRegion",
    "DeviceRestartedError",
    "Doorbell",
    "Limits",
    "Restored",
    "Server",
    "ServerGoneError",
    "Statistics",
    "VfioUserTarget",
]
