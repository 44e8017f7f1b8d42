"""A vfio-user server that is wrong in one way: a proxy that changes what another one says.

Each fault changes a message of the client on its way, or an answer. Everything else is what the
server behind it does.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from guestio.vfio_user.messages import Command

C = Command
REPLY, NO_REPLY, ERROR = 1, 1 << 4, 1 << 5
CONFIG = 7


@dataclass(frozen=True)
class M:
    """A message."""

    number: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    def access(self) -> tuple[int, int, int]:
        """Offset, region and length of an access."""
        return struct.unpack_from("<QII", self.payload)  # type: ignore[return-value] # three

    def touches(self, offset: int, length: int, region: int = CONFIG) -> bool:
        """Whether it is an access to such bytes."""
        if self.command not in (C.REGION_READ, C.REGION_WRITE) or len(self.payload) < 16:
            return False
        start, index, count = self.access()
        return index == region and start < offset + length and offset < start + count

    def ok(self, payload: bytes = b"") -> M:
        """An answer that says success."""
        return replace(self, flags=REPLY, error=0, payload=payload, fds=[])


Outcome = M | list[M] | None
"""What goes on: one message, several, or none."""


@dataclass(frozen=True)
class Fault:
    """What is changed: commands before the server sees them, and its answers.

    ``command`` may return an answer, which the server is not asked for then.
    """

    command: Callable[[M], Outcome] = lambda m: m
    answer: Callable[[M, M], Outcome] = lambda _, m: m
    hang_up: Callable[[M, M], bool] = lambda _, __: False


class BrokenServer:
    """A proxy in a thread.

    Args:
        path: Where it listens.
        behind: Where the server listens.
        fault: What is wrong.
    """

    def __init__(self, path: str | Path, behind: str, fault: Fault) -> None:
        self._behind, self._fault = behind, fault
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._run, name="broken-server")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        self._listener.close()
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            with client, server, contextlib.suppress(OSError, EOFError):
                client.settimeout(20)
                server.settimeout(20)
                server.connect(self._behind)
                while self._step(client, server):
                    pass

    def _step(self, client: socket.socket, server: socket.socket) -> bool:
        asked = _receive(client)
        try:
            sent = self._fault.command(asked)
            answered = [m for m in _listed(sent) if m.flags & REPLY]
            for message in _listed(sent):
                if not message.flags & REPLY:
                    _send(server, message)
            if answered:
                for message in answered:
                    _send(client, message)
                return True
            if sent is None or asked.flags & NO_REPLY:
                if sent is not None:
                    self._answer(client, asked, asked.ok())
                return True
            answer = _receive(server)
        finally:
            for fd in asked.fds:
                os.close(fd)
        try:
            if self._fault.hang_up(asked, answer):
                return False
            self._answer(client, asked, answer)
        finally:
            for fd in answer.fds:
                os.close(fd)
        return True

    def _answer(self, client: socket.socket, asked: M, answer: M) -> None:
        changed = _listed(self._fault.answer(asked, answer))
        if asked.flags & NO_REPLY and changed == [answer]:
            return
        for message in changed:
            _send(client, message)


def _listed(outcome: Outcome) -> list[M]:
    if outcome is None:
        return []
    return outcome if isinstance(outcome, list) else [outcome]


def _receive(sock: socket.socket) -> M:
    head, fds, _, _ = socket.recv_fds(sock, 16, 16)
    while 0 < len(head) < 16:
        head += sock.recv(16 - len(head))
    if not head:
        raise EOFError
    number, command, size, flags, error = struct.unpack("<HHIII", head)
    payload = b""
    while len(payload) < size - 16:
        more = sock.recv(min(size - 16 - len(payload), 65536))
        if not more:
            raise EOFError
        payload += more
    return M(number, command, flags, error, payload, list(fds))


def _send(sock: socket.socket, m: M) -> None:
    head = struct.pack("<HHIII", m.number, m.command, 16 + len(m.payload), m.flags, m.error)
    socket.send_fds(sock, [head + m.payload], m.fds)


# What can be wrong


def answers(command: int, change: Callable[[M], Outcome], *, failed: bool = False) -> Fault:
    """Change the answers to a command: those that succeed, or those that fail."""

    def answer(asked: M, m: M) -> Outcome:
        return change(m) if asked.command == command and bool(m.error) == failed else m

    return Fault(answer=answer)


def number_at(command: int, offset: int, value: int, size: int = 4) -> Fault:
    """Another number in the answers to a command."""
    data = value.to_bytes(size, "little")

    def change(m: M) -> M:
        return replace(m, payload=m.payload[:offset] + data + m.payload[offset + size :])

    return answers(command, change)


def reads(offset: int, value: int, size: int) -> Fault:
    """Other bytes where configuration space is read."""
    data = value.to_bytes(size, "little")

    def answer(asked: M, m: M) -> M:
        if asked.command != C.REGION_READ or m.error or not asked.touches(offset, size):
            return m
        start, _, count = asked.access()
        content = bytearray(m.payload[16:])
        for at in range(max(start, offset), min(start + count, offset + size)):
            content[at - start] = data[at - offset]
        return replace(m, payload=m.payload[:16] + bytes(content))

    return Fault(answer=answer)


def keeps(*commands: int, when: Callable[[M], bool] = lambda _: True) -> Fault:
    """Say that a command is done, and do nothing."""

    def command(m: M) -> Outcome:
        if m.command not in commands or not when(m):
            return m
        if m.flags & NO_REPLY:
            return None
        return m.ok(m.payload[:16] if m.command == C.REGION_WRITE else b"")

    return Fault(command=command)


def succeeds(command: int, payload: bytes | None = None) -> Fault:
    """Say that a command which was refused is done."""
    return Fault(
        answer=lambda asked, m: (
            m.ok(asked.payload if payload is None else payload)
            if asked.command == command and m.error
            else m
        )
    )


def refuses(command: int, when: Callable[[M], bool] = lambda _: True) -> Fault:
    """Refuse an honest command."""
    return Fault(
        command=lambda m: (
            replace(m, flags=REPLY | ERROR, error=22, payload=b"", fds=[])
            if m.command == command and when(m)
            else m
        )
    )


class Remembering(Fault):
    """Configuration space of which some bytes that are read-only keep what was written."""

    def __init__(self, offset: int, size: int) -> None:
        kept: dict[int, int] = {}

        def command(m: M) -> M:
            if m.command == C.REGION_WRITE and m.touches(offset, size):
                start, _, count = m.access()
                for at in range(start, start + count):
                    if offset <= at < offset + size:
                        kept[at] = m.payload[16 + at - start]
            return m

        def answer(asked: M, m: M) -> M:
            if asked.command != C.REGION_READ or m.error or not asked.touches(offset, size):
                return m
            start, _, count = asked.access()
            content = bytearray(m.payload[16:])
            for at in range(start, start + count):
                content[at - start] = kept.get(at, content[at - start])
            return replace(m, payload=m.payload[:16] + bytes(content))

        super().__init__(command=command, answer=answer)


def with_json(change: Callable[[bytes], bytes]) -> Fault:
    """Other version data."""
    return answers(C.VERSION, lambda m: replace(m, payload=m.payload[:4] + change(m.payload[4:])))


FAULTS: list[tuple[str, str, Fault]] = [
    ("any", "version.answer", number_at(C.VERSION, 2, 7, 2)),
    ("any", "version.minor-zero", number_at(C.VERSION, 2, 1, 2)),
    ("any", "version.later-minor", refuses(C.VERSION, lambda m: m.payload[2] == 9)),
    ("any", "version.data", with_json(lambda data: data.rstrip(b"\0"))),
    ("any", "version.capabilities", with_json(lambda d: d.replace(b"65536", b'"all"'))),
    ("any", "version.no-data", refuses(C.VERSION, lambda m: len(m.payload) == 4)),
    ("any", "version.bad-major", succeeds(C.VERSION, bytes(4))),
    ("any", "version.again", succeeds(C.VERSION, bytes(4))),
    ("any", "message.id", Fault(answer=lambda _, m: replace(m, number=m.number & 0xFF))),
    ("any", "message.error", Fault(answer=lambda _, m: replace(m, error=0))),
    (
        "any",
        "message.no-reply",
        Fault(answer=lambda asked, m: replace(m, payload=bytes(16)) if asked.flags & 16 else m),
    ),
    (
        "any",
        "message.once",
        Fault(answer=lambda asked, m: [m, m] if asked.command == C.DEVICE_GET_INFO else m),
    ),
    ("any", "message.unknown", succeeds(0x7E57, b"")),
    ("any", "message.goes-on", Fault(hang_up=lambda asked, _: asked.command == 0x7E57)),
    ("any", "info.answer", number_at(C.DEVICE_GET_INFO, 0, 0)),
    ("any", "info.pci", number_at(C.DEVICE_GET_INFO, 4, 1)),
    ("any", "info.counts", number_at(C.DEVICE_GET_INFO, 8, 3)),
    ("any", "info.short", succeeds(C.DEVICE_GET_INFO, bytes(16))),
    ("any", "region.each", number_at(C.DEVICE_GET_REGION_INFO, 8, 2)),
    ("any", "region.flags", number_at(C.DEVICE_GET_REGION_INFO, 4, 0)),
    ("any", "region.config", number_at(C.DEVICE_GET_REGION_INFO, 16, 100, 8)),
    ("any", "region.mapped", number_at(C.DEVICE_GET_REGION_INFO, 4, 7)),
    ("any", "region.unknown", succeeds(C.DEVICE_GET_REGION_INFO, bytes(32))),
    ("any", "read.answer", answers(C.REGION_READ, lambda m: replace(m, payload=m.payload[:-1]))),
    ("any", "read.bad-past-end", succeeds(C.REGION_READ, bytes(20))),
    ("any", "write.answer", number_at(C.REGION_WRITE, 12, 99)),
    ("any", "write.effect", keeps(C.REGION_WRITE)),
    ("any", "write.posted", keeps(C.REGION_WRITE, when=lambda m: bool(m.flags & NO_REPLY))),
    ("any", "write.bad-past-end", succeeds(C.REGION_WRITE)),
    ("any", "multi.effect", keeps(C.REGION_WRITE_MULTI)),
    ("any", "multi.bad-count", succeeds(C.REGION_WRITE_MULTI)),
    ("any", "config.vendor", reads(0, 0xFFFF, 2)),
    ("any", "config.header", reads(0x0E, 1, 1)),
    ("any", "config.identity-read-only", Remembering(0, 4)),
    ("any", "config.command-bits", Remembering(4, 2)),
    ("any", "config.command", reads(4, 0, 2)),
    ("any", "config.capabilities", reads(0x34, 0x10, 1)),
    ("any", "config.capability-bit", reads(6, 0, 2)),
    ("any", "config.pointer-read-only", Remembering(0x34, 1)),
    ("any", "config.capabilities-read-only", Remembering(0x40, 0x60)),
    ("any", "config.bar-sizes", reads(0x10, 0xFFFFF000, 4)),
    ("any", "config.no-bar", Remembering(0x24, 4)),
    ("any", "config.interrupt-pin", reads(0x3D, 0, 1)),
    ("any", "config.msix-count", number_at(C.DEVICE_GET_IRQ_INFO, 12, 1)),
    ("any", "irq.each", number_at(C.DEVICE_GET_IRQ_INFO, 8, 9)),
    ("any", "irq.eventfd", number_at(C.DEVICE_GET_IRQ_INFO, 4, 0)),
    ("any", "irq.intx", number_at(C.DEVICE_GET_IRQ_INFO, 12, 2)),
    ("any", "irq.unknown", succeeds(C.DEVICE_GET_IRQ_INFO, bytes(16))),
    ("any", "irq.trigger", keeps(C.DEVICE_SET_IRQS)),
    ("any", "irq.disable", keeps(C.DEVICE_SET_IRQS, when=lambda m: m.payload[16:20] == bytes(4))),
    ("any", "irq.bad-past-count", succeeds(C.DEVICE_SET_IRQS, b"")),
    ("any", "dma.map", refuses(C.DMA_MAP)),
    ("any", "dma.no-file", refuses(C.DMA_MAP, lambda m: not m.fds)),
    ("any", "dma.map-again", keeps(C.DMA_UNMAP)),
    ("any", "dma.unmap-all", refuses(C.DMA_UNMAP, lambda m: bool(m.payload[4] & 2))),
    ("any", "dma.bad-empty", succeeds(C.DMA_MAP, b"")),
    ("any", "dma.bad-unmap-all", succeeds(C.DMA_UNMAP, b"")),
    ("any", "reset.command", keeps(C.DEVICE_RESET)),
    ("any", "reset.answer", refuses(C.DEVICE_RESET)),
    ("nvme", "nvme.reset", keeps(C.DEVICE_RESET)),
    ("nvme", "nvme.ready", keeps(C.REGION_WRITE, when=lambda m: m.touches(0x14, 4, 0))),
    ("nvme", "nvme.identify", reads(0, 0x4321, 2)),
    (
        "nvme",
        "nvme.posted-doorbell",
        keeps(C.REGION_WRITE, when=lambda m: bool(m.flags & NO_REPLY)),
    ),
    ("nvme", "nvme.interrupt", keeps(C.DEVICE_SET_IRQS)),
    (
        "nvme",
        "nvme.read-only-kept",
        Fault(
            command=lambda m: (
                replace(m, payload=m.payload[:4] + b"\3" + m.payload[5:])
                if m.command == C.DMA_MAP
                else m
            )
        ),
    ),
    (
        "nvme",
        "nvme.no-master",
        keeps(C.REGION_WRITE, when=lambda m: m.touches(4, 2) and m.payload[16] == 2),
    ),
    ("virtio", "virtio.ids", reads(0, 0x1234, 2)),
    ("virtio", "virtio.reset", keeps(C.REGION_WRITE, when=lambda m: m.payload[16:] == b"\0")),
]
"""A type of device, the check that finds the fault, and the fault."""
