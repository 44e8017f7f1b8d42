"""Resets, and clients that come and go."""

from __future__ import annotations

import contextlib
import time
from typing import Final

from guestio.faults.outcomes import HungUpError, SilentError, SkipError
from guestio.faults.vfio_user.catalogue import hostile, pci, register, vfio
from guestio.faults.vfio_user.trial import (
    BUS_MASTER,
    CAP_AF,
    CAP_EXPRESS,
    COMMAND,
    MEMORY_SPACE,
    VfioTrial,
)
from guestio.vfio_user.messages import Command

_RESET: Final = vfio("DEVICE_RESET")
_FLR: Final = "PCI Express 5.0 section 6.6.2"
_FLR_TIME: Final = 0.1
"""Seconds that a function level reset may take."""


@register("reset.answer", _RESET, "A reset is answered, and the device is there afterwards.")
def _answer(t: VfioTrial) -> None:
    t.begin()
    before = t.config(0, 4)
    if not t.info().flags & 1:
        t.skip("the device cannot be reset")
    t.link.do(Command.DEVICE_RESET)
    t.expect(t.config(0, 4) == before, "it is another device")


@register("reset.command", pci("6.2.2"), "After a reset the command register is 0.")
def _command(t: VfioTrial) -> None:
    t.begin(master=True)
    if not t.info().flags & 1:
        t.skip("the device cannot be reset")
    t.link.do(Command.DEVICE_RESET)
    found = t.number(COMMAND, 2) & (BUS_MASTER | MEMORY_SPACE | 1)
    t.expect(not found, f"the command register is {found:#x}")


@register("reset.again", _RESET, "A device can be reset again and again.")
def _again(t: VfioTrial) -> None:
    t.begin()
    if not t.info().flags & 1:
        t.skip("the device cannot be reset")
    for _ in range(10):
        t.link.do(Command.DEVICE_RESET)


@register("reset.mappings", _RESET, "A reset takes no mapping away: an unmap is answered.")
def _mappings(t: VfioTrial) -> None:
    t.begin()
    if not t.info().flags & 1:
        t.skip("the device cannot be reset")
    t.maps(0, 4096, t.memfd(4096))
    t.link.do(Command.DEVICE_RESET)
    t.unmaps(0, 4096)


@hostile("reset.payload", _RESET, "A reset with a payload harms nothing.")
def _payload(t: VfioTrial) -> None:
    t.begin()
    answer = t.link.ask(Command.DEVICE_RESET, bytes(32))
    t.info()
    if answer.failed:
        t.reject(f"refused with error {answer.error}")


def _flr(t: VfioTrial) -> tuple[int, int]:
    """Where a function level reset is begun, and what to write; of PCI Express or of AF."""
    for identifier, at in t.capabilities():
        if identifier == CAP_EXPRESS and t.number(at + 4, 4) & 1 << 28:
            return at + 8, t.number(at + 8, 2) | 1 << 15
        if identifier == CAP_AF and t.number(at + 3, 1) & 2:
            return at + 4, 1
    raise SkipError("there is no function level reset")


@register("flr.done", _FLR, "A function level reset clears the command register, in 100 ms.")
def _flr_done(t: VfioTrial) -> None:
    t.begin(master=True)
    at, value = _flr(t)
    t.write_config(at, value, 2 if value > 1 else 1)
    deadline = time.monotonic() + max(_FLR_TIME, t.patience)
    wanted = BUS_MASTER | MEMORY_SPACE
    while t.number(COMMAND, 2) & wanted:
        t.expect(time.monotonic() < deadline, "the command register stays as it was")


@register("flr.bit", _FLR, "The bit that begins a function level reset reads 0.")
def _flr_bit(t: VfioTrial) -> None:
    t.begin(master=True)
    at, value = _flr(t)
    t.write_config(at, value, 2 if value > 1 else 1)
    mask = 1 << 15 if value > 1 else 1
    t.expect(not t.number(at, 2) & mask, "it reads 1")


@register("flr.identity", _FLR, "A function level reset leaves what the device is.")
def _flr_identity(t: VfioTrial) -> None:
    t.begin(master=True)
    at, value = _flr(t)
    before = t.config(0, 4) + t.config(8, 4) + t.config(0x2C, 4)
    t.write_config(at, value, 2 if value > 1 else 1)
    time.sleep(_FLR_TIME)
    after = t.config(0, 4) + t.config(8, 4) + t.config(0x2C, 4)
    t.expect(before == after, f"{before.hex()} has become {after.hex()}")


# Clients


@register(
    "client.next", vfio("Socket disconnection"), "After a client has gone the next is served."
)
def _next(t: VfioTrial) -> None:
    t.begin(master=True)
    for _ in range(5):
        t.reconnect()
        t.info()


@hostile("client.silent", vfio("Transport"), "A client that connects and says nothing.")
def _silent(t: VfioTrial) -> None:
    t.link.quiet(0.05)
    t.link.close()


@hostile("client.at-once", vfio("Transport"), "Clients that hang up at once.")
def _at_once(t: VfioTrial) -> None:
    for _ in range(20):
        t.connect().close()


@hostile("client.leaves-answer", vfio("Transport"), "A client that goes before its answer comes.")
def _leaves(t: VfioTrial) -> None:
    t.begin()
    for _ in range(50):
        t.link.message(Command.DEVICE_GET_INFO, (16).to_bytes(4, "little") + bytes(12))
    t.link.close()


@hostile("client.reads-nothing", vfio("Transport"), "A client that asks and reads no answers.")
def _reads_nothing(t: VfioTrial) -> None:
    t.begin()
    t.link.close()
    link = t.connect(min(t.patience, 0.3))
    link.negotiate()
    payload = bytes(8) + (7).to_bytes(4, "little") + (256).to_bytes(4, "little")
    with contextlib.suppress(HungUpError, SilentError):
        for _ in range(2000):
            link.message(Command.REGION_READ, payload)
    link.close()
