"""vhost-user: devices for other processes, on both sides of the socket.

``messages`` is the wire format, ``channel`` the socket. On the back-end's side ``session`` knows
what a front-end may ask for and nothing of devices, ``connection`` joins it to memory and a
device's host, ``translator`` requests what the IOTLB lacks, and ``backend`` listens. On the other
side ``frontend`` sets devices up over a ``request_channel``, and ``iotlb_service`` answers their
misses.
"""

from guestio.vhost_user.backend import Backend
from guestio.vhost_user.frontend import Frontend
from guestio.virtio.statistics import Statistics

__all__ = ["Backend", "Frontend", "Statistics"]
