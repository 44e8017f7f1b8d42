"""The catalogue: what a check is, and how it is found by name.

A check is a function of a :class:`~guestio.faults.trial.Trial`; the modules of
:mod:`guestio.faults.checks` register theirs with :func:`register` when they are imported.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from guestio.faults.report import Severity

if TYPE_CHECKING:
    from guestio.faults.trial import Trial

_T = TypeVar("_T")


def virtio(section: str, in_1_3: str | None = None) -> str:
    """Name a section of the virtio specification.

    Args:
        section: Its number in version 1.4.
        in_1_3: Its number in version 1.3, if that is another one.
    """
    if in_1_3 is None or in_1_3 == section:
        return f"virtio 1.4 and 1.3 section {section}"
    return f"virtio 1.4 section {section}, 1.3 section {in_1_3}"


def user(title: str) -> str:
    """Name a message or a section of the vhost-user specification."""
    return f"vhost-user {title}"


@dataclass(frozen=True, slots=True)
class Check:
    """One demand of a specification, and how it is examined.

    Attributes:
        id: Its name: an area, a dot, and what it is about.
        source: Where the specification says so.
        text: What it demands, in our words.
        severity: How strongly.
        devices: The device types that it applies to; empty for all.
        hostile: Whether it breaks a rule of the front-end or the driver on purpose; the back-end
            may then close the connection.
        body: The examination.
    """

    id: str
    source: str
    text: str
    severity: Severity
    devices: frozenset[str]
    hostile: bool
    body: Callable[..., None]

    def applies_to(self, device: str) -> bool:
        """Whether it is for this type of device."""
        return not self.devices or device in self.devices


class Registry(Generic[_T]):
    """The checks of one kind of peer, in the order in which they were registered.

    Its type parameter is what a check works with.
    """

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}

    def __iter__(self) -> Iterator[Check]:
        return iter(self._checks.values())

    def register(
        self,
        name: str,
        source: str,
        text: str,
        *,
        severity: Severity = Severity.MUST,
        devices: Sequence[str] = (),
        hostile: bool = False,
    ) -> Callable[[Callable[[_T], None]], Callable[[_T], None]]:
        """Put a function into the catalogue; see :class:`Check` for the arguments.

        The function returns for PASS, and raises one of the errors of
        :mod:`guestio.faults.outcomes` for any other verdict.

        Raises:
            ValueError: There is a check of that name already.
        """

        def add(body: Callable[[_T], None]) -> Callable[[_T], None]:
            if name in self._checks:
                raise ValueError(f"there is a check {name} already")
            self._checks[name] = Check(
                name, source, text, severity, frozenset(devices), hostile, body
            )
            return body

        return add

    def hostile(
        self, name: str, source: str, text: str, *, devices: Sequence[str] = ()
    ) -> Callable[[Callable[[_T], None]], Callable[[_T], None]]:
        """Like :meth:`register`, for a check that breaks a rule on purpose."""
        return self.register(
            name, source, text, severity=Severity.SAFETY, devices=devices, hostile=True
        )


BACK_ENDS: Final[Registry[Trial]] = Registry()
"""The checks of vhost-user back-ends."""
register = BACK_ENDS.register
hostile = BACK_ENDS.hostile


def catalogue(device: str | None = None) -> tuple[Check, ...]:
    """Every check, or those that apply to a type of device, in the order in which they run."""
    import guestio.faults.checks  # noqa: F401 - importing them registers them

    return tuple(each for each in BACK_ENDS if device is None or each.applies_to(device))


class Named(Protocol):
    """What has a name of an area, a dot, and what it is about."""

    @property
    def id(self) -> str:
        """The name."""
        ...


_N = TypeVar("_N", bound=Named)


def select(checks: Iterable[_N], patterns: Sequence[str]) -> list[_N]:
    """The checks whose names match one of the patterns (as file names do), all without patterns.

    A pattern without a wildcard also names an area: ``ring`` is ``ring.*``.

    Raises:
        ValueError: A pattern matches none of them.
    """
    available = list(checks)
    if not patterns:
        return available
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {
            each.id
            for each in available
            if fnmatch.fnmatchcase(each.id, pattern) or each.id.startswith(f"{pattern}.")
        }
        if not matched:
            raise ValueError(f"no check matches {pattern!r}; --list shows their names")
        chosen |= matched
    return [each for each in available if each.id in chosen]
