"""Structured, stateful, coverage-blind fuzzing of a running peer, without a virtual machine.

:func:`make_case` makes steps of a seed, :class:`Bench` plays them to a back-end and judges it, and
a :class:`Campaign` has many played by many workers.
"""

from guestio.faults.fuzz.bench import Bench, Work, parse_command
from guestio.faults.fuzz.campaign import (
    Campaign,
    Finding,
    cluster_workers,
    local_workers,
    read_json,
    reproduce,
)
from guestio.faults.fuzz.generate import make_case
from guestio.faults.fuzz.guests import BAD, SERVED, GuestBench, Guests
from guestio.faults.fuzz.outcomes import Outcome, Verdict
from guestio.faults.fuzz.steps import FORMAT, Case, CaseError, Step

__all__ = [
    "BAD",
    "FORMAT",
    "SERVED",
    "Bench",
    "Campaign",
    "Case",
    "CaseError",
    "Finding",
    "GuestBench",
    "Guests",
    "Outcome",
    "Step",
    "Verdict",
    "Work",
    "cluster_workers",
    "local_workers",
    "make_case",
    "parse_command",
    "read_json",
    "reproduce",
]
