"""A device's state travels from one back-end to the next, and is refused where it is none."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from guestio.errors import DeviceError, GuestioError, ProtocolError
from guestio.vhost_user import Frontend
from guestio.vhost_user.device_state import StateFile
from guestio.vhost_user.frontend import NoAnswerError, RefusedError
from guestio.vhost_user.messages import (
    STATE_NO_FD,
    U64,
    ProtocolFeature,
    StateTransfer,
    encode_ack,
    encode_message,
)
from guestio.vhost_user.messages import FrontendRequest as F
from guestio.virtio import saved
from guestio.virtio.device import Device
from tests.kit.peer import Hand
from tests.kit.serving import (
    OK,
    VERSION_1,
    WAIT,
    Driver,
    Mirror,
    Serving,
    nothing_left,
    promptly,
    warnings_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SAVE, LOAD = 0, 1
KNOWN = 0x0100_0007
"""A count that does not end with a byte of zero, as a file does that was cut."""


class Counter(Mirror):
    """Counts its requests, which is all that it knows.

    Attributes:
        calls: What was done to it, in order.
    """

    max_state = 4096

    def __init__(self, known: int = 0) -> None:
        super().__init__(2)
        self.known = known
        self.calls: list[str] = []
        self.save_error: BaseException | None = None

    def process(self, queue: int, chain):  # as Mirror's
        self.known += 1
        return super().process(queue, chain)

    def reset(self) -> None:
        self.calls.append("reset")
        self.known = 0

    def save(self) -> bytes:
        if self.save_error is not None:
            raise self.save_error
        return struct.pack("<I", self.known)

    def restore(self, state: bytes) -> None:
        self.calls.append("restore")
        if len(state) != 4:
            raise DeviceError(f"a count has 4 bytes, not {len(state)}")
        (self.known,) = struct.unpack("<I", state)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


def state_of(known: int, device: Device | None = None) -> bytes:
    return saved.wrap(device or Counter(), struct.pack("<I", known))


def test_a_guest_goes_on_at_another_back_end(tmp_path: Path) -> None:
    here, there = Counter(), Counter()
    with (
        Serving(here, tmp_path / "a") as a,
        Serving(there, tmp_path / "b") as b,
        Driver(a.path) as driver,
    ):
        for _ in range(3):
            driver.run(0, b"abc")
        driver.stop(0)
        state = driver.frontend.save_state()
        with Driver(b.path, queues=0) as other:
            other.frontend.load_state(state)
            other.add_queue(0)
            assert other.run(0, b"abc") == (OK, b"cba")
            assert there.known == 4
        # The guest might have come back.
        driver.start(0, 3)
        assert driver.run(0, b"abc") == (OK, b"cba")
        assert here.known == 4


def test_the_state_is_that_of_before_a_status_of_zero(tmp_path: Path) -> None:
    """QEMU sets it at each stop, up to 7.2 before it asks where the queues stopped."""
    device = Counter()
    with Serving(device, tmp_path / "s") as s, Driver(s.path) as driver:
        for _ in range(3):
            driver.run(0, b"abc")
        driver.frontend.set_status(0)
        assert device.known == 0
        driver.frontend.set_status(0)
        driver.stop(0)
        assert saved.unwrap(device, driver.frontend.save_state()) == struct.pack("<I", 3)
        assert saved.unwrap(device, driver.frontend.save_state()) == struct.pack("<I", 3)


@pytest.mark.parametrize("anew", [False, True])
def test_a_driver_that_goes_on_after_a_status_of_zero(tmp_path: Path, anew: bool) -> None:
    """It does where its ring was: its guest was paused, or a migration failed. Or it is new."""
    device = Counter()
    with Serving(device, tmp_path / "s") as s, Driver(s.path) as driver:
        for _ in range(3):
            driver.run(0, b"abc")
        driver.frontend.set_status(0)
        base = driver.stop(0)
        assert base == 3
        if anew:
            driver.add_queue(0)
        else:
            driver.start(0, base)
        assert driver.run(0, b"abc") == (OK, b"cba")
        assert device.known == (1 if anew else 4)
        assert ("restore" in device.calls) is not anew
        driver.stop(0)
        # What is not used by now is not used later.
        (known,) = struct.unpack("<I", saved.unwrap(device, driver.frontend.save_state()))
        assert known == device.known


def test_a_reset_is_a_reset(tmp_path: Path) -> None:
    device = Counter()
    with Serving(device, tmp_path / "s") as s:
        with Driver(s.path) as driver:
            for _ in range(3):
                driver.run(0, b"abc")
            driver.frontend.set_status(0)
            driver.frontend.reset_device()
            assert saved.unwrap(device, driver.frontend.save_state()) == bytes(4)
        s.let_go()
        with Driver(s.path) as driver:
            driver.stop(0)
            assert saved.unwrap(device, driver.frontend.save_state()) == bytes(4)
    assert "restore" not in device.calls


def test_a_device_that_cannot_tell_its_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = Counter()
    with Serving(device, tmp_path / "s") as s, Driver(s.path) as driver:
        driver.run(0, b"abc")
        driver.stop(0)
        for error in (DeviceError("not now"), RuntimeError("what?")):
            device.save_error = error
            with pytest.raises(RefusedError):
                driver.frontend.save_state()
        device.save_error = None
        device.save = lambda: "text"  # type: ignore[assignment, method-assign] - nonsense
        with pytest.raises(RefusedError):
            driver.frontend.save_state()
        device.save = lambda: bytes(4097)  # type: ignore[method-assign] - too much
        with pytest.raises(RefusedError):
            driver.frontend.save_state()
    told = "\n".join(warnings_of(caplog))
    assert "not now" in told
    assert "Counter.save raised RuntimeError" in told
    assert "Counter.save returned 'text'; return bytes" in told
    assert "Counter.save returned 4097 bytes; its max_state is 4096" in told


def test_not_while_a_queue_runs(tmp_path: Path) -> None:
    device = Counter()
    with Serving(device, tmp_path / "s") as s, Driver(s.path) as driver:
        driver.run(0, b"abc")
        for attempt in (
            driver.frontend.save_state,
            lambda: driver.frontend.load_state(state_of(9)),
        ):
            with pytest.raises(RefusedError):
                attempt()
        assert driver.run(0, b"abc") == (OK, b"cba")
        assert device.known == 2


def changed(at: int) -> Callable[[bytes], bytes]:
    return lambda state: state[:at] + bytes([state[at] ^ 1]) + state[at + 1 :]


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda state: b"", "no state came for Counter"),
    "zeroes": (lambda state: bytes(64), "no state came for Counter"),
    "text": (lambda state: b"x" * 64, "no state of a guestio device"),
    "the beginning of a head": (lambda state: state[:20], "cut or damaged"),
    "a head": (lambda state: state[:44], "cut or damaged"),
    "cut": (lambda state: state[:-1], "cut or damaged"),
    "another format": (changed(8), "has format 0; 1 is known here"),
    "another device": (changed(12), "is of a device of type 5; Counter has type 4"),
    "another version": (changed(16), "is of version 0 of Counter; version 1 is known here"),
    "longer": (changed(21), "has 260 bytes|cut or damaged"),
    "much longer": (changed(26), "it takes 4096 at most"),
    "other contents": (changed(47), "cut or damaged"),
    "another digest": (changed(30), "cut or damaged"),
    "refused by the device": (
        lambda state: saved.wrap(Counter(), b"12345"),
        "a count has 4 bytes, not 5",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_state_that_is_none(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    device = Counter()
    damage, reason = BAD[kind]
    with Serving(device, tmp_path / "s") as s:
        with Driver(s.path) as driver:
            driver.run(0, b"abc")
            driver.stop(0)
            state = damage(state_of(KNOWN))
            with promptly(1), pytest.raises(RefusedError):
                driver.frontend.load_state(state)
            # As it was, or reset where only the device could tell.
            assert device.known == (0 if kind == "refused by the device" else 1)
            # The same front-end is served on, and may try again.
            driver.frontend.load_state(state_of(KNOWN))
            driver.start(0, 1)
            assert driver.run(0, b"abc") == (OK, b"cba")
            assert device.known == KNOWN + 1
        s.let_go()
        s.check_serves()
    assert any(re.search(reason, each) for each in warnings_of(caplog)), warnings_of(caplog)


def test_a_device_that_raises_anything(tmp_path: Path) -> None:
    class Broken(Counter):
        def restore(self, state: bytes) -> None:
            raise RuntimeError("what?")

    device = Broken()
    with Serving(device, tmp_path / "s") as s:
        with Driver(s.path) as driver:
            driver.stop(0)
            with pytest.raises(RefusedError):
                driver.frontend.load_state(state_of(7))
            assert device.calls[-1] == "reset"
        s.let_go()
        s.check_serves()


def test_a_device_without_a_state(tmp_path: Path) -> None:
    with Serving(Mirror(), tmp_path / "s") as s, Driver(s.path) as driver:
        driver.stop(0)
        state = driver.frontend.save_state()
        driver.frontend.load_state(state)
        with pytest.raises(RefusedError):
            driver.frontend.load_state(saved.wrap(Mirror(), b"1"))


def test_what_is_missing_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Serving(Counter(), tmp_path / "s") as s, Driver(s.path) as driver:
        driver.stop(0)
        assert driver.frontend._ask(F.CHECK_DEVICE_STATE) == 1
        driver.frontend.save_state()
        assert driver.frontend._ask(F.CHECK_DEVICE_STATE) == 1
    assert any("no transfer" in each for each in warnings_of(caplog))


@pytest.mark.parametrize(("direction", "phase"), [(2, 0), (0, 1), (2**32 - 1, 2**32 - 1)])
def test_a_transfer_of_another_kind(tmp_path: Path, direction: int, phase: int) -> None:
    with Serving(Counter(), tmp_path / "s") as s, Driver(s.path) as driver:
        driver.stop(0)
        fds = os.pipe()
        try:
            reply = driver.frontend.request(
                F.SET_DEVICE_STATE_FD, StateTransfer(direction, phase), fds[1:], has_reply=True
            )
        finally:
            for fd in fds:
                os.close(fd)
        assert U64.decode(reply).value == 1 | STATE_NO_FD


def descriptors() -> dict[str, Callable[[], tuple[int, ...]]]:
    def pair() -> tuple[int, ...]:
        return tuple(each.detach() for each in socket.socketpair())

    return {
        "a pipe": lambda: os.pipe()[::-1],
        "the reading end": os.pipe,
        "a socket": pair,
        "a file": lambda: (os.open("/proc/self/exe", os.O_RDONLY),),
        "a directory": lambda: (os.open("/", os.O_RDONLY),),
        "a path": lambda: (os.open("/", os.O_PATH),),
        "nothing": lambda: (os.open("/dev/null", os.O_RDWR),),
        "zeroes": lambda: (os.open("/dev/zero", os.O_RDWR),),
        "an eventfd": lambda: (os.eventfd(0),),
        "a terminal": os.openpty,
    }


@pytest.mark.parametrize("kind", descriptors())
@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_a_descriptor_of_any_kind_is_closed(tmp_path: Path, kind: str, direction: int) -> None:
    """Nothing is read from it or written to it, so that it cannot be waited for."""
    with Serving(Counter(), tmp_path / "s") as s:
        with Driver(s.path) as driver:
            driver.run(0, b"abc")
            driver.stop(0)
            theirs, *ours = descriptors()[kind]()
            with promptly(1):
                with driver.frontend._exchange.ask_for_fds(
                    F.SET_DEVICE_STATE_FD,
                    encode_message(F.SET_DEVICE_STATE_FD, StateTransfer(direction, 0)),
                    [theirs],
                ) as message:
                    assert U64.decode(message.payload).value == 0
                    given = message.take_fd()
                for fd in (theirs, *ours):
                    os.close(fd)
            if direction == SAVE:
                assert os.read(given, 100) == state_of(1)
                assert os.read(given, 100) == b""
            else:
                os.write(given, state_of(5))
            os.close(given)
            assert driver.frontend._ask(F.CHECK_DEVICE_STATE) == 0
        s.let_go()
        s.check_serves()


def test_a_state_without_an_end_ends(tmp_path: Path) -> None:
    """The file that the front-end writes has room for a state and no more."""
    with Serving(Counter(), tmp_path / "s") as s:
        with Driver(s.path) as driver:
            driver.stop(0)
            with pytest.raises(GuestioError, match="cannot be moved"):
                driver.frontend.load_state(bytes(1 << 20))
            # A transfer that was never ended is forgotten.
            driver.frontend.load_state(state_of(1))
        s.let_go()
        s.check_serves()


def test_a_front_end_that_begins_transfers_for_ever(tmp_path: Path) -> None:
    with Serving(Counter(), tmp_path / "s") as s:
        with nothing_left(), Driver(s.path) as driver:
            driver.stop(0)
            for _ in range(300):
                with contextlib.closing(driver.frontend._begin_transfer(LOAD)):  # type: ignore[arg-type] - a number
                    pass
            driver.frontend.close()
            s.let_go()
        s.check_serves()


def test_a_front_end_that_leaves_amid_a_transfer(tmp_path: Path) -> None:
    with Serving(Counter(), tmp_path / "s") as s:
        for direction in (SAVE, LOAD):
            with nothing_left():
                with Driver(s.path) as driver:
                    driver.stop(0)
                    driver.frontend._begin_transfer(direction).close()  # type: ignore[arg-type] - a number
                s.let_go()
        s.check_serves()


def test_a_transfer_without_the_feature(tmp_path: Path) -> None:
    with Serving(Counter(), tmp_path / "s") as s, Frontend(s.path, timeout=WAIT) as frontend:
        frontend.negotiate(VERSION_1, ProtocolFeature.REPLY_ACK)
        for attempt in (frontend.save_state, lambda: frontend.load_state(b"")):
            with pytest.raises(ProtocolError, match="DEVICE_STATE was not negotiated"):
                attempt()
        assert frontend._ask(F.CHECK_DEVICE_STATE) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("state_version", -1), ("state_version", 1 << 32), ("max_state", -1), ("max_state", None)],
)
def test_a_device_whose_numbers_are_none(tmp_path: Path, name: str, value: object) -> None:
    device = Counter()
    setattr(device, name, value)
    with pytest.raises((ValueError, TypeError), match=f"Counter.{name}"):
        Serving(device, tmp_path / "s")


class TestFrontend:
    """The front-end's side, with back-ends that use its pipe, or something of their own."""

    @staticmethod
    @contextlib.contextmanager
    def answering(serve: Callable[[Hand], None], timeout: float = WAIT) -> Iterator[Frontend]:
        ours, theirs = socket.socketpair()
        hand = Hand(theirs)
        frontend = Frontend(ours, timeout=timeout)
        frontend.protocol_features = int(ProtocolFeature.DEVICE_STATE)
        thread = threading.Thread(target=serve, args=(hand,))
        thread.start()
        try:
            yield frontend
        finally:
            frontend.close()
            thread.join(WAIT)
            assert not thread.is_alive()
            hand.close()

    @staticmethod
    def begin(hand: Hand, value: int = STATE_NO_FD, fds: tuple[int, ...] = ()) -> int:
        """Answer the beginning of a transfer; the descriptor that came."""
        message = hand.expect(F.SET_DEVICE_STATE_FD)
        hand.main.send(encode_ack(F.SET_DEVICE_STATE_FD, value), fds)
        return message.take_fd()

    @staticmethod
    def end(hand: Hand, value: int = 0) -> None:
        hand.expect(F.CHECK_DEVICE_STATE).close()
        hand.ack(F.CHECK_DEVICE_STATE, value)

    @pytest.mark.parametrize("size", [0, 1, 1 << 20])
    def test_its_own_pipe(self, size: int) -> None:
        state = os.urandom(size)
        came: list[bytes] = []

        def serve(hand: Hand) -> None:
            with os.fdopen(self.begin(hand), "wb", buffering=0) as pipe:
                written = 0
                while written < size:
                    written += pipe.write(state[written:]) or 0
            self.end(hand)
            with os.fdopen(self.begin(hand), "rb") as pipe:
                came.append(pipe.read())
            self.end(hand)

        with self.answering(serve) as frontend:
            assert frontend.save_state() == state
            frontend.load_state(state)
        assert came == [state]

    @pytest.mark.parametrize("kind", ["memory", "pipe", "socket"])
    def test_what_the_back_end_gives(self, kind: str) -> None:
        def ends() -> tuple[int, int]:
            if kind == "pipe":
                return os.pipe()
            if kind == "socket":
                one, other = socket.socketpair()
                return one.detach(), other.detach()
            fd = os.memfd_create("state")
            return fd, os.dup(fd)

        came: list[bytes] = []

        def serve(hand: Hand) -> None:
            reading, writing = ends()
            os.write(writing, b"state")
            if kind == "memory":
                os.lseek(writing, 0, os.SEEK_SET)
            os.close(writing)
            os.close(self.begin(hand, 0, (reading,)))
            os.close(reading)
            self.end(hand)
            reading, writing = ends()
            os.close(self.begin(hand, 0, (writing,)))
            os.close(writing)
            hand.expect(F.CHECK_DEVICE_STATE).close()
            if kind == "memory":
                os.lseek(reading, 0, os.SEEK_SET)
            came.append(os.read(reading, 100))
            os.close(reading)
            hand.ack(F.CHECK_DEVICE_STATE)

        with self.answering(serve) as frontend:
            assert frontend.save_state() == b"state"
            frontend.load_state(b"STATE")
        assert came == [b"STATE"]

    @pytest.mark.parametrize("kind", ["/dev/zero", "/proc/self/exe", "/"])
    def test_what_a_state_cannot_be_moved_through(self, kind: str) -> None:
        def serve(hand: Hand) -> None:
            fd = os.open(kind, os.O_RDONLY)
            os.close(self.begin(hand, 0, (fd,)))
            os.close(fd)

        with (
            self.answering(serve) as frontend,
            pytest.raises(ProtocolError, match="something else"),
        ):
            frontend.save_state()

    def test_a_state_without_an_end(self) -> None:
        def serve(hand: Hand) -> None:
            with (
                contextlib.suppress(BrokenPipeError),
                os.fdopen(self.begin(hand), "wb", buffering=0) as pipe,
            ):
                while True:
                    pipe.write(bytes(1 << 16))

        with (
            self.answering(serve) as frontend,
            pytest.raises(ProtocolError, match="more than 1000000 bytes"),
        ):
            frontend.save_state(1_000_000)

    @pytest.mark.parametrize("direction", [SAVE, LOAD])
    def test_a_pipe_that_stalls(self, direction: int) -> None:
        held: list[int] = []

        def serve(hand: Hand) -> None:
            held.append(self.begin(hand))
            if direction == SAVE:
                os.write(held[0], b"the beginning")

        with (
            self.answering(serve, timeout=0.3) as frontend,
            promptly(1),
            pytest.raises(NoAnswerError, match="does not go on"),
        ):
            if direction == SAVE:
                frontend.save_state()
            else:
                frontend.load_state(bytes(1 << 20))
        os.close(held[0])

    @pytest.mark.parametrize("value", [1, 1 | STATE_NO_FD, 0xFF])
    def test_a_refusal(self, value: int) -> None:
        with (
            self.answering(lambda hand: os.close(self.begin(hand, value))) as frontend,
            pytest.raises(RefusedError, match="SET_DEVICE_STATE_FD"),
        ):
            frontend.save_state()

    def test_a_refusal_at_the_end(self) -> None:
        def serve(hand: Hand) -> None:
            os.close(self.begin(hand))
            self.end(hand, 3)

        with (
            self.answering(serve) as frontend,
            pytest.raises(RefusedError, match="state with 0x3"),
        ):
            frontend.save_state()

    def test_answers_that_contradict_themselves(self) -> None:
        def serve(hand: Hand) -> None:
            for value, count in ((0, 0), (STATE_NO_FD, 1), (0, 2)):
                fds = tuple(os.dup(0) for _ in range(count))
                os.close(self.begin(hand, value, fds))
                for fd in fds:
                    os.close(fd)

        with self.answering(serve) as frontend:
            for _ in range(3):
                with pytest.raises(ProtocolError, match="was answered with"):
                    frontend.save_state()

    def test_a_back_end_that_is_gone(self) -> None:
        def serve(hand: Hand) -> None:
            os.close(self.begin(hand))
            hand.close()

        with self.answering(serve) as frontend, pytest.raises(GuestioError):
            frontend.save_state()


def test_a_file_of_a_state_has_its_end() -> None:
    with contextlib.closing(StateFile.to_read(b"abc")) as file:
        assert os.read(file.fd, 10) == b"abc"
        with pytest.raises(PermissionError):
            os.write(file.fd, b"x")
    with contextlib.closing(StateFile.to_write(8)) as file:
        assert os.write(file.fd, b"12345678") == 8
        with pytest.raises(PermissionError):
            os.write(file.fd, b"9")
