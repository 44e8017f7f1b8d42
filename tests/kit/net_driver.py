"""A network driver without a VM, and ports to plug its card into."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from pathlib import Path
from shutil import which
from typing import Any, Self

from guestio.addr import Permissions
from guestio.memory import AtomicBitmap, Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user import Frontend
from guestio.virtio.driver import DriverQueue
from guestio.virtio.layout import RingLayout
from guestio.virtio.net import Port
from guestio.virtio.net.features import Net
from tests.kit.serving import PLATFORM, VERSION_1, WAIT, until

HEADER = 12
MAC = b"\x52\x54\x00\x12\x34\x56"
PEER = b"\x02\x00\x00\x00\x00\x01"
MODERN = VERSION_1 | Net.MAC | Net.STATUS | Net.CTRL_VQ | Net.CTRL_RX | Net.CTRL_RX_EXTRA
SIZE = 64
STEP = 0x10000
"""Between the rings, and between the buffers, of two queues."""
BUFFERS = 0x200000


def frame(size: int = 60, *, to: bytes = MAC, of: bytes = PEER, seed: int = 1) -> bytes:
    """A frame of an experimental type."""
    body = bytes((seed + i) & 0xFF for i in range(size - 14))
    return to + of + b"\x88\xb5" + body


class Mirror(Port):
    """Sends each frame back to where it came from, and remembers it."""

    def __init__(self, pairs: int = 1, offloads: int = 0) -> None:
        self.pairs, self.offloads = pairs, offloads
        self.seen: list[bytes] = []
        self.closed = 0

    def send(self, pair: int, frame: bytes) -> bool:
        self.seen.append(frame)
        self.deliver(pair, frame[6:12] + frame[:6] + frame[12:])
        return True

    def close(self) -> None:
        self.closed += 1


class Wire(Port):
    """A cable as a tap is one: each packet of a socket is a header and a frame.

    Attributes:
        far: The other end of each pair.
        errors: Errors that reading it had.
    """

    def __init__(self, pairs: int = 1, offloads: int = 0) -> None:
        self.pairs, self.offloads = pairs, offloads
        ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(pairs)]
        self.near = [near for near, _ in ends]
        self.far = [far for _, far in ends]
        for near in self.near:
            near.setblocking(False)
        for far in self.far:
            far.settimeout(WAIT)
        self.errors: list[int] = []
        self.running_pairs: set[int] = set()

    def descriptor(self, pair: int) -> int:
        return self.near[pair].fileno()

    def running(self, pair: int, running: bool) -> None:
        (self.running_pairs.add if running else self.running_pairs.discard)(pair)

    def failed(self, error: int) -> bool:
        self.errors.append(error)
        return True

    def put(self, data: bytes, pair: int = 0, header: bytes = bytes(HEADER)) -> None:
        self.far[pair].send(header + data)

    def get(self, pair: int = 0) -> tuple[bytes, bytes]:
        """Header and frame of what the driver sent."""
        data = self.far[pair].recv(1 << 17)
        return data[:HEADER], data[HEADER:]

    def close(self) -> None:
        for end in (*self.near, *self.far):
            end.close()


class NetGuest:
    """A driver of a network card: rings and buffers in shared memory, addresses as they are."""

    MEMORY = 0x800000

    def __init__(
        self,
        path: Path,
        *,
        features: int = int(MODERN | Net.MRG_RXBUF),
        pairs: int = 1,
        used_pairs: int | None = None,
        iommu: bool = False,
        map_all: bool = True,
        size: int = SIZE,
        start: bool = True,
        tracked: bool = False,
    ) -> None:
        self.frontend = Frontend(path, timeout=WAIT)
        self.queues: dict[int, DriverQueue] = {}
        self.handles: dict[int, Any] = {}
        self.size = size
        self._next: dict[int, int] = {}
        self.header = HEADER if features & (VERSION_1 | Net.MRG_RXBUF) else 10
        try:
            self.backing = Backing.memfd(self.MEMORY)
            written = AtomicBitmap(self.MEMORY) if tracked else None
            self.memory = GuestRegionCollection.from_regions(
                [MmapRegion(0, self.backing, bitmap=written)]
            )
            self.frontend.negotiate(features | (PLATFORM if iommu else 0))
            self.features = self.frontend.features
            self.frontend.set_memory(self.memory)
            self._mapped = (self.MEMORY if map_all else BUFFERS) if iommu else 0
            self.map_memory()
            multi = bool(features & Net.MQ)
            self.control_index = 2 * pairs if multi else 2
            if start:
                for pair in range(used_pairs or (pairs if multi else 1)):
                    self.start(2 * pair)
                    self.start(2 * pair + 1)
                if features & Net.CTRL_VQ:
                    self.start(self.control_index)
        except BaseException:
            self.close()
            raise

    def map_memory(self) -> None:
        """Let the device reach memory, if there is an IOMMU."""
        if self._mapped:
            self.frontend.iotlb.map(0, 0, self._mapped, Permissions.READ_WRITE)

    def start(self, index: int) -> None:
        """Make a queue's ring anew and start it."""
        layout = RingLayout.contiguous(STEP * (1 + index), self.size)
        if index in self.queues:
            self.queues[index].reset()
        else:
            self.queues[index] = DriverQueue(self.memory, layout)
            self.queues[index].reset()
        self._next[index] = 0
        self.handles[index] = self.frontend.start_queue(index, layout)

    def stop(self) -> None:
        """Stop all queues, and reset the device."""
        for index in list(self.handles):
            self.frontend.stop_queue(index)
            del self.handles[index]
        self.frontend.set_status(0)

    def close(self) -> None:
        self.frontend.close()
        for queue in self.queues.values():
            queue.close()
        self.queues.clear()
        self.handles.clear()
        self.frontend.iotlb.memory = None
        self.__dict__.pop("memory", None)
        backing = self.__dict__.pop("backing", None)
        if backing is not None:
            # A failed test may still look at the memory, which goes with the last who does.
            with contextlib.suppress(BufferError):
                backing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def room(self, index: int, size: int) -> int:
        """Memory for a buffer of a queue; each in turn."""
        at = self._next[index]
        if at + size > 0x40000:
            at = 0
        self._next[index] = at + size
        return BUFFERS + 0x40000 * index + at

    def post(self, *sizes: int, pair: int = 0, kick: bool = True) -> list[int]:
        """Make receive buffers available; their addresses."""
        made = []
        for size in sizes:
            at = self.room(2 * pair, size)
            self.queues[2 * pair].add([], [(at, size)], (at, size))
            made.append(at)
        self.queues[2 * pair].publish()
        if kick:
            self.handles[2 * pair].kick()
        return made

    def used(self, count: int, index: int = 0) -> list[tuple[int, bytes]]:
        """What the device used next: how much it says it wrote, and that memory."""
        done: list[tuple[int, bytes]] = []
        queue = self.queues[index]

        def look() -> bool:
            for token, written in queue.collect(count - len(done)):
                done.append((written, self.memory.read(token[0], written) if written else b""))
            return len(done) >= count

        until(look, f"{len(done)} of {count} buffers of queue {index} came back")
        return done

    def receive(self, pair: int = 0) -> tuple[bytes, bytes]:
        """Header and data of the next frame, of all its buffers."""
        [(_, first)] = self.used(1, 2 * pair)
        header, data = first[: self.header], first[self.header :]
        if self.header == HEADER:
            [buffers] = struct.unpack_from("<H", header, 10)
            for _, more in self.used(buffers - 1, 2 * pair) if buffers > 1 else []:
                data += more
        return header, data

    def send(self, data: bytes, pair: int = 0, header: bytes | None = None) -> None:
        """Have a frame sent, and wait for its buffer to come back."""
        self.send_raw((bytes(self.header) if header is None else header) + data, pair=pair)

    def send_raw(self, data: bytes, *, pair: int = 0, pieces: int = 1) -> None:
        index = 2 * pair + 1
        at = self.room(index, max(len(data), 1))
        self.memory.write(at, data)
        step = -(-len(data) // pieces)
        parts = [(at + i, min(step, len(data) - i)) for i in range(0, len(data), step)]
        self.queues[index].add(parts, [], (at, 0))
        self.queues[index].publish()
        self.handles[index].kick()
        self.used(1, index)

    def control(self, kind: int, command: int, data: bytes = b"", *, room: int = 1) -> int | None:
        """Run a control command; its acknowledgement."""
        return self.control_raw(bytes([kind, command]) + data, room=room)

    def control_raw(self, data: bytes, *, room: int = 1) -> int | None:
        index = self.control_index
        at = self.room(index, len(data) + room + 1)
        self.memory.write(at, data + b"\xee" * (room + 1))
        writable = [(at + len(data), room)] if room else []
        self.queues[index].add([(at, len(data))] if data else [], writable, (at + len(data), room))
        self.queues[index].publish()
        self.handles[index].kick()
        [(written, answer)] = self.used(1, index)
        return answer[0] if written else None


def wait_quiet(seconds: float = 0.05) -> None:
    """Give what must not happen a moment to happen."""
    time.sleep(seconds)


def can_make_taps() -> bool:
    """Whether a test may make a tap and set it up."""
    return os.geteuid() == 0 and os.access("/dev/net/tun", os.R_OK | os.W_OK) and bool(which("ip"))
