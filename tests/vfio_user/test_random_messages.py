"""Messages whose fields are chosen at random: each is answered, and nothing of them is left."""

from __future__ import annotations

import os
import random
import struct

import pytest

from guestio.vfio_user.messages import Command
from tests.kit.serving import nothing_left
from tests.kit.vfio_client import PAGE, ServingPci, memory_file

NUMBERS = (0, 1, 2, 3, 4, 7, 8, 16, 32, 255, PAGE, 2 * PAGE, 1 << 16, 1 << 20, 2**31, 2**32 - 1)
ADDRESSES = (0, 8, PAGE, 1 << 20, 2**32, 2**63, 2**64 - PAGE, 2**64 - 1)
LAYOUTS = {
    Command.DMA_MAP: "IIQQQ",
    Command.DMA_UNMAP: "IIQQ",
    Command.DEVICE_GET_INFO: "IIII",
    Command.DEVICE_GET_REGION_INFO: "IIIIQQ",
    Command.DEVICE_GET_REGION_IO_FDS: "IIII",
    Command.DEVICE_GET_IRQ_INFO: "IIII",
    Command.DEVICE_SET_IRQS: "IIIII",
    Command.REGION_READ: "QII",
    Command.REGION_WRITE: "QII",
    Command.REGION_WRITE_MULTI: "QQIIQ",
    Command.DEVICE_RESET: "",
    Command.DEVICE_FEATURE: "II",
}


def payload_of(choose: random.Random, command: int) -> bytes:
    layout = LAYOUTS.get(command, "II")
    likely = {"Q": (0, PAGE, 2 * PAGE), "I": (0, 1, 2, 3, 32)}
    values = [
        choose.choice(
            likely[kind] if choose.random() < 0.8 else ADDRESSES if kind == "Q" else NUMBERS
        )
        for kind in layout
    ]
    payload = struct.pack(f"<{layout}", *values)
    match choose.randrange(8):
        case 0:
            return payload[: choose.randrange(len(payload) + 1)]
        case 1:
            return payload + choose.randbytes(choose.choice((1, 4, 8, 24, 4096)))
        case 2 if command == Command.REGION_WRITE:
            data = choose.randbytes(choose.randrange(64))
            where = choose.randrange(2 * PAGE), choose.randrange(9)
            return struct.pack("<QII", *where, len(data)) + data
        case _:
            return payload


@pytest.mark.parametrize("seed", range(4))
def test_each_is_answered(serving: ServingPci, seed: int) -> None:
    choose = random.Random(seed)
    fds = [memory_file(), memory_file(PAGE), os.eventfd(0, os.EFD_NONBLOCK), *os.pipe()]
    with serving.connect() as first:
        first.begin()
    with nothing_left():
        with serving.connect() as client:
            client.begin()
            answered = 0
            for _ in range(600):
                command = choose.choice([*LAYOUTS, 0, 14, 17, 99])
                wanted = command in (Command.DMA_MAP, Command.DEVICE_SET_IRQS)
                few = (0, 1, 1, 1) if wanted else (0,)
                count = choose.choice(few if choose.random() < 0.9 else (1, 4, 16))
                passed = choose.choices(fds, k=count)
                reply = client.request(command, payload_of(choose, command), passed)
                for fd in reply.fds:
                    os.close(fd)
                answered += not reply.error
            # Not all of them are refused, so that more than the checks was tried.
            assert answered > 50
            assert client.read(7, 0, 2) == b"\x34\x12"
        with serving.connect() as following:
            assert not following.version().error
    assert serving.stats.protocol_errors == 0
