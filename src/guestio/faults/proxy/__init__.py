"""A proxy between any vhost-user front-end and any back-end: it passes on, watches and interferes.

:class:`Proxy` is the server behind ``guestio proxy``; an :class:`Addon` is a Python file whose
functions are given what passes: :class:`ProxyMessage`, :class:`Request`, :class:`Completion` and
:class:`ProxyFault`.
"""

from guestio.faults.proxy.addon import Addon, AddonError, ProxyFault, ProxyMessage
from guestio.faults.proxy.queue import Completion, Request
from guestio.faults.proxy.server import RULES, Notifications, Proxy, ProxyStatistics

__all__ = [
    "RULES",
    "Addon",
    "AddonError",
    "Completion",
    "Notifications",
    "Proxy",
    "ProxyFault",
    "ProxyMessage",
    "ProxyStatistics",
    "Request",
]
