"""VERSION, headers, and messages that are no messages."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

from guestio.faults.base_trial import QUIET
from guestio.faults.outcomes import HungUpError
from guestio.faults.report import Severity
from guestio.faults.vfio_user.catalogue import hostile, register, vfio
from guestio.faults.vfio_user.trial import VfioTrial
from guestio.vfio_user.messages import DEVICE_INFO, Command, HeaderFlag

_INFO: Final = DEVICE_INFO.pack(DEVICE_INFO.size, 0, 0, 0)
_VERSION: Final = vfio("VERSION")
_HEADER: Final = vfio("Header")
_SEQUENCE: Final = vfio("Message sequence")
_ERRORS: Final = vfio("Failure handling")
_UNKNOWN: Final = 0x7E57


@register(
    "version.answer",
    _VERSION,
    "VERSION is answered with major 0, and a minor not above that asked.",
)
def _answer(t: VfioTrial) -> None:
    answer = t.link.version(1)
    t.expect(not answer.failed, f"0.1 is refused with error {answer.error}")
    t.expect(len(answer.payload) >= 4, f"the answer has {len(answer.payload)} bytes")
    major, minor = struct.unpack_from("<HH", answer.payload)
    t.expect(major == 0, f"speaks {major}.{minor}")
    t.expect(minor <= 1, f"0.1 was asked for, 0.{minor} is answered")


@register("version.minor-zero", _VERSION, "A client that asks for 0.0 is answered with 0.0.")
def _minor_zero(t: VfioTrial) -> None:
    answer = t.link.version(0)
    t.expect(not answer.failed, f"0.0 is refused with error {answer.error}")
    major, minor = struct.unpack_from("<HH", answer.payload)
    t.expect((major, minor) == (0, 0), f"0.0 was asked for, {major}.{minor} is answered")


@register("version.later-minor", _VERSION, "A client of a later minor version is spoken to.")
def _later_minor(t: VfioTrial) -> None:
    answer = t.link.version(9)
    t.expect(not answer.failed, f"0.9 is refused with error {answer.error}")


@register(
    "version.data",
    _VERSION,
    "The version data is a JSON object that ends with a NUL, with an object of capabilities.",
)
def _data(t: VfioTrial) -> None:
    data = t.link.version().payload[4:]
    if not data:
        return
    t.expect(data.endswith(b"\0"), "the version data does not end with a NUL")
    try:
        said = json.loads(data.rstrip(b"\0"))
    except (ValueError, RecursionError):
        t.fail(f"the version data is no JSON: {data[:60]!r}")
    t.expect(isinstance(said, dict), "the version data is no object")
    t.expect(isinstance(said.get("capabilities", {}), dict), "the capabilities are no object")


@register(
    "version.capabilities",
    _VERSION,
    "Capabilities that are numbers are numbers: descriptors, bytes, page sizes, mappings.",
)
def _capabilities(t: VfioTrial) -> None:
    t.begin()
    for name, least in (
        ("max_msg_fds", 0),
        ("max_data_xfer_size", 1),
        ("pgsizes", 1),
        ("max_dma_maps", 1),
    ):
        value = t.link.capabilities.get(name, least)
        t.expect(type(value) is int and value >= least, f"{name} is {value!r}")


@register("version.no-data", _VERSION, "Version data is optional.")
def _no_data(t: VfioTrial) -> None:
    answer = t.link.version(data=b"")
    t.expect(not answer.failed, f"refused with error {answer.error}")
    t.info()


@register("version.empty-data", _VERSION, "An empty object of version data stands for defaults.")
def _empty_data(t: VfioTrial) -> None:
    answer = t.link.version(data=b"{}\0")
    t.expect(not answer.failed, f"refused with error {answer.error}")
    t.info()


@register(
    "version.unknown-capability", _VERSION, "Capabilities that a server does not know are ignored."
)
def _unknown_capability(t: VfioTrial) -> None:
    answer = t.link.version(data=b'{"capabilities":{"of_its_own":[1]}}\0')
    t.expect(not answer.failed, f"refused with error {answer.error}")
    t.info()


def _bad_version(t: VfioTrial, payload: bytes, why: str) -> None:
    t.refused(Command.VERSION, payload, why=why)


for _name, _text, _payload, _why in (
    ("major", "Another major version is refused.", struct.pack("<HH", 7, 0), "7.0"),
    ("short", "A VERSION without room for its numbers is refused.", b"\0\0", "of 2 bytes"),
    (
        "not-json",
        "Version data that is no JSON is refused.",
        struct.pack("<HH", 0, 1) + b"{nonsense\0",
        "with data that is no JSON",
    ),
    (
        "not-an-object",
        "Capabilities that are no object are refused.",
        struct.pack("<HH", 0, 1) + b'{"capabilities":7}\0',
        "with capabilities that are a number",
    ),
):
    hostile(f"version.bad-{_name}", _VERSION, _text)(
        partial(_bad_version, payload=_payload, why=_why)
    )


@hostile("version.deep-json", _VERSION, "Version data of a thousand brackets harms nothing.")
def _deep_json(t: VfioTrial) -> None:
    answer = t.link.version(data=b"[" * 1000 + b"\0")
    t.expect(answer.failed, "JSON without an end is accepted")


@hostile("version.again", _VERSION, "A second VERSION is refused.")
def _again(t: VfioTrial) -> None:
    t.begin()
    t.refused(Command.VERSION, struct.pack("<HH", 0, 1) + b"{}\0", why="a second time")


@hostile("version.first", _VERSION, "Whatever comes before VERSION is refused.")
def _first(t: VfioTrial) -> None:
    t.refused(Command.DEVICE_GET_INFO, _INFO, why="before VERSION")


# Headers


@register("message.id", _HEADER, "An answer has the ID and the command of its message.")
def _id(t: VfioTrial) -> None:
    t.begin()
    for number in (0, 1, 0xFFFF, 0x1234, 0x1234):
        t.link.ask(Command.DEVICE_GET_INFO, _INFO, number=number)


@register("message.error", _ERRORS, "An error has the flag, an error number, and is an answer.")
def _error(t: VfioTrial) -> None:
    t.begin()
    answer = t.link.ask(Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, 999, 0, 0, 0))
    t.expect(answer.failed, "a region 999 is told of")
    t.expect(0 < answer.error < 4096, f"the error number is {answer.error}")


@register(
    "message.in-pieces", vfio("Transport"), "A message that arrives in pieces is one message."
)
def _in_pieces(t: VfioTrial) -> None:
    t.begin()
    data = struct.pack("<HHIII", 7, Command.DEVICE_GET_INFO, 16 + len(_INFO), 0, 0) + _INFO
    for start, end in pairwise((0, 1, 7, 16, 17, len(data))):
        t.link.send(data[start:end])
        # So that each is read on its own.
        t.link.quiet(0.002)
    t.link.judge(t.link.receive(), 7, Command.DEVICE_GET_INFO)


@register("message.together", vfio("Transport"), "Messages that arrive together are all answered.")
def _together(t: VfioTrial) -> None:
    t.begin()
    one = struct.Struct("<HHIII")
    numbers = set(range(100, 120))
    t.link.send(
        b"".join(
            one.pack(n, Command.DEVICE_GET_INFO, 16 + len(_INFO), 0, 0) + _INFO for n in numbers
        )
    )
    answered = {t.link.receive().number for _ in numbers}
    t.expect(answered == numbers, f"answered {sorted(answered)}")


@register(
    "message.no-reply",
    _SEQUENCE,
    "A message that wants no answer gets none.",
)
def _no_reply(t: VfioTrial) -> None:
    t.begin()
    t.link.message(Command.DEVICE_GET_INFO, _INFO, flags=HeaderFlag.NO_REPLY)
    t.expect(t.link.quiet(QUIET), "answered what wants no answer")
    t.info()


@register("message.once", _SEQUENCE, "A message is answered once, and nothing else is sent.")
def _once(t: VfioTrial) -> None:
    t.begin()
    t.info()
    t.expect(t.link.quiet(QUIET), "sent something that nothing asked for")


@hostile("message.unknown", _ERRORS, "A command that does not exist is refused.")
def _unknown(t: VfioTrial) -> None:
    t.begin()
    t.refused(_UNKNOWN, bytes(8), why="that does not exist")
    t.alive()


@register(
    "message.goes-on",
    _ERRORS,
    "A command that is refused does not end the connection.",
    severity=Severity.SHOULD,
)
def _goes_on(t: VfioTrial) -> None:
    t.begin()
    t.link.ask(_UNKNOWN, bytes(8))
    t.alive()


@hostile("message.answer", _SEQUENCE, "An answer that nothing waits for harms nothing.")
def _unasked_answer(t: VfioTrial) -> None:
    t.begin()
    t.link.message(Command.DMA_READ, bytes(16), flags=HeaderFlag.REPLY)
    t.alive()


@hostile("message.type", _HEADER, "A message that is neither command nor answer harms nothing.")
def _type(t: VfioTrial) -> None:
    t.begin()
    t.link.message(Command.DEVICE_GET_INFO, _INFO, flags=2)
    _survives(t)


@hostile("message.too-short", _HEADER, "A message that says it is shorter than its header.")
def _too_short(t: VfioTrial) -> None:
    t.begin()
    t.link.message(Command.DEVICE_GET_INFO, _INFO, size=8)
    _survives(t)


@hostile("message.too-long", _HEADER, "A message that says it has 4 GiB is not waited for.")
def _too_long(t: VfioTrial) -> None:
    t.begin()
    t.link.message(Command.DEVICE_GET_INFO, _INFO, size=0xFFFFFFFF)
    t.expect(t.link.closed(t.patience), "waits for the rest of a message of 4 GiB, or took it")
    t.reject("closed the connection")


@hostile("message.cut", vfio("Transport"), "A client that goes in the middle of a message.")
def _cut(t: VfioTrial) -> None:
    t.begin()
    t.link.message(Command.REGION_WRITE, bytes(20), size=4096)
    t.link.close()


@hostile("message.half-header", vfio("Transport"), "A client that goes in the middle of a header.")
def _half_header(t: VfioTrial) -> None:
    t.begin()
    t.link.send(bytes(7))
    t.link.close()


@hostile("message.noise", vfio("Transport"), "Noise instead of messages harms nothing.")
def _noise(t: VfioTrial) -> None:
    for _ in range(8):
        link = t.connect()
        with contextlib.suppress(HungUpError):
            link.send(t.random.randbytes(4096))
        link.close()


@hostile("message.random-commands", _ERRORS, "Commands with random payloads harm nothing.")
def _random_commands(t: VfioTrial) -> None:
    t.begin()
    for _ in range(200):
        command = t.random.choice([*range(2, 20), t.random.randrange(1 << 16)])
        if command in (Command.DEVICE_RESET, Command.DMA_READ, Command.DMA_WRITE):
            continue
        payload = t.random.randbytes(t.random.choice([0, 4, 16, 20, 24, 32, 40, 100]))
        try:
            t.link.ask(command, payload)
        except HungUpError:
            t.reconnect()


@hostile("message.descriptors", vfio("Transport"), "Descriptors where none belong harm nothing.")
def _descriptors(t: VfioTrial) -> None:
    t.begin()
    fds = [t.memfd(4096) for _ in range(8)]
    with contextlib.suppress(HungUpError):
        t.link.ask(Command.DEVICE_GET_INFO, _INFO, fds)


@hostile(
    "message.descriptors-closed",
    vfio("Transport"),
    "Descriptors of a client that has gone do not stay open.",
)
def _descriptors_closed(t: VfioTrial) -> None:
    folder = Path(f"/proc/{t.link.peer_pid}/fd")
    try:
        list(folder.iterdir())
    except OSError:
        t.skip("the server's descriptors cannot be seen")
    if t.link.peer_pid == os.getpid():
        t.skip("the server runs in this process")
    t.begin()
    t.reconnect()
    before = len(list(folder.iterdir()))
    fd = t.memfd(1 << 16)
    for at in range(16):
        t.map(at << 20, 4096, fd)
        with contextlib.suppress(HungUpError):
            t.link.ask(Command.DEVICE_GET_INFO, _INFO, [fd])
    t.reconnect()
    t.info()
    after = len(list(folder.iterdir()))
    t.expect(after <= before + 2, f"{after - before} more descriptors are open than before")


def _survives(t: VfioTrial) -> None:
    """Whatever comes: an answer, a hang-up, or nothing."""
    if t.link.closed(min(t.patience, 0.2)):
        t.reject("closed the connection")
