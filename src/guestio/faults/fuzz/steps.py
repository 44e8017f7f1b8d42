"""What a case of the fuzzer is made of: steps, which are plain data, and how they are written.

A step says all that is to be done in numbers and bytes; nothing random is left for when it is
played. So a case is reproduced by its file, and made smaller by leaving steps out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from guestio.errors import GuestioError
from guestio.vhost_user.messages import FrontendRequest, request_name

FORMAT: Final = 1
"""Of what seeds mean and of files of cases: another one makes other steps from the same seed."""


class CaseError(GuestioError, ValueError):
    """A file holds no case that can be played."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that is done to a peer.

    Attributes:
        name: What is done: a method of :class:`~guestio.faults.fuzz.player.Player`.
        arguments: With what; JSON values, bytes as hexadecimal digits.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What kind of step it is, for signatures: without numbers."""
        if self.name == "message":
            code = int(self.arguments["code"])
            known = code in FrontendRequest.__members__.values()
            return f"message {request_name(code) if known else 'unknown'}"
        if self.name == "check":
            return f"check {self.arguments['check']}"
        if self.name == "rule":
            return f"rule {re.split('[= ]', str(self.arguments['rule']))[0]}"
        return self.name

    def __str__(self) -> str:
        words = " ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.name} {words}".strip()


@dataclass(frozen=True, slots=True)
class Case:
    """What is done to a back-end, from its first connection to its last.

    Attributes:
        device: Type of the device.
        seed: What it was made from.
        steps: In order.
    """

    device: str
    seed: int
    steps: tuple[Step, ...]

    def but(self, steps: Sequence[Step]) -> Case:
        """The same case with other steps."""
        return Case(self.device, self.seed, tuple(steps))

    def to_data(self) -> dict[str, Any]:
        """What a file holds of it."""
        return {
            "device": self.device,
            "seed": self.seed,
            "steps": [[each.name, each.arguments] for each in self.steps],
        }

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """Read what :meth:`to_data` has made.

        Raises:
            CaseError: It is something else.
        """
        try:
            steps = tuple(Step(str(name), dict(arguments)) for name, arguments in data["steps"])
            return cls(str(data["device"]), int(data["seed"]), steps)
        except (KeyError, TypeError, ValueError) as error:
            raise CaseError(f"no case of guestio fuzz: {error!r} in {_shown(data)}") from None


def _shown(data: Any) -> str:
    return json.dumps(data, default=repr)[:60]
