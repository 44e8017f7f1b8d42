"""What a device tells its driver in the used ring, and when it notifies it, by rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from guestio._core.virtio.misbehaving import MisbehavingRing
from guestio.errors import QueueError

if TYPE_CHECKING:
    from guestio._core.virtio.split import SplitRing
    from guestio.faults.misbehavior.device import Misbehaving

TOO_MUCH: Final = 4096
"""Bytes that a used length is too long by, unless the rule says it."""

_USED: Final = ("used-length", "wrong-head", "duplicate-completion", "needs-reset")
_NOTIFIED: Final = ("skip-interrupt", "late-interrupt", "ignore-event-idx")


class RingLies:
    """Asked by a `MisbehavingRing`; made by :meth:`ring`."""

    def __init__(self, device: Misbehaving, index: int, size: int) -> None:
        self._device = device
        self._index = index
        self._size = size

    @classmethod
    def ring(cls, device: Misbehaving, index: int, *args: Any, **options: Any) -> SplitRing:
        """A ring that lies by the rules of a device; arguments as of `SplitRing`."""
        if device.faults.has(("reorder",)):
            options["ordered"] = False
        ring = MisbehavingRing(*args, **options)
        ring.lies = cls(device, index, ring.size)
        return ring

    def used(self, head: int, written: int) -> tuple[int, int, bool]:
        """Head and length for a used entry, and whether it is written twice.

        Raises:
            QueueError: The queue breaks instead.
        """
        request = self._device.request_of(self._index, head)
        faults = self._device.faults
        twice = False
        for fault in faults.strike(_USED, str(request), op=request.op, **request.where):
            match fault.rule.what.name:
                case "used-length":
                    written = written + TOO_MUCH if fault.rule.value is None else fault.value
                case "wrong-head":
                    head = self._size if fault.rule.value is None else fault.value
                case "duplicate-completion":
                    twice = True
                case _:
                    raise QueueError(f"fault {fault.number} ({fault.rule}): the device breaks")
        return head, written, twice

    def ahead(self) -> int:
        """Entries too many that the used index is to announce."""
        what = f"publication on queue {self._index}"
        fault = self._device.faults.first(("index-jump",), what, queue=self._index)
        return 0 if fault is None else fault.value

    def notified(self, wanted: bool) -> bool:
        """Whether the driver is notified of what was published."""
        index, faults = self._index, self._device.faults
        what = f"notification of queue {index}, which is {'' if wanted else 'not '}wanted"
        names = _NOTIFIED[:2] if wanted else _NOTIFIED[2:]
        fault = faults.first(names, what, queue=index)
        if fault is None:
            return wanted
        if fault.rule.what.name == "late-interrupt":
            self._device.interrupt_later(index, fault.seconds)
        return not wanted
