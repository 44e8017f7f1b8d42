"""The responder: a host that answers by itself, whatever it is sent."""

from __future__ import annotations

import struct

import dpkt  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestio.budgets import NET_LEASES
from guestio.virtio.net import Responder

GUEST = b"\x52\x54\0\0\0\x09"
ALL = b"\xff" * 6
ROUTER, HOST, OTHER = bytes([10, 0, 2, 1]), bytes([10, 0, 2, 9]), bytes([10, 0, 2, 77])


class Net:
    """A responder and what it answered."""

    def __init__(self, address: str = "10.0.2.1/24") -> None:
        self.responder = Responder(address)
        self.answers: list[bytes] = []
        self.responder.deliver = self._take

    def _take(self, pair: int, frame: bytes) -> bool:
        self.answers.append(frame)
        return True

    def ask(self, data: object, kind: int = 0x0800, to: bytes | None = None) -> bytes | None:
        """The answer to a packet, or None."""
        self.responder.send(
            0,
            bytes(
                dpkt.ethernet.Ethernet(
                    dst=to or self.responder.mac, src=GUEST, type=kind, data=data
                )
            ),
        )
        return self.answers.pop() if self.answers else None


def ip(data: object, protocol: int, to: bytes = ROUTER, **more: int) -> object:
    packet = dpkt.ip.IP(src=HOST, dst=to, p=protocol, data=data, **more)
    packet.len = len(packet)
    return packet


def echo(size: int = 56) -> object:
    return dpkt.icmp.ICMP(type=8, data=dpkt.icmp.ICMP.Echo(id=5, seq=6, data=bytes(range(size))))


def udp(port: int, data: bytes) -> object:
    datagram = dpkt.udp.UDP(sport=4000, dport=port, data=data)
    datagram.ulen = len(datagram)
    return datagram


def test_arp_is_answered_for_its_address_alone() -> None:
    net = Net()
    for target, answered in ((ROUTER, True), (OTHER, False)):
        question = dpkt.arp.ARP(op=1, sha=GUEST, spa=HOST, tha=bytes(6), tpa=target)
        answer = net.ask(question, 0x0806, ALL)
        assert (answer is not None) == answered
        if answer is not None:
            frame = dpkt.ethernet.Ethernet(answer)
            assert (frame.dst, frame.src) == (GUEST, net.responder.mac)
            assert (frame.arp.op, frame.arp.sha, frame.arp.spa) == (2, net.responder.mac, ROUTER)
            assert (frame.arp.tha, frame.arp.tpa) == (GUEST, HOST)


@pytest.mark.parametrize("size", [0, 1, 56, 200])
def test_pings_are_answered_with_right_sums(size: int) -> None:
    answer = Net().ask(ip(echo(size), 1))
    assert answer is not None
    packet = dpkt.ethernet.Ethernet(answer).data
    assert dpkt.in_cksum(answer[14:34]) == 0
    assert dpkt.in_cksum(answer[34:]) == 0
    assert (packet.src, packet.dst, packet.icmp.type) == (ROUTER, HOST, 0)
    assert (packet.icmp.data.id, packet.icmp.data.seq) == (5, 6)
    assert packet.icmp.data.data == bytes(range(size))


def test_what_is_not_for_it_has_no_answer() -> None:
    net = Net()
    assert net.ask(ip(echo(), 1, OTHER)) is None
    assert net.ask(ip(echo(), 1), to=b"\x02" + bytes(5)) is None
    assert net.ask(ip(udp(53, b"x"), 17)) is None
    assert net.ask(ip(b"tcp", 6)) is None
    assert net.ask(ip(echo(), 1, mf=1)) is None
    assert net.ask(b"whatever", 0x88B5) is None
    assert net.ask(b"\0\1\x08\0" + bytes(ip(echo(), 1)), 0x8100) is None  # type: ignore[call-overload]
    assert net.responder.answered == 0


def test_damaged_packets_have_no_answer() -> None:
    net = Net()
    good = bytes(ip(echo(), 1))  # type: ignore[call-overload]
    assert net.ask(good) is not None
    for at in (1, 8, 10, 13, 20, 22, 40):
        assert net.ask(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :]) is None, at


def test_datagrams_to_the_echo_port_come_back() -> None:
    answer = Net().ask(ip(udp(7, b"hello"), 17))
    assert answer is not None
    packet = dpkt.ethernet.Ethernet(answer).data
    assert (packet.udp.sport, packet.udp.dport, packet.udp.data) == (7, 4000, b"hello")
    sum_of = packet.udp.sum
    packet.udp.sum = packet.sum = 0
    assert dpkt.ip.IP(bytes(packet)).udp.sum == sum_of


class Client:
    """A DHCP client."""

    def __init__(self, net: Net, number: int = 1) -> None:
        self.net, self.mac = net, b"\x52\x54\0\1" + struct.pack(">H", number)

    def ask(self, kind: int, *options: tuple[int, bytes], current: bytes = bytes(4)) -> object:
        message = dpkt.dhcp.DHCP(
            op=1,
            xid=0x1234,
            chaddr=self.mac,
            ciaddr=int.from_bytes(current, "big"),
            opts=[(53, bytes([kind])), *options],
        )
        datagram = dpkt.udp.UDP(sport=68, dport=67, data=bytes(message))
        datagram.ulen = len(datagram)
        answer = self.net.ask(ip(datagram, 17, b"\xff" * 4), to=ALL)
        if answer is None:
            return None
        packet = dpkt.ethernet.Ethernet(answer).data
        assert (packet.src, packet.udp.sport, packet.udp.dport) == (ROUTER, 67, 68)
        reply = dpkt.dhcp.DHCP(packet.udp.data)
        assert (reply.op, reply.xid, reply.chaddr[:6]) == (2, 0x1234, self.mac)
        return reply

    def get(self) -> bytes:
        """Its address."""
        offer = self.ask(1)
        address = offer.yiaddr.to_bytes(4, "big")  # type: ignore[attr-defined]
        accepted = self.ask(3, (50, address), (54, ROUTER))
        assert dict(accepted.opts)[53] == b"\5"  # type: ignore[attr-defined]
        assert accepted.yiaddr.to_bytes(4, "big") == address  # type: ignore[attr-defined]
        return address


def test_a_client_gets_an_address_a_mask_and_a_router() -> None:
    net = Net()
    client = Client(net)
    offer = client.ask(1)
    options = dict(offer.opts)  # type: ignore[attr-defined]
    assert options[53] == b"\2"
    assert (options[1], options[3], options[54]) == (b"\xff\xff\xff\0", ROUTER, ROUTER)
    assert client.get() == bytes([10, 0, 2, 2]) == client.get()
    assert Client(net, 2).get() == bytes([10, 0, 2, 3])
    # Renewed, refused, asked of another server, released and given away again.
    renewed = client.ask(3, current=bytes([10, 0, 2, 2]))
    assert dict(renewed.opts)[53] == b"\5"  # type: ignore[attr-defined]
    refused = client.ask(3, (50, OTHER))
    assert dict(refused.opts)[53] == b"\6"  # type: ignore[attr-defined]
    assert client.ask(3, (50, OTHER), (54, OTHER)) is None
    informed = client.ask(8, current=OTHER)
    assert (informed.yiaddr, dict(informed.opts)[53]) == (0, b"\5")  # type: ignore[attr-defined]
    assert client.ask(7) is None
    assert Client(net, 3).get() == bytes([10, 0, 2, 2])


def test_addresses_given_away_are_bounded() -> None:
    small = Net("10.0.2.1/30")
    assert Client(small, 1).get() == Client(small, 2).get() == bytes([10, 0, 2, 2])
    large = Net("10.0.2.1/8")
    addresses = {Client(large, number).get() for number in range(NET_LEASES + 20)}
    assert len(addresses) == NET_LEASES
    assert ROUTER not in addresses


@given(st.binary(max_size=400), st.sampled_from([0x0800, 0x0806, 0x86DD]))
def test_nothing_harms_it(data: bytes, kind: int) -> None:
    net = Net()
    net.ask(data, kind)
    assert net.ask(ip(echo(), 1)) is not None


@given(st.data())
def test_nothing_in_a_datagram_harms_it(data: st.DataObject) -> None:
    net = Net()
    message = bytearray(dpkt.dhcp.DHCP(op=1, chaddr=GUEST, opts=[(53, b"\1"), (50, HOST)]).pack())
    for _ in range(data.draw(st.integers(0, 6))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    size = data.draw(st.integers(0, len(message)))
    net.ask(ip(udp(67, bytes(message[:size])), 17, b"\xff" * 4), to=ALL)
    assert net.ask(ip(echo(), 1)) is not None


@pytest.mark.parametrize(
    "address",
    [
        "",
        "10.0.2.1",
        "10.0.2.0/24",
        "10.0.2.255/24",
        "10.0.2.1/31",
        "10.0.2.1/99",
        "x/24",
        "::1/64",
    ],
)
def test_an_address_must_be_a_hosts(address: str) -> None:
    with pytest.raises(ValueError, match=r"no host|no IPv4"):
        Responder(address)
