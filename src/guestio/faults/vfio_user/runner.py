"""Runs the catalogue for vfio-user servers."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence

from guestio.faults.catalogue import select
from guestio.faults.report import Report, Result, Severity
from guestio.faults.runner import PATIENCE, START, Examination, Target, as_strong
from guestio.faults.vfio_user.catalogue import DEVICES, server_catalogue
from guestio.faults.vfio_user.link import VfioLink
from guestio.faults.vfio_user.trial import VfioTrial


def check_server(
    path: str | os.PathLike[str],
    device: str = "any",
    *,
    only: Sequence[str] = (),
    severity: Severity | str = Severity.SHOULD,
    seed: int = 0,
    patience: float = PATIENCE,
    command: Sequence[str] | str | None = None,
    recovery: float = START,
    progress: Callable[[Result], None] | None = None,
) -> Report:
    """Run the catalogue against a vfio-user server, without a VM.

    Each check has connections of its own. After each the next client must be served within
    ``patience``; else the verdict is WEDGED, or CRASH if the server is gone. The device is reset,
    its configuration space, interrupts and mappings are changed; of an NVMe controller Identify is
    the only command that is meant, and a disk is not written on purpose, but `nvme.noise` sends
    random commands to the admin queue.

    Args:
        path: The socket on which the server listens.
        device: Type of its device: ``nvme``, ``virtio``, or ``any`` for what all PCI devices have
            in common.
        only: Names of checks, with wildcards as for files, or of areas; all if there are none.
        severity: The weakest kind of check to run, as for :func:`guestio.faults.check`.
        seed: Of everything random.
        patience: Seconds that an answer may take.
        command: Starts the server, before the first check and whenever it has ended.
        recovery: Seconds that the server may take until it serves for the first time, and again
            after it was wedged or started anew.
        progress: Called with each result.

    Raises:
        ValueError: There is no such device type, or no such check.
        DeviceError: The server cannot be started, or serves no client before anything else was
            done to it.
    """
    if device not in DEVICES:
        raise ValueError(f"there is no device type {device!r}; say one of {', '.join(DEVICES)}")
    chosen = as_strong(select(server_catalogue(device), only), Severity(severity))
    words = shlex.split(command) if isinstance(command, str) else command
    report = Report(os.fspath(path), device, seed)
    target = Target(report.target, words, VfioLink)
    try:
        run = _Servers(target, device, seed, patience, recovery)
        report.results += run.run(chosen, progress)
    finally:
        target.close()
    return report


class _Servers(Examination):
    """See :func:`check_server` for the arguments."""

    def __init__(
        self,
        target: Target[VfioLink],
        device: str,
        seed: int,
        patience: float,
        recovery: float,
    ) -> None:
        super().__init__(target, patience, recovery)
        self._connect = target.connect
        self._device = device
        self._seed = seed

    def _trial(self, name: str) -> VfioTrial:
        return VfioTrial(
            self._connect, self._device, patience=self._patience, seed=f"{self._seed}:{name}"
        )
