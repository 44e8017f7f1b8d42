"""Network cards, consoles, entropy and input devices, file systems."""

from __future__ import annotations

import struct
import time
from typing import Final

from guestio.faults.catalogue import hostile, register, virtio
from guestio.faults.checks.config import fields, read
from guestio.faults.kinds import frame, net_header
from guestio.faults.report import Severity
from guestio.faults.ring import Queue
from guestio.faults.trial import QUIET, Trial
from guestio.vhost_user.messages import Config, FrontendRequest, ProtocolFeature

_F = FrontendRequest

# Network cards

_NET: Final = ("net",)
_N_MTU, _N_MAC, _N_MRG, _N_STATUS = 1 << 3, 1 << 5, 1 << 15, 1 << 16
_N_CTRL, _N_CTRL_RX, _N_MQ, _N_CTRL_MAC = 1 << 17, 1 << 18, 1 << 22, 1 << 23
_CONTROL: Final = virtio("5.1.9.5", "5.1.6.5")
_TRANSMIT: Final = virtio("5.1.9.2", "5.1.6.2")
_RECEIVE: Final = virtio("5.1.9.4.1", "5.1.6.4.1")


@register("net.mac", virtio("5.1.4"), "With MAC the address is that of one station.", devices=_NET)
def _mac(t: Trial) -> None:
    t.needs(features=_N_MAC)
    mac = fields(t, 6)
    t.expect(not mac[0] & 1 and any(mac), f"the address is {mac.hex(':')}")


@register("net.mtu", virtio("5.1.4.1"), "With MTU it is between 68 and 65535.", devices=_NET)
def _mtu(t: Trial) -> None:
    t.needs(features=_N_MTU)
    mtu = int.from_bytes(fields(t, 12)[10:12], "little")
    t.expect(mtu >= 68, f"the MTU is {mtu}")


@register(
    "net.mtu-1280",
    virtio("5.1.4.1"),
    "With MTU it is at least 1280.",
    severity=Severity.SHOULD,
    devices=_NET,
)
def _mtu_large(t: Trial) -> None:
    t.needs(features=_N_MTU)
    mtu = int.from_bytes(fields(t, 12)[10:12], "little")
    t.expect(mtu >= 1280, f"the MTU is {mtu}")


@register(
    "net.pairs",
    virtio("5.1.4.1"),
    "With MQ there are between 1 and 0x8000 pairs of queues.",
    devices=_NET,
)
def _pairs(t: Trial) -> None:
    t.needs(features=_N_MQ)
    pairs = int.from_bytes(fields(t, 10)[8:10], "little")
    t.expect(1 <= pairs <= 0x8000, f"max_virtqueue_pairs is {pairs}")


@register("net.status", virtio("5.1.4"), "With STATUS no undefined bit is set.", devices=_NET)
def _net_status(t: Trial) -> None:
    t.needs(features=_N_STATUS)
    status = int.from_bytes(fields(t, 8)[6:8], "little")
    t.expect(not status & ~3, f"the link status is {status:#x}")


@register("net.transmit", _TRANSMIT, "Frames of all usual lengths are taken.", devices=_NET)
def _transmit(t: Trial) -> None:
    queue = t.ready()
    for payload in (46, 100, 512, 1000, 1500):
        queue.post([net_header() + frame(payload)], [])
    queue.kick()
    queue.wait(5, t.patience)


@register(
    "net.transmit-length",
    virtio("2.7.8"),
    "A transmitted buffer, which is not written, has used length 0.",
    devices=_NET,
)
def _transmit_length(t: Trial) -> None:
    queue = t.ready()
    for done in t.serves(queue, 3):
        t.expect(done.written == 0, f"says it wrote {done.written} bytes of a frame")


@register(
    "net.transmit-framing",
    virtio("2.7.4.1"),
    "A frame's header may be in a descriptor of its own, or cut.",
    devices=_NET,
)
def _transmit_framing(t: Trial) -> None:
    queue = t.ready()
    head, data = net_header(), frame(200)
    queue.post([head, data], [])
    queue.post([head[:5], head[5:] + data[:3], data[3:]], [])
    queue.post([head + data[:14], data[14:100], data[100:]], [])
    queue.kick()
    queue.wait(3, t.patience)


@hostile(
    "net.transmit-short",
    virtio("5.1.9.2.1", "5.1.6.2.1"),
    "A buffer that is shorter than its header is dropped.",
    devices=_NET,
)
def _transmit_short(t: Trial) -> None:
    queue = t.ready()
    for length in (1, 11, 12, 13, 20):
        buffer = queue.post([bytes(length)], [], publish=False)
        queue.publish(queue.offered)
        t.remember()
        queue.kick()
        if queue.outcome(t.reaction) != "used":
            t.aftermath(queue, [], [buffer.head], seconds=0)
        for entry in queue.take_used():
            queue.settle(entry)


@hostile(
    "net.transmit-long",
    _TRANSMIT,
    "A frame of 256 KiB is dropped.",
    devices=_NET,
)
def _transmit_long(t: Trial) -> None:
    queue = t.ready()
    buffer = queue.post([net_header() + frame(256 << 10)], [], publish=False)
    queue.publish(queue.offered)
    t.remember()
    queue.kick()
    t.aftermath(queue, [], [buffer.head])


@hostile(
    "net.transmit-offloads",
    virtio("5.1.9.2.2", "5.1.6.2.2"),
    "Headers of random contents, with offloads that were not negotiated, harm nothing.",
    devices=_NET,
)
def _transmit_offloads(t: Trial) -> None:
    queue = t.ready()
    for _ in range(20):
        queue.post([t.random.randbytes(12) + frame(t.random.randrange(46, 1500))], [])
    t.remember()
    queue.kick()
    heads = list(queue.buffers)
    t.aftermath(queue, [], heads)


def _receive(t: Trial, features: int = 0) -> bytes:
    """Provoke a frame to be received; skips where none comes."""
    t.negotiate(features)
    t.share()
    rx, tx = t.new_queue(0), t.new_queue(1)
    for queue in (rx, tx):
        queue.start()
    for _ in range(16):
        rx.post([], [2048])
    rx.kick()
    ask = struct.pack(
        "!6s6sHHHBBH6s4s6s4s",
        b"\xff" * 6,
        b"\x02guest",
        0x0806,
        1,
        0x0800,
        6,
        4,
        1,
        b"\x02guest",
        bytes([10, 0, 2, 15]),
        bytes(6),
        bytes([10, 0, 2, 2]),
    )
    tx.post([net_header() + ask + bytes(18)], [])
    tx.kick()
    tx.wait(1, t.patience)
    if rx.outcome(0.3) != "used":
        t.skip("no frame came; none was provoked by an ARP request for 10.0.2.2")
    (entry, *_) = rx.take_used()
    buffer = rx.settle(entry)
    assert buffer.written is not None
    return t.answer(rx, buffer)[: buffer.written]


@register(
    "net.receive-header",
    _RECEIVE,
    "A received frame has a header of 12 bytes and at least 14 bytes behind it.",
    devices=_NET,
)
def _receive_header(t: Trial) -> None:
    data = _receive(t)
    t.expect(len(data) >= 26, f"received {len(data)} bytes in all")


@register(
    "net.receive-one-buffer",
    _RECEIVE,
    "Without MRG_RXBUF num_buffers is 1.",
    devices=_NET,
)
def _receive_one(t: Trial) -> None:
    number = int.from_bytes(_receive(t)[10:12], "little")
    t.expect(number == 1, f"num_buffers is {number}")


@register(
    "net.receive-merged",
    _RECEIVE,
    "With MRG_RXBUF num_buffers is how many buffers the frame is in.",
    devices=_NET,
)
def _receive_merged(t: Trial) -> None:
    t.needs(features=_N_MRG)
    number = int.from_bytes(_receive(t, _N_MRG)[10:12], "little")
    t.expect(number == 1, f"num_buffers of a short frame is {number}")


@register(
    "net.receive-no-offloads",
    _RECEIVE,
    "Without GUEST_CSUM the header's flags are 0, and without GSO features its type is none.",
    devices=_NET,
)
def _receive_plain(t: Trial) -> None:
    data = _receive(t)
    t.expect(data[0] == 0, f"the header's flags are {data[0]:#x}")
    t.expect(data[1] == 0, f"the header's gso_type is {data[1]:#x}")


@register(
    "net.receive-not-when-disabled",
    "vhost-user Ring states",
    "A disabled receive queue is given no frames.",
    devices=_NET,
)
def _receive_disabled(t: Trial) -> None:
    _receive(t)
    t.reconnect()
    t.negotiate()
    t.share()
    rx = t.new_queue(0)
    rx.start(enable=False)
    tx = t.new_queue(1)
    tx.start()
    for _ in range(16):
        rx.post([], [2048])
    rx.kick()
    t.serves(tx, 3)
    t.expect(rx.stays_quiet(QUIET), "received a frame on a queue that is disabled")


def _control(t: Trial, features: int) -> Queue:
    t.needs(features=_N_CTRL | features, protocol=ProtocolFeature.MQ)
    t.negotiate(_N_CTRL | features)
    t.share()
    last = 2
    if t.link.features & _N_MQ:
        last = t.link.u64(_F.GET_QUEUE_NUM) - 1
    queue = t.new_queue(last, 64)
    for index in (0, 1):
        t.new_queue(index, 16).start()
    queue.start()
    return queue


def _command(t: Trial, queue: Queue, group: int, command: int, data: bytes) -> int:
    buffer = queue.post([bytes([group, command]), *([data] if data else [])], [1])
    queue.kick()
    done = queue.wait_one(t.patience)
    del buffer
    return t.answer(queue, done)[0]


@register(
    "net.control-unknown",
    _CONTROL,
    "A control command that does not exist has ack ERR.",
    devices=_NET,
)
def _control_unknown(t: Trial) -> None:
    ack = _command(t, _control(t, 0), 200, 200, bytes(4))
    t.expect(ack == 1, f"an unknown control command has ack {ack}")


@register(
    "net.control-promiscuous",
    virtio("5.1.9.5.1.1", "5.1.6.5.1.1"),
    "With CTRL_RX promiscuous mode can be switched on and off.",
    devices=_NET,
)
def _control_promiscuous(t: Trial) -> None:
    queue = _control(t, _N_CTRL_RX)
    for value in (1, 0):
        ack = _command(t, queue, 0, 0, bytes([value]))
        t.expect(ack == 0, f"switching promiscuous mode has ack {ack}")


@register(
    "net.control-mac",
    virtio("5.1.9.5.2.1", "5.1.6.5.2.1"),
    "With CTRL_MAC_ADDR the address can be set; the configuration has it then.",
    devices=_NET,
)
def _control_mac(t: Trial) -> None:
    queue = _control(t, _N_CTRL_MAC | _N_MAC)
    before = read(t, 0, 6)
    mac = b"\x02\x11\x22\x33\x44\x55"
    ack = _command(t, queue, 1, 1, mac)
    t.expect(ack == 0, f"setting the address has ack {ack}")
    after = read(t, 0, 6)
    _command(t, queue, 1, 1, before)
    t.expect(after == mac, f"the address was set to {mac.hex(':')} and reads {after.hex(':')}")


@hostile(
    "net.control-short",
    _CONTROL,
    "Control commands that are too short have ack ERR, or are refused.",
    devices=_NET,
)
def _control_short(t: Trial) -> None:
    queue = _control(t, 0)
    for data in (b"", b"\0", b"\0\0", b"\1\1\2"):
        buffer = queue.post([data] if data else [], [1])
        queue.kick()
        if queue.outcome(t.reaction) != "used":
            t.aftermath(queue, buffer.writable, [buffer.head], seconds=0)
        for entry in queue.take_used():
            done = queue.settle(entry)
            ack = t.answer(queue, done)[0]
            t.expect(ack != 0, f"a control command of {len(data)} bytes has ack OK")


# Consoles

_CONSOLE: Final = ("console",)
_C_SIZE, _C_MULTIPORT, _C_EMERG = 1 << 0, 1 << 1, 1 << 2
_CONTROL_MESSAGE: Final = struct.Struct("<IHH")


@register(
    "console.output", virtio("5.3.6"), "What is written to port 0 is taken.", devices=_CONSOLE
)
def _output(t: Trial) -> None:
    queue = t.ready()
    for length in (1, 16, 255, 4096):
        queue.post([b"." * length], [])
    queue.kick()
    for done in queue.wait(4, t.patience):
        t.expect(done.written == 0, f"says it wrote {done.written} bytes of output")


@register(
    "console.size",
    virtio("5.3.4"),
    "With SIZE columns and rows are valid.",
    devices=_CONSOLE,
)
def _console_size(t: Trial) -> None:
    t.needs(features=_C_SIZE)
    columns, rows = struct.unpack_from("<HH", fields(t, 12))
    t.expect((columns == 0) == (rows == 0), f"the size is {columns} by {rows}")


@register(
    "console.ports",
    virtio("5.3.4"),
    "With MULTIPORT there is at least one port, and queues for all.",
    devices=_CONSOLE,
)
def _ports(t: Trial) -> None:
    t.needs(features=_C_MULTIPORT, protocol=ProtocolFeature.MQ)
    ports = int.from_bytes(fields(t, 12)[4:8], "little")
    queues = t.link.u64(_F.GET_QUEUE_NUM)
    t.expect(1 <= ports < 1 << 31, f"max_nr_ports is {ports}")
    t.expect(queues >= 2 * ports + 2, f"has {ports} ports and {queues} queues")


@register(
    "console.emergency",
    virtio("5.3.5.1"),
    "With EMERG_WRITE emerg_wr may be written, also before anything else.",
    devices=_CONSOLE,
)
def _emergency(t: Trial) -> None:
    t.needs(features=_C_EMERG, protocol=ProtocolFeature.CONFIG)
    t.negotiate(0)
    t.link.do(_F.SET_CONFIG, Config(8, b".\0\0\0"))


def _multiport(t: Trial) -> tuple[Queue, Queue]:
    """The control queues, with buffers, and the driver's ready not sent yet."""
    t.needs(features=_C_MULTIPORT, protocol=ProtocolFeature.MQ | ProtocolFeature.CONFIG)
    t.negotiate(_C_MULTIPORT)
    t.share()
    from_device, to_device = t.new_queue(2, 32), t.new_queue(3, 32)
    for index in (0, 1):
        t.new_queue(index, 16).start()
    for queue in (from_device, to_device):
        queue.start()
    for _ in range(24):
        from_device.post([], [64])
    from_device.kick()
    return from_device, to_device


@register(
    "console.adds-ports",
    virtio("5.3.6.2.1"),
    "Ports that are added are each added once, and below max_nr_ports.",
    devices=_CONSOLE,
)
def _adds(t: Trial) -> None:
    from_device, to_device = _multiport(t)
    ports = int.from_bytes(read(t, 4, 4), "little")
    to_device.post([_CONTROL_MESSAGE.pack(0, 0, 1)], [])
    to_device.kick()
    added: list[int] = []
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        if from_device.outcome(0.05) != "used":
            break
        for entry in from_device.take_used():
            buffer = from_device.settle(entry)
            data = t.answer(from_device, buffer)[: buffer.written]
            t.expect(len(data) >= 8, f"sent a control message of {len(data)} bytes")
            port, event, _ = _CONTROL_MESSAGE.unpack_from(data)
            if event == 1:
                t.expect(port not in added, f"added port {port} twice")
                t.expect(port < ports, f"added port {port} of {ports}")
                added.append(port)
    t.expect(bool(added), "added no port though the driver is ready")


@register(
    "console.control-waits",
    virtio("5.3.5"),
    "No port is added before the driver says that it is ready.",
    severity=Severity.SHOULD,
    devices=_CONSOLE,
)
def _control_waits(t: Trial) -> None:
    from_device, _ = _multiport(t)
    t.expect(from_device.stays_quiet(QUIET), "sent a control message to a driver not ready yet")


@hostile(
    "console.control-nonsense",
    virtio("5.3.6.2"),
    "Control messages of ports that do not exist, and of no kind, harm nothing.",
    devices=_CONSOLE,
)
def _control_nonsense(t: Trial) -> None:
    _, to_device = _multiport(t)
    for data in (
        _CONTROL_MESSAGE.pack(0xFFFF_FFFF, 3, 1),
        _CONTROL_MESSAGE.pack(7000, 6, 1),
        _CONTROL_MESSAGE.pack(0, 999, 1),
        b"\0",
        bytes(7),
        bytes(4096),
    ):
        to_device.post([data], [])
    heads = list(to_device.buffers)
    t.remember()
    to_device.kick()
    t.aftermath(to_device, [(t.ram.start, t.ram.size)], heads)


@hostile(
    "console.writable-output",
    virtio("5.3.6.1"),
    "A writable buffer in a transmit queue is used or refused, and harms nothing.",
    devices=_CONSOLE,
)
def _writable_output(t: Trial) -> None:
    queue = t.ready()
    buffer = queue.post([b"."], [64], publish=False)
    queue.publish(queue.offered)
    t.remember()
    queue.kick()
    t.aftermath(queue, buffer.writable, [buffer.head])


# Entropy

_RNG: Final = ("rng",)
_ENTROPY: Final = virtio("5.4.6.2")


@register("rng.bytes", _ENTROPY, "At least one byte is given.", devices=_RNG)
def _bytes(t: Trial) -> None:
    queue = t.ready()
    for size in (1, 16, 4096):
        queue.post([], [size])
        queue.kick()
        done = queue.wait_one(t.patience)
        t.expect(bool(done.written), f"gave no byte for a buffer of {size}")


@register("rng.differ", _ENTROPY, "Two buffers are given different bytes.", devices=_RNG)
def _differ(t: Trial) -> None:
    queue = t.ready()
    answers = []
    for _ in range(2):
        queue.post([], [64])
        queue.kick()
        done = queue.wait_one(t.patience)
        answers.append(t.answer(queue, done)[: done.written])
    if min(map(len, answers)) < 16:
        t.skip("gave less than 16 bytes")
    t.expect(answers[0] != answers[1], "gave the same bytes twice")


@register("rng.not-constant", _ENTROPY, "The bytes are not all the same.", devices=_RNG)
def _not_constant(t: Trial) -> None:
    queue = t.ready()
    queue.post([], [256])
    queue.kick()
    done = queue.wait_one(t.patience)
    data = t.answer(queue, done)[: done.written]
    if len(data) < 16:
        t.skip("gave less than 16 bytes")
    t.expect(len(set(data)) > 2, f"gave {len(data)} bytes of {len(set(data))} values")


@register("rng.large", _ENTROPY, "A buffer of 1 MiB is used.", devices=_RNG)
def _large(t: Trial) -> None:
    queue = t.ready()
    queue.post([], [1 << 20])
    queue.kick()
    done = queue.wait_one(t.patience)
    t.expect(bool(done.written), "gave no byte for a buffer of 1 MiB")


@register("rng.pieces", virtio("2.7.4.1"), "A buffer of many pieces is used.", devices=_RNG)
def _pieces(t: Trial) -> None:
    queue = t.ready()
    queue.post([], [1, 2, 3, 5, 8, 13, 21])
    queue.kick()
    done = queue.wait_one(t.patience)
    t.expect(bool(done.written), "gave no byte for a buffer of seven pieces")


@hostile(
    "rng.readable",
    virtio("5.4.6.1"),
    "A readable buffer is not written.",
    devices=_RNG,
)
def _readable(t: Trial) -> None:
    queue = t.ready()
    buffer = queue.post([bytes(64)], [], publish=False)
    queue.publish(queue.offered)
    t.remember()
    queue.kick()
    t.aftermath(queue, [], [buffer.head])


# Input

_INPUT: Final = ("input",)
_INPUT_CONFIG: Final = virtio("5.8.4")
_EV_REP: Final = 0x14


def _select(t: Trial, select: int, subsel: int) -> tuple[int, bytes]:
    t.link.do(_F.SET_CONFIG, Config(0, bytes([select, subsel])))
    space = read(t, 0, 136)
    return space[2], space[8:136]


def _ready_config(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.CONFIG)
    t.negotiate()


@register("input.name", _INPUT_CONFIG, "ID_NAME is a name without NUL.", devices=_INPUT)
def _name(t: Trial) -> None:
    _ready_config(t)
    size, data = _select(t, 1, 0)
    t.expect(0 < size <= 128, f"the name has {size} bytes")
    t.expect(b"\0" not in data[:size], "the name has a NUL")


@register("input.ids", _INPUT_CONFIG, "ID_DEVIDS has 8 bytes, or none.", devices=_INPUT)
def _ids(t: Trial) -> None:
    _ready_config(t)
    size, _ = _select(t, 3, 0)
    t.expect(size in {0, 8}, f"ID_DEVIDS has {size} bytes")


@register(
    "input.unsupported",
    virtio("5.8.5.2"),
    "What is not supported has size 0.",
    devices=_INPUT,
)
def _unsupported(t: Trial) -> None:
    _ready_config(t)
    for select, subsel in ((0, 0), (0x7F, 0), (0x11, 0xFF), (0x12, 0xFF), (0xFF, 0xFF)):
        size, _ = _select(t, select, subsel)
        t.expect(size == 0, f"selector {select:#x}, {subsel:#x} has {size} bytes")


@register(
    "input.events",
    _INPUT_CONFIG,
    "At least one type of events is supported; bitmaps have at most 128 bytes, and a bit set, but "
    "for repetition.",
    devices=_INPUT,
)
def _events(t: Trial) -> None:
    _ready_config(t)
    types = 0
    for kind in range(32):
        size, data = _select(t, 0x11, kind)
        t.expect(size <= 128, f"the bitmap of type {kind} has {size} bytes")
        if size:
            types += 1
            # Repetition has no codes that a driver must know, and QEMU's keyboards name none.
            t.expect(
                kind == _EV_REP or any(data[:size]), f"type {kind} is supported, without any code"
            )
    t.expect(types > 0, "supports no type of events")


@register(
    "input.axes",
    _INPUT_CONFIG,
    "Each absolute axis has 20 bytes of information, with min not above max.",
    devices=_INPUT,
)
def _axes(t: Trial) -> None:
    _ready_config(t)
    size, bitmap = _select(t, 0x11, 3)
    axes = [at for at in range(8 * size) if bitmap[at // 8] >> at % 8 & 1]
    if not axes:
        t.skip("there are no absolute axes")
    for axis in axes:
        size, data = _select(t, 0x12, axis)
        low, high = struct.unpack_from("<ii", data)
        t.expect(size == 20, f"axis {axis} has {size} bytes of information")
        t.expect(low <= high, f"axis {axis} goes from {low} to {high}")


@register("input.status", virtio("5.8.6"), "Events of the driver are taken.", devices=_INPUT)
def _status(t: Trial) -> None:
    queue = t.ready()
    for done in t.serves(queue, 5):
        t.expect(done.written == 0, f"says it wrote {done.written} bytes of an event")


@register(
    "input.event-size",
    virtio("5.8.6"),
    "A used event has 8 bytes.",
    devices=_INPUT,
)
def _event_size(t: Trial) -> None:
    t.negotiate()
    t.share()
    events = t.new_queue(0)
    events.start()
    for _ in range(16):
        events.post([], [8])
    events.kick()
    if events.outcome(0.2) != "used":
        t.skip("no event came")
    for entry in events.take_used():
        done = events.settle(entry)
        t.expect(done.written == 8, f"sent an event of {done.written} bytes")


@hostile(
    "input.short",
    virtio("5.8.6.1"),
    "Events of the driver that are too short, or too long, harm nothing.",
    devices=_INPUT,
)
def _short(t: Trial) -> None:
    queue = t.ready()
    for length in (1, 7, 9, 4096):
        queue.post([bytes(length)], [], publish=False)
    queue.publish(queue.offered)
    heads = list(queue.buffers)
    t.remember()
    queue.kick()
    t.aftermath(queue, [], heads)


@hostile(
    "input.event-buffers",
    virtio("5.8.6.1"),
    "Buffers for events that are too short harm nothing.",
    devices=_INPUT,
)
def _event_buffers(t: Trial) -> None:
    t.negotiate()
    t.share()
    events = t.new_queue(0)
    events.start()
    buffers = [events.post([], [1], publish=False) for _ in range(8)]
    events.publish(events.offered)
    t.remember()
    events.kick()
    allowed = [each for buffer in buffers for each in buffer.writable]
    t.aftermath(events, allowed, [buffer.head for buffer in buffers])
