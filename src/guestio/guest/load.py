"""Load for a virtio-blk device: how many requests it serves, how fast, and whether rightly.

A :class:`Load` is a guest made to keep a disk busy. Unlike a
:class:`~guestio.guest.disk.ScriptedGuest` its driver is compiled, so that it is not what is
measured. It connects, sets queues up, and runs::

    with Load("/run/disk.sock", LoadPlan(workload="randread", depth=32)) as load:
        print(load.run(5.0).iops)

With :attr:`LoadPlan.verify` requests are laid out in memory in every way a driver may, and every
block that is read is compared with what was written last.

The device is behind vhost-user, or a PCI function behind vfio-user: the compiled driver does
the same for both, but for how it notifies the device.

Source: virtio 1.3 section 5.2; what a guest maps and unmaps after Linux's
drivers/block/virtio_blk.c and Documentation/core-api/dma-api.rst.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, NoReturn, Self, TypeAlias

from guestio.errors import DeviceError, GuestioError, ProtocolError, QueueError
from guestio.guest._load.load import LoadDriver
from guestio.guest.dma import PAGE
from guestio.guest.pci_frontend import PciFrontend, PciQueue
from guestio.guest.plan import VERIFY_SPAN, LoadMemory, LoadPlan
from guestio.vhost_user.channel import PeerGoneError
from guestio.vhost_user.frontend import Frontend, NoAnswerError
from guestio.vhost_user.messages import ProtocolFeature
from guestio.virtio.blk import F_MQ, F_RO, F_SEG_MAX
from guestio.virtio.device import (
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
    Status,
)
from guestio.virtio.image import SECTOR
from guestio.virtio.layout import RingLayout

if TYPE_CHECKING:
    import socket

_SLICE_NS: Final = 50_000_000
_UNKNOWN: Final = (1 << 64) - 1
_CONFIG: Final = struct.Struct("<Q4xI18xH")


class _Config(NamedTuple):
    """What matters here of the configuration space (section 5.2.4)."""

    capacity: int
    seg_max: int
    num_queues: int


class CorruptionError(GuestioError):
    """The disk did not return what was written, or the device wrote where it may not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What was measured.

    Attributes:
        seconds: For how long.
        reads: Reads finished.
        writes: Writes finished.
        moved: Bytes read and written.
        mean_us: How long requests took from being put into the queue to being finished, in
            microseconds; with ``strict`` until the back-end acknowledged that it has forgotten
            their mappings.
        p50_us: Half of them took less.
        p99_us: 99 of 100 took less.
        max_us: The slowest.
        kicks: Notifications sent to the device.
        interrupts: Notifications taken from it.
        misses: Translations the back-end requested.
        updates: Translations it was told.
        invalidations: Those it acknowledged to have forgotten.
        refused: Misses that were answered with a failure.
        access_fails: Forbidden accesses it reported.
    """

    seconds: float
    reads: int
    writes: int
    moved: int
    mean_us: float
    p50_us: float
    p99_us: float
    max_us: float
    kicks: int
    interrupts: int
    misses: int
    updates: int
    invalidations: int
    refused: int
    access_fails: int

    @property
    def requests(self) -> int:
        """Requests finished."""
        return self.reads + self.writes

    @property
    def iops(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Bytes per second."""
        return self.moved / self.seconds if self.seconds else 0.0


Transport: TypeAlias = Literal["vhost-user", "vfio-user", "vfio-user-doorbells"]
"""What leads to the device."""

Tick: TypeAlias = Callable[[float, LoadResult], None]
"""Called several times a second with what share is done, from 0 to 1, and the result so far."""


class Load:
    """A guest that keeps a virtio-blk device busy.

    For one thread; only :meth:`stop` may be called from others and from signal handlers.

    Args:
        target: Path of the back-end's socket, or a connected socket, which it owns from here on.
        plan: What to do.
        timeout: Seconds that the device may take for anything.
        connect_wait: Seconds to go on trying while the path has no listener yet.
        transport: What leads to the device: vhost-user; vfio-user, to a PCI function that is
            notified by posted writes, as a guest's is; or ``"vfio-user-doorbells"``, where it is
            by eventfds as far as the server offers them.

    Attributes:
        plan: As given.
        frontend: The connection. With vhost-user its IOTLB is served by the compiled driver, not
            by :attr:`Frontend.iotlb`.
        blocks: Blocks of the disk in use.

    Raises:
        OSError: The back-end cannot be connected to.
        DeviceError: It cannot serve this plan.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | socket.socket,
        plan: LoadPlan,
        *,
        timeout: float = 10.0,
        connect_wait: float = 0.0,
        transport: Transport = "vhost-user",
    ) -> None:
        self.plan = plan
        self._timeout = timeout
        self._stopped = False
        self._sound = False
        self._memory: LoadMemory | None = None
        self.frontend: Frontend | PciFrontend
        if transport == "vhost-user":
            self.frontend = Frontend(
                target, timeout=timeout, connect_wait=connect_wait, answer="caller"
            )
        elif isinstance(target, str | os.PathLike):
            bells = transport == "vfio-user-doorbells"
            self.frontend = PciFrontend(
                target, timeout=timeout, connect_wait=connect_wait, doorbells=bells
            )
        else:
            raise TypeError("a vfio-user device is found by the path of its socket")
        try:
            self._negotiate()
            self._set_up()
        except BaseException:
            self.close()
            raise

    def _negotiate(self) -> None:
        plan, frontend = self.plan, self.frontend
        wanted = 1 << VIRTIO_F_VERSION_1 | F_MQ | F_RO | F_SEG_MAX
        wanted |= plan.indirect << VIRTIO_F_INDIRECT_DESC | plan.event_idx << VIRTIO_F_EVENT_IDX
        wanted |= (plan.iommu != "off") << VIRTIO_F_ACCESS_PLATFORM
        features = frontend.negotiate(wanted)
        if plan.iommu != "off" and not frontend.iommu:
            raise DeviceError("the device does not offer VIRTIO_F_ACCESS_PLATFORM (no IOMMU)")
        if plan.writes and features & F_RO:
            raise DeviceError("the disk is read-only; only read and randread without verify work")
        if plan.indirect and not features >> VIRTIO_F_INDIRECT_DESC & 1 and plan.depth > 1:
            needed = plan.depth * plan.pieces
            if needed > plan.entries:
                raise DeviceError(
                    f"the device knows no indirect tables: depth {plan.depth} needs a queue of "
                    f"{needed} entries instead of {plan.entries}"
                )
        self._config = _Config._make(_CONFIG.unpack(frontend.get_config(0, _CONFIG.size)))
        offered = min(frontend.queue_count(), self._config.num_queues if features & F_MQ else 1)
        if plan.queues > offered:
            raise DeviceError(f"{plan.queues} queues are wanted, the device has {offered}")
        self.blocks = self._blocks()

    def _blocks(self) -> int:
        plan, size = self.plan, self._config.capacity * SECTOR
        span = plan.span
        if span is None:
            span = min(size, VERIFY_SPAN) if plan.verify else size
        if not plan.block_size <= span <= size:
            raise DeviceError(f"{span} bytes of a disk of {size}, in blocks of {plan.block_size}")
        blocks = span // plan.block_size
        if plan.verify and blocks < 4 * plan.depth * plan.queues:
            raise DeviceError(
                f"to verify, {plan.depth * plan.queues} requests at a time need at least "
                f"{4 * plan.depth * plan.queues} blocks, not {blocks}"
            )
        return blocks

    def _set_up(self) -> None:
        plan, frontend = self.plan, self.frontend
        has_indirect = bool(frontend.features >> VIRTIO_F_INDIRECT_DESC & 1)
        memory = self._memory = LoadMemory(plan)
        frontend.set_memory(memory.regions)
        iotlb, back = None, -1
        if plan.iommu != "off" and isinstance(frontend, Frontend):
            back = frontend.iotlb.fileno()
            iotlb = memory.open_window(frontend.fileno(), back)
        self._iotlb = iotlb
        self._driver = LoadDriver(
            plan.block_size,
            self.blocks,
            frontend.fileno(),
            back,
            iotlb=iotlb,
            strict=plan.iommu == "strict",
            stride=memory.stride,
            separate=plan.separate_status,
            indirect=has_indirect,
            polling=plan.polling,
            batches=plan.batches,
            verify=plan.verify,
            timeout=int(self._timeout * 1e9),
            seed=plan.seed,
        )
        for index in range(plan.queues):
            self._start_queue(memory, index)
        most = self._config.seg_max
        if frontend.features & F_SEG_MAX and self._driver.most_descriptors - 2 > most:
            raise DeviceError(
                f"requests of {plan.block_size} bytes on scattered pages take up to "
                f"{self._driver.most_descriptors - 2} segments, the device takes {most}; "
                f"have the data contiguous, or use smaller blocks"
            )
        if self._has_status:
            up = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
            frontend.set_status(up)
        self._sound = True

    def _start_queue(self, memory: LoadMemory, index: int) -> None:
        plan, size, driver = self.plan, self.plan.entries, self._driver
        desc = memory.ring_part(RingLayout.desc_bytes(size))
        avail = memory.ring_part(RingLayout.avail_bytes(size))
        used = memory.ring_part(RingLayout.used_bytes(size))
        layout = RingLayout(size, desc[0][0], avail[0][0], used[0][0])
        handle = self.frontend.start_queue(index, layout)
        fds = handle.kick_fd, handle.call_fd, handle.err_fd
        message = handle.message if isinstance(handle, PciQueue) else b""
        driver.add_queue(
            size,
            plan.depth,
            desc[1],
            avail[1],
            used[1],
            *(-1 if fd is None else fd for fd in fds),
            event_idx=bool(self.frontend.features >> VIRTIO_F_EVENT_IDX & 1),
            message=message,
        )
        if self._iotlb is not None:
            # As QEMU does, so that the device need not ask for the page it will surely write.
            self._iotlb.push((layout.used - self._iotlb.base) // PAGE)
        for first, second, table in memory.slots():
            driver.add_slot(index, first, second, table)
        for page in memory.strides():
            driver.add_stride(index, page)

    # Running

    def run(self, seconds: float, tick: Tick | None = None) -> LoadResult:
        """Keep the device busy for so long, and measure.

        Requests in flight at the end stay so, and count for the next run.

        Args:
            seconds: For how long, unless :meth:`stop` is called.
            tick: Told how it goes.

        Raises:
            QueueError, ProtocolError, PeerGoneError, NoAnswerError: The back-end broke the rules of
                the ring or of the protocol, went away, or stopped answering.
            DeviceError: A request failed.
            CorruptionError: What was read is not what had been written.
        """
        plan = self.plan
        at_random = plan.workload.startswith("rand")
        self._driver.begin(read_percent=plan.read_percent, random=at_random)
        self._driver.reset_counts()
        return self._work(seconds, tick, lambda result: result.seconds / seconds)

    def run_requests(self, count: int) -> LoadResult:
        """Begin so many requests and finish them, and measure; raises as :meth:`run`."""
        plan = self.plan
        self._drain()
        at_random = plan.workload.startswith("rand")
        self._driver.begin(read_percent=plan.read_percent, random=at_random, limit=count)
        self._driver.reset_counts()
        return self._work(None, None, lambda result: result.requests / count)

    def fill(self, tick: Tick | None = None) -> LoadResult:
        """Write every block in use once, so that its contents are known; raises as :meth:`run`."""
        return self._pass(0, tick)

    def read_back(self, tick: Tick | None = None) -> LoadResult:
        """Read every block in use once, and check it; raises as :meth:`run`."""
        return self._pass(100, tick)

    def _pass(self, read_percent: int, tick: Tick | None) -> LoadResult:
        self._drain()
        self._driver.begin(read_percent=read_percent, random=False, limit=self.blocks)
        self._driver.reset_counts()
        return self._work(None, tick, lambda result: result.requests / self.blocks)

    def _work(
        self, seconds: float | None, tick: Tick | None, share: Callable[[LoadResult], float]
    ) -> LoadResult:
        started = time.monotonic()
        outcome, elapsed = 0, 0.0
        while outcome != 1 and not self._stopped and (seconds is None or elapsed < seconds):
            left = _SLICE_NS if seconds is None else int((seconds - elapsed) * 1e9)
            outcome = self._driver.run(min(left, _SLICE_NS))
            elapsed = time.monotonic() - started
            if outcome == 3:
                self._raise_trouble()
            if tick is not None:
                result = self._result(elapsed)
                tick(min(share(result), 1.0), result)
        return self._result(elapsed)

    def stop(self) -> None:
        """Have :meth:`run`, :meth:`fill` and :meth:`read_back` return early, now and later."""
        self._stopped = True

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stopped

    def _drain(self) -> None:
        """Begin nothing more, and wait until nothing is in flight."""
        self._driver.begin(read_percent=100, random=True, limit=0)
        while (outcome := self._driver.run(_SLICE_NS)) != 1:
            if outcome == 3:
                self._raise_trouble()

    def _result(self, seconds: float) -> LoadResult:
        driver, iotlb = self._driver, self._iotlb
        requests = driver.reads + driver.writes
        histogram = driver.histogram()
        return LoadResult(
            seconds=seconds,
            reads=driver.reads,
            writes=driver.writes,
            moved=requests * self.plan.block_size,
            mean_us=driver.latency_sum / requests / 1000 if requests else 0.0,
            p50_us=percentile(histogram, 50) / 1000,
            p99_us=percentile(histogram, 99) / 1000,
            max_us=driver.latency_max / 1000,
            kicks=driver.kicks,
            interrupts=driver.interrupts,
            misses=0 if iotlb is None else iotlb.misses,
            updates=0 if iotlb is None else iotlb.updates,
            invalidations=0 if iotlb is None else iotlb.invalidations,
            refused=0 if iotlb is None else iotlb.refused,
            access_fails=0 if iotlb is None else iotlb.access_fails,
        )

    def close(self) -> None:
        """Let the device finish, stop it, and disconnect. May be called again."""
        try:
            if self._sound:
                self._sound = False
                with contextlib.suppress(GuestioError):
                    self._shut_down()
        finally:
            self.frontend.close()
            if isinstance(self.frontend, Frontend):
                self.frontend.iotlb.memory = None
            # The driver works on the memory, so it goes first.
            self.__dict__.pop("_driver", None)
            self.__dict__.pop("_iotlb", None)
            if self._memory is not None:
                self._memory.close()
                self._memory = None

    def _shut_down(self) -> None:
        self._drain()
        if isinstance(self.frontend, Frontend):
            for index in range(self.plan.queues):
                self.frontend.stop_queue(index)
        if self._has_status:
            self.frontend.set_status(0)

    @property
    def _has_status(self) -> bool:
        """Whether the device is told its status."""
        frontend = self.frontend
        if isinstance(frontend, Frontend):
            return bool(frontend.protocol_features & ProtocolFeature.STATUS)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _raise_trouble(self) -> NoReturn:
        """Say what the compiled driver found."""
        self._sound = False
        assert self._driver.trouble is not None
        name, queue, values = self._driver.trouble
        if name == "iotlb":
            assert self._iotlb is not None
            assert self._iotlb.failure is not None
            raise _iotlb_error(*self._iotlb.failure)
        raise _error(name, queue, values, self._timeout)


def _error(name: str, queue: int, values: Sequence[int], timeout: float) -> GuestioError:
    a, b, c, d = values
    kind = "write" if b else "read"
    found = "something else" if c == _UNKNOWN else f"version {d} of sector {c}"
    messages: dict[str, tuple[type[GuestioError], str]] = {
        "used-index": (
            QueueError,
            f"the used index went from {b} to {a} with {c} requests outstanding",
        ),
        "used-id": (QueueError, f"used entry {b} names chain {a}, which the device does not have"),
        "used-length": (
            QueueError,
            f"the device says it wrote {b} bytes for sector {a}, which had room for {c}",
        ),
        "status": (DeviceError, f"a {kind} at sector {a} failed with status {c}"),
        "short": (DeviceError, f"a read at sector {a} succeeded with {b} of {c} bytes"),
        "contents": (
            CorruptionError,
            f"sector {a} should hold its version {b} and holds {found}",
        ),
        "overrun": (
            CorruptionError,
            f"a {kind} at sector {a} wrote byte {c} of memory whose buffer begins at {d}",
        ),
        "stalled": (NoAnswerError, f"none of {a} requests was finished for {timeout} s"),
        "gone": (PeerGoneError, "the back-end went away"),
        "unasked": (ProtocolError, "the back-end sent a message that was not requested"),
        "ring-error": (QueueError, "the device reports that the queue is broken"),
    }
    error, text = messages.get(name, (GuestioError, f"{name} {list(values)}"))
    return error(text if name in {"gone", "unasked", "stalled"} else f"queue {queue}: {text}")


def _iotlb_error(kind: int, detail: int) -> GuestioError:
    match kind:
        case 1:
            return PeerGoneError("the back-end went away, or closed its channel")
        case 2:
            return ProtocolError(f"message {detail} of the back-end makes no sense")
        case 3:
            return DeviceError("the back-end refused to forget a translation")
        case _:
            return GuestioError(f"talking to the back-end failed: {os.strerror(detail)}")


def percentile(histogram: Sequence[tuple[float, int]], percent: float) -> float:
    """The value below which so many of 100 lie, of ascending pairs of a value and how many.

    Returns:
        0 if there are none.
    """
    if not histogram:
        return 0.0
    totals = list(accumulate(count for _, count in histogram))
    wanted = totals[-1] * percent / 100
    for (value, _), total in zip(histogram, totals, strict=True):
        if total >= wanted:
            return value
    return histogram[-1][0]


def cpu_seconds(pid: int) -> float:
    """CPU time that the threads of a process have used, to the nanosecond.

    Time of threads that are gone is not in it.

    Raises:
        OSError: There is no such process.
    """
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9
