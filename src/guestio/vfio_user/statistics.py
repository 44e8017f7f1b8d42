"""What is counted of a PCI device that is served over vfio-user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from guestio._core.vfio_user.feed import DmaCounters
from guestio.virtio.statistics import Statistics as VirtioStatistics

_VIRTIO = ("requests", "failed_requests", "queue_errors", "config_changes", "outstanding")
"""What is shown of a virtio device."""
_HIDDEN = ("messages", "virtio", "device_failures", "interrupts_sent", "accesses_refused")
"""Fields that are no counters."""


@dataclass
class Statistics:
    """What happened on a server, over all its clients.

    Attributes:
        connections: Clients accepted.
        protocol_errors: Clients disconnected because they broke the protocol.
        refused: Requests answered with an error.
        delayed_unmaps: Those of them that had to wait for an access to end.
        cut_off: Those of them that did not wait any longer: the memory was taken from the access.
        dma_messages: Accesses to memory that a client does not share: messages to it.
        resets: Resets that clients asked for, by message, or as function level reset.
        virtio: What is counted of requests and queues, if the device is a `VirtioPci`.
        messages: What the core counts: mappings and accesses.
        device_failures: Tells how many calls of the device failed.
        interrupts_sent: Tells how many interrupts were delivered.
        accesses_refused: Tells how many accesses of the device to memory were refused.
    """

    connections: int = 0
    protocol_errors: int = 0
    refused: int = 0
    delayed_unmaps: int = 0
    cut_off: int = 0
    dma_messages: int = 0
    resets: int = 0
    virtio: VirtioStatistics | None = None
    messages: DmaCounters = field(default_factory=DmaCounters, repr=False)
    device_failures: Callable[[], int] = field(default=lambda: 0, repr=False)
    interrupts_sent: Callable[[], int] = field(default=lambda: 0, repr=False)
    accesses_refused: Callable[[], int] = field(default=lambda: 0, repr=False)

    def __str__(self) -> str:
        """All counters, for people."""
        names = [name for name in vars(self) if name not in _HIDDEN]
        names += ["dma_maps", "dma_unmaps", "dma_refused", "region_reads", "region_writes"]
        names.append("failed_calls")
        shown = [f"{name}={getattr(self, name)}" for name in names]
        if self.virtio is not None:
            shown += [f"{name}={getattr(self.virtio, name)}" for name in _VIRTIO]
        return " ".join(shown)

    def counts(self) -> dict[str, int]:
        """All counters by name, those of a virtio device included. From any thread."""
        names = [name for name in vars(self) if name not in _HIDDEN]
        names += [name for name, value in vars(type(self)).items() if isinstance(value, property)]
        found: dict[str, int] = {name: getattr(self, name) for name in names}
        if self.virtio is not None:
            counts = self.virtio.counts()
            found |= {name: counts[name] for name in _VIRTIO if name in counts}
        return found

    @property
    def dma_maps(self) -> int:
        """Mappings made."""
        return self.messages.dma_maps

    @property
    def dma_unmaps(self) -> int:
        """Requests to remove mappings."""
        return self.messages.dma_unmaps

    @property
    def dma_refused(self) -> int:
        """Accesses of the device to memory that is not mapped for it, or without bus mastering."""
        return self.accesses_refused()

    @property
    def region_reads(self) -> int:
        """Reads of BARs and of the configuration space."""
        return self.messages.region_reads

    @property
    def region_writes(self) -> int:
        """Writes to BARs and to the configuration space."""
        return self.messages.region_writes

    @property
    def plain(self) -> int:
        """Messages that were handled without entering Python."""
        return self.messages.plain

    @property
    def failed_calls(self) -> int:
        """Calls of the device that raised an exception, or returned no number."""
        return self.device_failures()

    @property
    def interrupts(self) -> int:
        """Interrupts delivered."""
        return self.interrupts_sent()
