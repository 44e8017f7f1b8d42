"""Misbehaviour on command, and a catalogue of what a back-end must do.

:func:`check` runs the catalogue against any vhost-user back-end, without a VM, and returns a
:class:`Report`; :func:`catalogue` lists the checks.
"""

from guestio.faults.catalogue import Check, catalogue
from guestio.faults.kinds import KINDS, Kind
from guestio.faults.report import Report, Result, Severity, Verdict
from guestio.faults.runner import check

__all__ = [
    "KINDS",
    "Check",
    "Kind",
    "Report",
    "Result",
    "Severity",
    "Verdict",
    "catalogue",
    "check",
]
