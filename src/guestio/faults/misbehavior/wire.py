"""What a back-end does wrong on the wire, and what it says of its features, status and config."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from guestio.errors import ProtocolError
from guestio.faults.misbehavior.force import Faults
from guestio.faults.misbehavior.rules import Level
from guestio.memory.backing import close_fd
from guestio.vhost_user.channel import Channel, Message, PeerGoneError
from guestio.vhost_user.messages import (
    HEADER_SIZE,
    FrontendRequest,
    IotlbMessage,
    IotlbType,
    request_name,
)

if TYPE_CHECKING:
    from guestio.faults.misbehavior.iommu import Sandbox
    from guestio.virtio.host import DeviceHost

_U64: Final = struct.Struct("<Q")
_CONFIG: Final = struct.Struct("<III")
_F = FrontendRequest


def misbehaving_channel(
    faults: Faults, sandbox: Sandbox, host: DeviceHost
) -> Callable[[type], type]:
    """What derives from a class of connections one that misbehaves; of vhost-user's alone."""

    def derived(base: type) -> type:
        if not issubclass(base, Channel):
            return base
        faults.expect(Level.WIRE, [each.name for each in _F], "vhost-user")

        class Derived(MisbehavingChannel):
            _faults, _sandbox, _host = faults, sandbox, host

        return Derived

    return derived


class MisbehavingChannel(Channel):
    """A connection to a front-end that obeys rules beside the protocol.

    All messages are read in Python, also those that the core takes otherwise.
    """

    _faults: Faults
    _sandbox: Sandbox
    _host: DeviceHost

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._request = ""
        self._code = 0
        self._invented = 0
        self._slow_until = 0.0

    @property
    def at_rest(self) -> bool:
        """Never: what is at rest the core may read."""
        return False

    def recv(self, timeout: float | None = 0) -> Message | None:
        """See :class:`Channel`; raises `PeerGoneError` where a rule hangs up."""
        message = super().recv(timeout)
        if message is None:
            return None
        self._code = message.request
        self._request = request_name(self._code)
        if self._faults.first(("hang-up",), self._request, op=self._request):
            message.close()
            raise PeerGoneError(f"a rule hangs up at {self._request}")
        if self._code == _F.SET_FEATURES and len(message.payload) == _U64.size:
            (features,) = _U64.unpack(message.payload)
            # What was offered and is not there is not used, either.
            message.payload = _U64.pack(features & ~self._invented)
        elif self._code == _F.IOTLB_MSG:
            with contextlib.suppress(ProtocolError):
                self._note_unmap(IotlbMessage.decode(message.payload))
        return message

    def _note_unmap(self, message: IotlbMessage) -> None:
        if message.type == IotlbType.INVALIDATE and message.size:
            self._sandbox.unmap(self._faults, self._host, message.iova, message.size)

    def post(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send an answer, if the rules let it; see :class:`Channel`."""
        data, invented = told(self._faults, self._code, data)
        self._invented |= invented
        answer = struck_answer(self._faults, self._request, data, fds=bool(fds))
        if answer is None:
            return True
        extra = -1
        if not answer.fds:
            fds = ()
        elif not fds:
            extra = open_extra()
            fds = (extra,)
        try:
            if answer.delay:
                self._slow_until = time.monotonic() + answer.delay
            if self._slow_until > time.monotonic():
                # As if its reader had no room for it yet.
                kept = tuple(os.dup(fd) for fd in fds)
                self._unsent, self._unsent_fds = self._unsent + answer.data, kept
                self._owned_fds = kept
                self._stuck_since = self._slow_until
                return False
            return super().post(answer.data, fds)
        finally:
            if extra >= 0:
                close_fd(extra)
            self._sandbox.access(self._host)

    def flush(self) -> bool:
        """Send what waits; see :class:`Channel`."""
        if time.monotonic() < self._slow_until:
            return False
        sent = super().flush()
        if sent:
            self._close_owned()
        return sent

    def close(self) -> None:
        """See :class:`Channel`."""
        super().close()
        self._close_owned()

    _owned_fds: tuple[int, ...] = ()

    def _close_owned(self) -> None:
        owned, self._owned_fds = self._owned_fds, ()
        for fd in owned:
            close_fd(fd)


class Answer(NamedTuple):
    """An answer as rules have made it.

    Attributes:
        data: The message.
        fds: Whether descriptors go with it.
        delay: Seconds until it is to be sent.
    """

    data: bytes
    fds: bool
    delay: float


def struck_answer(faults: Faults, name: str, data: bytes, *, fds: bool) -> Answer | None:
    """What rules of the wire make of an answer; None if it is not to be sent.

    Args:
        faults: The rules.
        name: Of the message that it answers.
        data: The answer.
        fds: Whether it has descriptors.
    """
    delay = 0.0
    rules = ("no-reply", "bad-reply", "wrong-fds", "slow")
    for fault in faults.strike(rules, f"the answer to {name}", op=name):
        match fault.rule.what.name:
            case "no-reply":
                return None
            case "bad-reply" if len(data) > HEADER_SIZE:
                at = fault.random.randrange(8 * (len(data) - HEADER_SIZE))
                data = _with_bit(data, HEADER_SIZE + at // 8, at % 8)
            case "wrong-fds":
                fds = not fds
            case "slow":
                delay = fault.seconds
    return Answer(data, fds, delay)


def open_extra() -> int:
    """A descriptor for an answer that should have none; the caller's to close."""
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def told(faults: Faults, request: int, data: bytes) -> tuple[bytes, int]:
    """An answer with lies about features, status and configuration space.

    Args:
        faults: The rules.
        request: What it answers.
        data: The answer.

    Returns:
        The answer, and the feature bits that were invented.
    """
    size, invented = len(data) - HEADER_SIZE, 0
    if request == _F.GET_FEATURES and size == _U64.size:
        (features,) = _U64.unpack_from(data, HEADER_SIZE)
        for fault in faults.strike(("feature-lie",), "the features that are offered"):
            bit = 1 << fault.value
            invented |= bit & ~features
            features ^= bit
        return data[:HEADER_SIZE] + _U64.pack(features), invented
    if request == _F.GET_STATUS and size == _U64.size:
        (status,) = _U64.unpack_from(data, HEADER_SIZE)
        for fault in faults.strike(("status-lie",), f"the device status {status:#x}"):
            status ^= fault.value
        return data[:HEADER_SIZE] + _U64.pack(status), 0
    begin = HEADER_SIZE + _CONFIG.size
    if request == _F.GET_CONFIG and len(data) > begin:
        offset = _CONFIG.unpack_from(data, HEADER_SIZE)[0]
        return data[:begin] + flipped(faults, offset, data[begin:]), 0
    return data, 0


def flipped(faults: Faults, offset: int, data: bytes) -> bytes:
    """Bytes that were read of the configuration space, with the bits that rules flip."""
    last = offset + len(data) - 1
    what = f"a read of the configuration space, {offset:#x} to {last:#x}"
    for fault in faults.strike(("config-flip",), what, offset=(offset, last)):
        span = fault.rule.spans.get("offset")
        first = max(offset, span.first) if span else offset
        end = int(min(last, span.last)) if span else last
        data = _with_bit(data, fault.random.randint(first, end) - offset, fault.random.randrange(8))
    return data


def _with_bit(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
