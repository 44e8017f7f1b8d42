"""What QEMU's own trace says that it and a vhost-user back-end told each other of translations."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

EVENTS = (
    *("vhost_iotlb_miss", "vhost_dev_start", "vhost_dev_start_in", "vhost_user_write"),
    *("virtio_iommu_translate", "virtio_iommu_report_fault"),
)
"""What is traced; QEMU calls the start of a device one or the other."""


def trace_arguments(trace: Path) -> list[str]:
    """QEMU's arguments for a trace in a file, whose lines name their threads where it does that."""
    chosen = [word for event in EVENTS for word in ("-trace", event)]
    return ["-D", str(trace), "-msg", "timestamp=on", *chosen]


IOTLB_MSG = 22
"""The request that carries updates and invalidations (VHOST_USER_IOTLB_MSG)."""


class QemuCounts(NamedTuple):
    """Of one vhost-user device, from its beginning to its end.

    Attributes:
        misses: Translations that the back-end asked for.
        untranslated: Those of them for which there was none, nor had ever been.
        too_late: Those of them for which there was none any more: the back-end asked once more,
            since the answer was long in coming, and the guest had revoked it meanwhile.
        pushed: Translations that QEMU looked up without being asked: of used rings, at each start.
        updates: Translations that it told the back-end.
        invalidations: Translations that it revoked.
        faults: Accesses that the virtio-iommu reported to the guest, of any device.
    """

    misses: int
    untranslated: int
    too_late: int
    pushed: int
    updates: int
    invalidations: int
    faults: int


@dataclass
class _Lookup:
    """A translation that is being looked up."""

    asked: bool
    page: int | None = None
    told: bool = False


def qemu_counts(trace: Path, queues: int, *, start_fails: bool) -> QemuCounts:
    """Count what a trace has of the only vhost-user device.

    QEMU looks a translation up between the steps 1 and 2 of `vhost_iotlb_miss`, and writes an
    update in between if there is one; whatever else it writes of this kind revokes. While it waits
    for the answer to a message, QEMU 7.2 handles further misses: lookups nest.

    Args:
        trace: The file.
        queues: Queues of the device.
        start_fails: Whether a device does not start if a used ring has no translation, as with
            QEMU 9 and newer.
    """
    found: Counter[str] = Counter()
    under_way: list[_Lookup] = []
    to_push: Counter[str] = Counter()
    """Used rings that a thread is still to look up."""
    translated: set[int | None] = set()
    pattern = r"^(?:(\d+)@\S+?:|\S+Z )?(vhost_\w+|virtio_iommu_\w+) (.*)$"
    for thread, event, rest in re.findall(pattern, trace.read_text(), re.MULTILINE):
        if event in ("vhost_dev_start", "vhost_dev_start_in"):
            to_push[thread] = queues
        elif event == "virtio_iommu_report_fault":
            found["faults"] += 1
        elif event == "virtio_iommu_translate":
            if under_way and under_way[-1].page is None:
                address = re.search(r"addr=(0x[0-9a-f]+)", rest)
                assert address is not None, rest
                under_way[-1].page = int(address[1], 16) & ~4095
        elif event == "vhost_user_write" and rest.startswith(f"req:{IOTLB_MSG} "):
            if under_way and not under_way[-1].told:
                under_way[-1].told = True
                found["updates"] += 1
            else:
                found["invalidations"] += 1
        elif event == "vhost_iotlb_miss" and rest.endswith("step 1"):
            asked = bool(under_way) or not to_push[thread]
            to_push[thread] -= not asked
            found["misses" if asked else "pushed"] += 1
            under_way.append(_Lookup(asked))
        elif event == "vhost_iotlb_miss":
            over = under_way.pop()
            if over.told:
                translated.add(over.page)
            elif over.asked:
                found["too_late" if over.page in translated else "untranslated"] += 1
            elif start_fails:
                to_push[thread] = 0
    assert not under_way, "a lookup has no end"
    return QemuCounts(*(found[name] for name in QemuCounts._fields))
