"""A server at a Unix socket that can be watched from outside."""

from __future__ import annotations

import logging
import os
import socket
from abc import abstractmethod
from typing import TYPE_CHECKING

from guestio.control.schema import Explanation, Status, Survey
from guestio.peer.server import PeerServer

if TYPE_CHECKING:
    from guestio.control.server import ControlServer


class WatchedServer(PeerServer):
    """A :class:`~guestio.peer.server.PeerServer` with a control socket, if one is wanted.

    Args:
        path, connect, log: As for `PeerServer`.
        control: Where the control socket is to be, or None.
        http: ``HOST:PORT`` to be watched at over TCP, or None.
        http_token: What each request over TCP must bring as a bearer token; needed unless only this
            machine reaches it.

    Raises:
        DeviceError, ValueError: As from `PeerServer` and `ControlServer`.

    Attributes:
        control: The control socket, or None.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | socket.socket,
        *,
        connect: bool,
        log: logging.Logger,
        control: str | os.PathLike[str] | None = None,
        http: str | None = None,
        http_token: str | None = None,
    ) -> None:
        super().__init__(path, connect=connect, log=log)
        self.control: ControlServer | None = None
        if control is None and http is None:
            return
        # It needs the extra, and takes its time to be imported.
        from guestio.control.server import ControlServer

        try:
            self.control = ControlServer(self, control, http=http, token=http_token)
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def status(self) -> Status:
        """What the server is doing at this moment, as ``/status`` shows it; the rates are 0.

        From any thread, and without waiting. Cost: about 0.1 ms, more for many queues.
        """

    @abstractmethod
    def explain(self, address: int, length: int = 1, *, endpoint: int | None = None) -> Explanation:
        """What an address of the device leads to, and what happened to it last.

        What happened is known as long as it is recorded and still in a ring of records; with a
        control socket, changes of translations are. From any thread, and without waiting.

        Args:
            address: An address that the device's driver uses.
            length: Bytes from there on, up to 1 MiB.
            endpoint: If the device is a virtio-iommu, the endpoint behind it whose address it is;
                None for what the device's own queues use.

        Raises:
            InvalidAddressError: The range is empty, too long, or passes 2**64.
            DeviceError: The device is no virtio-iommu, or has no such endpoint.
        """

    @abstractmethod
    def survey(self, address: int, length: int, parts: int, *, memory: bool = False) -> Survey:
        """What a range of addresses has, in equal parts, as ``/map`` shows it; without history.

        From any thread; a change of the mappings waits for a few microseconds at most.

        Args:
            address: Where the range begins.
            length: Bytes, a multiple of ``parts``; up to ``2**64``.
            parts: How many parts, 2 to 4096.
            memory: Whether the addresses are those of the memory that is shared, as ``/status``
                lists it, rather than those that the device's driver uses.

        Raises:
            InvalidAddressError: The range is empty, passes 2**64, or has no such parts.

        Cost: O(parts * log(mappings)), and for memory O(pages that are counted / 64).
        """

    def close(self) -> None:
        """As `PeerServer.close`; the control socket goes as well."""
        super().close()
        if self.control is not None:
            self.control.close()
