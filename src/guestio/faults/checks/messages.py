"""Messages: headers, replies, acknowledgements, and messages that are no messages."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from guestio.faults.catalogue import hostile, register, user
from guestio.faults.link import Link
from guestio.faults.outcomes import AbsentError, HungUpError, SilentError
from guestio.faults.report import Severity
from guestio.faults.ring import Queue
from guestio.faults.trial import PROTOCOL_BIT, QUIET, VERSION_1, Trial
from guestio.vhost_user.messages import (
    U64,
    FrontendRequest,
    HeaderFlag,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    VringAddr,
    VringFd,
    VringState,
    encode_message,
)

_F = FrontendRequest
_HEADER: Final = struct.Struct("=III")
_REPLY_ACK: Final = ProtocolFeature.REPLY_ACK
_UNKNOWN: Final = 0x7E57
"""Code of a request that does not exist."""


@register(
    "message.reply-header",
    user("Header"),
    "A reply carries its request's code, the reply flag and version 1.",
)
def _reply_header(t: Trial) -> None:
    t.link.ask(_F.GET_FEATURES)


@register("message.features-size", user("GET_FEATURES"), "GET_FEATURES is answered with 64 bits.")
def _features_size(t: Trial) -> None:
    reply = t.link.ask(_F.GET_FEATURES)
    t.expect(len(reply.payload) == 8, f"the reply has {len(reply.payload)} bytes, not 8")


@register("message.reply-once", user("Communication"), "A request is answered once.")
def _reply_once(t: Trial) -> None:
    t.link.ask(_F.GET_FEATURES)
    t.expect(t.link.quiet(QUIET), "sent something that nothing asked for")


@register(
    "message.in-pieces",
    user("Message Specification"),
    "A message that arrives byte by byte is one message.",
)
def _in_pieces(t: Trial) -> None:
    for byte in encode_message(_F.GET_FEATURES):
        t.link.send(bytes([byte]))
        # So that each is read on its own.
        t.link.quiet(0.003)
    t.link.judge(t.link.receive(), _F.GET_FEATURES)


@register(
    "message.payload-later",
    user("Message Specification"),
    "A payload may arrive after its header.",
)
def _payload_later(t: Trial) -> None:
    t.negotiate()
    data = encode_message(_F.SET_FEATURES, U64(t.link.features))
    t.link.send(data[:12])
    t.expect(t.link.quiet(0.02), "reacted to half a message")
    t.link.send(data[12:])
    t.link.u64(_F.GET_FEATURES)


@register(
    "message.together",
    user("Message Specification"),
    "Messages that arrive together are served one after the other.",
)
def _together(t: Trial) -> None:
    count = 20
    t.link.send(encode_message(_F.GET_FEATURES) * count)
    values = set()
    for _ in range(count):
        reply = t.link.receive()
        t.link.judge(reply, _F.GET_FEATURES)
        values.add(reply.u64)
    t.expect(len(values) == 1, f"offers different features at a time: {sorted(values)}")


@register(
    "message.order",
    user("Communication"),
    "Requests are answered in their order.",
)
def _order(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.MQ)
    t.negotiate()
    for code in (_F.GET_QUEUE_NUM, _F.GET_FEATURES, _F.GET_PROTOCOL_FEATURES):
        t.link.request(code)
    for code in (_F.GET_QUEUE_NUM, _F.GET_FEATURES, _F.GET_PROTOCOL_FEATURES):
        t.link.judge(t.link.receive(), code)


@register(
    "message.unknown-ignored",
    user("Communication"),
    "An unknown request does not end the connection, which is for exceptional cases.",
    severity=Severity.SHOULD,
)
def _unknown_ignored(t: Trial) -> None:
    t.negotiate()
    t.link.request(_UNKNOWN, bytes(8))
    try:
        t.link.ask(_F.GET_FEATURES)
    except HungUpError:
        t.reject("closed the connection at an unknown request")


@hostile(
    "message.unknown-with-reply",
    user("VHOST_USER_PROTOCOL_F_REPLY_ACK"),
    "An unknown request that wants an acknowledgement gets one that says failure.",
)
def _unknown_with_reply(t: Trial) -> None:
    t.needs(protocol=_REPLY_ACK)
    t.negotiate()
    value = t.link.result(_UNKNOWN, bytes(8))
    t.expect(value != 0, "said that an unknown request succeeded")


# REPLY_ACK, message by message

_Step = Callable[[Queue], tuple[int, Payload | bytes, Sequence[int]]]


def _ack_steps() -> dict[str, _Step]:
    """Setting a ring up, message by message, in the order in which it is done."""

    def fd(code: int, which: str) -> _Step:
        return lambda q: (code, VringFd(q.index, has_fd=True), [getattr(q, which)])

    return {
        "SET_OWNER": lambda _: (_F.SET_OWNER, b"", ()),
        "SET_FEATURES": lambda q: (_F.SET_FEATURES, U64(q.link.features), ()),
        "SET_MEM_TABLE": lambda q: (_F.SET_MEM_TABLE, q.ram.table, [q.ram.fd]),
        "SET_VRING_NUM": lambda q: (_F.SET_VRING_NUM, VringState(q.index, q.size), ()),
        "SET_VRING_BASE": lambda q: (_F.SET_VRING_BASE, VringState(q.index, 0), ()),
        "SET_VRING_ADDR": lambda q: (_F.SET_VRING_ADDR, q.addresses, ()),
        "SET_VRING_ERR": fd(_F.SET_VRING_ERR, "err_fd"),
        "SET_VRING_CALL": fd(_F.SET_VRING_CALL, "call_fd"),
        "SET_VRING_KICK": fd(_F.SET_VRING_KICK, "kick_fd"),
        "SET_VRING_ENABLE": lambda q: (_F.SET_VRING_ENABLE, VringState(q.index, 1), ()),
    }


def _acknowledged(name: str, t: Trial) -> None:
    t.needs(protocol=_REPLY_ACK)
    t.negotiate()
    t.share()
    queue = t.new_queue()
    for step, make in _ack_steps().items():
        code, payload, fds = make(queue)
        reply = t.link.ask(code, payload, fds, need_reply=True)
        if step == name:
            t.expect(reply.u64 == 0, f"{name} was answered with {reply.u64}, not 0")
            return


for _name in _ack_steps():
    register(
        f"ack.{_name}",
        user("VHOST_USER_PROTOCOL_F_REPLY_ACK"),
        f"{_name} with the need_reply flag is answered with 0 when it has succeeded.",
    )(partial(_acknowledged, _name))


@register(
    "ack.only-if-asked",
    user("VHOST_USER_PROTOCOL_F_REPLY_ACK"),
    "A message without the need_reply flag and without a reply of its own is not answered.",
)
def _only_if_asked(t: Trial) -> None:
    link = t.negotiate()
    link.request(_F.SET_OWNER)
    link.request(_F.SET_FEATURES, U64(link.features))
    link.ask(_F.GET_FEATURES)
    t.expect(link.quiet(QUIET), "sent an answer that nothing asked for")


@register(
    "ack.own-reply",
    user("VHOST_USER_PROTOCOL_F_REPLY_ACK"),
    "The need_reply flag changes nothing for a message that has a reply of its own.",
)
def _own_reply(t: Trial) -> None:
    t.needs(protocol=_REPLY_ACK)
    link = t.negotiate()
    offered = link.u64(_F.GET_FEATURES)
    reply = link.ask(_F.GET_FEATURES, need_reply=True)
    t.expect(reply.u64 == offered, f"answered {reply.u64:#x} where {offered:#x} is offered")
    t.expect(link.quiet(QUIET), "sent an acknowledgement besides the reply")


@register(
    "ack.not-negotiated",
    user("VHOST_USER_PROTOCOL_F_REPLY_ACK"),
    "Without REPLY_ACK negotiated the need_reply flag has no meaning.",
    severity=Severity.SHOULD,
)
def _ack_not_negotiated(t: Trial) -> None:
    link = t.link
    link.request(_F.SET_OWNER, need_reply=True)
    t.expect(link.quiet(QUIET), "sent an acknowledgement that was not negotiated")


@register(
    "ack.failure",
    user("VHOST_USER_PROTOCOL_F_REPLY_ACK"),
    "A request that cannot be met is answered with another value than 0.",
)
def _failure(t: Trial) -> None:
    t.needs(protocol=_REPLY_ACK | ProtocolFeature.MQ)
    link = t.negotiate()
    queues = link.u64(_F.GET_QUEUE_NUM)
    # Beyond what any back-end has: one that counts larger than it serves is another check's.
    beyond = max(queues, 255) + 1
    try:
        value = link.result(_F.SET_VRING_NUM, VringState(beyond, 64))
    except HungUpError:
        t.reject("closed the connection instead")
    t.expect(value != 0, f"said that ring {beyond} has a size now, and there are {queues}")


# No messages at all

_FIXED: Final = {
    "SET_FEATURES": 8,
    "SET_PROTOCOL_FEATURES": 8,
    "SET_VRING_NUM": 8,
    "SET_VRING_BASE": 8,
    "GET_VRING_BASE": 8,
    "SET_VRING_ADDR": 40,
    "SET_VRING_KICK": 8,
    "SET_VRING_CALL": 8,
    "SET_VRING_ERR": 8,
    "SET_VRING_ENABLE": 8,
    "SET_MEM_TABLE": 40,
    "IOTLB_MSG": 32,
    "GET_CONFIG": 12,
    "SET_CONFIG": 12,
    "ADD_MEM_REG": 40,
    "REM_MEM_REG": 40,
    "GET_INFLIGHT_FD": 24,
    "SET_INFLIGHT_FD": 24,
    "SET_LOG_BASE": 16,
    "SET_STATUS": 8,
}


def _sent(link: Link, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send something that may be refused; the connection may end, or go on to be usable."""
    with contextlib.suppress(SilentError):
        link.send(data, fds)
    link.send(encode_message(_F.GET_FEATURES))
    while True:
        reply = link.receive()
        if reply.request == _F.GET_FEATURES:
            return


def _truncated(name: str, t: Trial) -> None:
    t.negotiate()
    code, size = FrontendRequest[name], _FIXED[name]
    for short in sorted({0, 4, size // 2, size - 1} - {size}):
        link = t.reconnect()
        t.negotiate()
        try:
            _sent(link, _HEADER.pack(code, 1, short) + bytes(short))
        except HungUpError:
            continue
    t.reconnect()
    t.link.ask(_F.GET_FEATURES)


for _name in _FIXED:
    hostile(
        f"malformed.short-{_name}",
        user(_name),
        f"{_name} with too short a payload is refused, or taken as what it is, and no more.",
    )(partial(_truncated, _name))


@hostile(
    "malformed.version",
    user("Header"),
    "A message of another version is refused or ignored.",
)
def _version(t: Trial) -> None:
    for version in (0, 2, 3):
        link = t.reconnect()
        with contextlib.suppress(HungUpError, SilentError):
            _sent(link, _HEADER.pack(_F.SET_OWNER, version, 0))
    t.reconnect().ask(_F.GET_FEATURES)


@hostile(
    "malformed.reply-flag",
    user("Header"),
    "A message with the reply flag, which only a back-end sends, is refused or taken as a request.",
)
def _reply_flag(t: Trial) -> None:
    link = t.negotiate()
    _sent(link, _HEADER.pack(_F.SET_OWNER, 1 | HeaderFlag.REPLY, 0))


@hostile(
    "malformed.huge-payload",
    user("Header"),
    "A header that announces 4 GiB is refused; nothing is allocated or waited for.",
)
def _huge_payload(t: Trial) -> None:
    link = t.negotiate()
    link.send(_HEADER.pack(_F.SET_FEATURES, 1, 0xFFFF_FFFF) + bytes(8))
    t.expect(link.closed(t.patience), "waits for 4 GiB of payload")


@hostile(
    "malformed.too-large-payload",
    user("Header"),
    "A payload larger than that of any message is refused or thrown away.",
)
def _too_large(t: Trial) -> None:
    link = t.negotiate()
    _sent(link, _HEADER.pack(_F.SET_FEATURES, 1, 65536) + bytes(65536))


@hostile(
    "malformed.hang-up-in-header",
    user("Message Specification"),
    "A connection that ends within a header ends.",
)
def _half_header(t: Trial) -> None:
    t.link.send(encode_message(_F.GET_FEATURES)[:7])
    t.reconnect().ask(_F.GET_FEATURES)


@hostile(
    "malformed.hang-up-in-payload",
    user("Message Specification"),
    "A connection that ends within a payload ends.",
)
def _half_payload(t: Trial) -> None:
    t.negotiate()
    t.link.send(encode_message(_F.SET_FEATURES, U64(VERSION_1))[:-3])
    t.reconnect().ask(_F.GET_FEATURES)


@hostile(
    "malformed.noise",
    user("Message Specification"),
    "Random bytes are refused.",
)
def _noise(t: Trial) -> None:
    for _ in range(20):
        link = t.reconnect()
        with contextlib.suppress(HungUpError, SilentError):
            link.send(t.random.randbytes(t.random.randrange(1, 2000)))
    t.reconnect().ask(_F.GET_FEATURES)


@hostile(
    "malformed.random-messages",
    user("Front-end message types"),
    "Requests with random payloads are refused or served, in whatever order they come.",
)
def _random_messages(t: Trial) -> None:
    codes = [each for each in _F if each not in {_F.POSTCOPY_ADVISE, _F.POSTCOPY_LISTEN}]
    for _ in range(10):
        link = t.reconnect()
        with contextlib.suppress(HungUpError, SilentError):
            for _ in range(30):
                size = t.random.choice([0, 4, 8, 8, 8, 12, 32, 40, 40, 72])
                payload = t.random.randbytes(size)
                if t.random.random() < 0.5:
                    payload = bytes(b & t.random.choice([0, 0, 1, 3, 255]) for b in payload)
                fds = [t.eventfd() for _ in range(t.random.choice([0, 0, 1, 2]))]
                link.send(_HEADER.pack(t.random.choice(codes), 1, size) + payload, fds)
            # All of it is read before the connection ends, so that each run does the same.
            link.end_sending()
            link.closed(t.reaction)
    t.reconnect().ask(_F.GET_FEATURES)


# Descriptors


@hostile(
    "descriptor.unexpected",
    user("Communication"),
    "Descriptors with a message that carries none are closed; the message is refused or served.",
)
def _unexpected(t: Trial) -> None:
    link = t.negotiate()
    mine, theirs = t.socket_pair()
    try:
        link.request(_F.SET_FEATURES, U64(link.features), [theirs.fileno()])
        theirs.close()
        link.ask(_F.GET_FEATURES)
    except HungUpError:
        pass
    mine.settimeout(t.patience)
    try:
        t.expect(mine.recv(1) == b"", "wrote to a descriptor that it was not to have")
    except TimeoutError:
        t.fail("keeps a descriptor that came with SET_FEATURES")
    except ConnectionResetError:
        pass


@hostile(
    "descriptor.flood",
    user("Communication"),
    "Two hundred descriptors with one message are closed, or the connection is.",
)
def _flood(t: Trial) -> None:
    link = t.negotiate()
    fd = t.eventfd()
    _sent(link, encode_message(_F.SET_FEATURES, U64(link.features)), [fd] * 200)


@hostile(
    "descriptor.kick-missing",
    user("SET_VRING_KICK"),
    "A kick descriptor that is announced and not there is refused.",
)
def _kick_missing(t: Trial) -> None:
    link = t.negotiate()
    t.share()
    queue = t.new_queue()
    queue.set_up()
    link.refuses(_F.SET_VRING_KICK, VringFd(queue.index, has_fd=True))


@hostile(
    "descriptor.kick-surplus",
    user("SET_VRING_KICK"),
    "A descriptor that comes although the message says there is none is refused or closed.",
)
def _kick_surplus(t: Trial) -> None:
    link = t.negotiate()
    t.share()
    queue = t.new_queue()
    queue.set_up()
    link.refuses(_F.SET_VRING_KICK, VringFd(queue.index, has_fd=False), [t.eventfd()])


def _odd_descriptors(t: Trial) -> dict[str, int]:
    reader, writer = os.pipe()
    t.own(reader)
    t.own(writer)
    mine, theirs = t.socket_pair()
    # The other end stays open and says nothing.
    del mine
    return {
        "directory": t.own(os.open("/", os.O_RDONLY | os.O_CLOEXEC)),
        "file": t.memfd(4096),
        "pipe": reader,
        "socket": theirs.fileno(),
        "null": t.own(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)),
    }


def _odd(which: str, code: FrontendRequest, t: Trial) -> None:
    link = t.negotiate()
    t.share()
    queue = t.new_queue()
    queue.set_up()
    fd = _odd_descriptors(t)[which]
    if code is not _F.SET_VRING_KICK:
        queue.set_fd(_F.SET_VRING_KICK, queue.kick_fd)
    link.refuses(code, VringFd(queue.index, has_fd=True), [fd])
    if link.features & PROTOCOL_BIT:
        link.refuses(_F.SET_VRING_ENABLE, VringState(queue.index, 1))
    t.post(queue)
    queue.outcome(QUIET)
    link.ask(_F.GET_FEATURES)


for _which in ("directory", "file", "pipe", "socket", "null"):
    for _code in (_F.SET_VRING_KICK, _F.SET_VRING_CALL):
        hostile(
            f"descriptor.{_code.name.rpartition('_')[2].lower()}-{_which}",
            user(_code.name),
            f"A {_which} as {_code.name.rpartition('_')[2].lower()} descriptor harms nothing.",
        )(partial(_odd, _which, _code))


# Rings that do not exist

_RINGS: Final[dict[str, Callable[[int], Payload]]] = {
    "SET_VRING_NUM": lambda index: VringState(index, 64),
    "SET_VRING_BASE": lambda index: VringState(index, 0),
    "GET_VRING_BASE": lambda index: VringState(index, 0),
    "SET_VRING_ADDR": lambda index: VringAddr(index, 0, 0x1000, 0x2000, 0x3000),
    "SET_VRING_ENABLE": lambda index: VringState(index, 1),
    "SET_VRING_KICK": lambda index: VringFd(index & 0xFF, has_fd=False),
    "SET_VRING_CALL": lambda index: VringFd(index & 0xFF, has_fd=False),
    "SET_VRING_ERR": lambda index: VringFd(index & 0xFF, has_fd=False),
}


def _no_ring(name: str, t: Trial) -> None:
    refused = ""
    for index in (0xFF, 0x1FF, 0xFFFF, 0x8000_0000, 0xFFFF_FFFF):
        link = t.reconnect()
        t.negotiate()
        payload = _RINGS[name](index)
        try:
            if name == "GET_VRING_BASE":
                link.request(_F.GET_VRING_BASE, payload)
                link.request(_F.GET_FEATURES)
                link.receive()
            elif value := link.result(FrontendRequest[name], payload):
                refused = refused or f"refuses ring {index} ({value})"
        except HungUpError:
            refused = refused or f"closed the connection at ring {index}"
    t.reconnect().ask(_F.GET_FEATURES)
    if refused:
        t.reject(refused)


for _name in _RINGS:
    hostile(
        f"no-ring.{_name}",
        user(_name),
        f"{_name} of a ring that does not exist reaches nothing.",
    )(partial(_no_ring, _name))


def _bad_number(number: int, t: Trial) -> None:
    link = t.negotiate()
    t.share()
    queue = t.new_queue()
    queue.set_up()
    link.refuses(_F.SET_VRING_NUM, VringState(queue.index, number))
    queue.set_fd(_F.SET_VRING_KICK, queue.kick_fd)
    if link.features & PROTOCOL_BIT:
        link.refuses(_F.SET_VRING_ENABLE, VringState(queue.index, 1))
    buffers = t.post(queue, kick=False)
    t.remember()
    queue.kick()
    t.aftermath(queue, [each for b in buffers for each in b.writable], [b.head for b in buffers])


for _label, _number in (
    ("zero", 0),
    ("odd", 63),
    ("above-32768", 65536),
    ("huge", 0xFFFF_FFFF),
):
    hostile(
        f"ring-size.{_label}",
        user("SET_VRING_NUM"),
        f"A ring of {_number} entries is refused, or harms nothing.",
    )(partial(_bad_number, _number))


def _bad_address(what: str, t: Trial) -> None:
    link = t.negotiate()
    t.share()
    queue = t.new_queue()
    queue.set_up()
    good = queue.addresses
    value = {
        "misaligned-desc": {"desc": good.desc + 4},
        "misaligned-avail": {"avail": good.avail + 1},
        "misaligned-used": {"used": good.used + 2},
        "desc-nowhere": {"desc": 0x10_0000},
        "avail-nowhere": {"avail": 0x10_0000},
        "used-nowhere": {"used": 0x10_0000},
        "desc-past-end": {"desc": t.ram.user(t.ram.end) - 16},
        "avail-past-end": {"avail": t.ram.user(t.ram.end) - 4},
        "used-past-end": {"used": t.ram.user(t.ram.end) - 4},
        "wraps": {"used": (1 << 64) - 16},
        "overlapping": {"used": good.desc},
    }[what]
    bad = VringAddr(
        good.index,
        0,
        value.get("desc", good.desc),
        value.get("used", good.used),
        value.get("avail", good.avail),
    )
    link.refuses(_F.SET_VRING_ADDR, bad)
    link.refuses(_F.SET_VRING_KICK, VringFd(queue.index, has_fd=True), [queue.kick_fd or 0])
    if link.features & PROTOCOL_BIT:
        link.refuses(_F.SET_VRING_ENABLE, VringState(queue.index, 1))
    t.post(queue)
    queue.outcome(QUIET)
    try:
        queue.stop()
    except SilentError:
        t.fail("does not answer GET_VRING_BASE")


for _what in (
    "misaligned-desc",
    "misaligned-avail",
    "misaligned-used",
    "desc-nowhere",
    "avail-nowhere",
    "used-nowhere",
    "desc-past-end",
    "avail-past-end",
    "used-past-end",
    "wraps",
    "overlapping",
):
    hostile(
        f"ring-address.{_what}",
        user("SET_VRING_ADDR"),
        f"A ring whose address is wrong ({_what.replace('-', ' ')}) is refused, or not served.",
    )(partial(_bad_address, _what))


@hostile(
    "ring-base.too-large",
    user("SET_VRING_BASE"),
    "A base of more than 16 bits is refused, or its upper bits are ignored.",
)
def _base_too_large(t: Trial) -> None:
    link = t.negotiate()
    t.share()
    queue = t.new_queue()
    queue.set_up()
    link.refuses(_F.SET_VRING_BASE, VringState(queue.index, 0x12_3456))


@hostile(
    "ring-enable.other-value",
    user("SET_VRING_ENABLE"),
    "SET_VRING_ENABLE with a value other than 0 and 1 is refused, or taken as one of them.",
)
def _enable_other(t: Trial) -> None:
    if not t.offered() & PROTOCOL_BIT:
        t.skip("protocol features are not offered")
    link = t.negotiate()
    t.share()
    queue = t.new_queue()
    queue.start()
    link.refuses(_F.SET_VRING_ENABLE, VringState(queue.index, 0x8000_0000))


@hostile(
    "order.kick-first",
    user("SET_VRING_KICK"),
    "A ring that is started before it has a size, addresses or memory is refused, or waits.",
)
def _kick_first(t: Trial) -> None:
    link = t.negotiate()
    fd = t.eventfd()
    os.eventfd_write(fd, 1)
    link.refuses(_F.SET_VRING_KICK, VringFd(t.index, has_fd=True), [fd])
    if link.features & PROTOCOL_BIT:
        link.refuses(_F.SET_VRING_ENABLE, VringState(t.index, 1))
    link.quiet(QUIET)
    link.ask(_F.GET_FEATURES)


@hostile(
    "order.ring-before-features",
    user("SET_VRING_NUM"),
    "A ring that is set up before SET_FEATURES is refused, or waits.",
)
def _before_features(t: Trial) -> None:
    queue = t.new_queue()
    t.share()
    queue.start(enable=False)
    queue.kick()
    t.link.ask(_F.GET_FEATURES)


@hostile(
    "order.addresses-before-memory",
    user("SET_VRING_ADDR"),
    "Ring addresses that come before the memory they are in are refused, or wait for it.",
)
def _before_memory(t: Trial) -> None:
    t.negotiate()
    queue = t.new_queue()
    t.link.refuses(_F.SET_VRING_NUM, VringState(queue.index, queue.size))
    t.link.refuses(_F.SET_VRING_ADDR, queue.addresses)
    t.share()
    queue.start()
    t.serves(queue)


# Connections


@register(
    "connection.again",
    user("Introduction"),
    "After a front-end has gone the next one is served.",
)
def _again(t: Trial) -> None:
    t.serves(t.ready())
    t.reconnect()
    t.serves(t.ready())


@hostile(
    "connection.storm",
    user("Introduction"),
    "Fifty connections that end at once leave nothing behind.",
)
def _storm(t: Trial) -> None:
    for number in range(50):
        link = t.connect()
        with contextlib.suppress(HungUpError):
            if number % 3:
                link.send(encode_message(_F.GET_FEATURES)[: 4 * (number % 3)])
        link.close()
    t.reconnect().ask(_F.GET_FEATURES)


@hostile(
    "connection.second",
    user("Communication"),
    "A second connection does not disturb the one that is served.",
)
def _second(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue)
    try:
        other = t.connect()
    except AbsentError:
        t.serves(queue)
        t.reject("accepts no second connection")
    with contextlib.suppress(HungUpError):
        other.send(encode_message(_F.GET_FEATURES))
    t.serves(queue)
    other.close()
    t.serves(queue)


@hostile(
    "connection.hang-up-with-requests",
    user("Communication"),
    "A front-end that goes with requests in a ring leaves a back-end that serves the next one.",
)
def _hang_up_with_requests(t: Trial) -> None:
    queue = t.ready()
    t.post(queue, 16)
    t.reconnect()
    t.serves(t.ready())


@register(
    "connection.memory-left-alone",
    user("Suspended device state"),
    "After a front-end has gone, its memory is not written and its rings are not served.",
)
def _left_alone(t: Trial) -> None:
    old = t.ready()
    t.serves(old)
    t.reconnect()
    # A round trip on the new connection shows that the old one is over.
    t.link.ask(_F.GET_FEATURES)
    t.post(old, kick=False)
    before = t.ram.snapshot()
    old.kick()
    t.link.quiet(QUIET)
    at = t.ram.stray(before, ())
    t.expect(at is None, f"wrote to the memory of a front-end that is gone, at {at or 0:#x}")


@register(
    "connection.descriptors-closed",
    user("SET_BACKEND_REQ_FD"),
    "Descriptors of a front-end that is gone are closed.",
    severity=Severity.SHOULD,
)
def _descriptors_closed(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.BACKEND_REQ)
    link = t.negotiate(protocol=_REPLY_ACK | ProtocolFeature.BACKEND_REQ)
    mine, theirs = t.socket_pair()
    link.do(_F.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
    theirs.close()
    t.reconnect()
    mine.settimeout(t.patience)
    try:
        t.expect(mine.recv(1) == b"", "speaks on the channel of a front-end that is gone")
    except TimeoutError:
        t.fail("keeps the channel of a front-end that is gone open")
    except ConnectionResetError:
        pass


@hostile(
    "connection.silent",
    user("Communication"),
    "A front-end that connects and says nothing is no obstacle to the next one.",
)
def _silent(t: Trial) -> None:
    t.link.quiet(QUIET)
    t.reconnect()
    t.serves(t.ready())


@hostile(
    "memory-table.too-few-descriptors",
    user("SET_MEM_TABLE"),
    "A table with fewer descriptors than regions is refused.",
)
def _too_few(t: Trial) -> None:
    link = t.negotiate()
    other = MemoryRegion(1 << 32, 0x10000, 0x6000_0000_0000, 0)
    link.refuses(_F.SET_MEM_TABLE, MemoryTable((t.ram.region, other)), [t.ram.fd])
    t.fail("accepted two regions with one descriptor")
