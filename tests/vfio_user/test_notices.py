"""ERR and REQ: what a device tells its client, whatever its driver has set up."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

import pytest

from guestio.dma.device import ERR, MSIX, REQ
from guestio.errors import DeviceError
from guestio.vfio_user import Client
from guestio.vfio_user.messages import Command, IrqSet
from tests.kit import vfio_client
from tests.kit.serving import nothing_left, until
from tests.kit.vfio_client import ServingPci, Toy

NONE, BOOL, EVENTFD = IrqSet.DATA_NONE, IrqSet.DATA_BOOL, IrqSet.DATA_EVENTFD
MASK, UNMASK, TRIGGER = IrqSet.MASK, IrqSet.UNMASK, IrqSet.TRIGGER


@pytest.fixture(params=[ERR, REQ], ids=["ERR", "REQ"])
def kind(request: pytest.FixtureRequest) -> int:
    made: int = request.param
    return made


@pytest.fixture
def tell(kind: int, toy: Toy) -> Callable[[], bool]:
    """Has the device give its notice."""
    return lambda: toy.host.report_error() if kind == ERR else toy.host.request_removal()


@pytest.fixture
def device(serving: ServingPci) -> Iterator[Client]:
    with Client(serving.server.path) as made:
        yield made


@pytest.fixture
def event() -> Iterator[int]:
    made = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield made
    os.close(made)


def raised(event: int) -> int:
    try:
        return os.eventfd_read(event)
    except BlockingIOError:
        return 0


def test_a_client_that_listens_is_told(
    device: Client, kind: int, tell: Callable[[], bool], event: int
) -> None:
    """Its driver has set nothing up: neither bus mastering nor a vector."""
    facts = device.interrupts(kind)
    assert (facts.vectors, facts.eventfd, facts.automasked) == (1, True, False)
    device.enable_interrupts(kind, [event])
    assert tell()
    assert raised(event) == 1
    assert tell()
    assert tell()
    assert raised(event) == 2
    device.disable_interrupts(kind)
    assert not tell()
    assert raised(event) == 0


def test_the_other_notice_is_not_given(
    device: Client, kind: int, tell: Callable[[], bool], event: int
) -> None:
    device.enable_interrupts(ERR + REQ - kind, [event])
    assert not tell()
    assert raised(event) == 0


def test_it_is_no_interrupt_of_the_driver(
    device: Client, kind: int, tell: Callable[[], bool], event: int, serving: ServingPci
) -> None:
    vectors = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
    device.enable_interrupts(MSIX, vectors)
    device.bus_master = True
    device.enable_interrupts(kind, [event])
    assert tell()
    assert [raised(each) for each in vectors] == [0] * 4
    assert serving.stats.interrupts == 0
    # Nor is it among the pending bits.
    device.disable_interrupts(kind)
    assert not tell()
    assert device.bar(1).read(4096, 8) == bytes(8)
    for each in vectors:
        os.close(each)


def test_a_client_that_does_not_listen_yet_is_told_once_it_does(
    device: Client, tell: Callable[[], bool], kind: int, event: int
) -> None:
    assert not tell()
    assert not tell()
    device.enable_interrupts(kind, [event])
    assert raised(event) == 1
    # Once.
    device.enable_interrupts(kind, [event])
    assert raised(event) == 0


def test_a_reset_ends_an_error_and_no_request(
    device: Client, tell: Callable[[], bool], kind: int, event: int
) -> None:
    assert not tell()
    device.reset()
    device.enable_interrupts(kind, [event])
    assert raised(event) == (kind == REQ)
    # What it is told by stays.
    device.reset()
    assert tell()
    assert raised(event) == 1


def test_the_next_client_is_not_told_what_was_for_another_one(
    serving: ServingPci, toy: Toy, tell: Callable[[], bool], kind: int, event: int
) -> None:
    with Client(serving.server.path) as first:
        first.config.read(0, 4)
        assert not tell()
    until(lambda: toy.resets == 1)
    with Client(serving.server.path) as following:
        following.enable_interrupts(kind, [event])
        assert raised(event) == 0
        assert tell()
    assert raised(event) == 1
    until(lambda: toy.resets == 2)
    assert not tell()


def test_what_linux_allows_of_each_kind_of_data(
    client: vfio_client.Client, tell: Callable[[], bool], kind: int, event: int
) -> None:
    assert client.triggers(kind, 0, [event]) == 0
    assert client.set_irqs(NONE | TRIGGER, kind, 0, 1) == 0
    assert raised(event) == 1
    assert client.set_irqs(BOOL | TRIGGER, kind, 0, 1, b"\1") == 0
    assert client.set_irqs(BOOL | TRIGGER, kind, 0, 1, b"\0") == 0
    assert raised(event) == 1
    # QEMU takes it back so, and by a count of 0.
    assert client.set_irqs(EVENTFD | TRIGGER, kind, 0, 1) == 0
    assert not tell()
    assert client.set_irqs(NONE | TRIGGER, kind, 0, 0) == 0
    assert raised(event) == 0


@pytest.mark.parametrize("action", [MASK, UNMASK])
@pytest.mark.parametrize("data", [NONE, BOOL, EVENTFD])
def test_what_cannot_be_masked(
    client: vfio_client.Client, kind: int, action: int, data: int, event: int
) -> None:
    payload = b"\1" if data == BOOL else b""
    fds = [event] if data == EVENTFD else []
    with nothing_left():
        assert client.set_irqs(data | action, kind, 0, 1, payload, fds) == errno.ENOTTY
    assert client.set_irqs(NONE | action, kind, 0, 2) == errno.EINVAL


@pytest.mark.parametrize(("start", "count"), [(0, 2), (1, 1), (2**32 - 1, 1), (0, 2**32 - 1)])
def test_there_is_one_of_each_kind(
    client: vfio_client.Client, kind: int, start: int, count: int
) -> None:
    assert client.set_irqs(NONE | TRIGGER, kind, start, count) == errno.EINVAL
    assert client.request(Command.DEVICE_RESET).error == 0


def test_descriptors_that_are_no_eventfds(client: vfio_client.Client, kind: int) -> None:
    pipe = os.pipe()
    with nothing_left():
        assert client.triggers(kind, 0, [pipe[0]]) == errno.EINVAL
        assert client.triggers(kind, 0, [pipe[0], pipe[1]]) == errno.EINVAL
    for each in pipe:
        os.close(each)


def test_a_client_learns_what_it_cannot_have(device: Client, kind: int, event: int) -> None:
    with pytest.raises(DeviceError, match="1 interrupts of kind"):
        device.enable_interrupts(kind, [event, event])
    with pytest.raises(DeviceError, match="cannot change interrupt 0"):
        device.mask_interrupt(kind)
