"""The wire format against the specification: sizes, exact bytes, and refusal of everything else."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestio.errors import ProtocolError
from guestio.vhost_user import messages
from guestio.vhost_user.messages import (
    MAX_PAYLOAD_SIZE,
    U64,
    BackendRequest,
    Config,
    ConfigFlag,
    Empty,
    FrontendRequest,
    Header,
    HeaderFlag,
    Inflight,
    IotlbMessage,
    IotlbType,
    Log,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    SingleMemoryRegion,
    VringAddr,
    VringFd,
    VringState,
    decode_ack,
    encode_ack,
    encode_iotlb,
    encode_message,
    request_name,
)

REGION = MemoryRegion(0x1_0000_0000, 0x4000_0000, 0x7F00_1234_5000, 0x20_0000)
REGION_HEX = "0000000001000000 0000004000000000 00503412007f0000 0000200000000000"

# Value, its bytes as a C compiler lays them out on a little-endian machine, fixed size or not.
EXAMPLES: list[tuple[Any, str, bool]] = [
    (Empty(), "", True),
    (U64(0x0102030405060708), "0807060504030201", True),
    (VringState(3, 256), "03000000 00010000", True),
    (
        VringAddr(1, 1, 0x1000, 0x3000, 0x2000, 0x4000),
        "01000000 01000000 0010000000000000 0030000000000000 0020000000000000 0040000000000000",
        True,
    ),
    (VringFd(2, True), "0200000000000000", True),
    (VringFd(255, False), "ff01000000000000", True),
    (REGION, REGION_HEX, True),
    (SingleMemoryRegion(REGION), "0000000000000000" + REGION_HEX, True),
    (MemoryTable(()), "00000000 00000000", False),
    (MemoryTable((REGION, REGION)), "02000000 00000000" + REGION_HEX + REGION_HEX, False),
    (Config(0x10, b"\xaa\xbb\xcc", 1), "10000000 03000000 01000000 aabbcc", False),
    (Config(0, b""), "00000000 00000000 00000000", False),
    (
        IotlbMessage(0x1000, 0x2000, 0x7F0000003000, 3, 2),
        "0010000000000000 0020000000000000 00300000007f0000 03 02 000000000000",
        True,
    ),
    (Log(0x1000, 0x2000), "0010000000000000 0020000000000000", True),
    (
        Inflight(0x1000, 0x2000, 4, 128),
        "0010000000000000 0020000000000000 0400 8000 00000000",
        True,
    ),
]
EXAMPLE_IDS = [repr(value) for value, _, _ in EXAMPLES]

U8 = st.integers(0, 0xFF)
U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 2**32 - 1)
U64S = st.integers(0, 2**64 - 1)
REGIONS = st.builds(MemoryRegion, U64S, U64S, U64S, U64S)
PAYLOADS = st.one_of(
    st.builds(U64, U64S),
    st.builds(VringState, U32, U32),
    st.builds(VringAddr, U32, U32, U64S, U64S, U64S, U64S),
    st.builds(VringFd, U8, st.booleans()),
    st.builds(SingleMemoryRegion, REGIONS),
    st.builds(MemoryTable, st.lists(REGIONS, max_size=8).map(tuple)),
    st.builds(Config, U32, st.binary(max_size=300), U32),
    st.builds(IotlbMessage, U64S, U64S, U64S, U8, U8),
    st.builds(Log, U64S, U64S),
    st.builds(Inflight, U64S, U64S, U16, U16),
)
TYPES = sorted({type(value) for value, _, _ in EXAMPLES}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize(("value", "encoded", "_fixed"), EXAMPLES, ids=EXAMPLE_IDS)
def test_payload_has_the_bytes_of_the_c_structure(value: Any, encoded: str, _fixed: bool) -> None:
    assert value.encode() == bytes.fromhex(encoded)
    assert type(value).decode(bytes.fromhex(encoded)) == value
    assert type(value).decode(memoryview(bytearray.fromhex(encoded))) == value


@pytest.mark.parametrize(("value", "encoded", "fixed"), EXAMPLES, ids=EXAMPLE_IDS)
def test_payload_of_any_other_size_is_refused(value: Any, encoded: str, fixed: bool) -> None:
    good = bytes.fromhex(encoded)
    # Only a memory table may be longer: test_memory_table_with_room_for_more_regions.
    room = isinstance(value, MemoryTable)
    longer = [] if room else [good + bytes(extra) for extra in (1, 4, 8, 32)]
    shorter = [good[:size] for size in range(len(good))] if fixed or len(good) > 8 else []
    for bad in [*longer, *shorter]:
        with pytest.raises(ProtocolError):
            type(value).decode(bad)


def test_structure_sizes() -> None:
    sizes = {
        kind.__name__: len(value.encode())
        for value, _, fixed in EXAMPLES
        if fixed
        for kind in [type(value)]
    }
    # sizeof() of the C structures in linux/vhost_types.h and QEMU's hw/virtio/vhost-user.c.
    assert sizes == {
        "Empty": 0,
        "U64": 8,
        "VringState": 8,
        "VringAddr": 40,
        "VringFd": 8,
        "MemoryRegion": 32,
        "SingleMemoryRegion": 40,
        "IotlbMessage": 32,
        "Log": 16,
        "Inflight": 24,
    }
    assert len(Header(1, 1, 0).encode()) == messages.HEADER_SIZE == 12


def test_numbers_of_the_specification() -> None:
    assert [request.value for request in FrontendRequest] == list(range(1, 46))
    assert [request.value for request in BackendRequest] == list(range(1, 11))
    assert [feature.value for feature in ProtocolFeature] == [1 << bit for bit in range(24)]
    assert FrontendRequest.SET_VRING_ENABLE == 18
    assert FrontendRequest.SET_BACKEND_REQ_FD == 21
    assert FrontendRequest.IOTLB_MSG == 22
    assert FrontendRequest.GET_CONFIG == 24
    assert FrontendRequest.RESET_DEVICE == 34
    assert FrontendRequest.GET_MAX_MEM_SLOTS == 36
    assert FrontendRequest.ADD_MEM_REG == 37
    assert FrontendRequest.REM_MEM_REG == 38
    assert FrontendRequest.GET_STATUS == 40
    assert FrontendRequest.CHECK_DEVICE_STATE == 43
    assert BackendRequest.IOTLB_MSG == 1
    assert BackendRequest.SHARED_OBJECT_LOOKUP == 8
    assert ProtocolFeature.REPLY_ACK == 1 << 3
    assert ProtocolFeature.BACKEND_REQ == 1 << 5
    assert ProtocolFeature.CONFIG == 1 << 9
    assert ProtocolFeature.RESET_DEVICE == 1 << 13
    assert ProtocolFeature.CONFIGURE_MEM_SLOTS == 1 << 15
    assert ProtocolFeature.STATUS == 1 << 16
    assert [kind.value for kind in IotlbType] == [1, 2, 3, 4, 5, 6]
    assert (HeaderFlag.REPLY, HeaderFlag.NEED_REPLY) == (4, 8)
    assert ConfigFlag.LIVE_MIGRATION == 1
    assert messages.VHOST_USER_F_PROTOCOL_FEATURES == 30
    assert messages.VIRTIO_F_ACCESS_PLATFORM == 33
    assert messages.VHOST_F_LOG_ALL == 26


@given(PAYLOADS)
def test_every_payload_survives_the_wire(value: Any) -> None:
    assert type(value).decode(value.encode()) == value


@given(st.sampled_from(TYPES), st.binary(max_size=320) | st.sampled_from([8, 16, 24, 32, 40]))
def test_any_bytes_decode_strictly_or_are_refused(kind: Any, data: bytes | int) -> None:
    payload = bytes(data) if isinstance(data, int) else data
    try:
        value = kind.decode(payload)
    except ProtocolError:
        return
    if kind is MemoryTable:
        assert len(value.encode()) <= len(payload)
    else:
        assert len(value.encode()) == len(payload)


@pytest.mark.parametrize(
    "value",
    [
        U64(2**64),
        U64(-1),
        VringState(2**32, 0),
        VringAddr(0, 0, 0, 0, 2**64, 0),
        VringFd(256, True),
        VringFd(-1, True),
        MemoryRegion(0, 0, 0, 2**64),
        MemoryTable((REGION,) * 9),
        Config(2**32, b""),
        Config(0, bytes(MAX_PAYLOAD_SIZE - 11)),
        IotlbMessage(0, 0, 0, 256, 1),
        Inflight(0, 0, 2**16, 0),
    ],
    ids=repr,
)
def test_a_value_that_does_not_fit_is_the_callers_mistake(value: Any) -> None:
    with pytest.raises(ValueError, match=r"fit|at most|too large"):
        value.encode()


def test_largest_config_access_fits() -> None:
    config = Config(0, bytes(MAX_PAYLOAD_SIZE - 12))
    assert len(encode_message(FrontendRequest.GET_CONFIG, config)) == 12 + MAX_PAYLOAD_SIZE


def test_vring_fd_with_unknown_bits_is_refused() -> None:
    for value in (0x200, 0x1_0000, 1 << 63):
        with pytest.raises(ProtocolError, match="above the no-fd flag"):
            VringFd.decode(struct.pack("=Q", value))


@pytest.mark.parametrize("count", [2, 3, 9, 2**32 - 1])
def test_memory_table_count_must_match(count: int) -> None:
    data = bytearray(MemoryTable((REGION,)).encode())
    data[:4] = struct.pack("=I", count)
    with pytest.raises(ProtocolError, match="memory table"):
        MemoryTable.decode(data)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("extra", [b"", b"\xff", b"\xff" * 32, b"\xff" * (MAX_PAYLOAD_SIZE - 72)])
def test_memory_table_with_room_for_more_regions(count: int, extra: bytes) -> None:
    """What follows the regions that are counted is not looked at (User-mode Linux sends room)."""
    table = MemoryTable((REGION,) * count)
    assert MemoryTable.decode(table.encode() + extra) == table


def test_padding_is_ignored() -> None:
    single = b"\xff" * 8 + REGION.encode()
    assert SingleMemoryRegion.decode(single) == SingleMemoryRegion(REGION)
    # As QEMU 7.2 sent it: the padding holds whatever was on its stack.
    sent = "00f0ffff00000000 0010000000000000 00d00d36997f0000 03 02 87b041785264"
    update = IotlbMessage.update(0xFFFFF000, 0x1000, 0x7F99360DD000, 3)
    assert IotlbMessage.decode(bytes.fromhex(sent)) == update
    message = IotlbMessage.miss(0x1000, 0x1000, 1)
    assert IotlbMessage.decode(message.encode()[:26] + b"\xff" * 6) == message


def test_header() -> None:
    header = Header(FrontendRequest.GET_FEATURES, 0xD, 8)
    assert header.encode() == bytes.fromhex("01000000 0d000000 08000000")
    assert Header.decode(header.encode()) == header
    assert header.is_reply
    assert header.need_reply
    plain = Header(1, 1, 0)
    assert not plain.is_reply
    assert not plain.need_reply


@pytest.mark.parametrize("version", [0, 2, 3])
def test_header_of_another_version_is_refused(version: int) -> None:
    with pytest.raises(ProtocolError, match="version"):
        Header.decode(Header(1, version, 0).encode())


@pytest.mark.parametrize("size", [MAX_PAYLOAD_SIZE + 1, 2**32 - 1])
def test_header_of_a_huge_payload_is_refused(size: int) -> None:
    with pytest.raises(ProtocolError, match=f"payload of {size} bytes"):
        Header.decode(Header(FrontendRequest.GET_CONFIG, 1, size).encode())


def test_header_of_another_length_is_refused() -> None:
    for size in (0, 11, 13):
        with pytest.raises(ProtocolError):
            Header.decode(bytes(size))


def test_unknown_flag_bits_and_requests_are_kept() -> None:
    header = Header(999, 0xFFFF_FFF1, 0)
    assert Header.decode(header.encode()) == header
    assert request_name(999) == "request 999"
    assert request_name(22) == "IOTLB_MSG"
    assert request_name(3, BackendRequest) == "VRING_HOST_NOTIFIER_MSG"


def test_whole_messages() -> None:
    assert encode_message(FrontendRequest.SET_OWNER) == bytes.fromhex("03000000 01000000 00000000")
    assert encode_message(FrontendRequest.SET_FEATURES, U64(1), need_reply=True) == bytes.fromhex(
        "02000000 09000000 08000000 0100000000000000"
    )
    assert encode_message(99, b"ab", reply=True) == bytes.fromhex("63000000 05000000 02000000 6162")
    with pytest.raises(ValueError, match="limit"):
        encode_message(1, bytes(MAX_PAYLOAD_SIZE + 1))
    with pytest.raises(ValueError, match="fit"):
        encode_message(2**32)


def test_acknowledgements_go_both_ways() -> None:
    data = encode_ack(BackendRequest.IOTLB_MSG, 5)
    assert data == bytes.fromhex("01000000 05000000 08000000 0500000000000000")
    header, payload = Header.decode(data[:12]), data[12:]
    assert decode_ack(header, payload, BackendRequest.IOTLB_MSG) == 5
    with pytest.raises(ProtocolError, match="a reply to SET_FEATURES came, but GET_FEATURES was"):
        decode_ack(Header(FrontendRequest.SET_FEATURES, 5, 8), payload, FrontendRequest(1))
    with pytest.raises(ProtocolError, match="a reply to request 21 came, but IOTLB_MSG was sent"):
        decode_ack(Header(21, 5, 8), payload, BackendRequest.IOTLB_MSG)
    with pytest.raises(ProtocolError, match="8"):
        decode_ack(header, payload[:4], BackendRequest.IOTLB_MSG)
    with pytest.raises(ProtocolError, match="expected the reply to IOTLB_MSG, got IOTLB_MSG"):
        decode_ack(Header(1, 1, 8), payload, BackendRequest.IOTLB_MSG)
    with pytest.raises(ValueError, match="fit"):
        encode_ack(1, 2**64)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (IotlbMessage.miss(0x1000, 0x2000, 1), 1),
        (IotlbMessage.update(0x1000, 0x2000, 0x7000, 3), 2),
        (IotlbMessage.invalidate(0x1000, 0x2000), 3),
        (IotlbMessage.access_fail(0x1000, 0x2000, 2), 4),
    ],
)
def test_iotlb_messages_in_one_step(message: IotlbMessage, kind: int) -> None:
    assert message.type == kind
    for request in (FrontendRequest.IOTLB_MSG, BackendRequest.IOTLB_MSG):
        for need_reply in (False, True):
            slow = encode_message(request, message, need_reply=need_reply)
            assert encode_iotlb(request, message, need_reply=need_reply) == slow
    assert IotlbMessage.decode(message.encode()) == message
