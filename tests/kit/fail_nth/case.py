"""Which call fails, and how."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from tests.kit.fail_nth.shim import SIGTERM


@dataclass(frozen=True)
class Case:
    """The nth call of a function fails with an error.

    Attributes:
        function: Its name in the shim.
        nth: Which call, from 1.
        error: Number of the error.
    """

    function: str
    nth: int
    error: int

    def __str__(self) -> str:
        name = "SIGTERM" if self.error == SIGTERM else errno.errorcode[self.error]
        return f"{self.function} {self.nth} {name}"
