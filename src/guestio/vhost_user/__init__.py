"""vhost-user: devices for other processes, on both sides of the socket.

``messages`` is the wire format, ``channel`` the socket. On the back-end's side ``session`` knows
what a front-end may ask for and nothing of devices, ``service`` joins it to memory, rings and a
device, ``translations`` asks for what the IOTLB lacks, ``poller`` waits and ``backend`` listens.
On the other side ``frontend`` sets devices up over an ``exchange`` of requests and replies, and
``iotlb_service`` answers their misses.
"""

from guestio.vhost_user.backend import Backend
from guestio.vhost_user.frontend import Frontend
from guestio.vhost_user.statistics import Statistics

__all__ = ["Backend", "Frontend", "Statistics"]
