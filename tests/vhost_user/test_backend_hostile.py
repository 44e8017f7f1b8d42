"""Front-ends that break the protocol: one clear line, nothing left, and the next is served."""

from __future__ import annotations

import os
import random
import re
import socket
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from guestio.vhost_user.messages import (
    U64,
    Config,
    FrontendRequest,
    IotlbMessage,
    MemoryRegion,
    MemoryTable,
    SingleMemoryRegion,
    VringAddr,
    VringFd,
    VringState,
    encode_message,
)
from tests.kit.hostile import Raw, directory, event, file, pipe, read_only, short
from tests.kit.rings import INDIRECT as INDIRECT_FLAG
from tests.kit.rings import NEXT, WRITE, Desc, table
from tests.kit.serving import (
    AVAIL,
    BUFFERS,
    DESC,
    EVENT_IDX,
    INDIRECT,
    OK,
    PLATFORM,
    Driver,
    Mirror,
    Serving,
    errors_of,
    nothing_left,
)

F = FrontendRequest
TOP = 2**64


@pytest.fixture
def served(survivor: Serving) -> Serving:
    return survivor


def region(
    guest: int = 0, size: int = 0x1000, user: int = 0x10000, offset: int = 0
) -> MemoryRegion:
    return MemoryRegion(guest, size, user, offset)


def header(request: int, size: int, flags: int = 1) -> bytes:
    return struct.pack("=III", request, flags, size)


def table_of(*regions: MemoryRegion) -> Callable[[Raw], None]:
    def send(raw: Raw) -> None:
        raw.request(F.SET_MEM_TABLE, MemoryTable(regions), [raw.memfd() for _ in regions])

    return send


def add(*regions: MemoryRegion) -> Callable[[Raw], None]:
    def send(raw: Raw) -> None:
        raw.negotiate()
        for each in regions:
            raw.request(F.ADD_MEM_REG, SingleMemoryRegion(each), [raw.memfd()])

    return send


def with_fd(open_fd: Callable[[Raw], int], request: int = F.SET_MEM_TABLE) -> Callable[[Raw], None]:
    def send(raw: Raw) -> None:
        if request == F.SET_MEM_TABLE:
            raw.request(request, MemoryTable((region(),)), [open_fd(raw)])
        elif request == F.SET_BACKEND_REQ_FD:
            raw.negotiate()
            raw.request(request, b"", [open_fd(raw)])
        else:
            raw.request(request, VringFd(0, has_fd=True), [open_fd(raw)])

    return send


def plain(request: int, payload: object = b"", fds: int = 0) -> Callable[[Raw], None]:
    return lambda raw: raw.request(request, payload, [raw.memfd() for _ in range(fds)])


def after(first: Callable[[Raw], None], second: Callable[[Raw], None]) -> Callable[[Raw], None]:
    def send(raw: Raw) -> None:
        first(raw)
        second(raw)

    return send


def negotiated(
    then: Callable[[Raw], None], features: int = 1 << 32 | 1 << 30
) -> Callable[[Raw], None]:
    return after(lambda raw: raw.negotiate(features), then)


def in_pieces(data: bytes, *, hang_up: bool = False) -> Callable[[Raw], None]:
    def send(raw: Raw) -> None:
        raw.send(data)
        if hang_up:
            raw.sock.shutdown(socket.SHUT_WR)

    return send


CASES: dict[str, tuple[Callable[[Raw], None], str]] = {
    # Framing
    "no message at all": (in_pieces(b"GET / HTTP/1.1\r\n\r\n"), "version|payload"),
    "half a header": (in_pieces(header(1, 0)[:7], hang_up=True), "closed the connection after 7"),
    "half a payload": (in_pieces(header(2, 8) + b"abc", hang_up=True), "closed the connection"),
    "another version": (in_pieces(header(1, 0, 2)), "version 2"),
    "a huge payload": (in_pieces(header(2, 2**31)), "announces a payload of 2147483648"),
    "more than any payload": (in_pieces(header(2, 4097) + bytes(4097)), "the limit is 4096"),
    "a reply": (in_pieces(header(1, 0, 1 | 4)), "came as a reply"),
    "too little payload": (plain(F.SET_FEATURES, bytes(7)), "7 bytes, its layout has 8"),
    "too much payload": (plain(F.SET_FEATURES, bytes(9)), "9 bytes, its layout has 8"),
    "payload where none belongs": (plain(F.GET_FEATURES, bytes(1)), "layout has 0"),
    # File descriptors
    "an fd where none belongs": (plain(F.GET_FEATURES, b"", 1), "carries 1 fds, not 0"),
    "no fd where one belongs": (
        negotiated(plain(F.ADD_MEM_REG, SingleMemoryRegion(region()))),
        "carries 0 fds, not 1",
    ),
    "too few fds": (plain(F.SET_MEM_TABLE, MemoryTable((region(),)), 0), "carries 0 fds, not 1"),
    "too many fds": (plain(F.SET_MEM_TABLE, MemoryTable((region(),)), 2), "carries 2 fds, not 1"),
    "nine fds": (plain(F.GET_FEATURES, b"", 9), "fds"),
    "a hundred fds": (plain(F.GET_FEATURES, b"", 100), "fds"),
    "an fd and the no-fd flag": (
        plain(F.SET_VRING_CALL, VringFd(0, has_fd=False), 1),
        "carries 1 fds, not 0",
    ),
    "a directory as memory": (with_fd(directory), "SET_MEM_TABLE refused"),
    "a pipe as memory": (with_fd(pipe), "SET_MEM_TABLE refused"),
    "an eventfd as memory": (with_fd(event), "SET_MEM_TABLE refused"),
    "a file that may only be read": (with_fd(read_only), "SET_MEM_TABLE refused"),
    "a file that is too short": (with_fd(short), "100|0x64 bytes long"),
    "a file as kick": (
        with_fd(file, F.SET_VRING_KICK),
        r"kick fd of queue 0 is /memfd.*, not an eventfd",
    ),
    "a directory as kick": (with_fd(directory, F.SET_VRING_KICK), "kick fd of queue 0"),
    "a file as channel": (with_fd(file, F.SET_BACKEND_REQ_FD), "/memfd.*, not a connected"),
    "a pipe as channel": (with_fd(pipe, F.SET_BACKEND_REQ_FD), "pipe:.*, not a connected"),
    # The back-end would not notice its end.
    "its own connection as channel": (
        with_fd(lambda raw: raw.own(os.dup(raw.sock.fileno())), F.SET_BACKEND_REQ_FD),
        "is connected to '.*socket': pass one end of a socketpair",
    ),
    "a listener as channel": (
        with_fd(
            lambda raw: raw.own(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()),
            F.SET_BACKEND_REQ_FD,
        ),
        "not a connected Unix stream socket",
    ),
    # Memory
    "overlapping for the guest": (
        table_of(region(0, 0x2000, 0x10000), region(0x1FFF, 0x1000, 0x20000)),
        "overlap in guest addresses",
    ),
    "overlapping for the front-end": (
        table_of(region(0, 0x2000, 0x10000), region(0x8000, 0x1000, 0x11FFF)),
        "overlap in user addresses",
    ),
    "the same region twice": (add(region(), region()), "overlap"),
    "overlapping what was added": (
        add(region(0, 0x2000), region(0x1000, 0x1000, 0x90000)),
        "overlap in guest",
    ),
    "an empty region": (table_of(region(size=0)), r"empty or passes 2\*\*64"),
    "past the guest's last address": (table_of(region(guest=TOP - 0x800)), r"passes 2\*\*64"),
    "past the front-end's last address": (table_of(region(user=TOP - 0x800)), r"passes 2\*\*64"),
    "past the last offset": (table_of(region(offset=TOP - 0x800)), r"passes 2\*\*64"),
    "an offset no file has": (table_of(region(offset=1 << 63)), "SET_MEM_TABLE refused"),
    "beyond the file": (table_of(region(offset=0x10000)), "bytes long"),
    "larger than any process": (table_of(region(size=1 << 62)), "SET_MEM_TABLE refused"),
    "a table that lies about its length": (
        plain(F.SET_MEM_TABLE, struct.pack("=I4x", 3) + bytes(32)),
        "memory table of 3 regions",
    ),
    "a table of nine": (
        plain(F.SET_MEM_TABLE, struct.pack("=I4x", 9) + bytes(32 * 9)),
        "at most 8",
    ),
    "removing what is not there": (
        negotiated(plain(F.REM_MEM_REG, SingleMemoryRegion(region()))),
        "no memory region",
    ),
    # Features and order
    "features never offered": (plain(F.SET_FEATURES, U64(1 << 63)), "never offered"),
    "protocol features never offered": (
        plain(F.SET_PROTOCOL_FEATURES, U64(1 << 40)),
        "never offered",
    ),
    "memory slots without the feature": (
        plain(F.ADD_MEM_REG, SingleMemoryRegion(region()), 1),
        "CONFIGURE_MEM_SLOTS, which was not negotiated",
    ),
    "a request that needs a reply we cannot give": (
        plain(F.GET_SHARED_OBJECT, bytes(24)),
        "did not offer",
    ),
    # Rings
    "a ring that is not there": (plain(F.SET_VRING_NUM, VringState(2, 8)), "there is no ring 2"),
    "a ring of 256": (plain(F.SET_VRING_KICK, U64(0x200)), "bits above the no-fd flag"),
    "a size that is none": (plain(F.SET_VRING_NUM, VringState(0, 3)), "power of two"),
    "a size that is too large": (plain(F.SET_VRING_NUM, VringState(0, 65536)), "power of two"),
    "a base that is too large": (plain(F.SET_VRING_BASE, VringState(0, 65536)), "16 bits"),
    "misaligned rings": (plain(F.SET_VRING_ADDR, VringAddr(0, 0, 8, 0x1000, 0x2000)), "aligned"),
    "rings past the end": (
        plain(F.SET_VRING_ADDR, VringAddr(0, 0, TOP - 16, 0, TOP - 4)),
        r"pass 2\*\*64",
    ),
    "logging": (plain(F.SET_VRING_ADDR, VringAddr(0, 1, 0, 0, 0)), "ring flags 0x1"),
    "enabling without the feature": (
        after(plain(F.SET_FEATURES, U64(1 << 32)), plain(F.SET_VRING_ENABLE, VringState(0, 1))),
        "needs VHOST_USER_F_PROTOCOL_FEATURES",
    ),
    "enabling twice as much": (
        negotiated(plain(F.SET_VRING_ENABLE, VringState(0, 2))),
        "must be 0 or 1",
    ),
    # The rest
    "a status of nine bits": (negotiated(plain(F.SET_STATUS, U64(256))), "8 bits"),
    "a config access that lies": (
        negotiated(plain(F.GET_CONFIG, struct.pack("=III", 0, 8, 0) + bytes(4))),
        "must agree",
    ),
    "config bytes that are not there": (
        negotiated(plain(F.SET_CONFIG, Config(60, bytes(8)))),
        "no such byte",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_connection_ends_and_nothing_else(
    served: Serving, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    send, expected = CASES[name]
    before = served.stats.protocol_errors
    with nothing_left(), Raw(served) as raw:
        send(raw)
        assert raw.closed()
    (line,) = errors_of(caplog)
    assert line.startswith("front-end disconnected: ")
    assert "\n" not in line
    assert re.search(expected, line), line
    assert served.stats.protocol_errors == before + 1
    served.check_serves()


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, (_, expected) in CASES.items()
        if "refused" in expected or "overlap" in expected or "passes 2" in expected
    ],
)
def test_what_can_be_refused_is_survived(
    served: Serving, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """With an acknowledgement asked for, the connection lives, and nothing changed."""
    send, _ = CASES[name]
    with nothing_left(), Raw(served) as raw:
        raw.negotiate(ack=True)
        original = raw.request

        def acknowledged(request: int, payload: object = b"", fds: Sequence[int] = ()) -> None:
            if request in (F.SET_MEM_TABLE, F.ADD_MEM_REG):
                original(request, payload, fds, ack=True)

        raw.request = acknowledged  # type: ignore[method-assign,assignment]
        send(raw)
        original(F.GET_FEATURES)
        data = b""
        while header(F.GET_FEATURES, 8, 5) not in data:
            received = raw.sock.recv(4096)
            assert received, "the connection was closed"
            data += received
        values = [
            int.from_bytes(data[at + 12 : at + 20], "little")
            for at in range(0, len(data) - 20, 20)
            if data[at : at + 12] in {header(F.SET_MEM_TABLE, 8, 5), header(F.ADD_MEM_REG, 8, 5)}
        ]
        assert values.count(1) == 1
    assert errors_of(caplog) == []
    served.check_serves()


def test_unknown_messages_are_ignored_with_their_fds(served: Serving) -> None:
    with nothing_left(), Raw(served) as raw:
        for request in (0, 46, 99, 1000, 2**32 - 1):
            raw.request(request, b"what" * 10, [raw.memfd(), raw.memfd()])
        raw.request(F.GET_FEATURES)
        assert len(raw.sock.recv(4096)) == 20
    served.check_serves()


def test_a_message_byte_by_byte(served: Serving) -> None:
    with Raw(served) as raw:
        for byte in encode_message(F.GET_FEATURES) * 2:
            raw.send(bytes([byte]))
            time.sleep(0.001)
        received = b""
        while len(received) < 40:
            received += (part := raw.sock.recv(100))
            assert part, "the back-end closed the connection"
        assert received[:20] == received[20:]


def test_one_that_never_reads(served: Serving, caplog: pytest.LogCaptureFixture) -> None:
    with nothing_left(), Raw(served) as raw:
        raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        raw.sock.settimeout(0.3)
        started = time.monotonic()
        try:
            while time.monotonic() - started < 20:
                raw.sock.send(encode_message(F.GET_FEATURES) * 100)
        except (TimeoutError, BrokenPipeError, ConnectionResetError):
            pass
        raw.close()
        raw._fds.clear()
        served.let_go()
    served.check_serves()


def test_a_flood_of_small_messages_does_not_keep_it_from_stopping(tmp_path: Path) -> None:
    serving = Serving(Mirror(), tmp_path / "socket")
    with serving:
        raw = Raw(serving)
        raw.sock.setblocking(False)
        data = encode_message(F.SET_OWNER) * 1000
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            try:
                raw.sock.send(data)
            except BlockingIOError:
                time.sleep(0.0001)
        serving.backend.stop()
        serving._thread.join(5)
        assert not serving._thread.is_alive()
        raw.close()


class TestFuzz:
    """Random front-ends and random rings against one real back-end in this process."""

    MESSAGES = 1500
    RINGS = 1500

    @pytest.mark.slow
    def test_random_messages(self, served: Serving) -> None:
        rng = random.Random(2024)
        with nothing_left():
            for _ in range(self.MESSAGES):
                with Raw(served) as raw:
                    if rng.random() < 0.8:
                        ack = rng.random() < 0.5
                        raw.negotiate(1 << 30 | 1 << 32 | rng.choice((0, PLATFORM)), ack=ack)
                    for _ in range(rng.randrange(1, 12)):
                        _random_message(rng, raw)
                    if rng.random() < 0.1:
                        raw.send(rng.randbytes(rng.randrange(40)))
            assert served.alive
        served.check_serves()

    @pytest.mark.slow
    @pytest.mark.parametrize("iommu", [False, True])
    def test_random_rings(self, served: Serving, iommu: bool) -> None:
        """Rings, tables and buffers of garbage, or of good requests with bytes spoiled."""
        rng = random.Random(7 + iommu)
        broken = served.stats.queue_errors
        with (
            nothing_left(),
            Driver(
                served.path, iommu=iommu, queues=0, size=16, features=EVENT_IDX | INDIRECT
            ) as driver,
        ):
            fence = driver.memory.read(0x1F0000, 0x10000)
            # Behind an IOMMU many are stopped before the front-end has told where they are.
            enough = broken + self.RINGS // 50
            patience = time.monotonic() + 60
            rings = 0
            while rings < self.RINGS // 2 or served.stats.queue_errors <= enough:
                assert time.monotonic() < patience, "some are garbage"
                rings += 1
                driver.add_queue(0)
                _random_ring(rng, driver)
                driver.handles[0].kick()
                driver.frontend.sync()
                if rng.random() < 0.5:
                    driver.rings[0].set_avail_idx(rng.randrange(0x10000))
                    driver.handles[0].kick()
                driver.stop(0)
            assert driver.memory.read(0x1F0000, 0x10000) == fence
            # Another queue of the same connection was never harmed.
            driver.add_queue(1)
            assert driver.run(1, b"alive") == (OK, b"evila")
            assert served.alive
        served.check_serves()

    @pytest.mark.slow
    def test_rings_that_change_while_they_are_read(self, served: Serving) -> None:
        """The driver scribbles over its rings as fast as it can while the device walks them."""
        rng = random.Random(99)
        with nothing_left():
            for iommu in (False, True):
                with Driver(
                    served.path, iommu=iommu, size=16, features=INDIRECT, queues=1
                ) as driver:
                    deadline = time.monotonic() + 1.0
                    while time.monotonic() < deadline:
                        for _ in range(50):
                            area = rng.choice((DESC, AVAIL, BUFFERS))
                            driver.memory.write(
                                area + rng.randrange(0, 256, 2), rng.randbytes(rng.randrange(1, 9))
                            )
                            driver.rings[0].offer(rng.randrange(16))
                        driver.handles[0].kick()
                        if driver.handles[0].failed():
                            driver.stop(0)
                            driver.add_queue(0)
                    assert served.alive
        served.check_serves()


def _number(rng: random.Random, bits: int = 64) -> int:
    edges = (0, 1, 7, 8, 255, 256, 4095, 4096, 65535, 65536, 1 << 31, 1 << 32, (1 << bits) - 1)
    return rng.choice((*edges, rng.getrandbits(bits), rng.getrandbits(20))) & ((1 << bits) - 1)


def _random_region(rng: random.Random) -> MemoryRegion:
    if rng.random() < 0.7:
        slot = rng.randrange(6)
        return MemoryRegion(slot << 20, 0x10000, (slot + 1) << 24, 0)
    return MemoryRegion(*(_number(rng) for _ in range(4)))


def _random_fd(rng: random.Random, raw: Raw) -> int:
    match rng.randrange(8):
        case 0:
            return event(raw)
        case 1:
            return pipe(raw)
        case 2:
            return directory(raw)
        case 3:
            ours, theirs = socket.socketpair()
            raw.own(ours.detach())
            return raw.own(theirs.detach())
        case _:
            return raw.memfd(rng.choice((0, 100, 0x10000, 0x10000)))


def _random_message(rng: random.Random, raw: Raw) -> None:
    request = rng.choice((*F, *F, rng.randrange(60), _number(rng, 32)))
    fds = 0
    match request:
        case F.SET_MEM_TABLE:
            regions = tuple(_random_region(rng) for _ in range(rng.randrange(4)))
            body, fds = MemoryTable(regions).encode(), len(regions)
        case F.ADD_MEM_REG | F.REM_MEM_REG:
            body = SingleMemoryRegion(_random_region(rng)).encode()
            fds = int(request == F.ADD_MEM_REG)
        case F.SET_VRING_KICK | F.SET_VRING_CALL | F.SET_VRING_ERR:
            has_fd = rng.random() < 0.7
            body, fds = VringFd(rng.randrange(3), has_fd=has_fd).encode(), int(has_fd)
        case F.SET_VRING_NUM | F.SET_VRING_BASE | F.GET_VRING_BASE | F.SET_VRING_ENABLE:
            body = VringState(rng.randrange(3), rng.choice((0, 1, 8, _number(rng, 32)))).encode()
        case F.SET_VRING_ADDR:
            slot = (rng.randrange(6) + 1) << 24
            places = (slot, slot + 0x2000, slot + 0x1000)
            if rng.random() < 0.3:
                places = (_number(rng), _number(rng), _number(rng))
            body = VringAddr(rng.randrange(3), 0, *places).encode()
        case F.SET_BACKEND_REQ_FD:
            body, fds = b"", 1
        case F.IOTLB_MSG:
            slot = (rng.randrange(6) + 1) << 24
            body = IotlbMessage(
                rng.choice((0x1000, _number(rng))),
                rng.choice((0x1000, 0x10000, _number(rng))),
                rng.choice((slot, _number(rng))),
                rng.randrange(5),
                rng.choice((2, 2, 3, 3, rng.randrange(256))),
            ).encode()
        case F.GET_CONFIG | F.SET_CONFIG:
            body = Config(rng.choice((0, 60, _number(rng, 32))), bytes(rng.randrange(80))).encode()
        case F.SET_FEATURES | F.SET_PROTOCOL_FEATURES | F.SET_STATUS:
            body = U64(rng.choice((0, 1 << 32 | 1 << 30, _number(rng)))).encode()
        case _:
            body = rng.randbytes(rng.choice((0, 0, 8, rng.randrange(100))))
    if rng.random() < 0.05:
        body = rng.randbytes(rng.randrange(60))
    if rng.random() < 0.05:
        fds = rng.randrange(10)
    flags = rng.choice((1, 1, 1, 9, 9, 5, rng.getrandbits(4)))
    raw.send(header(request, len(body), flags) + body, [_random_fd(rng, raw) for _ in range(fds)])


def _random_ring(rng: random.Random, driver: Driver) -> None:
    ring = driver.rings[0]
    count = rng.randrange(1, 12)
    for i in range(count):
        rows = []
        for _ in range(rng.randrange(1, 5)):
            at = driver.at(BUFFERS + rng.randrange(0x100000))
            rows.append(Desc(at, rng.choice((1, 16, 512, 5000)), rng.choice((0, 0, WRITE))))
        rows.sort(key=lambda row: row.flags)
        if rng.random() < 0.4:
            place = BUFFERS + 0x180000 - 0x1000 * (i + 1)
            linked = [
                row._replace(flags=row.flags | NEXT, next=n + 1) if n < len(rows) - 1 else row
                for n, row in enumerate(rows)
            ]
            data = bytearray(table(*linked))
            _spoil(rng, data)
            driver.memory.write(place, bytes(data))
            ring.put(i, Desc(driver.at(place), 16 * len(rows), INDIRECT_FLAG))
        else:
            ring.put(i, rng.choice(rows))
    for area, length in ((DESC, 16 * 16), (AVAIL, 6 + 2 * 16)):
        data = bytearray(driver.memory.read(area, length))
        _spoil(rng, data)
        driver.memory.write(area, bytes(data))
    if rng.random() < 0.2:
        driver.memory.write(DESC, rng.randbytes(256))
    if rng.random() < 0.1:
        driver.memory.write(AVAIL, rng.randbytes(38))
    elif rng.random() < 0.9:
        ring.offer(*[rng.randrange(count) for _ in range(count)])


def _spoil(rng: random.Random, data: bytearray) -> None:
    if rng.random() < 0.5:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 2, 4, 7, 127, 128, 255))


def test_the_cases_are_wrong_each_in_its_own_way() -> None:
    assert len({expected for _, expected in CASES.values()}) > 35
