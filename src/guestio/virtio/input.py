"""Input devices (virtio 1.4, section 5.8): keyboards, pointers, tablets, or any set of events.

Events have the names that Linux gives them (linux/input-event-codes.h): ``KEY_A``, ``BTN_LEFT``,
``REL_X``, ``ABS_Y``, ``LED_CAPSL``.
"""

from __future__ import annotations

import math
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from guestio._core.virtio.chain import Chain
from guestio.addr import check_int
from guestio.budgets import INPUT_EVENTS, INPUT_STATUS_EVENTS, TURN_SECONDS
from guestio.errors import DeviceError, GuestioError
from guestio.virtio import event_codes as tables
from guestio.virtio import saved
from guestio.virtio.device import Device, DeviceId

if TYPE_CHECKING:
    from guestio.virtio.host import DeviceHost

EVENTS: Final = 0
STATUS: Final = 1

_EVENT: Final = struct.Struct("<HHi")  # type, code, value
_CONFIG: Final = struct.Struct("<BBB5x128s")  # select, subsel, size, data
_IDS: Final = struct.Struct("<HHHH")
_ABS: Final = struct.Struct("<iiIII")
_ID_NAME, _ID_SERIAL, _ID_DEVIDS = 1, 2, 3
_PROP_BITS, _EV_BITS, _ABS_INFO = 0x10, 0x11, 0x12
_BUS_VIRTUAL: Final = 6
_ROOM: Final = 128
_SYN: Final = _EVENT.pack(tables.EV["EV_SYN"], tables.SYN["SYN_REPORT"], 0)

_TABLES: Final = {
    "KEY": ("EV_KEY", tables.KEY),
    "BTN": ("EV_KEY", tables.KEY),
    "REL": ("EV_REL", tables.REL),
    "ABS": ("EV_ABS", tables.ABS),
    "MSC": ("EV_MSC", tables.MSC),
    "SW": ("EV_SW", tables.SW),
    "LED": ("EV_LED", tables.LED),
    "SND": ("EV_SND", tables.SND),
    "REP": ("EV_REP", tables.REP),
}

_ANY: Final = (-(2**31), 2**31 - 1)
_SET_BY_DRIVER: Final = frozenset(tables.EV[kind] for kind in ("EV_LED", "EV_SND", "EV_REP"))

Event = tuple[str, int]
"""Name of a code and its value: 1 and 0 for a key that goes down and up."""

Step = tuple[float, list[Event]]
"""Seconds from the start of a script, and the events of one report."""


class AbsInfo(NamedTuple):
    """What an absolute axis can say (virtio 1.4, section 5.8.4).

    Attributes:
        minimum: Its least value.
        maximum: Its greatest value.
        fuzz: Changes up to this are noise.
        flat: Values up to this far from the middle are the middle.
        resolution: Units per millimeter; 0 if unknown.
    """

    minimum: int
    maximum: int
    fuzz: int = 0
    flat: int = 0
    resolution: int = 0


class InputDevice(Device):
    """A keyboard, a pointer, a tablet, or what its codes make of it.

    Args:
        name: What the guest calls it.
        codes: Names of the events that it sends or takes (LEDs), but for absolute axes.
        absolute: Ranges of absolute axes by their names.
        properties: Names of INPUT_PROP constants.
        serial: Its serial number.
        ids: Vendor, product and version.
        repeat: Whether the guest repeats keys that are held.

    Attributes:
        leds: State of its LEDs by name, as the guest last set it.
        dropped: Reports that were not sent, because the guest had not taken those before.

    Raises:
        ValueError: A name is unknown, or a text or number has no room in its field.

    Threads: :meth:`send`, and what uses it, from any; the others before the device is served.
    """

    device_id = DeviceId.INPUT
    num_queues = 2
    device_queues = (EVENTS,)

    def __init__(
        self,
        name: str,
        codes: Iterable[str] = (),
        *,
        absolute: Mapping[str, AbsInfo | Sequence[int]] | None = None,
        properties: Iterable[str] = (),
        serial: str = "",
        ids: tuple[int, int, int] = (0, 0, 1),
        repeat: bool = False,
    ) -> None:
        self.leds: dict[str, bool] = {}
        self.dropped = 0
        self._codes: dict[str, tuple[int, int]] = {}
        self._limits: dict[str, tuple[int, int]] = {}
        self._space: dict[tuple[int, int], bytes] = {}
        self._select = self._subsel = 0
        self._host: DeviceHost | None = None
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._scheduled = False
        self._status: Callable[[str, int], object] | None = None
        self._script: deque[Step] = deque()
        self._script_began: float | None = None
        self._taken = False
        self._describe(_ID_NAME, 0, _text(name, "name"))
        self._describe(_ID_SERIAL, 0, _text(serial, "serial"))
        for value in ids:
            if not 0 <= check_int(value, "ids") <= 0xFFFF:
                raise ValueError(f"ids {ids} are not three numbers in 0..65535")
        self._describe(_ID_DEVIDS, 0, _IDS.pack(_BUS_VIRTUAL, *ids))
        for each in codes:
            if each.startswith("ABS_"):
                raise ValueError(f"{each} needs a range: name it in absolute")
            self._codes[each] = _lookup(each)
        for each, info in (absolute or {}).items():
            kind, number = _lookup(each)
            if kind != tables.EV["EV_ABS"]:
                raise ValueError(f"{each} is no absolute axis")
            self._codes[each] = kind, number
            self._describe(_ABS_INFO, number, _range(each, AbsInfo(*info)))
            self._limits[each] = info[0], info[1]
        self._names = {number: each for each, number in self._codes.items()}
        self.leds = {each: False for each in self._codes if each.startswith("LED_")}
        unknown = [each for each in properties if each not in tables.INPUT_PROP]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no property, as INPUT_PROP_DIRECT is")
        self._describe(_PROP_BITS, 0, _bits(tables.INPUT_PROP[each] for each in properties))
        for kind in {kind for kind, _ in self._codes.values()}:
            numbers = [number for of, number in self._codes.values() if of == kind]
            self._describe(_EV_BITS, kind, _bits(numbers))
        if repeat:
            self._describe(_EV_BITS, tables.EV["EV_REP"], b"\0")

    @classmethod
    def keyboard(cls, name: str = "guestio keyboard", *, serial: str = "") -> Self:
        """A keyboard with all ordinary keys and three LEDs; the guest repeats keys."""
        keys = [each for each, number in tables.KEY.items() if 0 < number < 0x100]
        leds = ("LED_NUML", "LED_CAPSL", "LED_SCROLLL")
        return cls(name, (*keys, *leds), serial=serial, repeat=True)

    @classmethod
    def pointer(cls, name: str = "guestio pointer", *, serial: str = "") -> Self:
        """A mouse: five buttons, movements and two wheels."""
        return cls(name, (*_BUTTONS, "REL_X", "REL_Y", *_WHEELS), serial=serial)

    @classmethod
    def tablet(cls, name: str = "guestio tablet", *, serial: str = "") -> Self:
        """A pointer with absolute places, 0 to 32767 in both axes, buttons and wheels."""
        whole = AbsInfo(0, 32767)
        return cls(
            name, (*_BUTTONS, *_WHEELS), absolute={"ABS_X": whole, "ABS_Y": whole}, serial=serial
        )

    def __repr__(self) -> str:
        name = self._space[_ID_NAME, 0].decode(errors="replace")
        return f"<InputDevice {name!r}: {len(self._codes)} codes, {self.dropped} reports dropped>"

    def _describe(self, select: int, subsel: int, data: bytes) -> None:
        """Put something into the configuration space, if it says anything."""
        if data:
            self._space[select, subsel] = data

    def send(self, *events: Event) -> bool:
        """Send one report: events that happen at the same time.

        Args:
            events: Names and values. The event that ends a report (SYN_REPORT) is added.

        Returns:
            False if the report was dropped: the guest has not taken those before it.

        Raises:
            ValueError: The device has no such code, or a value is none of it: an axis has a range,
                a key is 0 (up), 1 (down) or 2 (repeated), others are signed numbers of 32 bits.
                Nothing is sent.

        Threads: from any. Reports are sent whole, in the order of the calls.
        """
        report = b"".join(map(self._encoded, events)) + _SYN
        size = len(report) // _EVENT.size
        with self._lock:
            if len(self._waiting) + size > INPUT_EVENTS:
                self.dropped += 1
                return False
            self._waiting.extend(
                report[at : at + _EVENT.size] for at in range(0, len(report), _EVENT.size)
            )
        self._send_soon()
        return True

    def _encoded(self, event: Event) -> bytes:
        name, value = event
        code = self._codes.get(name)
        if code is None:
            raise ValueError(f"the device has no {name}")
        if not -(2**31) <= check_int(value, name) < 2**31:
            raise ValueError(f"{name} {value} is no signed number of 32 bits")
        least, most = self._limits.get(name, (0, 2) if code[0] == tables.EV["EV_KEY"] else _ANY)
        if not least <= value <= most:
            raise ValueError(f"{name} {value} is not from {least} to {most}")
        return _EVENT.pack(*code, value)

    def press(self, *names: str) -> bool:
        """Have keys or buttons go down, as :meth:`send` does."""
        return self.send(*((name, 1) for name in names))

    def release(self, *names: str) -> bool:
        """Have keys or buttons go up, as :meth:`send` does."""
        return self.send(*((name, 0) for name in names))

    def tap(self, *names: str) -> bool:
        """Press and release one key after the other; False if any report was dropped."""
        sent = [self.send((name, value)) for name in names for value in (1, 0)]
        return all(sent)

    def on_status(self, callback: Callable[[str, int], object] | None) -> None:
        """Have what the guest sets handed to a function, as name and value: LEDs (0 or 1), sounds.

        Other events that a driver sends, keys for example, are ignored.
        It is called in the thread that serves the queue; what it raises is logged.
        """
        self._status = callback

    def play(self, script: Iterable[Step]) -> None:
        """Send reports at their times, from when a guest's driver first takes events.

        Args:
            script: As from :meth:`parse_script`, ordered by time.

        Raises:
            ValueError: A code is unknown to the device, or times are not in order.
            DeviceError: Another script has not come to its end.

        Threads: from any.
        """
        if self._script:
            raise DeviceError(f"{self!r} has {len(self._script)} reports of a script still to send")
        steps = list(script)
        before = 0.0
        for when, events in steps:
            if not before <= when < math.inf:
                raise ValueError(f"{when} s is not later than what comes before it")
            before = when
            for event in events:
                self._encoded(event)
        self._script.extend(steps)
        if self._host is not None and self._taken:
            self._host.call_soon_threadsafe(self._begin)

    def parse_script(self, text: str) -> list[Step]:
        """A script for :meth:`play`.

        A line is a time and the events of a report: ``1.5 KEY_LEFTSHIFT 1``, or ``2 REL_X 10
        REL_Y -5``. The time is in seconds, ``+0.1`` counts from the line before. A key without a
        value goes down and, in a report of its own, up: ``3 KEY_A``. ``#`` begins a comment.

        Raises:
            ValueError: A line means nothing to this device; the message has its number.
        """
        steps: list[Step] = []
        now = 0.0
        for number, line in enumerate(text.splitlines(), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            try:
                seconds, before = _seconds(words[0]), now
                now = now + seconds if words[0].startswith("+") else seconds
                if not before <= now < math.inf:
                    raise ValueError(f"{words[0]} s is not later than the line before")
                steps += self._parse_line(now, words[1:])
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
        return steps

    def _parse_line(self, now: float, words: list[str]) -> list[Step]:
        events: list[Event] = []
        at = 0
        while at < len(words):
            name = words[at]
            valued = at + 1 < len(words) and not words[at + 1][0].isalpha()
            if valued:
                events.append((name, int(words[at + 1], 0)))
            elif len(words) == 1 and name.startswith(("KEY_", "BTN_")):
                self._encoded((name, 1))
                return [(now, [(name, 1)]), (now, [(name, 0)])]
            else:
                raise ValueError(f"{name} has no value")
            self._encoded(events[-1])
            at += 2
        if not events:
            raise ValueError("a time without events")
        return [(now, events)]

    def attached(self, host: DeviceHost) -> None:
        """See :class:`Device`."""
        self._host = host
        host.queue(EVENTS).on_available(self._available)

    def _available(self) -> None:
        assert self._host is not None
        self._taken = True
        self._host.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        if self._script and self._script_began is None:
            self._script_began = time.monotonic()
            self._play()
        self._send_soon()

    def _play(self) -> None:
        """Send what is due of the script."""
        assert self._script_began is not None
        assert self._host is not None
        until = time.monotonic() + TURN_SECONDS
        while self._script:
            when, events = self._script[0]
            left = self._script_began + when - time.monotonic()
            if left > 0 or time.monotonic() >= until:
                self._host.call_later(max(left, 0), self._play)
                return
            self._script.popleft()
            self.send(*events)
        self._script_began = None

    def _send_soon(self) -> None:
        if self._host is not None and not self._scheduled:
            self._scheduled = True
            self._host.call_soon_threadsafe(self._send)

    def _send(self) -> None:
        """Put events into the guest's buffers, as long as it has any."""
        self._scheduled = False
        assert self._host is not None
        queue = self._host.queue(EVENTS)
        until = time.monotonic() + TURN_SECONDS
        while self._waiting:
            chain = queue.take()
            if chain is None:
                return
            written = 0
            if chain.writable.total < _EVENT.size:
                self._host.log.report(
                    "InputDevice: the driver's buffer for events has %d bytes; %d are needed",
                    chain.writable.total,
                    _EVENT.size,
                )
            else:
                try:
                    chain.writable.write(self._waiting[0])
                    written = _EVENT.size
                except GuestioError as error:
                    self._host.log.report("InputDevice: an event cannot be written: %s", error)
            if written:
                with self._lock:
                    self._waiting.popleft()
            queue.complete(chain, written)
            if time.monotonic() >= until:
                self._send_soon()
                return

    def process(self, queue: int, chain: Chain) -> int:
        """Take what the guest sets, LEDs; see :class:`Device`."""
        total = chain.readable.total
        count = min(total // _EVENT.size, INPUT_STATUS_EVENTS)
        if not total or total % _EVENT.size:
            raise DeviceError(
                f"{total} bytes on the status queue; an event has {_EVENT.size} of them"
            )
        for kind, number, value in _EVENT.iter_unpack(chain.readable.read(0, count * _EVENT.size)):
            name = self._names.get((kind, number))
            if name is None or kind not in _SET_BY_DRIVER:
                continue
            if name in self.leds:
                self.leds[name] = bool(value)
            if self._status is not None:
                self._status(name, int(self.leds.get(name, value)))
        return 0

    def config(self) -> bytes:
        """See :class:`Device`."""
        data = self._space.get((self._select, self._subsel), b"")
        return _CONFIG.pack(self._select, self._subsel, len(data), data)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take over what the driver asks for: ``select`` and ``subsel``; see :class:`Device`."""
        # QEMU's vhost-user-input writes the whole space from its start.
        chosen = bytearray((self._select, self._subsel))
        if not data or offset > 1:
            raise DeviceError(
                f"the driver wrote {len(data)} bytes at {offset:#x}; it may write select and "
                "subsel, the first two"
            )
        for at, value in enumerate(data[: 2 - offset], offset):
            chosen[at] = value
        self._select, self._subsel = chosen

    def save(self) -> bytes:
        """What the driver chose and set, and the events that wait for it; see :class:`Device`."""
        with self._lock:
            waiting = b"".join(self._waiting)
        return saved.pack(
            device=saved.text(self._description()),
            select=self._select,
            subsel=self._subsel,
            leds=self.leds,
            waiting=saved.text(waiting),
        )

    def restore(self, state: bytes) -> None:
        """Take over what the driver of a device with the same codes did; see :class:`Device`.

        :meth:`on_status` is not called for it; :attr:`leds` says what is lit.
        """
        fields = saved.Fields(state)
        description = self._description()
        if fields.take("device", lambda value: saved.data(value, len(description))) != description:
            raise DeviceError(
                "the state is of an input device with another name, other codes or ranges"
            )
        select, subsel = (
            fields.take(name, lambda value: saved.number(value, 0xFF))
            for name in ("select", "subsel")
        )
        leds = fields.take("leds", self._leds_of)
        waiting = fields.take("waiting", self._waiting_of)
        self._select, self._subsel = select, subsel
        self.leds.update(leds)
        with self._lock:
            self._waiting.extendleft(reversed(waiting))
        self._send_soon()

    def _description(self) -> bytes:
        """All of the configuration space, which the driver has read, in short."""
        digest = blake2b(digest_size=16)
        for (select, subsel), data in sorted(self._space.items()):
            digest.update(_CONFIG.pack(select, subsel, len(data), data))
        return digest.digest()

    def _leds_of(self, value: object) -> dict[str, bool]:
        if not isinstance(value, dict) or value.keys() != self.leds.keys():
            raise ValueError("other LEDs than the device has")
        return {name: saved.flag(value[name]) for name in self.leds}

    def _waiting_of(self, value: object) -> list[bytes]:
        """Events of whole reports, of codes that the device has."""
        data = saved.data(value, INPUT_EVENTS * _EVENT.size)
        events = [data[at : at + _EVENT.size] for at in range(0, len(data), _EVENT.size)]
        if events and events[-1] != _SYN:
            raise ValueError("the last report has no end")
        known = set(self._codes.values())
        for each in events:
            kind, number, _ = _EVENT.unpack(each) if len(each) == _EVENT.size else (0, 1, 0)
            if each != _SYN and (kind, number) not in known:
                raise ValueError(f"an event of type {kind} and code {number}")
        return events

    def reset(self) -> None:
        """Forget the driver, and the events that were meant for it; see :class:`Device`."""
        self._select = self._subsel = 0
        with self._lock:
            self._waiting.clear()


_BUTTONS: Final = ("BTN_LEFT", "BTN_RIGHT", "BTN_MIDDLE", "BTN_SIDE", "BTN_EXTRA")
_WHEELS: Final = ("REL_WHEEL", "REL_HWHEEL")


def _lookup(name: str) -> tuple[int, int]:
    """Type and number of an event's name.

    Raises:
        ValueError: There is no such name.
    """
    kind, table = _TABLES.get(name.partition("_")[0], ("", {}))
    if name not in table:
        raise ValueError(
            f"{name!r} is no event: names are those of linux/input-event-codes.h, as KEY_A"
        )
    return tables.EV[kind], table[name]


def _text(text: str, what: str) -> bytes:
    data = text.encode()
    if len(data) > _ROOM:
        raise ValueError(f"{what} {text!r} is longer than {_ROOM} bytes")
    return data


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{text} is no time in seconds")
    return seconds


def _range(name: str, info: AbsInfo) -> bytes:
    try:
        return _ABS.pack(info.minimum, info.maximum, info.fuzz, info.flat, info.resolution)
    except struct.error as error:
        raise ValueError(f"the range {tuple(info)} of {name} is none: {error}") from None


def _bits(numbers: Iterable[int]) -> bytes:
    """A bitmap, least significant bit first, without zeroes at its end."""
    mask = sum(1 << number for number in set(numbers))
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")
