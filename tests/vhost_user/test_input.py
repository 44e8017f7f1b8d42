"""Input devices behind their socket: what they say they are, events, LEDs, and what is wrong."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from guestio.budgets import INPUT_EVENTS
from guestio.errors import DeviceError, ProtocolError
from guestio.vhost_user.frontend import RefusedError
from guestio.virtio import event_codes
from guestio.virtio.input import AbsInfo, InputDevice
from lab.event_codes import HEADER, module, parse
from tests.kit.rings import WRITE, Desc
from tests.kit.serving import BUFFERS, Driver, Serving, nothing_left, until, warnings_of

EVENT = struct.Struct("<HHi")
SYN, KEY, REL, ABS, LED = 0, 1, 2, 3, 0x11
REPORT = (SYN, 0, 0)


class InputDriver(Driver):
    """A guest's input driver, by hand."""

    def __init__(self, target: Path, **options: object) -> None:
        self.seen = 0
        super().__init__(target, queues=2, **options)  # type: ignore[arg-type]

    def ask(self, select: int, subsel: int = 0, *, whole: bool = False) -> bytes:
        """What the configuration space says about something."""
        chosen = bytes([select, subsel]) + bytes(134 if whole else 0)
        self.frontend.set_config(0, chosen)
        space = self.frontend.get_config(0, 136)
        assert space[:2] == chosen[:2]
        return space[8 : 8 + space[2]]

    def post(self, count: int, room: int = 8) -> None:
        """Make buffers for events available."""
        ring = self.rings[0]
        for _ in range(count):
            at = ring.offered % 32
            ring.offer(ring.put_chain(at, Desc(self.at(BUFFERS + 64 * at), room, WRITE)))
        self.handles[0].kick()

    def event(self) -> tuple[int, int, int]:
        """The next event."""
        self.wait(0, self.seen)
        head, written = self.rings[0].used_entry(self.seen)
        self.seen += 1
        assert written == 8
        return EVENT.unpack(self.memory.read(BUFFERS + 64 * head, 8))

    def events(self, count: int) -> list[tuple[int, int, int]]:
        self.post(count)
        return [self.event() for _ in range(count)]

    def status(self, data: bytes) -> None:
        """Send something on the status queue."""
        self.memory.write(BUFFERS + 0x10000, data)
        self.run_raw(1, Desc(self.at(BUFFERS + 0x10000), len(data)))


@pytest.mark.parametrize("iommu", [False, True], ids=["direct", "iommu"])
@pytest.mark.parametrize("queue_threads", [False, True], ids=["one thread", "queue threads"])
def test_keys_are_pressed_and_leds_set(tmp_path: Path, iommu: bool, queue_threads: bool) -> None:
    device = InputDevice.keyboard(serial="k1")
    told: list[tuple[str, int]] = []
    device.on_status(lambda name, value: told.append((name, value)))
    with (
        nothing_left(),
        Serving(device, tmp_path / "s", queue_threads=queue_threads) as serving,
        InputDriver(serving.path, iommu=iommu) as driver,
    ):
        assert driver.ask(1) == b"guestio keyboard"
        assert driver.ask(2) == b"k1"
        assert driver.ask(3) == struct.pack("<HHHH", 6, 0, 0, 1)
        assert device.tap("KEY_A")
        assert driver.events(4) == [(KEY, 30, 1), REPORT, (KEY, 30, 0), REPORT]
        driver.post(3)
        assert device.press("KEY_LEFTSHIFT", "KEY_B")
        assert [driver.event() for _ in range(3)] == [(KEY, 42, 1), (KEY, 48, 1), REPORT]
        assert device.release("KEY_B")
        assert driver.events(2) == [(KEY, 48, 0), REPORT]
        driver.status(EVENT.pack(LED, 1, 1))
        until(lambda: device.leds["LED_CAPSL"])
        driver.status(EVENT.pack(LED, 0, 1) + EVENT.pack(LED, 1, 0))
        # A key is not for the driver to press, and a LED is on or off.
        driver.status(EVENT.pack(KEY, 30, 1) + EVENT.pack(LED, 2, -5) + EVENT.pack(LED, 2, 0))
        assert told == [
            *(("LED_CAPSL", 1), ("LED_NUML", 1), ("LED_CAPSL", 0)),
            *(("LED_SCROLLL", 1), ("LED_SCROLLL", 0)),
        ]
        assert device.leds == {"LED_NUML": True, "LED_CAPSL": False, "LED_SCROLLL": False}
    serving.backend.close()


def bits(data: bytes) -> set[int]:
    return {number for number in range(8 * len(data)) if data[number // 8] >> number % 8 & 1}


def test_what_devices_say_they_are(tmp_path: Path) -> None:
    device = InputDevice.tablet("pad")
    with Serving(device, tmp_path / "s") as serving, InputDriver(serving.path) as driver:
        assert driver.ask(1) == b"pad"
        assert driver.ask(2) == b""
        assert bits(driver.ask(0x11, KEY)) == {0x110, 0x111, 0x112, 0x113, 0x114}
        assert bits(driver.ask(0x11, REL)) == {8, 6}
        assert bits(driver.ask(0x11, ABS)) == {0, 1}
        assert driver.ask(0x12, 1) == struct.pack("<iiIII", 0, 32767, 0, 0, 0)
        assert driver.ask(0x12, 2) == b""
        assert driver.ask(0x11, LED) == b""
        assert driver.ask(0x11, 0x14) == b""
        # QEMU writes the whole space.
        assert driver.ask(1, whole=True) == b"pad"
        device.send(("ABS_X", 100), ("ABS_Y", 200), ("BTN_LEFT", 1))
        assert driver.events(4) == [(ABS, 0, 100), (ABS, 1, 200), (KEY, 0x110, 1), REPORT]
    keyboard = InputDevice.keyboard()
    with Serving(keyboard, tmp_path / "s") as serving, InputDriver(serving.path) as driver:
        keys = bits(driver.ask(0x11, KEY))
        assert {1, 30, 0x3B} <= keys
        assert max(keys) < 0x100
        assert bits(driver.ask(0x11, LED)) == {0, 1, 2}
        assert driver.ask(0x11, 0x14) == b"\0"  # the guest repeats keys
    pointer = InputDevice.pointer()
    with Serving(pointer, tmp_path / "s") as serving, InputDriver(serving.path) as driver:
        assert bits(driver.ask(0x11, REL)) == {0, 1, 6, 8}


def test_a_device_of_ones_own(tmp_path: Path) -> None:
    device = InputDevice(
        "touch",
        ["BTN_TOUCH", "SW_LID", "MSC_SCAN"],
        absolute={"ABS_MT_SLOT": (0, 9), "ABS_Z": AbsInfo(-5, 5, 1, 2, 3)},
        properties=["INPUT_PROP_DIRECT", "INPUT_PROP_BUTTONPAD"],
        ids=(1, 2, 3),
    )
    with Serving(device, tmp_path / "s") as serving, InputDriver(serving.path) as driver:
        assert bits(driver.ask(0x10)) == {1, 2}
        assert driver.ask(0x12, 2) == struct.pack("<iiIII", -5, 5, 1, 2, 3)
        assert driver.ask(3) == struct.pack("<HHHH", 6, 1, 2, 3)
        device.send(("ABS_Z", -3))
        assert driver.events(2) == [(ABS, 2, -3), REPORT]


@pytest.mark.parametrize(("offset", "length"), [(2, 1), (2, 134), (8, 4), (135, 1)])
def test_only_the_selection_can_be_written(tmp_path: Path, offset: int, length: int) -> None:
    device = InputDevice.keyboard()
    with Serving(device, tmp_path / "s") as serving, InputDriver(serving.path) as driver:
        driver.ask(1)
        with pytest.raises((RefusedError, ProtocolError)):
            driver.frontend.set_config(offset, bytes(length))
        assert driver.frontend.get_config(0, 3)[:2] == b"\1\0"
        driver.frontend.set_config(1, b"\7")
        assert driver.frontend.get_config(0, 3) == b"\1\7\0"
    with pytest.raises(DeviceError, match="select and subsel"):
        device.write_config(0, b"")


def test_reports_that_a_guest_does_not_take_are_dropped_whole(tmp_path: Path) -> None:
    device = InputDevice.keyboard()
    with Serving(device, tmp_path / "s") as serving, InputDriver(serving.path) as driver:
        sent = 0
        while device.press("KEY_A", "KEY_B"):
            sent += 1
        assert sent == INPUT_EVENTS // 3
        assert device.dropped == 1
        assert device.press("KEY_A") is (INPUT_EVENTS % 3 >= 2)
        got = []
        while len(got) < 3 * sent:
            got += driver.events(1)
        assert got == [(KEY, 30, 1), (KEY, 48, 1), REPORT] * sent
        assert device.press("KEY_C")
    assert device.dropped <= 2


def test_a_reset_forgets_events(tmp_path: Path) -> None:
    device = InputDevice.keyboard()
    with Serving(device, tmp_path / "s") as serving:
        with InputDriver(serving.path) as driver:
            driver.ask(1)
            device.press("KEY_A")
        serving.let_go()
        with InputDriver(serving.path) as driver:
            assert driver.frontend.get_config(0, 3) == bytes(3)
            device.press("KEY_B")
            assert driver.events(2) == [(KEY, 48, 1), REPORT]


def test_threads_send_whole_reports(tmp_path: Path) -> None:
    device = InputDevice.keyboard()
    with Serving(device, tmp_path / "s") as serving, InputDriver(serving.path) as driver:
        threads = [
            threading.Thread(target=lambda name=name: [device.press(name, name) for _ in range(20)])
            for name in ("KEY_A", "KEY_B", "KEY_C")
        ]
        for thread in threads:
            thread.start()
        got = []
        for _ in range(60):
            got.append(driver.events(3))
        for thread in threads:
            thread.join()
        assert all(a == b and c == REPORT for a, b, c in got)
        assert {one[0][1] for one in got} == {30, 48, 46}


def test_buffers_that_are_too_small_lose_no_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = InputDevice.keyboard()
    with Serving(device, tmp_path / "s") as serving, InputDriver(serving.path) as driver:
        driver.post(3, 7)
        device.press("KEY_A")
        driver.wait(0, 2)
        assert [driver.rings[0].used_entry(n)[1] for n in range(3)] == [0, 0, 0]
        driver.seen = 3
        ring = driver.rings[0]
        ring.offer(ring.put_chain(3, Desc(BUFFERS, 8)))  # cannot be written at all
        driver.handles[0].kick()
        driver.wait(0, 3)
        driver.seen = 4
        assert driver.events(2) == [(KEY, 30, 1), REPORT]
        driver.post(1, 4096)
        device.send()
        assert driver.event() == REPORT
    assert "buffer for events has 7 bytes; 8 are needed" in warnings_of(caplog)[0]


@pytest.mark.parametrize("size", [*range(1, 8), 9, 15, 4095])
def test_status_of_any_size(tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    device = InputDevice.keyboard()
    with Serving(device, tmp_path / "s") as serving, InputDriver(serving.path) as driver:
        driver.status((EVENT.pack(LED, 1, 1) * 512)[:size])
        assert serving.stats.failed_requests == 1
        assert not device.leds["LED_CAPSL"]
        driver.status(EVENT.pack(LED, 1, 1) * 500)
        assert device.leds["LED_CAPSL"]
    assert "InputDevice.process" in warnings_of(caplog)[0]


def test_status_that_means_nothing(tmp_path: Path) -> None:
    device = InputDevice.keyboard()
    with Serving(device, tmp_path / "s") as serving, InputDriver(serving.path) as driver:
        for event in ((LED, 99, 1), (77, 0, 0), (0xFFFF, 0xFFFF, -1), (SYN, 0, 0), (LED, 2, -7)):
            driver.status(EVENT.pack(*event))
        assert device.leds == {"LED_NUML": False, "LED_CAPSL": False, "LED_SCROLLL": True}
        assert driver.run_raw(1, Desc(BUFFERS, 8, WRITE))[1] == 0
        assert serving.stats.failed_requests == 1


def test_a_status_callback_that_raises_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = InputDevice.keyboard()

    def fail(name: str, value: int) -> None:
        raise RuntimeError(name)

    device.on_status(fail)
    with Serving(device, tmp_path / "s") as serving, InputDriver(serving.path) as driver:
        driver.status(EVENT.pack(LED, 1, 1))
        device.press("KEY_A")
        assert driver.events(2) == [(KEY, 30, 1), REPORT]
    assert "InputDevice.process raised RuntimeError: LED_CAPSL" in warnings_of(caplog)[0]


SCRIPT = """
# a comment
0.05 KEY_A          # and another
+0.05 KEY_LEFTSHIFT 1
+0 KEY_B 1
0.15 KEY_LEFTSHIFT 0 KEY_B 0x0
"""


def test_a_script_is_played_from_when_a_guest_takes_events(tmp_path: Path) -> None:
    device = InputDevice.keyboard()
    script = device.parse_script(SCRIPT)
    assert script == [
        (0.05, [("KEY_A", 1)]),
        (0.05, [("KEY_A", 0)]),
        (0.1, [("KEY_LEFTSHIFT", 1)]),
        (0.1, [("KEY_B", 1)]),
        (0.15, [("KEY_LEFTSHIFT", 0), ("KEY_B", 0)]),
    ]
    device.play(script)
    with pytest.raises(DeviceError, match="5 reports of a script"):
        device.play(script)
    with Serving(device, tmp_path / "s") as serving, InputDriver(serving.path) as driver:
        time.sleep(0.3)
        assert len(device._script) == 5
        started = time.monotonic()
        got = driver.events(11)
        assert time.monotonic() - started > 0.1
        assert [event for event in got if event != REPORT] == [
            (KEY, 30, 1),
            (KEY, 30, 0),
            (KEY, 42, 1),
            (KEY, 48, 1),
            (KEY, 42, 0),
            (KEY, 48, 0),
        ]
        # Another one, now that it is over.
        device.play(device.parse_script("0.01 KEY_C 1"))
        assert driver.events(2) == [(KEY, 46, 1), REPORT]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1", "line 1: a time without events"),
        ("\n\nsoon KEY_A", "line 3: soon is no time"),
        ("1 KEY_A\n0.5 KEY_B", "line 2: 0.5 s is not later"),
        ("-1 KEY_A", "line 1: -1 s is not later"),
        ("1 KEY_A 3", "line 1: KEY_A 3 is not from 0 to 2"),
        ("1 KEY_A -1", "line 1: KEY_A -1 is not from 0 to 2"),
        ("nan KEY_A", "line 1: nan is no time"),
        ("inf KEY_A", "line 1: inf is no time"),
        ("1 KEY_NONSENSE", "has no KEY_NONSENSE"),
        ("1 REL_X 5", "has no REL_X"),
        ("1 KEY_A KEY_B", "KEY_A has no value"),
        ("1 LED_CAPSL", "LED_CAPSL has no value"),
        ("1 KEY_A one", "KEY_A has no value"),
        ("1 KEY_A 1.5", "invalid literal"),
        ("1 KEY_A 99999999999", "32 bits"),
    ],
)
def test_scripts_that_mean_nothing(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        InputDevice.keyboard().parse_script(text)


def test_scripts_of_pythons_are_checked_whole() -> None:
    device = InputDevice.keyboard()
    for script in ([(1.0, []), (0.5, [])], [(float("nan"), [])], [(0.0, [("REL_X", 1)])]):
        with pytest.raises(ValueError):
            device.play(script)
    assert not device._script


@pytest.mark.parametrize(
    ("arguments", "options", "complaint"),
    [
        (("x" * 129,), {}, "longer than 128"),
        (("n",), {"serial": "é" * 65}, "longer than 128"),
        (("n", ["KEY_NOPE"]), {}, "'KEY_NOPE' is no event"),
        (("n", [""]), {}, "'' is no event"),
        (("n", ["ABS_X"]), {}, "needs a range"),
        (("n",), {"absolute": {"KEY_A": (0, 1)}}, "no absolute axis"),
        (("n",), {"absolute": {"ABS_X": (0, 1 << 31)}}, "of ABS_X is none"),
        (("n",), {"absolute": {"ABS_X": (0, 1, -1)}}, "of ABS_X is none"),
        (("n",), {"properties": ["INPUT_PROP_NOPE"]}, "is no property"),
        (("n",), {"ids": (1, 2, 65536)}, "three numbers"),
    ],
)
def test_arguments(arguments: tuple, options: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        InputDevice(*arguments, **options)


def test_events_are_checked() -> None:
    device = InputDevice.pointer()
    for events, complaint in (
        ([("KEY_A", 1)], "has no KEY_A"),
        ([("REL_X", 1 << 31)], "32 bits"),
        ([("REL_X", 1), ("REL_Y", -(1 << 31) - 1)], "32 bits"),
    ):
        with pytest.raises(ValueError, match=complaint):
            device.send(*events)
    with pytest.raises(TypeError):
        device.send(("REL_X", 1.5))  # type: ignore[arg-type]
    assert not device._waiting
    assert repr(device) == "<InputDevice 'guestio pointer': 9 codes, 0 reports dropped>"


def test_the_table_is_that_of_the_kernel() -> None:
    """Also where the machine's header is of another version: what both have is the same."""
    assert parse("#define KEY_A 30\n#define BTN_B 0x1f /* b */\n#define KEY_C KEY_A\n") == {
        **{name: {} for name in parse("")},
        "KEY": {"KEY_A": 30, "BTN_B": 31, "KEY_C": 30},
    }
    tables = {name: getattr(event_codes, name) for name in parse("")}
    assert event_codes.KEY["KEY_A"] == 30
    assert module(tables) == Path(event_codes.__file__).read_text()
    if HEADER.exists():
        for name, codes in parse(HEADER.read_text()).items():
            both = codes.keys() & tables[name].keys()
            assert {each: codes[each] for each in both} == {
                each: tables[name][each] for each in both
            }
            assert len(both) > 0.9 * len(tables[name])


def test_the_command_refuses_scripts_that_mean_nothing(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("1 KEY_A\n2 REL_X 1\n")
    for arguments, complaint in (
        (["keyboard", "--script", "script"], "script: line 2: "),
        (["keyboard", "--script", "absent"], "absent"),
        (["joystick"], "joystick"),
        (["tablet", "--name", "x" * 200], "longer than 128"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "guestio", "input", *arguments, "--socket", "s"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert complaint in done.stderr


def test_an_axis_has_its_range() -> None:
    device = InputDevice.tablet()
    assert device.send(("ABS_X", 0), ("ABS_Y", 32767))
    for value in (-1, 32768):
        with pytest.raises(ValueError, match=f"ABS_X {value} is not from 0 to 32767"):
            device.send(("ABS_X", value))
    assert len(device._waiting) == 3, "two events and the end of their report"
