"""Disks in processes of their own that kill themselves in the middle of the vhost-user protocol.

One process has everything imported and forks a server for each disk, which takes milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from tests.kit.serving import WAIT

if TYPE_CHECKING:
    from guestio.vhost_user.channel import Message

ROOT = Path(__file__).parents[2]

When = Literal["before", "unanswered"]
"""Whether a server dies before it handles a message, or when it has, and has not answered."""


class Mortal:
    """A server of a disk, in a process of its own.

    Attributes:
        path: Its socket.
        pid: Of its process.
    """

    def __init__(self, path: Path, pid: int, told: int) -> None:
        self.path = path
        self.pid = pid
        self._told = told

    @property
    def messages(self) -> list[str]:
        """The messages that it has begun to handle, in order."""
        return os.pread(self._told, 1 << 16, 0).decode().split()

    def kill(self) -> None:
        """Kill it, if it has not done so itself, and wait until its process is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.wait_dead()

    def wait_dead(self) -> None:
        """Wait until it has killed itself."""
        end = time.monotonic() + WAIT
        while Path(f"/proc/{self.pid}").exists():
            assert time.monotonic() < end, "the server does not die"
            time.sleep(0.001)

    def close(self) -> None:
        """Kill it and forget what it said."""
        self.kill()
        os.close(self._told)


class Mortals:
    """Makes them."""

    def __enter__(self) -> Self:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.kit.mortal", str(theirs.fileno())],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
            )
        ours.settimeout(WAIT)
        self._socket = ours
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.wait(WAIT)

    def make(self, path: Path, image: Path, die_at: int = 0, when: When = "before") -> Mortal:
        """Serve an image.

        Args:
            path: Its socket.
            image: The disk's contents.
            die_at: The number of the message that it dies at, from 1 on; 0 for none.
            when: How far it comes with that one.
        """
        told = os.memfd_create("messages")
        order = {"path": str(path), "image": str(image), "die_at": die_at, "when": when}
        socket.send_fds(self._socket, [json.dumps(order).encode()], [told])
        answer = self._socket.recv(100)
        assert answer, "no server was made"
        return Mortal(path, int(answer), told)


def serve(path: str, image: str, die_at: int, when: When, told: int, ready: int) -> None:
    """Serve a disk until killed."""
    from guestio.vhost_user import Backend
    from guestio.vhost_user import connection as connections
    from guestio.vhost_user.session import Session
    from guestio.virtio.blk import BlockDevice

    left = die_at

    class Deadly(Session):
        def handle(self, message: Message) -> bytes | None:
            nonlocal left
            left -= 1
            os.write(told, message.header.name.encode() + b"\n")
            if not left and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            reply = super().handle(message)
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return reply

    connections.Session = Deadly  # type: ignore[misc]  # for this process
    with Backend(BlockDevice(image, migration="local"), path) as backend:
        os.write(ready, b"x")
        os.close(ready)
        backend.serve()


def main() -> None:
    """Fork servers as they are ordered, until no orders can come any more."""
    import guestio.vhost_user
    import guestio.virtio.blk  # noqa: F401  # what the children need is there

    orders = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # none is waited for
    while True:
        data, (*fds,), _, _ = socket.recv_fds(orders, 4096, 1)
        if not data:
            return
        order = json.loads(data)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            orders.close()
            os.close(reading)
            try:
                serve(**order, told=fds[0], ready=writing)
            finally:
                os._exit(1)
        os.close(writing)
        os.close(fds[0])
        ready = os.read(reading, 1)
        os.close(reading)
        orders.send(str(child).encode() if ready else b"0")


if __name__ == "__main__":
    main()
