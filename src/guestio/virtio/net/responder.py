"""A network in a bottle: a host that answers by itself.

Packet formats are dpkt's.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Any, Final

from guestio.budgets import NET_LEASES
from guestio.errors import DeviceError
from guestio.virtio.net.port import Port

_BROADCAST: Final = b"\xff" * 6
_ECHO_PORT: Final = 7
_DHCP_SERVER, _DHCP_CLIENT = 67, 68
_DISCOVER, _OFFER, _REQUEST, _ACK, _NAK, _RELEASE, _INFORM = 1, 2, 3, 5, 6, 7, 8
_ANY: Final = bytes(4)
LEASE_SECONDS: Final = 3600


class Responder(Port):
    """Answers ARP, ICMP echo, UDP echo (port 7) and DHCP for one IPv4 address.

    DHCP gives away the other addresses of the network, and names the responder as the router.
    All else is dropped, fragments and VLANs too. Nothing leaves the process.

    Args:
        address: Its address and network, such as ``"10.0.2.1/24"``; a prefix of up to 30 bits.
        pairs: Queue pairs; it answers on that of the request.

    Raises:
        DeviceError: dpkt is not installed (``pip install guestio[net]``).
        ValueError: That is no host's address.

    Attributes:
        interface: Its address and network.
        mac: Its MAC address.
        answered: Packets that it answered.
        malformed: Packets that it could not read.
    """

    def __init__(self, address: str, *, pairs: int = 1) -> None:
        self._dpkt: Any = _load()
        try:
            self.interface = ipaddress.IPv4Interface(address)
        except ValueError as error:
            raise ValueError(f"{address!r} is no IPv4 address with a prefix: {error}") from None
        network = self.interface.network
        if (
            "/" not in address
            or network.prefixlen > 30
            or self.interface.ip
            in (
                network.network_address,
                network.broadcast_address,
            )
        ):
            raise ValueError(f"{address!r} is no host in a network, such as 10.0.2.1/24")
        self.pairs = pairs
        self._ip = self.interface.ip.packed
        self.mac = b"\x52\x55" + self._ip
        self.answered = self.malformed = 0
        self._leases: dict[bytes, bytes] = {}

    def __repr__(self) -> str:
        return f"<Responder {self.interface}: {self.answered} answered>"

    def send(self, pair: int, frame: bytes) -> bool:
        """Answer a frame of the driver, if it asks for an answer."""
        # Most of what a flood consists of ends here.
        if frame[:6] != self.mac and not frame[0] & 1:
            return True
        kind = frame[12:14]
        try:
            if kind == b"\x08\x00":
                answer = self._answer_ip(frame)
            elif kind == b"\x08\x06":
                answer = self._answer_arp(frame)
            else:
                return True
        except (self._dpkt.Error, struct.error, ValueError, IndexError, TypeError):
            self.malformed += 1
            return False
        if answer is not None:
            self.answered += 1
            self.deliver(pair, answer)
        return True

    def _frame(self, to: bytes, kind: int, data: Any) -> bytes:
        return bytes(self._dpkt.ethernet.Ethernet(dst=to, src=self.mac, type=kind, data=data))

    def _answer_arp(self, frame: bytes) -> bytes | None:
        arp = self._dpkt.arp.ARP(frame[14:])
        if (arp.op, arp.pro, arp.hln, arp.pln, arp.tpa) != (1, 0x0800, 6, 4, self._ip):
            return None
        answer = self._dpkt.arp.ARP(op=2, sha=self.mac, spa=self._ip, tha=arp.sha, tpa=arp.spa)
        return self._frame(arp.sha, 0x0806, answer)

    def _answer_ip(self, frame: bytes) -> bytes | None:
        dpkt = self._dpkt
        packet = dpkt.ip.IP(frame[14:])
        header = frame[14 : 14 + packet.hl * 4]
        if packet.v != 4 or dpkt.in_cksum(header) or packet.mf or packet.offset:
            return None
        data = packet.data
        if isinstance(data, dpkt.udp.UDP) and data.dport == _DHCP_SERVER:
            return self._answer_dhcp(frame[6:12], data)
        if packet.dst != self._ip:
            return None
        if isinstance(data, dpkt.icmp.ICMP) and (data.type, data.code) == (8, 0):
            body = bytes(packet.data)
            if dpkt.in_cksum(body):
                return None
            data = dpkt.icmp.ICMP(type=0, data=body[4:])
        elif isinstance(data, dpkt.udp.UDP) and data.dport == _ECHO_PORT:
            data = dpkt.udp.UDP(sport=_ECHO_PORT, dport=data.sport, data=bytes(data.data))
            data.ulen = len(data)
        else:
            return None
        return self._frame(frame[6:12], 0x0800, self._packet(packet.src, packet.p, data))

    def _packet(self, to: bytes, protocol: int, data: Any) -> Any:
        packet = self._dpkt.ip.IP(src=self._ip, dst=to, p=protocol, ttl=64, data=data)
        packet.len = len(packet)
        return packet

    def _answer_dhcp(self, client: bytes, datagram: Any) -> bytes | None:
        dhcp = self._dpkt.dhcp
        message = dhcp.DHCP(bytes(datagram.data))
        if message.op != 1 or message.hln != 6:
            return None
        options = {code: bytes(value) for code, value in message.opts}
        kind = options.get(dhcp.DHCP_OPT_MSGTYPE, b"\0")[0]
        mac = bytes(message.chaddr[:6])
        wanted = options.get(dhcp.DHCP_OPT_REQ_IP)
        if options.get(dhcp.DHCP_OPT_SERVER_ID, self._ip) != self._ip:
            # It has chosen another server.
            return None
        if kind == _RELEASE:
            self._leases.pop(mac, None)
            return None
        current = message.ciaddr.to_bytes(4, "big")
        yours = _ANY
        if kind == _DISCOVER:
            lease, reply = self._lease(mac), _OFFER
            yours = lease
        elif kind == _REQUEST:
            asked = wanted or current
            yours = self._lease(mac)
            reply = _ACK if asked == yours else _NAK
        elif kind == _INFORM:
            reply = _ACK
        else:
            return None
        answer = dhcp.DHCP(
            op=2,
            xid=message.xid,
            flags=message.flags,
            chaddr=mac,
            ciaddr=message.ciaddr if reply == _ACK else 0,
            yiaddr=0 if reply == _NAK else int.from_bytes(yours, "big"),
            siaddr=0 if reply == _NAK else int.from_bytes(self._ip, "big"),
            giaddr=message.giaddr,
            opts=self._options(reply, lease=kind != _INFORM),
        )
        to, mac_to = b"\xff" * 4, _BROADCAST
        if reply != _NAK and current != _ANY:
            to, mac_to = current, client
        udp = self._dpkt.udp.UDP(sport=_DHCP_SERVER, dport=_DHCP_CLIENT, data=bytes(answer))
        udp.ulen = len(udp)
        return self._frame(mac_to, 0x0800, self._packet(to, 17, udp))

    def _options(self, reply: int, *, lease: bool) -> list[tuple[int, bytes]]:
        dhcp = self._dpkt.dhcp
        options = [
            (dhcp.DHCP_OPT_MSGTYPE, bytes([reply])),
            (dhcp.DHCP_OPT_SERVER_ID, self._ip),
        ]
        if reply == _NAK:
            return options
        if lease:
            options.append((dhcp.DHCP_OPT_LEASE_SEC, struct.pack(">I", LEASE_SECONDS)))
        return [
            *options,
            (dhcp.DHCP_OPT_NETMASK, self.interface.network.netmask.packed),
            (dhcp.DHCP_OPT_ROUTER, self._ip),
        ]

    def _lease(self, mac: bytes) -> bytes:
        """The address of a client, the oldest client's once all are given away."""
        if mac not in self._leases:
            network = self.interface.network
            most = min(network.num_addresses - 3, NET_LEASES)
            if len(self._leases) >= most:
                self._leases.pop(next(iter(self._leases)))
            taken = set(self._leases.values()) | {self._ip}
            # At most NET_LEASES + 1 of these are taken.
            self._leases[mac] = next(
                host.packed for host in network.hosts() if host.packed not in taken
            )
        return self._leases[mac]


def _load() -> Any:
    """The library, with the formats that are used."""
    try:
        import dpkt  # type: ignore[import-untyped]
    except ImportError:
        raise DeviceError(
            "the responder needs the package dpkt: pip install 'guestio[net]'"
        ) from None
    return dpkt
