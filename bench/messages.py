"""What a vfio-user server spends on a client's messages: doorbells, register reads, mappings.

A device in Python is served in this process, to a client in another one: posted doorbells in runs,
register reads and pairs of map and unmap one after the other, each waited for, as QEMU sends them
behind an IOMMU. CPU time of the serving process, user and system, the least of some rounds; busy
neighbors add to it all the same. `--slow` has all messages take the way through Python.

    ./run bench messages
    ./run bench messages --mappings 1000000
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from guestio.pci import Bar, CallbackDoorbell, EventfdDoorbell, PciDevice, PciHost
from guestio.vfio_user.channel import Channel
from guestio.vfio_user.connection import Connection
from guestio.vfio_user.messages import Command, HeaderFlag
from guestio.vfio_user.statistics import Statistics
from guestio.virtio.loop import EventLoop

PAGE = 4096
BELL, CALLBACK = 0x100, 0x200
RUN = 64
"""Doorbells that a client posts before it waits."""


class Registers(PciDevice):
    """Two registers that are doorbells, and others that are not."""

    vendor_id, device_id = 0x1234, 0x0003
    bars = {0: Bar(PAGE)}  # noqa: RUF012 - never changed

    def __init__(self, counter: int) -> None:
        self._counter = counter
        self.value = 0

    def attached(self, host: PciHost) -> None:
        host.add_doorbell(0, BELL, 4, EventfdDoorbell(self._counter))
        host.add_doorbell(0, CALLBACK, 4, CallbackDoorbell(lambda *_: None))

    def read(self, bar: int, offset: int, size: int) -> int:
        return self.value

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.value = value


class SlowConnection(Connection):
    """A connection all of whose messages take the way through Python."""

    def _feed_core(self) -> None:
        pass

    def _next(self) -> Any:
        return self._channel.recv()


class Client:
    """The other end, in a process of its own."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = os.memfd_create("memory")
        os.ftruncate(self.fd, 256 * PAGE)

    def ask(self, command: int, payload: bytes, fd: int = -1) -> None:
        data = struct.pack("<HHIII", 1, command, 16 + len(payload), 0, 0) + payload
        if fd < 0:
            self.sock.sendall(data)
        else:
            socket.send_fds(self.sock, [data], [fd])
        answer = self.sock.recv(4096)
        if struct.unpack_from("<HHIII", answer)[4]:
            raise SystemExit(f"{Command(command).name} was refused")

    def post(self, offset: int) -> None:
        payload = struct.pack("<QIII", offset, 0, 4, 7)
        flags = int(HeaderFlag.NO_REPLY)
        message = struct.pack("<HHIII", 1, Command.REGION_WRITE, 36, flags, 0) + payload
        for _ in range(RUN):
            self.sock.sendall(message)
        # Wait until they are handled.
        self.read()

    def read(self) -> None:
        self.ask(Command.REGION_READ, struct.pack("<QII", 0, 0, 4))

    def map(self, page: int) -> None:
        payload = struct.pack("<IIQQQ", 32, 3, page % 256 * PAGE, page * PAGE, PAGE)
        self.ask(Command.DMA_MAP, payload, self.fd)

    def unmap(self, page: int, count: int = 1) -> None:
        self.ask(Command.DMA_UNMAP, struct.pack("<IIQQ", 24, 0, page * PAGE, count * PAGE))


def serve(script: Callable[[Client], None], standing: int, *, slow: bool) -> float:
    """CPU seconds of serving a client that does what a script says, once it has begun."""
    loop, counter = EventLoop(), os.eventfd(0, os.EFD_NONBLOCK)
    device = Registers(counter)
    host = PciHost(device, loop)
    device.attached(host)
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        ours.close()
        client = Client(theirs)
        client.ask(Command.VERSION, bytes(4) + b'{"capabilities":{}}')
        for page in range(standing):
            client.map((1 << 30) + 2 * page)
        client.map(1 << 29)
        client.read()
        script(client)
        os._exit(0)
    theirs.close()
    kind = SlowConnection if slow else Connection
    connection = kind(Channel(ours), host, loop, Statistics(), revoke_after=1, ending=lambda: False)
    # What comes before the script: VERSION, the standing mappings, the last one, and a read.
    while not connection._stats.region_reads:
        loop.run_once()
    began = time.process_time()
    while not connection.closed:
        loop.run_once()
    spent = time.process_time() - began
    os.waitpid(child, 0)
    loop.close()
    os.close(counter)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench messages", description=__doc__)
    parser.add_argument("--count", type=int, default=6400, help="messages of a round (6400)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the least counts")
    parser.add_argument("--standing", type=int, default=100, help="mappings beside them (100)")
    parser.add_argument("--mappings", type=int, help="instead, make and remove so many mappings")
    parser.add_argument("--slow", action="store_true", help="all of it through Python")
    given = parser.parse_args()
    if given.mappings:
        many(given.mappings, slow=given.slow)
        return

    def doorbells(offset: int) -> Callable[[Client], None]:
        def script(client: Client) -> None:
            for _ in range(given.count // RUN):
                client.post(offset)

        return script

    def reads(client: Client) -> None:
        for _ in range(given.count):
            client.read()

    def pairs(client: Client) -> None:
        for page in range(given.count):
            client.map(page)
            client.unmap(page)

    table = Table("message", "us of CPU")
    for name, script in (
        (f"posted doorbell, eventfd, {RUN} at a time", doorbells(BELL)),
        (f"posted doorbell, callback, {RUN} at a time", doorbells(CALLBACK)),
        ("register read", reads),
        ("map and unmap", pairs),
    ):
        least = min(serve(script, given.standing, slow=given.slow) for _ in range(given.rounds))
        table.add_row(name, f"{1e6 * least / given.count:.1f}")
    Console().print(table)


def many(count: int, *, slow: bool) -> None:
    """Make very many mappings, and remove them with one message."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def maps(client: Client) -> None:
        for page in range(count):
            client.map(2 * page)

    def all_of_it(client: Client) -> None:
        maps(client)
        client.unmap(0, 2 * count)

    before = resident()
    made = serve(maps, 0, slow=slow)
    print(f"map: {1e6 * made / count:.1f} us of CPU each, end of the connection included")
    both = serve(all_of_it, 0, slow=slow)
    print(f"map, and unmap of all at once: {1e6 * both / count:.1f} us of CPU each")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"at most {(peak - before) / count:.0f} bytes more in this process for each")


if __name__ == "__main__":
    main()
