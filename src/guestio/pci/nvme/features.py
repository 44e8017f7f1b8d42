"""Features that a driver gets and sets (NVMe 1.4, section 5.21.1)."""

from __future__ import annotations

import time
from typing import Final

from guestio.pci.nvme.identify import TEMPERATURE, TEMPERATURE_WARNING
from guestio.pci.nvme.spec import Failed, Feature, Status

_CHANGEABLE: Final = 1 << 2
_TIMESTAMP_SET: Final = 1 << 1


class Features:
    """The values of a controller's features; a reset sets them to their defaults.

    Args:
        queues: I/O queues of each kind.
        vectors: Interrupt vectors.
    """

    def __init__(self, queues: int, vectors: int) -> None:
        self._queues, self._vectors = queues, vectors
        self._clock: tuple[int, float] | None = None
        self.reset()

    def reset(self) -> None:
        """Set everything but the clock to its default."""
        self._values = self._defaults()

    def _defaults(self) -> dict[tuple[int, int], int]:
        number = self._queues - 1
        values = {
            (Feature.ARBITRATION, 0): 4,
            (Feature.POWER, 0): 0,
            # Threshold types: over (0) and under (1), of the composite temperature.
            (Feature.TEMPERATURE, 0): TEMPERATURE_WARNING,
            (Feature.TEMPERATURE, 1): 0,
            (Feature.ERROR_RECOVERY, 0): 0,
            (Feature.WRITE_CACHE, 0): 1,
            (Feature.QUEUES, 0): number | number << 16,
            (Feature.COALESCING, 0): 0,
            (Feature.ATOMICITY, 0): 0,
            (Feature.EVENTS, 0): 0,
        }
        # No coalescing for the vector of the admin queue, as the specification wants it.
        values |= {
            (Feature.VECTOR, vector): vector | (0 if vector else 1 << 16)
            for vector in range(self._vectors)
        }
        return {(int(feature), part): value for (feature, part), value in values.items()}

    @property
    def write_cache(self) -> bool:
        """Whether writes may be completed before they are on the disk."""
        return bool(self._values[Feature.WRITE_CACHE, 0])

    @property
    def events(self) -> int:
        """Which notices the driver wants."""
        return self._values[Feature.EVENTS, 0]

    @property
    def too_hot(self) -> bool:
        """Whether the temperature is outside the thresholds."""
        over, under = (self._values[Feature.TEMPERATURE, kind] for kind in (0, 1))
        return over <= TEMPERATURE or under >= TEMPERATURE

    def get(self, feature: int, select: int, word: int) -> int:
        """Dword 0 of the answer.

        Args:
            feature: Which one.
            select: 0 the current value, 1 the default, 2 the saved one, 3 what it is capable of.
            word: Dword 11 of the command.

        Raises:
            Failed: There is no such feature.
        """
        if select > 3:
            raise Failed(Status.INVALID_FIELD, 41)
        if feature == Feature.TIMESTAMP:
            return _CHANGEABLE if select == 3 else 0
        part = self._part(feature, word)
        if select == 3:
            return _CHANGEABLE
        return (self._defaults() if select else self._values)[feature, part]

    def _part(self, feature: int, word: int) -> int:
        """Which value of a feature that has several."""
        part = 0
        if feature == Feature.VECTOR:
            part = word & 0xFFFF
        elif feature == Feature.TEMPERATURE:
            if word >> 16 & 0xF:
                raise Failed(Status.INVALID_FIELD, 44)  # of a sensor: there is none
            part = word >> 20 & 3
        if (feature, part) not in self._values:
            known = any(each == feature for each, _ in self._values)
            raise Failed(Status.INVALID_FIELD, 44 if known else 40)
        return part

    def set(self, feature: int, word: int) -> int:
        """Set a feature to dword 11 of the command; dword 0 of the answer.

        Raises:
            Failed: There is no such feature or value.
        """
        part = self._part(feature, word)
        if feature == Feature.QUEUES:
            if word & 0xFFFF == 0xFFFF or word >> 16 == 0xFFFF:
                raise Failed(Status.INVALID_FIELD, 44)
            # As many as there are, whatever was asked for.
            return self._values[feature, 0]
        if feature == Feature.POWER and word & 0x1F:
            raise Failed(Status.INVALID_FIELD, 44)
        if feature == Feature.TEMPERATURE:
            word &= 0xFFFF
        elif feature in (Feature.WRITE_CACHE, Feature.ATOMICITY):
            word &= 1
        self._values[feature, part] = word
        return 0

    def set_clock(self, data: bytes) -> None:
        """Set the timestamp: milliseconds since 1970, 48 bits."""
        self._clock = int.from_bytes(data[:6], "little"), time.monotonic()

    def clock(self) -> bytes:
        """The timestamp, 8 bytes: of the driver, or milliseconds since the controller began."""
        start, origin = (0, _BEGAN) if self._clock is None else self._clock
        now = start + int((time.monotonic() - origin) * 1000)
        attributes = 0 if self._clock is None else _TIMESTAMP_SET
        return (now % 2**48).to_bytes(6, "little") + bytes([attributes, 0])


_BEGAN: Final = time.monotonic()
