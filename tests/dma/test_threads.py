"""Operations from several threads, from inside targets, and while targets take their time."""

import contextlib
import random
import threading
import time

import pytest

from guestio import Backing, GuestioError, MemoryRegionOverlapError
from guestio.dma import DmaError, ReentrantCallError, RegionManager
from guestio.testing.targets import RecordingTarget
from tests.kit.dma import PAGE, holds

LONG = 20


class CallingBack(RecordingTarget):
    """A target that calls its manager from inside a call."""

    def __init__(self, call) -> None:
        super().__init__()
        self.call = call
        self.refusals: list[Exception] = []
        self.swallow = True

    def map_dma(self, request) -> None:
        self._call_back()
        super().map_dma(request)

    def unmap_dma(self, start, size) -> None:
        self._call_back()
        super().unmap_dma(start, size)

    def _call_back(self) -> None:
        try:
            self.call()
        except GuestioError as error:
            self.refusals.append(error)
            if not self.swallow:
                raise


@pytest.fixture
def region(manager: RegionManager, backing: Backing):
    with manager.new_region("ram", 0, 16 * PAGE) as made:
        made.add_mapping(0, PAGE, backing)
        yield made


CALLS = {
    "new_region": lambda manager, _region, _backing: manager.new_region("r", 0x100000, PAGE),
    "add_target": lambda manager, _region, _backing: manager.add_target(RecordingTarget()),
    "add_mapping": lambda _manager, region, backing: region.add_mapping(PAGE, PAGE, backing),
    "remove_mappings": lambda _manager, region, _backing: region.remove_mappings(0, PAGE),
    "map": lambda _manager, region, _backing: region.map(writable=False),
    "unmap": lambda _manager, region, _backing: region.unmap(),
    "move": lambda _manager, region, _backing: region.move(0x100000),
    "close": lambda _manager, region, _backing: region.close(),
    "retry": lambda manager, _region, _backing: manager.targets[0].retry(),
    "close_target": lambda manager, _region, _backing: manager.targets[0].close(),
    "forget_target": lambda manager, _region, _backing: manager.targets[0].forget(),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("swallow", [True, False])
def test_a_target_that_calls_back_is_refused(manager, region, backing, name, swallow):
    target = CallingBack(lambda: CALLS[name](manager, region, backing))
    handle = manager.add_target(target)
    target.swallow = swallow
    if swallow:
        region.map()
        assert region.active
        assert holds(target) == set(manager.mappings())
    else:
        with pytest.raises(DmaError, match="called its region manager back") as caught:
            region.map()
        assert isinstance(caught.value.__cause__, ReentrantCallError)
        assert not region.active
        assert target.held == {}
    assert target.refusals
    assert all(isinstance(error, RuntimeError) for error in target.refusals)
    assert manager.regions == (region,)
    assert manager.targets == (handle,)
    assert len(region.mappings) == 1
    target.call = lambda: None
    handle.close()


def test_a_target_may_look_while_it_is_called(manager, region):
    seen = []
    target = CallingBack(
        lambda: seen.append(
            (manager.mappings(), region.active, manager.targets[0].stats().mappings)
        )
    )
    with manager.add_target(target):
        region.map()
    # What it sees is the state before the operation.
    assert seen[0][:2] == ((), False)


def test_reading_does_not_wait_for_a_target_that_takes_its_time(manager, region):
    inside, go_on = threading.Event(), threading.Event()

    def slowly() -> None:
        inside.set()
        assert go_on.wait(LONG)

    target = CallingBack(slowly)
    handle = manager.add_target(target)
    thread = threading.Thread(target=region.map)
    thread.start()
    assert inside.wait(LONG)
    assert not region.active
    assert manager.mappings() == ()
    assert handle.stats().maps == 0
    assert not handle.diff()
    go_on.set()
    thread.join(LONG)
    assert region.active
    handle.close()


def test_operations_are_carried_out_in_the_order_in_which_they_came(manager, backing):
    inside, go_on = threading.Event(), threading.Event()

    def first_waits() -> None:
        inside.set()
        assert go_on.wait(LONG)

    target = CallingBack(first_waits)
    region = manager.new_region("ram", 0, 16 * PAGE)
    region.map()
    with manager.add_target(target):
        threads = []
        for number in range(8):
            thread = threading.Thread(
                target=region.add_mapping, args=(number * PAGE, PAGE, backing)
            )
            thread.start()
            threads.append(thread)
            if number == 0:
                assert inside.wait(LONG)
            else:
                end = time.monotonic() + LONG
                while len(manager._operations._waiting) < number:
                    assert time.monotonic() < end
                    time.sleep(0.001)
        go_on.set()
        for thread in threads:
            thread.join(LONG)
        assert [event.start for event in target.events] == [n * PAGE for n in range(8)]
    region.close()


def test_many_threads(manager, backing):
    """Whatever the order of the operations was, it was one order: targets equal the truth."""
    targets = [RecordingTarget() for _ in range(3)]
    regions = [manager.new_region(f"r{n}", n * 0x10000, 16 * PAGE) for n in range(4)]
    failures: list[BaseException] = []
    stop = time.monotonic() + 1.5

    def work(seed: int) -> None:
        dice = random.Random(seed)
        try:
            while time.monotonic() < stop:
                region, what = dice.choice(regions), dice.randrange(4)
                offset = dice.randrange(16) * PAGE
                if what == 0:
                    with contextlib.suppress(MemoryRegionOverlapError):
                        region.add_mapping(offset, PAGE, backing)
                elif what == 1:
                    region.remove_mappings(offset, PAGE)
                elif what == 2:
                    region.map(dice.random() < 0.5)
                else:
                    region.unmap()
        except BaseException as error:
            failures.append(error)

    def come_and_go() -> None:
        try:
            while time.monotonic() < stop:
                target = RecordingTarget()
                with manager.add_target(target) as handle:
                    handle.diff()
                    handle.stats()
                assert target.held == {}
        except BaseException as error:
            failures.append(error)

    handles = [manager.add_target(target) for target in targets]
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    threads.append(threading.Thread(target=come_and_go))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures
    for target, handle in zip(targets, handles, strict=True):
        assert holds(target) == set(manager.mappings())
        assert not handle.diff()
        assert len(target.events) > 10


def test_an_interrupted_wait_lets_the_others_go_on(manager, region):
    """A thread that gives up waiting for its turn must not keep it."""
    turn = manager._operations
    with turn:
        waiting = threading.Event()
        outcome: list[BaseException] = []

        def give_up() -> None:
            waiting.set()
            try:
                with turn:
                    outcome.append(AssertionError("got a turn"))
            except KeyboardInterrupt as error:
                outcome.append(error)

        real_wait = turn._changed.wait

        def interrupted(timeout=None):
            turn._changed.wait = real_wait
            raise KeyboardInterrupt

        turn._changed.wait = interrupted
        thread = threading.Thread(target=give_up)
        thread.start()
        thread.join(LONG)
        assert isinstance(outcome[0], KeyboardInterrupt)
        assert not turn._waiting
    region.map()
    assert region.active
