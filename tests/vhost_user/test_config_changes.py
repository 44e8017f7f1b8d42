"""Changes of the configuration space: what a front-end is told, and when."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from guestio.errors import GuestioError
from guestio.vhost_user.backend_channel import MESSAGES_AT_A_TIME
from guestio.vhost_user.channel import Channel, Message
from guestio.vhost_user.frontend import PROTOCOL_FEATURES, Frontend
from guestio.vhost_user.messages import (
    BackendRequest,
    FrontendRequest,
    ProtocolFeature,
    encode_ack,
    encode_message,
)
from guestio.virtio.host import DeviceHost
from tests.kit.serving import (
    OK,
    VERSION_1,
    WAIT,
    Driver,
    Mirror,
    Serving,
    errors_of,
    nothing_left,
    until,
    warnings_of,
)

CHANGE = BackendRequest.CONFIG_CHANGE_MSG
F = FrontendRequest


class Changing(Mirror):
    """Changes its configuration space when it is told to."""

    def attached(self, host: DeviceHost) -> None:
        self.host = host

    def change(self, value: int) -> None:
        self.space = bytes([value]) * 64
        self.host.config_changed()


@pytest.fixture
def device() -> Changing:
    return Changing()


@pytest.fixture(params=[False, True], ids=["one thread", "queue threads"])
def serving(device: Changing, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    with Serving(device, tmp_path / "socket", queue_threads=request.param) as made:
        yield made


class Quiet:
    """A front-end that has a queue running, and does nothing on the back-end's channel by itself.

    Args:
        serving: The back-end.
        protocol: Protocol features to negotiate.
    """

    def __init__(self, serving: Serving, protocol: int = PROTOCOL_FEATURES) -> None:
        self.driver = Driver(serving.path, queues=0, answer="caller")
        self.frontend = self.driver.frontend
        self.frontend.negotiate(VERSION_1, protocol)
        self.frontend.set_memory(self.driver.memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.close()

    @property
    def back(self) -> Channel:
        channel = self.frontend.iotlb._channel
        assert channel is not None
        return channel

    def start(self) -> None:
        self.driver.add_queue(0)

    def told(self, seconds: float = WAIT) -> Message | None:
        """The next message on the back-end's channel."""
        return self.back.recv(seconds)

    def untold(self) -> bool:
        """Whether nothing is to come, with all that was asked for before done."""
        self.frontend.sync()
        return self.back.recv(0.05) is None

    def answer(self, value: int = 0, request: int = CHANGE) -> None:
        self.back.send(encode_ack(request, value))


@pytest.mark.parametrize("answer", ["thread", "caller"])
@pytest.mark.parametrize("iommu", [False, True], ids=["direct", "iommu"])
def test_a_front_end_is_told_and_reads_it(
    serving: Serving, device: Changing, answer: Any, iommu: bool
) -> None:
    with Driver(serving.path, iommu=iommu, answer="thread" if iommu else answer) as driver:
        frontend = driver.frontend
        for value in range(1, 4):
            device.change(value)
            assert frontend.wait_config_change(WAIT, seen=value - 1)
            assert frontend.config_changes == value
            assert frontend.get_config(0, 8) == bytes([value]) * 8
            assert driver.run(0, b"on")[0] == OK
        assert not frontend.wait_config_change(0.01, seen=3)
    assert serving.stats.config_changes == 3


def test_the_message_asks_for_an_answer_where_that_was_negotiated(
    serving: Serving, device: Changing
) -> None:
    with Quiet(serving) as quiet:
        quiet.start()
        device.change(1)
        message = quiet.told()
        assert message is not None
        assert (message.request, message.payload) == (CHANGE, b"")
        assert message.header.need_reply
        quiet.answer()
        device.change(2)
        assert quiet.told() is not None
    with Quiet(serving, PROTOCOL_FEATURES & ~ProtocolFeature.REPLY_ACK) as quiet:
        quiet.start()
        for value in range(3):
            device.change(value)
            message = quiet.told()
            assert message is not None
            assert not message.header.need_reply


@pytest.mark.parametrize("lacking", [ProtocolFeature.BACKEND_REQ, ProtocolFeature.CONFIG])
def test_nothing_is_told_that_was_not_negotiated(
    serving: Serving, device: Changing, lacking: ProtocolFeature
) -> None:
    with Driver(serving.path, queues=0, answer="caller") as driver:
        frontend = driver.frontend
        ours, theirs = socket.socketpair()
        with ours, theirs:
            if lacking == ProtocolFeature.CONFIG:
                frontend.request(F.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
            # Only network cards are announced.
            features = PROTOCOL_FEATURES & ~lacking & ~ProtocolFeature.RARP
            frontend.request(F.SET_PROTOCOL_FEATURES, struct.pack("=Q", features))
            driver.add_queue(0)
            device.change(1)
            assert driver.run(0, b"on")[0] == OK
            frontend.sync()
            ours.setblocking(False)
            with pytest.raises(BlockingIOError):
                ours.recv(1)
    assert serving.stats.config_changes == 0


def test_a_change_before_a_queue_runs_is_told_once_one_does(
    serving: Serving, device: Changing
) -> None:
    """QEMU would ignore it before, or crash, and reads nothing again when it starts a queue."""
    with Quiet(serving) as quiet:
        device.change(1)
        device.change(2)
        assert quiet.untold()
        quiet.start()
        assert quiet.told() is not None
        quiet.answer()
        assert quiet.untold()
        quiet.driver.stop(0)
        device.change(3)
        assert quiet.untold()
        quiet.driver.start(0)
        assert quiet.told() is not None


def test_a_change_that_was_answered_while_no_queue_ran_is_told_again(
    serving: Serving, device: Changing
) -> None:
    with Quiet(serving) as quiet:
        quiet.start()
        device.change(1)
        assert quiet.told() is not None
        quiet.driver.stop(0)
        quiet.answer()
        assert quiet.untold()
        quiet.driver.start(0)
        assert quiet.told() is not None


def test_changes_before_an_answer_are_told_together(serving: Serving, device: Changing) -> None:
    with Quiet(serving) as quiet:
        quiet.start()
        device.change(0)
        assert quiet.told() is not None
        for value in range(100):
            device.change(value)
        assert quiet.untold()
        quiet.answer()
        assert quiet.told() is not None, "what came after it was told is told as well"
        quiet.answer()
        assert quiet.untold()
        assert quiet.frontend.get_config(0, 1) == bytes([99])


def test_a_refusal_is_logged_and_the_next_change_is_told(
    serving: Serving, device: Changing, caplog: pytest.LogCaptureFixture
) -> None:
    with Quiet(serving) as quiet:
        quiet.start()
        device.change(1)
        assert quiet.told() is not None
        quiet.answer(7)
        until(lambda: warnings_of(caplog))
        assert warnings_of(caplog) == [
            "the front-end refused to look at the changed configuration space: 7"
        ]
        device.change(2)
        assert quiet.told() is not None


def test_a_new_channel_is_told_what_the_old_one_did_not_answer(
    serving: Serving, device: Changing
) -> None:
    with Quiet(serving) as quiet:
        quiet.start()
        device.change(1)
        assert quiet.told() is not None
        quiet.frontend._open_backend_channel()
        assert quiet.told() is not None
        quiet.answer()
        assert quiet.untold()


def test_a_front_end_that_does_not_read_costs_no_more_than_its_socket_holds(
    serving: Serving, device: Changing
) -> None:
    """Without acknowledgements nothing tells whether it has read a message."""
    with Quiet(serving, PROTOCOL_FEATURES & ~ProtocolFeature.REPLY_ACK) as quiet:
        quiet.start()
        connection = serving.backend._connection
        assert connection is not None

        def full() -> bool:
            device.change(1)
            channel = connection._back._channel
            return channel is not None and channel.backlog > 0

        until(full)
        sent = serving.stats.config_changes
        for value in range(1000):
            device.change(value % 256)
            quiet.frontend.sync()
        assert serving.stats.config_changes == sent
        assert quiet.driver.run(0, b"on")[0] == OK
        received = 0
        while (message := quiet.told(0.2)) is not None:
            assert message.request == CHANGE
            received += 1
        assert received == sent + 1, "one for all that came while it was full"


@pytest.mark.parametrize(
    "garbage",
    [
        encode_ack(BackendRequest.VRING_CALL, 0),
        encode_ack(CHANGE, 0),
        encode_message(CHANGE),
        encode_message(CHANGE, b"x" * 9, reply=True),
        b"\xff" * 20,
    ],
    ids=["another reply", "one too many", "a request", "too long", "bytes"],
)
def test_garbage_ends_the_channel_and_nothing_else(
    serving: Serving, device: Changing, caplog: pytest.LogCaptureFixture, garbage: bytes
) -> None:
    with Quiet(serving) as quiet:
        quiet.start()
        device.change(1)
        assert quiet.told() is not None
        quiet.answer()
        quiet.back.send(garbage)
        until(lambda: errors_of(caplog))
        assert "the back-end channel is of no use any more" in errors_of(caplog)[0]
        device.change(2)
        assert quiet.driver.run(0, b"on")[0] == OK
        quiet.frontend._open_backend_channel()
        assert quiet.told() is not None


def test_an_answer_among_acknowledged_misses(serving: Serving, device: Changing) -> None:
    """Behind an IOMMU both kinds of replies come on one channel; each finds whom it is for."""
    with Driver(serving.path, iommu=True, map_all=False) as driver:
        frontend = driver.frontend
        for value in range(1, 2 * MESSAGES_AT_A_TIME):
            device.change(value % 256)
            # Nothing is mapped there: the miss is refused, which only a reply tells.
            number = driver.submit(0, b"lost")
            assert frontend.wait_config_change(WAIT, seen=frontend.config_changes - 1)
            driver.wait(0, number)
        refused = serving.stats.iotlb_refused
        assert refused
        until(lambda: frontend.config_changes == serving.stats.config_changes)
    assert serving.stats.iotlb_timeouts == 0


def test_any_thread_may_announce(serving: Serving, device: Changing) -> None:
    with Driver(serving.path) as driver:
        threads = [
            threading.Thread(target=lambda: [device.host.config_changed() for _ in range(500)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seen = driver.frontend.config_changes
        device.change(200)
        assert driver.frontend.wait_config_change(WAIT, seen=seen)
        until(lambda: driver.frontend.config_changes == serving.stats.config_changes)
        assert driver.frontend.get_config(0, 1) == bytes([200])


def test_one_front_end_is_not_told_what_happened_before_it_came(
    serving: Serving, device: Changing
) -> None:
    device.change(1)
    until(lambda: not device.host._config_told)
    with Quiet(serving) as quiet:
        quiet.start()
        assert quiet.untold()
    serving.let_go()
    device.change(2)
    until(lambda: not device.host._config_told)
    with Quiet(serving) as quiet:
        quiet.start()
        assert quiet.untold()


def test_a_wait_ends_with_the_back_end(device: Changing, tmp_path: Path) -> None:
    with (
        nothing_left(),
        Serving(device, tmp_path / "socket") as serving,
        Driver(serving.path) as driver,
    ):
        threading.Timer(0.05, serving.backend.stop).start()
        started = time.monotonic()
        with pytest.raises(GuestioError):
            driver.frontend.wait_config_change(3 * WAIT)
        assert time.monotonic() - started < 2 * WAIT


def test_a_wait_without_a_channel(serving: Serving) -> None:
    with Frontend(serving.path, timeout=WAIT) as frontend:
        with pytest.raises(ValueError, match="has no channel"):
            frontend.wait_config_change(1)
        with pytest.raises(TypeError):
            frontend.wait_config_change(1, seen="1")  # type: ignore[arg-type]
