"""A network device, and what it can be connected to.

``device`` is what the driver sees, ``port`` the interface of what frames go to and come from;
``tap`` and ``responder`` are ports, ``pcapng`` records frames.
"""

from guestio.virtio.net.device import NetDevice
from guestio.virtio.net.pcapng import CaptureFile
from guestio.virtio.net.port import Port
from guestio.virtio.net.responder import Responder
from guestio.virtio.net.tap import TapPort

__all__ = ["CaptureFile", "NetDevice", "Port", "Responder", "TapPort"]
