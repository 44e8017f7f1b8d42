"""The IOMMU's side of a connection, with the back-end played by hand."""

from __future__ import annotations

import random
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from guestio._core.iommu.intervals import IntervalMap
from guestio.addr import Permissions
from guestio.errors import ProtocolError
from guestio.iommu import Iotlb
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user.channel import Channel
from guestio.vhost_user.iotlb_service import IotlbService, MissAction, MissAnswer
from guestio.vhost_user.messages import (
    U64,
    BackendRequest,
    FrontendRequest,
    IotlbMessage,
    IotlbType,
    encode_ack,
    encode_message,
)
from guestio.vhost_user.request_channel import NoAnswerError, RefusedError, RequestChannel
from tests.kit.peer import WAIT, Hand, nothing_left

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
PAGE = 4096
IOVA = 0xFFFF0000
LOW, HIGH = 0x100000, 0x110000
_F = FrontendRequest


class Rig:
    """An IotlbService on one end, a hand on the other, and two adjacent regions of memory."""

    def __init__(self, **options: Any) -> None:
        settings = {"answer": "thread", "granularity": PAGE, "pipeline": 1} | options
        ours, theirs = socket.socketpair()
        asked, asking = socket.socketpair()
        self.exchange = RequestChannel(ours, WAIT)
        self.hand = Hand(theirs)
        self.service = IotlbService(self.exchange, **settings)
        self.backings = [Backing.memfd(0x10000) for _ in range(2)]
        self.service.memory = GuestRegionCollection.from_regions(
            MmapRegion(*each) for each in zip((LOW, HIGH), self.backings, strict=True)
        )
        self.service.open(asked)
        self.hand.back_channel = Channel(asking, with_fds=False)

    def vua(self, gpa: int) -> int:
        assert self.service.memory is not None
        return self.service.memory.host_address(gpa)

    def miss(self, iova: int, perm: Permissions = R, *, need_reply: bool = True) -> None:
        self.hand.ask(IotlbMessage.miss(iova, 1, int(perm)), need_reply=need_reply)

    def close(self) -> None:
        self.exchange.shut_down()
        self.service.close()
        self.exchange.close()
        self.hand.close()
        self.service.memory = None
        for backing in self.backings:
            backing.close()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def build(**options: Any) -> Rig:
        made.append(Rig(**options))
        return made[-1]

    yield build
    for rig in made:
        rig.close()
    made.clear()


@pytest.fixture
def rig(make: Callable[..., Rig]) -> Rig:
    return make()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


class TestMisses:
    def test_an_update_and_after_its_acknowledgement_the_reply(self, rig: Rig) -> None:
        rig.service.map(IOVA, LOW + 0x2000, PAGE, RW)
        rig.miss(IOVA + 0x123, W)
        update = rig.hand.update(answer=False)
        assert update == IotlbMessage.update(IOVA, PAGE, rig.vua(LOW + 0x2000), 3)
        assert rig.hand.answer(0.05) is None, "answered before the update was acknowledged"
        rig.hand.ack(_F.IOTLB_MSG)
        assert rig.hand.answer() == 0
        assert (rig.service.counts.misses, rig.service.counts.updates) == (1, 1)

    def test_the_update_asks_for_an_acknowledgement(self, rig: Rig) -> None:
        rig.service.map(IOVA, LOW, PAGE, R)
        rig.miss(IOVA)
        assert rig.hand.expect(_F.IOTLB_MSG).header.need_reply
        rig.hand.ack(_F.IOTLB_MSG)
        assert rig.hand.answer() == 0

    def test_no_mapping_no_update(self, rig: Rig) -> None:
        rig.service.map(IOVA, LOW, PAGE, RW)
        rig.miss(IOVA + PAGE)
        assert rig.hand.answer() == 1
        assert rig.hand.silent()
        assert rig.service.counts.refused == 1

    @pytest.mark.parametrize(
        ("granted", "wanted", "fits"),
        [(R, R, True), (R, W, False), (R, RW, False), (W, W, True), (W, R, False), (RW, RW, True)],
    )
    def test_permissions_must_fit(
        self, rig: Rig, granted: Permissions, wanted: Permissions, fits: bool
    ) -> None:
        rig.service.map(IOVA, LOW, PAGE, granted)
        rig.miss(IOVA, wanted)
        if fits:
            assert rig.hand.update().perm == int(granted)
        assert rig.hand.answer() == (0 if fits else 1)

    def test_a_permission_that_does_not_exist_is_refused(self, rig: Rig) -> None:
        rig.service.map(IOVA, LOW, PAGE, RW)
        rig.hand.ask(IotlbMessage(IOVA, PAGE, 0, 7, IotlbType.MISS))
        assert rig.hand.answer() == 1

    def test_without_need_reply_there_is_none(self, rig: Rig) -> None:
        rig.service.map(IOVA, LOW, PAGE, R)
        rig.miss(IOVA, need_reply=False)
        assert rig.hand.update().iova == IOVA
        rig.miss(IOVA + PAGE, need_reply=False)
        assert rig.hand.answer(0.05) is None
        assert rig.service.counts.refused == 1

    def test_an_update_that_the_back_end_refuses(self, rig: Rig) -> None:
        rig.service.map(IOVA, LOW, PAGE, R)
        rig.miss(IOVA)
        rig.hand.update(value=5)
        assert rig.hand.answer() == 1

    def test_a_mapping_to_what_is_not_memory(self, rig: Rig) -> None:
        rig.service.map(IOVA, 0xDEAD000, PAGE, R)
        rig.miss(IOVA)
        assert rig.hand.answer() == 1


class TestGranularity:
    def test_a_page_by_default(self, rig: Rig) -> None:
        rig.service.map(IOVA, LOW, 4 * PAGE, R)
        rig.miss(IOVA + 2 * PAGE + 5)
        assert rig.hand.update()[:3] == (IOVA + 2 * PAGE, PAGE, rig.vua(LOW + 2 * PAGE))

    def test_what_is_mapped_ends_within_the_granule(self, make: Callable[..., Rig]) -> None:
        rig = make(granularity=4 * PAGE)
        rig.service.map(IOVA + PAGE, LOW, 2 * PAGE, R)
        rig.miss(IOVA + 2 * PAGE)
        assert rig.hand.update()[:3] == (IOVA + PAGE, 2 * PAGE, rig.vua(LOW))

    def test_all_that_is_mapped(self, make: Callable[..., Rig]) -> None:
        rig = make(granularity=None)
        rig.service.map(IOVA, LOW, 8 * PAGE, R)
        rig.miss(IOVA + 3 * PAGE)
        assert rig.hand.update()[:3] == (IOVA, 8 * PAGE, rig.vua(LOW))

    def test_regions_are_not_crossed(self, make: Callable[..., Rig]) -> None:
        rig = make(granularity=None)
        rig.service.map(IOVA, LOW + 0xE000, 4 * PAGE, R)
        rig.miss(IOVA)
        assert rig.hand.update()[:3] == (IOVA, 2 * PAGE, rig.vua(LOW + 0xE000))
        rig.miss(IOVA + 3 * PAGE)
        assert rig.hand.update()[:3] == (IOVA + 2 * PAGE, 2 * PAGE, rig.vua(HIGH))

    def test_the_last_page_of_the_space(self, rig: Rig) -> None:
        rig.service.map(2**64 - PAGE, LOW, PAGE, R)
        rig.miss(2**64 - 1)
        assert rig.hand.update()[:2] == (2**64 - PAGE, PAGE)

    @pytest.mark.parametrize("bad", [{"granularity": 3}, {"granularity": 0}, {"pipeline": 0}])
    def test_bad_options(self, bad: dict[str, int]) -> None:
        ours, theirs = socket.socketpair()
        exchange = RequestChannel(ours, 1)
        with theirs, pytest.raises(ValueError):
            IotlbService(exchange, **({"answer": "thread", "granularity": 1, "pipeline": 1} | bad))
        exchange.close()


class TestRevocation:
    def test_unmap_returns_when_it_is_acknowledged(
        self, rig: Rig, pool: ThreadPoolExecutor
    ) -> None:
        rig.service.map(IOVA, LOW, 2 * PAGE, RW)
        call = pool.submit(rig.service.unmap, (IOVA, PAGE))
        message = rig.hand.update(answer=False)
        assert message == IotlbMessage.invalidate(IOVA, PAGE)
        time.sleep(0.05)
        assert not call.done()
        rig.hand.ack(_F.IOTLB_MSG)
        call.result(WAIT)
        assert rig.service.counts.invalidations == 1
        rig.miss(IOVA)
        assert rig.hand.answer() == 1
        rig.miss(IOVA + PAGE)
        assert rig.hand.update().iova == IOVA + PAGE

    def test_invalidate_keeps_the_mapping(self, rig: Rig, pool: ThreadPoolExecutor) -> None:
        rig.service.map(IOVA, LOW, PAGE, RW)
        call = pool.submit(rig.service.invalidate, (IOVA, PAGE))
        rig.hand.update()
        call.result(WAIT)
        rig.miss(IOVA)
        assert rig.hand.update().iova == IOVA

    def test_the_whole_space_is_0_bytes_on_the_wire(
        self, rig: Rig, pool: ThreadPoolExecutor
    ) -> None:
        call = pool.submit(rig.service.unmap, (0, 2**64))
        assert rig.hand.update() == IotlbMessage.invalidate(0, 0)
        call.result(WAIT)

    def test_a_refused_invalidation(self, rig: Rig, pool: ThreadPoolExecutor) -> None:
        call = pool.submit(rig.service.invalidate, (IOVA, PAGE))
        rig.hand.update(value=1)
        with pytest.raises(RefusedError, match="refused to forget"):
            call.result(WAIT)

    @pytest.mark.parametrize("pipeline", [1, 2, 4])
    @pytest.mark.parametrize("refused", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
    def test_each_refusal_of_several_is_seen(
        self,
        make: Callable[..., Rig],
        pool: ThreadPoolExecutor,
        pipeline: int,
        refused: tuple[int, ...],
    ) -> None:
        """Also of the middle one; and one that is refused does not keep the others from going."""
        rig = make(pipeline=pipeline)
        ranges = [(IOVA + n * PAGE, PAGE) for n in range(3)]
        for iova, _ in ranges:
            rig.service.map(iova, LOW, PAGE, RW)
        call = pool.submit(rig.service.unmap, *ranges)
        for number, (iova, _) in enumerate(ranges):
            assert rig.hand.update(value=int(number in refused)).iova == iova
        with pytest.raises(RefusedError) as caught:
            call.result(WAIT)
        named = [f"{iova:#x}" in str(caught.value) for iova, _ in ranges]
        assert named == [number in refused for number in range(3)]
        assert rig.service.counts.invalidations == 3 - len(refused)
        assert len(rig.service.mappings) == 0

    def test_bad_ranges_change_nothing(self, rig: Rig) -> None:
        rig.service.map(IOVA, LOW, PAGE, RW)
        for bad in ((IOVA, 0), (2**64 - 1, 2), (-1, 1), (IOVA, -1), (0, 2**64 + 1)):
            for call in (rig.service.unmap, rig.service.invalidate):
                with pytest.raises(ValueError):
                    call((IOVA, PAGE), bad)
        with pytest.raises(TypeError):
            rig.service.unmap((IOVA, PAGE), (IOVA, 1.0))  # type: ignore[arg-type]
        assert len(rig.service.mappings) == 1
        assert rig.hand.silent()

    @pytest.mark.parametrize("how", ["push", "miss"])
    def test_no_invalidation_overtakes_an_update(
        self, rig: Rig, pool: ThreadPoolExecutor, how: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An unmap that comes between looking up and sending waits until it is sent.

        Otherwise the back-end would keep what it was told last.
        """
        rig.service.map(IOVA, LOW, PAGE, RW)
        lock = ContendedLock()
        rig.service._mapping = lock  # type: ignore[assignment]
        unmapped: list[Any] = []
        post = rig.service._post

        def slow(messages: Any) -> Any:
            if messages and messages[0].type == IotlbType.UPDATE and not unmapped:
                unmapped.append(pool.submit(rig.service.unmap, (IOVA, PAGE)))
                assert lock.wanted.wait(WAIT)
                if lock.owner != threading.get_ident():
                    # Nothing holds it up: then it is done before the update goes out.
                    deadline = time.monotonic() + WAIT
                    while rig.service.counts.invalidations == 0 and time.monotonic() < deadline:
                        time.sleep(0.001)
            return post(messages)

        monkeypatch.setattr(rig.service, "_post", slow)
        if how == "push":
            pool.submit(rig.service.push, IOVA)
        else:
            rig.miss(IOVA)
        assert [rig.hand.update().type for _ in range(2)] == [
            IotlbType.UPDATE,
            IotlbType.INVALIDATE,
        ]
        unmapped[0].result(WAIT)

    def test_an_invalidation_that_is_never_acknowledged(self, rig: Rig) -> None:
        rig.exchange.timeout = 0.05
        with pytest.raises(NoAnswerError, match="IOTLB_MSG"):
            rig.service.invalidate((IOVA, PAGE))

    def test_push_tells_before_it_is_asked(self, rig: Rig, pool: ThreadPoolExecutor) -> None:
        rig.service.map(IOVA, LOW, PAGE, R)
        call = pool.submit(rig.service.push, IOVA + 8)
        assert rig.hand.update()[:3] == (IOVA, PAGE, rig.vua(LOW))
        assert call.result(WAIT)
        assert not rig.service.push(IOVA + PAGE)
        call = pool.submit(rig.service.push, IOVA)
        rig.hand.update(value=1)
        with pytest.raises(RefusedError):
            call.result(WAIT)


class TestPipeline:
    def test_one_at_a_time_as_qemu_does(self, rig: Rig, pool: ThreadPoolExecutor) -> None:
        call = pool.submit(rig.service.invalidate, (IOVA, PAGE), (IOVA + PAGE, PAGE))
        rig.hand.update(answer=False)
        assert rig.hand.silent()
        rig.hand.ack(_F.IOTLB_MSG)
        rig.hand.update()
        call.result(WAIT)

    def test_several_on_their_way(self, make: Callable[..., Rig], pool: ThreadPoolExecutor) -> None:
        rig = make(pipeline=4)
        ranges = [(IOVA + PAGE * i, PAGE) for i in range(6)]
        call = pool.submit(rig.service.invalidate, *ranges)
        first = [rig.hand.update(answer=False).iova for _ in range(4)]
        assert first == [iova for iova, _ in ranges[:4]]
        assert rig.hand.silent()
        for _ in first:
            rig.hand.ack(_F.IOTLB_MSG)
        assert [rig.hand.update().iova for _ in range(2)] == [iova for iova, _ in ranges[4:]]
        call.result(WAIT)

    def test_misses_are_answered_in_order(self, make: Callable[..., Rig]) -> None:
        rig = make(pipeline=8, answer="caller")
        for page in (0, 2, 3):
            rig.service.map(IOVA + page * PAGE, LOW + page * PAGE, PAGE, R)
        for page in range(4):
            rig.miss(IOVA + page * PAGE)
        server = threading.Thread(target=rig.service.service)
        server.start()
        assert [rig.hand.update(answer=False).iova for _ in range(3)] == [
            IOVA + page * PAGE for page in (0, 2, 3)
        ]
        for status in (0, 1, 0):
            rig.hand.ack(_F.IOTLB_MSG, status)
        assert [rig.hand.answer() for _ in range(4)] == [0, 1, 1, 0]
        server.join(WAIT)


class TestWhoAnswers:
    def test_a_thread_answers_while_a_request_waits(
        self, rig: Rig, pool: ThreadPoolExecutor
    ) -> None:
        """A back-end may need translations before it can stop a ring: no deadlock here."""
        rig.service.map(IOVA, LOW, PAGE, R)
        stop = encode_message(_F.GET_VRING_BASE, bytes(8))
        (pending,) = rig.exchange.send(_F.GET_VRING_BASE, stop, replies=1)
        call = pool.submit(rig.exchange.wait, pending)
        rig.hand.expect(_F.GET_VRING_BASE)
        rig.miss(IOVA)
        assert rig.hand.update().iova == IOVA
        assert rig.hand.answer() == 0
        assert not call.done()
        rig.hand.reply(_F.GET_VRING_BASE, U64(0))
        call.result(WAIT)

    def test_the_caller_answers_only_when_it_comes_to_it(
        self, make: Callable[..., Rig], pool: ThreadPoolExecutor
    ) -> None:
        rig = make(answer="caller")
        rig.service.map(IOVA, LOW, PAGE, R)
        rig.miss(IOVA)
        call = pool.submit(rig.service.invalidate, (IOVA + PAGE, PAGE))
        assert rig.hand.update(answer=False).type == IotlbType.INVALIDATE
        assert rig.hand.silent(), "a miss was answered while a request waited"
        rig.hand.ack(_F.IOTLB_MSG)
        call.result(WAIT)
        assert rig.hand.silent()
        served = pool.submit(rig.service.service)
        assert rig.hand.update().iova == IOVA
        assert served.result(WAIT) == 1
        assert rig.hand.answer() == 0
        assert rig.service.service() == 0

    def test_the_channel_can_be_watched(self, make: Callable[..., Rig]) -> None:
        rig = make(answer="caller")
        assert not select.select([rig.service], [], [], 0)[0]
        rig.miss(IOVA)
        assert select.select([rig.service], [], [], WAIT)[0]
        rig.service.close()
        assert rig.service.service() == 0
        with pytest.raises(ValueError, match="no channel"):
            rig.service.fileno()


class TestHook:
    """Failures on demand."""

    def test_refuse(self, rig: Rig) -> None:
        rig.service.map(IOVA, LOW, PAGE, R)
        rig.service.miss_hook = lambda miss: MissAnswer(MissAction.REFUSE)
        rig.miss(IOVA)
        assert rig.hand.answer() == 1
        assert rig.hand.silent()
        assert rig.service.counts.refused == 1

    def test_claim(self, rig: Rig) -> None:
        rig.service.map(IOVA, LOW, PAGE, R)
        rig.service.miss_hook = lambda miss: MissAnswer(MissAction.CLAIM)
        rig.miss(IOVA)
        assert rig.hand.answer() == 0
        assert rig.hand.silent()

    def test_ignore(self, rig: Rig) -> None:
        rig.service.map(IOVA, LOW, PAGE, R)
        seen: list[IotlbMessage] = []

        def hook(miss: IotlbMessage) -> MissAnswer:
            seen.append(miss)
            return MissAnswer(MissAction.IGNORE if len(seen) == 1 else MissAction.ANSWER)

        rig.service.miss_hook = hook
        rig.miss(IOVA)
        assert rig.hand.answer(0.05) is None
        rig.miss(IOVA, W)
        assert rig.hand.answer() == 1
        assert rig.service.counts.ignored == 1
        assert [miss.perm for miss in seen] == [1, 2]

    def test_answer_late(self, rig: Rig) -> None:
        rig.service.map(IOVA, LOW, PAGE, R)
        rig.service.miss_hook = lambda miss: MissAnswer(delay=0.2)
        began = time.monotonic()
        rig.miss(IOVA)
        rig.hand.update()
        assert time.monotonic() - began >= 0.2
        assert rig.hand.answer() == 0

    def test_closing_does_not_wait_for_a_late_answer(self, rig: Rig) -> None:
        rig.service.miss_hook = lambda miss: MissAnswer(delay=60)
        rig.miss(IOVA)
        while not rig.service.counts.misses:
            time.sleep(0.001)
        began = time.monotonic()
        rig.close()
        assert time.monotonic() - began < 30


class TestOtherRequests:
    def test_access_fails_are_counted_and_answered_as_qemu_does(self, rig: Rig) -> None:
        rig.hand.ask(IotlbMessage.access_fail(IOVA, PAGE, 2))
        assert rig.hand.answer() == 1
        assert rig.service.counts.access_fails == 1

    @pytest.mark.parametrize("kind", [IotlbType.UPDATE, IotlbType.INVALIDATE, 0, 255])
    def test_what_a_back_end_does_not_say(self, rig: Rig, kind: int) -> None:
        rig.hand.ask(IotlbMessage(IOVA, PAGE, 0, 3, kind))
        assert rig.hand.answer() == 1
        assert rig.service.counts.misses == 0

    def test_config_changes_are_counted(self, rig: Rig) -> None:
        assert rig.hand.back_channel is not None
        rig.hand.back_channel.send(
            encode_message(BackendRequest.CONFIG_CHANGE_MSG, need_reply=True)
        )
        assert rig.hand.answer() == 0
        assert rig.service.config_changes == 1

    def test_unknown_requests_are_refused(self, rig: Rig) -> None:
        assert rig.hand.back_channel is not None
        rig.hand.back_channel.send(encode_message(99, b"abc", need_reply=True))
        assert rig.hand.answer() == 1

    @pytest.mark.parametrize(
        "data",
        [
            encode_ack(BackendRequest.IOTLB_MSG, 0),
            encode_message(BackendRequest.IOTLB_MSG, bytes(31)),
            b"\xff" * 12,
        ],
    )
    def test_what_breaks_the_protocol_breaks_the_connection(self, rig: Rig, data: bytes) -> None:
        assert rig.hand.back_channel is not None
        rig.hand.back_channel.send(data)
        deadline = time.monotonic() + WAIT
        while rig.exchange.failure is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert isinstance(rig.exchange.failure, ProtocolError)
        with pytest.raises(ProtocolError):
            rig.service.invalidate((IOVA, PAGE))

    def test_a_back_end_that_closes_its_channel_is_left_alone(self, rig: Rig) -> None:
        assert rig.hand.back_channel is not None
        rig.hand.back_channel.close()
        time.sleep(0.02)
        assert rig.exchange.failure is None


class ContendedLock:
    """A lock that tells which thread has it, and when another wants it."""

    def __init__(self) -> None:
        self.wanted = threading.Event()
        self.owner = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if self.owner not in {0, threading.get_ident()}:
            self.wanted.set()
        self._lock.acquire()
        self.owner = threading.get_ident()

    def __exit__(self, *exc: object) -> None:
        self.owner = 0
        self._lock.release()


class SlowMap(IntervalMap):
    """A table that is slow to answer, so that it may have changed by then."""

    def overlapping(self, start: int, length: int) -> Any:
        found = super().overlapping(start, length)
        time.sleep(0.0002)
        return found


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", [1, 4])
def test_no_stale_update_ever_follows_an_invalidation(
    make: Callable[..., Rig], pipeline: int
) -> None:
    """Misses and unmaps race; what the back-end is told must always be what is mapped."""
    rig = make(pipeline=pipeline)
    rig.service.mappings = Iotlb._of(SlowMap())
    pages, stop, rng = 4, threading.Event(), random.Random(5)
    told: dict[int, int] = {}
    legal: dict[int, int] = {}
    wrong: list[str] = []

    def back_end() -> None:
        while not stop.is_set():
            message = rig.hand.main.recv(0.05)
            if message is None:
                continue
            iotlb = IotlbMessage.decode(message.payload)
            if iotlb.type == IotlbType.INVALIDATE:
                told.pop(iotlb.iova, None)
            else:
                told[iotlb.iova] = iotlb.uaddr
            rig.hand.ack(_F.IOTLB_MSG)

    def misses() -> None:
        asker = random.Random(6)
        while not stop.is_set():
            for _ in range(pipeline):
                rig.miss(IOVA + PAGE * asker.randrange(pages))
            for _ in range(pipeline):
                rig.hand.answer()

    threads = [threading.Thread(target=target) for target in (back_end, misses)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 2
    rounds = 0
    while time.monotonic() < end and not wrong:
        iova = IOVA + PAGE * rng.randrange(pages)
        gpa = LOW + PAGE * rng.randrange(16)
        legal[iova] = rig.vua(gpa)
        rig.service.map(iova, gpa, PAGE, R)
        if rng.random() < 0.5:
            time.sleep(0.0005)
        if told.get(iova, legal[iova]) != legal[iova]:
            wrong.append(f"{iova:#x} leads to an earlier page")
        rig.service.unmap((iova, PAGE))
        # The acknowledgement came after everything sent before it, so nothing may be left.
        if iova in told:
            wrong.append(f"{iova:#x} is still known after its invalidation")
        rounds += 1
    stop.set()
    for thread in threads:
        thread.join(WAIT)
    assert not wrong
    assert rounds > 100
    assert rig.service.counts.updates > 100
