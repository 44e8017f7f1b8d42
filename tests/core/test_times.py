"""Times are checked where they enter the core: converting nonsense to an integer is undefined."""

import math
import os
import select

import pytest

from guestio import Iotlb
from guestio._core.iommu.intervals import IntervalMap
from guestio._core.vhost_user.iotlb_feed import IotlbFeed, IotlbUpdater
from guestio._core.vhost_user.miss_table import MissTable
from guestio._core.virtio.counters import Counters
from guestio._core.virtio.loop import CoreLoop
from guestio.addr import check_access, check_flag, check_seconds
from tests.kit.rings import physical

HUGE = 10**400
NONSENSE = [math.nan, -1, -1e-9, -math.inf, pytest.param(-HUGE, id="-huge")]


@pytest.mark.parametrize(
    "seconds", [*NONSENSE, math.inf, 1e30, pytest.param(HUGE, id="huge"), 60.1]
)
def test_a_ring_is_watched_for_a_time(seconds):
    _, rig = physical()
    with pytest.raises(ValueError, match="seconds must be 0 to 60"):
        rig.ring.spin(seconds, -1)


@pytest.mark.parametrize("seconds", ["1", None, True, b"1", []])
def test_a_time_is_a_number(seconds):
    _, rig = physical()
    with pytest.raises(TypeError, match="seconds"):
        rig.ring.spin(seconds, -1)


def test_no_time_at_all():
    _, rig = physical()
    assert rig.ring.spin(0, -1) is False
    assert rig.ring.spin(1e-300, -1) is False


@pytest.mark.parametrize("limit", NONSENSE)
def test_questions_have_a_time_limit(limit):
    with pytest.raises(ValueError, match="time_limit"):
        MissTable(limit)


def test_questions_are_asked_at_some_time():
    table = MissTable(math.inf)
    for call in (
        lambda now: table.request(1, [], now, acknowledged=False),
        table.repeat,
        table.expired,
        table.starved,
        table.kept_waiting,
    ):
        call(0.0)
        with pytest.raises(ValueError, match="now"):
            call(math.nan)


@pytest.fixture
def feed():
    table, counters = MissTable(1.0), Counters()
    updater = IotlbUpdater(IntervalMap(), IntervalMap(), table, counters)
    return lambda patience: IotlbFeed(lambda: None, patience, updater, table, counters)


@pytest.mark.parametrize("patience", NONSENSE)
def test_patience_is_a_time(feed, patience):
    with pytest.raises(ValueError, match="patience"):
        feed(patience)


def test_the_feed_looks_after_misses_at_a_time(feed):
    feed = feed(math.inf)
    feed.alarm = -math.inf
    feed.look_after = math.inf
    for name, value in (("alarm", math.nan), ("look_after", math.nan), ("look_after", -1)):
        with pytest.raises(ValueError, match=name):
            setattr(feed, name, value)
    assert (feed.alarm, feed.look_after) == (-math.inf, math.inf)


def test_the_loop_waits_for_a_time():
    core = CoreLoop()
    reader, writer = os.pipe()
    with select.epoll() as poller:
        poller.register(reader, select.EPOLLIN)
        try:
            with pytest.raises(ValueError, match="seconds"):
                core.wait(poller.fileno(), math.nan)
            assert core.wait(poller.fileno(), 0)[0] == []
            assert core.wait(poller.fileno(), 1e-9)[0] == []
            os.write(writer, b"x")
            for seconds in (math.inf, 1e300, 1e7, -1, -math.inf, 2**31):
                assert core.wait(poller.fileno(), seconds)[0] == [reader]
        finally:
            os.close(reader)
            os.close(writer)


@pytest.mark.parametrize("number", [HUGE, 10**5000], ids=["huge", "gigantic"])
def test_a_gigantic_number_does_not_fill_the_message(number):
    _, rig = physical()
    for refused in (
        lambda: rig.ring.spin(number, -1),
        lambda: Iotlb().lookup(number, 1, 1),
        lambda: Iotlb().lookup(0, -number, 1),
        lambda: Iotlb().lookup(0, 1, number),
        lambda: Iotlb(capacity=number),
        lambda: check_seconds(number, "seconds"),
        lambda: check_access(number),
        lambda: check_flag(number, "flag"),
    ):
        with pytest.raises(ValueError) as caught:
            refused()
        assert len(str(caught.value)) < 120
        assert "integer string conversion" not in str(caught.value)
