"""vhost-user: devices for other processes, on both sides of the socket.

``messages`` is the wire format, ``channel`` the socket, ``session`` what a front-end may ask for;
none of them knows devices. ``service`` joins them to memory, rings and a device, ``misses`` keeps
track of translations asked for, ``poller`` waits, ``backend`` listens. ``frontend`` is the other
side, on ``connection``.
"""

from guestio.vhost_user.backend import Backend
from guestio.vhost_user.service import Statistics

__all__ = ["Backend", "Statistics"]
