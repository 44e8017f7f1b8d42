"""A front-end whose back-end lies, stalls, floods or goes away: bounded, defined, nothing left."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guestio.addr import Permissions
from guestio.budgets import FRONTEND_MISSES_PER_TURN
from guestio.errors import GuestioError, ProtocolError
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user.channel import Channel, PeerGoneError
from guestio.vhost_user.frontend import PROTOCOL_FEATURES, Frontend
from guestio.vhost_user.messages import (
    U64,
    VHOST_USER_F_PROTOCOL_FEATURES,
    BackendRequest,
    Config,
    FrontendRequest,
    Inflight,
    IotlbMessage,
    IotlbType,
    ProtocolFeature,
    SingleMemoryRegion,
    VringState,
    encode_ack,
    encode_iotlb,
    encode_message,
)
from guestio.vhost_user.request_channel import NoAnswerError, RefusedError
from guestio.virtio.layout import RingLayout
from tests.kit.peer import WAIT, Hand, nothing_left

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_F = FrontendRequest
PAGE = 4096
SOON = 0.2  # a time limit that is meant to pass
FEATURES = encode_message(_F.GET_FEATURES, U64(1), reply=True)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


class Pair:
    """A front-end and the raw socket of its back-end."""

    def __init__(self, timeout: float = WAIT, **options: object) -> None:
        ours, self.peer = socket.socketpair()
        self.frontend = Frontend(ours, timeout=timeout, **options)  # type: ignore[arg-type]
        self.peer.settimeout(WAIT)

    def close(self) -> None:
        self.peer.close()
        self.frontend.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def build(timeout: float = WAIT, **options: object) -> Pair:
        made.append(Pair(timeout, **options))
        return made[-1]

    yield build
    for pair in made:
        pair.close()
    made.clear()


def send_fds(sock: socket.socket, data: bytes, count: int) -> None:
    """Send bytes with fds, unsolicited."""
    with open(os.devnull, "rb") as file:  # noqa: PTH123
        socket.send_fds(sock, [data], [file.fileno()] * count)


def stays_broken(frontend: Frontend, failure: type[GuestioError]) -> None:
    """Every later call raises at once what broke the connection."""
    assert isinstance(frontend.failure, failure)
    began = time.monotonic()
    for call in (frontend.sync, frontend.get_status, lambda: frontend.stop_queue(0)):
        with pytest.raises(failure):
            call()
    assert time.monotonic() - began < WAIT / 2


class TestSilence:
    @pytest.mark.parametrize("part", [0, 1, 11, 12, 13, 19])
    def test_a_part_of_a_reply(self, make: Callable[..., Pair], part: int) -> None:
        pair = make(SOON)
        pair.peer.sendall(FEATURES[:part])
        with pytest.raises(NoAnswerError, match="GET_FEATURES"):
            pair.frontend.sync()
        stays_broken(pair.frontend, NoAnswerError)

    def test_a_reply_byte_by_byte_is_not_waited_for_longer(self, make: Callable[..., Pair]) -> None:
        """Each byte is in time; the reply is not."""
        pair = make(SOON)
        stop = threading.Event()

        def trickle() -> None:
            pair.peer.recv(12)
            for byte in FEATURES:
                if stop.wait(SOON / 4):
                    return
                pair.peer.sendall(bytes([byte]))

        thread = threading.Thread(target=trickle)
        thread.start()
        with pytest.raises(NoAnswerError):
            pair.frontend.sync()
        stop.set()
        thread.join()

    def test_a_back_end_that_does_not_read(self, make: Callable[..., Pair]) -> None:
        pair = make(SOON)
        with pytest.raises(ProtocolError, match="did not read"):
            for _ in range(100_000):
                pair.frontend.request(_F.SET_CONFIG, Config(0, bytes(256)))
        stays_broken(pair.frontend, ProtocolError)

    def test_a_queue_that_does_not_stop(self, make: Callable[..., Pair]) -> None:
        pair = make(SOON)
        with pytest.raises(NoAnswerError, match="GET_VRING_BASE"):
            pair.frontend.stop_queue(0)


class TestTheEnd:
    @pytest.mark.parametrize("part", [1, 11, 12, 19])
    def test_in_the_middle_of_a_reply(self, make: Callable[..., Pair], part: int) -> None:
        pair = make()
        pair.peer.sendall(FEATURES[:part])
        pair.peer.shutdown(socket.SHUT_WR)
        with pytest.raises(ProtocolError, match="closed the connection after"):
            pair.frontend.sync()
        stays_broken(pair.frontend, ProtocolError)

    def test_instead_of_a_reply(self, make: Callable[..., Pair], pool: ThreadPoolExecutor) -> None:
        pair = make()
        calls = [pool.submit(pair.frontend.sync), pool.submit(pair.frontend.queue_count)]
        pair.peer.recv(12)
        pair.peer.close()
        for call in calls[:1]:
            with pytest.raises(PeerGoneError):
                call.result(WAIT)
        stays_broken(pair.frontend, PeerGoneError)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (encode_message(_F.GET_FEATURES, U64(1)), "no call waits"),
        (encode_message(_F.GET_QUEUE_NUM, U64(1), reply=True), "no call waits"),
        (encode_message(77, U64(1), reply=True), "no call waits"),
        (FEATURES[:4] + struct.pack("<I", 4) + FEATURES[8:], "version"),
        (FEATURES[:8] + struct.pack("<I", 1 << 20), "payload of 1048576 bytes"),
        (FEATURES[:8] + b"\xff\xff\xff\xff", "payload"),
        (b"\xff" * 64, "version"),
    ],
    ids=["no-reply", "another", "unknown", "version", "long", "longest", "ones"],
)
def test_what_no_reply_can_be(make: Callable[..., Pair], reply: bytes, message: str) -> None:
    pair = make()
    pair.peer.sendall(reply)
    with pytest.raises(ProtocolError, match=message):
        pair.frontend.sync()
    stays_broken(pair.frontend, ProtocolError)


@pytest.mark.parametrize("size", [0, 4, 7, 9, 16, 256])
def test_a_number_of_another_size(make: Callable[..., Pair], size: int) -> None:
    pair = make()
    pair.peer.sendall(encode_message(_F.GET_FEATURES, bytes(size), reply=True))
    with pytest.raises(ProtocolError, match=f"{size} bytes"):
        pair.frontend.sync()


def test_a_second_reply(make: Callable[..., Pair]) -> None:
    pair = make()
    pair.peer.sendall(2 * FEATURES)
    pair.frontend.sync()
    with pytest.raises(ProtocolError, match="no call waits"):
        pair.frontend.get_status()
    stays_broken(pair.frontend, ProtocolError)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_fds_where_none_are_allowed(make: Callable[..., Pair], count: int) -> None:
    pair = make()
    send_fds(pair.peer, FEATURES, count)
    with pytest.raises(ProtocolError, match="fds"):
        pair.frontend.sync()
    stays_broken(pair.frontend, ProtocolError)


def test_fds_with_another_reply_while_some_are_expected(
    make: Callable[..., Pair], pool: ThreadPoolExecutor
) -> None:
    pair = make()
    wanted = pool.submit(pair.frontend.get_inflight, 1, 8)
    pair.peer.recv(36)
    other = pool.submit(pair.frontend.sync)
    pair.peer.recv(12)
    send_fds(pair.peer, FEATURES, 1)
    for call in (wanted, other):
        with pytest.raises(ProtocolError, match="GET_FEATURES came with fds"):
            call.result(WAIT)


@pytest.mark.parametrize(("count", "queues"), [(0, 1), (2, 1), (1, 7)])
def test_a_wrong_region_for_requests_in_flight(
    make: Callable[..., Pair], pool: ThreadPoolExecutor, count: int, queues: int
) -> None:
    pair = make()
    call = pool.submit(pair.frontend.get_inflight, 1, 8)
    pair.peer.recv(36)
    reply = encode_message(_F.GET_INFLIGHT_FD, Inflight(4096, 0, queues, 8), reply=True)
    send_fds(pair.peer, reply, count) if count else pair.peer.sendall(reply)
    with pytest.raises(ProtocolError):
        call.result(WAIT)


@pytest.mark.parametrize("state", [VringState(1, 0), VringState(0, 0x10000), VringState(0, 2**31)])
def test_a_queue_that_stopped_nowhere(make: Callable[..., Pair], state: VringState) -> None:
    pair = make()
    pair.peer.sendall(encode_message(_F.GET_VRING_BASE, state, reply=True))
    with pytest.raises(ProtocolError, match="ring"):
        pair.frontend.stop_queue(0)


@pytest.mark.parametrize(
    "config", [Config(0, bytes(8)), Config(4, bytes(4)), Config(0, b""), b"abc", b""]
)
def test_another_part_of_the_configuration(make: Callable[..., Pair], config: object) -> None:
    pair = make()
    data = encode_message(_F.GET_CONFIG, config, reply=True)  # type: ignore[arg-type]
    pair.peer.sendall(data)
    with pytest.raises((ProtocolError, RefusedError)):
        pair.frontend.get_config(0, 4)


class Asked:
    """A front-end with an open channel for misses, of which the test has the other end."""

    def __init__(self, answer: str, timeout: float = WAIT) -> None:
        ours, theirs = socket.socketpair()
        self.frontend = Frontend(ours, timeout=timeout, answer=answer)  # type: ignore[arg-type]
        self.hand = Hand(theirs)
        self.service = self.frontend.iotlb
        asked, self.back_channel = socket.socketpair()
        self.backing = Backing.memfd(0x10000)
        self.service.memory = GuestRegionCollection.from_regions([MmapRegion(0, self.backing)])
        self.service.open(asked)
        self.back_channel.settimeout(WAIT)

    def close(self) -> None:
        self.frontend.close()
        self.hand.close()
        self.back_channel.close()
        self.service.memory = None
        self.backing.close()


@pytest.fixture
def ask() -> Iterator[Callable[..., Asked]]:
    made: list[Asked] = []

    def build(answer: str = "thread", timeout: float = WAIT) -> Asked:
        made.append(Asked(answer, timeout))
        return made[-1]

    yield build
    for each in made:
        each.close()
    made.clear()


MISS = encode_iotlb(BackendRequest.IOTLB_MSG, IotlbMessage.miss(0, 1, 1), need_reply=False)


def failed(asked: Asked) -> GuestioError:
    """What broke the connection, which may take a moment."""
    deadline = time.monotonic() + WAIT
    while asked.frontend.failure is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert asked.frontend.failure is not None
    return asked.frontend.failure


class TestMisses:
    def test_a_flood_leaves_the_caller_its_turn(self, ask: Callable[..., Asked]) -> None:
        asked = ask("caller")
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                try:
                    asked.back_channel.sendall(64 * MISS)
                except OSError:
                    return

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            for _ in range(5):
                # What one read takes in is answered too, or the rest would go unnoticed.
                assert asked.service.service() <= FRONTEND_MISSES_PER_TURN + 16384 // len(MISS)
        finally:
            stop.set()
            asked.service.close()
            thread.join()

    def test_what_a_turn_leaves_can_be_seen(
        self, ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many misses came at once: the descriptor is readable, or all are answered."""
        monkeypatch.setattr("guestio.vhost_user.iotlb_service.FRONTEND_MISSES_PER_TURN", 5)
        asked = ask("caller")
        total = 1500
        asked.back_channel.sendall(total * MISS)
        answered = 0
        while answered < total:
            assert select.select([asked.service], [], [], WAIT)[0]
            handled = asked.service.service()
            assert handled <= 5 + 16384 // len(MISS) + 1
            answered += handled
        assert answered == total == asked.service.counts.misses

    def test_a_flood_does_not_keep_us_from_closing(self, ask: Callable[..., Asked]) -> None:
        asked = ask()
        thread = threading.Thread(target=self.send_until_closed, args=(asked,))
        thread.start()
        while asked.service.counts.misses < 1000:
            time.sleep(0.001)
        began = time.monotonic()
        asked.frontend.close()
        assert time.monotonic() - began < WAIT / 2
        thread.join()

    @staticmethod
    def send_until_closed(asked: Asked) -> None:
        try:
            while True:
                asked.back_channel.sendall(64 * MISS)
        except OSError:
            pass

    def test_replies_that_are_never_read(self, ask: Callable[..., Asked]) -> None:
        asked = ask(timeout=SOON)
        miss = encode_iotlb(BackendRequest.IOTLB_MSG, IotlbMessage.miss(0, 1, 1), need_reply=True)
        asked.back_channel.settimeout(0.05)
        try:
            while asked.frontend.failure is None:
                asked.back_channel.sendall(64 * miss)
        except OSError:
            pass  # it does not read either, or is gone
        assert "did not read" in str(failed(asked))

    def test_an_update_that_is_never_acknowledged(self, ask: Callable[..., Asked]) -> None:
        asked = ask(timeout=SOON)
        asked.service.map(0, 0, PAGE, Permissions.READ)
        asked.back_channel.sendall(MISS)
        assert isinstance(failed(asked), NoAnswerError)

    @pytest.mark.parametrize(
        "data",
        [
            encode_ack(BackendRequest.IOTLB_MSG, 0),
            encode_message(BackendRequest.IOTLB_MSG, MISS[12:], reply=True),
            encode_message(BackendRequest.CONFIG_CHANGE_MSG, reply=True),
            encode_message(BackendRequest.IOTLB_MSG, bytes(31)),
            encode_message(BackendRequest.IOTLB_MSG, bytes(33)),
            MISS[:8] + b"\xff\xff\xff\xff",
            MISS[:4] + b"\0\0\0\0" + MISS[8:],
        ],
        ids=["ack", "reply", "config", "short", "long", "huge", "version"],
    )
    def test_what_breaks_the_protocol(self, ask: Callable[..., Asked], data: bytes) -> None:
        asked = ask()
        asked.back_channel.sendall(data)
        assert isinstance(failed(asked), ProtocolError)
        stays_broken(asked.frontend, ProtocolError)

    @pytest.mark.parametrize("count", [1, 8])
    def test_fds(self, ask: Callable[..., Asked], count: int) -> None:
        asked = ask()
        send_fds(asked.back_channel, MISS, count)
        assert "fds" in str(failed(asked))

    @pytest.mark.parametrize("part", [1, 12, 30])
    def test_an_end_in_mid_miss(self, ask: Callable[..., Asked], part: int) -> None:
        asked = ask()
        asked.back_channel.sendall(MISS[:part])
        asked.back_channel.close()
        assert isinstance(failed(asked), ProtocolError)

    @pytest.mark.parametrize("part", [1, 12, 30])
    def test_half_a_miss_message_blocks_no_thread(
        self, ask: Callable[..., Asked], pool: ThreadPoolExecutor, part: int
    ) -> None:
        asked = ask()
        asked.back_channel.sendall(MISS[:part])
        call = pool.submit(asked.service.unmap, (0, PAGE))
        assert asked.hand.update().type == IotlbType.INVALIDATE
        call.result(WAIT)

    def test_a_target_beyond_the_last_address(self, ask: Callable[..., Asked]) -> None:
        """A guest may map any target; what lies behind the last address is no memory."""
        asked = ask()
        asked.service.map(0, 2**64 - PAGE, 2 * PAGE, Permissions.READ)
        asked.hand.back_channel = Channel(asked.back_channel, with_fds=False)
        for iova in (0, PAGE, 2 * PAGE - 1):
            asked.hand.ask(IotlbMessage.miss(iova, 1, 1))
            assert asked.hand.answer() == 1
        assert asked.frontend.failure is None
        asked.back_channel = socket.socket()

    def test_a_hook_that_raises_is_not_silent(
        self, ask: Callable[..., Asked], caplog: pytest.LogCaptureFixture
    ) -> None:
        asked = ask()

        def hook(miss: IotlbMessage) -> None:
            raise ZeroDivisionError("a bug")

        asked.service.miss_hook = hook  # type: ignore[assignment]
        asked.back_channel.sendall(MISS)
        assert "ZeroDivisionError: a bug" in str(failed(asked))
        assert "a bug" in caplog.text


PROTOCOL_BIT = 1 << VHOST_USER_F_PROTOCOL_FEATURES
HONEST = {
    _F.GET_FEATURES: U64(PROTOCOL_BIT | 1 << 32 | 1 << 33),
    _F.GET_PROTOCOL_FEATURES: U64(int(PROTOCOL_FEATURES)),
    _F.GET_QUEUE_NUM: U64(1),
    _F.GET_MAX_MEM_SLOTS: U64(32),
    _F.GET_STATUS: U64(0),
    _F.GET_VRING_BASE: VringState(0, 0),
    _F.GET_CONFIG: Config(0, bytes(8)),
}


class Liar(threading.Thread):
    """A back-end that answers as it should, except where it is told to lie; then it goes away."""

    def __init__(self, sock: socket.socket, lies: dict[int, tuple[str, bytes]]) -> None:
        super().__init__()
        self.channel, self.sock, self.lies = Channel(sock), sock, lies
        self.asking: list[socket.socket] = []

    def run(self) -> None:
        try:
            for number in range(1000):
                message = self.channel.recv(WAIT)
                if message is None:
                    return
                with message:
                    if message.request == _F.SET_BACKEND_REQ_FD and message.fd_count:
                        self.asking.append(socket.socket(fileno=message.take_fd()))
                    self.answer(number, message.request, message.header.need_reply)
        except (GuestioError, OSError, ValueError):
            return
        finally:
            for sock in self.asking:
                sock.close()
            self.channel.close()

    def answer(self, number: int, request: int, wanted: bool) -> None:
        if request in HONEST:
            reply = encode_message(request, HONEST[_F(request)], reply=True)
        elif wanted or request == _F.IOTLB_MSG:
            reply = encode_ack(request, 0)
        else:
            reply = b""
        kind, data = self.lies.get(number, ("", b""))
        if kind == "instead":
            reply = data
        elif kind == "before":
            reply = data + reply
        elif kind == "cut":
            self.sock.setblocking(True)
            self.sock.sendall(reply[: len(data)])
            raise ValueError("enough")
        elif kind == "ask" and self.asking:
            self.asking[-1].setblocking(False)
            self.asking[-1].send(data)
        elif kind == "fds" and reply:
            send_fds(self.sock, reply, 1 + len(data) % 8)
            return
        if reply:
            self.channel.send(reply)


codes = st.sampled_from([int(code) for code in HONEST] + [int(_F.IOTLB_MSG), 0, 99, 2**32 - 1])
numbers = st.one_of(st.sampled_from([0, 1, 2**16, 2**32, 2**63, 2**64 - 1]), st.integers(0, 2**20))
replies = st.one_of(
    st.builds(lambda code, n: encode_ack(code, n), codes, numbers),
    st.builds(
        lambda code, body, reply: encode_message(code, body, reply=reply),
        codes,
        st.binary(max_size=40),
        st.booleans(),
    ),
    st.builds(
        lambda code, at, n: encode_message(code, VringState(at, n), reply=True),
        codes,
        st.integers(0, 3),
        st.integers(0, 2**32 - 1),
    ),
    st.builds(struct.Struct("<III").pack, codes, st.integers(0, 15), st.integers(0, 2**32 - 1)),
    st.binary(max_size=30),
)
misses = st.one_of(
    st.builds(
        lambda iova, perm, kind, reply: encode_iotlb(
            BackendRequest.IOTLB_MSG, IotlbMessage(iova, 1, 0, perm, kind), need_reply=reply
        ),
        st.sampled_from([0, PAGE, 2**64 - 1]),
        st.integers(0, 255),
        st.integers(0, 255),
        st.booleans(),
    ),
    replies,
)
lies = st.one_of(
    st.tuples(st.sampled_from(["instead", "before"]), replies),
    st.tuples(st.sampled_from(["cut", "fds"]), st.binary(max_size=20)),
    st.tuples(st.just("ask"), misses),
)


@pytest.mark.slow
@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(told=st.dictionaries(st.integers(0, 32), lies, min_size=1, max_size=4))
def test_lies_end_in_an_error_of_ours(told: dict[int, tuple[str, bytes]]) -> None:
    """A whole life of a front-end, with a back-end that lies now and then."""
    with nothing_left():
        ours, theirs = socket.socketpair()
        liar = Liar(theirs, told)
        liar.start()
        backing = Backing.memfd(0x10000)
        frontend = Frontend(ours, timeout=0.1)
        try:
            live(frontend, backing)
        except GuestioError:
            pass  # and nothing else
        finally:
            frontend.close()
            frontend.iotlb.memory = None
            liar.join(WAIT)
            assert not liar.is_alive()
        assert isinstance(frontend.failure, GuestioError)
        backing.close()


def live(frontend: Frontend, backing: Backing) -> None:
    frontend.negotiate(1 << 32 | 1 << 33, int(PROTOCOL_FEATURES & ~ProtocolFeature.INFLIGHT_SHMFD))
    frontend.queue_count()
    frontend.max_memory_slots()
    memory = GuestRegionCollection.from_regions([MmapRegion(0, backing)])
    frontend.set_memory(memory)
    frontend.get_config(0, 8)
    frontend.iotlb.map(0, 0, 0x10000, Permissions.READ_WRITE)
    queue = frontend.start_queue(0, RingLayout.contiguous(0, 8))
    queue.kick()
    frontend.iotlb.push(0)
    frontend.iotlb.unmap((PAGE, PAGE), (3 * PAGE, PAGE))
    frontend.set_status(15)
    frontend.get_status()
    frontend.stop_queue(0)
    frontend.set_memory(GuestRegionCollection())
    frontend.reset_device()


class TestSlots:
    """Memory that is exchanged region by region, with a back-end that may refuse any of it."""

    @pytest.fixture
    def backings(self) -> Iterator[list[Backing]]:
        made = [Backing.memfd(0x10000) for _ in range(4)]
        yield made
        for backing in made:
            backing.close()

    @pytest.mark.parametrize("refused", [None, 0, 1, 2, 3])
    def test_what_goes_is_gone_before_what_comes(
        self,
        make: Callable[..., Pair],
        pool: ThreadPoolExecutor,
        backings: list[Backing],
        refused: int | None,
    ) -> None:
        """The new regions are where the old ones were; a refusal leaves the back-end as it was."""
        pair = make()
        pair.frontend.protocol_features = int(PROTOCOL_FEATURES)
        hand = Hand(pair.peer)
        old, new = (
            GuestRegionCollection.from_regions(
                MmapRegion(start, backing)
                for start, backing in zip((0, 1 << 20), backings[first : first + 2], strict=True)
            )
            for first in (0, 2)
        )
        there: list[tuple[int, int]] = []

        def serve(count: int, refuse: int | None) -> list[str]:
            order = []
            for number in range(count):
                message = hand.main.recv(WAIT)
                assert message is not None
                with message:
                    entry = SingleMemoryRegion.decode(message.payload).region
                    place = entry.guest_addr, entry.user_addr
                    order.append(_F(message.request).name)
                    if number != refuse and message.request == _F.REM_MEM_REG:
                        there.remove(place)
                    elif number != refuse:
                        assert entry.guest_addr not in {start for start, _ in there}
                        there.append(place)
                    hand.ack(message.request, int(number == refuse))
            return order

        def places(memory: GuestRegionCollection) -> list[tuple[int, int]]:
            return [(r.start, r.host_address()) for r in memory]

        call = pool.submit(pair.frontend.set_memory, old)
        serve(2, None)
        call.result(WAIT)
        call = pool.submit(pair.frontend.set_memory, new)
        if refused is None:
            assert serve(4, None) == ["REM_MEM_REG"] * 2 + ["ADD_MEM_REG"] * 2
            call.result(WAIT)
            assert sorted(there) == places(new)
            assert pair.frontend.iotlb.memory is new
        else:
            serve(2 * refused + 1, refused)
            with pytest.raises(RefusedError, match="MEM_REG"):
                call.result(WAIT)
            assert sorted(there) == places(old)
            assert pair.frontend.iotlb.memory is old
        pair.frontend.iotlb.memory = None
        del old, new, call

    @pytest.mark.parametrize("bad", [None, [], (), GuestRegionCollection, "memory"])
    def test_what_is_no_memory(self, make: Callable[..., Pair], bad: object) -> None:
        pair = make()
        with pytest.raises(TypeError, match="memory"):
            pair.frontend.set_memory(bad)  # type: ignore[arg-type]
