"""Exports over a socket: the same contract, and nothing a client sends does harm."""

import logging
import socket
import struct
import threading
import time
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guestio import CannotResolveError, GuestRegionCollection, Permissions
from guestio.budgets import EXPORT_BACKLOG, EXPORT_SESSIONS
from guestio.iommu import (
    BasicMemoryMapper,
    ExportClient,
    ExportedRegion,
    ExportError,
    ExportServer,
    MappingInfo,
)
from guestio.iommu.remote import HEADER, Kind, Status, pack

R, RW = Permissions.READ, Permissions.READ_WRITE
WAIT = 10


def mapper_of(*entries, **settings):
    mapper = BasicMemoryMapper(**settings)
    for iova, size, gpa, prot in entries:
        mapper.add_map(MappingInfo(iova, gpa, size, prot))
    return mapper


@contextmanager
def served(mappers):
    """A server for a dictionary of mappers; the socket of its client."""
    ours, theirs = socket.socketpair()
    server = ExportServer(ours, mappers.get)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield theirs, server
    finally:
        server.close()
        thread.join(WAIT)
        theirs.close()
        assert not thread.is_alive()


@contextmanager
def client_of(mappers, **options):
    with served(mappers) as (sock, _), ExportClient(sock, **options) as client:
        yield client


@contextmanager
def local(mapper):
    """The mapper's one client, in this process."""
    yield mapper


@contextmanager
def remote(mapper):
    """The same client at the other end of a socket."""
    with client_of({3: mapper}) as client:
        yield client.mapper(3)


def test_an_export_reaches_the_server_and_is_answered():
    class Source:
        def open_session(self):
            session = mapper_of((0x555, 1, 0x777, RW)).open_session()
            self.export = session.export
            session.export = self.watch
            return session

        def watch(self, iova, size):
            self.seen = iova, size
            return self.export(iova, size)

    source = Source()
    with client_of({3: source}) as client:
        endpoint = client.mapper(3)
        endpoint.start_export_session()
        assert endpoint.export(0x555, 1) == [(0x777, 1, RW)]
    assert source.seen == (0x555, 1)


@pytest.mark.parametrize("connect", [local, remote])
class TestContract:
    """What a client sees is the same in this process and over a socket."""

    def test_life(self, connect):
        mapper = mapper_of((0, 0x1000, 0x7000, RW), (0x1000, 0x1000, 0x8000, RW))
        with connect(mapper) as client:
            for call in (client.export, client.release):
                with pytest.raises(ExportError, match="no export session"):
                    call(0, 1)
            fault = client.start_export_session()
            for _ in range(2):
                assert client.export(0x800, 0x1000) == [(0x7800, 0x1000, RW)]
            with pytest.raises(ExportError, match="still active"):
                client.start_export_session()
            client.release(0x800, 0xFFF)
            resolved = mapper.remove_map(0x1000, 0x1000).fault
            assert fault.wait(WAIT)
            with pytest.raises(ExportError, match="broken"):
                client.export(0, 1)
            client.release(0x800, 0x1000)
            assert not resolved.is_set
            client.release(0x800, 0x1000)
            assert resolved.wait(WAIT)
            with pytest.raises(ExportError, match="broken"):
                client.export(0, 1)
            again = client.start_export_session()
            assert client.export(0, 0x10) == [(0x7000, 0x10, RW)]
            assert not again.is_set
            assert again is not fault

    def test_errors(self, connect):
        mapper = mapper_of((0x1000, 0x1000, 0, R))
        with connect(mapper) as client:
            client.start_export_session()
            with pytest.raises(CannotResolveError) as caught:
                client.export(0x1800, 0x1000)
            assert caught.value.iova_range == (0x2000, 0x800)
            for args in ((0, 0), (0, 2**64 + 1), (1, 2**64), (-1, 1), (2**64, 1)):
                with pytest.raises(ValueError):
                    client.export(*args)
            with pytest.raises(TypeError):
                client.export(1.0, 1)
            client.release(0x5000, 0)

    def test_the_whole_space(self, connect):
        mapper = mapper_of((0, 2**64, 0, RW))
        with connect(mapper) as client:
            client.start_export_session()
            assert client.export(0, 2**64) == [(0, 2**64, RW)]
            client.release(0, 2**64)
            assert mapper.remove_map(0, 2**64).fault is None

    def test_pieces(self, connect):
        entries = [(n * 16, 16, n * 32, R if n % 3 else RW) for n in range(500)]
        with connect(mapper_of(*entries)) as client:
            client.start_export_session()
            assert client.export(8, 16 * 499) == [
                (8, 8, RW),
                *((gpa, 16, prot) for _, _, gpa, prot in entries[1:499]),
                (499 * 32, 8, R),
            ]

    def test_memory_of_a_region(self, connect):
        mapper = mapper_of((0x1000, 0x1000, 0x4000, RW), (0x2000, 0x1000, 0x8000, R))
        physical = GuestRegionCollection.from_ranges([(0, 0x10000)])
        with connect(mapper) as client:
            client.start_export_session()
            if connect is local:
                client = mapper._single
            with ExportedRegion(client, 0x1800, 0x1000, physical) as region:
                region.memory.write(0x1800, b"abc")
                assert physical.read(0x4800, 3) == b"abc"
                with pytest.raises(CannotResolveError):
                    region.memory.write(0x2000, b"x")
            assert mapper.remove_map(0x1000, 0x2000).fault is None


def test_an_unknown_endpoint_is_answered():
    with client_of({3: mapper_of()}) as client:
        with pytest.raises(ExportError, match="endpoint 4 does not exist"):
            client.mapper(4).start_export_session()
        client.mapper(3).start_export_session()


def test_several_endpoints_and_clients():
    mappers = {n: mapper_of((0, 0x1000, n << 16, RW)) for n in range(4)}
    with client_of(mappers) as one, client_of(mappers) as two:
        for client in (one, two):
            for number in mappers:
                client.mapper(number).start_export_session()
                assert client.mapper(number).export(0, 1) == [(number << 16, 1, RW)]
        fault = mappers[2].remove_map(0, 0x1000).fault
        for client in (one, two):
            assert client.mapper(2).fault.wait(WAIT)
            assert not client.mapper(1).fault.is_set
            client.mapper(2).end_export_session()
        assert fault.wait(WAIT)


def test_disconnecting_releases_everything():
    mapper = mapper_of((0, 0x1000, 0, RW))
    with served({3: mapper}) as (sock, _):
        client = ExportClient(sock)
        endpoint = client.mapper(3)
        endpoint.start_export_session()
        endpoint.export(0, 1)
        fault = mapper.remove_map(0, 0x1000).fault
        assert not fault.is_set
        client.close()
        assert fault.wait(WAIT)
        client.close()
    assert mapper.sessions == []
    assert client.lost.is_set
    for call in (endpoint.start_export_session, lambda: endpoint.export(0, 1)):
        with pytest.raises(ExportError, match="lost"):
            call()


def test_a_server_that_goes_away():
    mapper = mapper_of((0, 0x1000, 0, RW))
    physical = GuestRegionCollection.from_ranges([(0, 0x1000)])
    with served({3: mapper}) as (sock, server), ExportClient(sock) as client:
        endpoint = client.mapper(3)
        fault = endpoint.start_export_session()
        region = ExportedRegion(endpoint, 0, 0x1000, physical)
        server.close()
        assert fault.wait(WAIT)
        assert endpoint.revoked.wait(WAIT)
        assert not region.valid
        with pytest.raises(CannotResolveError):
            region.memory.read(0, 1)


def test_a_client_that_never_releases_is_cut_off():
    mapper = mapper_of((0, 0x1000, 0, RW), time_limit=0.05)
    with client_of({3: mapper}) as client:
        endpoint = client.mapper(3)
        endpoint.start_export_session()
        endpoint.export(0, 1)
        fault = mapper.remove_map(0, 0x1000).fault
        assert fault.wait(WAIT)
        assert client.lost.wait(WAIT)


def test_releasing_in_the_callback_of_the_fault():
    mapper = mapper_of((0, 0x1000, 0, RW))
    with client_of({3: mapper}) as client:
        endpoint = client.mapper(3)
        endpoint.start_export_session().add_callback(lambda: endpoint.release(0, 1))
        endpoint.export(0, 1)
        assert mapper.remove_map(0, 0x1000).fault.wait(WAIT)


def test_waiting_in_a_callback_is_refused(caplog):
    mapper = mapper_of((0, 0x1000, 0, RW))
    with client_of({3: mapper}) as client, caplog.at_level(logging.ERROR):
        endpoint = client.mapper(3)
        endpoint.start_export_session().add_callback(lambda: endpoint.export(0, 1))
        endpoint.export(0, 1)
        mapper.remove_map(0, 0x1000)
        assert endpoint.fault.wait(WAIT)
        with pytest.raises(ExportError):
            endpoint.export(0, 1)
    assert "must not wait" in caplog.text


class Peer:
    """The bare socket of a client."""

    def __init__(self, sock):
        self.sock = sock
        sock.settimeout(WAIT)

    def receive(self):
        head = self.exactly(HEADER.size)
        size, kind, status, _, tag, endpoint = HEADER.unpack(head)
        return kind, status, tag, endpoint, self.exactly(size)

    def exactly(self, count):
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def ended(self):
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionResetError:
            pass
        return True


def test_an_answer_that_comes_too_late_is_released():
    ours, theirs = socket.socketpair()
    server = Peer(ours)
    with ExportClient(theirs, timeout=0.05) as client:
        endpoint = client.mapper(3)
        with pytest.raises(ExportError, match="did not answer"):
            endpoint.export(0x10, 0x20)
        _, _, tag, number, body = server.receive()
        assert number == 3
        ours.sendall(pack(Kind.EXPORT | 0x80, 0, tag, 3, struct.pack("<QQQQ", 5, 0x20, 0, 3)))
        kind, _, _, number, released = server.receive()
        assert (kind, number, released) == (Kind.RELEASE, 3, body)
    ours.close()


def test_an_answer_that_is_nonsense():
    ours, theirs = socket.socketpair()
    server = Peer(ours)

    def answer():
        for status, body in ((0, b"123"), (3, b"1"), (99, bytes(24) + b"why")):
            _, _, tag, number, _ = server.receive()
            ours.sendall(pack(0x82, status, tag, number, body))

    thread = threading.Thread(target=answer)
    thread.start()
    with ExportClient(theirs) as client:
        endpoint = client.mapper(3)
        for expected in ("no list", "refusal of", "remote error: why"):
            with pytest.raises(Exception, match=expected):
                endpoint.export(0, 1)
    thread.join()
    ours.close()


class TestHostileClients:
    def mapper(self):
        return mapper_of((0, 0x1000, 0, RW))

    @pytest.mark.parametrize(
        "message",
        [
            pack(Kind.EXPORT, 0, 1, 3, bytes(25)),
            struct.pack("<IBBHII", 0xFFFFFFFF, 1, 0, 0, 1, 3),
            struct.pack("<IBBHII", 0, 1, 0, 1, 1, 3),
            b"\xff" * 64,
        ],
        ids=["long-body", "huge-body", "reserved", "ones"],
    )
    def test_broken_framing_is_disconnected(self, message):
        mapper = self.mapper()
        with served({3: mapper}) as (sock, _):
            peer = Peer(sock)
            sock.sendall(pack(Kind.START, 0, 1, 3) + pack(Kind.EXPORT, 0, 2, 3, RANGE_1))
            assert [peer.receive()[1] for _ in range(2)] == [0, 0]
            sock.sendall(message)
            assert peer.ended()
        assert mapper.sessions == []

    @pytest.mark.parametrize(
        ("message", "status"),
        [
            (pack(77, 0, 9, 3), Status.UNKNOWN_REQUEST),
            (pack(0, 0, 9, 3), Status.UNKNOWN_REQUEST),
            (pack(Kind.FAULT, 0, 9, 3), Status.UNKNOWN_REQUEST),
            (pack(Kind.START, 1, 9, 3), Status.UNKNOWN_REQUEST),
            (pack(Kind.EXPORT, 0, 9, 3), Status.INVALID),
            (pack(Kind.EXPORT, 0, 9, 3, struct.pack("<QQQ", 0, 0, 1)), Status.NOT_MAPPED),
            (pack(Kind.EXPORT, 0, 9, 3, struct.pack("<QQQ", 0, 1, 1)), Status.INVALID),
            (pack(Kind.EXPORT, 0, 9, 3, struct.pack("<QQQ", 0, 0, 2)), Status.INVALID),
            (pack(Kind.EXPORT, 0, 9, 4, bytes(24)), Status.NO_SESSION),
            (pack(Kind.START, 0, 9, 5), Status.NO_ENDPOINT),
        ],
    )
    def test_every_request_is_answered(self, message, status):
        with served({3: self.mapper(), 4: self.mapper()}) as (sock, _):
            peer = Peer(sock)
            sock.sendall(pack(Kind.START, 0, 1, 3))
            assert peer.receive() == (0x81, 0, 1, 3, b"")
            for byte in message:
                sock.sendall(bytes([byte]))
            assert peer.receive()[1:3] == (status, 9)

    def test_sessions_are_limited(self):
        with served({n: self.mapper() for n in range(EXPORT_SESSIONS + 1)}) as (sock, _):
            peer = Peer(sock)
            for number in range(EXPORT_SESSIONS + 1):
                sock.sendall(pack(Kind.START, 0, 1, number))
            found = [peer.receive()[1] for _ in range(EXPORT_SESSIONS + 1)]
        assert found == [0] * EXPORT_SESSIONS + [Status.NO_SESSION]

    def test_a_client_that_reads_nothing_is_not_read_from(self):
        entries = [(n * 16, 16, n * 32, RW) for n in range(4096)]
        mapper = mapper_of(*entries)
        with served({3: mapper}) as (sock, server):
            sock.setblocking(False)
            sock.send(pack(Kind.START, 0, 1, 3))
            request = pack(Kind.EXPORT, 0, 1, 3, struct.pack("<QQQ", 0, 16 * 4096, 0))
            sent, idle = 0, 0
            while idle < 20:
                try:
                    sent += sock.send(request * 64)
                    idle = 0
                except BlockingIOError:
                    idle += 1
                    time.sleep(0.01)
            assert sent < 4 << 20
            # What waits to be sent is bounded, however much was asked for.
            assert len(server._link._out) < EXPORT_BACKLOG + len(entries) * 64

    def test_requests_that_were_read_do_not_delay_the_end(self):
        looked_up = threading.Event()

        def look_up(number):
            looked_up.set()
            time.sleep(0.1)

        ours, theirs = socket.socketpair()
        server = ExportServer(ours, look_up)
        thread = threading.Thread(target=server.run)
        # More than can be answered while the end is waited for.
        theirs.send(pack(Kind.START, 0, 1, 3) * 500)
        thread.start()
        assert looked_up.wait(WAIT)
        server.close()
        thread.join(WAIT)
        theirs.close()
        assert not thread.is_alive()

    def test_a_lookup_that_fails(self, caplog):
        ours, theirs = socket.socketpair()
        server = ExportServer(ours, lambda number: 1 // number)
        thread = threading.Thread(target=server.run)
        thread.start()
        client = ExportClient(theirs)
        with caplog.at_level(logging.ERROR), pytest.raises(ExportError, match="division"):
            client.mapper(0).start_export_session()
        client.close()
        thread.join(WAIT)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.lists(
            st.one_of(
                st.binary(max_size=64),
                st.builds(
                    pack,
                    st.integers(0, 7),
                    st.integers(0, 1),
                    st.integers(0, 2**32 - 1),
                    st.sampled_from([3, 3, 3, 4]),
                    st.one_of(
                        st.binary(max_size=26),
                        st.builds(
                            struct.Struct("<QQQ").pack,
                            st.sampled_from([0, 1, 0xFFF, 0x1000, 2**64 - 1]),
                            st.sampled_from([0, 1, 0xFFF, 0x1000, 2**64 - 1]),
                            st.sampled_from([0, 0, 1, 2**64 - 1]),
                        ),
                    ),
                ),
            ),
            max_size=30,
        )
    )
    def test_random_bytes(self, messages):
        mapper = self.mapper()
        with served({3: mapper}) as (sock, _):
            sock.sendall(b"".join(messages))
            sock.shutdown(socket.SHUT_WR)
            assert Peer(sock).ended()
        assert mapper.sessions == []
        assert mapper.remove_map(0, 0x1000).fault is None


RANGE_1 = struct.pack("<QQQ", 0, 1, 0)
