"""Framing and fd ownership on real socket pairs."""

from __future__ import annotations

import array
import contextlib
import gc
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guestio.errors import ProtocolError
from guestio.peer.foreign import received_fds
from guestio.vhost_user.channel import Channel, Message, PeerGoneError
from guestio.vhost_user.messages import (
    MAX_PAYLOAD_SIZE,
    U64,
    Config,
    FrontendRequest,
    Header,
    encode_ack,
    encode_message,
)
from tests.kit.closing import settled_closes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KICK = encode_message(FrontendRequest.SET_VRING_KICK, U64(1))
OWNER = encode_message(FrontendRequest.SET_OWNER)


def open_fds() -> list[str]:
    """Return what every open fd refers to, without the one that lists them."""
    settled_closes()
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(f"{fd.name} {fd.readlink()}")
    return sorted(entry for entry in found if "/proc/" not in entry)


@pytest.fixture(autouse=True)
def no_fd_leak() -> Iterator[None]:
    gc.collect()  # what others left in cycles may go at any moment
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    with Channel(ours) as channel, theirs:
        yield channel, theirs


@pytest.fixture
def plain_pair() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    with Channel(ours, with_fds=False) as channel, theirs:
        yield channel, theirs


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def send_fds(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    assert socket.send_fds(sock, [data], list(fds)) == len(data)


def same_file(left: int, right: int) -> bool:
    return os.path.samestat(os.fstat(left), os.fstat(right))


def test_message_arrives_with_its_fds_in_order(
    pair: tuple[Channel, socket.socket], pipe: tuple[int, int]
) -> None:
    channel, peer = pair
    send_fds(peer, KICK, [pipe[0], pipe[1], pipe[0]])
    message = channel.recv()
    assert message is not None
    assert message.header == Header(FrontendRequest.SET_VRING_KICK, 1, 8)
    assert message.payload == U64(1).encode()
    assert message.fd_count == 3
    first = message.take_fd()
    rest = message.take_fds()
    assert [same_file(fd, pipe[end]) for fd, end in zip([first, *rest], (0, 1, 0), strict=True)]
    assert not any(os.get_inheritable(fd) for fd in [first, *rest])
    assert message.fd_count == 0
    with pytest.raises(IndexError):
        message.take_fd()
    message.close()
    for fd in [first, *rest]:
        os.close(fd)


def test_fds_that_are_not_taken_are_closed(
    pair: tuple[Channel, socket.socket], pipe: tuple[int, int]
) -> None:
    channel, peer = pair
    before = open_fds()
    for _ in range(3):
        send_fds(peer, KICK, pipe)
    with channel.recv() as message:
        assert message.fd_count == 2
        assert len(open_fds()) == len(before) + 2
    assert open_fds() == before
    message = channel.recv()
    message.close()
    message.close()
    assert open_fds() == before
    assert channel.recv().fd_count == 2
    assert open_fds() == before, "a dropped message closes its fds"


def test_nothing_there_is_none(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    assert channel.recv() is None
    peer.sendall(KICK[:5])
    assert channel.recv() is None
    assert channel.recv() is None
    peer.sendall(KICK[5:])
    assert channel.recv().request == FrontendRequest.SET_VRING_KICK
    assert channel.recv() is None


@pytest.mark.parametrize("with_fds", [True, False])
def test_byte_by_byte(with_fds: bool) -> None:
    ours, theirs = socket.socketpair()
    config = encode_message(FrontendRequest.SET_CONFIG, Config(0, b"abcdef"), need_reply=True)
    stream = KICK + OWNER + config + OWNER
    received = []
    with Channel(ours, with_fds=with_fds) as channel, theirs:
        for position in range(len(stream)):
            theirs.sendall(stream[position : position + 1])
            if (message := channel.recv()) is not None:
                received.append((position + 1, message.request, message.payload))
    ends = [len(KICK), len(KICK + OWNER), len(KICK + OWNER + config), len(stream)]
    assert [end for end, _, _ in received] == ends
    assert [request for _, request, _ in received] == [12, 3, 25, 3]
    assert Config.decode(received[2][2]) == Config(0, b"abcdef")


def test_fds_may_come_with_any_part_of_the_header(
    pair: tuple[Channel, socket.socket], pipe: tuple[int, int]
) -> None:
    channel, peer = pair
    peer.sendall(KICK[:4])
    send_fds(peer, KICK[4:8], [pipe[0]])
    assert channel.recv() is None
    send_fds(peer, KICK[8:], [pipe[1]])
    with channel.recv() as message:
        assert message.fd_count == 2


def test_queued_messages_keep_their_own_fds(
    pair: tuple[Channel, socket.socket], pipe: tuple[int, int]
) -> None:
    channel, peer = pair
    peer.sendall(OWNER)
    send_fds(peer, KICK, [pipe[0]])
    peer.sendall(OWNER + OWNER)
    send_fds(peer, KICK, [pipe[0], pipe[1]])
    counts = []
    while (message := channel.recv()) is not None:
        with message:
            counts.append((message.request, message.fd_count))
    assert counts == [(3, 0), (12, 1), (3, 0), (3, 0), (12, 2)]


def test_many_small_messages_are_read_ahead(plain_pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = plain_pair
    peer.sendall(b"".join(encode_ack(1, value) for value in range(3000)))
    values = []
    while (message := channel.recv()) is not None:
        values.append(U64.decode(message.payload).value)
    assert values == list(range(3000))


def test_fds_on_a_channel_without_fds_end_it(
    plain_pair: tuple[Channel, socket.socket], pipe: tuple[int, int]
) -> None:
    channel, peer = plain_pair
    send_fds(peer, KICK, pipe)
    with pytest.raises(ProtocolError, match="channel without fds"):
        channel.recv()


def test_fds_with_the_payload_end_the_channel(
    pair: tuple[Channel, socket.socket], pipe: tuple[int, int]
) -> None:
    channel, peer = pair
    before = open_fds()
    send_fds(peer, KICK[:12], [pipe[0]])
    send_fds(peer, KICK[12:], [pipe[1]])
    with pytest.raises(ProtocolError, match="beside its payload"):
        channel.recv()
    with pytest.raises(ProtocolError, match="beside its payload"):
        channel.recv()
    with pytest.raises(ProtocolError, match="beside its payload"):
        channel.send(OWNER)
    assert open_fds() == before, "fds are closed without waiting for close()"


@pytest.mark.parametrize("count", [9, 100, 253])
def test_too_many_fds_end_the_channel(
    pair: tuple[Channel, socket.socket], pipe: tuple[int, int], count: int
) -> None:
    channel, peer = pair
    send_fds(peer, KICK, [pipe[0]] * count)
    with pytest.raises(ProtocolError, match=f"{count} fds, at most 8"):
        channel.recv()


def test_too_many_fds_in_pieces_end_the_channel(
    pair: tuple[Channel, socket.socket], pipe: tuple[int, int]
) -> None:
    channel, peer = pair
    send_fds(peer, KICK[:4], [pipe[0]] * 8)
    send_fds(peer, KICK[4:], [pipe[0]])
    with pytest.raises(ProtocolError, match="9 fds"):
        channel.recv()


def test_without_memory_for_fds_they_are_closed(
    pair: tuple[Channel, socket.socket], pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    channel, theirs = pair
    calls = []

    def short(control: list[tuple[int, int, bytes]]) -> list[int]:
        calls.append(received_fds(control))
        if len(calls) == 1:
            raise MemoryError
        return calls[1]

    monkeypatch.setattr("guestio.peer.channel.received_fds", short)
    socket.send_fds(theirs, [KICK], list(pipe))
    with pytest.raises(MemoryError):
        channel.recv(1)
    settled_closes()
    assert len(calls[0]) == 2
    for fd in calls[0]:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_eight_fds_are_fine(pair: tuple[Channel, socket.socket], pipe: tuple[int, int]) -> None:
    channel, peer = pair
    send_fds(peer, KICK, [pipe[0]] * 8)
    with channel.recv() as message:
        assert message.fd_count == 8


def test_other_ancillary_data_ends_the_channel(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    with socket.socket(fileno=os.dup(channel.fileno())) as alias:
        alias.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    credentials = struct.pack("=iII", os.getpid(), os.getuid(), os.getgid())
    peer.sendmsg([KICK], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)])
    with pytest.raises(ProtocolError, match="ancillary"):
        channel.recv()


def test_pidfds_that_the_kernel_adds_are_not_leaked(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    so_passpidfd = 76
    with socket.socket(fileno=os.dup(channel.fileno())) as alias:
        try:
            alias.setsockopt(socket.SOL_SOCKET, so_passpidfd, 1)
        except OSError:
            pytest.skip("this kernel has no SO_PASSPIDFD")
    peer.sendall(KICK)
    with pytest.raises(ProtocolError, match="ancillary"):
        channel.recv()


def test_eof_between_messages(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    peer.sendall(OWNER)
    peer.close()
    assert channel.recv().request == FrontendRequest.SET_OWNER
    for _ in range(2):
        with pytest.raises(PeerGoneError):
            channel.recv()


@pytest.mark.parametrize("size", range(1, len(KICK)))
def test_eof_inside_a_message(size: int) -> None:
    ours, theirs = socket.socketpair()
    ends = os.pipe()
    with Channel(ours) as channel:
        send_fds(theirs, KICK[:size], ends)
        theirs.close()
        with pytest.raises(ProtocolError, match=f"after {size} bytes"):
            channel.recv()
    for end in ends:
        os.close(end)


def test_close_drops_an_unfinished_message(
    pair: tuple[Channel, socket.socket], pipe: tuple[int, int]
) -> None:
    channel, peer = pair
    before = open_fds()
    send_fds(peer, KICK[:15], pipe)
    assert channel.recv() is None
    assert len(open_fds()) == len(before) + 2
    channel.close()
    assert len(open_fds()) == len(before) - 1
    channel.close()
    assert channel.fileno() == -1
    with pytest.raises(ValueError, match="closed"):
        channel.recv()
    with pytest.raises(ValueError, match="closed"):
        channel.send(OWNER)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (Header(12, 1, MAX_PAYLOAD_SIZE + 1), "limit"),
        (Header(12, 1, 2**32 - 1), "limit"),
        (Header(12, 0, 8), "version"),
    ],
)
def test_bad_header_ends_the_channel(
    pair: tuple[Channel, socket.socket], pipe: tuple[int, int], header: Header, match: str
) -> None:
    channel, peer = pair
    send_fds(peer, header.encode(), pipe)
    peer.sendall(OWNER)
    for _ in range(2):
        with pytest.raises(ProtocolError, match=match):
            channel.recv()


def test_recv_waits_for_the_rest(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    peer.sendall(KICK[:13])

    def finish() -> None:
        time.sleep(0.05)
        peer.sendall(KICK[13:])

    thread = threading.Thread(target=finish)
    thread.start()
    message = channel.recv(timeout=30)
    thread.join()
    assert message.request == FrontendRequest.SET_VRING_KICK
    start = time.monotonic()
    assert channel.recv(timeout=0.05) is None
    assert 0.04 < time.monotonic() - start < 10


@pytest.mark.timeout(30)
def test_a_peer_that_makes_the_socket_blocking_cannot_hang_us() -> None:
    ours, theirs = socket.socketpair()
    with Channel(ours, send_timeout=0.1) as channel, theirs:
        os.set_blocking(channel.fileno(), True)
        assert channel.recv() is None
        with pytest.raises(ProtocolError, match="did not read"):
            channel.send(bytes(1 << 22))


def test_messages_and_fds_go_out(
    pair: tuple[Channel, socket.socket], pipe: tuple[int, int]
) -> None:
    channel, peer = pair
    with Channel(peer.dup()) as other:
        channel.send(KICK, pipe)
        channel.send(OWNER)
        with other.recv() as message:
            assert message.fd_count == 2
            assert message.payload == U64(1).encode()
        assert other.recv().fd_count == 0


def test_a_long_send_is_completed_with_fds_only_once(pipe: tuple[int, int]) -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    data = os.urandom(1 << 20)
    received = bytearray()
    fds = array.array("i")

    def read() -> None:
        while len(received) < len(data):
            time.sleep(0.001)
            chunk, control, _, _ = theirs.recvmsg(65536, socket.CMSG_SPACE(64))
            received.extend(chunk)
            for _, _, content in control:
                fds.frombytes(content)

    with Channel(ours, send_timeout=60) as channel, theirs:
        thread = threading.Thread(target=read)
        thread.start()
        channel.send(data, pipe)
        thread.join()
    assert bytes(received) == data
    assert len(fds) == 2
    for fd in fds:
        os.close(fd)


def test_a_peer_that_does_not_read_cannot_hang_us(pipe: tuple[int, int]) -> None:
    ours, theirs = socket.socketpair()
    with Channel(ours, send_timeout=0.1) as channel, theirs:
        start = time.monotonic()
        with pytest.raises(ProtocolError, match="did not read"):
            channel.send(bytes(1 << 22), pipe)
        assert time.monotonic() - start < 10
        with pytest.raises(ProtocolError, match="did not read"):
            channel.send(OWNER)


def test_sending_to_a_peer_that_left(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    peer.close()
    with pytest.raises(PeerGoneError):
        channel.send(OWNER)


def test_peer_that_left_with_unread_data(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    channel.send(OWNER)
    peer.close()
    with pytest.raises(PeerGoneError):
        channel.recv()


def test_too_many_fds_to_send(pair: tuple[Channel, socket.socket], pipe: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at most 8"):
        pair[0].send(KICK, [pipe[0]] * 9)


def test_channel_of_a_received_fd() -> None:
    ours, theirs = socket.socketpair()
    with Channel.from_fd(ours.detach()) as channel, theirs:
        theirs.sendall(encode_ack(1, 0))
        assert channel.recv().header.is_reply


def _not_a_socket() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


@pytest.mark.parametrize(
    "make",
    [
        _not_a_socket,
        lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach(),
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(),
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach(),
    ],
    ids=["pipe", "inet", "datagram", "unconnected"],
)
def test_fd_that_cannot_be_a_channel_is_closed(make: object) -> None:
    with pytest.raises(ProtocolError, match="back-end channel"):
        Channel.from_fd(make())


def test_message_repr_names_the_request() -> None:
    message = Message(Header(22, 9, 0))
    assert repr(message) == "<Message IOTLB_MSG flags=0x9 payload=0 bytes, 0 fds>"
