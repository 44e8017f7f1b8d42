"""The vhost-user wire format: bytes to values and back, nothing else.

A message is a 12-byte header and a payload, in the machine's byte order. Every payload the
protocol defines is a frozen value here with `encode()` and `decode()`, so that a back-end and a
front-end can be written on the same module; its docstring names the requests and replies it
belongs to. Requests not named anywhere have no payload.

Decoding trusts no peer: a payload of any other size than the layout's, or whose inner counts
disagree with it, raises `ProtocolError`. Only a memory table may be longer than its count says.
Encoding checks our own caller: a value that does not fit its field raises `ValueError`. What a
value *means* (ring exists, region overlaps) is not judged here but in `guestio.vhost_user.session`.

Payloads of protocol features that nothing here negotiates (crypto sessions, host notifiers, shared
objects, shared-memory maps) are left as bytes.

Source: QEMU docs/interop/vhost-user.rst ("Message Specification", "Front-end message types",
"Back-end message types"); structure sizes as in hw/virtio/vhost-user.c and linux/vhost_types.h.
Everything here is a pure value or function, so it is safe to use from any thread.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import ClassVar, Final, NamedTuple, Protocol, Self, TypeAlias

from guestio.errors import ProtocolError

Readable: TypeAlias = bytes | bytearray | memoryview
"""What `decode()` accepts."""

HEADER_SIZE: Final = 12
"""Bytes of a message header."""

MAX_PAYLOAD_SIZE: Final = 4096
"""Largest payload accepted or built, bytes.

The largest message of the specification (a crypto session) needs less than half of it; the largest
one served here is a configuration access. The bound keeps a lying peer from making us allocate.
"""

MAX_FDS: Final = 8
"""Most file descriptors one message may carry (VHOST_USER_BACKEND_MAX_FDS in QEMU)."""

MAX_TABLE_REGIONS: Final = 8
"""Most regions a SET_MEM_TABLE carries (VHOST_MEMORY_BASELINE_NREGIONS in QEMU)."""

VERSION: Final = 1
"""Protocol version, the low two bits of the header's flags."""

VERSION_MASK: Final = 0x3

VHOST_USER_F_PROTOCOL_FEATURES: Final = 30
"""Bit number of the virtio feature that says that protocol features can be negotiated."""

VIRTIO_F_ACCESS_PLATFORM: Final = 33
"""Bit number of the virtio feature that puts an IOMMU in front of the device.

Called VIRTIO_F_IOMMU_PLATFORM by the vhost-user specification (virtio 1.3 section 6).
"""

VHOST_F_LOG_ALL: Final = 26
"""Bit number of the vhost feature that asks for dirty logging (linux/vhost_types.h)."""

VHOST_VRING_F_LOG: Final = 0
"""Bit number in `VringAddr.flags` that makes `VringAddr.log` valid (linux/vhost_types.h)."""

LOG_PAGE: Final = 4096
"""Bytes of guest memory to a bit of the dirty log (VHOST_LOG_PAGE, "Migration")."""

STATE_NO_FD: Final = 1 << 8
"""In the reply to SET_DEVICE_STATE_FD: no descriptor comes with it, the front-end's is used."""

_REPLY: Final = 1 << 2
_NEED_REPLY: Final = 1 << 3
_NO_FD: Final = 1 << 8
_INDEX_MASK: Final = 0xFF


class FrontendRequest(IntEnum):
    """Requests a front-end sends (specification section "Front-end message types")."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


class BackendRequest(IntEnum):
    """Requests a back-end sends on its own channel ("Back-end message types").

    Older QEMU and DPDK spell the same codes VHOST_USER_SLAVE_*.
    """

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class HeaderFlag(IntFlag):
    """Bits of the header's flags above the version (section "Header")."""

    REPLY = _REPLY
    NEED_REPLY = _NEED_REPLY


class ProtocolFeature(IntFlag):
    """Protocol feature masks (section "Protocol features"; the bit number is the exponent)."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    NET_MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM = 1 << 22
    GET_VRING_BASE_SKIP_DRAIN = 1 << 23


class IotlbType(IntEnum):
    """`IotlbMessage.type` (VHOST_IOTLB_* of linux/vhost_types.h)."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4
    BATCH_BEGIN = 5
    BATCH_END = 6


class ConfigFlag(IntFlag):
    """`Config.flags` ("Virtio device config space")."""

    WRITABLE = 0
    LIVE_MIGRATION = 1


class StateDirection(IntEnum):
    """`StateTransfer.direction` ("Device state transfer parameters")."""

    SAVE = 0
    LOAD = 1


class StatePhase(IntEnum):
    """`StateTransfer.phase` ("Device state transfer parameters")."""

    STOPPED = 0


class Header(NamedTuple):
    """The 12 bytes before every payload.

    Attributes:
        request: Code of the request; a `FrontendRequest` or `BackendRequest` value if known.
        flags: Version and `HeaderFlag` bits. Bits the specification does not name are kept and
            ignored.
        size: Payload bytes that follow, at most `MAX_PAYLOAD_SIZE`.
    """

    request: int
    flags: int
    size: int

    @property
    def name(self) -> str:
        """Name of the request."""
        return request_name(self.request)

    @property
    def is_reply(self) -> bool:
        """Whether this answers a request."""
        return bool(self.flags & _REPLY)

    @property
    def need_reply(self) -> bool:
        """Whether the sender requests an acknowledgement (REPLY_ACK)."""
        return bool(self.flags & _NEED_REPLY)

    def encode(self) -> bytes:
        """Return the header's bytes.

        Raises:
            ValueError: A field does not fit 32 bits.
        """
        return _pack(_HEADER, *self)

    @classmethod
    def decode(cls, data: Readable) -> Self:
        """Read a header from exactly `HEADER_SIZE` bytes.

        Raises:
            ProtocolError: Wrong number of bytes, another protocol version, or a payload size above
                `MAX_PAYLOAD_SIZE`.
        """
        header = cls._make(_unpack(_HEADER, data, "header"))
        if header.flags & VERSION_MASK != VERSION:
            raise ProtocolError(
                f"vhost-user header of {request_name(header.request)} has version "
                f"{header.flags & VERSION_MASK}, only version {VERSION} is spoken here"
            )
        if header.size > MAX_PAYLOAD_SIZE:
            raise ProtocolError(
                f"{request_name(header.request)} announces a payload of {header.size} bytes, "
                f"the limit is {MAX_PAYLOAD_SIZE}"
            )
        return header


_HEADER: Final = struct.Struct("=III")
_U64: Final = struct.Struct("=Q")
_REGION: Final = struct.Struct("=QQQQ")
_TABLE_HEAD: Final = struct.Struct("=I4x")
_SINGLE_REGION: Final = struct.Struct("=8xQQQQ")
# The C structures end with padding up to 8-byte alignment, and QEMU sends sizeof() of them.
_IOTLB: Final = struct.Struct("=QQQBB6x")
_IOTLB_MESSAGE: Final = struct.Struct("=IIIQQQBB6x")
_ACK_MESSAGE: Final = struct.Struct("=IIIQ")
_CONFIG_HEAD: Final = struct.Struct("=III")


def _pack(layout: struct.Struct, *values: int) -> bytes:
    try:
        return layout.pack(*values)
    except struct.error as error:
        raise ValueError(f"value does not fit its wire field: {error} in {values}") from None


def _unpack(layout: struct.Struct, payload: Readable, what: str) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise ProtocolError(f"{what} has {len(payload)} bytes, its layout has {layout.size}")
    return layout.unpack(payload)


class Payload(Protocol):
    """What every payload value offers."""

    def encode(self) -> bytes:
        """Return the payload's bytes; raises `ValueError` if a field is out of range."""
        ...

    @classmethod
    def decode(cls, payload: Readable) -> Self:
        """Read the value from exactly its bytes; raises `ProtocolError` otherwise."""
        ...


class _Fixed:
    """A payload whose fields are packed in order by one layout."""

    __slots__: ClassVar[tuple[str, ...]] = ()
    LAYOUT: ClassVar[struct.Struct]

    def encode(self) -> bytes:
        """Return `LAYOUT.size` bytes; raises `ValueError` if a field is out of range."""
        return _pack(self.LAYOUT, *(getattr(self, name) for name in self.__slots__))

    @classmethod
    def decode(cls, payload: Readable) -> Self:
        """Read exactly `LAYOUT.size` bytes; raises `ProtocolError` otherwise."""
        return cls(*_unpack(cls.LAYOUT, payload, cls.__name__))


@dataclass(frozen=True, slots=True)
class Empty(_Fixed):
    """A payload of no bytes."""

    LAYOUT: ClassVar = struct.Struct("")


@dataclass(frozen=True, slots=True)
class U64(_Fixed):
    """A single 64-bit integer ("A single 64-bit integer").

    Features, protocol features, queue and slot counts, status, MTU, and every acknowledgement.

    Attributes:
        value: 0 to 2**64 - 1.
    """

    value: int

    LAYOUT: ClassVar = struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class VringState(_Fixed):
    """A ring's index and a number ("A vring state description").

    SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE and its reply, SET_VRING_ENABLE,
    SET_VRING_ENDIAN, VRING_KICK, VRING_CALL, VRING_ERR.

    Attributes:
        index: Ring, 32 bits.
        num: What the request says: entries, next available index, enable flag.
    """

    index: int
    num: int

    LAYOUT: ClassVar = struct.Struct("=II")


@dataclass(frozen=True, slots=True)
class VringAddr(_Fixed):
    """Where a ring's three parts are ("A vring address description").

    SET_VRING_ADDR. The layout is that of struct vhost_vring_addr: 40 bytes, used before available.
    With VIRTIO_F_ACCESS_PLATFORM negotiated the addresses are IOVAs, else the front-end's own.

    Attributes:
        index: Ring, 32 bits.
        flags: Bits such as `VHOST_VRING_F_LOG`, 32 bits.
        desc: Address of the descriptor table.
        used: Address of the used ring.
        avail: Address of the available ring.
        log: Guest address for logging writes to the used ring, valid with `VHOST_VRING_F_LOG`.
    """

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int = 0

    LAYOUT: ClassVar = struct.Struct("=IIQQQQ")

    @property
    def parts(self) -> tuple[int, int, int]:
        """Where the descriptor table, the available and the used ring are."""
        return self.desc, self.avail, self.used


@dataclass(frozen=True, slots=True)
class VringFd:
    """Which ring a kick, call or error fd belongs to (SET_VRING_KICK, _CALL, _ERR).

    Attributes:
        index: Ring, 8 bits.
        has_fd: Whether exactly one fd comes with the message; the wire carries the inverse in
            bit 8.
    """

    index: int
    has_fd: bool

    def encode(self) -> bytes:
        """Return 8 bytes; raises `ValueError` if the index is above 255."""
        if not 0 <= self.index <= _INDEX_MASK:
            raise ValueError(f"ring index {self.index} does not fit 8 bits")
        return _U64.pack(self.index | (0 if self.has_fd else _NO_FD))

    @classmethod
    def decode(cls, payload: Readable) -> Self:
        """Read exactly 8 bytes.

        Raises:
            ProtocolError: Wrong size, or bits above 8 set: no meaning is defined for them, and a
                ring index above 255 would look just like that.
        """
        (value,) = _unpack(_U64, payload, "vring fd payload")
        if value > _INDEX_MASK | _NO_FD:
            raise ProtocolError(f"vring fd payload {value:#x} uses bits above the no-fd flag")
        return cls(value & _INDEX_MASK, not value & _NO_FD)


@dataclass(frozen=True, slots=True)
class MemoryRegion(_Fixed):
    """A stretch of guest memory and where it is in its fd ("Memory region description").

    Attributes:
        guest_addr: First guest physical address.
        size: bytes.
        user_addr: The front-end's own address of the first byte.
        mmap_offset: Offset of the first byte in the fd, bytes.
    """

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int

    LAYOUT: ClassVar = struct.Struct("=QQQQ")


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """All regions at once, for SET_MEM_TABLE ("Multiple Memory regions description").

    Attributes:
        regions: At most `MAX_TABLE_REGIONS`, in the order of the fds that come with them.
    """

    regions: tuple[MemoryRegion, ...]

    def encode(self) -> bytes:
        """Return 8 + 32 bytes per region, as QEMU sends it.

        Raises:
            ValueError: Too many regions, or a field out of range.
        """
        if len(self.regions) > MAX_TABLE_REGIONS:
            raise ValueError(
                f"a memory table holds at most {MAX_TABLE_REGIONS} regions, not "
                f"{len(self.regions)}; use ADD_MEM_REG for more"
            )
        head = _TABLE_HEAD.pack(len(self.regions))
        return head + b"".join(region.encode() for region in self.regions)

    @classmethod
    def decode(cls, payload: Readable) -> Self:
        """Read as many regions as the table counts; raises `ProtocolError` if some are missing.

        What follows them is not looked at: User-mode Linux always sends room for two regions.
        """
        if len(payload) < _TABLE_HEAD.size:
            raise ProtocolError(f"memory table has {len(payload)} bytes, too short for its count")
        (count,) = _TABLE_HEAD.unpack_from(payload)
        if count > MAX_TABLE_REGIONS:
            raise ProtocolError(f"memory table of {count} regions, at most {MAX_TABLE_REGIONS}")
        body = memoryview(payload)[_TABLE_HEAD.size :]
        size = count * _REGION.size
        if len(body) < size:
            raise ProtocolError(
                f"memory table of {count} regions has {len(body)} bytes of them, not {size}"
            )
        return cls(tuple(MemoryRegion(*fields) for fields in _REGION.iter_unpack(body[:size])))


@dataclass(frozen=True, slots=True)
class SingleMemoryRegion:
    """One region of ADD_MEM_REG or REM_MEM_REG ("Single memory region description").

    Attributes:
        region: The region; 8 bytes of padding precede it on the wire.
    """

    region: MemoryRegion

    def encode(self) -> bytes:
        """Return 40 bytes; raises `ValueError` if a field is out of range."""
        return bytes(8) + self.region.encode()

    @classmethod
    def decode(cls, payload: Readable) -> Self:
        """Read exactly 40 bytes, ignoring the padding; raises `ProtocolError` otherwise."""
        return cls(MemoryRegion(*_unpack(_SINGLE_REGION, payload, "single memory region")))


@dataclass(frozen=True, slots=True)
class Config:
    """An access to the device's configuration space ("Virtio device config space").

    GET_CONFIG and its reply, SET_CONFIG.

    Attributes:
        offset: First byte accessed, 32 bits.
        payload: The bytes; in a GET_CONFIG request only their number matters.
        flags: `ConfigFlag` bits, 32 bits.
    """

    offset: int
    payload: bytes
    flags: int = ConfigFlag.WRITABLE

    @property
    def size(self) -> int:
        """Bytes accessed."""
        return len(self.payload)

    def encode(self) -> bytes:
        """Return 12 bytes and the contents.

        Raises:
            ValueError: A field out of range, or more than `MAX_PAYLOAD_SIZE` bytes in all.
        """
        if self.size > MAX_PAYLOAD_SIZE - _CONFIG_HEAD.size:
            raise ValueError(f"configuration access of {self.size} bytes is too large to send")
        return _pack(_CONFIG_HEAD, self.offset, self.size, self.flags) + self.payload

    @classmethod
    def decode(cls, payload: Readable) -> Self:
        """Read an access that fills the payload exactly; raises `ProtocolError` otherwise."""
        if len(payload) < _CONFIG_HEAD.size:
            raise ProtocolError(f"config payload has {len(payload)} bytes, too short for its head")
        offset, size, flags = _CONFIG_HEAD.unpack_from(payload)
        contents = bytes(memoryview(payload)[_CONFIG_HEAD.size :])
        if len(contents) != size:
            raise ProtocolError(
                f"config access says {size} bytes and carries {len(contents)}; they must agree"
            )
        return cls(offset, contents, flags)


class IotlbMessage(NamedTuple):
    """A change of I/O translations, or a miss (struct vhost_iotlb_msg).

    IOTLB_MSG in both directions. A tuple, because guest I/O behind an IOMMU makes hundreds of
    thousands of them and a tuple is several times cheaper to make than a frozen dataclass.

    Attributes:
        iova: First I/O virtual address.
        size: bytes.
        uaddr: The front-end's user address that `iova` maps to; only in an UPDATE.
        perm: 0 none, 1 read, 2 write, 3 both.
        type: An `IotlbType` value, or any other 8-bit number if the peer sent one.
    """

    iova: int
    size: int
    uaddr: int
    perm: int
    type: int

    def encode(self) -> bytes:
        """Return 32 bytes (26 and tail padding); raises `ValueError` if a field does not fit."""
        return _pack(_IOTLB, *self)

    @classmethod
    def decode(cls, payload: Readable) -> Self:
        """Read exactly 32 bytes, ignoring the padding; raises `ProtocolError` otherwise."""
        try:
            return cls._make(_IOTLB.unpack(payload))
        except struct.error:
            raise ProtocolError(
                f"IOTLB message has {len(payload)} bytes, its layout has {_IOTLB.size}"
            ) from None

    @classmethod
    def miss(cls, iova: int, size: int, perm: int) -> Self:
        """Request the translation of a range; `perm` is what the access needs."""
        return cls(iova, size, 0, perm, IotlbType.MISS)

    @classmethod
    def update(cls, iova: int, size: int, uaddr: int, perm: int) -> Self:
        """Tell a translation."""
        return cls(iova, size, uaddr, perm, IotlbType.UPDATE)

    @classmethod
    def invalidate(cls, iova: int, size: int) -> Self:
        """Take translations of a range away."""
        return cls(iova, size, 0, 0, IotlbType.INVALIDATE)

    @classmethod
    def access_fail(cls, iova: int, size: int, perm: int) -> Self:
        """Report an access that the translation forbids."""
        return cls(iova, size, 0, perm, IotlbType.ACCESS_FAIL)


@dataclass(frozen=True, slots=True)
class Log(_Fixed):
    """Where the dirty log is in its fd ("Log description"), for SET_LOG_BASE.

    Attributes:
        size: Bytes, one bit for each `LOG_PAGE` bytes of guest memory from address 0 on.
        offset: Of the log in the fd, bytes.
    """

    size: int
    offset: int

    LAYOUT: ClassVar = struct.Struct("=QQ")


@dataclass(frozen=True, slots=True)
class StateTransfer(_Fixed):
    """Which way a device's state is to go ("Device state transfer parameters").

    SET_DEVICE_STATE_FD.

    Attributes:
        direction: A `StateDirection`, or any other number if the peer sent one.
        phase: A `StatePhase`, or any other number.
    """

    direction: int
    phase: int

    LAYOUT: ClassVar = struct.Struct("=II")


@dataclass(frozen=True, slots=True)
class Inflight(_Fixed):
    """The shared buffer that tracks requests in flight ("Inflight description").

    GET_INFLIGHT_FD and its reply, SET_INFLIGHT_FD.

    Attributes:
        mmap_size: bytes.
        mmap_offset: Of the buffer in its fd, bytes.
        num_queues: 16 bits.
        queue_size: Entries per ring, 16 bits.
    """

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    LAYOUT: ClassVar = struct.Struct("=QQHH4x")


def request_name(request: int, requests: type[IntEnum] = FrontendRequest) -> str:
    """Return a request's name for people, whether or not the code is known."""
    try:
        return requests(request).name
    except ValueError:
        return f"request {request}"


def encode_message(
    request: int,
    payload: Payload | bytes = b"",
    *,
    reply: bool = False,
    need_reply: bool = False,
) -> bytes:
    """Build a whole message, header and payload.

    Args:
        request: Code of the request; a reply carries its request's code.
        payload: A payload value, or its bytes.
        reply: Set the reply flag.
        need_reply: Set the NEED_REPLY flag; only with REPLY_ACK negotiated.

    Raises:
        ValueError: A field out of range, or a payload above `MAX_PAYLOAD_SIZE` bytes.
    """
    body = payload if isinstance(payload, bytes) else payload.encode()
    if len(body) > MAX_PAYLOAD_SIZE:
        raise ValueError(f"payload of {len(body)} bytes, the limit is {MAX_PAYLOAD_SIZE}")
    flags = VERSION
    if reply:
        flags |= _REPLY
    if need_reply:
        flags |= _NEED_REPLY
    return _pack(_HEADER, request, flags, len(body)) + body


def encode_ack(request: int, value: int) -> bytes:
    """Build the reply that carries one number: an acknowledgement (0 is success) or an answer.

    Raises:
        ValueError: `value` is not a 64-bit number.
    """
    return _pack(_ACK_MESSAGE, request, VERSION | _REPLY, _U64.size, value)


def decode_ack(header: Header, payload: Readable, request: int) -> int:
    """Read the `U64` reply to a request; 0 means success for an acknowledgement.

    Errors take the request's name from its enumeration, by default from `FrontendRequest`.

    Raises:
        ProtocolError: Not a reply, a reply to another request, or not 8 bytes.
    """
    if not header.is_reply or header.request != request:
        requests = type(request) if isinstance(request, IntEnum) else FrontendRequest
        asked, came = request_name(request, requests), request_name(header.request, requests)
        raise ProtocolError(
            f"a reply to {came} came, but {asked} was sent"
            if header.is_reply
            else f"expected the reply to {asked}, got {came} without the reply flag"
        )
    return U64.decode(payload).value


def encode_iotlb(request: int, message: IotlbMessage, *, need_reply: bool) -> bytes:
    """Build a whole IOTLB message, in one step because these come in great numbers.

    Args:
        request: `FrontendRequest.IOTLB_MSG` or `BackendRequest.IOTLB_MSG`, by direction.
        message: What to say.
        need_reply: Request an acknowledgement; only with REPLY_ACK negotiated.

    Raises:
        ValueError: A field out of range.
    """
    flags = VERSION | _NEED_REPLY if need_reply else VERSION
    return _pack(_IOTLB_MESSAGE, request, flags, _IOTLB.size, *message)
