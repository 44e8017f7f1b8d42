"""A proxy in a thread, and a back-end by hand for it to talk to."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from pathlib import Path
from typing import Any, Self

from guestio.faults.proxy import Proxy
from guestio.vhost_user.channel import Channel, Message
from guestio.vhost_user.messages import encode_message
from tests.kit.serving import SERVED_WITHIN, WAIT, Driver, promptly, until


class Proxying:
    """A proxy in a thread.

    Args:
        path: Where it listens.
        backend: Where its back-end does.
        options: More arguments.
    """

    def __init__(self, path: Path, backend: Path, **options: Any) -> None:
        self.path = path
        self.proxy = Proxy(path, backend, **options)
        self.stats = self.proxy.statistics
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="proxying")

    def _run(self) -> None:
        try:
            self.proxy.serve()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.proxy.stop()
        self._thread.join(WAIT)
        assert not self._thread.is_alive(), "the proxy does not stop"
        self.proxy.close()
        assert self.error is None, self.error
        assert not self.path.exists()

    def let_go(self) -> None:
        """Wait until the proxy has done away with a front-end that left."""
        until(lambda: self.proxy._connection is None, "the proxy holds on")

    def check_serves(self) -> None:
        """Have one honest front-end served, in time and to the end."""
        with promptly(SERVED_WITHIN), Driver(self.path) as driver:
            assert driver.run(0, b"honest")[1] == b"tsenoh"
        self.let_go()


class HandBackend:
    """A back-end whose messages are the test's."""

    def __init__(self, path: Path) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(4)
        self._listening.settimeout(WAIT)
        self.channel: Channel | None = None

    def accept(self) -> Channel:
        connected, _ = self._listening.accept()
        self.channel = Channel(connected)
        return self.channel

    def receive(self) -> Message:
        assert self.channel is not None
        message = self.channel.recv(WAIT)
        assert message is not None
        return message

    def reply(self, request: int, value: int | bytes, fds: tuple[int, ...] = ()) -> None:
        assert self.channel is not None
        payload = struct.pack("=Q", value) if isinstance(value, int) else value
        self.channel.send(encode_message(request, payload, reply=True), fds)

    def hang_up(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.hang_up()
        self._listening.close()
