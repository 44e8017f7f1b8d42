"""Log pages (NVMe 1.4, section 5.14.1)."""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from guestio._core.nvme.queues import NvmeQueues
from guestio.pci.nvme.identify import ERROR_ENTRIES, TEMPERATURE
from guestio.pci.nvme.spec import Admin, Command, Failed, Io, Log, Status

_ERROR: Final = struct.Struct("<QHHHHQIBB2xQ24x")
_CHANGED: Final = 1024
_TOO_MANY_CHANGED: Final = b"\xff\xff\xff\xff"
_SUPPORTED: Final = 1
_CHANGES_BLOCKS: Final = 1 << 1
_CHANGES_CONTROLLER: Final = 1 << 4


@dataclass
class Counters:
    """What a controller has done, for its health log; over all drivers.

    Attributes:
        reads: Read commands that the controller served itself, past the core.
        writes: Write commands, the same.
        bytes_read: Their bytes.
        bytes_written: The same of writes.
        power_cycles: Drivers that came, or resets of the machine.
        unsafe_shutdowns: Ends of a life without a notification of shutdown.
        media_errors: Commands that failed because of the image.
        errors: Errors that were logged, ever.
        started: When, as `time.monotonic`.
        busy: Seconds spent on commands in threads.
    """

    reads: int = 0
    writes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    power_cycles: int = 1
    unsafe_shutdowns: int = 0
    media_errors: int = 0
    errors: int = 0
    started: float = field(default_factory=time.monotonic)
    busy: float = 0.0


class Logs:
    """The log pages of a controller.

    Args:
        queues: Count what they served.
    """

    def __init__(self, queues: NvmeQueues) -> None:
        self.counters = Counters()
        self.temperature_threshold_passed = False
        self._queues = queues
        self._errors: deque[bytes] = deque(maxlen=ERROR_ENTRIES)
        self._changed: set[int] = set()
        self._pages: dict[int, Callable[[], bytes]] = {
            Log.ERRORS: self._error_page,
            Log.HEALTH: self._health_page,
            Log.FIRMWARE: self._firmware_page,
            Log.CHANGED_NAMESPACES: self._changed_page,
            Log.EFFECTS: _effects_page,
        }

    def page(self, number: int, nsid: int) -> bytes:
        """A log page.

        Raises:
            Failed: There is none of this number, or not for the namespace.
        """
        make = self._pages.get(number)
        if make is None:
            raise Failed(Status.LOG_PAGE, 40)
        if number == Log.HEALTH and nsid not in (0, 0xFFFFFFFF):
            raise Failed(Status.INVALID_FIELD, 4)
        return make()

    def forget_changed(self) -> None:
        """The driver has read which namespaces changed."""
        self._changed.clear()

    def note_changed(self, nsid: int) -> None:
        """A namespace has another size."""
        self._changed.add(nsid)

    def note_error(self, command: Command | None, status: int, place: int | None = None) -> None:
        """Log an error, with the status that was posted.

        Args:
            command: The command, or None if it belongs to none.
            status: As in its completion, the advice not to try again included.
            place: The byte of the command that is wrong, or None.
        """
        self.counters.errors += 1
        lba = command.quad(10) if command is not None and command.queue else 0
        self._errors.appendleft(
            _ERROR.pack(
                self.counters.errors,
                0 if command is None else command.queue,
                0xFFFF if command is None else command.cid,
                status << 1,
                0xFFFF if place is None else place,
                lba,
                0 if command is None else command.nsid,
                *(0, 0, 0),  # vendor page, transport, command-specific information
            )
        )

    def _error_page(self) -> bytes:
        return b"".join(self._errors).ljust(ERROR_ENTRIES * _ERROR.size, b"\0")

    def _health_page(self) -> bytes:
        counters, queues = self.counters, self._queues
        data = bytearray(512)
        data[0] = 1 << 1 if self.temperature_threshold_passed else 0
        struct.pack_into("<HBBB", data, 1, TEMPERATURE, 100, 10, 0)
        units = [
            (counters.bytes_read + queues.bytes_read + 511999) // 512000,
            (counters.bytes_written + queues.bytes_written + 511999) // 512000,
            counters.reads + queues.reads,
            counters.writes + queues.writes,
            int(counters.busy / 60),
            counters.power_cycles,
            int((time.monotonic() - counters.started) / 3600),
            counters.unsafe_shutdowns,
            counters.media_errors,
            counters.errors,
        ]
        for place, value in enumerate(units):
            data[32 + 16 * place : 48 + 16 * place] = value.to_bytes(16, "little")
        return bytes(data)

    def _firmware_page(self) -> bytes:
        # Slot 1 is active; its revision.
        return (b"\1".ljust(8, b"\0") + b"1.0".ljust(8)).ljust(512, b"\0")

    def _changed_page(self) -> bytes:
        if len(self._changed) > _CHANGED:
            return _TOO_MANY_CHANGED.ljust(4 * _CHANGED, b"\0")
        numbers = sorted(self._changed)
        return struct.pack(f"<{len(numbers)}I", *numbers).ljust(4 * _CHANGED, b"\0")


def _effects_page() -> bytes:
    effects = dict.fromkeys(map(int, Admin), _SUPPORTED)
    effects[Admin.SET_FEATURES] |= _CHANGES_CONTROLLER
    data = bytearray(4096)
    for opcode, effect in effects.items():
        struct.pack_into("<I", data, 4 * opcode, effect)
    for opcode in Io:
        changes = opcode in (Io.WRITE, Io.WRITE_ZEROES, Io.DATASET)
        effect = _SUPPORTED | (_CHANGES_BLOCKS if changes else 0)
        struct.pack_into("<I", data, 1024 + 4 * opcode, effect)
    return bytes(data)
