"""Misbehavior on command, and a catalogue of what a back-end must do.

:class:`Misbehaving` is any virtio device, wrong where rules say so (:func:`parse`), and
:class:`MisbehavingPci` any PCI function; a :class:`Faults` switches rules at run time.

:func:`check_front_end` turns that round: it listens as a back-end, and judges the front-end that
connects, and its driver, by what they do; :func:`demands` lists what it looks at.

:func:`check` runs the catalogue against any vhost-user back-end, without a VM, and returns a
:class:`Report`; :func:`catalogue` lists the checks.
"""

from guestio.faults.catalogue import Check, catalogue
from guestio.faults.frontend.demands import Demand, demands
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

__all__ = [
    "ALWAYS",
    "KINDS",
    "MISBEHAVIORS",
    "SELECTORS",
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
    "demands",
    "parse",
    "reference",
]
