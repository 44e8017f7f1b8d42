"""QEMU's virtio-iommu, without a guest: its registers are reached by qtest commands.

QEMU runs with a firmware that only halts, so there is no guest. (Debian's QEMU has no accelerator
``qtest``, but every QEMU has the commands.) Its RAM is a file that this process maps too: rings and
buffers are read and written there, registers of PCI functions by commands on a socket. Behind the
IOMMU are two ``edu`` devices, QEMU's teaching device, whose DMA engine makes the accesses of
endpoints. Its timer of 100 ms runs on the virtual clock, which leaps to the next timer while the
processor is halted.

Sources: QEMU docs/devel/qtest.rst (commands), docs/specs/edu.rst (registers), virtio 1.4 section
4.1 (the PCI transport), PCI Local Bus 3.0 section 3.2.2.3.2 (configuration mechanism #1).
"""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from guestio.errors import DeviceError
from guestio.faults.outcomes import AbsentError, FailError, OutcomeError, SilentError
from guestio.faults.virtio_iommu.driver import DMA_BYTES, Carrier
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.virtio.device import Status
from guestio.virtio.layout import RingLayout

RAM_BYTES: Final = 64 << 20
ENDPOINTS: Final = (0x10, 0x18)
"""Ids of the ``edu`` devices at 00:02.0 and 00:03.0: their bus, device and function numbers."""

_START: Final = 20.0
_LINE: Final = 4096
_IOMMU_SLOT: Final = 1
_IOMMU_ID: Final = 0x10571AF4
_BAR_SPACE: Final = 0xE0000000
_MAX_BAR: Final = 1 << 24
_COMMAND_MEMORY_AND_MASTER: Final = 6
_CAP_VENDOR: Final = 9
_COMMON, _NOTIFY, _DEVICE = 1, 2, 4
_CONFIG_BYTES: Final = 40

_EDU_SOURCE, _EDU_DESTINATION, _EDU_COUNT, _EDU_COMMAND = 0x80, 0x88, 0x90, 0x98
_EDU_BUFFER: Final = 0x40000
_EDU_START, _EDU_TO_MEMORY = 1, 2

_FIRMWARE_BYTES: Final = 1 << 16
_RESET_VECTOR: Final = 16
"""Bytes from the end of the firmware to where the processor begins."""
_HALT: Final = b"\xfa\xf4\xeb\xfd"
"""x86: cli; hlt; jmp to the hlt."""


class Qtest:
    """A connection to a QEMU that waits for qtest commands. For one thread.

    Args:
        sock: The socket that QEMU connected to.
        patience: Seconds that an answer may take.

    Attributes:
        patience: Seconds that an answer may take.

    Its methods raise SilentError if QEMU does not answer in time, AbsentError if it is gone.
    """

    def __init__(self, sock: socket.socket, patience: float) -> None:
        self._sock = sock
        self.patience = patience
        self._came = b""
        self._silent = False

    def command(self, *words: str | int) -> int:
        """Run a command; the number that it answers, or 0."""
        if self._silent:
            # Its answer would be taken for that of this one.
            raise SilentError("QEMU does not answer since an earlier command")
        line = " ".join(word if isinstance(word, str) else hex(word) for word in words)
        deadline = time.monotonic() + self.patience
        try:
            self._sock.settimeout(self.patience)
            self._sock.sendall(line.encode() + b"\n")
            while True:
                answer = self._line(deadline)
                # What is not asked for is an interrupt.
                if not answer.startswith("IRQ "):
                    break
        except TimeoutError:
            self._silent = True
            raise SilentError(f"QEMU does not answer {line!r} in {self.patience:g} s") from None
        except OSError as error:
            raise AbsentError(f"QEMU is gone: {error.strerror}") from None
        if not answer.startswith("OK"):
            raise FailError(f"QEMU answers {line!r} with {answer!r}")
        words_of_answer = answer.split()
        return int(words_of_answer[1], 0) if len(words_of_answer) > 1 else 0

    def _line(self, deadline: float) -> str:
        while b"\n" not in self._came:
            self._sock.settimeout(max(deadline - time.monotonic(), 0.001))
            more = self._sock.recv(_LINE)
            if not more:
                raise AbsentError("QEMU has closed its connection")
            self._came += more
            if len(self._came) > 2 * _LINE:
                raise FailError("QEMU sends a line that does not end")
        line, _, self._came = self._came.partition(b"\n")
        return line.decode("ascii", "replace").strip()

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()


class PciFunction:
    """One PCI function on bus 0, whose BARs are given addresses.

    Args:
        qtest: The connection.
        slot: Its device number.
        base: Where its BARs may lie, from there on.

    Attributes:
        end: The first address behind its BARs.
    """

    def __init__(self, qtest: Qtest, slot: int, base: int) -> None:
        self._qtest = qtest
        self._slot = slot
        self._bars: dict[int, int] = {}
        self.end = base
        self._place_bars()
        self.write(4, self.read(4) & 0xFFFF | _COMMAND_MEMORY_AND_MASTER)

    def _point_at(self, offset: int) -> None:
        self._qtest.command("outl", 0xCF8, 1 << 31 | self._slot << 11 | offset & 0xFC)

    def read(self, offset: int) -> int:
        """The four bytes of configuration space at a multiple of four."""
        self._point_at(offset)
        return self._qtest.command("inl", 0xCFC)

    def write(self, offset: int, value: int) -> None:
        """Write four bytes of configuration space."""
        self._point_at(offset)
        self._qtest.command("outl", 0xCFC, value)

    def byte(self, offset: int) -> int:
        """One byte of configuration space."""
        return self.read(offset) >> 8 * (offset & 3) & 0xFF

    def _place_bars(self) -> None:
        index = 0
        while index < 6:
            at = 0x10 + 4 * index
            kind = self.read(at)
            wide = kind & 7 == 4
            self.write(at, 0xFFFFFFFF)
            mask = self.read(at) & ~0xF & 0xFFFFFFFF
            size = (1 << 32) - mask
            if mask and not kind & 1 and size <= _MAX_BAR:
                place = -(-self.end // size) * size
                self.write(at, place)
                if wide:
                    self.write(at + 4, 0)
                self._bars[index] = place
                self.end = place + size
            index += 2 if wide else 1

    def bar(self, index: int) -> int:
        """Where a BAR is.

        Raises:
            FailError: The function has no such BAR.
        """
        if index not in self._bars:
            raise FailError(f"the PCI function in slot {self._slot} has no BAR {index}")
        return self._bars[index]

    def capabilities(self) -> list[int]:
        """Where the capabilities are."""
        found: list[int] = []
        at = self.byte(0x34) & 0xFC
        while at and at not in found:
            found.append(at)
            at = self.byte(at + 1) & 0xFC
        return found


class QemuCarrier(Carrier):
    """QEMU's virtio-iommu and two ``edu`` devices, in a QEMU that waits for commands.

    Args:
        qtest: The connection.
        memory: Its RAM.
        patience: Seconds that a transfer of an ``edu`` device may take.
    """

    endpoints = ENDPOINTS

    def __init__(self, qtest: Qtest, memory: GuestRegionCollection, patience: float) -> None:
        self._qtest = qtest
        self._patience = patience
        self.memory = memory
        base = _BAR_SPACE
        iommu = PciFunction(qtest, _IOMMU_SLOT, base)
        if iommu.read(0) != _IOMMU_ID:
            raise FailError(f"slot {_IOMMU_SLOT} has {iommu.read(0):#x}, no virtio-iommu")
        base = iommu.end
        self._edus: dict[int, int] = {}
        for endpoint in ENDPOINTS:
            function = PciFunction(qtest, endpoint >> 3, base)
            base = function.end
            self._edus[endpoint] = function.bar(0)
        self._find(iommu)
        self.offered = self._features()
        self.queue_size = self._queue_size()

    def _find(self, function: PciFunction) -> None:
        """Where the structures of the transport are (section 4.1.4)."""
        places: dict[int, int] = {}
        self._multiplier = 0
        for at in function.capabilities():
            kind = function.byte(at + 3)
            if function.byte(at) != _CAP_VENDOR or kind in places:
                continue
            if kind in {_COMMON, _NOTIFY, _DEVICE}:
                places[kind] = function.bar(function.byte(at + 4)) + function.read(at + 8)
            if kind == _NOTIFY:
                self._multiplier = function.read(at + 16)
        missing = {_COMMON, _NOTIFY, _DEVICE} - places.keys()
        if missing:
            raise FailError(f"the virtio-iommu has no capability of type {sorted(missing)}")
        self._common = places[_COMMON]
        self._notify = places[_NOTIFY]
        self._device = places[_DEVICE]
        self._doorbells: list[int] = []

    def _features(self) -> int:
        bits = 0
        for half in range(2):
            self._qtest.command("writel", self._common, half)
            bits |= self._qtest.command("readl", self._common + 4) << 32 * half
        return bits

    def _queue_size(self) -> int:
        sizes = []
        for queue in range(2):
            self._qtest.command("writew", self._common + 22, queue)
            sizes.append(self._qtest.command("readw", self._common + 24))
        return min(sizes)

    def _status(self, status: int) -> None:
        self._qtest.command("writeb", self._common + 20, status)

    def reset(self) -> None:
        """See :class:`Carrier`."""
        self._status(0)
        if self._qtest.command("readb", self._common + 20):
            raise FailError("the device status is not 0 after a reset")

    def start(self, features: int, rings: Sequence[RingLayout]) -> None:
        """See :class:`Carrier`."""
        write, common = self._qtest.command, self._common
        began = Status.ACKNOWLEDGE | Status.DRIVER
        self._status(began)
        for half in range(2):
            write("writel", common + 8, half)
            write("writel", common + 12, features >> 32 * half & 0xFFFFFFFF)
        self._status(began | Status.FEATURES_OK)
        if not self._qtest.command("readb", common + 20) & Status.FEATURES_OK:
            raise FailError(f"the device does not accept features {features:#x} of its own")
        self._doorbells = []
        for queue, ring in enumerate(rings):
            write("writew", common + 22, queue)
            write("writew", common + 24, ring.size)
            write("writew", common + 26, 0xFFFF)
            for at, address in ((32, ring.desc), (40, ring.avail), (48, ring.used)):
                write("writel", common + at, address & 0xFFFFFFFF)
                write("writel", common + at + 4, address >> 32)
            offset = self._qtest.command("readw", common + 30)
            self._doorbells.append(self._notify + offset * self._multiplier)
            write("writew", common + 28, 1)
        self._status(began | Status.FEATURES_OK | Status.DRIVER_OK)

    def notify(self, queue: int) -> None:
        """See :class:`Carrier`."""
        self._qtest.command("writew", self._doorbells[queue], queue)

    def run(self) -> None:
        """See :class:`Carrier`."""
        # An answer says that QEMU's main loop is alive, which also serves the queues.
        self._qtest.command("readb", self._common + 21)

    def needs_reset(self) -> bool:
        """See :class:`Carrier`."""
        return bool(self._qtest.command("readb", self._common + 20) & Status.NEEDS_RESET)

    def config(self) -> bytes:
        """See :class:`Carrier`."""
        words = [
            self._qtest.command("readl", self._device + at) for at in range(0, _CONFIG_BYTES, 4)
        ]
        return struct.pack(f"<{len(words)}I", *words)

    def write_config(self, offset: int, data: bytes) -> None:
        """See :class:`Carrier`."""
        for at, byte in enumerate(data):
            self._qtest.command("writeb", self._device + offset + at, byte)

    def dma_read(self, endpoint: int, address: int, length: int) -> None:
        """See :class:`Carrier`."""
        self._transfer(endpoint, address, _EDU_BUFFER, length, 0)

    def dma_write(self, endpoint: int, address: int, length: int) -> None:
        """See :class:`Carrier`."""
        self._transfer(endpoint, _EDU_BUFFER, address, length, _EDU_TO_MEMORY)

    def _transfer(
        self, endpoint: int, source: int, destination: int, length: int, direction: int
    ) -> None:
        if not 0 < length <= DMA_BYTES:
            raise ValueError(f"an edu device moves 1 to {DMA_BYTES} bytes, not {length}")
        edu = self._edus[endpoint]
        write = self._qtest.command
        write("writeq", edu + _EDU_SOURCE, source)
        write("writeq", edu + _EDU_DESTINATION, destination)
        write("writeq", edu + _EDU_COUNT, length)
        write("writeq", edu + _EDU_COMMAND, _EDU_START | direction)
        deadline = time.monotonic() + self._patience
        while self._qtest.command("readq", edu + _EDU_COMMAND) & _EDU_START:
            if time.monotonic() >= deadline:
                raise SilentError(f"a transfer of an edu device takes over {self._patience:g} s")


class QemuTarget:
    """A QEMU process with a virtio-iommu, started again when it has ended.

    Args:
        program: QEMU, such as ``qemu-system-x86_64``.
        patience: Seconds that it may take for an answer.

    Attributes:
        path: What it is called in reports.
    """

    def __init__(self, program: str, patience: float) -> None:
        self.path = program
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None
        self._open = contextlib.ExitStack()
        self._carrier: QemuCarrier | None = None
        self._died: str | None = None

    def start(self) -> None:
        """Start QEMU if it does not run.

        Raises:
            DeviceError: It cannot be started.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self._note_death()
        self._open.close()
        with contextlib.ExitStack() as opened:
            backing = Backing.memfd(RAM_BYTES, "guestio-qtest")
            opened.callback(_let_go, backing)
            assert backing.fd is not None
            directory = opened.enter_context(tempfile.TemporaryDirectory(prefix="guestio-qtest-"))
            listener = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            place = str(Path(directory) / "qtest.sock")
            listener.bind(place)
            listener.listen(1)
            firmware = Path(directory) / "halt.bin"
            code = _HALT.ljust(_RESET_VECTOR, b"\xf4")
            firmware.write_bytes(code.rjust(_FIRMWARE_BYTES, b"\xf4"))
            self._process = self._launch(place, firmware, backing.fd)
            opened.callback(self._end)
            qtest = Qtest(self._accepted(listener, Path(directory) / "complaints"), _START)
            opened.callback(qtest.close)
            memory = GuestRegionCollection.from_regions([MmapRegion(0, backing, name="ram")])
            try:
                self._carrier = QemuCarrier(qtest, memory, self._patience)
            except OutcomeError as error:
                raise DeviceError(f"{self.path} cannot be driven by qtest: {error}") from error
            # So long only while it starts.
            qtest.patience = self._patience
            self._open = opened.pop_all()

    def _launch(self, place: str, firmware: Path, ram: int) -> subprocess.Popen[bytes]:
        words = [self.path, "-nodefaults", "-display", "none", "-accel", "tcg"]
        words += ["-icount", "shift=0,sleep=off", "-bios", str(firmware)]
        words += ["-qtest", f"unix:{place}", "-qtest-log", "none"]
        words += ["-object", f"memory-backend-file,id=ram,size={RAM_BYTES},share=on"]
        words[-1] += f",mem-path=/proc/self/fd/{ram}"
        words += [
            "-m",
            f"{RAM_BYTES >> 20}M",
            "-machine",
            "q35,hpet=off,pit=off,memory-backend=ram",
        ]
        words += ["-device", f"virtio-iommu-pci,addr={_IOMMU_SLOT:02x}.0"]
        for endpoint in ENDPOINTS:
            words += ["-device", f"edu,addr={endpoint >> 3:02x}.0,dma_mask=0xffffffffffffffff"]
        complaints = (firmware.parent / "complaints").open("wb")
        try:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                pass_fds=(ram,),
            )
        except OSError as error:
            raise DeviceError(f"cannot start {self.path}: {error.strerror}") from error
        finally:
            complaints.close()

    def _accepted(self, listener: socket.socket, complaints: Path) -> socket.socket:
        assert self._process is not None
        deadline = time.monotonic() + _START
        listener.settimeout(0.05)
        while True:
            try:
                return listener.accept()[0]
            except TimeoutError:
                status = self._process.poll()
                if status is not None:
                    said = complaints.read_text(errors="replace").strip()[-_LINE:]
                    raise DeviceError(
                        f"{self.path} ended with status {status}; it must be QEMU 7.2 or newer "
                        f"with q35, virtio-iommu-pci and edu. It said: {said}"
                    ) from None
                if time.monotonic() >= deadline:
                    raise DeviceError(f"{self.path} does not connect in {_START:g} s") from None

    @property
    def replaceable(self) -> bool:
        """It can be started again."""
        return True

    def connect(self, patience: float) -> QemuCarrier:
        """The devices of the running QEMU."""
        self.start()
        assert self._carrier is not None
        return self._carrier

    def take_death(self) -> str | None:
        """How QEMU died since this was last asked, if by a signal."""
        self._note_death()
        died, self._died = self._died, None
        return died

    def _note_death(self) -> None:
        if self._process is not None and (status := self._process.poll()) is not None:
            if status < 0:
                self._died = f"killed by {signal.Signals(-status).name}"
            else:
                self._died = f"ended with status {status}"
            self._process = None

    def ended(self, seconds: float) -> bool:
        """Wait so long for QEMU to end; whether it has."""
        if self._process is None:
            return True
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _end(self) -> None:
        """End QEMU, which may not listen to anything any more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End QEMU, and give its memory back."""
        self._carrier = None
        self._open.close()


def _let_go(backing: Backing) -> None:
    # A check that ended with an error still refers to the memory; it goes when that does.
    with contextlib.suppress(BufferError):
        backing.close()
