"""Runs the catalogue for virtio-iommu devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from guestio.faults.catalogue import select
from guestio.faults.report import Report, Result, Severity
from guestio.faults.runner import PATIENCE, START, Examination, Examined, as_strong
from guestio.faults.virtio_iommu.catalogue import iommu_catalogue
from guestio.faults.virtio_iommu.driver import Carrier
from guestio.faults.virtio_iommu.ports import LocalCarrier, VhostUserCarrier
from guestio.faults.virtio_iommu.qtest import QemuTarget
from guestio.faults.virtio_iommu.trial import IommuTrial
from guestio.virtio.iommu import VirtioIommu


def check_iommu(
    target: VirtioIommu | str | os.PathLike[str] | None = None,
    *,
    qemu: str | os.PathLike[str] | None = None,
    only: Sequence[str] = (),
    severity: Severity | str = Severity.SHOULD,
    seed: int = 0,
    patience: float = PATIENCE,
    recovery: float = START,
    progress: Callable[[Result], None] | None = None,
) -> Report:
    """Run the catalogue against a virtio-iommu, without a VM.

    Each check sets the device up after a reset; what it attached is detached at its end. After
    each an honest driver must be served within ``patience``; else the verdict is WEDGED, or CRASH
    if the device is gone.

    Args:
        target: A device of this process, which must have two endpoints or more, or the socket of
            a vhost-user back-end; what endpoints reach is not checked behind a socket. Endpoints
            there are looked for among the numbers up to 63.
        qemu: Instead, the program of a QEMU, 7.2 or newer, whose own device is checked: it is
            started with two ``edu`` devices, driven by qtest, and started again when it has ended.
        only: Names of checks, with wildcards as for files, or of areas; all if there are none.
        severity: The weakest kind of check to run, as for :func:`guestio.faults.check`.
        seed: Of everything random.
        patience: Seconds that an answer may take.
        recovery: Seconds that the device may take until it serves again after it was wedged.
        progress: Called with each result.

    Raises:
        ValueError: There is no such check, the device has fewer than two endpoints, or not exactly
            one of ``target`` and ``qemu`` is given.
        DeviceError: QEMU cannot be started, or no honest driver is served before anything else was
            done.
    """
    if (target is None) == (qemu is None):
        raise ValueError("say either a target or qemu")
    examined: Examined
    if qemu is not None:
        examined = QemuTarget(os.fspath(qemu), patience)
    elif isinstance(target, VirtioIommu):
        if len(target.endpoint_ids) < 2:
            raise ValueError(f"the device has {len(target.endpoint_ids)} endpoints; two are needed")
        examined = _Reached(repr(type(target).__name__), lambda _: LocalCarrier(target))
    else:
        assert target is not None
        path = os.fspath(target)
        examined = _Reached(path, lambda patience: VhostUserCarrier(path, patience))
    chosen = as_strong(select(iommu_catalogue(), only), Severity(severity))
    report = Report(examined.path, "iommu", seed)
    try:
        run = _Iommus(examined, seed, patience, recovery)
        report.results += run.run(chosen, progress)
    finally:
        examined.close()
    return report


class _Reached:
    """A device that something else started."""

    replaceable = False

    def __init__(self, path: str, connect: Callable[[float], Carrier]) -> None:
        self.path = path
        self.connect = connect

    def start(self) -> None:
        """It runs."""

    def take_death(self) -> str | None:
        """Its process is not known."""
        return None

    def ended(self, seconds: float) -> bool:
        """Its process is not known."""
        return True

    def close(self) -> None:
        """It is not ours to end."""


class _Iommus(Examination):
    """See :func:`check_iommu` for the arguments."""

    def __init__(self, target: Examined, seed: int, patience: float, recovery: float) -> None:
        super().__init__(target, patience, recovery)
        self._connect: Callable[[float], Carrier] = target.connect
        self._seed = seed
        self._known: list[int] = []

    def _trial(self, name: str) -> IommuTrial:
        return IommuTrial(
            self._connect,
            patience=self._patience,
            seed=f"{self._seed}:{name}",
            known=self._known,
        )
