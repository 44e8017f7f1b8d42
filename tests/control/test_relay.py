"""`guestio inspect`: who may ask through it, what it passes on, and how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from guestio import budgets
from guestio.cli import cli
from guestio.control.client import ControlClient
from guestio.faults import Misbehaving
from tests.kit.serving import Mirror, Serving, until


class Inspect:
    """The command, in a process of its own."""

    def __init__(self, control: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "guestio", "inspect", control],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        assert self.process.stdout is not None
        parts = urlsplit(self.process.stdout.readline().strip())
        assert parts.hostname == "127.0.0.1"
        assert parts.port is not None
        self.port = parts.port
        self.token = parts.fragment.removeprefix("token=")

    def ask(
        self, target: str, *, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """A request with the token; status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            given = {"Authorization": f"Bearer {self.token}", **headers}
            connection.request(method, target, body, given)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("relay")


@pytest.fixture(scope="module")
def inspect(place: Path) -> Iterator[Inspect]:
    made = Inspect(str(place / "control"))
    yield made
    made.close()


@pytest.fixture
def serving(place: Path) -> Iterator[Serving]:
    device = Misbehaving(Mirror(), [])
    with Serving(device, place / "socket", control=place / "control") as serving:
        yield serving


def test_only_who_has_the_token_may_ask(serving: Serving, inspect: Inspect) -> None:
    assert inspect.ask("/status")[0] == 200
    for wrong in ("", "Bearer ", "Bearer guess", f"Bearer {inspect.token[:-1]}"):
        assert inspect.ask("/status", Authorization=wrong)[0] == 401
    # The page itself holds nothing; a name of another site leads nowhere.
    status, page = inspect.ask("/", Authorization="")
    assert (status, page[:15]) == (200, b"<!doctype html>")
    for target in ("/", "/status"):
        assert inspect.ask(target, Host="evil.example")[0] == 403
    for escape in ("/page/../app.py", "/page/%2e%2e%2fapp.py", "/page/x", "/page/"):
        assert inspect.ask(escape)[0] == 404


def test_the_page_forbids_all_but_its_own_files(serving: Serving, inspect: Inspect) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", inspect.port, timeout=30)
    connection.request("GET", "/")
    answer = connection.getresponse()
    policy = dict(
        each.strip().split(" ", 1) for each in answer.headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert "unsafe" not in str(policy)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    connection.close()


def test_it_passes_on_what_is_asked_and_answered(serving: Serving, inspect: Inspect) -> None:
    assert json.loads(inspect.ask("/status")[1])["device"]["path"] == str(serving.path)
    assert inspect.ask("/explain?address=-1")[0] == 400
    assert b"guestio_connections_total" in inspect.ask("/metrics")[1]
    assert inspect.ask("/nothing")[0] == 404
    assert inspect.ask("/status", method="POST")[0] == 405
    rule = b"error p=0.5"
    status, said = inspect.ask("/fault", method="POST", body=rule)
    assert status == 200, said
    assert json.loads(said)[0]["rule"]
    assert inspect.ask("/fault?number=1", method="DELETE") == (200, b"[]")
    # What changes something is for the page alone.
    for origin, expected in (
        ("http://evil.example", 403),
        (f"http://127.0.0.1:{inspect.port}", 200),
    ):
        assert inspect.ask("/fault", method="POST", body=rule, Origin=origin)[0] == expected
    assert inspect.ask("/fault", method="POST", body=b"x" * 70_000)[0] == 413


def test_a_stream_ends_with_its_reader(serving: Serving, inspect: Inspect, place: Path) -> None:
    client = ControlClient(place / "control")
    for _ in range(budgets.CONTROL_STREAMS + 2):
        with socket.create_connection(("127.0.0.1", inspect.port), timeout=30) as reader:
            reader.sendall(
                b"GET /events?groups=requests HTTP/1.1\r\nHost: localhost\r\n"
                b"Authorization: Bearer " + inspect.token.encode() + b"\r\n\r\n"
            )
            assert b" 200 " in reader.recv(4096)
        until(lambda: "requests" not in client.status()["trace"]["groups"])


def test_a_control_socket_that_is_none(tmp_path: Path) -> None:
    """One that is not there, says nothing, says junk, and hangs up."""
    path = tmp_path / "control"
    made = Inspect(str(path))
    try:
        status, said = made.ask("/status")
        assert status == 502
        assert b"no answer from the control socket" in said
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            listening.listen()
            for junk in (b"", b"junk\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 9999):
                thread = threading.Thread(target=_answer, args=(listening, junk))
                thread.start()
                assert made.ask("/status")[0] == 502
                thread.join()
            started = time.monotonic()
            assert made.ask("/status")[0] == 502
            assert time.monotonic() - started < 3 * budgets.CONTROL_REQUEST_SECONDS
            assert made.ask("/", Authorization="")[0] == 200
        made.process.send_signal(signal.SIGINT)
        assert made.process.wait(10) == 0
    finally:
        made.close()


def _answer(listening: socket.socket, junk: bytes) -> None:
    client, _ = listening.accept()
    with client, contextlib.suppress(OSError):
        client.recv(4096)
        client.sendall(junk)


def test_what_cannot_be_asked_is_said() -> None:
    run = CliRunner()
    assert run.invoke(cli, ["inspect", "--help"]).exit_code == 0
    said = run.invoke(cli, ["inspect", "http://nowhere"])
    assert said.exit_code == 1
    assert "HTTP" in said.output.upper()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = run.invoke(cli, ["inspect", "/tmp/none", "--port", str(port)])
        assert said.exit_code == 1
        assert f"cannot listen on 127.0.0.1:{port}" in said.output
    assert run.invoke(cli, ["inspect", "/tmp/none", "--port", "70000"]).exit_code == 2
