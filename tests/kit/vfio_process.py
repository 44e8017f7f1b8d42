"""A vfio-user server in a process of its own, which can be killed, and killed in the middle.

Run as a program it serves a `Toy`; with a number it kills itself when it handles that message.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self

from tests.kit.serving import WAIT, until

ROOT = Path(__file__).parents[2]


class ServerProcess:
    """A toy that is served in another process.

    Args:
        path: Where it listens.
        die_at: Kill it with SIGKILL when it handles the message of this number, from 1 on.
        after: Kill it once that was answered, not before.
        bars: "other" for a device that is another one.
    """

    def __init__(self, path: Path, die_at: int = 0, *, after: bool = False, kind: str = "toy"):
        self.path = path
        arguments = [str(path), str(die_at), "after" if after else "before", kind]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kit.vfio_process", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline(), "the server did not start"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Kill it, if it has not done so itself."""
        self._process.kill()
        self._process.wait(WAIT)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def stop(self) -> None:
        """Stop it without ending it: it hangs."""
        self._process.send_signal(signal.SIGSTOP)

    def wait_dead(self) -> None:
        """Wait until it has killed itself."""
        until(lambda: self._process.poll() is not None)


def main() -> None:
    """Serve until killed."""
    from guestio.pci import Bar
    from guestio.vfio_user import Server
    from guestio.vfio_user.session import Session
    from tests.kit.vfio_client import PAGE, Toy
    from tests.kit.vfio_model import SlowConnection

    path, die_at, when, kind = sys.argv[1:]
    left = int(die_at)
    handle = Session.handle

    class Deadly(Session):
        def handle(self, message):  # type: ignore[no-untyped-def]  # as Session's
            nonlocal left
            left -= 1
            if not left and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            answer = handle(self, message)
            if not left:
                # Answered, and dead.
                if answer is not None:
                    connection = self._handler
                    connection._channel.send(answer, self.reply_fds)
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

    if left:
        import guestio.vfio_user.connection
        import guestio.vfio_user.server

        guestio.vfio_user.connection.Session = Deadly  # type: ignore[misc]  # for this process
        # Each message is to be seen: what the core handles by itself depends on when it comes.
        guestio.vfio_user.server.Connection = SlowConnection  # type: ignore[misc]  # the same
    device = Toy()
    if kind == "other":
        device.bars = {0: Bar(2 * PAGE, width=8)}
    server = Server(device, path)
    print("ready", flush=True)
    server.serve()


if __name__ == "__main__":
    main()
