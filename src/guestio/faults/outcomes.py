"""How a check ends if it does not return: one exception for each verdict but PASS."""

from __future__ import annotations


class OutcomeError(Exception):
    """Ends a check with a verdict; the message is the reason. No caller of ours sees it."""


class FailError(OutcomeError):
    """FAIL: the back-end broke a rule."""


class RejectError(OutcomeError):
    """REJECT: the back-end refused what it may refuse."""


class SkipError(OutcomeError):
    """SKIP: the check does not apply."""


class HungUpError(OutcomeError):
    """The back-end closed the connection: REJECT in a check that broke a rule, FAIL in others."""


class SilentError(OutcomeError):
    """The back-end did not answer in time: FAIL."""


class AbsentError(OutcomeError):
    """Nothing listens on the socket."""
