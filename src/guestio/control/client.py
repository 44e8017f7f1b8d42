"""Asks a running server over its control socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import time
from typing import Any, Self, cast

from guestio.control.schema import Explanation, Status
from guestio.errors import DeviceError

MOST_BYTES = 64 << 20
"""Bytes of an answer at most; more is refused."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(self.timeout)
            self._enter()
        except BaseException:
            self.sock.close()
            self.sock = None
            raise

    def _enter(self) -> None:
        """Connect; where more wait already than the server listens for, try again for a while."""
        until = time.monotonic() + (self.timeout or 0)
        while True:
            try:
                self.sock.connect(self._path)
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.01)
            else:
                return


class Stream:
    """Lines of an answer that goes on; made by :meth:`ControlClient.stream`."""

    def __init__(
        self, connection: http.client.HTTPConnection, answer: http.client.HTTPResponse
    ) -> None:
        self._connection, self._answer = connection, answer
        self._socket = connection.sock

    def readline(self) -> bytes:
        """The next line; empty at the end.

        Raises:
            DeviceError: The connection failed, or nothing came for the client's timeout.
        """
        try:
            return self._answer.readline(MOST_BYTES)
        except (OSError, ValueError, AttributeError, http.client.HTTPException) as error:
            # AttributeError: http.client has been closed meanwhile.
            raise DeviceError(f"the control socket's answer ends: {error}") from None

    def close(self) -> None:
        """End it, from any thread: a call of :meth:`readline` returns. May be called again."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class ControlClient:
    """A client of a control socket.

    Args:
        where: The path of the Unix socket, or ``http://HOST:PORT``.
        token: The bearer token, if one is needed.
        timeout: Seconds that an answer may take.

    One thread at a time. Each request has a connection of its own: a server may come and go.
    """

    def __init__(
        self,
        where: str | os.PathLike[str],
        *,
        token: str | None = None,
        timeout: float = 5.0,
    ) -> None:
        self.where = os.fspath(where)
        self._timeout = timeout
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def _connection(self) -> http.client.HTTPConnection:
        if self.where.startswith("http://"):
            address = self.where.removeprefix("http://").rstrip("/")
            return http.client.HTTPConnection(address, timeout=self._timeout)
        return _UnixConnection(self.where, self._timeout)

    def get(self, target: str, *, accept: str = "*/*") -> bytes:
        """The answer to ``GET target``.

        Args:
            target: The path, with its question.
            accept: The content types that are taken.

        Raises:
            DeviceError: Nothing answers, or it refuses.
        """
        try:
            connection = self._connection()
        except http.client.InvalidURL as error:
            raise DeviceError(f"{self.where} is no control socket: {error}") from None
        try:
            connection.request("GET", target, headers=self._headers | {"Accept": accept})
            answer = connection.getresponse()
            content = answer.read(MOST_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DeviceError(f"no answer from the control socket {self.where}: {reason}") from None
        finally:
            connection.close()
        if len(content) > MOST_BYTES:
            raise DeviceError(f"{self.where} answers with more than {MOST_BYTES} bytes")
        if answer.status != http.client.OK:
            text = content[:200].decode(errors="replace").strip()
            raise DeviceError(f"{self.where} refuses: {answer.status} {answer.reason}: {text}")
        return content

    def stream(self, target: str) -> Stream:
        """The answer to ``POST target`` that goes on, line by line.

        Raises:
            DeviceError: As from :meth:`get`.
        """
        connection = self._connection()
        try:
            connection.request("POST", target, headers=self._headers)
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                text = answer.read(200).decode(errors="replace").strip()
                raise DeviceError(f"{self.where} refuses: {answer.status} {answer.reason}: {text}")
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DeviceError(f"no answer from the control socket {self.where}: {reason}") from None
        except BaseException:
            connection.close()
            raise
        return Stream(connection, answer)

    def _json(self, target: str) -> Any:
        try:
            return json.loads(self.get(target))
        except ValueError:
            raise DeviceError(f"{self.where} is no control socket of guestio's") from None

    def status(self) -> Status:
        """What the server is doing.

        Raises:
            DeviceError: As from :meth:`get`; or that is another version.
        """
        found = self._json("/status")
        if not isinstance(found, dict) or found.get("schema") != 1:
            raise DeviceError(f"{self.where} is no control socket of this version of guestio")
        return cast("Status", found)

    def explain(self, address: int, length: int = 1, *, endpoint: int | None = None) -> Explanation:
        """What an address leads to; see `WatchedServer.explain`.

        Raises:
            DeviceError: As from :meth:`get`.
        """
        target = f"/explain?address={address}&length={length}"
        if endpoint is not None:
            target += f"&endpoint={endpoint}"
        return cast("Explanation", self._json(target))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open between requests."""
