"""What a session accepts, refuses, answers and closes for, message by message."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guestio.errors import DeviceError, ProtocolError
from guestio.vhost_user.channel import Message
from guestio.vhost_user.messages import (
    MAX_TABLE_REGIONS,
    U64,
    Config,
    Empty,
    Header,
    Inflight,
    IotlbMessage,
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
)
from guestio.vhost_user.messages import (
    FrontendRequest as F,
)
from guestio.vhost_user.session import MAX_QUEUES, Session
from tests.kit.closing import settled_closes
from tests.kit.recording import (
    ACCESS_PLATFORM,
    DEVICE_FEATURES,
    LOG_ALL,
    OFFERED_PROTOCOL_FEATURES,
    OWN_REPLY,
    PROTOCOL_FEATURES,
    RecordingHandler,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ALL_FEATURES = DEVICE_FEATURES | PROTOCOL_FEATURES
OFFERED = ALL_FEATURES | LOG_ALL
TOP = 2**64
LOW = MemoryRegion(0, 0x1000_0000, 0x7F00_0000_0000, 0)
HIGH = MemoryRegion(0x1_0000_0000, 0x2000_0000, 0x7F00_2000_0000, 0x1000_0000)
ADDRESS = VringAddr(0, 0, 0x10000, 0x30000, 0x20000)
REGION = Inflight(4224, 64, 2, 128)
LOG = Log(0x2000, 3)
ACK = "ack"
NACK = "nack"


def fds(count: int) -> list[int]:
    return [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]


def open_count() -> int:
    settled_closes()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture(autouse=True)
def no_fd_leak() -> Iterator[None]:
    before = open_count()
    yield
    assert open_count() == before


def message(
    request: int, payload: Payload | bytes = b"", *, count: int = 0, need_reply: bool = False
) -> Message:
    body = payload if isinstance(payload, bytes) else payload.encode()
    return Message(Header(request, 9 if need_reply else 1, len(body)), body, fds(count))


class Peer:
    """A front-end without a socket: sends to a session and decodes what comes back."""

    def __init__(self, *, negotiated: bool = True) -> None:
        self.handler = RecordingHandler()
        self.session = Session(self.handler)
        if negotiated:
            self.send(F.SET_PROTOCOL_FEATURES, U64(OFFERED_PROTOCOL_FEATURES))
            self.send(F.SET_FEATURES, U64(ALL_FEATURES))
            self.handler.calls.clear()

    def send(
        self,
        request: int,
        payload: Payload | bytes = b"",
        *,
        count: int = 0,
        need_reply: bool = False,
    ) -> Any:
        """Return None, `ACK`, `NACK`, or the payload of the message's own reply."""
        reply = self.session.handle(message(request, payload, count=count, need_reply=need_reply))
        if reply is None:
            return None
        header, body = Header.decode(reply[:12]), reply[12:]
        assert header == Header(request, 5, len(body))
        if request in OWN_REPLY:
            return body
        return NACK if U64.decode(body).value else ACK

    @property
    def calls(self) -> list[tuple[Any, ...]]:
        return self.handler.calls

    def state(self) -> tuple[Any, ...]:
        session = self.session
        rings = tuple(replace(ring) for ring in session.vrings)
        return session.features, session.protocol_features, session.regions, rings


# Request, payload, number of fds, what the handler was told, own reply.
GOOD: list[tuple[int, Payload, int, list[tuple[Any, ...]], bytes | None]] = [
    (F.GET_FEATURES, Empty(), 0, [], U64(OFFERED).encode()),
    (F.SET_FEATURES, U64(ALL_FEATURES), 0, [("set_features", DEVICE_FEATURES)], None),
    (F.GET_PROTOCOL_FEATURES, Empty(), 0, [], U64(OFFERED_PROTOCOL_FEATURES).encode()),
    (F.SET_PROTOCOL_FEATURES, U64(OFFERED_PROTOCOL_FEATURES), 0, [], None),
    (
        F.SET_FEATURES,
        U64(OFFERED),
        0,
        [("set_features", DEVICE_FEATURES), ("set_logging", True)],
        None,
    ),
    (F.SET_LOG_BASE, LOG, 1, [("set_log", LOG, "fd")], U64(0).encode()),
    (F.SET_LOG_FD, Empty(), 1, [], None),
    (F.SET_OWNER, Empty(), 0, [], None),
    (F.RESET_OWNER, Empty(), 0, [], None),
    (F.SET_MEM_TABLE, MemoryTable(()), 0, [("set_memory_table", [])], None),
    (
        F.SET_MEM_TABLE,
        MemoryTable((HIGH, LOW)),
        2,
        [("set_memory_table", [(HIGH, "fd"), (LOW, "fd")])],
        None,
    ),
    (F.GET_MAX_MEM_SLOTS, Empty(), 0, [], U64(4).encode()),
    (F.ADD_MEM_REG, SingleMemoryRegion(LOW), 1, [("add_memory_region", LOW, "fd")], None),
    (F.GET_QUEUE_NUM, Empty(), 0, [], U64(2).encode()),
    (F.SET_VRING_NUM, VringState(1, 256), 0, [("set_vring_num", 1, 256)], None),
    (F.SET_VRING_NUM, VringState(1, 1), 0, [("set_vring_num", 1, 1)], None),
    (F.SET_VRING_NUM, VringState(1, 32768), 0, [("set_vring_num", 1, 32768)], None),
    (F.SET_VRING_ADDR, ADDRESS, 0, [("set_vring_addr", 0, ADDRESS)], None),
    (
        F.SET_VRING_ADDR,
        replace(ADDRESS, flags=1, log=0x30000),
        0,
        [("set_vring_addr", 0, replace(ADDRESS, flags=1, log=0x30000))],
        None,
    ),
    (F.SET_VRING_BASE, VringState(1, 65535), 0, [("set_vring_base", 1, 65535)], None),
    (F.GET_VRING_BASE, VringState(1, 99), 0, [("get_vring_base", 1)], VringState(1, 7).encode()),
    (
        F.GET_VRING_BASE_SKIP_DRAIN,
        VringState(1, 0),
        0,
        [("get_vring_base", 1)],
        VringState(1, 7).encode(),
    ),
    (F.SET_VRING_KICK, VringFd(1, True), 1, [("set_vring_kick", 1, "fd")], None),
    (F.SET_VRING_KICK, VringFd(1, False), 0, [("set_vring_kick", 1, None)], None),
    (F.SET_VRING_CALL, VringFd(0, True), 1, [("set_vring_call", 0, "fd")], None),
    (F.SET_VRING_CALL, VringFd(0, False), 0, [("set_vring_call", 0, None)], None),
    (F.SET_VRING_ERR, VringFd(0, True), 1, [("set_vring_err", 0, "fd")], None),
    (F.SET_VRING_ERR, VringFd(0, False), 0, [("set_vring_err", 0, None)], None),
    (F.SET_VRING_ENABLE, VringState(1, 1), 0, [("set_vring_enable", 1, True)], None),
    (F.SET_VRING_ENABLE, VringState(1, 0), 0, [("set_vring_enable", 1, False)], None),
    (F.SET_BACKEND_REQ_FD, Empty(), 1, [("set_backend_channel", "fd")], None),
    (
        F.IOTLB_MSG,
        IotlbMessage.update(0x1000, 0x1000, LOW.user_addr, 3),
        0,
        [("iotlb", (0x1000, 0x1000, LOW.user_addr, 3, 2))],
        U64(0).encode(),
    ),
    (
        F.GET_CONFIG,
        Config(4, bytes(3), 1),
        0,
        [("get_config", 4, 3)],
        Config(4, b"\x04\x05\x06", 1).encode(),
    ),
    (F.SET_CONFIG, Config(8, b"xyz", 1), 0, [("set_config", 8, b"xyz", 1)], None),
    (F.RESET_DEVICE, Empty(), 0, [("reset_device",)], None),
    (F.SET_STATUS, U64(15), 0, [("set_status", 15)], None),
    (F.SET_STATUS, U64(0), 0, [("set_status", 0)], None),
    (F.GET_STATUS, Empty(), 0, [("get_status",)], U64(0).encode()),
    (
        F.GET_INFLIGHT_FD,
        Inflight(1, 2, 2, 128),
        0,
        [("get_inflight", 2, 128)],
        Inflight(2 * 2112, 0, 2, 128).encode(),
    ),
    (F.SET_INFLIGHT_FD, REGION, 1, [("set_inflight", REGION, "fd")], None),
    (
        F.SET_DEVICE_STATE_FD,
        StateTransfer(0, 0),
        1,
        [("save_state",)],
        U64(0).encode(),
    ),
    (F.CHECK_DEVICE_STATE, Empty(), 0, [("check_state",)], U64(0).encode()),
    (F.SEND_RARP, U64(0x0605_0403_0201), 0, [("send_rarp", bytes(range(1, 7)))], None),
]
GOOD_IDS = [f"{F(request).name}-{number}" for number, (request, *_) in enumerate(GOOD)]


@pytest.mark.parametrize("need_reply", [False, True])
@pytest.mark.parametrize(("request_", "payload", "count", "calls", "own"), GOOD, ids=GOOD_IDS)
def test_good_message(
    request_: int,
    payload: Payload,
    count: int,
    calls: list[tuple[Any, ...]],
    own: bytes | None,
    need_reply: bool,
) -> None:
    peer = Peer()
    reply = peer.send(request_, payload, count=count, need_reply=need_reply)
    assert peer.calls == calls
    if own is not None:
        assert reply == own
    else:
        assert reply == (ACK if need_reply else None)


def test_good_messages_are_every_supported_one() -> None:
    assert {request for request, *_ in GOOD} == set(Session._RULES) - {F.REM_MEM_REG}


@pytest.mark.parametrize("need_reply", [False, True])
@pytest.mark.parametrize(("request_", "payload", "count", "_calls", "_own"), GOOD, ids=GOOD_IDS)
def test_wrong_payload_size_closes(
    request_: int, payload: Payload, count: int, _calls: object, _own: object, need_reply: bool
) -> None:
    body = payload.encode()
    longer = set() if request_ == F.SET_MEM_TABLE else {body + b"\0", body + bytes(8)}
    for bad in longer | {body[:-1], body[:4]} - {body}:
        peer = Peer()
        before = peer.state()
        with pytest.raises(ProtocolError):
            peer.send(request_, bad, count=count, need_reply=need_reply)
        assert peer.calls == []
        assert peer.state() == before


@pytest.mark.parametrize("need_reply", [False, True])
@pytest.mark.parametrize(("request_", "payload", "count", "_calls", "_own"), GOOD, ids=GOOD_IDS)
def test_wrong_number_of_fds_closes(
    request_: int, payload: Payload, count: int, _calls: object, _own: object, need_reply: bool
) -> None:
    for wrong in {count + 1, 8, max(count - 1, 0)} - {count}:
        peer = Peer()
        with pytest.raises(ProtocolError, match=f"carries {wrong} fds"):
            peer.send(request_, payload, count=wrong, need_reply=need_reply)
        assert peer.calls == []


@pytest.mark.parametrize(("request_", "payload", "count", "_calls", "_own"), GOOD, ids=GOOD_IDS)
def test_a_reply_where_a_request_belongs_closes(
    request_: int, payload: Payload, count: int, _calls: object, _own: object
) -> None:
    peer = Peer()
    body = payload.encode()
    with pytest.raises(ProtocolError, match="as a reply"):
        peer.session.handle(Message(Header(request_, 5, len(body)), body, fds(count)))
    assert peer.calls == []


REFUSED: list[tuple[int, Payload, int]] = [
    (F.SET_FEATURES, U64(ALL_FEATURES | 1 << 34), 0),
    (F.SET_FEATURES, U64(1 << 63), 0),
    (F.SET_PROTOCOL_FEATURES, U64(int(ProtocolFeature.PAGEFAULT)), 0),
    (F.SET_PROTOCOL_FEATURES, U64(1 << 63), 0),
    (F.SET_MEM_TABLE, MemoryTable((replace(LOW, size=0),)), 1),
    (F.SET_MEM_TABLE, MemoryTable((LOW, LOW)), 2),
    (F.SET_MEM_TABLE, MemoryTable((LOW, replace(HIGH, guest_addr=0xFFF_FFFF))), 2),
    (F.SET_MEM_TABLE, MemoryTable((LOW, replace(HIGH, user_addr=LOW.user_addr + 0xFFF_FFFF))), 2),
    (F.SET_MEM_TABLE, MemoryTable((replace(LOW, guest_addr=TOP - LOW.size + 1),)), 1),
    (F.SET_MEM_TABLE, MemoryTable((replace(LOW, user_addr=TOP - LOW.size + 1),)), 1),
    (F.SET_MEM_TABLE, MemoryTable((replace(LOW, mmap_offset=TOP - LOW.size + 1),)), 1),
    (
        F.SET_MEM_TABLE,
        MemoryTable(tuple(MemoryRegion(n * 4096, 4096, n * 4096, 0) for n in range(5))),
        5,
    ),
    (F.ADD_MEM_REG, SingleMemoryRegion(replace(LOW, size=0)), 1),
    (F.ADD_MEM_REG, SingleMemoryRegion(replace(LOW, guest_addr=TOP - 1)), 1),
    (F.REM_MEM_REG, SingleMemoryRegion(LOW), 0),
    (F.SET_VRING_NUM, VringState(0, 0), 0),
    (F.SET_VRING_NUM, VringState(0, 3), 0),
    (F.SET_VRING_NUM, VringState(0, 65536), 0),
    (F.SET_VRING_NUM, VringState(2, 256), 0),
    (F.SET_VRING_ADDR, replace(ADDRESS, index=2), 0),
    (F.SET_VRING_ADDR, replace(ADDRESS, index=2**32 - 1), 0),
    (F.SET_VRING_ADDR, replace(ADDRESS, flags=2), 0),
    (F.SET_VRING_ADDR, replace(ADDRESS, desc=8), 0),
    (F.SET_VRING_ADDR, replace(ADDRESS, avail=1), 0),
    (F.SET_VRING_ADDR, replace(ADDRESS, used=2), 0),
    (F.SET_VRING_ADDR, replace(ADDRESS, avail=TOP - 2), 0),
    (F.SET_VRING_ADDR, replace(ADDRESS, used=TOP - 4), 0),
    (F.SET_VRING_BASE, VringState(0, 65536), 0),
    (F.SET_VRING_BASE, VringState(2, 0), 0),
    (F.SET_VRING_KICK, VringFd(2, True), 1),
    (F.SET_VRING_CALL, VringFd(255, True), 1),
    (F.SET_VRING_ERR, VringFd(2, False), 0),
    (F.SET_VRING_ENABLE, VringState(2, 1), 0),
    (F.SET_VRING_ENABLE, VringState(0, 2), 0),
    (F.SET_STATUS, U64(256), 0),
    (F.SET_INFLIGHT_FD, replace(REGION, num_queues=3), 1),
    (F.SET_INFLIGHT_FD, replace(REGION, num_queues=0), 1),
    (F.SET_INFLIGHT_FD, replace(REGION, queue_size=0), 1),
    (F.SET_INFLIGHT_FD, replace(REGION, queue_size=32769), 1),
]


@pytest.mark.parametrize(("request_", "payload", "count"), REFUSED, ids=repr)
def test_refused_message_changes_nothing(request_: int, payload: Payload, count: int) -> None:
    peer = Peer()
    before = peer.state()
    assert peer.send(request_, payload, count=count, need_reply=True) == NACK
    assert isinstance(peer.session.last_refusal, ProtocolError)
    with pytest.raises(ProtocolError, match="refused"):
        peer.send(request_, payload, count=count)
    assert peer.calls == []
    assert peer.state() == before


@pytest.mark.parametrize(
    ("request_", "payload", "count"),
    [
        (request, payload, count)
        for request, payload, count, calls, _ in GOOD
        if calls and request not in OWN_REPLY
    ],
    ids=repr,
)
def test_refusal_by_the_handler(request_: int, payload: Payload, count: int) -> None:
    peer = Peer()
    before = peer.state()
    peer.handler.error = DeviceError("not today")
    assert peer.send(request_, payload, count=count, need_reply=True) == NACK
    assert str(peer.session.last_refusal) == "not today"
    assert peer.state() == before
    peer.handler.error = DeviceError("not today")
    with pytest.raises(ProtocolError, match="refused: not today"):
        peer.send(request_, payload, count=count)
    assert peer.state() == before


@pytest.mark.parametrize(
    ("request_", "payload"),
    [(F.GET_VRING_BASE, VringState(0, 0)), (F.GET_STATUS, Empty())],
    ids=["base", "status"],
)
def test_handler_cannot_refuse_what_must_be_answered(request_: int, payload: Payload) -> None:
    peer = Peer()
    peer.handler.error = DeviceError("not today")
    with pytest.raises(ProtocolError, match="not today"):
        peer.send(request_, payload, need_reply=True)


def test_own_bugs_are_not_hidden() -> None:
    peer = Peer()

    def broken(_: int) -> None:
        raise RuntimeError("bug")

    peer.handler.set_features = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="bug"):
        peer.send(F.SET_FEATURES, U64(ALL_FEATURES), need_reply=True)


def test_need_reply_is_ignored_until_reply_ack_is_negotiated() -> None:
    peer = Peer(negotiated=False)
    assert peer.send(F.SET_OWNER, need_reply=True) is None
    assert peer.send(F.SET_PROTOCOL_FEATURES, U64(0), need_reply=True) is None
    reply_ack = U64(int(ProtocolFeature.REPLY_ACK))
    assert peer.send(F.SET_PROTOCOL_FEATURES, reply_ack) is None
    assert peer.send(F.SET_OWNER, need_reply=True) == ACK
    assert peer.send(F.SET_PROTOCOL_FEATURES, U64(0), need_reply=True) == ACK
    assert peer.send(F.SET_OWNER, need_reply=True) is None
    with pytest.raises(ProtocolError, match="refused"):
        peer.send(F.SET_VRING_NUM, VringState(0, 3), need_reply=True)


def test_the_message_that_negotiates_reply_ack_is_acknowledged_if_it_asks() -> None:
    """User-mode Linux asks, and waits for the answer; libvhost-user and rust-vmm answer."""
    peer = Peer(negotiated=False)
    bits = int(ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG)
    assert peer.send(F.SET_PROTOCOL_FEATURES, U64(bits), need_reply=True) == ACK
    assert peer.session.protocol_features == bits
    # A refusal negotiates nothing, so there is no acknowledgement that could say so.
    peer = Peer(negotiated=False)
    with pytest.raises(ProtocolError, match="never offered"):
        peer.send(F.SET_PROTOCOL_FEATURES, U64(bits | 1 << 63), need_reply=True)
    assert peer.session.protocol_features == 0


@pytest.mark.parametrize("count", [1, 2])
def test_a_memory_table_with_room_for_more_regions_is_read_as_far_as_it_counts(count: int) -> None:
    """The room after the regions is never memory, and asks for no fds."""
    regions = (LOW, HIGH)[:count]
    peer = Peer()
    body = MemoryTable(regions).encode() + replace(HIGH, guest_addr=1 << 40, size=4096).encode()
    assert peer.send(F.SET_MEM_TABLE, body, count=count, need_reply=True) == ACK
    assert peer.calls == [("set_memory_table", [(region, "fd") for region in regions])]
    assert peer.session.regions == regions
    peer = Peer()
    with pytest.raises(ProtocolError, match=f"carries {count + 1} fds"):
        peer.send(F.SET_MEM_TABLE, body, count=count + 1)
    assert (peer.calls, peer.session.regions) == ([], ())


@pytest.mark.parametrize("request_", [0, 20, 23, 29, 33, 35, 46, 1000, 2**32 - 1])
def test_unknown_message_is_refused_or_ignored(request_: int) -> None:
    peer = Peer()
    assert peer.send(request_, bytes(100), count=3, need_reply=True) == NACK
    assert peer.session.ignored == 0
    assert peer.send(request_, bytes(100), count=3) is None
    assert peer.session.ignored == 1
    assert peer.calls == []
    assert peer.send(F.SET_OWNER, need_reply=True) == ACK


@pytest.mark.parametrize("request_", [26, 28, 30, 41, 44])
def test_unsupported_message_whose_reply_would_be_missed_closes(request_: int) -> None:
    for need_reply in (False, True):
        with pytest.raises(ProtocolError, match=F(request_).name):
            Peer().send(request_, bytes(24), count=1, need_reply=need_reply)


GATED = [
    (F.GET_MAX_MEM_SLOTS, Empty(), 0, ProtocolFeature.CONFIGURE_MEM_SLOTS),
    (F.ADD_MEM_REG, SingleMemoryRegion(LOW), 1, ProtocolFeature.CONFIGURE_MEM_SLOTS),
    (F.REM_MEM_REG, SingleMemoryRegion(LOW), 1, ProtocolFeature.CONFIGURE_MEM_SLOTS),
    (F.SET_BACKEND_REQ_FD, Empty(), 1, ProtocolFeature.BACKEND_REQ),
    (F.SET_CONFIG, Config(0, b"a"), 0, ProtocolFeature.CONFIG),
    (F.RESET_DEVICE, Empty(), 0, ProtocolFeature.RESET_DEVICE),
    (F.SET_STATUS, U64(1), 0, ProtocolFeature.STATUS),
    (F.GET_STATUS, Empty(), 0, ProtocolFeature.STATUS),
    (F.GET_INFLIGHT_FD, REGION, 0, ProtocolFeature.INFLIGHT_SHMFD),
    (F.SET_INFLIGHT_FD, REGION, 1, ProtocolFeature.INFLIGHT_SHMFD),
]


@pytest.mark.parametrize(("request_", "payload", "count", "feature"), GATED, ids=repr)
def test_message_needs_its_protocol_feature(
    request_: int, payload: Payload, count: int, feature: ProtocolFeature
) -> None:
    peer = Peer()
    others = OFFERED_PROTOCOL_FEATURES & ~feature
    peer.send(F.SET_PROTOCOL_FEATURES, U64(others))
    if request_ in OWN_REPLY:
        with pytest.raises(ProtocolError, match=feature.name):
            peer.send(request_, payload, count=count, need_reply=True)
    else:
        assert peer.send(request_, payload, count=count, need_reply=True) == NACK
    with pytest.raises(ProtocolError, match=feature.name):
        peer.send(request_, payload, count=count)
    assert peer.calls == []


def test_get_config_answers_errors_with_nothing() -> None:
    peer = Peer()
    peer.handler.error = DeviceError("no such bytes")
    assert peer.send(F.GET_CONFIG, Config(1 << 20, bytes(8))) == b""
    peer.send(F.SET_PROTOCOL_FEATURES, U64(0))
    assert peer.send(F.GET_CONFIG, Config(0, bytes(8))) == b""
    assert peer.calls == []


def test_get_config_of_a_wrong_size_is_our_bug() -> None:
    peer = Peer()
    peer.handler.get_config = lambda _offset, _size: b"ab"  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="2 bytes for 3"):
        peer.send(F.GET_CONFIG, Config(0, bytes(3)))


def test_the_reply_with_a_region_comes_with_its_fd() -> None:
    peer = Peer()
    reply = Inflight.decode(peer.send(F.GET_INFLIGHT_FD, Inflight(0, 0, 1, 16)))
    (fd,) = peer.session.reply_fds
    assert os.fstat(fd).st_size == reply.mmap_size == 320
    peer.send(F.GET_QUEUE_NUM)
    assert peer.session.reply_fds == ()


@pytest.mark.parametrize(
    "payload", [Inflight(9, 9, 3, 16), Inflight(9, 9, 0, 16), Inflight(9, 9, 1, 0)], ids=repr
)
def test_a_region_that_makes_no_sense_is_refused_with_one_of_no_bytes(payload: Inflight) -> None:
    peer = Peer()
    assert (
        peer.send(F.GET_INFLIGHT_FD, payload)
        == replace(payload, mmap_size=0, mmap_offset=0).encode()
    )
    assert isinstance(peer.session.last_refusal, ProtocolError)
    assert peer.session.reply_fds == ()
    assert peer.calls == []


def test_a_region_refused_by_the_handler() -> None:
    peer = Peer()
    peer.handler.error = DeviceError("no memory today")
    assert peer.send(F.GET_INFLIGHT_FD, REGION) == Inflight(0, 0, 2, 128).encode()
    assert str(peer.session.last_refusal) == "no memory today"
    assert peer.session.reply_fds == ()


def test_a_region_stays_while_a_ring_is_started() -> None:
    peer = Peer()
    start(peer, 1)
    peer.calls.clear()
    assert peer.send(F.SET_INFLIGHT_FD, REGION, count=1, need_reply=True) == NACK
    assert peer.send(F.GET_INFLIGHT_FD, REGION) == Inflight(0, 0, 2, 128).encode()
    assert peer.calls == []
    peer.send(F.GET_VRING_BASE, VringState(1, 0))
    assert peer.send(F.SET_INFLIGHT_FD, REGION, count=1, need_reply=True) == ACK


def test_a_handler_without_the_methods_cannot_offer_regions() -> None:
    class Plain(RecordingHandler):
        get_inflight = None  # type: ignore[assignment]

    with pytest.raises(ValueError, match="0x901000 are not supported"):
        Session(Plain())


def test_memory_regions_come_and_go() -> None:
    peer = Peer()
    assert peer.send(F.ADD_MEM_REG, SingleMemoryRegion(HIGH), count=1, need_reply=True) == ACK
    assert peer.send(F.ADD_MEM_REG, SingleMemoryRegion(LOW), count=1, need_reply=True) == ACK
    assert peer.session.regions == (LOW, HIGH)
    assert peer.send(F.ADD_MEM_REG, SingleMemoryRegion(LOW), count=1, need_reply=True) == NACK
    for other in (
        replace(LOW, size=LOW.size - 1),
        replace(LOW, guest_addr=1),
        replace(LOW, user_addr=LOW.user_addr + 1),
    ):
        assert peer.send(F.REM_MEM_REG, SingleMemoryRegion(other), need_reply=True) == NACK
    assert peer.session.regions == (LOW, HIGH)
    moved = SingleMemoryRegion(replace(LOW, mmap_offset=0x5000))
    assert peer.send(F.REM_MEM_REG, moved, count=1, need_reply=True) == ACK
    assert peer.calls[-1] == ("remove_memory_region", LOW)
    assert peer.session.regions == (HIGH,)
    assert peer.send(F.REM_MEM_REG, moved, need_reply=True) == NACK
    peer.handler.error = DeviceError("still in use")
    assert peer.send(F.REM_MEM_REG, SingleMemoryRegion(HIGH), need_reply=True) == NACK
    assert peer.session.regions == (HIGH,)


def test_memory_slots_are_limited() -> None:
    peer = Peer()
    for number in range(5):
        region = MemoryRegion(number << 20, 1 << 20, (number + 9) << 20, 0)
        reply = peer.send(F.ADD_MEM_REG, SingleMemoryRegion(region), count=1, need_reply=True)
        assert reply == (ACK if number < 4 else NACK)
    assert len(peer.session.regions) == 4


def test_memory_table_replaces_everything() -> None:
    peer = Peer()
    peer.send(F.ADD_MEM_REG, SingleMemoryRegion(LOW), count=1)
    peer.send(F.SET_MEM_TABLE, MemoryTable((HIGH, LOW)), count=2)
    assert peer.session.regions == (LOW, HIGH)
    peer.send(F.SET_MEM_TABLE, MemoryTable((HIGH,)), count=1)
    assert peer.session.regions == (HIGH,)


def test_regions_may_touch_each_other_and_the_end_of_the_space() -> None:
    peer = Peer()
    page = 0x1000
    table = MemoryTable(
        (
            MemoryRegion(TOP - page, page, TOP - 2 * page, TOP - page),
            MemoryRegion(TOP - 2 * page, page, TOP - page, 0),
        )
    )
    assert peer.send(F.SET_MEM_TABLE, table, count=2, need_reply=True) == ACK


def test_too_many_regions_in_one_table_close() -> None:
    assert MAX_TABLE_REGIONS == 8
    regions = [MemoryRegion(n << 20, 1 << 20, n << 20, 0) for n in range(9)]
    body = (9).to_bytes(8, "little") + b"".join(region.encode() for region in regions)
    with pytest.raises(ProtocolError, match="9 regions"):
        Peer().send(F.SET_MEM_TABLE, body, count=8, need_reply=True)


def test_rings_start_disabled_with_protocol_features() -> None:
    peer = Peer(negotiated=False)
    peer.send(F.SET_FEATURES, U64(ALL_FEATURES))
    assert peer.calls == [("set_features", DEVICE_FEATURES)]
    assert not any(ring.enabled for ring in peer.session.vrings)
    peer.send(F.SET_VRING_ENABLE, VringState(1, 1))
    assert [ring.enabled for ring in peer.session.vrings] == [False, True]


def test_rings_are_enabled_at_once_without_protocol_features() -> None:
    peer = Peer(negotiated=False)
    peer.send(F.SET_FEATURES, U64(DEVICE_FEATURES))
    assert peer.calls == [
        ("set_features", DEVICE_FEATURES),
        ("set_vring_enable", 0, True),
        ("set_vring_enable", 1, True),
    ]
    with pytest.raises(ProtocolError, match="VHOST_USER_F_PROTOCOL_FEATURES"):
        peer.send(F.SET_VRING_ENABLE, VringState(0, 0))
    peer.send(F.SET_FEATURES, U64(DEVICE_FEATURES))
    assert peer.calls[3:] == [("set_features", DEVICE_FEATURES)]


def test_features_of_the_rings_are_understood_without_being_offered() -> None:
    peer = Peer(negotiated=False)
    indirect, event_idx = 1 << 28, 1 << 29
    assert not DEVICE_FEATURES & (indirect | event_idx)
    peer.send(F.SET_FEATURES, U64(ALL_FEATURES | indirect | event_idx))
    assert peer.calls == [("set_features", DEVICE_FEATURES | indirect | event_idx)]
    assert peer.session.features == DEVICE_FEATURES | indirect | event_idx


def test_rings_may_be_enabled_before_features_as_qemu_does_for_network_devices() -> None:
    peer = Peer(negotiated=False)
    with pytest.raises(ProtocolError):
        peer.send(F.SET_VRING_ENABLE, VringState(0, 1))
    peer.send(F.SET_PROTOCOL_FEATURES, U64(0))
    peer.send(F.SET_VRING_ENABLE, VringState(0, 1))
    peer.send(F.SET_FEATURES, U64(ALL_FEATURES))
    assert [ring.enabled for ring in peer.session.vrings] == [True, False]


def test_reset_owner_disables_all_rings() -> None:
    peer = Peer()
    peer.send(F.SET_VRING_ENABLE, VringState(1, 1))
    peer.send(F.RESET_OWNER)
    assert peer.calls == [("set_vring_enable", 1, True), ("set_vring_enable", 1, False)]
    assert peer.session.features == DEVICE_FEATURES


def start(peer: Peer, index: int = 0) -> None:
    peer.send(F.SET_VRING_NUM, VringState(index, 256))
    peer.send(F.SET_VRING_BASE, VringState(index, 5))
    peer.send(F.SET_VRING_ADDR, replace(ADDRESS, index=index))
    peer.send(F.SET_VRING_KICK, VringFd(index, True), count=1)
    peer.send(F.SET_VRING_ENABLE, VringState(index, 1))
    assert peer.session.vrings[index].started
    peer.calls.clear()


@pytest.mark.parametrize(
    ("request_", "same", "other"),
    [
        (F.SET_VRING_NUM, VringState(0, 256), VringState(0, 128)),
        (F.SET_VRING_BASE, VringState(0, 5), VringState(0, 6)),
        (F.SET_FEATURES, U64(ALL_FEATURES), U64(ALL_FEATURES & ~ACCESS_PLATFORM)),
    ],
    ids=["num", "base", "features"],
)
def test_started_ring_keeps_its_set_up_until_stopped(
    request_: int, same: Payload, other: Payload
) -> None:
    peer = Peer()
    start(peer)
    assert peer.send(request_, same, need_reply=True) == ACK
    assert peer.send(request_, other, need_reply=True) == NACK
    assert peer.send(F.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 7).encode()
    assert not peer.session.vrings[0].started
    assert peer.send(request_, other, need_reply=True) == ACK


def test_a_ring_goes_on_where_it_stopped() -> None:
    """Its base is then the one that was answered, so to set that again changes nothing."""
    peer = Peer()
    start(peer)
    peer.send(F.GET_VRING_BASE, VringState(0, 0))
    peer.send(F.SET_VRING_KICK, VringFd(0, True), count=1)
    assert peer.session.vrings[0].started
    assert peer.send(F.SET_VRING_BASE, VringState(0, 7), need_reply=True) == ACK
    assert peer.send(F.SET_VRING_BASE, VringState(0, 5), need_reply=True) == NACK


def test_features_that_the_handler_refuses_are_not_negotiated() -> None:
    peer = Peer()
    before = peer.state()
    peer.handler.error = DeviceError("not these")
    fewer = U64(ALL_FEATURES & ~ACCESS_PLATFORM)
    assert peer.send(F.SET_FEATURES, fewer, need_reply=True) == NACK
    assert peer.state() == before
    assert peer.session.access_platform
    assert peer.send(F.SET_FEATURES, fewer, need_reply=True) == ACK
    assert not peer.session.access_platform


def test_features_come_before_rings() -> None:
    peer = Peer(negotiated=False)
    peer.send(F.SET_PROTOCOL_FEATURES, U64(OFFERED_PROTOCOL_FEATURES))
    start(peer)
    assert peer.send(F.SET_FEATURES, U64(ALL_FEATURES), need_reply=True) == NACK


def test_started_ring_may_move_and_change_its_eventfds() -> None:
    peer = Peer()
    start(peer)
    assert peer.send(F.SET_VRING_ADDR, replace(ADDRESS, desc=0x50000), need_reply=True) == ACK
    assert peer.send(F.SET_VRING_CALL, VringFd(0, True), count=1, need_reply=True) == ACK
    assert peer.send(F.SET_VRING_KICK, VringFd(0, True), count=1, need_reply=True) == ACK


def test_ring_size_and_address_are_checked_together() -> None:
    at_end = replace(ADDRESS, desc=TOP - 16 * 64, avail=0x1000, used=0x2000)
    for first, second in (
        ((F.SET_VRING_ADDR, at_end), (F.SET_VRING_NUM, VringState(0, 128))),
        ((F.SET_VRING_NUM, VringState(0, 128)), (F.SET_VRING_ADDR, at_end)),
    ):
        peer = Peer()
        assert peer.send(*first, need_reply=True) == ACK
        assert peer.send(*second, need_reply=True) == NACK
    peer = Peer()
    peer.send(F.SET_VRING_NUM, VringState(0, 64))
    assert peer.send(F.SET_VRING_ADDR, at_end, need_reply=True) == ACK


@pytest.mark.parametrize("reset", [(F.RESET_DEVICE, Empty()), (F.SET_STATUS, U64(0))])
def test_reset_forgets_rings_and_keeps_memory_and_features(reset: tuple[int, Payload]) -> None:
    peer = Peer()
    peer.send(F.SET_MEM_TABLE, MemoryTable((LOW,)), count=1)
    start(peer)
    peer.send(*reset)
    fresh = Peer().session.vrings
    assert peer.session.vrings == fresh
    assert peer.session.regions == (LOW,)
    assert peer.session.features == DEVICE_FEATURES
    start(peer)


def test_qemu_boot_with_a_boot_loader_and_then_a_kernel() -> None:
    """QEMU 10 with vhost-user-blk behind an IOMMU: the order and the repetitions it sends."""
    peer = Peer(negotiated=False)
    wanted = OFFERED_PROTOCOL_FEATURES
    assert peer.send(F.GET_FEATURES) == U64(OFFERED).encode()
    assert peer.send(F.GET_PROTOCOL_FEATURES) == U64(wanted).encode()
    assert peer.send(F.SET_PROTOCOL_FEATURES, U64(wanted)) is None
    assert peer.send(F.GET_QUEUE_NUM) == U64(2).encode()
    assert peer.send(F.GET_MAX_MEM_SLOTS) == U64(4).encode()
    assert peer.send(F.SET_BACKEND_REQ_FD, count=1, need_reply=True) == ACK
    assert peer.send(F.SET_OWNER) is None
    assert peer.send(F.GET_FEATURES) == U64(OFFERED).encode()
    assert peer.send(F.SET_VRING_CALL, VringFd(0, True), count=1) is None
    assert peer.send(F.SET_VRING_ERR, VringFd(0, True), count=1) is None
    assert len(peer.send(F.GET_CONFIG, Config(0, bytes(57)))) == 69
    assert peer.send(F.RESET_DEVICE) is None
    for features in (ALL_FEATURES & ~ACCESS_PLATFORM, ALL_FEATURES):
        assert peer.send(F.SET_FEATURES, U64(features)) is None
        assert peer.send(F.GET_STATUS) == U64(0).encode()
        assert peer.send(F.SET_STATUS, U64(8)) is None
        if not peer.session.regions:
            added = peer.send(F.ADD_MEM_REG, SingleMemoryRegion(LOW), count=1, need_reply=True)
            assert added == ACK
        assert peer.send(F.SET_VRING_NUM, VringState(0, 128)) is None
        assert peer.send(F.SET_VRING_BASE, VringState(0, 0)) is None
        assert peer.send(F.SET_VRING_ADDR, ADDRESS) is None
        assert peer.send(F.SET_VRING_KICK, VringFd(0, True), count=1) is None
        assert peer.send(F.SET_VRING_CALL, VringFd(0, True), count=1) is None
        assert peer.send(F.SET_VRING_ENABLE, VringState(0, 1), need_reply=True) == ACK
        if features & ACCESS_PLATFORM:
            update = IotlbMessage.update(0x20000, 0x1000, LOW.user_addr, 3)
            assert peer.send(F.IOTLB_MSG, update, need_reply=True) == U64(0).encode()
        assert peer.send(F.SET_STATUS, U64(15)) is None
        assert peer.send(F.SET_VRING_ENABLE, VringState(0, 0), need_reply=True) == ACK
        assert peer.send(F.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 7).encode()
        assert peer.send(F.SET_STATUS, U64(0)) is None


@pytest.mark.parametrize(
    "bad",
    [
        IotlbMessage.miss(0, 0x1000, 1),
        IotlbMessage.access_fail(0, 0x1000, 1),
        IotlbMessage(0, 0x1000, 0, 3, 0),
        IotlbMessage(0, 0x1000, 0, 3, 5),
        IotlbMessage(0, 0x1000, 0, 3, 255),
        IotlbMessage.update(0, 0, 0, 3),
        IotlbMessage.update(0, 0x1000, 0, 4),
        IotlbMessage.update(TOP - 1, 2, 0, 3),
        IotlbMessage.update(0, 2, TOP - 1, 3),
        IotlbMessage.invalidate(0x1000, 0),
        IotlbMessage.invalidate(TOP - 1, 2),
    ],
    ids=repr,
)
def test_bad_iotlb_message_is_answered_and_the_connection_lives(bad: IotlbMessage) -> None:
    peer = Peer()
    assert peer.send(F.IOTLB_MSG, bad) == U64(1).encode()
    assert peer.calls == []
    assert peer.send(F.IOTLB_MSG, IotlbMessage.invalidate(TOP - 1, 1)) == U64(0).encode()


def test_iotlb_refused_by_the_handler() -> None:
    peer = Peer()
    peer.handler.error = DeviceError("not in guest memory")
    update = IotlbMessage.update(0, 0x1000, 0x5000, 3)
    assert peer.send(F.IOTLB_MSG, update, need_reply=True) == U64(1).encode()
    assert str(peer.session.last_refusal) == "not in guest memory"


def test_invalidation_of_the_whole_space_as_qemu_writes_it() -> None:
    peer = Peer()
    assert peer.send(F.IOTLB_MSG, IotlbMessage.invalidate(0, 0)) == U64(0).encode()
    assert peer.calls == [("iotlb", (0, TOP, 0, 0, 3))]


def test_iotlb_update_needs_an_iommu_but_invalidation_never_hurts() -> None:
    peer = Peer()
    peer.send(F.SET_FEATURES, U64(ALL_FEATURES & ~ACCESS_PLATFORM))
    assert not peer.session.access_platform
    peer.calls.clear()
    update = IotlbMessage.update(0, 0x1000, 0x5000, 3)
    assert peer.send(F.IOTLB_MSG, update) == U64(1).encode()
    assert peer.calls == []
    assert peer.send(F.IOTLB_MSG, IotlbMessage.invalidate(0, 0x1000)) == U64(0).encode()
    peer.send(F.SET_FEATURES, U64(ALL_FEATURES))
    assert peer.session.access_platform
    assert peer.send(F.IOTLB_MSG, update) == U64(0).encode()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_queues", 0),
        ("num_queues", MAX_QUEUES + 1),
        ("max_mem_slots", 0),
        ("protocol_features", int(ProtocolFeature.PAGEFAULT)),
        ("features", PROTOCOL_FEATURES),
        ("features", 1 << 26),
        ("features", TOP),
        ("features", -1),
    ],
)
def test_handler_that_offers_the_impossible(name: str, value: int) -> None:
    handler = RecordingHandler()
    setattr(handler, name, value)
    with pytest.raises(ValueError, match=name.replace("protocol_", "protocol ")):
        Session(handler)


def test_protocol_features_may_change_later() -> None:
    peer = Peer()
    peer.send(F.SET_PROTOCOL_FEATURES, U64(int(ProtocolFeature.MQ)))
    assert peer.session.protocol_features == ProtocolFeature.MQ


def logging(*, rings: bool) -> Peer:
    """A peer with a started ring, and logging on if asked for."""
    peer = Peer()
    peer.send(F.SET_VRING_NUM, VringState(0, 256))
    peer.send(F.SET_VRING_ADDR, ADDRESS)
    peer.send(F.SET_VRING_KICK, VringFd(0, True), count=1)
    assert peer.session.vrings[0].started
    if rings:
        peer.send(F.SET_LOG_BASE, LOG, count=1)
        peer.send(F.SET_FEATURES, U64(OFFERED))
        peer.send(F.SET_VRING_ADDR, replace(ADDRESS, flags=1, log=ADDRESS.used))
    peer.calls.clear()
    return peer


def test_logging_is_switched_while_a_ring_is_started() -> None:
    peer = logging(rings=False)
    for enable in (True, False, True):
        assert peer.send(F.SET_FEATURES, U64(OFFERED if enable else ALL_FEATURES)) is None
        assert peer.session.logging == enable
        peer.send(F.SET_FEATURES, U64(OFFERED if enable else ALL_FEATURES))
    assert [call for call in peer.calls if call[0] == "set_logging"] == [
        ("set_logging", True),
        ("set_logging", False),
        ("set_logging", True),
    ]
    assert peer.session.features == DEVICE_FEATURES
    with pytest.raises(ProtocolError, match="while a ring is started"):
        peer.send(F.SET_FEATURES, U64(OFFERED & ~ACCESS_PLATFORM))


def test_logging_may_be_switched_without_protocol_features_in_between() -> None:
    peer = Peer(negotiated=False)
    peer.send(F.SET_FEATURES, U64(DEVICE_FEATURES))
    peer.calls.clear()
    peer.send(F.SET_FEATURES, U64(DEVICE_FEATURES | LOG_ALL))
    assert peer.session.logging
    assert all(ring.enabled for ring in peer.session.vrings)


def test_a_started_ring_whose_writes_are_logged_stays_where_it_is() -> None:
    peer = logging(rings=False)
    logged = replace(ADDRESS, flags=1, log=ADDRESS.used)
    for address in (logged, ADDRESS, logged):
        peer.send(F.SET_VRING_ADDR, address)
        assert peer.session.vrings[0].address == address
    assert peer.calls == []
    moved = replace(logged, flags=0, used=ADDRESS.used + 0x1000)
    peer.send(F.SET_VRING_ADDR, moved)
    assert peer.calls == [("set_vring_addr", 0, moved)]


def test_a_ring_is_not_logged_without_the_feature() -> None:
    peer = Peer()
    peer.send(F.SET_PROTOCOL_FEATURES, U64(OFFERED_PROTOCOL_FEATURES & ~ProtocolFeature.LOG_SHMFD))
    with pytest.raises(ProtocolError, match="not negotiated"):
        peer.send(F.SET_VRING_ADDR, replace(ADDRESS, flags=1))
    with pytest.raises(ProtocolError, match="LOG_SHMFD"):
        peer.send(F.SET_LOG_BASE, LOG, count=1)


@pytest.mark.parametrize("log", [Log(0, 0), Log(1, TOP - 1), Log(TOP - 1, TOP - 1)])
def test_a_log_that_cannot_be_closes(log: Log) -> None:
    peer = Peer()
    if log.size + log.offset == TOP:
        peer.send(F.SET_LOG_BASE, log, count=1)  # whether it can be mapped is not the session's
        return
    with pytest.raises(ProtocolError, match="empty or passes"):
        peer.send(F.SET_LOG_BASE, log, count=1)
    assert peer.calls == []


def test_a_log_outlasts_resets_and_logging_goes_on() -> None:
    peer = logging(rings=True)
    peer.send(F.RESET_DEVICE)
    peer.send(F.SET_STATUS, U64(0))
    assert peer.session.logging
    # The firmware's driver, with other features than the system's.
    peer.send(F.SET_FEATURES, U64(OFFERED & ~ACCESS_PLATFORM))
    assert peer.session.logging
    assert ("set_logging", False) not in peer.calls


def test_a_handler_without_a_log_offers_none() -> None:
    class Plain(RecordingHandler):
        set_log = set_logging = None  # type: ignore[assignment] - it has no such method

    handler = Plain()
    with pytest.raises(ValueError, match="protocol features 0x2 are not"):
        Session(handler)
    handler.protocol_features &= ~ProtocolFeature.LOG_SHMFD
    peer = Peer(negotiated=False)
    peer.handler, peer.session = handler, Session(handler)
    assert peer.send(F.GET_FEATURES) == U64(ALL_FEATURES).encode()
    with pytest.raises(ProtocolError, match="never offered"):
        peer.send(F.SET_FEATURES, U64(OFFERED))
