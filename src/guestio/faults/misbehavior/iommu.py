"""What a device does wrong with translations, by rules."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from guestio._core.iommu.address_space import AddressSpace
from guestio.addr import IovaRange
from guestio.budgets import FAULT_PAGES
from guestio.faults.misbehavior.force import Faults

if TYPE_CHECKING:
    from guestio._core.virtio.loop import Feed
    from guestio.iommu import Iotlb
    from guestio.virtio.host import DeviceHost
    from guestio.virtio.translator import Miss, Page, Translator

PAGE: Final = 4096
_READ, _WRITE = 1, 2
_TOP: Final = 1 << 48
"""Behind the addresses that a miss storm asks for, which no driver is expected to have mapped."""


class Sandbox:
    """Where a device may write although it was unmapped: in buffers that it was given to write.

    Threads: any may remember; the rest is for the loop's.
    """

    def __init__(self) -> None:
        self._buffers: OrderedDict[int, int] = OrderedDict()
        self._due: list[int] = []

    def remember(self, fragments: Iterable[tuple[int, int]]) -> None:
        """Remember a buffer that the device was given to write, by its pieces."""
        for iova, length in fragments:
            self._buffers.pop(iova, None)
            self._buffers[iova] = length
            if len(self._buffers) > FAULT_PAGES:
                self._buffers.popitem(last=False)

    def unmap(self, faults: Faults, host: DeviceHost, iova: int, size: int) -> None:
        """Learn of an unmap that is about to be obeyed; what is to be accessed afterwards."""
        iotlb = host.translator.iotlb
        if iotlb is None:
            return
        end = iova + size
        for start, length in list(self._buffers.items()):
            first, last = max(start, iova), min(start + length, end) - 1
            if first > last:
                continue
            del self._buffers[start]
            for base, _, target, perm in iotlb._map.overlapping(first, last + 1 - first):
                at = max(first, base)
                if perm & _WRITE and faults.first(
                    ("access-after-unmap",), f"an unmap of {iova:#x}+{size:#x}", iova=(first, last)
                ):
                    self._due.append(target + at - base)
                    break

    def access(self, host: DeviceHost) -> None:
        """Write to what was unmapped."""
        due, self._due = self._due, []
        if due:
            memory = AddressSpace(host.space.regions)
            for address in due:
                before = memory.read(address, 1)
                if before is not None:
                    memory.write(address, bytes([before[0] ^ 0xFF]))


class MisbehavingTranslator:
    """A translator as queues see it that asks for the wrong things; see `Translator`."""

    feed: Feed | None = None

    def __init__(self, translator: Translator, faults: Faults, host: DeviceHost | None) -> None:
        self._translator = translator
        self._faults = faults
        self._host = host

    @property
    def iotlb(self) -> Iotlb | None:
        """See `Translator`."""
        return self._translator.iotlb

    def __getattr__(self, name: str) -> Any:
        return getattr(self._translator, name)

    def request(self, waiter: int, missing: Iterable[Miss]) -> None:
        """Request ranges, or others; see `Translator`."""
        wanted: list[Miss] = []
        refused: set[Page] = set()
        for where, access in missing:
            first, last = where.base, where.base + where.length - 1
            what = f"the translation of {first:#x}+{where.length:#x} for queue {waiter}"
            span: dict[str, Any] = {"queue": waiter, "iova": (first, last)}
            storm = self._faults.first(("miss-storm",), what, **span)
            if storm is not None:
                self._ask_for_nothing(storm.random.randrange, storm.value)
            fault = self._faults.first(("refuse", "wrong-permission"), what, **span)
            if fault is None:
                wanted.append((where, access))
            elif fault.rule.what.name == "refuse":
                pages = range(first // PAGE * PAGE, last + 1, PAGE)
                refused.update((page, access) for page in pages)
            else:
                wanted.append((where, _READ if access & _WRITE else _WRITE))
        if wanted:
            self._translator.request(waiter, wanted)
        if refused and self._host is not None:
            self._translator.refused(waiter).update(refused)
            self._host.call_soon_threadsafe(lambda: self._wake(waiter))

    def _wake(self, waiter: int) -> None:
        assert self._host is not None
        self._host.wake([waiter])

    def _ask_for_nothing(self, random: Any, count: int) -> None:
        ask = getattr(self._translator, "ask_ahead", None)
        if ask is not None:
            pages = [random(_TOP >> 13, _TOP >> 12) * PAGE for _ in range(min(count, FAULT_PAGES))]
            ask([(IovaRange(page, PAGE), _READ) for page in pages])
