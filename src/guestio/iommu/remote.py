"""Export sessions for a client in another process, over a stream socket.

The client's :class:`RemoteMapper` does what a session in the same process does; the server's
:class:`ExportServer` does it for the client. Errors are carried across, every request is answered,
also one for an endpoint that does not exist, and a client that goes away has released everything.

A message is a header of 16 bytes, little-endian, and a body::

    u32 length of the body    u8 kind    u8 status    u16 0    u32 tag    u32 endpoint

============  ====  ====================================  =======================================
message       kind  body of the request                   body of the answer (kind + 0x80)
============  ====  ====================================  =======================================
START            1  none                                  none
EXPORT           2  u64 iova, u128 size                   per piece: u64 gpa, u128 length, u64 prot
RELEASE          3  u64 iova, u128 size                   none
END              4  none                                  none
FAULT            5  from the server, none, tag 0          never answered
============  ====  ====================================  =======================================

An answer has the tag of its request. With a status other than 0 its body is the range concerned
(u64, u128) and a message in UTF-8. A peer that breaks the framing is disconnected.

A revoked client is disconnected before the guest is told that the memory is free. Nothing can make
another process forget memory that it has mapped: a program that needs that must end the process.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import logging
import os
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from typing import Final, Protocol, Self

from guestio.addr import IovaRange, Permissions, check_int, check_range, check_seconds
from guestio.budgets import EXPORT_BACKLOG, EXPORT_PIECES, EXPORT_SESSIONS
from guestio.errors import CannotResolveError, ProtocolError
from guestio.iommu.events import Event
from guestio.iommu.mapper import ExportError, ExportSession, MemRegion
from guestio.ratelog import LOG

_log = logging.getLogger(__name__)

HEADER: Final = struct.Struct("<IBBHII")
_RANGE: Final = struct.Struct("<QQQ")
_PIECE: Final = struct.Struct("<QQQQ")

MAX_REQUEST: Final = _RANGE.size
"""Largest body of a request, in bytes."""
MAX_ANSWER: Final = EXPORT_PIECES * _PIECE.size
"""Largest body of an answer, in bytes."""
_TEXT: Final = 1024
_LOW: Final = (1 << 64) - 1


class Kind(enum.IntEnum):
    """What a message is."""

    START = 1
    EXPORT = 2
    RELEASE = 3
    END = 4
    FAULT = 5


ANSWER: Final = 0x80
"""Added to the kind of a request in its answer."""


class Status(enum.IntEnum):
    """What became of a request."""

    OK = 0
    NO_SESSION = 1
    NOT_MAPPED = 2
    INVALID = 3
    NO_ENDPOINT = 4
    UNKNOWN_REQUEST = 5
    FAILED = 6


class Exports(Protocol):
    """Opens sessions: a mapper, or an endpoint of a virtio-iommu."""

    def open_session(self) -> ExportSession:
        """Begin to export to a client."""
        ...


def pack(kind: int, status: int, tag: int, endpoint: int, body: bytes = b"") -> bytes:
    """A message as bytes."""
    return HEADER.pack(len(body), kind, status, 0, tag, endpoint) + body


class Framing:
    """Cuts a stream into messages.

    Args:
        limit: Largest body, in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Take bytes as they arrived."""
        self._buffer += data

    def take(self) -> tuple[int, int, int, int, bytes] | None:
        """The next whole message as kind, status, tag, endpoint and body, or None.

        Raises:
            ProtocolError: The bytes are no message; the connection is of no more use.
        """
        buffer = self._buffer
        if len(buffer) < HEADER.size:
            return None
        length, kind, status, zero, tag, endpoint = HEADER.unpack_from(buffer)
        if zero or length > self._limit:
            raise ProtocolError(f"not a message of this protocol: kind {kind}, {length} bytes")
        end = HEADER.size + length
        if len(buffer) < end:
            return None
        body = bytes(buffer[HEADER.size : end])
        del buffer[:end]
        return kind, status, tag, endpoint, body


class _Link:
    """A stream socket that one thread serves and every thread may send on without waiting.

    Args:
        sock: The socket.
        limit: Largest body of a message of the peer.
        deliver: Called with each message, in the thread of :meth:`run`, as long as the peer takes
            what is sent to it.
    """

    _wake = -1

    def __init__(
        self, sock: socket.socket, limit: int, deliver: Callable[[int, int, int, int, bytes], None]
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._framing = Framing(limit)
        self._deliver = deliver
        self._lock = threading.Lock()
        self._out = bytearray()
        self._ended = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def send(self, data: bytes) -> None:
        """Have bytes sent; they are lost if the connection ends before."""
        with self._lock:
            if self._ended:
                return
            self._out += data
        os.eventfd_write(self._wake, 1)

    def cut(self) -> None:
        """End the connection now, whatever is still to be sent; :meth:`run` returns."""
        self._ended = True
        with contextlib.suppress(OSError):  # it may have ended already
            self._sock.shutdown(socket.SHUT_RDWR)
        os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """Serve the connection until it ends, then close the socket."""
        with self._sock, selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            selector.register(self._sock, selectors.EVENT_READ)
            try:
                while not self._ended:
                    self._step(selector)
            except (OSError, ProtocolError, EOFError) as error:
                if not self._ended:
                    LOG.report(_log, logging.INFO, "the connection for exports ended: %s", error)
            finally:
                self._ended = True

    def _step(self, selector: selectors.BaseSelector) -> None:
        while len(self._out) < EXPORT_BACKLOG and (message := self._framing.take()) is not None:
            self._deliver(*message)
            if self._ended:
                # What else has been read may take long.
                return
        wanted = selectors.EVENT_WRITE if self._out else 0
        if len(self._out) < EXPORT_BACKLOG:
            wanted |= selectors.EVENT_READ
        selector.modify(self._sock, wanted)
        for key, mask in selector.select():
            if key.fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                continue
            if mask & selectors.EVENT_WRITE:
                self._flush()
            if mask & selectors.EVENT_READ:
                data = self._sock.recv(65536)
                if not data:
                    raise EOFError("the peer closed it")
                self._framing.feed(data)

    def _flush(self) -> None:
        with self._lock:
            piece = bytes(self._out[:65536])
        sent = self._sock.send(piece, socket.MSG_NOSIGNAL)
        with self._lock:
            del self._out[:sent]

    def __del__(self) -> None:
        if self._wake >= 0:
            os.close(self._wake)


class ExportServer:
    """Serves one client over one connection.

    Args:
        sock: A connected stream socket; it is closed when :meth:`run` returns.
        lookup: Finds the exporter of an endpoint, or None if there is no such endpoint, such as
            the ``get`` of a dictionary of mappers. It is called in the thread of :meth:`run`.
    """

    def __init__(self, sock: socket.socket, lookup: Callable[[int], Exports | None]) -> None:
        _check_socket(sock)
        if not callable(lookup):
            raise TypeError(f"lookup must be callable, not {type(lookup).__name__}")
        self._lookup = lookup
        self._link = _Link(sock, MAX_REQUEST, self._serve)
        self._sessions: dict[int, ExportSession] = {}

    def __repr__(self) -> str:
        return f"<ExportServer: {len(self._sessions)} sessions>"

    def run(self) -> None:
        """Serve until the client goes away or :meth:`close` is called.

        Whatever the client held is released then. Run it in a thread of its own.
        """
        try:
            self._link.run()
        finally:
            for session in self._sessions.values():
                session.close()

    def close(self) -> None:
        """Disconnect the client; from any thread. :meth:`run` returns soon."""
        self._link.cut()

    def _serve(self, kind: int, status: int, tag: int, endpoint: int, body: bytes) -> None:
        outcome, answer = self._answer(kind, status, endpoint, body)
        self._link.send(pack((kind | ANSWER) & 0xFF, outcome, tag, endpoint, answer))

    def _answer(self, kind: int, status: int, endpoint: int, body: bytes) -> tuple[int, bytes]:
        try:
            if kind == Kind.START and not status:
                return self._start(endpoint)
            if kind not in {Kind.EXPORT, Kind.RELEASE, Kind.END} or status:
                return _refusal(Status.UNKNOWN_REQUEST, f"request {kind} is unknown")
            if endpoint not in self._sessions:
                raise ExportError("no export session; start one first")
            session = self._sessions[endpoint]
            if kind == Kind.END:
                del self._sessions[endpoint]
                session.close()
                return Status.OK, b""
            iova, size = _unpack_range(body)
            if kind == Kind.RELEASE:
                session.release(iova, size)
                return Status.OK, b""
            return self._export(session, iova, size)
        except ExportError as error:
            return _refusal(Status.NO_SESSION, str(error))
        except CannotResolveError as error:
            return _refusal(Status.NOT_MAPPED, error.reason, *error.iova_range)
        except (TypeError, ValueError) as error:
            return _refusal(Status.INVALID, str(error))
        except Exception as error:
            LOG.report(_log, logging.ERROR, "a request of an export client failed", trace=True)
            return _refusal(Status.FAILED, str(error))

    def _start(self, endpoint: int) -> tuple[int, bytes]:
        source = self._lookup(endpoint)
        if source is None:
            return _refusal(Status.NO_ENDPOINT, f"endpoint {endpoint} does not exist")
        previous = self._sessions.get(endpoint)
        if previous is not None and previous.exports:
            raise ExportError("the previous export session is still active: it holds memory")
        if previous is None and len(self._sessions) >= EXPORT_SESSIONS:
            raise ExportError(f"{EXPORT_SESSIONS} sessions are open; end one first")
        session = source.open_session()
        if previous is not None:
            previous.close()
        self._sessions[endpoint] = session
        session.fault.add_callback(lambda: self._link.send(pack(Kind.FAULT, 0, 0, endpoint)))
        session.revoked.add_callback(self._link.cut)
        return Status.OK, b""

    @staticmethod
    def _export(session: ExportSession, iova: int, size: int) -> tuple[int, bytes]:
        regions = session.export(iova, size)
        if len(regions) > EXPORT_PIECES:
            session.release(iova, size)
            raise ExportError(f"the range is in {len(regions)} pieces; export less at a time")
        pieces = (
            _PIECE.pack(gpa, length & _LOW, length >> 64, prot) for gpa, length, prot in regions
        )
        return Status.OK, b"".join(pieces)


class _Call:
    """A request on its way; ``fault`` is the event of the session that a START begins."""

    def __init__(self, kind: Kind, endpoint: int, body: bytes) -> None:
        self.kind = kind
        self.endpoint = endpoint
        self.body = body
        self.done = Event()
        self.fault = Event()
        self.abandoned = False
        self.status = -1
        self.answer = b""


class ExportClient:
    """The client's end of a connection; serves any number of endpoints from any thread.

    A context manager that closes the connection.

    Args:
        sock: A connected stream socket; it becomes this object's.
        timeout: Seconds after which a request counts as failed.

    Attributes:
        lost: Happens when the connection has ended: nothing is held any more.
    """

    def __init__(self, sock: socket.socket, *, timeout: float = 10.0) -> None:
        _check_socket(sock)
        self._timeout = check_seconds(timeout, "timeout")
        self.lost = Event()
        self._lock = threading.Lock()
        self._tags = itertools.count(1)
        self._calls: dict[int, _Call] = {}
        self._mappers: dict[int, RemoteMapper] = {}
        self._link = _Link(sock, MAX_ANSWER, self._take)
        self._thread = threading.Thread(target=self._run, name="guestio-exports", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        state = "lost" if self.lost.is_set else "connected"
        return f"<ExportClient: {len(self._mappers)} endpoints, {state}>"

    def mapper(self, endpoint: int) -> RemoteMapper:
        """Export and release for an endpoint, by its id; the same object each time."""
        if not 0 <= check_int(endpoint, "endpoint") < 1 << 32:
            raise ValueError(f"endpoint {endpoint} is not in [0, 2**32)")
        with self._lock:
            return self._mappers.setdefault(endpoint, RemoteMapper(self, endpoint))

    def close(self) -> None:
        """End the connection, which releases everything. Calling it again does nothing."""
        self._link.cut()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._link.run()
        finally:
            self.lost.set()
            with self._lock:
                calls, self._calls = list(self._calls.values()), {}
                mappers = list(self._mappers.values())
            for mapper in mappers:
                mapper.fault.set()
            for call in calls:
                call.done.set()

    def _begin(self, kind: Kind, endpoint: int, body: bytes) -> _Call:
        call = _Call(kind, endpoint, body)
        with self._lock:
            tag = next(self._tags) & 0xFFFFFFFF
            self._calls[tag] = call
        self._link.send(pack(kind, 0, tag, endpoint, body))
        if self.lost.is_set:
            call.done.set()
        return call

    def _call(self, kind: Kind, endpoint: int, body: bytes = b"") -> _Call:
        if threading.current_thread() is self._thread:
            raise RuntimeError("a callback of the connection must not wait for it")
        call = self._begin(kind, endpoint, body)
        call.done.wait(self._timeout)
        with self._lock:
            # An answer that comes too late for the caller is still dealt with.
            call.abandoned = call.status < 0
        if call.abandoned:
            why = "was lost" if self.lost.is_set else f"did not answer in {self._timeout} s"
            raise ExportError(f"the connection to the exporter {why}")
        _raise_refusal(call.status, call.answer)
        return call

    def _take(self, kind: int, status: int, tag: int, endpoint: int, body: bytes) -> None:
        with self._lock:
            mapper = self._mappers.get(endpoint)
            call = self._calls.pop(tag, None) if kind & ANSWER else None
            if call is not None and not call.abandoned:
                call.answer, call.status = body, status
        if kind == Kind.FAULT and mapper is not None:
            mapper.fault.set()
        if call is None:
            return
        if call.kind == Kind.START and status == Status.OK and mapper is not None:
            # Here and not in the caller: the next message may be this session's fault.
            mapper.fault = call.fault
        if call.kind == Kind.EXPORT and status == Status.OK and call.abandoned:
            self._begin(Kind.RELEASE, endpoint, call.body)
        call.done.set()


class RemoteMapper:
    """One endpoint's exports, at the other end of a connection; see :class:`ExportClient`.

    As with :class:`~guestio.iommu.BasicMemoryMapper`, there is one session at a time.

    Attributes:
        fault: Fault event of the present session; happens too when the connection ends.
    """

    def __init__(self, client: ExportClient, endpoint: int) -> None:
        self.endpoint = endpoint
        self.fault = Event()
        self._client = client

    def __repr__(self) -> str:
        return f"<RemoteMapper of endpoint {self.endpoint}>"

    @property
    def revoked(self) -> Event:
        """Happens when the connection has ended, which is how a server revokes."""
        return self._client.lost

    def start_export_session(self) -> Event:
        """Begin to export; the fault event of the session.

        Raises:
            ExportError: There is no such endpoint, the session before still holds memory, or the
                connection is lost.
        """
        return self._client._call(Kind.START, self.endpoint).fault

    def export(self, iova: int, size: int) -> list[MemRegion]:
        """As :meth:`ExportSession.export`; :class:`ExportError` too if the connection is lost."""
        body = _pack_range(*check_range(iova, size, name="iova", length_name="size", empty=False))
        answer = self._client._call(Kind.EXPORT, self.endpoint, body).answer
        if len(answer) % _PIECE.size:
            raise ProtocolError(f"an answer of {len(answer)} bytes is no list of pieces")
        return [
            MemRegion(gpa, low | high << 64, Permissions(prot & 3))
            for gpa, low, high, prot in _PIECE.iter_unpack(answer)
        ]

    def release(self, iova: int, size: int) -> None:
        """As :meth:`ExportSession.release`.

        From a callback of ``fault`` too, where the answer is not waited for.

        Raises:
            ExportError: There is no session, or the connection is lost.
        """
        body = _pack_range(*check_range(iova, size, name="iova", length_name="size"))
        if threading.current_thread() is self._client._thread:
            self._client._begin(Kind.RELEASE, self.endpoint, body)
        else:
            self._client._call(Kind.RELEASE, self.endpoint, body)

    def end_export_session(self) -> None:
        """Release everything and end the session.

        Raises:
            ExportError: There is no session, or the connection is lost.
        """
        self._client._call(Kind.END, self.endpoint)


def _check_socket(sock: socket.socket) -> None:
    if not isinstance(sock, socket.socket):
        raise TypeError(f"sock must be a socket, not {type(sock).__name__}")


def _pack_range(iova: int, size: int) -> bytes:
    return _RANGE.pack(iova, size & _LOW, size >> 64)


def _unpack_range(body: bytes) -> tuple[int, int]:
    if len(body) != _RANGE.size:
        raise ValueError(f"{len(body)} bytes are no range")
    iova, low, high = _RANGE.unpack(body)
    return iova, low | high << 64


def _refusal(status: Status, text: str, iova: int = 0, size: int = 0) -> tuple[int, bytes]:
    return status, _pack_range(iova, size) + text.encode()[:_TEXT]


def _raise_refusal(status: int, body: bytes) -> None:
    """Raise what a refused request raises where it was refused."""
    if status == Status.OK:
        return
    if len(body) < _RANGE.size:
        raise ProtocolError(f"a refusal of {len(body)} bytes")
    iova, size = _unpack_range(body[: _RANGE.size])
    text = body[_RANGE.size :].decode(errors="replace")
    if status == Status.NOT_MAPPED:
        raise CannotResolveError(IovaRange(iova, size), None, text)
    if status == Status.INVALID:
        raise ValueError(f"remote error: {text}")
    raise ExportError(f"remote error: {text}")
