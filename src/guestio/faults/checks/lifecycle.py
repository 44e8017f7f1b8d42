"""Rings start, stop, are disabled and reset; descriptors change; queues of all sizes."""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial
from typing import Final

from guestio.faults.catalogue import register, user, virtio
from guestio.faults.outcomes import HungUpError, SilentError
from guestio.faults.report import Severity
from guestio.faults.ring import Queue, take
from guestio.faults.trial import (
    ENTRIES,
    PLAIN,
    PROTOCOL_BIT,
    QUIET,
    VERSION_1,
    Trial,
)
from guestio.vhost_user.messages import U64, FrontendRequest, ProtocolFeature, VringState

_F = FrontendRequest
_STATUS: Final = PLAIN | ProtocolFeature.STATUS
_RESET: Final = PLAIN | ProtocolFeature.RESET_DEVICE
_ACKNOWLEDGE, _DRIVER, _DRIVER_OK, _FEATURES_OK = 1, 2, 4, 8
_RUNNING: Final = _ACKNOWLEDGE | _DRIVER | _FEATURES_OK | _DRIVER_OK
_STOPS: Final = 40
"""How often a ring is stopped with requests on it."""
_STEP: Final = 0.0002
"""Seconds by which the time from requests to stop grows, in eight steps."""


@register(
    "ring.enable",
    user("SET_VRING_ENABLE"),
    "A ring that is enabled is served.",
)
def _enable(t: Trial) -> None:
    t.serves(t.ready())


@register(
    "ring.enable-later",
    user("Ring states"),
    "A ring that was kicked while it was disabled is served once it is enabled.",
)
def _enable_later(t: Trial) -> None:
    if not t.offered() & PROTOCOL_BIT:
        t.skip("protocol features are not offered")
    t.negotiate()
    t.share()
    queue = t.new_queue()
    queue.start(enable=False)
    t.post(queue)
    # A network card throws frames away while it is disabled: then this one is done already.
    t.link.ask(_F.GET_FEATURES)
    queue.enable()
    queue.wait(1, t.patience)
    t.serves(queue)


@register(
    "ring.disable-and-enable",
    user("SET_VRING_ENABLE"),
    "A ring that was disabled and enabled again is served, with nothing lost.",
)
def _disable(t: Trial) -> None:
    if not t.offered() & PROTOCOL_BIT:
        t.skip("protocol features are not offered")
    queue = t.ready()
    t.serves(queue, 3)
    queue.enable(0)
    queue.enable(1)
    t.serves(queue, 3)


@register(
    "ring.enabled-without-protocol",
    user("Ring states"),
    "SET_FEATURES without the vhost-user bit enables every ring at once.",
)
def _without_protocol(t: Trial) -> None:
    link = t.link
    link.do(_F.SET_OWNER)
    link.do(_F.SET_FEATURES, U64(VERSION_1 & t.offered()))
    link.features = VERSION_1
    t.share()
    queue = t.new_queue()
    queue.start()
    t.serves(queue)


@register(
    "ring.not-before-kick",
    user("Ring states"),
    "A ring that was not kicked is stopped: nothing of it is processed.",
)
def _not_before_kick(t: Trial) -> None:
    t.negotiate()
    t.share()
    queue = t.new_queue()
    queue.set_up()
    t.post(queue, kick=False)
    if t.link.features & PROTOCOL_BIT:
        queue.enable()
    t.expect(queue.stays_quiet(QUIET), "processed a ring that has no kick descriptor")


@register(
    "ring.kicked-before-handed-over",
    user("SET_VRING_KICK"),
    "A kick descriptor that is readable when it is handed over starts the ring.",
)
def _kicked_before(t: Trial) -> None:
    t.negotiate()
    t.share()
    queue = t.new_queue()
    t.post(queue)
    queue.start()
    for buffer in queue.wait(1, t.patience):
        t.judge(queue, buffer)


@register(
    "ring.stop-answers",
    user("GET_VRING_BASE"),
    "Stopping a ring is answered with its number and a 16-bit index.",
)
def _stop_answers(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue)
    base = queue.stop()
    t.expect(base <= 0xFFFF, f"the index is {base:#x}, which has more than 16 bits")


@register(
    "ring.stop-index",
    user("GET_VRING_BASE"),
    "The index at which a ring stops is that of the next request that was not processed.",
)
def _stop_index(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue, 5)
    base = queue.stop()
    t.expect(base == 5, f"stopped at index {base} after 5 requests that were all used")


@register(
    "ring.stop-index-from-base",
    user("SET_VRING_BASE"),
    "The index goes on from the one that was set.",
)
def _stop_index_base(t: Trial) -> None:
    queue = t.ready(base=1000)
    t.serves(queue, 3)
    base = queue.stop()
    t.expect(base == 1003, f"started at 1000, used 3 requests, and stopped at {base}")


@register(
    "ring.stopped-not-processed",
    user("Ring states"),
    "A ring that was stopped is not processed, whatever is made available and kicked.",
)
def _stopped(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue)
    queue.stop()
    t.post(queue)
    t.expect(queue.stays_quiet(QUIET), "processed a ring that it had stopped")


@register(
    "ring.stop-settles",
    user("GET_VRING_BASE"),
    "When stopping is answered, what was taken is used, and the index is the used index.",
)
def _stop_settles(t: Trial) -> None:
    queue = t.ready()
    # Whether a stop meets requests is a matter of time: often enough, and sooner or later.
    for number in range(_STOPS):
        t.post(queue, ENTRIES // 4)
        time.sleep(number % 8 * _STEP)
        base = queue.stop()
        used = queue.used_index
        t.expect(
            base == used,
            f"stopped at index {base} with the used index at {used}; what is between is unfinished",
        )
        t.expect(queue.stays_quiet(0.005, used), "used requests after it had answered the stop")
        for entry in queue.take_used():
            t.judge(queue, queue.settle(entry))
        queue.restart(base)
        queue.kick()
        rest = queue.offered - base & 0xFFFF
        for buffer in queue.wait(rest, t.patience):
            t.judge(queue, buffer)


@register(
    "ring.restart",
    user("SET_VRING_BASE"),
    "A ring that was stopped goes on where it stopped, with nothing lost and nothing done twice.",
)
def _restart(t: Trial) -> None:
    queue = t.ready()
    for count in (1, 7, 30):
        t.serves(queue, count)
        queue.restart(queue.stop())
    t.serves(queue, 2)
    t.expect(queue.stays_quiet(0.02), "used a request twice")


@register(
    "ring.restart-with-backlog",
    user("SET_VRING_BASE"),
    "Requests that were made available while the ring was stopped are served after the start.",
)
def _backlog(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue)
    base = queue.stop()
    t.post(queue, 3, kick=False)
    queue.restart(base)
    queue.kick()
    for buffer in queue.wait(3, t.patience):
        t.judge(queue, buffer)


@register(
    "ring.stop-unstarted",
    user("GET_VRING_BASE"),
    "Stopping a ring that was never started is answered.",
)
def _stop_unstarted(t: Trial) -> None:
    t.negotiate()
    t.share()
    queue = t.new_queue()
    queue.set_up()
    queue.stop()


@register("ring.stop-twice", user("GET_VRING_BASE"), "A ring that is stopped can be stopped again.")
def _stop_twice(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue, 2)
    first, second = queue.stop(), queue.stop()
    t.expect(first == second, f"stopped at {first}, and then at {second}")


@register(
    "ring.stop-disabled",
    user("GET_VRING_BASE"),
    "A disabled ring can be stopped, as QEMU does.",
)
def _stop_disabled(t: Trial) -> None:
    if not t.offered() & PROTOCOL_BIT:
        t.skip("protocol features are not offered")
    queue = t.ready()
    t.serves(queue, 2)
    queue.enable(0)
    base = queue.stop()
    t.expect(base == 2, f"stopped at {base} after 2 requests")
    queue.restart(base)
    t.serves(queue)


@register(
    "ring.suspended-memory",
    user("Suspended device state"),
    "While all rings are stopped, guest memory is not written.",
)
def _suspended_memory(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue, 3)
    queue.stop()
    t.post(queue, 3, kick=False)
    before = t.ram.snapshot()
    queue.kick()
    t.link.quiet(QUIET)
    at = t.ram.stray(before, ())
    t.expect(at is None, f"wrote to guest memory at {at or 0:#x} while suspended")


@register(
    "ring.suspended-no-calls",
    user("Suspended device state"),
    "While all rings are stopped, the guest is sent no notification.",
)
def _suspended_calls(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue, 3)
    queue.stop()
    queue.called(0)
    t.post(queue, 3)
    t.expect(not queue.called(QUIET), "notified the driver while suspended")


@register(
    "ring.suspended-answers",
    user("Suspended device state"),
    "While all rings are stopped, messages are answered.",
)
def _suspended_answers(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue)
    queue.stop()
    t.link.ask(_F.GET_FEATURES)
    if t.link.features & PROTOCOL_BIT:
        t.link.ask(_F.GET_PROTOCOL_FEATURES)


@register(
    "ring.new-place",
    user("SET_VRING_ADDR"),
    "A ring that was stopped can be started elsewhere, with another size.",
)
def _new_place(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue, 3)
    queue.stop()
    other = t.new_queue(size=ENTRIES * 2)
    other.start()
    t.serves(other, 3)


@register(
    "ring.kick-changed",
    user("Ring states"),
    "A kick descriptor can be replaced while the ring is processed.",
)
def _kick_changed(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue)
    queue.kick_fd = queue.new_eventfd()
    queue.set_fd(_F.SET_VRING_KICK, queue.kick_fd)
    t.serves(queue)


@register(
    "ring.call-changed",
    user("Ring states"),
    "A call descriptor can be replaced while the ring is processed; the old one is not used then.",
)
def _call_changed(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue)
    old = queue.call_fd
    assert old is not None
    queue.call_fd = queue.new_eventfd()
    queue.set_fd(_F.SET_VRING_CALL, queue.call_fd)
    take(old, 0)
    t.serves(queue)
    t.expect(queue.called(t.patience), "does not notify by the new descriptor")
    t.expect(not take(old, 0), "still notifies by the old descriptor")


@register(
    "ring.no-call",
    user("SET_VRING_CALL"),
    "A driver that polls, and sends no call descriptor, is served.",
)
def _no_call(t: Trial) -> None:
    t.negotiate()
    t.share()
    queue = t.new_queue()
    queue.call_fd = None
    queue.start()
    t.serves(queue, 3)


@register(
    "ring.no-error-descriptor",
    user("SET_VRING_ERR"),
    "A ring without an error descriptor is served.",
)
def _no_err(t: Trial) -> None:
    t.negotiate()
    t.share()
    queue = t.new_queue()
    queue.err_fd = None
    queue.start()
    t.serves(queue, 3)


@register(
    "ring.no-kick",
    user("SET_VRING_KICK"),
    "A ring without a kick descriptor is polled.",
    severity=Severity.SHOULD,
)
def _no_kick(t: Trial) -> None:
    t.negotiate()
    t.share()
    queue = t.new_queue()
    queue.kick_fd = None
    queue.set_up()
    if value := t.link.result(_F.SET_VRING_KICK, U64(queue.index | 1 << 8)):
        t.reject(f"refuses to poll ({value})")
    if t.link.features & PROTOCOL_BIT:
        queue.enable()
    t.serves(queue, 2)


@register(
    "ring.all-queues",
    user("Multiple queue support"),
    "Every queue can be started, and stopped on its own.",
)
def _all_queues(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.MQ)
    t.negotiate()
    count = min(t.link.u64(_F.GET_QUEUE_NUM), 16)
    t.share()
    queues = [t.new_queue(index, 16) for index in range(count)]
    for queue in queues:
        queue.start()
    for queue in queues:
        base = queue.stop()
        t.expect(base == 0, f"queue {queue.index} stopped at {base} without a request")


@register(
    "ring.second-queue",
    user("Multiple queue support"),
    "A second request queue is served as the first one is.",
    devices=("blk",),
)
def _second_queue(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.MQ)
    t.negotiate(1 << 12)
    if t.link.u64(_F.GET_QUEUE_NUM) < 2:
        t.skip("the device has one queue")
    t.share()
    queues = [t.new_queue(index) for index in (0, 1)]
    for queue in queues:
        queue.start()
    for queue in queues:
        t.post(queue, 5)
    for queue in queues:
        for buffer in queue.wait(5, t.patience):
            t.judge(queue, buffer)


def _size(size: int, t: Trial) -> None:
    t.negotiate()
    t.share()
    queue = Queue(t.link, t.new_ram(size=8 << 20, start=1 << 33), t.index, size)
    try:
        t.link.do(_F.SET_MEM_TABLE, queue.ram.table, [queue.ram.fd])
        if value := t.link.result(_F.SET_VRING_NUM, VringState(queue.index, size)):
            t.reject(f"refuses a ring of {size} entries ({value})")
        queue.start()
        for _ in range(3):
            t.serves(queue, max(1, min(size // 4, 64)))
    finally:
        queue.close()


for _entries in (4, 8, 256, 1024, 32768):
    register(
        f"ring.size-{_entries}",
        virtio("2.7"),
        f"A ring of {_entries} entries is served; the largest size is 32768.",
        severity=Severity.SHOULD,
    )(partial(_size, _entries))


@register(
    "ring.base-wraps",
    virtio("2.7.6"),
    "The available index goes from 65535 to 0, and the used index too.",
)
def _base_wraps(t: Trial) -> None:
    queue = t.ready(base=65530)
    for _ in range(4):
        t.serves(queue, 4)
    t.expect(queue.used_index == 10, f"the used index is {queue.used_index}, not 10")
    base = queue.stop()
    t.expect(base == 10, f"stopped at {base}, not 10")


@register(
    "reset.device",
    user("RESET_DEVICE"),
    "A device that was reset can be set up again.",
)
def _reset_device(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.RESET_DEVICE)
    queue = t.ready(protocol=_RESET)
    t.serves(queue, 3)
    t.link.do(_F.RESET_DEVICE)
    t.link.do(_F.SET_FEATURES, U64(t.link.features))
    t.share()
    again = t.new_queue()
    again.start()
    t.serves(again, 3)


@register(
    "reset.device-disables",
    user("RESET_DEVICE"),
    "A reset disables all rings: nothing is processed afterwards.",
)
def _reset_disables(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.RESET_DEVICE)
    queue = t.ready(protocol=_RESET)
    t.serves(queue)
    t.link.do(_F.RESET_DEVICE)
    t.post(queue)
    t.expect(queue.stays_quiet(QUIET), "processed a ring after RESET_DEVICE")


def _with_status(t: Trial) -> int:
    t.needs(protocol=ProtocolFeature.STATUS)
    t.negotiate(protocol=_STATUS)
    return t.link.u64(_F.GET_STATUS)


def _set_status(t: Trial, value: int) -> int:
    t.link.do(_F.SET_STATUS, U64(value))
    return t.link.u64(_F.GET_STATUS)


@register("status.initial", virtio("2.1"), "The device status begins as 0.")
def _status_initial(t: Trial) -> None:
    value = _with_status(t)
    t.expect(value == 0, f"the device status begins as {value:#x}")


@register("status.kept", virtio("2.1"), "The device status reads as the driver set it.")
def _status_kept(t: Trial) -> None:
    _with_status(t)
    for wanted in (_ACKNOWLEDGE, _ACKNOWLEDGE | _DRIVER):
        value = _set_status(t, wanted)
        t.expect(value == wanted, f"the status was set to {wanted:#x} and reads {value:#x}")


@register(
    "status.features-ok",
    virtio("2.2.2"),
    "FEATURES_OK stays set after valid features were accepted.",
)
def _features_ok(t: Trial) -> None:
    _with_status(t)
    wanted = _ACKNOWLEDGE | _DRIVER | _FEATURES_OK
    value = _set_status(t, wanted)
    t.expect(value == wanted, f"the status was set to {wanted:#x} and reads {value:#x}")


@register("status.reset", virtio("2.4.1"), "After a reset the device status reads 0.")
def _status_reset(t: Trial) -> None:
    _with_status(t)
    _set_status(t, _RUNNING)
    value = _set_status(t, 0)
    t.expect(value == 0, f"after a reset the status reads {value:#x}")


@register(
    "status.reset-for-the-next",
    virtio("2.1"),
    "The next front-end finds the status 0.",
)
def _status_next(t: Trial) -> None:
    _with_status(t)
    _set_status(t, _RUNNING)
    t.reconnect()
    value = _with_status(t)
    t.expect(value == 0, f"the next front-end finds status {value:#x}")


def _status_ring(t: Trial) -> Queue:
    _with_status(t)
    t.share()
    queue = t.new_queue()
    queue.start()
    return queue


@register(
    "status.not-before-driver-ok",
    virtio("2.1.2"),
    "No buffer is consumed before DRIVER_OK.",
)
def _before_driver_ok(t: Trial) -> None:
    _with_status(t)
    _set_status(t, _ACKNOWLEDGE | _DRIVER | _FEATURES_OK)
    t.share()
    queue = t.new_queue()
    queue.start()
    t.post(queue)
    if not queue.stays_quiet(QUIET):
        # vhost-user has rings start by their kicks, and front-ends that never set DRIVER_OK.
        t.reject("goes by the kick, as vhost-user has it, and not by DRIVER_OK")


@register(
    "status.served-after-driver-ok",
    virtio("3.1.1"),
    "With DRIVER_OK the device is live: requests are served.",
)
def _after_driver_ok(t: Trial) -> None:
    queue = _status_ring(t)
    _set_status(t, _RUNNING)
    t.serves(queue, 3)


@register(
    "status.nothing-after-reset",
    virtio("2.4.1"),
    "After a reset no queue is touched and no notification is sent.",
)
def _after_reset(t: Trial) -> None:
    queue = _status_ring(t)
    _set_status(t, _RUNNING)
    t.serves(queue)
    _set_status(t, 0)
    queue.called(0)
    t.post(queue)
    t.expect(queue.stays_quiet(QUIET), "processed a ring after a reset")
    t.expect(not queue.called(0), "notified the driver after a reset")


@register(
    "status.again-after-reset",
    virtio("3.1.1"),
    "After a reset the device can be initialized again.",
)
def _again_after_reset(t: Trial) -> None:
    queue = _status_ring(t)
    _set_status(t, _RUNNING)
    t.serves(queue)
    _set_status(t, 0)
    t.link.do(_F.SET_FEATURES, U64(t.link.features))
    _set_status(t, _ACKNOWLEDGE | _DRIVER | _FEATURES_OK)
    again = t.new_queue()
    again.start()
    _set_status(t, _RUNNING)
    t.serves(again, 3)


@register(
    "status.wide",
    user("SET_STATUS"),
    "A status of more than 8 bits is refused, or cut.",
    severity=Severity.SAFETY,
    hostile=True,
)
def _status_wide(t: Trial) -> None:
    _with_status(t)
    t.link.refuses(_F.SET_STATUS, U64(1 << 40 | _ACKNOWLEDGE))


@register(
    "ring.two-kicks-a-request",
    virtio("2.7.10.2"),
    "Notifications without a buffer are spurious, and handled.",
)
def _spurious(t: Trial) -> None:
    queue = t.ready()
    for _ in range(1000):
        queue.kick()
    t.serves(queue)
    for _ in range(1000):
        queue.kick()
    t.serves(queue)
    t.expect(queue.stays_quiet(0.02), "used buffers that were not made available")


@register(
    "ring.storm-of-calls",
    user("SET_VRING_CALL"),
    "A call descriptor that nothing reads, and is full, stops nothing.",
)
def _full_call(t: Trial) -> None:
    queue = t.ready()
    assert queue.call_fd is not None
    with contextlib.suppress(BlockingIOError):  # full enough, if it is not empty
        os.eventfd_write(queue.call_fd, 0xFFFF_FFFF_FFFF_FFFE)
    try:
        t.serves(queue, 8)
        queue.stop()
    except (SilentError, HungUpError) as outcome:
        t.fail(f"with a call descriptor that is full: {outcome}")
