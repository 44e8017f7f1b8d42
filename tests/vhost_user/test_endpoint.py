"""Where front-ends come from: a back-end that connects, or is given a socket."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

import pytest

from guestio.errors import DeviceError
from guestio.peer.endpoint import activation_sockets, adopt_socket
from guestio.vhost_user import Backend
from guestio.vhost_user.frontend import RefusedError
from guestio.vhost_user.messages import FrontendRequest
from tests.kit.serving import (
    OK,
    WAIT,
    Driver,
    Mirror,
    Serving,
    errors_of,
    nothing_left,
    until,
    warnings_of,
)

F = FrontendRequest


def listening(path: Path, backlog: int = 4) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(WAIT)
    made.bind(str(path))
    made.listen(backlog)
    return made


def accepted(listener: socket.socket) -> socket.socket:
    """The next back-end that connects."""
    made, _ = listener.accept()
    made.settimeout(WAIT)
    return made


def works(sock: socket.socket) -> None:
    with Driver(sock) as driver:
        assert driver.run(0, b"connected") == (OK, b"detcennoc")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "front-end"


class TestConnecting:
    def test_one_front_end_after_the_other(self, path: Path) -> None:
        with (
            nothing_left(),
            listening(path) as listener,
            Serving(Mirror(), path, connect=True) as serving,
        ):
            assert serving.backend.ready_line == f"connecting to {path}"
            for _ in range(3):
                works(accepted(listener))
        assert path.exists(), "it is the front-end's"
        assert serving.stats.connections == 3

    def test_it_waits_for_one_that_comes_later(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Serving(Mirror(), path, connect=True):
            until(lambda: warnings_of(caplog))
            time.sleep(0.3)
            with listening(path) as listener:
                works(accepted(listener))
        said = [line for line in warnings_of(caplog) if "cannot connect" in line]
        assert len(said) == 1
        assert said[0].startswith(f"cannot connect to {path}: No such file or directory; this is ")

    def test_one_that_starts_anew(self, path: Path) -> None:
        with Serving(Mirror(), path, connect=True):
            for _ in range(2):
                with listening(path) as listener:
                    works(accepted(listener))
                path.unlink()

    def test_one_that_accepts_and_says_nothing(self, path: Path) -> None:
        """Leaving the back-end shows that a stop does not wait for it."""
        with (
            nothing_left(),
            listening(path) as listener,
            Serving(Mirror(), path, connect=True),
            accepted(listener) as silent,
        ):
            silent.settimeout(0.3)
            with pytest.raises(TimeoutError):
                silent.recv(1)
            listener.settimeout(0.05)
            with pytest.raises(TimeoutError):
                listener.accept()

    @pytest.mark.parametrize("says", [b"", b"\0" * 12, b"\xff" * 100, b"GET / HTTP/1.1\r\n\r\n"])
    def test_one_that_hangs_up_or_talks_nonsense_is_left_alone_more_and_more(
        self, path: Path, says: bytes
    ) -> None:
        with listening(path) as listener, Serving(Mirror(), path, connect=True) as serving:
            began = time.monotonic()
            for _ in range(4):
                with accepted(listener) as sock:
                    sock.send(says)
                    if says:
                        with contextlib.suppress(ConnectionResetError):
                            assert sock.recv(1) == b""
            # 0.1 s, 0.2 s and 0.4 s lie between.
            assert time.monotonic() - began > 0.6
            works(accepted(listener))
            assert serving.stats.connections == 5

    def test_one_whose_queue_is_full(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(listening(path, 0))
            others = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    other = stack.enter_context(socket.socket(socket.AF_UNIX))
                    other.setblocking(False)
                    other.connect(str(path))
                    others.append(other)
            stack.enter_context(Serving(Mirror(), path, connect=True))
            until(lambda: warnings_of(caplog))
            assert "nothing accepts there" in warnings_of(caplog)[0]
            for _ in others:
                accepted(listener).close()
            works(accepted(listener))

    def test_a_socket_that_is_replaced_by_something_else(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Serving(Mirror(), path, connect=True):
            until(lambda: warnings_of(caplog))
            path.write_text("no socket")
            until(lambda: "there is a file that is not a socket" in caplog.text)
            path.unlink()
            with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as other:
                other.bind(str(path))
                until(lambda: "wrong type for socket" in caplog.text)
            path.unlink()
            with listening(path) as listener:
                works(accepted(listener))

    def test_paths_that_cannot_be(self, path: Path, tmp_path: Path) -> None:
        path.write_text("precious")
        with nothing_left():
            for bad, message in (
                (path, "there is a file that is not a socket"),
                (tmp_path, "there is a file that is not a socket"),
                (path / "below", "Not a directory"),
                ("", "not the name of a file"),
                ("a\0b", "not the name of a file"),
                ("x" * 108, "108 bytes long"),
            ):
                with pytest.raises(DeviceError, match=message):
                    Backend(Mirror(), bad, connect=True)
            made = socket.socket(socket.AF_UNIX)
            with made, pytest.raises(ValueError, match="needs the path"):
                Backend(Mirror(), made, connect=True)
        assert path.read_text() == "precious"

    def test_its_own_end_is_no_back_end_channel(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Held here, its hang-up would never be seen."""
        with listening(path) as listener, Serving(Mirror(), path, connect=True):
            with Driver(accepted(listener), queues=0) as driver, pytest.raises(RefusedError):
                driver.frontend.request(F.SET_BACKEND_REQ_FD, fds=[driver.frontend.fileno()])
            until(lambda: "pass one end of a socketpair" in caplog.text)
            works(accepted(listener))


class TestHandedOver:
    def test_a_listening_socket_is_not_removed_and_others_may_go_on(self, path: Path) -> None:
        with listening(path) as listener:
            for _ in range(2):
                with nothing_left():
                    handed = socket.socket(fileno=os.dup(listener.fileno()))
                    with Serving(Mirror(), handed) as serving:
                        assert serving.backend.ready_line == f"listening on {path}"
                        for _ in range(2):
                            client = socket.socket(socket.AF_UNIX)
                            client.connect(str(path))
                            works(client)
            assert path.exists()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                accepted(listener).close()

    def test_one_without_a_name(self) -> None:
        with nothing_left():
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(f"\0guestio-test-{os.getpid()}")
            name, number = listener.getsockname(), listener.fileno()
            listener.listen(1)
            with Serving(Mirror(), listener) as serving:
                assert serving.backend.ready_line == f"listening on descriptor {number}"
                assert serving.backend.path == ""
                client = socket.socket(socket.AF_UNIX)
                client.connect(name)
                works(client)

    def test_a_connected_one_ends_the_service_with_it(self) -> None:
        with nothing_left():
            ours, theirs = socket.socketpair()
            number = ours.fileno()
            with Serving(Mirror(), ours) as serving:
                assert serving.backend.ready_line == f"connected by descriptor {number}"
                works(theirs)
                until(lambda: not serving.alive)
            assert serving.stats.connections == 1

    def test_a_connected_one_that_is_never_served(self) -> None:
        with nothing_left():
            ours, theirs = socket.socketpair()
            with theirs:
                backend = Backend(Mirror(), ours)
                backend.close()
                theirs.settimeout(WAIT)
                assert theirs.recv(1) == b""

    def test_one_whose_peer_is_gone_already(self) -> None:
        with nothing_left():
            ours, theirs = socket.socketpair()
            theirs.close()
            with Serving(Mirror(), ours) as serving:
                until(lambda: not serving.alive)

    def test_serving_again_returns_at_once(self) -> None:
        ours, theirs = socket.socketpair()
        with Backend(Mirror(), ours) as backend:
            theirs.close()
            backend.serve()
            backend.serve()
        assert backend.statistics.connections == 1

    def test_nonsense_ends_it(self, caplog: pytest.LogCaptureFixture) -> None:
        ours, theirs = socket.socketpair()
        with theirs, Serving(Mirror(), ours) as serving:
            theirs.send(b"\xff" * 64)
            until(lambda: not serving.alive)
        assert "front-end disconnected" in errors_of(caplog)[0]

    @pytest.mark.parametrize("kind", ["datagram", "unconnected", "internet", "closed", "packets"])
    def test_others_are_refused_and_stay_the_callers(self, kind: str) -> None:
        with nothing_left():
            made = {
                "datagram": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
                "unconnected": lambda: socket.socket(socket.AF_UNIX),
                "internet": lambda: socket.socket(socket.AF_INET),
                "closed": lambda: socket.socket(socket.AF_UNIX),
                "packets": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),
            }[kind]()
            if kind == "closed":
                made.close()
            with made:
                before = made.fileno()
                with pytest.raises(DeviceError, match=r"stream socket|neither listens nor is"):
                    Backend(Mirror(), made)
                assert made.fileno() == before

    def test_descriptors_that_cannot_be_adopted(self, tmp_path: Path) -> None:
        with nothing_left():
            reading, writing = os.pipe()
            file = os.open(tmp_path, os.O_RDONLY)
            datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            for fd in (reading, file, datagrams.fileno()):
                with pytest.raises(DeviceError, match=f"descriptor {fd} is no Unix stream socket"):
                    adopt_socket(fd)
                os.fstat(fd)
            datagrams.close()
            for fd in (reading, writing, file):
                os.close(fd)
            for fd in (file, 1 << 30):
                with pytest.raises(DeviceError, match=f"descriptor {fd} cannot be used: Bad file"):
                    adopt_socket(fd)

    def test_an_adopted_one_is_not_passed_on(self) -> None:
        ours, theirs = socket.socketpair()
        os.set_inheritable(ours.fileno(), True)
        with theirs, adopt_socket(ours.detach()) as adopted:
            assert not os.get_inheritable(adopted.fileno())


class TestActivation:
    """What sd_listen_fds(3) promises."""

    @pytest.fixture
    def environment(self, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
        monkeypatch.setenv("LISTEN_FDNAMES", "x")
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        return monkeypatch

    def test_another_process_is_meant(self, environment: pytest.MonkeyPatch) -> None:
        environment.setenv("LISTEN_FDS", "1")
        environment.setenv("LISTEN_PID", str(os.getppid()))
        assert activation_sockets() == []
        assert not any(name.startswith("LISTEN_") for name in os.environ)

    def test_none(self, environment: pytest.MonkeyPatch) -> None:
        assert activation_sockets() == []
        environment.setenv("LISTEN_PID", str(os.getpid()))
        environment.setenv("LISTEN_FDS", "0")
        assert activation_sockets() == []

    @pytest.mark.parametrize("count", ["-1", "1x", "99999", "9" * 5000, "\u0663x"])
    def test_nonsense(self, environment: pytest.MonkeyPatch, count: str) -> None:
        environment.setenv("LISTEN_FDS", count)
        with pytest.raises(DeviceError, match=r"LISTEN_FDS is .* no number of descriptors"):
            activation_sockets()

    def test_one_that_is_no_socket_closes_those_before(
        self, environment: pytest.MonkeyPatch
    ) -> None:
        environment.setenv("LISTEN_FDS", "2")
        ours, theirs = socket.socketpair()
        environment.setattr("guestio.peer.endpoint.FIRST_ACTIVATION", 700)
        os.dup2(ours.fileno(), 700)
        ours.close()
        with theirs:
            with pytest.raises(DeviceError, match="descriptor 701 cannot be used"):
                activation_sockets()
            theirs.settimeout(WAIT)
            assert theirs.recv(1) == b""
