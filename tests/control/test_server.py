"""The control socket: who may ask, what a bad client costs, and what is left at the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from guestio import budgets
from guestio._core.trace.latencies import Latencies
from guestio.cli import cli
from guestio.control import guard, schema
from guestio.control.client import ControlClient
from guestio.control.server import ControlServer
from guestio.control.status import latency_of
from guestio.errors import DeviceError
from guestio.trace import wanted
from tests.kit.command import Command, ready
from tests.kit.serving import Driver, Mirror, Serving, nothing_left, until

WITHIN = 10.0


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "control"


@pytest.fixture
def serving(tmp_path: Path, control: Path) -> Iterator[Serving]:
    with nothing_left(), Serving(Mirror(), tmp_path / "socket", control=control) as serving:
        yield serving
    assert not control.exists()
    assert wanted() == 0


def connect(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.connect(str(path))
    made.settimeout(30)
    return made


def asked(path: Path, request: bytes) -> bytes:
    """What a client that closes its side is answered."""
    with connect(path) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(request)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(65536):
                answer += part
    return answer


def check(serving: Serving, control: Path) -> None:
    """The next client is answered, and the data path serves."""
    started = time.monotonic()
    assert ControlClient(control, timeout=WITHIN).status()["schema"] == 1
    serving.check_serves()
    assert time.monotonic() - started < 2 * WITHIN


def keys_of(typed: Any) -> set[str]:
    return set(typed.__annotations__)


def test_the_status_has_the_documented_fields(serving: Serving, control: Path) -> None:
    client = ControlClient(control)
    assert client.status()["peer"] is None
    with Driver(serving.path) as driver:
        driver.run(0, b"some")
        status: Any = client.status()
        assert set(status) == keys_of(schema.Status)
        for name, typed in (
            ("process", schema.Process),
            ("device", schema.DeviceInfo),
            ("peer", schema.Peer),
            ("dirty", schema.Dirty),
            ("trace", schema.Trace),
        ):
            assert set(status[name]) == keys_of(typed)
        for queue in status["queues"]:
            assert set(queue) == keys_of(schema.Queue)
            for latency in (*queue["latency"].values(), queue["latency_all"]):
                assert set(latency) == keys_of(schema.Latency)
        assert set(status["memory"][0]) == keys_of(schema.Region)
        assert all(set(each) == keys_of(schema.Budget) for each in status["budgets"].values())
        assert status["process"]["pid"] == os.getpid()
        assert "VERSION_1" in status["peer"]["features"]
        assert status["queues"][0]["running"]
        assert not status["queues"][1]["running"]
    serving.let_go()
    until(lambda: client.status()["peer"] is None)


def test_one_slow_request_does_not_make_a_queue_slow() -> None:
    measured = Latencies()
    for _ in range(99):
        measured.note(1, 0, 20_000)
    measured.note(3, 0, 20_000_000)
    both = latency_of(measured, 0, 1, 2, 3)
    assert both["count"] == 100
    assert both["sum_s"] == pytest.approx(99 * 20e-6 + 20e-3)
    assert both["p50_s"] == latency_of(measured, 1)["p50_s"] == pytest.approx(20e-6, rel=0.07)
    assert both["max_s"] == latency_of(measured, 3)["max_s"]
    assert sum(count for _, count in both["buckets"]) == 100


def test_only_this_user_may_connect(serving: Serving, control: Path) -> None:
    assert stat.S_IMODE(control.stat().st_mode) == 0o600
    assert stat.S_ISSOCK(control.stat().st_mode)
    check(serving, control)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"404"),
        (b"POST /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"405"),
        (b"GET /explain HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"400"),
        (b"GET /explain?address=-1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"400"),
        (b"GET /explain?address=0&length=999999999999 HTTP/1.0\r\n\r\n", b"400"),
        (b"GET /explain?address=" + b"9" * 5000 + b" HTTP/1.0\r\n\r\n", b"400"),
        (b"GET /events?groups=no HTTP/1.0\r\n\r\n", b"400"),
        (b"GET /events?what=no HTTP/1.0\r\n\r\n", b"400"),
        (b"\x00\xff\r\n\r\n", b"400"),
        (b"GET /status HTTP/1.1\r\n" + b"X: " + b"y" * (1 << 20) + b"\r\n\r\n", b"400"),
        (b"GET /" + b"s" * (1 << 20) + b" HTTP/1.1\r\n\r\n", b"400"),
    ],
)
def test_junk_is_refused(serving: Serving, control: Path, request_: bytes, status: bytes) -> None:
    answer = asked(control, request_)
    assert answer.split(b" ")[1:2] in ([status], []), answer[:200]
    check(serving, control)


def test_one_client_too_many_replaces_the_oldest(
    serving: Serving, control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "CONTROL_REQUEST_SECONDS", 1000.0)
    stalled = [connect(control) for _ in range(budgets.CONTROL_CONNECTIONS + 5)]
    try:
        for client in stalled[:5]:
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        check(serving, control)
        stalled[-1].settimeout(0.01)
        with pytest.raises(TimeoutError):
            stalled[-1].recv(1)
    finally:
        for client in stalled:
            client.close()


def test_clients_that_stall_make_way(serving: Serving, control: Path) -> None:
    stalled = [connect(control) for _ in range(budgets.CONTROL_CONNECTIONS + 5)]
    try:
        for client in stalled[::2]:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(b"GET /status HTTP/1.1\r\nHost:")
        check(serving, control)
        # Half a request, and none at all: both are disconnected.
        for client in stalled:
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
    finally:
        for client in stalled:
            client.close()
    check(serving, control)


def test_clients_that_leave_in_the_middle(serving: Serving, control: Path) -> None:
    for request in (b"", b"GET /sta", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 20):
        for _ in range(20):
            with connect(control) as client:
                client.sendall(request)
    check(serving, control)


def test_events_are_streamed_until_the_client_goes(serving: Serving, control: Path) -> None:
    with connect(control) as client:
        client.sendall(b"GET /events?groups=life,requests HTTP/1.1\r\nHost: x\r\n\r\n")
        stream = client.makefile("rb")
        assert b" 200 " in stream.readline()
        # Sent once events are written.
        while not stream.readline().startswith(b": guestio"):
            pass
        found: list[str] = []
        with Driver(serving.path) as driver:
            driver.run(0, b"watched")
            while not {"connected", "queue_started", "taken", "completed"} <= set(found):
                line = stream.readline()
                assert line, found
                if line.startswith(b"data: "):
                    found.append(json.loads(line[6:]).get("what", "lost"))
        stream.close()
    check(serving, control)
    until(lambda: "requests" not in ControlClient(control).status()["trace"]["groups"])


def test_streams_are_limited_and_a_reader_that_stops_is_dropped(
    serving: Serving, control: Path
) -> None:
    request = b"GET /events?groups=requests HTTP/1.1\r\nHost: x\r\n\r\n"
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(connect(control)) for _ in range(budgets.CONTROL_STREAMS)]
        for each in streams:
            each.sendall(request)
            assert b" 200 " in each.recv(4096)
        until(lambda: b" 503 " in asked(control, request.replace(b"1.1", b"1.0")))
        check(serving, control)
    until(lambda: ControlClient(control).status()["trace"]["groups"] == ["life", "measure"])


@pytest.mark.parametrize("stream", ["GET /events?groups=requests", "POST /record?payload=none"])
@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not taken"])
def test_a_server_ends_while_streams_are_open(
    tmp_path: Path, control: Path, stream: str, taken: bool
) -> None:
    with (
        nothing_left(),
        Serving(Mirror(), tmp_path / "socket", control=control) as serving,
        connect(control) as client,
    ):
        client.sendall(f"{stream} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b" 200 " in client.recv(4096)
        if not taken:
            with Driver(serving.path) as driver:
                for number in range(300):
                    driver.run(0, b"%d" % number)
        server = serving.backend.control
        assert isinstance(server, ControlServer)
        started = time.monotonic()
        server.close()
        assert not server._thread.is_alive()
        assert time.monotonic() - started < budgets.CONTROL_END_SECONDS
        with contextlib.suppress(ConnectionResetError):
            while client.recv(65536):
                pass


def test_a_path_in_use_and_a_stale_one(tmp_path: Path, control: Path) -> None:
    with nothing_left():
        with Serving(Mirror(), tmp_path / "one", control=control):
            with pytest.raises(DeviceError, match="another process is listening"):
                Serving(Mirror(), tmp_path / "two", control=control)
            assert not (tmp_path / "two").exists()
            assert ControlClient(control).status()["peer"] is None
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(control))
        with Serving(Mirror(), tmp_path / "one", control=control):
            assert ControlClient(control).status()["peer"] is None
        control.write_text("mine")
        with pytest.raises(DeviceError, match="not a socket"):
            Serving(Mirror(), tmp_path / "one", control=control)
        assert control.read_text() == "mine"


def test_http_over_tcp_needs_a_token_off_this_machine(tmp_path: Path) -> None:
    with nothing_left():
        with pytest.raises(DeviceError, match="a token is needed"):
            Serving(Mirror(), tmp_path / "s", http="0.0.0.0:0")
        for wrong in ("nowhere", "127.0.0.1:99999", ":80", "127.0.0.1:x"):
            with pytest.raises(DeviceError, match="HOST:PORT"):
                Serving(Mirror(), tmp_path / "s", http=wrong)
        with Serving(Mirror(), tmp_path / "s", http="127.0.0.1:0", http_token="secret") as serving:
            server = serving.backend.control
            assert isinstance(server, ControlServer)
            where = f"http://{server.http}"
            with pytest.raises(DeviceError, match="401"):
                ControlClient(where).status()
            with pytest.raises(DeviceError, match="401"):
                ControlClient(where, token="guess").status()
            assert ControlClient(where, token="secret").status()["schema"] == 1
            assert ControlClient(where).get("/status?token=secret")


def test_a_browser_that_another_site_led_here_is_refused(tmp_path: Path) -> None:
    with nothing_left(), Serving(Mirror(), tmp_path / "s", http="127.0.0.1:0") as serving:
        server = serving.backend.control
        assert server is not None
        assert server.http is not None
        assert ControlClient(f"http://{server.http}").status()["schema"] == 1
        host, port = server.http.split(":")
        with socket.create_connection((host, int(port)), timeout=30) as client:
            client.sendall(b"GET /status HTTP/1.1\r\nHost: evil.example\r\n\r\n")
            assert b" 403 " in client.recv(4096)


def test_an_address_is_explained(serving: Serving, control: Path) -> None:
    client = ControlClient(control)
    assert client.explain(0x1000)["mapped"] == []
    with Driver(serving.path) as driver:
        driver.run(0, b"x")
        region = client.status()["memory"][0]
        found = client.explain(region["address"] + 5, 10)
        assert (found["read"], found["write"], found["translated"]) == (
            "succeeds",
            "succeeds",
            False,
        )
        (mapping,) = found["mapped"]
        assert mapping["address"] == region["address"]
        assert mapping["since_s"] is not None
        assert [event["what"] for event in found["last"]] == ["region_added"]
        end = region["address"] + region["length_bytes"]
        assert "no memory" in client.explain(end - 1, 2)["write"]
    for wrong in (0, (1 << 20) + 1):
        with pytest.raises(DeviceError, match="400"):
            client.explain(0, wrong)


def test_commands(tmp_path: Path) -> None:
    """`top` and `explain` on a server in another process, SIGUSR1, and its end."""
    image, control = tmp_path / "image", tmp_path / "control"
    image.write_bytes(bytes(1 << 20))
    command = Command(tmp_path, "blk", str(image), "--control", str(control))
    run = CliRunner()
    with ready(command):
        until(control.exists)
        plain = run.invoke(cli, ["top", str(control), "--once", "--sort", "latency"])
        assert plain.exit_code == 0, plain.output
        assert "BlockDevice over vhost-user" in plain.output
        assert "faults: none" in plain.output
        shown = run.invoke(cli, ["top", str(control), "--json"])
        assert json.loads(shown.output)["process"]["pid"] == command.process.pid
        said = run.invoke(cli, ["explain", str(control), "0x1000"])
        assert said.exit_code == 0
        assert "no memory at 0x1000" in said.output
        command.process.send_signal(signal.SIGUSR1)
        until(lambda: "BlockDevice over vhost-user" in command.log, command.log)
        command.end()
    assert not control.exists()
    gone = run.invoke(cli, ["top", str(control), "--once"])
    assert gone.exit_code == 1
    assert "no answer from the control socket" in gone.output
    for wrong in ("-1", "x", str(2**64)):
        assert run.invoke(cli, ["explain", str(control), "--", wrong]).exit_code == 2


def test_sigusr1_without_a_control_socket(tmp_path: Path) -> None:
    command = Command(tmp_path, "rng")
    with ready(command):
        command.process.send_signal(signal.SIGUSR1)
        until(lambda: "EntropyDevice over vhost-user" in command.log, command.log)
        command.end()
