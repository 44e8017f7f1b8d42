"""Descriptors that a front-end passes never block a thread, whatever they are."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestio._core.base import syscalls as core
from guestio.budgets import CLOSE_GRACE, MAX_CLOSERS
from guestio.errors import BackingError, ProtocolError
from guestio.peer import foreign
from guestio.vhost_user.messages import (
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    SingleMemoryRegion,
    VringFd,
    encode_message,
)
from tests.kit.closing import closing
from tests.kit.hostile import Lingering, Raw
from tests.kit.serving import (
    OK,
    WAIT,
    Driver,
    Mirror,
    Serving,
    errors_of,
    footprint,
    left_since,
    promptly,
    until,
)

F = FrontendRequest
FULL = 2**64 - 2
SOON = 0.5


@pytest.fixture
def lingering() -> Iterator[Lingering]:
    made = Lingering()
    yield made
    made.end()
    until(lambda: not closing(), "closed for ever")


class TestEventfds:
    def test_a_full_one_that_waits(self) -> None:
        """Its owner cleared O_NONBLOCK, and it is not read."""
        fd = os.eventfd(0)
        try:
            os.eventfd_write(fd, FULL)
            assert os.get_blocking(fd)
            core.notify_eventfd(fd)
            assert os.eventfd_read(fd) >= FULL
        finally:
            os.close(fd)

    @pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK, os.EFD_SEMAPHORE])
    def test_each_notification_counts(self, flags: int) -> None:
        fd = os.eventfd(0, flags)
        try:
            for _ in range(1000):
                core.notify_eventfd(fd)
            total = 1000 if flags & os.EFD_SEMAPHORE else 1
            assert sum(os.eventfd_read(fd) for _ in range(total)) == 1000
        finally:
            os.close(fd)

    def test_from_many_threads(self) -> None:
        fd = os.eventfd(0)
        try:
            threads = [
                threading.Thread(target=lambda: [core.notify_eventfd(fd) for _ in range(2000)])
                for _ in range(4)
            ]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
            assert os.eventfd_read(fd) == 8000
        finally:
            os.close(fd)

    def test_in_a_child(self) -> None:
        fd = os.eventfd(0)
        try:
            child = os.fork()
            if not child:
                core.notify_eventfd(fd)
                os._exit(0)
            os.waitpid(child, 0)
            assert os.eventfd_read(fd) == 1
        finally:
            os.close(fd)

    def test_what_is_none_is_left_alone(self) -> None:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        core.notify_eventfd(writer)
        core.notify_eventfd(12345)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        os.close(reader)
        os.close(writer)

    def test_draining_does_not_wait(self) -> None:
        fd = os.eventfd(3)
        core.drain_eventfd(fd)
        core.drain_eventfd(fd)
        os.set_blocking(fd, False)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
        os.close(fd)


class TestKinds:
    def test_a_file_cannot_pretend_to_be_an_eventfd(self, tmp_path: Path) -> None:
        path = tmp_path / "anon_inode:[eventfd]"
        path.touch()
        with path.open() as file, pytest.raises(ProtocolError, match="not an eventfd"):
            foreign.check_eventfd(file.fileno(), "call fd")

    @pytest.mark.parametrize("make", [lambda: os.memfd_create("x"), lambda: os.open("/", 0)])
    def test_others_are_named(self, make: Callable[[], int]) -> None:
        fd = make()
        with pytest.raises(ProtocolError, match=r"the kick fd of queue 3 is /.*, not an eventfd"):
            foreign.check_eventfd(fd, "kick fd of queue 3")
        os.close(fd)

    @pytest.mark.parametrize("path", ["/proc/self/status", "/sys/kernel/profiling", "/dev/null"])
    def test_files_of_the_kernel_are_no_memory(self, path: str) -> None:
        if not Path(path).exists():
            pytest.skip(f"no {path}")
        fd = os.open(path, os.O_RDONLY)
        with pytest.raises(BackingError, match=f"{Path(path).name}.* cannot be guest memory"):
            foreign.check_memory(fd)
        os.close(fd)

    def test_a_directory_on_a_disk_is_no_memory(self, tmp_path: Path) -> None:
        fd = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BackingError, match=r"not a regular file|file system"):
            foreign.check_memory(fd)
        os.close(fd)

    def test_memory(self) -> None:
        fd = os.memfd_create("x")
        foreign.check_memory(fd)
        os.close(fd)

    def test_files_of_tmpfs(self) -> None:
        path = Path("/dev/shm/guestio-test-foreign")
        with path.open("w+b") as file:
            path.unlink()
            foreign.check_memory(file.fileno())

    def test_the_kind_of_a_socket(self) -> None:
        assert core.socket_kind(0) is None or os.isatty(0)
        for family, kind in (
            (socket.AF_UNIX, socket.SOCK_STREAM),
            (socket.AF_UNIX, socket.SOCK_DGRAM),
            (socket.AF_INET, socket.SOCK_STREAM),
        ):
            with socket.socket(family, kind) as sock:
                assert core.socket_kind(sock.fileno()) == (family, kind)


class TestClosing:
    def test_what_closes_at_once_is_closed_afterwards(self) -> None:
        before = footprint()
        reader, writer = os.pipe()
        foreign.close_foreign([reader, writer, os.memfd_create("x"), os.eventfd(0)])
        until(lambda: not left_since(before))

    def test_one_that_closes_at_once_blocks_no_thread(self, lingering: Lingering) -> None:
        fds = [os.dup(lingering.sock.fileno()) for _ in range(3)]
        lingering.forget()
        with promptly(2 * CLOSE_GRACE + SOON):
            foreign.close_foreign(fds)
            foreign.close_foreign([os.open("/dev/null", os.O_RDONLY)])
        until(lambda: closing() == 1, "closed too early, or not passed on")
        # Its number is free already.
        for fd in fds:
            with pytest.raises(OSError):
                os.fstat(fd)

    def test_more_than_threads(self) -> None:
        stuck = [Lingering() for _ in range(3)]
        fds = []
        for each in stuck:
            fds.append(each.sock.detach())
        assert core.close_aside(fds[:2], 0, 2) == 2
        assert core.close_aside([fds[2]], 0, 2) == 3
        os.fstat(fds[2])
        stuck[0].end()
        until(lambda: closing() <= 2)
        for each in stuck:
            each.end()
        until(lambda: not closing())
        with pytest.raises(OSError):
            os.fstat(fds[2])

    @pytest.mark.parametrize(("grace", "most"), [(-1, 1), (2, 1), (float("nan"), 1), (0, 0)])
    def test_nonsense_is_refused_before_anything_is_closed(self, grace: float, most: int) -> None:
        with pytest.raises(ValueError):
            core.close_aside([0], grace, most)
        os.fstat(0)
        assert MAX_CLOSERS >= 1


def give_as(request: int, payload: object = b"") -> Callable[[Raw, Lingering], None]:
    def send(raw: Raw, fd: Lingering) -> None:
        raw.negotiate()
        fd.give_away(raw, request, payload)

    return send


def _beside_a_payload(raw: Raw, fd: Lingering) -> None:
    message = encode_message(F.SET_FEATURES, bytes(8))
    raw.send(message[:12])
    raw.send(message[12:], [fd.sock.fileno()])
    fd.forget()


def _in_a_crowd(raw: Raw, fd: Lingering) -> None:
    raw.send(encode_message(F.GET_FEATURES), [fd.sock.fileno()] * 253)
    fd.forget()


REGION = MemoryRegion(0, 0x1000, 0x10000, 0)
LINGERING: dict[str, Callable[[Raw, Lingering], None]] = {
    "kick": give_as(F.SET_VRING_KICK, VringFd(0, has_fd=True)),
    "call": give_as(F.SET_VRING_CALL, VringFd(0, has_fd=True)),
    "err": give_as(F.SET_VRING_ERR, VringFd(0, has_fd=True)),
    "memory table": give_as(F.SET_MEM_TABLE, MemoryTable((REGION,))),
    "memory region": give_as(F.ADD_MEM_REG, SingleMemoryRegion(REGION)),
    "back-end channel": give_as(F.SET_BACKEND_REQ_FD),
    "where none belongs": give_as(F.GET_FEATURES),
    "with what is not known": give_as(99, b"what"),
    "in front of an IOTLB message": give_as(F.IOTLB_MSG, bytes(32)),
    "beside a payload": _beside_a_payload,
    "many": _in_a_crowd,
}


@pytest.mark.parametrize("name", LINGERING)
def test_a_socket_that_takes_long_to_close(
    survivor: Serving, lingering: Lingering, name: str
) -> None:
    with Raw(survivor) as raw:
        raw.request(F.GET_FEATURES)
        raw.sock.recv(100)
        # The last descriptor is to be theirs.
        with survivor.held():
            LINGERING[name](raw, lingering)
            raw.sock.shutdown(socket.SHUT_WR)
        assert raw.closed()
    survivor.check_serves()
    until(lambda: closing() == 1, "it was not passed on")
    lingering.end()


def test_one_that_waits_to_be_accepted(tmp_path: Path) -> None:
    fd = Lingering()
    try:
        with Serving(Mirror(), tmp_path / "socket") as serving, Raw(serving) as first:
            first.request(F.GET_FEATURES)
            first.sock.recv(100)
            second = Raw(serving)
            fd.give_away(second, F.GET_FEATURES)
            serving.backend.stop()
            serving._thread.join(WAIT)
            with promptly(SOON):
                serving.backend.close()
            second.close()
    finally:
        fd.end()
        until(lambda: not closing())


def test_a_full_call_eventfd(survivor: Serving) -> None:
    """At its maximum and without O_NONBLOCK: a write would wait for ever."""
    with Driver(survivor.path) as driver:
        handle = driver.handles[0]
        assert handle.call_fd is not None
        assert driver.run(0, b"first") == (OK, b"tsrif")
        handle.clear_call()
        os.eventfd_write(handle.call_fd, FULL)
        os.set_blocking(handle.call_fd, True)
        assert driver.run(0, b"second") == (OK, b"dnoces")
        driver.stop(0)


def test_a_full_error_eventfd(survivor: Serving) -> None:
    with Driver(survivor.path) as driver:
        handle = driver.handles[0]
        os.eventfd_write(handle.err_fd, FULL)
        os.set_blocking(handle.err_fd, True)
        broken = survivor.stats.queue_errors
        driver.rings[0].set_avail_idx(5000)
        handle.kick()
        until(lambda: survivor.stats.queue_errors == broken + 1)
        driver.frontend.sync()


def test_a_kick_eventfd_that_waits(survivor: Serving) -> None:
    """A read when there is nothing in it waits for ever."""
    with Driver(survivor.path) as driver:
        handle = driver.handles[0]
        assert handle.kick_fd is not None
        os.set_blocking(handle.kick_fd, True)
        os.eventfd_write(handle.kick_fd, FULL)
        driver.frontend.sync()
        os.eventfd_read(handle.kick_fd)
        driver.stop(0)


def test_the_connection_itself_as_call_fd(
    survivor: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """Held by the back-end, its end would never be seen."""
    with Raw(survivor) as raw:
        raw.request(F.SET_VRING_CALL, VringFd(0, has_fd=True), [raw.sock.fileno()])
        assert raw.closed()
    (line,) = errors_of(caplog)
    assert "the call fd of queue 0 is socket:[" in line


def socket_pair() -> tuple[int, int]:
    one, two = socket.socketpair()
    return one.detach(), two.detach()


def own_end_in_call_fd(raw: Raw) -> None:
    """Give a call fd in whose queue is the connection itself, some sockets deep."""
    inner, outer = socket.socketpair(), socket.socketpair()
    socket.send_fds(inner[1], [b"x"], [raw.sock.fileno()])
    socket.send_fds(outer[1], [b"x"], [inner[0].fileno()])
    raw.request(F.SET_VRING_CALL, VringFd(0, has_fd=True), [outer[0].fileno()])
    for sock in (*inner, *outer):
        sock.close()


def own_end_in_call_fd_later(raw: Raw) -> None:
    """The same, but it is sent after the call fd was taken."""
    one, two = socket.socketpair()
    raw.request(F.SET_VRING_CALL, VringFd(0, has_fd=True), [one.fileno()])
    raw.request(F.GET_FEATURES)
    raw.sock.recv(100)
    with contextlib.suppress(BrokenPipeError):
        socket.send_fds(two, [b"x"], [raw.sock.fileno()])
    one.close()
    two.close()


def own_end_in_channel(raw: Raw) -> None:
    """The same with the back-end channel, which stays open."""
    one, two = socket.socketpair()
    raw.negotiate()
    socket.send_fds(two, [b"x"], [raw.sock.fileno()])
    raw.request(F.SET_BACKEND_REQ_FD, b"", [one.fileno()])
    one.close()
    raw.own(two.detach())


def own_end_to_itself(raw: Raw) -> None:
    """The connection itself is under way on the connection."""
    raw.request(F.GET_FEATURES, b"", [raw.sock.fileno()])


def own_end_in_half_a_message(raw: Raw) -> None:
    raw.send(encode_message(F.SET_FEATURES, bytes(8))[:5], [raw.sock.fileno()])


@pytest.mark.parametrize(
    "give",
    [
        own_end_in_call_fd,
        own_end_in_call_fd_later,
        own_end_in_channel,
        own_end_to_itself,
        own_end_in_half_a_message,
    ],
)
def test_one_that_leaves_its_end_of_the_connection_is_gone(
    survivor: Serving, give: Callable[[Raw], None]
) -> None:
    """A process that dies does not hang up: its end lives on where the back-end has it."""
    with Raw(survivor) as raw:
        give(raw)
    survivor.let_go()


class TestPipes:
    """User-mode Linux takes notifications from a socket pair; others from a pipe."""

    @pytest.mark.parametrize("make", [os.pipe, socket_pair])
    def test_is_notified(self, survivor: Serving, make: Callable[[], tuple[int, int]]) -> None:
        reader, writer = make()
        with Driver(survivor.path) as driver:
            _set_call(driver, writer)
            assert driver.run(0, b"one") == (OK, b"eno")
            assert os.read(reader, 100) == (1).to_bytes(8, "little")
        os.close(reader)

    @pytest.mark.parametrize("make", [os.pipe, socket_pair])
    def test_a_full_one_blocks_no_thread(
        self, survivor: Serving, make: Callable[[], tuple[int, int]]
    ) -> None:
        reader, writer = make()
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(65536))
        os.set_blocking(writer, True)
        keep = os.dup(writer)
        with Driver(survivor.path) as driver:
            _set_call(driver, writer)
            for _ in range(3):
                assert driver.run(0, b"one") == (OK, b"eno")
            os.set_blocking(keep, True)
        os.close(reader)
        os.close(keep)

    @pytest.mark.parametrize("make", [os.pipe, socket_pair])
    def test_one_that_is_closed(
        self, survivor: Serving, make: Callable[[], tuple[int, int]]
    ) -> None:
        reader, writer = make()
        os.close(reader)
        with Driver(survivor.path) as driver:
            _set_call(driver, writer)
            assert driver.run(0, b"one") == (OK, b"eno")

    def test_sockets_that_have_names_are_none(self, tmp_path: Path) -> None:
        """A front-end's own connection, its listener, a datagram pair, and one without a peer."""
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
            listener.bind(str(tmp_path / "socket"))
            assert not foreign.is_pipe(client.fileno())
            listener.listen()
            client.connect(str(tmp_path / "socket"))
            accepted, _ = listener.accept()
            for sock in (listener, client, accepted, *pair):
                assert not foreign.is_pipe(sock.fileno())
            accepted.close()
        for sock in pair:
            sock.close()

    def test_a_socket_with_no_end_of_messages_is_closed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(foreign, "MAX_QUEUED", 2)
        before = footprint()
        one, two = socket.socketpair()
        with one:
            for _ in range(3):
                socket.send_fds(one, [b"x"], [0])
            notifier = foreign.PipeNotifier(two.detach())
            one.settimeout(WAIT)
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b""
            os.eventfd_write(notifier.fd, 1)
            notifier.close()
        until(lambda: not left_since(before))

    @pytest.mark.parametrize("lacking", ["an eventfd", "a thread", "memory"])
    def test_one_that_cannot_be_made_leaves_nothing(
        self, monkeypatch: pytest.MonkeyPatch, lacking: str
    ) -> None:
        def fail(*_: object, **__: object) -> int:
            raise {"a thread": RuntimeError, "memory": MemoryError}.get(lacking, OSError)("lacking")

        target = {"an eventfd": "os.eventfd", "a thread": "threading.Thread.start"}.get(lacking)
        before = footprint()
        one, two = os.pipe()
        with monkeypatch.context() as patch:
            patch.setattr(target or "guestio.peer.foreign.socket_kind", fail)
            patch.setattr("threading.excepthook", lambda _: None)
            if target is None:
                notifier = foreign.PipeNotifier(two)
                notifier._thread.join(WAIT)
            else:
                with pytest.raises((OSError, RuntimeError), match="lacking"):
                    foreign.PipeNotifier(two)
        os.close(one)
        assert not foreign.PipeNotifier._alive
        until(lambda: not left_since(before))

    def test_not_too_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(foreign, "MAX_PIPES", 1)
        before = footprint()
        (one, first), (two, second) = os.pipe(), os.pipe()
        notifier = foreign.PipeNotifier(first)
        with pytest.raises(ProtocolError, match="1 pipes are notified already"):
            foreign.PipeNotifier(second)
        notifier.close()
        os.close(one)
        os.close(two)
        until(lambda: not left_since(before))


def _set_call(driver: Driver, fd: int) -> None:
    """Have another descriptor notified of queue 0; it is closed here."""
    driver.frontend.request(F.SET_VRING_CALL, VringFd(0, has_fd=True), [fd])
    os.close(fd)
    driver.frontend.sync()
