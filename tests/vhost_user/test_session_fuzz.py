"""Random front-ends, honest and lying, against a session whose handler checks every argument.

Whatever they send, only `ProtocolError` may come out, session and handler must agree on the state,
no fd may be left over, and every acknowledgement asked for must be given.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestio.errors import DeviceError, ProtocolError
from guestio.vhost_user.channel import Channel, Message, PeerGoneError
from guestio.vhost_user.inflight import InflightRegion
from guestio.vhost_user.messages import (
    MAX_PAYLOAD_SIZE,
    STATE_NO_FD,
    U64,
    Config,
    Empty,
    FrontendRequest,
    Header,
    Inflight,
    IotlbMessage,
    IotlbType,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    SingleMemoryRegion,
    StateTransfer,
    VringAddr,
    VringFd,
    VringState,
    encode_message,
)
from guestio.vhost_user.session import Session
from tests.kit.closing import settled_closes
from tests.kit.recording import (
    ACCESS_PLATFORM,
    DEVICE_FEATURES,
    LOG_ALL,
    OFFERED_PROTOCOL_FEATURES,
    OWN_REPLY,
    PROTOCOL_FEATURES,
    STATE_FD,
    VIRTIO_F_VERSION_1,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

F = FrontendRequest
TOP = 2**64
# Understood without being offered, as QEMU wants it.
RING_FEATURES = 0b11 << 28
WITH_FD = {
    F.ADD_MEM_REG,
    F.SET_BACKEND_REQ_FD,
    F.SET_INFLIGHT_FD,
    F.SET_LOG_BASE,
    F.SET_LOG_FD,
    F.SET_DEVICE_STATE_FD,
}
QUEUES = 3
SLOTS = 4
EDGES = (0, 1, 2, 8, 255, 256, 4095, 4096, 65535, 65536, 2**31, 2**32 - 1, 2**63, TOP - 1)


class CheckingHandler:
    """Keeps the state a back-end would keep, and asserts what a session promises about it."""

    features = DEVICE_FEATURES
    protocol_features = OFFERED_PROTOCOL_FEATURES
    num_queues = QUEUES
    max_mem_slots = SLOTS

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.tracked: InflightRegion | None = None
        self.acked: int | None = None
        self.logging = False
        self.regions: list[MemoryRegion] = []
        self.num = [0] * QUEUES
        self.address: list[VringAddr | None] = [None] * QUEUES
        self.base = [0] * QUEUES
        self.kicked = [False] * QUEUES
        self.enabled = [False] * QUEUES

    def _may_refuse(self) -> None:
        if self._rng.random() < 0.05:
            raise DeviceError("refused at random")

    def _consume(self, *fds: int | None) -> None:
        for fd in fds:
            if fd is not None:
                os.close(fd)  # raises if the fd is not ours any more
        self._may_refuse()

    def _started(self, index: int) -> bool:
        return self.kicked[index] and self.num[index] > 0 and self.address[index] is not None

    def set_features(self, features: int) -> None:
        self._may_refuse()
        assert features & ~(DEVICE_FEATURES | RING_FEATURES) == 0
        assert features == self.acked or not any(self._started(index) for index in range(QUEUES))
        self.acked = features

    def set_memory_table(self, regions: Sequence[tuple[MemoryRegion, int]]) -> None:
        self._consume(*(fd for _, fd in regions))
        self.regions = [region for region, _ in regions]

    def add_memory_region(self, region: MemoryRegion, fd: int) -> None:
        self._consume(fd)
        self.regions.append(region)

    def remove_memory_region(self, region: MemoryRegion) -> None:
        self._may_refuse()
        self.regions.remove(region)

    def set_vring_num(self, index: int, num: int) -> None:
        self._may_refuse()
        assert num in {1 << bit for bit in range(16)}
        assert num == self.num[index] or not self._started(index)
        self.num[index] = num

    def set_vring_addr(self, index: int, address: VringAddr) -> None:
        self._may_refuse()
        assert index == address.index
        assert (address.desc % 16, address.avail % 2, address.used % 4) == (0, 0, 0)
        self.address[index] = address

    def set_vring_base(self, index: int, base: int) -> None:
        self._may_refuse()
        assert 0 <= base <= 65535
        assert base == self.base[index] or not self._started(index)
        self.base[index] = base

    def get_vring_base(self, index: int) -> int:
        self._may_refuse()
        self.kicked[index] = False
        return self.base[index]

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        self._consume(fd)
        assert 0 <= index < QUEUES
        self.kicked[index] = True

    def set_vring_call(self, index: int, fd: int | None) -> None:
        self._consume(fd)
        assert 0 <= index < QUEUES

    set_vring_err = set_vring_call

    def set_vring_enable(self, index: int, enable: bool) -> None:
        assert enable in {True, False}
        self.enabled[index] = enable

    def set_backend_channel(self, fd: int) -> None:
        self._consume(fd)

    def get_config(self, offset: int, size: int) -> bytes:
        self._may_refuse()
        assert 0 <= size <= MAX_PAYLOAD_SIZE
        return bytes(offset & 0xFF for _ in range(size))

    def set_config(self, offset: int, data: bytes, flags: int) -> None:
        self._may_refuse()
        assert isinstance(data, bytes)
        assert offset >= 0
        assert flags >= 0

    def iotlb(self, message: IotlbMessage) -> None:
        self._may_refuse()
        assert message.type in {IotlbType.UPDATE, IotlbType.INVALIDATE}
        assert 0 < message.size <= TOP - message.iova
        if message.type == IotlbType.UPDATE:
            assert (self.acked or 0) & ACCESS_PLATFORM
            assert message.size <= TOP - message.uaddr
            assert message.perm <= 3

    def _check_tracked(self, num_queues: int, queue_size: int) -> None:
        assert 1 <= num_queues <= QUEUES
        assert 1 <= queue_size <= 32768
        assert not any(self._started(index) for index in range(QUEUES))

    def get_inflight(self, num_queues: int, queue_size: int) -> tuple[Inflight, int]:
        self._may_refuse()
        self._check_tracked(num_queues, queue_size)
        self.close()
        self.tracked = InflightRegion.create(num_queues, queue_size)
        return self.tracked.description, self.tracked.fd

    def set_inflight(self, inflight: Inflight, fd: int) -> None:
        self._consume(fd)
        self._check_tracked(inflight.num_queues, inflight.queue_size)

    def set_log(self, log: Log, fd: int) -> None:
        self._consume(fd)
        assert 0 < log.size <= TOP - log.offset

    def set_logging(self, enable: bool) -> None:
        assert enable != self.logging
        self.logging = enable

    def save_state(self) -> int:
        self._may_refuse()
        assert not any(self._started(index) for index in range(QUEUES))
        return STATE_FD

    load_state = save_state

    def check_state(self) -> None:
        self.save_state()

    def send_rarp(self, address: bytes) -> None:
        self._may_refuse()
        assert len(address) == 6

    def get_status(self) -> int:
        self._may_refuse()
        return 15

    def set_status(self, status: int) -> None:
        self._may_refuse()
        assert 0 <= status <= 255
        if status == 0:
            self._reset()

    def reset_device(self) -> None:
        self._may_refuse()
        self._reset()

    def _reset(self) -> None:
        self.close()
        regions, acked, logging = self.regions, self.acked, self.logging
        self.__init__(self._rng)
        self.regions, self.acked, self.logging = regions, acked, logging

    def close(self) -> None:
        """Close the region, which a refusal's traceback may keep."""
        if self.tracked is not None:
            self.tracked.close()

    def check(self, session: Session) -> None:
        """Compare with the session, and check what must always hold."""
        rings = session.vrings
        assert session.features == self.acked
        assert list(session.regions) == sorted(self.regions, key=lambda region: region.guest_addr)
        assert [ring.num for ring in rings] == self.num
        assert [ring.address and ring.address.parts for ring in rings] == [
            address and address.parts for address in self.address
        ]
        assert session.logging == self.logging
        assert [ring.base for ring in rings] == self.base
        assert [ring.kicked for ring in rings] == self.kicked
        assert [ring.enabled for ring in rings] == self.enabled
        assert session.protocol_features & ~OFFERED_PROTOCOL_FEATURES == 0
        assert len(self.regions) <= SLOTS
        for space in ("guest_addr", "user_addr"):
            end = 0
            for start, size in sorted((getattr(r, space), r.size) for r in self.regions):
                assert size > 0
                assert start >= end
                end = start + size
            assert end <= TOP
        for num, address in zip(self.num, self.address, strict=True):
            if address is not None:
                assert address.desc + 16 * num <= TOP
                assert address.avail + 2 * num <= TOP
                assert address.used + 8 * num <= TOP


def number(rng: random.Random, bits: int = 64) -> int:
    """Mostly edges, and what is next to them."""
    if rng.random() < 0.7:
        return (rng.choice(EDGES) + rng.randint(-1, 1)) % (1 << bits)
    return rng.getrandbits(bits)


def region(rng: random.Random) -> MemoryRegion:
    if rng.random() < 0.1:
        return MemoryRegion(number(rng), number(rng), number(rng), number(rng))
    slot, length = rng.randrange(8), rng.choice((1, 1, 1, 2))
    return MemoryRegion(slot << 20, length << 20, (slot + 3) << 21, rng.choice((0, 4096)))


def ring(rng: random.Random) -> int:
    return rng.randrange(QUEUES) if rng.random() < 0.95 else number(rng, 32)


def sensible(rng: random.Random, session: Session) -> tuple[int, Payload, int]:
    """A message that a front-end might send: request, payload, number of fds."""
    request = rng.choice(list(REQUESTS))
    payload = REQUESTS[request](rng)
    if request == F.REM_MEM_REG and session.regions and rng.random() < 0.8:
        payload = SingleMemoryRegion(rng.choice(session.regions))
    if isinstance(payload, MemoryTable):
        return request, payload, len(payload.regions)
    if isinstance(payload, VringFd):
        return request, payload, int(payload.has_fd)
    return request, payload, int(request in WITH_FD)


def _features(rng: random.Random) -> U64:
    common = DEVICE_FEATURES | PROTOCOL_FEATURES
    choices = (common, common & ~ACCESS_PLATFORM, VIRTIO_F_VERSION_1, number(rng))
    log = LOG_ALL if rng.random() < 0.3 else 0
    return U64(rng.choices(choices, (6, 3, 2, 1))[0] | log)


def _protocol_features(rng: random.Random) -> U64:
    common = OFFERED_PROTOCOL_FEATURES
    choices = (common, common & ~ProtocolFeature.REPLY_ACK, number(rng))
    return U64(rng.choices(choices, (8, 2, 1))[0])


def _address(rng: random.Random) -> VringAddr:
    if rng.random() < 0.3:
        return VringAddr(
            ring(rng), number(rng, 32) & 1, number(rng) & ~15, number(rng) & ~3, number(rng) & ~1
        )
    return VringAddr(ring(rng), rng.choice((0, 0, 1)), 0x1000, 0x3000, 0x2000)


def _iotlb(rng: random.Random) -> IotlbMessage:
    kind = rng.choice((2, 2, 2, 3, 3, rng.randrange(256)))
    if rng.random() < 0.5:
        return IotlbMessage(number(rng), number(rng), number(rng), rng.randrange(5), kind)
    return IotlbMessage(rng.randrange(1 << 20) << 12, 4096, rng.randrange(1 << 20) << 12, 3, kind)


def _inflight(rng: random.Random) -> Inflight:
    queues = rng.choice((1, 2, 3, 3, number(rng, 16)))
    return Inflight(number(rng), number(rng), queues, rng.choice((1, 128, 32768, number(rng, 16))))


def _config(rng: random.Random) -> Config:
    return Config(number(rng, 32), rng.randbytes(rng.randrange(70)), rng.randrange(3))


REQUESTS = {
    F.GET_FEATURES: lambda _: Empty(),
    F.SET_FEATURES: _features,
    F.GET_PROTOCOL_FEATURES: lambda _: Empty(),
    F.SET_PROTOCOL_FEATURES: _protocol_features,
    F.SET_OWNER: lambda _: Empty(),
    F.RESET_OWNER: lambda _: Empty(),
    F.SET_MEM_TABLE: lambda rng: MemoryTable(
        tuple(region(rng) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 8))))
    ),
    F.GET_MAX_MEM_SLOTS: lambda _: Empty(),
    F.ADD_MEM_REG: lambda rng: SingleMemoryRegion(region(rng)),
    F.REM_MEM_REG: lambda rng: SingleMemoryRegion(region(rng)),
    F.GET_QUEUE_NUM: lambda _: Empty(),
    F.SET_VRING_NUM: lambda rng: VringState(
        ring(rng), rng.choice((1, 64, 256, 32768, number(rng, 32)))
    ),
    F.SET_VRING_ADDR: _address,
    F.SET_VRING_BASE: lambda rng: VringState(ring(rng), rng.choice((0, 5, number(rng, 32)))),
    F.GET_VRING_BASE: lambda rng: VringState(ring(rng), 0),
    F.SET_VRING_KICK: lambda rng: VringFd(ring(rng) & 255, rng.random() < 0.8),
    F.SET_VRING_CALL: lambda rng: VringFd(ring(rng) & 255, rng.random() < 0.8),
    F.SET_VRING_ERR: lambda rng: VringFd(ring(rng) & 255, rng.random() < 0.8),
    F.SET_VRING_ENABLE: lambda rng: VringState(ring(rng), rng.choice((0, 1, 1, number(rng, 32)))),
    F.SET_BACKEND_REQ_FD: lambda _: Empty(),
    F.IOTLB_MSG: _iotlb,
    F.GET_CONFIG: _config,
    F.SET_CONFIG: _config,
    F.RESET_DEVICE: lambda _: Empty(),
    F.SET_STATUS: lambda rng: U64(rng.choice((0, 8, 15, number(rng)))),
    F.GET_STATUS: lambda _: Empty(),
    F.SET_LOG_BASE: lambda rng: Log(number(rng), number(rng)),
    F.SET_LOG_FD: lambda _: Empty(),
    F.GET_VRING_BASE_SKIP_DRAIN: lambda rng: VringState(ring(rng), 0),
    F.GET_INFLIGHT_FD: _inflight,
    F.SET_INFLIGHT_FD: _inflight,
    F.SET_DEVICE_STATE_FD: lambda rng: StateTransfer(rng.choice((0, 1, number(rng, 32))), 0),
    F.CHECK_DEVICE_STATE: lambda _: Empty(),
    F.SEND_RARP: lambda rng: U64(number(rng)),
}


def mutate(rng: random.Random, request: int, body: bytes, fds: int) -> tuple[int, bytes, int]:
    """Spoil one thing about a message."""
    match rng.randrange(5):
        case 0:
            return number(rng, 32), body, fds
        case 1:
            return rng.randrange(50), body, fds
        case 2:
            return request, body, rng.randrange(9)
        case 3:
            size = max(0, len(body) + rng.choice((-8, -1, 1, 4, 8, 32)))
            return request, (body + rng.randbytes(32))[:size], fds
        case _:
            spoiled = bytearray(body or b"\0")
            for _ in range(rng.randint(1, 4)):
                spoiled[rng.randrange(len(spoiled))] = rng.choice((0, 1, 127, 128, 255))
            return request, bytes(spoiled[: len(body)]), fds


def next_message(
    rng: random.Random, session: Session, hostility: float
) -> tuple[Header, bytes, int]:
    request, payload, fds = sensible(rng, session)
    body = payload.encode()
    if rng.random() < hostility:
        request, body, fds = mutate(rng, request, body, fds)
    flags = 9 if rng.random() < 0.9 else 1
    if rng.random() < hostility / 10:
        flags = number(rng, 32) & ~3 | 1
    return Header(request, flags, len(body)), body, fds


def step(rng: random.Random, session: Session, handler: CheckingHandler, hostility: float) -> bool:
    """Send one message; False when the connection must be closed."""
    header, body, fds = next_message(rng, session, hostility)
    message = Message(header, body, [os.open("/dev/null", os.O_RDONLY) for _ in range(fds)])
    negotiated = session.protocol_features
    try:
        reply = session.handle(message)
    except ProtocolError:
        reply = None
        alive = False
    else:
        alive = True
        negotiated |= session.protocol_features
        owed = header.need_reply and negotiated & ProtocolFeature.REPLY_ACK
        assert (reply is not None) == bool(owed or header.request in OWN_REPLY)
    assert message.fd_count == 0
    handler.check(session)
    if reply is not None:
        answer = Header.decode(reply[:12])
        assert answer == Header(header.request, 5, len(reply) - 12)
        if header.request == F.GET_INFLIGHT_FD:
            size = Inflight.decode(reply[12:]).mmap_size
            assert [os.fstat(fd).st_size for fd in session.reply_fds] == [size] * bool(size)
        elif header.request == F.SET_DEVICE_STATE_FD:
            refused = U64.decode(reply[12:]).value
            assert refused in {0, 1 | STATE_NO_FD}
            assert session.reply_fds == (() if refused else (STATE_FD,))
        else:
            assert not session.reply_fds
            if header.request not in {
                F.GET_VRING_BASE,
                F.GET_VRING_BASE_SKIP_DRAIN,
                F.GET_CONFIG,
            }:
                U64.decode(reply[12:])
    return alive


def negotiate(session: Session, rng: random.Random) -> None:
    """Most front-ends begin well; the rest of the protocol would never be reached otherwise."""
    if rng.random() < 0.9:
        body = U64(OFFERED_PROTOCOL_FEATURES).encode()
        session.handle(Message(Header(F.SET_PROTOCOL_FEATURES, 1, 8), body))


def run(rng: random.Random, length: int, hostility: float) -> int:
    """Run one connection and return how many messages it took."""
    handler = CheckingHandler(rng)
    session = Session(handler)
    negotiate(session, rng)
    with contextlib.closing(handler):
        for count in range(1, length + 1):
            if not step(rng, session, handler, hostility):
                return count
        return length


def open_count() -> int:
    settled_closes()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture(autouse=True, scope="module")
def no_fd_leak() -> Iterator[None]:
    before = open_count()
    yield
    assert open_count() == before


@pytest.mark.parametrize(
    ("seed", "hostility", "messages", "length"),
    [(1, 0.0, 20_000, 400), (2, 0.05, 20_000, 200), (3, 0.3, 20_000, 60), (4, 1.0, 10_000, 20)],
)
def test_many_random_front_ends(seed: int, hostility: float, messages: int, length: int) -> None:
    rng = random.Random(seed)
    before = open_count()
    sent = longest = 0
    while sent < messages:
        count = run(rng, length, hostility)
        sent += count
        longest = max(longest, count)
    assert open_count() == before
    assert longest > 5, "connections that die at once test nothing"


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([0.0, 0.2, 1.0]))
def test_random_front_ends_that_shrink(rng: random.Random, hostility: float) -> None:
    before = open_count()
    run(rng, 25, hostility)
    assert open_count() == before


@pytest.mark.parametrize("seed", range(6))
def test_random_streams_through_a_real_socket(seed: int) -> None:
    """Messages cut into pieces at random, some spoiled, some with fds in the wrong place."""
    rng = random.Random(seed)
    before = open_count()
    null = os.open("/dev/null", os.O_RDONLY)
    handled = sum(_run_stream(rng, null) for _ in range(100))
    os.close(null)
    assert handled > 300
    assert open_count() == before


def _run_stream(rng: random.Random, null: int) -> int:
    """Return how many messages the session took before the connection ended."""
    ours, theirs = socket.socketpair()
    handler = CheckingHandler(rng)
    session = Session(handler)
    negotiate(session, rng)
    theirs.setblocking(False)
    handled = 0
    with Channel(ours) as channel, theirs, contextlib.closing(handler):
        try:
            for _ in range(40):
                header, body, fds = next_message(rng, session, 0.02)
                data = header.encode() + body
                if rng.random() < 0.01:
                    data = rng.randbytes(len(data))
                _send_in_pieces(rng, theirs, data, [null] * fds)
                while (message := channel.recv()) is not None:
                    reply = session.handle(message)
                    handled += 1
                    if reply is not None:
                        channel.send(reply, session.reply_fds)
                        assert theirs.recv(65536) == reply
                    handler.check(session)
        except ProtocolError:
            return handled
        theirs.close()
        with pytest.raises((ProtocolError, PeerGoneError)):
            channel.recv()
    return handled


def _send_in_pieces(
    rng: random.Random, sock: socket.socket, data: bytes, fds: Sequence[int]
) -> None:
    cuts = sorted(rng.randrange(1, len(data)) for _ in range(rng.choice((0, 0, 1, 3))))
    pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
    carrier = 0 if rng.random() < 0.98 else rng.randrange(len(pieces))
    for index, piece in enumerate(piece for piece in pieces if piece):
        if fds and index == carrier:
            socket.send_fds(sock, [piece], list(fds))
        else:
            sock.sendall(piece)


def test_encode_message_agrees_with_the_generator() -> None:
    rng = random.Random(0)
    for request, make in REQUESTS.items():
        payload = make(rng)
        body = payload.encode()
        assert encode_message(request, payload) == Header(request, 1, len(body)).encode() + body
