"""The network device (virtio 1.4, section 5.1).

Queue pair i is a receive queue 2i and a transmit queue 2i + 1; the control queue comes after the
last pair that the driver may use. The device owns its receive queues: their buffers stay in the
ring until a frame is there for them.

Frames of a port with a descriptor are moved in the compiled core, one system call each; others, and
those that are captured, go through Python.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from guestio._core.virtio.chain import Chain, Server
from guestio._core.virtio.frames import (
    FILLED_BROKEN,
    FILLED_BUSY,
    FILLED_IDLE,
    FrameFiller,
    FrameSender,
)
from guestio.addr import check_int
from guestio.budgets import (
    NET_BACKLOG_BYTES,
    NET_BACKLOG_FRAMES,
    NET_CONTROL_BYTES,
    NET_FILTER_ADDRESSES,
    NET_RETRY,
    NET_TURN_BYTES,
    NET_TURN_FRAMES,
)
from guestio.errors import GuestioError
from guestio.virtio import saved
from guestio.virtio.device import VIRTIO_F_VERSION_1, Device, DeviceId
from guestio.virtio.net.features import (
    ACK_ERR,
    ACK_OK,
    GUEST_OFFLOADS,
    HOST_OFFLOADS,
    MAX_MTU,
    MIN_MTU,
    Class,
    LinkStatus,
    Net,
)
from guestio.virtio.net.port import Port

if TYPE_CHECKING:
    from guestio.virtio.host import DeviceHost
    from guestio.virtio.net.pcapng import CaptureFile

MAX_PAIRS: Final = 31
"""Queue pairs at most: with the control queue as many queues as a back-end serves."""

_CONFIG: Final = struct.Struct("<6sHHH")
_SHORT, _LONG = 10, 12
_ETHERNET: Final = 14
_FRAME_MOST: Final = 65597
_LEAST_FRAME: Final = 60
# Ethernet type, then the request of RFC 903 up to the addresses: 3 is "request reverse".
_RARP: Final = struct.pack(">HHHBBH", 0x8035, 1, 0x0800, 6, 4, 3)


@dataclass(frozen=True, slots=True)
class NetStatistics:
    """Frames of a device so far, of all its queue pairs.

    Attributes:
        sent: Frames that the driver sent.
        sent_bytes: Their bytes.
        send_dropped: Frames of the driver that were not sent: malformed, not taken by the port, or
            sent while the link was down.
        received: Frames that the driver received.
        received_bytes: Their bytes.
        receive_dropped: Frames for the driver that it did not get: its buffers were too short, it
            made none available for too long, or the link was down.
        filtered: Frames that it did not want.
    """

    sent: int
    sent_bytes: int
    send_dropped: int
    received: int
    received_bytes: int
    receive_dropped: int
    filtered: int

    def __str__(self) -> str:
        return " ".join(f"{name}={getattr(self, name)}" for name in self.__slots__)


class NetDevice(Device):
    """A network card whose cable leads to a `Port`.

    Args:
        port: Where frames go to and come from; the device closes it. Its ``pairs`` are the
            device's queue pairs.
        mac: The address, as six bytes or as ``"52:54:00:12:34:56"``; None for a random one. QEMU's
            ``virtio-net-pci`` shows its own instead.
        mtu: Bytes of a packet that the driver should send at most, 68 to 65535; None leaves it to
            the driver.
        capture: Records all frames; the device closes it.

    Raises:
        ValueError: An argument is out of its range.

    Attributes:
        mac: The address that the device was made with.
        mtu: As given.
        pairs: Queue pairs.

    Threads: :attr:`link`, :meth:`announce` and :meth:`statistics` may be used from any.
    """

    device_id = DeviceId.NET

    def __init__(
        self,
        port: Port,
        *,
        mac: str | bytes | None = None,
        mtu: int | None = None,
        capture: CaptureFile | None = None,
    ) -> None:
        if not isinstance(port, Port):
            raise TypeError(f"port must be a guestio Port, not {port!r}")
        if not 1 <= check_int(port.pairs, "pairs") <= MAX_PAIRS:
            raise ValueError(f"pairs {port.pairs} is not in 1..{MAX_PAIRS}")
        if mtu is not None and not MIN_MTU <= check_int(mtu, "mtu") <= MAX_MTU:
            raise ValueError(f"mtu {mtu} is not in {MIN_MTU}..{MAX_MTU}")
        self.mac = parse_mac(mac)
        self.mtu = mtu
        self.pairs = port.pairs
        self.num_queues = 2 * self.pairs + 1
        self.device_queues = range(0, 2 * self.pairs, 2)
        self.features = int(
            Net.MAC
            | Net.STATUS
            | Net.MRG_RXBUF
            | Net.CTRL_VQ
            | Net.CTRL_RX
            | Net.CTRL_RX_EXTRA
            | Net.CTRL_MAC_ADDR
            | Net.GUEST_ANNOUNCE
            | (Net.MTU if mtu is not None else 0)
            | (Net.MQ if self.pairs > 1 else 0)
            | port.offloads & (GUEST_OFFLOADS | HOST_OFFLOADS)
        )
        self._port = port
        self._capture = capture
        # Who saved a state: its own comes back after a pause, another one's after a migration.
        self._origin = os.urandom(8)
        self._arrived = False
        self._table: list[bytes] = []
        self._host: DeviceHost | None = None
        self._link = True
        self._gone = False
        self._accepted = 0
        self._watched: set[int] = set()
        self._scheduled: set[int] = set()
        self._senders = [FrameSender() for _ in range(self.pairs)]
        self._fillers = [
            FrameFiller(
                frames=NET_TURN_FRAMES,
                size=NET_TURN_BYTES,
                backlog=NET_BACKLOG_FRAMES,
                backlog_bytes=NET_BACKLOG_BYTES,
            )
            for _ in range(self.pairs)
        ]
        self._descriptors = [port.descriptor(pair) for pair in range(self.pairs)]
        for sender, filler, fd in zip(self._senders, self._fillers, self._descriptors, strict=True):
            # What is captured goes through Python.
            sender.fd = filler.fd = -1 if capture is not None else fd
        self._forget_driver()
        port.deliver = self._deliver

    def __repr__(self) -> str:
        link = "up" if self.link else "down"
        return f"<NetDevice {format_mac(self.mac)} of {self._port!r}, link {link}>"

    # What its owner uses.

    @property
    def link(self) -> bool:
        """Whether the link is up; can be set, and the driver is told.

        While it is down, frames are dropped both ways. It is down by itself once the port is gone.
        """
        return self._link and not self._gone

    @link.setter
    def link(self, up: bool) -> None:
        if up != self._link:
            self._link = up
            self._apply_link()

    def _set_discard(self) -> None:
        for sender, filler in zip(self._senders, self._fillers, strict=True):
            sender.discard = filler.discard = not self.link

    def _apply_link(self) -> None:
        self._set_discard()
        if self._host is not None:
            self._host.config_changed()

    def announce(self) -> None:
        """Have the driver announce its addresses to the network, as after a migration.

        Nothing happens unless it negotiated VIRTIO_NET_F_GUEST_ANNOUNCE.
        """
        if self._accepted & Net.GUEST_ANNOUNCE and self._host is not None:
            self._announcing = True
            self._host.config_changed()

    def send_rarp(self, address: bytes) -> None:
        """Have the network learn that a driver's address is reached here, by a RARP request.

        It goes out on the first queue pair, as if the driver had sent it, but is not counted.

        Args:
            address: Six bytes.

        Threads: in that of the device's event loop.
        """
        frame = b"\xff" * 6 + address + _RARP + 2 * (address + bytes(4))
        self._emit(0, frame.ljust(_LEAST_FRAME, b"\0"), b"")

    def statistics(self) -> NetStatistics:
        """What was sent and received so far."""
        senders, fillers = self._senders, self._fillers
        return NetStatistics(
            sum(one.frames for one in senders),
            sum(one.sent_bytes for one in senders),
            sum(one.dropped for one in senders),
            sum(one.frames for one in fillers),
            sum(one.received_bytes for one in fillers),
            sum(one.dropped for one in fillers),
            sum(one.filtered for one in fillers),
        )

    # What a host calls.

    def config(self) -> bytes:
        """The configuration space (section 5.1.4)."""
        status = LinkStatus(0)
        if self.link:
            status |= LinkStatus.LINK_UP
        if self._announcing:
            status |= LinkStatus.ANNOUNCE
        return _CONFIG.pack(self._address, status, self.pairs, self.mtu or 0)

    def negotiated(self, features: int) -> None:
        """Take over what the driver accepted."""
        self._accepted = features
        modern = features >> VIRTIO_F_VERSION_1 & 1 or features & Net.MRG_RXBUF
        for sender, filler in zip(self._senders, self._fillers, strict=True):
            sender.set_header_size(_LONG if modern else _SHORT)
            filler.set_header_size(_LONG if modern else _SHORT)
            filler.mergeable = bool(features & Net.MRG_RXBUF)
            filler.offloads = bool(features & GUEST_OFFLOADS)
            sender.offloads = bool(features & HOST_OFFLOADS)
        self._port.negotiated(features)

    def reset(self) -> None:
        """Forget what the driver asked for.

        Features stay until they are negotiated again, which the host tells before a queue starts.
        """
        self._forget_driver()

    def save(self) -> bytes:
        """Addresses, filters and the link; see :class:`Device`."""
        return saved.pack(
            address=saved.text(self._address),
            modes=self._modes,
            table=saved.text(b"".join(self._table)),
            link=self._link,
            link_seen=self.link,
            announcing=self._announcing,
            origin=saved.text(self._origin),
        )

    def restore(self, state: bytes) -> None:
        """Take over addresses and filters, and whether the link is up; see :class:`Device`.

        After a migration the driver announces itself once its queues run; for a driver that has
        the device's address and does not know how to, the device does.
        """
        fields = saved.Fields(state)
        address = fields.take("address", _address_of)
        table = fields.take("table", _table_of)
        modes = fields.take("modes", _modes_of)
        link, seen, announcing = (
            fields.take(name, saved.flag) for name in ("link", "link_seen", "announcing")
        )
        origin = fields.take("origin", lambda value: saved.data(value, len(self._origin)))
        self._address, self._table, self._modes = address, table, modes
        self._announcing = announcing
        self._arrived = origin != self._origin
        self._apply_filter()
        if self._arrived:
            self._link = link
        # What is told before a queue runs is told once one does.
        if self.link != seen or announcing:
            self._apply_link()
        elif self._arrived:
            self._set_discard()

    def _forget_driver(self) -> None:
        self._address = self.mac
        self._announcing = self._arrived = False
        self._modes = dict.fromkeys(_MODES.values(), False)
        # A driver that does not choose receives everything.
        self._modes["promiscuous"] = True
        self._table = []
        self._apply_filter()
        for filler in self._fillers:
            filler.forget()

    def attached(self, host: DeviceHost) -> None:
        """Begin to receive."""
        self._host = host
        self._watched.clear()
        self._scheduled.clear()
        for pair in range(self.pairs):
            host.queue(2 * pair).on_available(partial(self._available, pair))

    def server_of(self, queue: int) -> Server | None:
        """Frames are sent in the compiled core if the port has a descriptor."""
        return self._senders[queue // 2] if queue % 2 else None

    def process(self, queue: int, chain: Chain) -> int:
        """Send a frame, or obey a control command."""
        if queue % 2:
            self._send(queue // 2, chain)
            return 0
        return self._control(chain)

    def fail(self, queue: int, chain: Chain) -> int:
        """Refuse a control command; a frame that cannot be reached is lost."""
        if queue % 2:
            self._senders[queue // 2].count_dropped()
        elif self._is_control(queue) and chain.fault is None and chain.writable.total:
            chain.writable.write(bytes([ACK_ERR]))
            return 1
        return 0

    def stopping(self, queue: int) -> None:
        """Receive no more on a queue; what waits for it is dropped."""
        if queue in self.device_queues:
            self._unwatch(queue // 2)
            self._fillers[queue // 2].forget()
            self._port.running(queue // 2, False)

    def close(self) -> None:
        """Close the port and the capture, once the back-end is closed. May be called again."""
        for sender, filler in zip(self._senders, self._fillers, strict=True):
            sender.fd = filler.fd = -1
        self._descriptors = [-1] * self.pairs
        self._host = None
        self._port.close()
        if self._capture is not None:
            self._capture.close()

    # Receiving.

    def _is_control(self, queue: int) -> bool:
        """Whether the driver has its control queue there (section 5.1.2)."""
        return queue == (2 * self.pairs if self._accepted & Net.MQ else 2)

    def _available(self, pair: int) -> None:
        """The driver has made buffers available; in the thread of the queue."""
        host = self._host
        if host is None:
            return
        if pair and self._is_control(2 * pair):
            self._obey(pair)
        elif host.threaded:
            host.call_soon_threadsafe(partial(self._begin, pair))
        else:
            self._begin(pair)

    def _begin(self, pair: int) -> None:
        """Receive on a queue that has buffers."""
        self._port.running(pair, True)
        if self._arrived:
            self._arrived = False
            if self._accepted & Net.GUEST_ANNOUNCE:
                self.announce()
            elif self._accepted & Net.MAC:
                self.send_rarp(self._address)
        if self._descriptors[pair] >= 0 and not self._fillers[pair].waiting:
            # No translation is requested for a buffer before there is a frame for it.
            self._watch(pair)
        else:
            self._receive(pair)

    def _receive(self, pair: int) -> None:
        """Move frames to the driver, until none is there or it has no buffers."""
        host = self._host
        if host is None:
            return
        self._scheduled.discard(pair)
        filler, fd = self._fillers[pair], self._descriptors[pair]
        failed = 0
        if fd >= 0 and self._capture is not None:
            failed = self._read_captured(pair, fd)
        state = host.queue(2 * pair).fill(filler)
        if state == FILLED_BROKEN or failed:
            self._port_failed(pair, failed or filler.error)
        elif state not in (FILLED_IDLE, FILLED_BUSY):
            # What arrives meanwhile waits in the port, which drops what is too much.
            self._unwatch(pair)
            if state is None:
                # There is no driver, or it has stopped the queue meanwhile.
                filler.forget()
                self._port.running(pair, False)
        elif fd >= 0:
            self._watch(pair)
        elif state == FILLED_BUSY:
            self._schedule(pair)

    def _read_captured(self, pair: int, fd: int) -> int:
        """Read frames to be captured; the errno if that failed."""
        filler, capture = self._fillers[pair], self._capture
        assert capture is not None
        for _ in range(NET_TURN_FRAMES if not filler.waiting else 0):
            try:
                data = os.read(fd, _LONG + _FRAME_MOST + 1)
            except BlockingIOError:
                break
            except OSError as error:
                return error.errno or errno.EIO
            if not data:
                return errno.EPIPE
            if filler.give(data[_LONG:], data[:_LONG]):
                capture.write(data[_LONG:], sent=False)
        return 0

    def _deliver(self, pair: int, frame: bytes) -> bool:
        """Take a frame of the port's for the driver; as `Port.deliver`."""
        if not self._fillers[pair].give(frame):
            return False
        if self._capture is not None:
            self._capture.write(frame, sent=False)
        self._schedule(pair)
        return True

    def _schedule(self, pair: int) -> None:
        # Not at once: the caller may hold the lock of another queue.
        if self._host is not None and pair not in self._scheduled:
            self._scheduled.add(pair)
            self._host.call_soon_threadsafe(partial(self._receive, pair))

    def _watch(self, pair: int) -> None:
        if self._host is not None and pair not in self._watched:
            self._host.add_reader(self._descriptors[pair], partial(self._receive, pair))
            self._watched.add(pair)

    def _unwatch(self, pair: int) -> None:
        if self._host is not None and pair in self._watched:
            self._watched.discard(pair)
            self._host.remove_reader(self._descriptors[pair])

    def _port_failed(self, pair: int, error: int) -> None:
        self._unwatch(pair)
        if not self._port.failed(error):
            assert self._host is not None
            self._host.call_later(NET_RETRY, partial(self._receive, pair))
        elif not self._gone:
            for one in range(self.pairs):
                self._unwatch(one)
            self._descriptors = [-1] * self.pairs
            for filler in self._fillers:
                filler.fd = -1
            self._gone = True
            self._apply_link()

    # Sending.

    def _send(self, pair: int, chain: Chain) -> None:
        sender = self._senders[pair]
        size = chain.readable.total - sender.header_size
        sent = False
        if _ETHERNET <= size <= _FRAME_MOST:
            data = chain.readable.read()
            header = data[: sender.header_size] if sender.offloads else b""
            sent = self._emit(pair, data[sender.header_size :], header)
        if sent:
            sender.count(size)
        else:
            sender.count_dropped()

    def _emit(self, pair: int, frame: bytes, header: bytes) -> bool:
        """Record a frame and hand it to the port; whether that took it."""
        if not self.link:
            return False
        if self._capture is not None:
            self._capture.write(frame, sent=True)
        if self._descriptors[pair] >= 0:
            return _write(self._descriptors[pair], header.ljust(_LONG, b"\0") + frame)
        return self._port.send(pair, frame)

    # Control commands (section 5.1.6.5).

    def _obey(self, pair: int) -> None:
        """Serve the control queue where it is one of those that the device owns."""
        assert self._host is not None
        queue = self._host.queue(2 * pair)
        while (chain := queue.take()) is not None:
            try:
                written = self._control(chain)
            except GuestioError:
                written = 0
            queue.complete(chain, written)

    def _control(self, chain: Chain) -> int:
        """Obey a command and acknowledge it; the bytes written."""
        ack = ACK_ERR
        if 2 <= chain.readable.total <= NET_CONTROL_BYTES:
            command = chain.readable.read()
            obey = _COMMANDS.get((command[0], command[1]))
            if obey is not None and obey(self, command[1], command[2:]):
                ack = ACK_OK
        if not chain.writable.total:
            return 0
        chain.writable.write(bytes([ack]))
        return 1

    def _set_mode(self, command: int, data: bytes) -> bool:
        wanted = Net.CTRL_RX if command <= 1 else Net.CTRL_RX_EXTRA
        if not self._accepted & wanted or len(data) != 1 or data[0] > 1:
            return False
        self._modes[_MODES[command]] = bool(data[0])
        self._apply_filter()
        return True

    def _set_table(self, command: int, data: bytes) -> bool:
        """Take over the addresses to receive: of hosts, and of groups."""
        if not self._accepted & Net.CTRL_RX:
            return False
        addresses: list[bytes] = []
        at = 0
        for _ in range(2):
            if len(data) - at < 4:
                return False
            end = at + 4 + 6 * int.from_bytes(data[at : at + 4], "little")
            if end > len(data):
                return False
            addresses += (data[i : i + 6] for i in range(at + 4, end, 6))
            at = end
        if at != len(data):
            return False
        self._table = addresses
        self._apply_filter()
        return True

    def _set_address(self, command: int, data: bytes) -> bool:
        if not self._accepted & Net.CTRL_MAC_ADDR or len(data) != 6 or data[0] & 1:
            return False
        self._address = data
        self._apply_filter()
        return True

    def _announced(self, command: int, data: bytes) -> bool:
        if not self._accepted & Net.GUEST_ANNOUNCE or data:
            return False
        self._announcing = False
        return True

    def _set_pairs(self, command: int, data: bytes) -> bool:
        """Accept a number of queue pairs: the driver uses no more than it says.

        Which it uses is known by which receive queues it fills.
        """
        pairs = int.from_bytes(data, "little")
        return bool(self._accepted & Net.MQ) and len(data) == 2 and 1 <= pairs <= self.pairs

    def _apply_filter(self) -> None:
        modes, table = self._modes.copy(), self._table
        if len(table) > NET_FILTER_ADDRESSES:
            # A device may receive more than it was asked to.
            modes["promiscuous"], table = True, []
        for filler in self._fillers:
            filler.set_filter(self._address, table=b"".join(table), **modes)


_MODES: Final = {
    0: "promiscuous",
    1: "all_multicast",
    2: "all_unicast",
    3: "no_multicast",
    4: "no_unicast",
    5: "no_broadcast",
}
"""Commands of class RX, and what they switch."""


def _modes_of(value: object) -> dict[str, bool]:
    """The switches of a saved state."""
    if not isinstance(value, dict) or value.keys() != set(_MODES.values()):
        raise ValueError("other switches than the device has")
    return {name: saved.flag(value[name]) for name in _MODES.values()}


def _address_of(value: object) -> bytes:
    """The address of a saved state: as a driver may set it."""
    address = saved.data(value, 6)
    if len(address) != 6 or address[0] & 1:
        raise ValueError(f"{address.hex(':')} is no address of a single host")
    return address


def _table_of(value: object) -> list[bytes]:
    """The addresses of a saved state; a control command has room for them."""
    table = saved.data(value, NET_CONTROL_BYTES)
    if len(table) % 6:
        raise ValueError(f"{len(table)} bytes of addresses")
    return [table[at : at + 6] for at in range(0, len(table), 6)]


_Obey = Callable[[NetDevice, int, bytes], bool]
_COMMANDS: Final[dict[tuple[int, int], _Obey]] = {
    **{(Class.RX, command): NetDevice._set_mode for command in _MODES},
    (Class.MAC, 0): NetDevice._set_table,
    (Class.MAC, 1): NetDevice._set_address,
    (Class.ANNOUNCE, 0): NetDevice._announced,
    (Class.MQ, 0): NetDevice._set_pairs,
}


def _write(fd: int, data: bytes) -> bool:
    try:
        os.write(fd, data)
    except OSError:
        return False
    return True


def parse_mac(mac: str | bytes | None) -> bytes:
    """The six bytes of an address; of a random one, for None.

    Raises:
        ValueError: It is no address, or one of a group.
    """
    if mac is None:
        # Locally administered, of a single host.
        return b"\x52\x54\x00" + os.urandom(3)
    if isinstance(mac, str):
        parts = mac.split(":")
        try:
            if len(parts) != 6 or any(len(part) != 2 for part in parts):
                raise ValueError
            address = bytes(int(part, 16) for part in parts)
        except ValueError:
            raise ValueError(f"{mac!r} is no MAC address such as 52:54:00:12:34:56") from None
    else:
        address = bytes(mac)
    if len(address) != 6:
        raise ValueError(f"a MAC address has 6 bytes, not {len(address)}")
    if address[0] & 1 or not any(address):
        raise ValueError(f"{format_mac(address)} is the address of a group, or none")
    return address


def format_mac(address: bytes) -> str:
    """An address for people."""
    return address.hex(":")
