"""What QEMU's own trace says that it and a vhost-user back-end told each other of translations."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

EVENTS = ("vhost_iotlb_miss", "vhost_dev_start", "vhost_user_write", "virtio_iommu_report_fault")
"""What is traced: QEMU's option ``-trace`` for each, and ``-D`` for the file."""

IOTLB_MSG = 22
"""The request that carries updates and invalidations (VHOST_USER_IOTLB_MSG)."""


class QemuCounts(NamedTuple):
    """Of one vhost-user device, from its beginning to its end.

    Attributes:
        misses: Translations that the back-end asked for.
        untranslated: Those of them for which there was none.
        pushed: Translations that QEMU looked up without being asked: of used rings, at each start.
        updates: Translations that it told the back-end.
        invalidations: Translations that it revoked.
        faults: Accesses that the virtio-iommu reported to the guest, of any device.
    """

    misses: int
    untranslated: int
    pushed: int
    updates: int
    invalidations: int
    faults: int


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
    under_way: list[tuple[bool, bool]] = []
    """Of each lookup: whether it was asked for, and whether its update was written."""
    to_push: Counter[str] = Counter()
    """Used rings that a thread is still to look up."""
    lines = re.findall(r"^(\d+)@[\d.]+:(\w+) (.*)$", trace.read_text(), re.MULTILINE)
    for thread, event, rest in lines:
        if event == "vhost_dev_start":
            to_push[thread] = queues
        elif event == "virtio_iommu_report_fault":
            found["faults"] += 1
        elif event == "vhost_user_write" and rest.startswith(f"req:{IOTLB_MSG} "):
            if under_way and not under_way[-1][1]:
                under_way[-1] = under_way[-1][0], True
                found["updates"] += 1
            else:
                found["invalidations"] += 1
        elif event == "vhost_iotlb_miss" and rest.endswith("step 1"):
            asked = bool(under_way) or not to_push[thread]
            to_push[thread] -= not asked
            found["misses" if asked else "pushed"] += 1
            under_way.append((asked, False))
        elif event == "vhost_iotlb_miss":
            asked, told = under_way.pop()
            found["untranslated"] += asked and not told
            if start_fails and not asked and not told:
                to_push[thread] = 0
    assert not under_way, "a lookup has no end"
    return QemuCounts(*(found[name] for name in QemuCounts._fields))
