"""Misbehavior on command, and a catalogue of what a back-end must do.

:class:`Misbehaving` is any virtio device, wrong where rules say so (:func:`parse`), and
:class:`MisbehavingPci` any PCI function; a :class:`Faults` switches rules at run time.

:func:`check` runs the catalogue against any vhost-user back-end, without a VM, and returns a
:class:`Report`; :func:`catalogue` lists the checks.

:func:`check_server` does the same for vfio-user servers, with the checks of
:func:`server_catalogue`.

:func:`check_iommu` does it for virtio-iommu devices: one of this process, a back-end's, or QEMU's.

:func:`check_front_end` turns that round: it listens as a back-end, and judges the front-end that
connects, and its driver, by what they do; :func:`demands` lists what it looks at.
"""

from guestio.faults.catalogue import Check, catalogue
from guestio.faults.frontend.demands import Demand, demands
from guestio.faults.frontend.devices import DEVICES as JUDGED_DEVICES
from guestio.faults.frontend.runner import JudgedRun, check_front_end
from guestio.faults.kinds import KINDS, Kind
from guestio.faults.misbehavior.device import Misbehaving
from guestio.faults.misbehavior.force import FaultCounts, Faults
from guestio.faults.misbehavior.pci import MisbehavingPci
from guestio.faults.misbehavior.rules import (
    ALWAYS,
    MISBEHAVIORS,
    SELECTORS,
    Level,
    Misbehavior,
    Rule,
    parse,
    reference,
)
from guestio.faults.report import Report, Result, Severity, Verdict
from guestio.faults.runner import check
from guestio.faults.vfio_user.catalogue import DEVICES as SERVED_DEVICES
from guestio.faults.vfio_user.catalogue import server_catalogue
from guestio.faults.vfio_user.runner import check_server
from guestio.faults.virtio_iommu.catalogue import iommu_catalogue
from guestio.faults.virtio_iommu.runner import check_iommu

__all__ = [
    "ALWAYS",
    "JUDGED_DEVICES",
    "KINDS",
    "MISBEHAVIORS",
    "SELECTORS",
    "SERVED_DEVICES",
    "Check",
    "Demand",
    "FaultCounts",
    "Faults",
    "JudgedRun",
    "Kind",
    "Level",
    "Misbehaving",
    "MisbehavingPci",
    "Misbehavior",
    "Report",
    "Result",
    "Rule",
    "Severity",
    "Verdict",
    "catalogue",
    "check",
    "check_front_end",
    "check_iommu",
    "check_server",
    "demands",
    "iommu_catalogue",
    "parse",
    "reference",
    "server_catalogue",
]
