"""vfio-user: PCI devices for other processes.

``messages`` is the wire format, ``channel`` the socket. ``session`` knows what a client may ask for
and nothing of devices, ``memory`` is what it has mapped, ``connection`` joins both to a device's
host, and ``server`` listens.
"""

from guestio.vfio_user.server import Server
from guestio.vfio_user.statistics import Statistics

__all__ = ["Server", "Statistics"]
