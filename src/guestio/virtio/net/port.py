"""What a network device is connected to."""

from __future__ import annotations

from collections.abc import Callable

Deliver = Callable[[int, bytes], bool]
"""Hands a frame to the driver, on a queue pair; False if it was dropped."""


class Port:
    """Where the frames of a `NetDevice` go to and come from.

    A subclass provides :meth:`send`, and calls :attr:`deliver` with what the driver is to receive.
    Or it provides :meth:`descriptor`: then frames are moved by the compiled core. All methods are
    called in the thread of the device's event loop, but :meth:`send` with queue threads: then in
    the thread of the transmit queue, and an announcement after a migration in the former.

    Attributes:
        offloads: Feature bits for checksums and segmentation that the port passes on both ways.
            Without them frames are complete and no longer than the MTU.
        deliver: ``deliver(pair, frame)`` hands the driver a frame from the destination address
            on, without a checksum at its end; returns False if it was dropped. From any thread.
            Set by the device.
        pairs: Queue pairs that it serves; frames for pair i come and go with the driver's i-th
            queues.
    """

    offloads: int = 0
    pairs: int = 1
    deliver: Deliver

    def send(self, pair: int, frame: bytes) -> bool:
        """Take a frame that the driver sends, 14 to 65,597 bytes.

        Returns:
            Whether it is on its way; False if it was dropped.
        """
        return False

    def descriptor(self, pair: int) -> int:
        """A descriptor, if frames come and go by one that does not block; else -1.

        Each is read and written with a header of 12 bytes before it, as `TapPort` has it.
        """
        return -1

    def negotiated(self, features: int) -> None:
        """Learn what the driver accepted; bits of :attr:`offloads` that it did not are not used."""

    def running(self, pair: int, running: bool) -> None:
        """Learn whether the driver receives on a queue pair. May be told the same again."""

    def failed(self, error: int) -> bool:
        """Learn that reading the descriptor failed with an errno.

        Returns:
            Whether the port is gone for good: the driver is told that its link is down.
        """
        return True

    def close(self) -> None:
        """Release what it holds. Calling it again does nothing."""
