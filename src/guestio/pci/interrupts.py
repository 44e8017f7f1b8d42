"""Where an interrupt of a PCI function goes, and which are waiting until they may go anywhere.

Besides, a function tells its client of errors, and that it is to be let go of: ERR and REQ, which
are no interrupts of the driver's.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from typing import Final, Protocol


class InterruptKind(enum.IntEnum):
    """Ways of an interrupt to the driver; the values are VFIO's indices (linux/vfio.h)."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


NOTICES: Final = (InterruptKind.ERR, InterruptKind.REQ)
"""What is told to the client, whatever the driver has set up: not masked, and one of each kind."""


class Trigger(Protocol):
    """Something that makes an interrupt, an eventfd."""

    def fileno(self) -> int:
        """The eventfd, open until :meth:`close`."""
        ...

    def notify(self) -> None:
        """Make it. From any thread; never waits."""
        ...

    def close(self) -> None:
        """Let go of it. Called once."""
        ...


class Interrupts:
    """The interrupt vectors of a function.

    An interrupt that cannot be delivered now (its vector has no trigger, is masked, or the function
    may not write to memory) is pending, and is delivered once it can be. A client that enables
    more vectors takes all triggers away for a moment. So is a notice (ERR, REQ) that has no
    trigger yet.

    Args:
        counts: Vectors of each kind of interrupt; there is one notice of each kind in any case.

    Attributes:
        counts: As given, and of notices.
        delivered: Interrupts delivered, but for those that a device has the core signal by itself
            (:meth:`direct`).
        changed: Called when :meth:`direct` may say something else now.

    Threads: :meth:`raise_interrupt` may be called from any; the rest is for the loop's. Triggers
    are notified under a lock, so that none is closed meanwhile; that never waits.
    """

    def __init__(self, counts: dict[InterruptKind, int]) -> None:
        self.counts = counts | dict.fromkeys(NOTICES, 1)
        self.delivered = 0
        self.changed: Callable[[], object] = _do_nothing
        self._lock = threading.Lock()
        self._triggers: dict[InterruptKind, dict[int, Trigger]] = {kind: {} for kind in self.counts}
        self._masked: dict[InterruptKind, set[int]] = {kind: set() for kind in counts}
        self._pending: set[int] = set()
        self._notices: set[InterruptKind] = set()
        self._messages_allowed = False
        self._pin_allowed = True
        self._pin_asserted = False

    @property
    def vectors(self) -> int:
        """Vectors that the device has."""
        return max((count for kind, count in self.counts.items() if kind not in NOTICES), default=0)

    def raise_interrupt(self, vector: int) -> None:
        """Have a vector's interrupt delivered, now or once it can be."""
        with self._lock:
            self._pending.add(vector)
            self._deliver()

    def notify(self, kind: InterruptKind) -> bool:
        """Give the client a notice, ERR or REQ; whether it has one, or will once it listens."""
        with self._lock:
            self._notices.add(kind)
            self._notify()
            return kind not in self._notices

    def set_pin(self, asserted: bool) -> None:
        """Assert the pin until it is deasserted: it interrupts again each time it is unmasked."""
        with self._lock:
            self._pin_asserted = asserted
            self._deliver()

    def allow(self, *, messages: bool, pin: bool) -> None:
        """Say whether the function may send messages (it is bus master) and use its pin."""
        with self._lock:
            self._messages_allowed, self._pin_allowed = messages, pin
            self._deliver()
        self.changed()

    def direct(self, vector: int) -> Trigger | None:
        """Where an interrupt of MSI-X goes at this moment, with nothing in between; or None.

        It may be signalled instead of calling :meth:`raise_interrupt`, until :attr:`changed` is
        called.
        """
        kind = InterruptKind.MSIX
        with self._lock:
            if not self._messages_allowed or vector in self._masked.get(kind, ()):
                return None
            return self._triggers.get(kind, {}).get(vector)

    def set_trigger(self, kind: InterruptKind, vector: int, trigger: Trigger | None) -> None:
        """Have a vector's interrupts go to ``trigger``, which belongs to this from here on."""
        with self._lock:
            old = self._triggers[kind].pop(vector, None)
            if trigger is not None:
                self._triggers[kind][vector] = trigger
            self._deliver()
            self._notify()
        self.changed()
        if old is not None:
            old.close()

    def disable(self, kind: InterruptKind) -> None:
        """Take all triggers of a kind away."""
        with self._lock:
            gone, self._triggers[kind] = list(self._triggers[kind].values()), {}
            if kind in self._masked:
                self._masked[kind].clear()
        self.changed()
        for trigger in gone:
            trigger.close()

    def trigger(self, kind: InterruptKind, vector: int) -> None:
        """Make an interrupt of a kind, whichever the device would use: the client asks for it."""
        with self._lock:
            present = self._triggers[kind].get(vector)
            if present is not None:
                present.notify()

    def mask(self, kind: InterruptKind, vector: int) -> None:
        """Keep a vector's interrupts pending."""
        with self._lock:
            self._masked[kind].add(vector)
        self.changed()

    def unmask(self, kind: InterruptKind, vector: int) -> None:
        """Deliver a vector's interrupts again; the pending one at once."""
        with self._lock:
            self._masked[kind].discard(vector)
            self._deliver()
        self.changed()

    def forget_pending(self) -> None:
        """Forget what has not been delivered, as a reset does; a request to let go (REQ) stays."""
        with self._lock:
            self._pending.clear()
            self._notices.discard(InterruptKind.ERR)
            self._pin_asserted = False
            for masked in self._masked.values():
                masked.clear()

    def close(self) -> None:
        """Take all triggers away, and forget what is pending."""
        for kind in self.counts:
            self.disable(kind)
        self.forget_pending()
        with self._lock:
            self._notices.clear()

    def pending_bits(self) -> bytes:
        """The pending bits of MSI-X: 64 vectors to 8 bytes."""
        with self._lock:
            bits = sum(1 << vector for vector in self._pending)
        return bits.to_bytes((self.vectors + 63) // 64 * 8, "little")

    def _deliver(self) -> None:
        """Deliver what is pending and can be. Needs the lock."""
        if not self._pending and not self._pin_asserted:
            return
        # The kind that the driver has set up; a driver uses one at a time.
        for kind in (InterruptKind.MSIX, InterruptKind.MSI):
            triggers = self._triggers.get(kind)
            if not triggers:
                continue
            if self._messages_allowed:
                self._send(kind, triggers)
            return
        pins = self._triggers.get(InterruptKind.INTX)
        if pins and self._pin_allowed and 0 not in self._masked[InterruptKind.INTX]:
            self._pending.clear()
            # The client says when it was handled.
            self._masked[InterruptKind.INTX].add(0)
            pins[0].notify()
            self.delivered += 1

    def _notify(self) -> None:
        """Give the notices that can be given. Needs the lock."""
        for kind in list(self._notices):
            trigger = self._triggers[kind].get(0)
            if trigger is not None:
                self._notices.discard(kind)
                trigger.notify()

    def _send(self, kind: InterruptKind, triggers: dict[int, Trigger]) -> None:
        for vector in list(self._pending):
            # A driver may have fewer messages than the device has vectors: MSI lets them be shared.
            number = vector % len(triggers) if kind == InterruptKind.MSI else vector
            trigger = triggers.get(number)
            if trigger is not None and number not in self._masked[kind]:
                self._pending.discard(vector)
                trigger.notify()
                self.delivered += 1


def _do_nothing() -> None:
    """What is called if there is nothing else."""
