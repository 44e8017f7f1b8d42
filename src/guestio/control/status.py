"""The status of a server, put together without a lock that the data path may hold."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, runtime_checkable

from guestio._core.trace import tracepoints
from guestio._core.trace.latencies import Latencies
from guestio.control import schema
from guestio.iommu import Iotlb
from guestio.trace import VERSION, Group, wanted
from guestio.virtio.device import Device
from guestio.virtio.device import Status as DeviceStatus
from guestio.virtio.features import feature_names
from guestio.virtio.host import DeviceHost
from guestio.virtio.snapshot import QueueSnapshot

OPERATIONS: Final = ("other", "read", "write", "flush")
"""Kinds of requests, as the core numbers them."""

FAULTS: Final = (
    "failed_requests",
    "queue_errors",
    "protocol_errors",
    "iotlb_refused",
    "iotlb_timeouts",
    "access_fails",
    "dma_refused",
    "refused",
    "cut_off",
    "failed_calls",
)
"""Counters of mistakes, of the servers that have them."""

NO_RATES: Final[schema.Rates] = {
    "requests_per_s": 0.0,
    "bytes_per_s": 0.0,
    "notifications_per_s": 0.0,
}


class Observed(Protocol):
    """A server that can be asked what it is doing, from any thread and without waiting."""

    def status(self) -> schema.Status:
        """Its state at this moment; the rates are 0."""
        ...

    def explain(
        self, address: int, length: int, *, endpoint: int | None = None
    ) -> schema.Explanation:
        """What an address of the device, or of an endpoint behind it, leads to."""
        ...

    def survey(
        self, address: int, length: int, parts: int, *, memory: bool = False
    ) -> schema.Survey:
        """What a range of the device's addresses, or of memory, has in equal parts."""
        ...


@runtime_checkable
class Switchable(Protocol):
    """Rules that a device misbehaves by, as :class:`guestio.faults.Faults` has them."""

    def on(self, rule: str) -> int:
        """Put a rule into force; its number. Raises ValueError."""
        ...

    def off(self, number: int) -> None:
        """Take a rule back. Raises ValueError."""
        ...

    def counts(self) -> Sequence[Any]:
        """The rules in force, as named tuples: number, rule, matched, struck."""
        ...


def rules_of(server: object) -> Switchable | None:
    """The rules that a server, or its device, misbehaves by; None of one that does not."""
    found = getattr(server, "faults", None) or getattr(
        getattr(server, "device", None), "faults", None
    )
    return found if isinstance(found, Switchable) else None


_QUANTILES: Final = (("p50_s", 0.5), ("p90_s", 0.9), ("p99_s", 0.99), ("p999_s", 0.999))


def latency_of(latencies: Latencies, *kinds: int) -> schema.Latency:
    """The histograms of some kinds, together, in a few numbers."""
    counts: dict[tuple[int, int], int] = {}
    for kind in kinds:
        for first, end, count in latencies.buckets(kind):
            counts[first, end] = counts.get((first, end), 0) + count
    buckets = [(first, end, count) for (first, end), count in sorted(counts.items())]
    total = sum(counts.values())
    sum_s = sum(map(latencies.sum_ns, kinds)) / 1e9
    found: dict[str, Any] = {
        "count": total,
        "sum_s": sum_s,
        "mean_s": sum_s / total if total else 0.0,
        "max_s": (buckets[-1][1] - 1) / 1e9 if buckets else 0.0,
        "buckets": _octaves(buckets),
    }
    for name, share in _QUANTILES:
        found[name] = _quantile(buckets, share * total)
    return found  # type: ignore[return-value] # all its keys are there


def _octaves(buckets: Iterable[tuple[int, int, int]]) -> list[tuple[float, int]]:
    """Buckets put together up to the next power of two."""
    found: dict[int, int] = {}
    for _, end, count in buckets:
        octave = max(1 << (end - 1).bit_length(), 8)
        found[octave] = found.get(octave, 0) + count
    return [(octave / 1e9, count) for octave, count in sorted(found.items())]


def _quantile(buckets: Iterable[tuple[int, int, int]], wanted: float) -> float:
    """The middle of the bucket in which so many are reached, in seconds."""
    seen = 0
    for first, end, count in buckets:
        seen += count
        if seen >= wanted:
            return (first + end - 1) / 2e9
    return 0.0


def queue_status(queue: QueueSnapshot, now: float) -> schema.Queue:
    """A queue as JSON."""
    stalled = queue.stalled_since
    return {
        "index": queue.index,
        "enabled": queue.enabled,
        "running": queue.running,
        "size": queue.size,
        "next_avail": queue.next_avail,
        "next_used": queue.next_used,
        "depth": queue.depth,
        "held": queue.held,
        "stalled": stalled is not None,
        "stalled_s": 0.0 if stalled is None else max(now - stalled, 0.0),
        "broken": queue.broken,
        "taken": queue.counts.taken,
        "completed": queue.counts.completed,
        "bytes": queue.counts.bytes,
        "notifications": queue.counts.notifications,
        "rates": NO_RATES.copy(),
        "latency": {
            name: latency
            for kind, name in enumerate(OPERATIONS)
            if (latency := latency_of(queue.latencies, kind))["count"]
        },
        "latency_all": latency_of(queue.latencies, *range(len(OPERATIONS))),
    }


def iotlb_status(
    iotlb: Iotlb, *, pending: int = 0, latencies: Latencies | None = None
) -> schema.IotlbInfo:
    """Translations as JSON."""
    hits, misses, fails = iotlb.hits, iotlb.misses, iotlb.access_fails
    lookups = hits + misses + fails
    return {
        "entries": len(iotlb),
        "capacity": iotlb.capacity,
        "hits": hits,
        "lookup_misses": misses,
        "hit_rate": hits / lookups if lookups else 0.0,
        "access_fails": fails,
        "evictions": iotlb.evictions,
        "pending": pending,
        "miss_latency": latency_of(latencies or Latencies(), 0),
    }


def host_queues(host: DeviceHost) -> list[schema.Queue]:
    """The queues of a virtio device."""
    now = time.monotonic()
    return [queue_status(queue.snapshot(), now) for queue in host.queues]


def status_names(status: int) -> list[str]:
    """Device status bits by name."""
    return [bit.name or "" for bit in DeviceStatus if status & bit]


def peer_status(
    host: DeviceHost, number: int, since: float, protocol_features: Iterable[str] = ()
) -> schema.Peer:
    """The front-end of a virtio device."""
    return {
        "number": number,
        "connected_s": time.monotonic() - since,
        "features": feature_names(host.features, getattr(host.device, "device_id", 0)),
        "feature_bits": host.features,
        "protocol_features": list(protocol_features),
        "status": status_names(host.status),
    }


def budget(used: int, limit: int) -> schema.Budget:
    """A limit as JSON."""
    return {"used": used, "limit": limit}


def no_dirty() -> schema.Dirty:
    """What is known of written pages where none are counted."""
    return {"tracked": False, "logging": False, "pages": 0, "pages_per_s": 0.0}


@dataclass
class Seen:
    """What a connection adds to a status; by itself, that there is none.

    Attributes:
        peer, iotlb, memory, dirty: As in `schema.Status`.
        budgets: Limits on what the peer uses.
    """

    peer: schema.Peer | None = None
    iotlb: schema.IotlbInfo | None = None
    memory: list[schema.Region] = field(default_factory=list)
    dirty: schema.Dirty = field(default_factory=no_dirty)
    budgets: dict[str, schema.Budget] = field(default_factory=dict)


class Source:
    """What of a status is the same for all servers.

    Args:
        kind, transport, origin: As in `schema.DeviceInfo`.
        device: The virtio device, if it is one.
    """

    def __init__(self, kind: str, transport: str, origin: int, device: Device | None) -> None:
        self._device: schema.DeviceInfo = {
            "kind": kind,
            "transport": transport,
            "path": "",
            "origin": origin,
            "device_id": None if device is None else device.device_id,
            "config": "" if device is None else device.config().hex(),
        }
        self._started, self._since = time.time(), time.monotonic()

    def status(
        self,
        counts: Mapping[str, int],
        faults: Iterable[str],
        *,
        path: str,
        queues: list[schema.Queue],
        budgets: dict[str, schema.Budget],
        seen: Seen,
        rules: Switchable | None,
    ) -> schema.Status:
        """A status.

        Args:
            counts: All counters.
            faults: Names of those that count mistakes.
            path: The server's socket.
            queues: Its queues.
            budgets: Its limits.
            seen: What is known of the peer.
            rules: Those that it obeys, or its device does.
        """
        now = time.monotonic()
        device = self._device.copy()
        device["path"] = path
        return {
            "schema": schema.SCHEMA,
            "version": _version(),
            "time_s": now,
            "process": {
                "pid": os.getpid(),
                "started": self._started,
                "uptime_s": now - self._since,
            },
            "device": device,
            "peer": seen.peer,
            "counts": dict(counts),
            "rates": dict.fromkeys(counts, 0.0),
            "queues": queues,
            "iotlb": seen.iotlb,
            "memory": seen.memory,
            "faults": {name: counts[name] for name in faults if name in counts},
            "dirty": seen.dirty,
            "budgets": budgets | seen.budgets,
            "rules": None if rules is None else len(rules.counts()),
            "trace": trace_status(),
        }


def _version() -> str:
    # The package imports what is above this one; it is there, as this is a part of it.
    version: str = sys.modules["guestio"].__version__
    return version


def trace_status() -> schema.Trace:
    """Tracepoints of this process."""
    groups = wanted()
    return {
        "version": VERSION,
        "groups": [group.name.lower() for group in Group if group & groups and group.name],
        "rings": [{"number": number, "fd": fd} for number, fd in tracepoints.rings()],
        "unheld": tracepoints.unheld(),
    }
