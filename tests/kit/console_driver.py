"""A front-end that drives a console by hand."""

from __future__ import annotations

import struct
from pathlib import Path

from guestio.virtio.console import (
    DEVICE_ADD,
    DEVICE_READY,
    F_MULTIPORT,
    F_SIZE,
    PORT_OPEN,
    PORT_READY,
)
from tests.kit.rings import WRITE, Desc
from tests.kit.serving import Driver

CONTROL = struct.Struct("<IHH")
SLOT = 0x2000
PLACES = 0x60000
SLOTS = 16


class ConsoleDriver(Driver):
    """A guest's console driver, by hand: 16 buffers of up to 8 KiB for each queue."""

    def __init__(self, target: Path, ports: int = 1, **options: object) -> None:
        queues = 2 if ports == 1 else 2 + 2 * ports
        features = F_SIZE | (F_MULTIPORT if ports > 1 else 0)
        self.seen = [0] * queues
        options = {"features": features, "queues": queues, **options}
        super().__init__(target, **options)  # type: ignore[arg-type]  # options of any type

    def place(self, index: int, number: int) -> int:
        return PLACES + (index * SLOTS + number % SLOTS) * SLOT

    def post(self, index: int, room: int = 4096, count: int = 1) -> None:
        """Make buffers available that the device writes."""
        self._offer(index, [(room, WRITE)] * count)

    def write(self, index: int, *pieces: bytes, wait: bool = True) -> int:
        """Make buffers available that the device reads."""
        ring = self.rings[index]
        number = ring.offered
        for at, data in enumerate(pieces):
            self.memory.write(self.place(index, number + at), data)
        self._offer(index, [(len(data), 0) for data in pieces])
        if wait:
            self.wait(index, number + len(pieces) - 1)
        return number

    def _offer(self, index: int, buffers: list[tuple[int, int]]) -> None:
        ring = self.rings[index]
        for room, flags in buffers:
            number = ring.offered
            place = self.at(self.place(index, number))
            ring.offer(ring.put_chain(number % SLOTS, Desc(place, room, flags)))
        self.handles[index].kick()

    def received(self, index: int) -> bytes:
        """The next buffer that the device has written."""
        number = self.seen[index]
        self.wait(index, number)
        self.seen[index] += 1
        _, written = self.rings[index].used_entry(number)
        return self.memory.read(self.place(index, number), written)

    def read(self, index: int, count: int) -> bytes:
        """So many bytes that the device writes, into as many buffers as it takes."""
        data = b""
        while len(data) < count:
            self.post(index)
            data += self.received(index)
        return data

    def control(self, *message: int, more: bytes = b"") -> int:
        """Send a control message."""
        return self.write(3, CONTROL.pack(*message) + more)

    def told(self) -> tuple[int, int, int, bytes]:
        """The next control message of the device."""
        self.post(2)
        data = self.received(2)
        return (*CONTROL.unpack(data[:8]), data[8:])

    def set_up(self, ports: int) -> dict[int, list[tuple[int, int, bytes]]]:
        """Do what Linux does; what was told of each port."""
        self.control(0, DEVICE_READY, 1)
        said: dict[int, list[tuple[int, int, bytes]]] = {}
        for number in range(ports):
            assert self.told() == (number, DEVICE_ADD, 1, b"")
            said[number] = []
        for number in range(ports):
            self.control(number, PORT_READY, 1)
        while any(not any(e == PORT_OPEN for e, _, _ in each) for each in said.values()):
            number, event, value, more = self.told()
            said[number].append((event, value, more))
        return said
