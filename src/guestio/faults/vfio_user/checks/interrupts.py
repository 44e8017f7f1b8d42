"""DEVICE_GET_IRQ_INFO and DEVICE_SET_IRQS."""

from __future__ import annotations

import os
from functools import partial
from typing import Final

from guestio.faults.base_trial import QUIET
from guestio.faults.outcomes import HungUpError
from guestio.faults.vfio_user.catalogue import hostile, register, vfio
from guestio.faults.vfio_user.trial import INTX, VfioTrial
from guestio.vfio_user.messages import IRQ_INFO, SET_IRQS, Command, IrqSet

_INFO: Final = vfio("DEVICE_GET_IRQ_INFO")
_SET: Final = vfio("DEVICE_SET_IRQS")
_FIRE: Final = IrqSet.DATA_NONE | IrqSet.TRIGGER
_EVENTFD: Final = IrqSet.DATA_EVENTFD | IrqSet.TRIGGER


@register("irq.each", _INFO, "Each kind of interrupts is told of, by its number.")
def _each(t: VfioTrial) -> None:
    t.begin()
    for kind in range(t.info().irqs):
        info = t.irq(kind)
        t.expect(info.kind == kind, f"kind {kind} is told as {info.kind}")
        t.expect(info.argsz >= IRQ_INFO.size, f"kind {kind}: argsz is {info.argsz}")
        t.expect(not info.flags & ~0xF, f"kind {kind}: flags {info.flags:#x}")
        t.expect(info.number <= 4096, f"kind {kind} has {info.number} interrupts")


@register("irq.eventfd", _INFO, "Interrupts that there are can be signaled to eventfds.")
def _eventfd(t: VfioTrial) -> None:
    t.begin()
    for kind in range(3):
        info = t.irq(kind)
        t.expect(not info.number or info.flags & 1, f"kind {kind}: flags {info.flags:#x}")


@register("irq.intx", _INFO, "There is one INTx at most.")
def _intx(t: VfioTrial) -> None:
    t.begin()
    count = t.irq(INTX).number
    t.expect(count <= 1, f"there are {count}")


@hostile("irq.unknown", _INFO, "A kind of interrupts that does not exist is refused.")
def _unknown(t: VfioTrial) -> None:
    t.begin()
    for kind in (t.info().irqs, 0xFFFFFFFF):
        t.refused(
            Command.DEVICE_GET_IRQ_INFO, IRQ_INFO.pack(IRQ_INFO.size, 0, kind, 0), why=f"{kind}"
        )


@hostile("irq.argsz", _INFO, "A question with no room for its answer is refused.")
def _argsz(t: VfioTrial) -> None:
    t.begin()
    t.refused(Command.DEVICE_GET_IRQ_INFO, IRQ_INFO.pack(4, 0, 0, 0), why="with an argsz of 4")


@register("irq.trigger", _SET, "An interrupt that the client triggers is signaled to its eventfd.")
def _trigger(t: VfioTrial) -> None:
    t.begin()
    kind, _ = t.vector()
    fd = t.eventfd()
    t.arm(kind, [fd])
    answer = t.set_irqs(_FIRE, kind, 0, 1)
    t.expect(not answer.failed, f"refused with error {answer.error}")
    t.expect(t.signaled(fd), "the eventfd was not signaled")


@register("irq.trigger-which", _SET, "The interrupt that is triggered is signaled, and no other.")
def _which(t: VfioTrial) -> None:
    t.begin()
    kind, count = t.vector()
    if count < 2:
        t.skip("the device has one interrupt")
    fds = [t.eventfd(), t.eventfd()]
    t.arm(kind, fds)
    answer = t.set_irqs(_FIRE, kind, 1, 1)
    t.expect(not answer.failed, f"refused with error {answer.error}")
    t.expect(t.signaled(fds[1]), "the eventfd was not signaled")
    t.expect(not t.signaled(fds[0], 0), "another one was signaled")


@register("irq.booleans", _SET, "Of several interrupts those whose boolean is set are triggered.")
def _booleans(t: VfioTrial) -> None:
    t.begin()
    kind, count = t.vector()
    if count < 2:
        t.skip("the device has one interrupt")
    fds = [t.eventfd(), t.eventfd()]
    t.arm(kind, fds)
    answer = t.set_irqs(IrqSet.DATA_BOOL | IrqSet.TRIGGER, kind, 0, 2, b"\0\1")
    t.expect(not answer.failed, f"refused with error {answer.error}")
    t.expect(t.signaled(fds[1]), "the one whose boolean is 1 was not signaled")
    t.expect(not t.signaled(fds[0], 0), "the one whose boolean is 0 was signaled")


@register("irq.replace", _SET, "Another eventfd takes the place of the one before.")
def _replace(t: VfioTrial) -> None:
    t.begin()
    kind, _ = t.vector()
    old, new = t.eventfd(), t.eventfd()
    t.arm(kind, [old])
    t.arm(kind, [new])
    t.set_irqs(_FIRE, kind, 0, 1)
    t.expect(t.signaled(new), "the new eventfd was not signaled")
    t.expect(not t.signaled(old, 0), "the old one was signaled")


@register("irq.disable", _SET, "Without data and for no interrupt, a kind of them is switched off.")
def _disable(t: VfioTrial) -> None:
    t.begin()
    kind, _ = t.vector()
    fd = t.eventfd()
    t.arm(kind, [fd])
    answer = t.set_irqs(_FIRE, kind, 0, 0)
    t.expect(not answer.failed, f"refused with error {answer.error}")
    t.set_irqs(_FIRE, kind, 0, 1)
    t.expect(not t.signaled(fd, QUIET), "an interrupt that is off was signaled")


@register("irq.remove", _SET, "No eventfd for an interrupt takes its eventfd away.")
def _remove(t: VfioTrial) -> None:
    t.begin()
    kind, _ = t.vector()
    fd = t.eventfd()
    t.arm(kind, [fd])
    answer = t.set_irqs(_EVENTFD, kind, 0, 1)
    t.expect(not answer.failed, f"refused with error {answer.error}")
    t.set_irqs(_FIRE, kind, 0, 1)
    t.expect(not t.signaled(fd, QUIET), "the eventfd that was taken away was signaled")


@register("irq.all-at-once", _SET, "Eventfds for as many interrupts as a message carries.")
def _all(t: VfioTrial) -> None:
    t.begin()
    kind, count = t.vector()
    most = min(count, int(t.link.capabilities.get("max_msg_fds", 1)), 16)
    fds = [t.eventfd() for _ in range(most)]
    t.arm(kind, fds)
    t.set_irqs(_FIRE, kind, most - 1, 1)
    t.expect(t.signaled(fds[-1]), "the last one was not signaled")


@hostile("irq.full-eventfd", _SET, "An eventfd that is full does not stop the device.")
def _full(t: VfioTrial) -> None:
    t.begin()
    kind, _ = t.vector()
    fd = t.own(os.eventfd(0, os.EFD_CLOEXEC))
    os.eventfd_write(fd, (1 << 64) - 2)
    t.arm(kind, [fd])
    t.set_irqs(_FIRE, kind, 0, 1)
    t.info()


def _bad(t: VfioTrial, flags: int, start: int, count: int, data: bytes, fds: int, why: str) -> None:
    t.begin()
    kind, number = t.vector()
    start = number if start < 0 else start
    payload = SET_IRQS.pack(SET_IRQS.size + len(data), flags, kind, start, count) + data
    given = [t.eventfd() for _ in range(fds)]
    t.refused(Command.DEVICE_SET_IRQS, payload, given, why=why)


_LAST: Final = (1 << 32) - 1
for _name, _text, _flags, _start, _count, _data, _fds in (
    ("past-count", "Interrupts beyond those that there are, are refused.", _FIRE, -1, 1, b"", 0),
    ("wraps", "Numbers of interrupts that pass 2**32 are refused.", _FIRE, _LAST, 2, b"", 0),
    ("many", "Four billion interrupts are refused.", _FIRE, 0, _LAST, b"", 0),
    ("no-data", "Flags without a kind of data are refused.", IrqSet.TRIGGER, 0, 1, b"", 0),
    ("two-data", "Flags with two kinds of data are refused.", 1 | 2 | 32, 0, 1, b"\0", 0),
    ("no-action", "Flags without an action are refused.", IrqSet.DATA_NONE, 0, 1, b"", 0),
    ("two-actions", "Flags with two actions are refused.", 1 | 8 | 32, 0, 1, b"", 0),
    ("flags", "Flags that do not exist are refused.", _FIRE | 1 << 20, 0, 1, b"", 0),
    (
        "too-few-booleans",
        "Fewer booleans than interrupts are refused.",
        IrqSet.DATA_BOOL | IrqSet.TRIGGER,
        0,
        1,
        b"",
        0,
    ),
    ("more-eventfds", "More eventfds than interrupts are refused.", _EVENTFD, 0, 1, b"", 2),
):
    hostile(f"irq.bad-{_name}", _SET, _text)(
        partial(
            _bad,
            flags=_flags,
            start=_start,
            count=_count,
            data=_data,
            fds=_fds,
            why=f"({_name})",
        )
    )


@hostile("irq.bad-short", _SET, "Interrupts without all of their numbers are refused.")
def _short(t: VfioTrial) -> None:
    t.begin()
    t.refused(Command.DEVICE_SET_IRQS, bytes(8), why="of 8 bytes")


@hostile("irq.bad-kind", _SET, "Interrupts of a kind that does not exist are refused.")
def _kind(t: VfioTrial) -> None:
    t.begin()
    payload = SET_IRQS.pack(SET_IRQS.size, _FIRE, t.info().irqs, 0, 0)
    t.refused(Command.DEVICE_SET_IRQS, payload, why="of no kind")


@hostile("irq.other-descriptor", _SET, "A file or a pipe in place of an eventfd harms nothing.")
def _other(t: VfioTrial) -> None:
    t.begin()
    kind, _ = t.vector()
    reader, writer = os.pipe()
    for fd in (t.own(reader), t.own(writer), t.memfd(4096)):
        try:
            t.set_irqs(_EVENTFD, kind, 0, 1, fds=[fd])
            t.set_irqs(_FIRE, kind, 0, 1)
        except HungUpError:
            t.reconnect()
