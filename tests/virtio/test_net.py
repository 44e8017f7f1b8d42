"""The network device, driven over vhost-user without a VM."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from guestio.addr import Permissions
from guestio.guest.dma import IommuMode
from guestio.testing import Driver
from guestio.virtio.net import NetDevice, Port
from guestio.virtio.net.features import ACK_ERR, ACK_OK, Class, LinkStatus, Net
from tests.kit.net_driver import (
    BUFFERS,
    MAC,
    MODERN,
    PEER,
    Mirror,
    NetGuest,
    Wire,
    frame,
    wait_quiet,
)
from tests.kit.serving import EVENT_IDX, VERSION_1, Serving, until

Plug = Callable[..., tuple[NetDevice, Serving]]


@pytest.fixture(params=[False, True], ids=["one thread", "queue threads"])
def plug(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Plug]:
    """``plug(port, **options)`` serves a card that is plugged into a port."""
    with ExitStack() as stack:

        def make(port: Port, **options: Any) -> tuple[NetDevice, Serving]:
            device = NetDevice(port, mac=MAC, **options)
            stack.callback(device.close)
            serving = Serving(device, tmp_path / "net", queue_threads=request.param)
            return device, stack.enter_context(serving)

        yield make


@pytest.fixture(params=[Mirror, Wire])
def port(request: pytest.FixtureRequest) -> Port:
    made: Port = request.param()
    return made


def arrive(port: Port, data: bytes) -> None:
    """Have a frame come from a port."""
    if isinstance(port, Wire):
        port.put(data)
    else:
        port.deliver(0, data)


def sent(port: Port) -> bytes:
    """What the driver sent next."""
    if isinstance(port, Wire):
        return port.get()[1]
    assert isinstance(port, Mirror)
    until(lambda: port.seen)
    return port.seen.pop(0)


def test_frames_go_both_ways(plug: Plug, port: Port) -> None:
    device, serving = plug(port)
    with NetGuest(serving.path) as guest:
        guest.post(*[2000] * 4)
        guest.send(frame(100, to=PEER, of=MAC))
        assert sent(port) == frame(100, to=PEER, of=MAC)
        if isinstance(port, Mirror):
            assert guest.receive()[1] == frame(100)
        arrive(port, frame(1514, seed=7))
        header, data = guest.receive()
        assert data == frame(1514, seed=7)
        assert header == bytes(10) + b"\1\0"
        assert guest.queues[1].outstanding == 0
    counted = device.statistics()
    assert (counted.sent, counted.sent_bytes) == (1, 100)
    assert counted.received_bytes == 1514 + (100 if isinstance(port, Mirror) else 0)
    assert (counted.send_dropped, counted.receive_dropped) == (0, 0)


def test_a_frame_before_its_buffer_waits_for_it(plug: Plug, port: Port) -> None:
    _, serving = plug(port)
    with NetGuest(serving.path) as guest:
        guest.post(*[200] * 2)
        for seed in range(5):
            arrive(port, frame(seed=seed))
        assert [guest.receive()[1] for _ in range(2)] == [frame(seed=0), frame(seed=1)]
        wait_quiet()
        assert not guest.queues[0].collect()
        guest.post(*[200] * 3)
        assert [guest.receive()[1] for _ in range(3)] == [frame(seed=i) for i in (2, 3, 4)]


@pytest.mark.parametrize("features", [0, EVENT_IDX], ids=["flags", "event index"])
def test_many_frames_come_in_order_and_once(plug: Plug, port: Port, features: int) -> None:
    _, serving = plug(port)
    rng = random.Random(3)
    expected = [frame(rng.randrange(14, 3000), seed=i) for i in range(400)]
    with NetGuest(serving.path, features=int(MODERN | Net.MRG_RXBUF) | features) as guest:
        came: list[bytes] = []
        guest.post(*[1000] * 60)
        for at in range(0, 400, 10):
            for one in expected[at : at + 10]:
                arrive(port, one)
            for _ in range(10):
                came.append(guest.receive()[1])
            guest.post(*[1000] * guest.queues[0].free)
    assert came == expected


@pytest.mark.parametrize("size", [14, 100, 88, 89, 1000, 9000])
def test_a_long_frame_is_spread_over_buffers(plug: Plug, port: Port, size: int) -> None:
    _, serving = plug(port)
    with NetGuest(serving.path) as guest:
        guest.post(*[100] * 3)
        arrive(port, frame(size))
        if size + 12 > 300:
            # None of them is used before there are enough.
            wait_quiet()
            assert not guest.queues[0].collect()
        guest.post(*[1500] * 7)
        header, data = guest.receive()
        assert data == frame(size)
        [buffers] = struct.unpack_from("<H", header, 10)
        assert buffers == (1 if size <= 88 else 2 if size <= 188 else 3 + -(-(size - 288) // 1500))


def test_a_buffer_in_pieces_is_filled_in_their_order(plug: Plug, port: Port) -> None:
    _, serving = plug(port)
    with NetGuest(serving.path) as guest:
        places = [(guest.room(0, size), size) for size in (3, 10, 1, 30, 5, 100)]
        guest.queues[0].add([], places, places[0])
        guest.queues[0].publish()
        guest.handles[0].kick()
        arrive(port, frame(120))
        until(lambda: guest.queues[0].collect())
        data = b"".join(guest.memory.read(*place) for place in places)
        assert data[12:132] == frame(120)


def test_a_frame_that_fits_no_buffer_is_dropped(plug: Plug, port: Port) -> None:
    device, serving = plug(port)
    with NetGuest(serving.path, features=int(MODERN)) as guest:
        guest.post(*[500] * 2)
        arrive(port, frame(489))
        arrive(port, frame(488))
        assert guest.receive()[1] == frame(488)
        assert device.statistics().receive_dropped == 1
        # The buffer that it did not fit in was not lost.
        arrive(port, frame(60))
        assert guest.receive()[1] == frame(60)


def test_a_driver_of_old_has_shorter_headers(plug: Plug, port: Port) -> None:
    _, serving = plug(port)
    with NetGuest(serving.path, features=int(Net.MAC | Net.STATUS)) as guest:
        assert guest.header == 10
        guest.post(200)
        arrive(port, frame(99))
        assert guest.receive() == (bytes(10), frame(99))
        guest.send(frame(50, to=PEER))
        assert sent(port) == frame(50, to=PEER)


@pytest.mark.parametrize("offloads", [False, True])
def test_offloads_are_passed_on_or_not_there(plug: Plug, offloads: bool) -> None:
    """A driver that did not negotiate them can neither ask for nor be given unfinished frames."""
    wire = Wire(offloads=int(Net.CSUM | Net.GUEST_CSUM))
    _, serving = plug(wire)
    wanted = Net.CSUM | Net.GUEST_CSUM if offloads else Net(0)
    with NetGuest(serving.path, features=int(MODERN | wanted)) as guest:
        guest.post(200, 200)
        header = bytes([1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 9, 9])
        wire.put(frame(70), header=header)
        assert guest.receive()[0] == (header[:10] if offloads else bytes(10)) + b"\1\0"
        guest.send(frame(70, to=PEER), header=header)
        assert wire.get() == (header if offloads else bytes(12), frame(70, to=PEER))


def test_what_the_port_cannot_do_is_not_offered(tmp_path: Path) -> None:
    device = NetDevice(Mirror(), mac=MAC)
    assert not device.features & (Net.CSUM | Net.GUEST_CSUM | Net.MTU | Net.MQ)
    device = NetDevice(Mirror(2, int(Net.CSUM | 1 << 33 | 1 << 22)), mac=MAC, mtu=1400)
    assert device.features & (Net.CSUM | Net.MTU | Net.MQ) == Net.CSUM | Net.MTU | Net.MQ
    assert not device.features >> 33


@pytest.mark.parametrize("size", [1, 9, 11, 12, 13, 25, 12 + 65597 + 1, 200_000])
def test_what_is_no_frame_is_not_sent(plug: Plug, port: Port, size: int) -> None:
    device, serving = plug(port)
    with NetGuest(serving.path) as guest:
        guest.send_raw(bytes(size))
        until(lambda: device.statistics().send_dropped == 1)
        guest.send(frame(to=PEER))
        assert sent(port) == frame(to=PEER)


@pytest.mark.parametrize("pieces", [1, 2, 7, 60])
def test_a_frame_may_be_sent_in_pieces(plug: Plug, port: Port, pieces: int) -> None:
    _, serving = plug(port)
    with NetGuest(serving.path) as guest:
        guest.send_raw(bytes(12) + frame(1400, to=PEER), pieces=pieces)
        assert sent(port) == frame(1400, to=PEER)


def test_the_longest_frame_passes(plug: Plug, port: Port) -> None:
    _, serving = plug(port)
    longest = frame(65597, to=PEER)
    with NetGuest(serving.path) as guest:
        guest.send(longest)
        assert sent(port) == longest
        if isinstance(port, Mirror):
            guest.post(*[4096] * 17)
            assert guest.receive()[1][12:] == longest[12:]


def test_a_chain_for_the_wrong_direction_is_given_back(plug: Plug, port: Port) -> None:
    _, serving = plug(port)
    with NetGuest(serving.path) as guest:
        at = guest.room(0, 100)
        guest.queues[0].add([(at, 100)], [], (at, 100))
        guest.queues[1].add([], [(at, 100)], (at, 100))
        for index in (0, 1):
            guest.queues[index].publish()
            guest.handles[index].kick()
        assert guest.used(1, 1) == [(0, b"")]
        guest.post(5, 11, 12, 200)
        arrive(port, frame(60))
        # Those without room for a header come back empty; one of 12 bytes has room for just that.
        assert [written for written, _ in guest.used(5)] == [0, 0, 0, 12, 60]


def test_memory_that_is_not_there_fails_a_frame_alone(plug: Plug, port: Port) -> None:
    device, serving = plug(port)
    with NetGuest(serving.path) as guest:
        guest.queues[0].add([], [(1 << 40, 200)], (0, 0))
        guest.queues[1].add([(1 << 40, 200)], [], (0, 0))
        for index in (0, 1):
            guest.queues[index].publish()
            guest.handles[index].kick()
        guest.used(1, 1)
        assert device.statistics().send_dropped == 1
        guest.post(200)
        arrive(port, frame())
        assert guest.used(1) == [(0, b"")]
        assert guest.receive()[1] == frame()


def test_too_many_frames_are_dropped_and_counted(plug: Plug) -> None:
    mirror = Mirror()
    device, serving = plug(mirror)
    with NetGuest(serving.path) as guest:
        guest.post(200)
        taken = sum(mirror.deliver(0, frame(seed=i)) for i in range(2000))
        assert 500 <= taken < 600
        assert device.statistics().receive_dropped == 2000 - taken
        guest.receive()


def test_a_cable_that_takes_nothing_does_not_stall_the_driver(plug: Plug) -> None:
    wire = Wire()
    device, serving = plug(wire)
    with NetGuest(serving.path) as guest:
        for _ in range(400):
            guest.send(frame(1514, to=PEER))
        counted = device.statistics()
        assert counted.send_dropped > 0
        assert counted.sent + counted.send_dropped == 400
        for _ in range(counted.sent):
            wire.get()
        guest.send(frame(77, to=PEER))
        assert wire.get()[1] == frame(77, to=PEER)


@pytest.mark.parametrize("iommu", ["off", "static", "strict"])
def test_a_driver_on_scattered_pages_gets_every_frame(plug: Plug, iommu: IommuMode) -> None:
    wire = Wire()
    device, serving = plug(wire)
    features = int(Net.MRG_RXBUF | Net.MAC | Net.STATUS)
    with Driver(serving.path, queues=2, features=features, iommu=iommu) as driver:
        for size in (14, 1500, 4097, 9000, 65535):
            buffers = [driver.post(5000) for _ in range(14)]
            wire.put(frame(size))
            first = driver.wait(buffers[0]).data
            count = int.from_bytes(first[10:12], "little")
            data = b"".join(driver.wait(buffer).data for buffer in buffers[:count])
            assert data[12:] == frame(size)
            driver.send(bytes(12) + frame(size, to=PEER), 1)
            assert wire.get()[1] == frame(size, to=PEER)
            driver.reset()
    assert device.statistics().receive_dropped == 0


# The configuration space, and control commands.


def status_of(guest: NetGuest) -> int:
    return int.from_bytes(guest.frontend.get_config(6, 2), "little")


def test_the_configuration_says_what_the_card_is(plug: Plug) -> None:
    _, serving = plug(Mirror(3), mtu=9000)
    with NetGuest(serving.path, pairs=3, features=int(MODERN | Net.MQ)) as guest:
        assert guest.frontend.get_config(0, 12) == MAC + struct.pack("<HHH", 1, 3, 9000)


def test_the_link_goes_down_and_up(plug: Plug, port: Port) -> None:
    device, serving = plug(port)
    with NetGuest(serving.path) as guest:
        guest.post(*[200] * 8)
        assert status_of(guest) == LinkStatus.LINK_UP
        seen = guest.frontend.config_changes
        device.link = False
        assert guest.frontend.wait_config_change(10, seen=seen)
        assert status_of(guest) == 0
        before = device.statistics()
        guest.send(frame(to=PEER))
        assert device.statistics().send_dropped == before.send_dropped + 1
        arrive(port, frame())
        until(lambda: device.statistics().receive_dropped == before.receive_dropped + 1)
        seen = guest.frontend.config_changes
        device.link = True
        assert guest.frontend.wait_config_change(10, seen=seen)
        assert status_of(guest) == LinkStatus.LINK_UP
        arrive(port, frame(seed=9))
        assert guest.receive()[1] == frame(seed=9)
        guest.send(frame(70, to=PEER))
        assert sent(port) == frame(70, to=PEER)


def test_the_driver_is_asked_to_announce_itself(plug: Plug) -> None:
    device, serving = plug(Mirror())
    with NetGuest(serving.path, features=int(MODERN | Net.GUEST_ANNOUNCE)) as guest:
        device.announce()
        until(lambda: status_of(guest) == LinkStatus.LINK_UP | LinkStatus.ANNOUNCE)
        assert guest.control(Class.ANNOUNCE, 0, b"x") == ACK_ERR
        assert guest.control(Class.ANNOUNCE, 0) == ACK_OK
        assert status_of(guest) == LinkStatus.LINK_UP
    serving.let_go()
    with NetGuest(serving.path) as guest:
        device.announce()
        assert status_of(guest) == LinkStatus.LINK_UP
        assert guest.control(Class.ANNOUNCE, 0) == ACK_ERR


ONE, OTHER = b"\x02" + bytes(5), b"\x04" + bytes(5)
GROUP, OTHER_GROUP = b"\x33\x33\0\0\0\1", b"\x33\x33\0\0\0\2"
ALL = b"\xff" * 6


def table(*addresses: bytes, groups: tuple[bytes, ...] = ()) -> bytes:
    return b"".join(struct.pack("<I", len(some)) + b"".join(some) for some in (addresses, groups))


@pytest.mark.parametrize(
    ("commands", "wanted"),
    [
        ([], {MAC, OTHER, GROUP, OTHER_GROUP, ALL}),
        ([(0, 0, b"\0")], {MAC, ALL}),
        ([(0, 0, b"\0"), (0, 1, b"\1")], {MAC, GROUP, OTHER_GROUP, ALL}),
        ([(0, 0, b"\0"), (0, 2, b"\1")], {MAC, OTHER, ALL}),
        ([(0, 0, b"\0"), (0, 1, b"\1"), (0, 3, b"\1")], {MAC, ALL}),
        ([(0, 0, b"\0"), (0, 4, b"\1")], {ALL}),
        ([(0, 0, b"\0"), (0, 5, b"\1")], {MAC}),
        ([(0, 0, b"\0"), (1, 0, table(OTHER, groups=(GROUP,)))], {MAC, OTHER, GROUP, ALL}),
        ([(0, 0, b"\0"), (1, 1, OTHER)], {OTHER, ALL}),
        ([(0, 0, b"\0"), (1, 0, table(*[ONE] * 65))], {MAC, OTHER, GROUP, OTHER_GROUP, ALL}),
        ([(0, 0, b"\0"), (0, 0, b"\1")], {MAC, OTHER, GROUP, OTHER_GROUP, ALL}),
    ],
)
def test_the_driver_chooses_what_it_receives(
    plug: Plug, port: Port, commands: list[tuple[int, int, bytes]], wanted: set[bytes]
) -> None:
    device, serving = plug(port)
    features = int(MODERN | Net.CTRL_MAC_ADDR | Net.MRG_RXBUF)
    with NetGuest(serving.path, features=features) as guest:
        guest.post(*[200] * 8)
        for command in commands:
            assert guest.control(*command) == ACK_OK
        for to in (MAC, OTHER, GROUP, OTHER_GROUP, ALL):
            arrive(port, frame(to=to))
        came = {guest.receive()[1][:6] for _ in wanted}
        assert came == wanted
        until(lambda: device.statistics().filtered == 5 - len(wanted))
        assert not guest.queues[0].collect()


FULL = int(MODERN | Net.CTRL_MAC_ADDR | Net.GUEST_ANNOUNCE | Net.MQ)


@pytest.mark.parametrize(
    ("kind", "command", "good"),
    [
        *((Class.RX, command, b"\1") for command in range(6)),
        (Class.MAC, 0, table()),
        (Class.MAC, 0, table(ONE, OTHER, groups=(GROUP,))),
        (Class.MAC, 1, OTHER),
        (Class.ANNOUNCE, 0, b""),
        (Class.MQ, 0, b"\1\0"),
        (Class.MQ, 0, b"\2\0"),
    ],
)
def test_a_command_of_any_other_size_fails(
    plug: Plug, kind: int, command: int, good: bytes
) -> None:
    _, serving = plug(Mirror(2))
    with NetGuest(serving.path, pairs=2, features=FULL) as guest:
        for size in range(30):
            if size != len(good):
                assert guest.control(kind, command, (good + bytes(30))[:size]) == ACK_ERR, size
        assert guest.control(kind, command, good) == ACK_OK
        assert guest.control(kind, command, good, room=0) is None
        assert guest.control(kind, command, good, room=7) == ACK_OK
        assert guest.control(kind, 200, good) == ACK_ERR
        assert guest.control(kind + 100, command, good) == ACK_ERR


@pytest.mark.parametrize("data", [b"", b"\0", bytes(65537), bytes(200_000)])
def test_what_is_no_command_fails(plug: Plug, data: bytes) -> None:
    _, serving = plug(Mirror())
    with NetGuest(serving.path) as guest:
        assert guest.control_raw(data) == ACK_ERR


def test_values_out_of_range_are_refused(plug: Plug) -> None:
    _, serving = plug(Mirror(2))
    with NetGuest(serving.path, pairs=2, features=FULL) as guest:
        assert guest.control(Class.RX, 0, b"\2") == ACK_ERR
        assert guest.control(Class.MAC, 1, GROUP) == ACK_ERR
        assert guest.control(Class.MAC, 0, struct.pack("<I", 0xFFFFFFFF) + bytes(40)) == ACK_ERR
        for pairs in (0, 3, 0xFFFF):
            assert guest.control(Class.MQ, 0, struct.pack("<H", pairs)) == ACK_ERR
        assert guest.control(Class.MAC, 1, OTHER) == ACK_OK
        assert guest.frontend.get_config(0, 6) == OTHER


def test_commands_of_features_that_were_not_negotiated_fail(plug: Plug) -> None:
    _, serving = plug(Mirror(2))
    with NetGuest(serving.path, features=int(VERSION_1 | Net.CTRL_VQ)) as guest:
        # Without MQ the control queue is queue 2, which is a receive queue otherwise.
        assert guest.control_index == 2
        for kind, command, data in (
            (Class.RX, 0, b"\1"),
            (Class.RX, 2, b"\1"),
            (Class.MAC, 0, table()),
            (Class.MAC, 1, OTHER),
            (Class.ANNOUNCE, 0, b""),
            (Class.MQ, 0, b"\1\0"),
        ):
            assert guest.control(kind, command, data) == ACK_ERR


def test_pairs_are_independent(plug: Plug) -> None:
    wire = Wire(3)
    _, serving = plug(wire)
    features = int(MODERN | Net.MQ | Net.MRG_RXBUF)
    with NetGuest(serving.path, pairs=3, used_pairs=2, features=features) as guest:
        assert guest.control(Class.MQ, 0, b"\2\0") == ACK_OK
        for pair in (0, 1):
            guest.post(200, 200, pair=pair)
        until(lambda: wire.running_pairs == {0, 1})
        for pair in (1, 0):
            wire.put(frame(seed=pair), pair)
            assert guest.receive(pair)[1] == frame(seed=pair)
            guest.send(frame(70 + pair, to=PEER), pair)
            assert wire.get(pair)[1] == frame(70 + pair, to=PEER)
    until(lambda: wire.running_pairs == set())


# What drivers, and ports, do to a card.


def test_a_driver_is_reloaded_under_traffic(plug: Plug, port: Port) -> None:
    device, serving = plug(port)
    with NetGuest(serving.path) as guest:
        for life in range(10):
            if life:
                for index in (0, 1, 2):
                    guest.start(index)
            guest.post(*[200] * 60)
            assert guest.control(Class.RX, 0, b"\0") == ACK_OK
            for i in range(30):
                arrive(port, frame(seed=life + i))
            guest.send(frame(to=PEER, seed=life))
            assert sent(port) == frame(to=PEER, seed=life)
            guest.used(3)
            guest.stop()
        # Each driver begins with a card that knows nothing of the one before.
        for index in (0, 1):
            guest.start(index)
        guest.post(*[200] * 60)
        arrive(port, frame(100, to=OTHER))
        until(lambda: OTHER in {data[12:18] for _, data in guest.used(1)})
    assert device.link


def test_frames_that_no_driver_is_there_for_are_dropped(plug: Plug) -> None:
    mirror = Mirror()
    device, serving = plug(mirror)
    for seed in range(30):
        mirror.deliver(0, frame(seed=seed))
    until(lambda: device.statistics().receive_dropped == 30)
    with NetGuest(serving.path) as guest:
        guest.post(200, 200)
        guest.send(frame(70, to=PEER, of=MAC))
        assert len(guest.receive()[1]) == 70


def test_untaken_buffers_cost_nothing_behind_an_iommu(plug: Plug, port: Port) -> None:
    """They are neither translated nor do they delay an invalidation, a stop or a disconnection."""
    _, serving = plug(port)
    with NetGuest(serving.path, iommu=True, map_all=False) as guest:
        guest.post(*[2000] * 60)
        wait_quiet()
        # Those of the rings' three areas; the buffers lie in 30 pages.
        assert serving.stats.counters.misses <= 2 * 3
        guest.frontend.iotlb.map(BUFFERS, BUFFERS, 0x40000, Permissions.READ_WRITE)
        for seed in range(3):
            arrive(port, frame(seed=seed))
            assert guest.receive()[1] == frame(seed=seed)
        # An invalidation waits for nothing, and what was translated ahead is not used any more.
        asked = serving.stats.counters.misses
        guest.frontend.iotlb.unmap((BUFFERS, 0x40000))
        guest.frontend.iotlb.map(BUFFERS, BUFFERS + 0x40000, 0x40000, Permissions.READ_WRITE)
        arrive(port, frame(100, seed=9))
        [(written, data)] = guest.used(1)
        assert (written, data) != (0, b"")
        at = 3 * 2000
        assert guest.memory.read(BUFFERS + 0x40000 + at + 12, 100) == frame(100, seed=9)
        assert serving.stats.counters.misses > asked
        guest.stop()


def test_a_frame_that_needs_a_refused_buffer_is_dropped(plug: Plug, port: Port) -> None:
    """The buffers before it serve other frames, and it comes back empty once it is the next."""
    device, serving = plug(port)
    with NetGuest(serving.path, iommu=True, map_all=False) as guest:
        for place, mapped in ((BUFFERS, True), (BUFFERS + 0x1000, False), (BUFFERS + 0x2000, True)):
            if mapped:
                guest.frontend.iotlb.map(place, place, 0x1000, Permissions.READ_WRITE)
            guest.queues[0].add([], [(place, 600)], (place, 600))
        guest.queues[0].publish()
        guest.handles[0].kick()
        arrive(port, frame(1000))
        until(lambda: device.statistics().receive_dropped == 1)
        arrive(port, frame(100, seed=1))
        assert guest.receive()[1] == frame(100, seed=1)
        arrive(port, frame(100, seed=2))
        assert guest.used(1) == [(0, b"")]
        assert guest.receive()[1] == frame(100, seed=2)


def test_many_frames_pass_a_strict_iommu(plug: Plug, port: Port) -> None:
    """Each buffer is mapped when it is made available, and unmapped when it comes back."""
    _, serving = plug(port)
    page = 0x1000
    with NetGuest(serving.path, iommu=True, map_all=False) as guest:
        iotlb = guest.frontend.iotlb
        expected, came = [frame(1000, seed=i) for i in range(200)], []
        for at in range(0, 200, 20):
            places = [BUFFERS + (at + i) * page for i in range(20)]
            for place in places:
                iotlb.map(place, place, page, Permissions.READ_WRITE)
                guest.queues[0].add([], [(place, page)], (place, page))
            guest.queues[0].publish()
            guest.handles[0].kick()
            for one in expected[at : at + 20]:
                arrive(port, one)
            for _ in range(20):
                came.append(guest.receive()[1])
            for place in places:
                iotlb.unmap((place, page))
        assert came == expected


def test_a_cable_that_is_gone_takes_the_link_down(plug: Plug) -> None:
    wire = Wire()
    device, serving = plug(wire)
    with NetGuest(serving.path) as guest:
        guest.post(*[200] * 4)
        wire.put(frame())
        assert guest.receive()[1] == frame()
        seen = guest.frontend.config_changes
        wire.far[0].close()
        assert guest.frontend.wait_config_change(10, seen=seen)
        assert status_of(guest) == 0
        assert not device.link
        before = device.statistics().send_dropped
        guest.send(frame(to=PEER))
        assert device.statistics().send_dropped == before + 1
    assert wire.errors == [errno.EPIPE]


def test_a_port_that_raises_harms_no_other_frame(
    plug: Plug, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Mirror):
        def send(self, pair: int, frame: bytes) -> bool:
            if frame[14] == 13:
                raise RuntimeError("unlucky")
            return super().send(pair, frame)

    device, serving = plug(Broken())
    with NetGuest(serving.path) as guest:
        guest.post(*[200] * 4)
        guest.send(frame(seed=13))
        guest.send(frame(seed=14))
        guest.receive()
    assert device.statistics().send_dropped == 1
    assert "NetDevice.process raised RuntimeError: unlucky" in caplog.text


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="port must be a guestio Port"):
        NetDevice(object())  # type: ignore[arg-type]
    for mac in ("52:54", "52:54:00:12:34:5g", "1:2:3:4:5:6", b"12345", ALL, bytes(6)):
        with pytest.raises(ValueError, match=r"MAC|group"):
            NetDevice(Mirror(), mac=mac)
    for mtu in (67, 65536):
        with pytest.raises(ValueError, match="mtu"):
            NetDevice(Mirror(), mtu=mtu)
    for pairs in (0, 32):
        with pytest.raises(ValueError, match="pairs"):
            NetDevice(Mirror(pairs))
    assert NetDevice(Mirror()).mac != NetDevice(Mirror()).mac
