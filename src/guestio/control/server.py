"""The control socket: HTTP in a thread of its own, which the data path never waits for."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import threading
from typing import Any, Final

from guestio.budgets import (
    CONTROL_CONNECTIONS,
    CONTROL_END_SECONDS,
    CONTROL_HEADER_BYTES,
    CONTROL_REQUEST_SECONDS,
)
from guestio.control.rates import Rates
from guestio.control.recall import Recall
from guestio.control.status import Observed
from guestio.errors import DeviceError
from guestio.peer.endpoint import Listener
from guestio.ratelog import LOG
from guestio.trace import Group, Tracing

log = logging.getLogger("guestio.control")

RECORDED: Final = Group.MEASURE | Group.LIFE
"""What is measured and written as long as a control socket is open."""

NOTE_SECONDS: Final = 1.0
"""Seconds between notes of the counts, for rates."""

GUARD_SECONDS: Final = 0.5
"""Seconds between looks at a connection that may have stalled."""


class ControlServer:
    """Answers questions about a server, from its making to :meth:`close`.

    Args:
        observed: The server.
        path: Where to listen; a socket that nothing listens on is replaced. Only this user may
            connect (mode 0600).
        http: ``HOST:PORT`` to listen on besides, or instead; ``[::1]:0`` for any free port.
        token: What each request over TCP must bring as a bearer token.

    Raises:
        DeviceError: It cannot listen there; the extra ``control`` is not installed; or others than
            this machine could connect without a token.

    Attributes:
        path: Where the Unix socket is, or None.
        http: Where the TCP socket is, ``HOST:PORT``, or None.

    Threads: any. Cost: a thread; latencies are measured while it is open, rare events recorded, and
    changes of translations from the first question about an address on.
    """

    def __init__(
        self,
        observed: Observed,
        path: str | os.PathLike[str] | None = None,
        *,
        http: str | None = None,
        token: str | None = None,
    ) -> None:
        if path is None and http is None:
            raise ValueError("a control socket needs a path, or the host and port of http")
        _need_extra()
        self.path = None if path is None else os.fspath(path)
        self.http: str | None = None
        self._closed = False
        self._listener: Listener | None = None
        self._servers: list[Any] = []
        with contextlib.ExitStack() as undo:
            sockets: list[tuple[socket.socket, str | None, bool]] = []
            if self.path is not None:
                listener = self._listener = Listener.at(self.path, mode=0o600)
                undo.callback(listener.close)
                sockets.append((listener.listening, None, False))
            if http is not None:
                listening, local = _listen_tcp(http, token)
                undo.callback(listening.close)
                host, port = listening.getsockname()[:2]
                self.http = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                sockets.append((listening, token, local and token is None))
            rates, recall = Rates(observed), Recall()
            undo.callback(recall.close)
            for listening, needed, local in sockets:
                self._servers.append((_make(rates, recall, needed, local=local), listening))
            undo.enter_context(Tracing(RECORDED))
            self._thread = threading.Thread(
                target=self._run, args=(rates, recall), name="guestio-control", daemon=True
            )
            self._thread.start()
            self._undo = undo.pop_all()

    def _run(self, rates: Rates, recall: Recall) -> None:
        try:
            asyncio.run(self._serve(rates, recall))
        except BaseException:
            LOG.report(log, logging.ERROR, "the control socket failed", trace=True)

    async def _serve(self, rates: Rates, recall: Recall) -> None:
        asyncio.get_running_loop().set_exception_handler(_report)
        noting = asyncio.ensure_future(_note(rates, recall))
        try:
            await asyncio.gather(*(server._serve([sock]) for server, sock in self._servers))
        finally:
            noting.cancel()

    def close(self) -> None:
        """Stop answering, and remove the socket. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._listener is not None:
            # uvicorn closes the socket, which says nothing of its name.
            self._listener.remove_socket()
        for server, _ in self._servers:
            # Streams of events do not end by themselves.
            server.force_exit = server.should_exit = True
        self._thread.join(CONTROL_END_SECONDS)
        if self._thread.is_alive():
            LOG.report(
                log,
                logging.ERROR,
                "the control thread has not ended after %g s",
                CONTROL_END_SECONDS,
            )
        self._undo.close()


def _need_extra() -> None:
    try:
        import prometheus_client  # noqa: F401 - only whether it is there
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise DeviceError(
            f"a control socket needs the extra 'control' (pip install 'guestio[control]'): {error}"
        ) from None


def _listen_tcp(where: str, token: str | None) -> tuple[socket.socket, bool]:
    """A listening socket, and whether only this machine reaches it."""
    host, colon, port = where.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise DeviceError(f"{where!r} is no HOST:PORT")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise DeviceError(f"cannot listen on {where}: {error.strerror}") from None
    local = ipaddress.ip_address(address[0]).is_loopback
    if not local and not token:
        raise DeviceError(
            f"{where} can be reached from other machines: a token is needed for that, in "
            "GUESTIO_CONTROL_TOKEN"
        )
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(64)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise DeviceError(f"cannot listen on {where}: {error.strerror}") from error
    return listening, local


def _make(rates: Rates, recall: Recall, token: str | None, *, local: bool) -> Any:
    """What serves one socket."""
    import uvicorn

    from guestio.control.app import make_app
    from guestio.control.guard import GuardedProtocol

    class Server(uvicorn.Server):
        """One that hangs up as it ends.

        A stream does not end by itself, and from Python 3.12 on asyncio waits for every connection.
        """

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """See `uvicorn.Server`; first hang up, with time to take what was written."""
            self._hang_up(abort=False)
            asyncio.get_running_loop().call_later(CONTROL_END_SECONDS / 2, self._hang_up)
            await super().shutdown(sockets)

        def _hang_up(self, *, abort: bool = True) -> None:
            for each in list(self.server_state.connections):
                transport: Any = each.transport
                (transport.abort if abort else transport.close)()

    config = uvicorn.Config(
        make_app(rates.observed, rates, recall, token=token, local=local),
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
        backlog=CONTROL_CONNECTIONS,
    )
    return Server(config)


async def _note(rates: Rates, recall: Recall) -> None:
    while True:
        try:
            rates.note()
            recall.look()
        except Exception:
            LOG.report(log, logging.ERROR, "the status of a server failed", trace=True)
        await asyncio.sleep(NOTE_SECONDS)


def _report(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What asyncio reports, within the limit of the log."""
    LOG.report(log, logging.WARNING, "the control socket: %s", context.get("message"))
