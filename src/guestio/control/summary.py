"""A status, written down for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from guestio.control.schema import (
    EndpointInfo,
    Explanation,
    Latency,
    Queue,
    Recorded,
    Status,
)

Key = Callable[[Queue], float]


def _latency(queue: Queue, quantile: str) -> float:
    found: float = queue["latency_all"][quantile]  # type: ignore[literal-required] # a name of one
    return found


SORT_KEYS: Final[dict[str, Key]] = {
    "index": lambda queue: queue["index"],
    "requests": lambda queue: -queue["rates"]["requests_per_s"],
    "bytes": lambda queue: -queue["rates"]["bytes_per_s"],
    "depth": lambda queue: -queue["depth"],
    "latency": lambda queue: -_latency(queue, "p99_s"),
    "total": lambda queue: -queue["taken"],
}
"""What queues can be sorted by; but for the index, the largest first."""

COLUMNS: Final = (
    "queue",
    "state",
    "size",
    "index",
    "depth",
    "requests",
    "req/s",
    "MB/s",
    "irq/s",
    "p50 us",
    "p99 us",
    "max us",
)
"""Headings of the table of queues."""


def state_of(queue: Queue) -> str:
    """What a queue is doing, in a word or two."""
    if queue["broken"] is not None:
        return "broken"
    if not queue["running"]:
        return "off" if not queue["enabled"] else "idle"
    return f"stalled {queue['stalled_s']:.1f}s" if queue["stalled"] else "running"


def rows_of(status: Status, sort: str = "index") -> list[tuple[str, ...]]:
    """The table of queues, a row each."""
    return [
        (
            str(queue["index"]),
            state_of(queue),
            str(queue["size"]),
            str(queue["next_avail"]),
            str(queue["depth"]),
            str(queue["completed"]),
            f"{queue['rates']['requests_per_s']:,.0f}",
            f"{queue['rates']['bytes_per_s'] / 1e6:,.1f}",
            f"{queue['rates']['notifications_per_s']:,.0f}",
            *(f"{_latency(queue, name) * 1e6:,.0f}" for name in ("p50_s", "p99_s", "max_s")),
        )
        for queue in sorted(status["queues"], key=SORT_KEYS[sort])
    ]


def title_of(status: Status) -> str:
    """What is served, and whom, in a line."""
    device, peer = status["device"], status["peer"]
    whom = "no peer" if peer is None else f"peer {peer['number']} for {peer['connected_s']:,.0f} s"
    return (
        f"{device['kind']} over {device['transport']} at {device['path'] or 'a descriptor'}, "
        f"process {status['process']['pid']}, up {status['process']['uptime_s']:,.0f} s; {whom}"
    )


def lines_of(status: Status) -> list[str]:
    """What is to be said besides the queues."""
    counts = status["counts"]
    lines = []
    peer = status["peer"]
    if peer is not None:
        lines.append("features: " + (" ".join(peer["features"]) or "none"))
    iotlb = status["iotlb"]
    if iotlb is not None:
        lines.append(
            f"IOTLB: {iotlb['entries']:,} entries, hit rate {iotlb['hit_rate']:.1%}, "
            f"{iotlb['pending']} misses pending, answered in {_text(iotlb['miss_latency'])}"
        )
    if "iotlb_misses" in counts:
        lines.append(
            f"translations: {counts['iotlb_misses']:,} requested, "
            f"{counts['iotlb_updates']:,} updates, {counts['iotlb_invalidations']:,} invalidations"
        )
    if "dma_maps" in counts:
        lines.append(
            f"DMA: {counts['dma_maps']:,} maps, {counts['dma_unmaps']:,} unmaps; "
            f"registers: {counts['region_reads']:,} reads, {counts['region_writes']:,} writes; "
            f"{counts['interrupts']:,} interrupts"
        )
    memory = sum(region["length_bytes"] for region in status["memory"])
    lines.append(f"memory: {memory / 2**20:,.1f} MiB in {len(status['memory'])} pieces")
    dirty = status["dirty"]
    if dirty["tracked"] or dirty["logging"]:
        lines.append(
            f"dirty pages: {dirty['pages']:,}, {dirty['pages_per_s']:,.0f} a second"
            + (", logged for a migration" if dirty["logging"] else "")
        )
    faults = [f"{name} {count:,}" for name, count in status["faults"].items() if count]
    lines.append("faults: " + (", ".join(faults) or "none"))
    lines.extend(
        f"queue {queue['index']} is broken: {printable(queue['broken'])}"
        for queue in status["queues"]
        if queue["broken"] is not None
    )
    return lines


def printable(text: str) -> str:
    """Text that may come from a guest, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _text(latency: Latency) -> str:
    if not latency["count"]:
        return "no time measured"
    return f"{latency['p50_s'] * 1e6:,.0f} us (p50), {latency['p99_s'] * 1e6:,.0f} us (p99)"


def text_of(status: Status, sort: str = "index") -> str:
    """All of it as plain lines."""
    rows = [COLUMNS, *rows_of(status, sort)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(COLUMNS))]
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join([title_of(status), *(table if len(rows) > 1 else []), *lines_of(status)])


def explanation_text(found: Explanation) -> str:
    """An explanation as plain lines."""
    where = f"{found['address']:#x}+{found['length_bytes']:#x}"
    kind = "translated" if found["translated"] else "physical"
    lines = [f"{where} ({kind})", f"  read: {found['read']}", f"  write: {found['write']}"]
    if found["endpoint"] is not None:
        lines += _endpoint_lines(found["endpoint"])
    if found["pending"]:
        lines.append("  its translation is asked for, and not answered yet")
    for each in found["mapped"]:
        since = "" if each["since_s"] is None else f", for {each['since_s']:.3f} s"
        lines.append(
            f"  mapped: {each['address']:#x}+{each['length_bytes']:#x} -> {each['target']:#x} "
            f"{each['access'] or 'no access'}{since}"
        )
    if found["translated"] and not found["recorded_s"]:
        lines.append("  changes of translations are recorded from now on: ask again")
    lines += ["  what happened last:"] if found["last"] else ["  nothing is recorded about it"]
    for event in found["last"]:
        lines.append(
            f"    {event['time_s']:.6f} {event['what']} {event['address']:#x}"
            f"+{event['length_bytes']:#x} {event['access']} {_said(event)}"
        )
    return "\n".join(lines)


def _endpoint_lines(found: EndpointInfo) -> list[str]:
    """Where an endpoint of a virtio-iommu belongs."""
    if found["domain"] is not None:
        kind = "bypass domain" if found["bypass"] else "domain"
        others = ", ".join(map(str, found["others"]))
        where = f"attached to {kind} {found['domain']}" + (f", with {others}" if others else "")
    else:
        where = "attached to no domain" + (", and bypasses the IOMMU" if found["bypass"] else "")
    lines = [f"  endpoint {found['number']}: {where}"]
    lines += [
        f"  reserved: {each['address']:#x}+{each['length_bytes']:#x}, subtype {each['subtype']}"
        for each in found["reserved"]
    ]
    lines += [
        f"  held by {'a broken' if each['broken'] else 'a'} session: {each['address']:#x}"
        f"+{each['length_bytes']:#x}"
        for each in found["held"]
    ]
    return lines


def _said(event: Recorded) -> str:
    """What an event says besides where it was."""
    match event["what"]:
        case "domain_map":
            return f"-> {event['detail']:#x} in domain {event['result']}"
        case "domain_unmap":
            return f"of {event['detail']} mappings in domain {event['result']}"
        case "attached":
            domain = "no domain" if event["result"] < 0 else f"domain {event['result']}"
            return f"endpoint {event['detail']} to {domain}"
        case "fault":
            return f"of endpoint {event['result']}, reason {event['detail']}"
        case _:
            return f"detail {event['detail']:#x}"
