"""Defects that guestio once had, put back one at a time: does a simulation find each?

    ./run simulate --defects

Each is a replacement of the function that was mended, for as long as a context lasts.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from guestio.peer.connection import PeerConnection
from guestio.testing.simulation import DeviceFactory, InvariantError, simulate
from guestio.vhost_user.connection import Connection
from guestio.vhost_user.memory import SharedMemory
from guestio.vhost_user.translator import VhostUserTranslator
from guestio.virtio.queue import DeviceQueue
from tests.simulation.devices import DeadDisk, FailingDisk, LazyDisk, disk

if TYPE_CHECKING:
    from guestio._core.virtio.chain import Chain


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Have another function in the place of one."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@dataclass(frozen=True)
class Defect:
    """A defect.

    Attributes:
        name: What it is.
        invariants: Which ones it breaks.
        patch: Puts it back, as long as the context lasts.
        device: The device with which it shows.
        iommu, crashes: As for `simulate`.
    """

    name: str
    invariants: frozenset[str]
    patch: Callable[[], contextlib.AbstractContextManager[None]]
    device: DeviceFactory = disk
    iommu: bool | None = None
    crashes: bool = True


def _iotlb_survives() -> contextlib.AbstractContextManager[None]:
    """Translations stay known over a stop of all queues."""
    return replaced(VhostUserTranslator, "_forget_all", lambda _self: None)


def _no_wait() -> contextlib.AbstractContextManager[None]:
    """An unmap is acknowledged while what it took away is in use."""
    return replaced(VhostUserTranslator, "unused", lambda _self, _iova, _size, _seconds: True)


def _unmarked() -> contextlib.AbstractContextManager[None]:
    """Memory has no dirty log by default."""
    made = SharedMemory.__init__

    def without(self: SharedMemory, *args: Any, **options: Any) -> None:
        made(self, *args, **{**options, "log": None})

    return replaced(SharedMemory, "__init__", without)


def _base_forgotten() -> contextlib.AbstractContextManager[None]:
    """A status of 0 has a queue forget where it stopped, and QEMU 7.2 asks after that."""

    def reset(self: Connection, *, keep_base: bool = False) -> None:
        self._host.reset(keep_base=False)
        self._forget_translations()

    return replaced(Connection, "_reset", reset)


def _waiting_counted() -> contextlib.AbstractContextManager[None]:
    """A queue stops behind requests that it has seen and not served."""
    detach = DeviceQueue.detach

    def ahead(self: DeviceQueue, until: float) -> None:
        waits = self._ring is not None and bool(self._ring.lacking())
        detach(self, until)
        self.base = (self.base + waits) & 0xFFFF

    return replaced(DeviceQueue, "detach", ahead)


def _no_limit() -> contextlib.AbstractContextManager[None]:
    """A stop waits for what a device holds, however long that is."""
    drain = DeviceQueue._drain_until
    return replaced(DeviceQueue, "_drain_until", lambda self, _until: drain(self, math.inf))


def _half_kept() -> contextlib.AbstractContextManager[None]:
    """A front-end that leaves half a message keeps the only place."""
    return replaced(PeerConnection, "_watch_half_message", lambda _self: None)


def _seen_to_succeed() -> contextlib.AbstractContextManager[None]:
    """A request that its device failed is given back with the status of a success."""

    def fail(self: DeviceQueue, chain: Chain, *, late: bool = False) -> int:
        if chain.tail is not None:
            chain.tail.write(b"\0")
        return 0

    return replaced(DeviceQueue, "_fail", fail)


class CancelingDisk(FailingDisk):
    """Cancels the futures of some writes."""

    way = "cancel"


class NonsenseDisk(FailingDisk):
    """Says that it wrote more than there is room for."""

    way = "nonsense"


def _cancelled_succeeds() -> contextlib.AbstractContextManager[None]:
    """A future that was cancelled is an answer of 0 bytes."""
    answer_of = DeviceQueue._answer_of

    def taken(self: DeviceQueue, chain: Chain, answer: Any) -> int:
        return 0 if answer.cancelled() else answer_of(self, chain, answer)

    return replaced(DeviceQueue, "_answer_of", taken)


def _nonsense_succeeds() -> contextlib.AbstractContextManager[None]:
    """A device's nonsense is cut to what is possible, and the status left as it is."""
    import guestio.virtio.queue as module

    plausible = module._plausible

    def cut(written: Any, chain: Chain, whose: str) -> int:
        return plausible(min(int(written), chain.writable.total), chain, whose)

    return replaced(module, "_plausible", cut)


DEFECTS: Final = [
    Defect("B1: the IOTLB survives a stop", frozenset({"L1", "L6"}), _iotlb_survives, iommu=True),
    Defect(
        "B2: a request whose device raised is seen to succeed",
        frozenset({"L13", "L14"}),
        _seen_to_succeed,
        FailingDisk,
    ),
    Defect(
        "B2: a device's nonsense is taken",
        frozenset({"L13", "L14"}),
        _nonsense_succeeds,
        NonsenseDisk,
    ),
    Defect(
        "B2: a cancelled future is an answer",
        frozenset({"L13", "L14"}),
        _cancelled_succeeds,
        CancelingDisk,
    ),
    Defect(
        "B3: a translation is taken away while it is used",
        frozenset({"L1", "L14", "L13"}),
        _no_wait,
        LazyDisk,
        iommu=True,
        crashes=False,
    ),
    Defect("B4: what is written is not marked", frozenset({"L9"}), _unmarked),
    Defect("B6: a status of 0 forgets where a queue stopped", frozenset({"L14"}), _base_forgotten),
    Defect(
        "B7: a stop counts requests that wait for translations",
        frozenset({"L14"}),
        _waiting_counted,
        iommu=True,
    ),
    Defect(
        "C1: a stop waits for a device without a limit", frozenset({"L12"}), _no_limit, DeadDisk
    ),
    Defect("C10: half a message keeps the only place", frozenset({"L12"}), _half_kept),
]
"""Those with which the simulation is tried."""


@dataclass(frozen=True)
class Found:
    """How a defect was found.

    Attributes:
        seed: With which seed.
        seconds: After how much of this process's time.
        error: What was found.
    """

    seed: int
    seconds: float
    error: InvariantError


def find(defect: Defect, seconds: float = 60.0, *, steps: int = 500) -> Found | None:
    """Simulate with one seed after the other until a defect is found, or the time is over.

    Seconds are those of a processor: others may use this machine as well.
    """
    began, seed = time.process_time(), 0
    with defect.patch():
        while time.process_time() - began < seconds:
            try:
                simulate(
                    defect.device,
                    seed=seed,
                    steps=steps,
                    iommu=defect.iommu,
                    crashes=defect.crashes,
                    shrink=False,
                )
            except InvariantError as error:
                return Found(seed, time.process_time() - began, error)
            seed += 1
    return None
