"""Starting a disk's server so that one of its calls can be made to fail, and having it fail."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shlex
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

FUNCTIONS = (
    *("read", "write", "close", "recv", "send", "recvmsg", "sendmsg", "accept4", "epoll_create1"),
    *("epoll_ctl", "epoll_wait", "eventfd", "eventfd_write", "mmap", "ftruncate"),
    *("memfd_create", "fallocate", "fdatasync", "preadv2", "pwritev", "pwrite", "poll", "fstat"),
    *("fcntl", "getpeername", "pthread_create", "malloc", "python"),
    *("socket", "connect", "shutdown", "open", "process_vm_readv", "process_vm_writev"),
)
"""What can fail. `malloc` is memory for the compiled core, `python` memory for anything else."""

SIGTERM = -int(signal.SIGTERM)
"""In the place of an error: the signal arrives, and the call is made."""

ERRORS: dict[str, tuple[int, ...]] = {
    "read": (errno.EINTR, errno.EAGAIN, errno.EIO),
    "write": (errno.EINTR, errno.EAGAIN, errno.EIO, errno.ENOSPC),
    "close": (errno.EINTR, errno.EIO),
    "recv": (errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.ECONNRESET),
    "send": (errno.EINTR, errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EPIPE),
    "recvmsg": (errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.ECONNRESET),
    "sendmsg": (errno.EINTR, errno.EAGAIN, errno.ENOBUFS, errno.EMFILE, errno.EPIPE),
    "accept4": (
        *(errno.EINTR, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
        *(errno.ECONNABORTED, errno.EPERM),
    ),
    "epoll_create1": (errno.EMFILE, errno.ENOMEM),
    "epoll_ctl": (errno.ENOMEM, errno.ENOSPC, errno.EPERM),
    "epoll_wait": (errno.EINTR,),
    "eventfd": (errno.EMFILE, errno.ENOMEM),
    "eventfd_write": (errno.EINTR,),
    "mmap": (errno.ENOMEM, errno.EAGAIN, errno.EINVAL),
    "ftruncate": (errno.EINTR, errno.EIO, errno.ENOMEM),
    "memfd_create": (errno.EMFILE, errno.ENOMEM),
    "fallocate": (errno.EINTR, errno.EIO, errno.ENOSPC, errno.EOPNOTSUPP),
    "fdatasync": (errno.EINTR, errno.EIO, errno.ENOSPC),
    "preadv2": (errno.EINTR, errno.EAGAIN, errno.EIO, errno.EOPNOTSUPP, errno.ENOMEM),
    "pwritev": (errno.EINTR, errno.EIO, errno.ENOSPC, errno.ENOMEM),
    "pwrite": (errno.EINTR, errno.EIO, errno.ENOSPC),
    "poll": (errno.EINTR, errno.ENOMEM),
    "fstat": (errno.EIO, errno.ENOMEM),
    "fcntl": (errno.EINTR, errno.EMFILE),
    "getpeername": (errno.ENOBUFS, errno.ENOTCONN),
    "pthread_create": (errno.EAGAIN,),
    "malloc": (errno.ENOMEM,),
    "python": (errno.ENOMEM,),
}
"""The errors that each may have in a server."""

CLIENT_ERRORS: dict[str, tuple[int, ...]] = {
    **{
        name: ERRORS[name]
        for name in (
            *("close", "recv", "send", "recvmsg", "sendmsg", "eventfd", "mmap", "ftruncate"),
            *("memfd_create", "poll", "fstat", "fcntl", "pthread_create", "malloc", "python"),
        )
    },
    "socket": (errno.EMFILE, errno.ENFILE, errno.ENOBUFS),
    "connect": (errno.EINTR, errno.EAGAIN, errno.ECONNREFUSED, errno.EACCES),
    "shutdown": (errno.ENOTCONN, errno.ENOBUFS),
    "open": (errno.EMFILE, errno.ENOMEM, errno.EACCES),
    "process_vm_readv": (errno.ENOMEM, errno.EFAULT, errno.EPERM),
    "process_vm_writev": (errno.ENOMEM, errno.EFAULT, errno.EPERM),
}
"""The same in a vfio-user client."""

_PAGE = struct.Struct("=IIQiI64Q")
_WAIT = 30.0


def build(directory: Path) -> Path:
    """Compile the shim; its path."""
    library = directory / "fail_nth.so"
    source = Path(__file__).with_name("shim.c")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, "-O2", "-Wall", "-fPIC", "-shared", "-o", str(library), str(source)]
    subprocess.run([*command, "-ldl"], check=True)
    return library


def arm_page(page: mmap.mmap, function: str | None, nth: int, error: int) -> None:
    """Count calls from now on, and have the nth one of a function fail."""
    number = 0 if function is None else FUNCTIONS.index(function)
    struct.pack_into("=IIQiI", page, 0, 0, number, nth, error, 0)
    page[24 : _PAGE.size] = bytes(_PAGE.size - 24)
    struct.pack_into("=I", page, 0, 1)


def disarm_page(page: mmap.mmap) -> tuple[dict[str, int], bool]:
    """Have no more calls fail; how often each was called, and whether one did fail."""
    struct.pack_into("=I", page, 0, 0)
    _, _, _, _, injected, *calls = _PAGE.unpack(page[: _PAGE.size])
    return dict(zip(FUNCTIONS, calls, strict=False)), bool(injected)


def open_page(directory: Path) -> tuple[mmap.mmap, dict[str, str]]:
    """The page by which the shim is told what to do, and the environment that has it look there."""
    control = directory / "control"
    control.write_bytes(bytes(_PAGE.size))
    with control.open("r+b") as file:
        page = mmap.mmap(file.fileno(), _PAGE.size)
    # Python's own allocator asks for memory so rarely that little could fail.
    return page, os.environ | {"FAIL_NTH": str(control), "PYTHONMALLOC": "malloc"}


def fail_at_start(
    library: Path, directory: Path, image: Path, function: str, nth: int, error: int
) -> tuple[int, str]:
    """Have a call fail while `guestio blk` starts; its exit status, and what it said.

    If it does start it is ended.
    """
    page, environment = open_page(directory)
    with page:
        arm_page(page, function, nth, error)
        process = subprocess.Popen(
            [sys.executable, "-m", "guestio", "blk", str(image), "--socket", str(directory / "s")],
            env=environment | {"LD_PRELOAD": str(library)},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        with process.stderr:
            said = process.stderr.readline()
            if said.startswith("listening"):
                process.terminate()
            said += process.stderr.read()
        return process.wait(_WAIT), said


class Server:
    """`guestio blk`, or another command that serves an image, in the shim.

    Args:
        library: The shim.
        directory: A place of its own, with the image.
        image: The image.
        options: More options of the command.
        command: Which command.

    Attributes:
        socket: Where it listens.
        pid: Its process.
        log: The last lines that it wrote.
    """

    def __init__(
        self, library: Path, directory: Path, image: Path, *options: str, command: str = "blk"
    ) -> None:
        self.socket = directory / "disk.sock"
        self._page, environment = open_page(directory)
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "guestio", command, str(image)),
                *("--socket", str(self.socket), "--io-threads", "1", *options),
            ],
            env=environment | {"LD_PRELOAD": str(library)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.log: deque[str] = deque(maxlen=60)
        assert self._process.stderr is not None
        first = self._process.stderr.readline()
        assert first.startswith("listening"), first + self._process.stderr.read()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line.rstrip())

    def arm(self, function: str | None = None, nth: int = 0, error: int = 0) -> None:
        """Count calls from now on, and have the nth one of a function fail."""
        arm_page(self._page, function, nth, error)

    def disarm(self) -> tuple[dict[str, int], bool]:
        """Have no more fail; how often each was called, and whether one did fail."""
        return disarm_page(self._page)

    @property
    def status(self) -> int | None:
        """Its exit status, or None while it lives."""
        return self._process.poll()

    def footprint(self) -> tuple[int, int, int]:
        """Open descriptors, threads, and mappings of memory that a front-end shared."""
        base = Path(f"/proc/{self.pid}")
        maps = (base / "maps").read_text().splitlines()
        return (
            sum(1 for _ in (base / "fd").iterdir()),
            sum(1 for _ in (base / "task").iterdir()),
            sum(1 for line in maps if "memfd:" in line),
        )

    def descriptors(self) -> list[str]:
        """What its descriptors refer to, for messages."""
        found = []
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(f"{fd.name} {fd.readlink()}")
        return sorted(found)

    def terminate(self) -> int:
        """Have it end by SIGTERM; its exit status."""
        self._process.terminate()
        return self.wait()

    def wait(self) -> int:
        """Wait for its end; its exit status.

        Raises:
            subprocess.TimeoutExpired: It does not end.
        """
        return self._process.wait(_WAIT)

    def close(self) -> None:
        """End it in any case."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._page.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def serving(
    library: Path, directory: Path, image: Path, *options: str, command: str = "blk"
) -> Iterator[Server]:
    """A server that ends as it should: by SIGTERM, with status 0 and without its socket."""
    with Server(library, directory, image, *options, command=command) as server:
        yield server
        assert server.terminate() == 0
        assert not server.socket.exists()
