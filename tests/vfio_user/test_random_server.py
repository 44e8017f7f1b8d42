"""A server that lies at random: whatever it does, a client's calls end, with errors of guestio's.

`test_hostile_server.py` has the lies one by one. Here they come in any order and mixture, while the
client is used in every way; a case is its seed.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
from collections.abc import Callable, Iterator

import pytest

from guestio import Backing
from guestio.dma import INTX, MSIX, DmaMapRequest
from guestio.errors import GuestioError
from guestio.vfio_user import Client, ServerGoneError, VfioUserTarget
from guestio.vfio_user.messages import Command, HeaderFlag
from tests.kit.serving import nothing_left
from tests.kit.vfio_client import PAGE
from tests.kit.vfio_server import HEADER, Answer, Asked, HandServer, region_info, usual

SEEDS_OF_A_TEST = 30
SILENCE = 0.1
"""Seconds that a client waits for this server, which may say nothing."""
CALLS = 12
MEETING = 2 + 9 + 5
"""Messages by which a client gets to know a device: two, and one for each region and interrupt."""
REPLY, ERROR = int(HeaderFlag.REPLY), int(HeaderFlag.ERROR)
NUMBERS = (0, 1, 7, 16, 32, PAGE, 65537, 2**31, 2**32 - 1)
LARGE = (0, 1, PAGE - 1, PAGE, 2**32, 2**63, 2**64 - PAGE, 2**64 - 1)


class LyingServer(HandServer):
    """Answers as a small device would, and as often as ``honesty`` says otherwise with a lie.

    Args:
        seed: What all choices follow from.

    Attributes:
        files: Descriptors that it passes: of a memfd, a pipe, an eventfd and a device.
    """

    def __init__(self, seed: int) -> None:
        # Its own: the client's choices do not depend on how many messages have come.
        self._random = random.Random(seed)
        self._honesty = self._random.choice((0.5, 0.8, 0.95))
        # In most cases it is honest until the client knows the device.
        self._honest_for = self._random.choice((0, MEETING, MEETING))
        self.files: list[int] = []
        super().__init__(dict.fromkeys(Command, self._answer))

    def _answer(self, _: HandServer, asked: Asked) -> Answer | bytes | None:
        honest = self._usual(asked)
        if len(self.seen) <= self._honest_for or self._random.random() < self._honesty:
            return honest
        return self._random.choice(
            (
                self._other_bytes,
                self._other_bytes,
                self._other_size,
                self._refuse,
                self._add_files,
                self._other_header,
                self._ask_first,
                self._say_twice,
                self._say_half,
                self._say_anything,
                self._say_nothing,
                self._go,
            )
        )(asked, honest)

    def _usual(self, asked: Asked) -> Answer:
        """What a device answers whose BARs 0 and 1 are registers and memory."""
        if asked.command == Command.DEVICE_GET_REGION_INFO:
            (index,) = struct.unpack_from("<I", asked.payload, 8)
            if index == 1:
                return Answer(region_info(1, PAGE, 7), 0, self.files[:1])
        if asked.command == Command.DEVICE_GET_REGION_IO_FDS:
            entry = struct.pack("<QQIIIIQ", 0, 4, 0, 0, 0, 0, 0)
            return Answer(
                struct.pack("<IIII", 16 + len(entry), 0, 0, 1) + entry, 0, [self.files[2]]
            )
        made = usual(self, asked)
        return Answer(made) if isinstance(made, bytes) else made

    def _other_bytes(self, asked: Asked, honest: Answer) -> Answer:
        payload = bytearray(honest.payload)
        for _ in range(self._random.randint(1, 3)):
            if len(payload) < 8:
                break
            at = self._random.randrange(0, len(payload) - 7, 4)
            if self._random.random() < 0.5:
                payload[at : at + 8] = struct.pack("<Q", self._random.choice(LARGE))
            else:
                payload[at : at + 4] = struct.pack("<I", self._random.choice(NUMBERS))
        return honest._replace(payload=bytes(payload))

    def _other_size(self, asked: Asked, honest: Answer) -> Answer:
        size = self._random.choice((0, 1, len(honest.payload) // 2, len(honest.payload) + 4, 69000))
        return honest._replace(payload=honest.payload[:size].ljust(size, b"\1"))

    def _refuse(self, asked: Asked, honest: Answer) -> Answer:
        return Answer(self._random.choice((b"", honest.payload)), self._random.choice(NUMBERS[1:]))

    def _add_files(self, asked: Asked, honest: Answer) -> Answer:
        return honest._replace(fds=self._random.choices(self.files, k=self._random.randint(1, 17)))

    def _other_header(self, asked: Asked, honest: Answer) -> None:
        values = [asked.number, asked.command, 16 + len(honest.payload), REPLY, 0]
        place = self._random.randrange(5)
        bits = 16 if place < 2 else 32
        values[place] = self._random.choice((*NUMBERS, 2, 33, ERROR | REPLY)) % 2**bits
        self.send(HEADER.pack(*values) + honest.payload)

    def _ask_first(self, asked: Asked, honest: Answer) -> Answer:
        for number in range(self._random.randint(1, 8)):
            command = self._random.choice((Command.DMA_READ, Command.DMA_WRITE, Command.DMA_MAP))
            address, count = self._random.choice(LARGE), self._random.choice((*NUMBERS, *LARGE))
            data = bytes(self._random.choice((0, 1, min(count, PAGE))))
            flags = self._random.choice((0, 0, int(HeaderFlag.NO_REPLY), 2))
            self.ask(command, struct.pack("<QQ", address, count) + data, number, flags)
        return honest

    def _say_twice(self, asked: Asked, honest: Answer) -> Answer:
        self.answer(asked, honest)
        return honest

    def _say_half(self, asked: Asked, honest: Answer) -> None:
        whole = HEADER.pack(asked.number, asked.command, 16 + len(honest.payload), REPLY, 0)
        whole += honest.payload
        self.send(whole[: self._random.randrange(1, len(whole) + 1)])
        if self._random.random() < 0.5:
            self.hang_up()

    def _say_anything(self, asked: Asked, honest: Answer) -> Answer:
        self.send(self._random.randbytes(self._random.choice((1, 15, 16, 17, 40, 5000))))
        return honest

    def _say_nothing(self, asked: Asked, honest: Answer) -> None:
        pass

    def _go(self, asked: Asked, honest: Answer) -> None:
        self.hang_up()


def calls(
    client: Client, target: VfioUserTarget, memory: Backing, event: int
) -> list[Callable[[], object]]:
    """What a driver and a VMM do with a device."""

    def look() -> None:
        with client.bar(1).backing() as backing:
            backing.close()

    def ring() -> None:
        for bell in client.bar(0).doorbells():
            with bell:
                bell.ring()

    shared = DmaMapRequest(0, PAGE, memory.host_address, memory.fd)
    return [
        lambda: client.config.read(0, 64),
        lambda: client.bar(0).read(0, 4),
        lambda: client.bar(0).write(0, b"1234"),
        lambda: client.bar(0).post(8, b"1234"),
        lambda: client.bar(0).post_many([(0, b"1234"), (4, b"5678")]),
        client.reset,
        lambda: client.interrupts(MSIX),
        lambda: client.enable_interrupts(MSIX, [event, event]),
        lambda: client.disable_interrupts(MSIX),
        lambda: client.mask_interrupt(MSIX, 1),
        lambda: client.disable_interrupts(INTX),
        lambda: target.map_dma(shared),
        lambda: target.unmap_dma(0, PAGE),
        ring,
        look,
    ]


@contextlib.contextmanager
def files() -> Iterator[list[int]]:
    pipe = os.pipe()
    memory = Backing.memfd(PAGE)
    assert memory.fd is not None
    found = [memory.fd, pipe[0], os.eventfd(0, os.EFD_NONBLOCK), os.open("/dev/null", os.O_RDWR)]
    yield found
    for fd in (*pipe, *found[2:]):
        os.close(fd)
    memory.close()


def use(server: LyingServer, chosen: random.Random, memory: Backing, event: int) -> str:
    """Use a client of a server, and close it: how far that went."""
    try:
        client = server.client(SILENCE)
    except GuestioError:
        return "not connected"
    gone = False
    with client:
        each = calls(client, VfioUserTarget(client), memory, event)
        for call in chosen.choices(each, k=CALLS):
            try:
                call()
            except ServerGoneError:
                gone = True
            except GuestioError:
                # It is refused; or the connection has ended, which another call says.
                pass
        if gone:
            with pytest.raises(ServerGoneError):
                client.config.read(0, 1)
    return "gone" if gone else "kept"


@pytest.mark.parametrize("first", range(0, 240, SEEDS_OF_A_TEST))
def test_a_client_survives_any_server(first: int) -> None:
    found: dict[str, int] = {}
    event, memory = os.eventfd(0), Backing.memfd(PAGE)
    with nothing_left(), files() as passed:
        for seed in range(first, first + SEEDS_OF_A_TEST):
            server = LyingServer(seed)
            server.files = passed
            with server:
                outcome = use(server, random.Random(~seed), memory, event)
            found[outcome] = found.get(outcome, 0) + 1
    # The lies reach all of a client's life. Where the machine is busy few connections are kept.
    assert {"not connected", "gone"} <= set(found)
    os.close(event)
