"""The inspector for a control socket that a browser cannot reach: it is passed on to.

A browser knows no Unix sockets. So the page is served on a loopback address, to those who have its
token, and what it asks goes to the control socket, a connection for each request.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from guestio.budgets import (
    CONTROL_CONNECTIONS,
    CONTROL_HEADER_BYTES,
    CONTROL_RELAY_BYTES,
    CONTROL_REQUEST_SECONDS,
)
from guestio.control.app import App, check_allowed, is_foreign
from guestio.control.guard import GuardedProtocol
from guestio.control.page import is_page, page_routes
from guestio.errors import DeviceError

STEP: Final = 65536
"""Bytes that are read at a time."""

METHODS: Final = ["GET", "POST", "DELETE"]
KEPT_HEADERS: Final = (b"content-type", b"content-disposition", b"cache-control")
"""Headers of an answer that are passed on."""

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Relay:
    """Serves the inspector for a control socket.

    Args:
        where: The path of the control socket, or ``http://HOST:PORT``.
        token: What it needs as a bearer token, or None.
        port: Where to listen on 127.0.0.1; 0 for any free port.

    Raises:
        DeviceError: It cannot listen there, or `where` is no address.

    Attributes:
        url: The page, with the token that it needs; for its user only.

    Use: :meth:`run`, then :meth:`close`. A control socket that is not there yet, or goes, is asked
    again by the page.
    """

    def __init__(self, where: str, *, token: str | None = None, port: int = 0) -> None:
        self._where, self._needed = where, token
        self._host, self._port = _host_and_port(where)
        self._token = secrets.token_urlsafe(24)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(("127.0.0.1", port))
            self._socket.listen(CONTROL_CONNECTIONS)
            self._socket.setblocking(False)
        except OSError as error:
            self._socket.close()
            raise DeviceError(f"cannot listen on 127.0.0.1:{port}: {error.strerror}") from error
        # In the fragment, which browsers send to no server and note in no log.
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/#token={self._token}"

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGINT or SIGTERM; for the main thread.

        Args:
            ready: Called once it listens.
        """
        asyncio.run(self._serve(ready))

    async def _serve(self, ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            self.app(),
            http=GuardedProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=CONTROL_HEADER_BYTES,
            timeout_keep_alive=int(CONTROL_REQUEST_SECONDS),
        )
        server = uvicorn.Server(config)

        def end() -> None:
            server.force_exit = server.should_exit = True

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end)
        ready()
        await server._serve([self._socket])

    def close(self) -> None:
        """Listen no more. Calling it again does nothing."""
        self._socket.close()

    def app(self) -> App:
        """The page, and the way to the control socket for those who have the token."""
        inner = Starlette(
            routes=[*page_routes(), Route("/{path:path}", self._pass_on, methods=METHODS)]
        )

        async def guarded(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                needed = None if is_page(scope["path"]) else self._token
                refusal = check_allowed(Request(scope), needed, local=True)
                if refusal is not None:
                    await refusal(scope, receive, send)
                    return
            await inner(scope, receive, send)

        return guarded

    async def _pass_on(self, request: Request) -> Response:
        if is_foreign(request):
            return PlainTextResponse("a page of another site asks for this\n", status_code=403)
        body = b""
        try:
            async for part in request.stream():
                body += part
                if len(body) > CONTROL_RELAY_BYTES:
                    text = f"at most {CONTROL_RELAY_BYTES} bytes are passed on\n"
                    return PlainTextResponse(text, status_code=413)
        except ClientDisconnect:
            return Response(status_code=400)
        answer = None
        try:
            async with asyncio.timeout(CONTROL_REQUEST_SECONDS):
                answer = await self._ask(request, body)
                head = await answer.head()
        except (OSError, h11.ProtocolError) as error:
            if answer is not None:
                answer.close()
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            return PlainTextResponse(
                f"no answer from the control socket {self._where}: {reason}\n", status_code=502
            )
        headers = {
            name.decode(): value.decode("latin-1")
            for name, value in head.headers
            if name in KEPT_HEADERS
        }
        return _Passed(answer, status_code=head.status_code, headers=headers)

    async def _ask(self, request: Request, body: bytes) -> _Answer:
        reader, writer = await self._connect()
        try:
            headers = [("Host", "localhost"), ("Connection", "close")]
            if self._needed is not None:
                headers.append(("Authorization", f"Bearer {self._needed}"))
            if body:
                headers.append(("Content-Length", str(len(body))))
            target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            connection = h11.Connection(h11.CLIENT, CONTROL_HEADER_BYTES)
            writer.write(
                connection.send(h11.Request(method=request.method, target=target, headers=headers))
                or b""
            )
            if body:
                writer.write(connection.send(h11.Data(body)) or b"")
            writer.write(connection.send(h11.EndOfMessage()) or b"")
            await writer.drain()
        except BaseException:
            writer.close()
            raise
        return _Answer(connection, reader, writer)

    async def _connect(self) -> Streams:
        if self._host is None:
            return await asyncio.open_unix_connection(self._where)
        return await asyncio.open_connection(self._host, self._port)


def _host_and_port(where: str) -> tuple[str | None, int]:
    """The host and port of ``http://HOST:PORT``; no host of a path."""
    if not where.startswith("http://"):
        return None, 0
    host, colon, port = where.removeprefix("http://").rstrip("/").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise DeviceError(f"{where} is no control socket: http://HOST:PORT, or a path")
    return host, int(port)


class _Passed(StreamingResponse):
    """An answer that is passed on; its connection ends with it, however that comes about."""

    def __init__(self, answer: _Answer, *, status_code: int, headers: dict[str, str]) -> None:
        super().__init__(answer.body(), status_code=status_code, headers=headers)
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


class _Answer:
    """The answer of a control socket, as it comes."""

    def __init__(
        self,
        connection: h11.Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._connection, self._reader, self._writer = connection, reader, writer

    async def _next(self) -> Any:
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            self._connection.receive_data(await self._reader.read(STEP))
        return event

    async def head(self) -> h11.Response:
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise h11.RemoteProtocolError("the answer ends before it begins")

    async def body(self) -> AsyncIterator[bytes]:
        """Its body; one that is cut short ends."""
        with contextlib.suppress(OSError, h11.ProtocolError):
            while isinstance(event := await self._next(), h11.Data):
                yield bytes(event.data)

    def close(self) -> None:
        self._writer.close()
