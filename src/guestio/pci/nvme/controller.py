"""An NVMe controller as a PCI function (NVMe 1.4): registers, life cycle, and the rest joined."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from guestio._core.nvme.queues import BROKEN, INVALID_REGISTER, NvmeQueues
from guestio.budgets import (
    NVME_QUEUE_ENTRIES,
    NVME_QUEUES,
    NVME_TRANSFER_BYTES,
    NVME_TURN_BYTES,
    NVME_TURN_SECONDS,
)
from guestio.pci.capabilities import (
    MAX_MSI_VECTORS,
    Capability,
    Msi,
    MsiX,
    PciExpress,
    PowerManagement,
)
from guestio.pci.device import Bar, PciDevice
from guestio.pci.host import PciHost
from guestio.pci.nvme.admin import AdminCommands
from guestio.pci.nvme.identify import Identity
from guestio.pci.nvme.io import IoCommands
from guestio.pci.nvme.logs import Logs
from guestio.pci.nvme.namespace import BLOCK_SIZES, Namespace
from guestio.pci.nvme.spec import (
    CC_ENABLE,
    CC_SHUTDOWN,
    CSTS_FATAL,
    CSTS_READY,
    CSTS_SHUT_DOWN,
    CSTS_SHUTTING_DOWN,
    DO_NOT_RETRY,
    DOORBELLS,
    INVALID_DOORBELL,
    INVALID_DOORBELL_VALUE,
    NAMESPACE_CHANGED,
    PAGE,
    RETRIED,
    VERSION,
    Command,
    Failed,
    Register,
    Status,
)
from guestio.virtio.slices import Work
from guestio.virtio.statistics import RateLimitedLog

IO_THREADS: Final = 4
"""Threads for what may wait for the disk, unless told otherwise."""
MAX_IO_THREADS: Final = 64
IO_QUEUES: Final = 8
"""I/O queue pairs, unless told otherwise."""
SERIAL_BYTES: Final = 20
EVENT_RETRY: Final = 0.01
"""Seconds until an event is tried again for which the admin completion queue had no room."""

_CAP: Final = (
    (NVME_QUEUE_ENTRIES - 1)
    | 1 << 16  # queues are contiguous
    | 40 << 24  # 20 s for becoming ready
    | 1 << 37  # the NVM command set
)
_INTERRUPTS: Final = ("msix", "msi")


class NvmeController(PciDevice):
    """An NVMe 1.4 controller whose namespaces are images.

    Reads and writes go straight between an image and the driver's memory, in the core, as long as
    nothing has to be waited for; what waits for the disk is done by threads. An error of an image
    becomes a status of the command and nothing else.

    Args:
        image: The image of namespace 1.
        namespaces: Those of further ones.
        block_size: Bytes of a block, 512 or 4096; each image is a multiple of it.
        read_only: Refuse writes; the images may be read-only.
        serial: Up to 20 ASCII characters; None derives it from the name of the first image.
        queues: I/O queue pairs, 1 to 63.
        interrupts: "msix" or "msi"; a driver that uses neither has INTA. Hot-unplugging a device
            with MSI-X aborts QEMU 11.1.
        io_threads: Threads that wait for the disk, up to 64. 0: reads wait where they are fetched;
            one is started all the same for flushes and the like.

    Raises:
        DeviceError: An image cannot be opened, or has no such size.
        ValueError: Bad arguments.

    Attributes:
        namespaces: What it serves.

    Threads: all calls are the loop's, but :meth:`update_size` and :meth:`close`.
    """

    vendor_id = 0x1B36  # Red Hat's, of devices without hardware behind them
    device_id = 0x0010  # QEMU's NVMe controller: what drivers know
    class_code = 0x010802

    def __init__(
        self,
        image: str | os.PathLike[str],
        *,
        namespaces: Sequence[str | os.PathLike[str]] = (),
        block_size: int = 512,
        read_only: bool = False,
        serial: str | None = None,
        queues: int = IO_QUEUES,
        interrupts: str = "msix",
        io_threads: int = IO_THREADS,
    ) -> None:
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size {block_size} is not 512 or 4096")
        if not 1 <= queues <= NVME_QUEUES:
            raise ValueError(f"queues {queues} is not in 1..{NVME_QUEUES}")
        if not 0 <= io_threads <= MAX_IO_THREADS:
            raise ValueError(f"io_threads {io_threads} is not in 0..{MAX_IO_THREADS}")
        if interrupts not in _INTERRUPTS:
            raise ValueError(f"interrupts {interrupts!r} is none of {', '.join(_INTERRUPTS)}")
        self._identity = Identity(self.vendor_id, _serial(image, serial))
        self._num_queues, self._io_threads = queues, max(io_threads, 1)
        self.bars = {0: Bar(2 * PAGE, wide=True, width=8)}
        self.interrupts = queues + 1 if interrupts == "msix" else min(queues + 1, MAX_MSI_VECTORS)
        self.capabilities = [
            PowerManagement(),
            PciExpress(),
            _messages(interrupts, self.interrupts),
        ]
        self.namespaces: list[Namespace] = []
        try:
            for number, path in enumerate((image, *namespaces), 1):
                self.namespaces.append(
                    Namespace(
                        path,
                        number,
                        block_size=block_size,
                        read_only=read_only,
                        waits=not io_threads,
                        serial=self._identity.serial,
                    )
                )
        except BaseException:
            for each in self.namespaces:
                each.image.close()
            raise
        self._host: PciHost | None = None
        self._life = 0
        self._starting = False
        self._closed = False
        self._clear_registers()

    def _clear_registers(self) -> None:
        self._cc = self._csts = self._aqa = self._asq = self._acq = 0

    def attached(self, host: PciHost) -> None:
        """Take the host; see :class:`PciDevice`."""
        self._host = host
        self._queues = NvmeQueues(
            host.memory,
            most=self._num_queues + 1,
            command=self._command,
            interrupt=host.interrupts.raise_interrupt,
            fault=self._fault,
            max_transfer=NVME_TRANSFER_BYTES,
            turn_bytes=NVME_TURN_BYTES,
            turn_seconds=NVME_TURN_SECONDS,
        )
        self._queues.origin = host.origin
        self._queues.set_namespaces(each.core for each in self.namespaces)
        self._logs = Logs(self._queues)
        self._io = IoCommands(
            host.memory,
            self.namespaces,
            self._logs.counters,
            threads=self._io_threads,
            call_soon=host.call_soon_threadsafe,
            ended=self._io_ended,
            idle=self._idle,
        )
        self._admin = AdminCommands(
            host.memory,
            self._queues,
            self.namespaces,
            self._identity,
            self._io,
            self._logs,
            num_queues=self._num_queues,
            vectors=self.interrupts,
            ended=self._end,
            post_event=self._post_event,
        )
        host.add_doorbell(0, DOORBELLS, 8 * (self._num_queues + 1), self._queues)
        host.interrupts.changed = self._route

    def _route(self) -> None:
        """Have the core signal the client itself for every vector for which it may."""
        assert self._host is not None
        triggers = map(self._host.interrupts.direct, range(self.interrupts))
        self._queues.set_calls([-1 if each is None else each.fileno() for each in triggers])

    def memory_changed(self) -> None:
        """Go on with what waited for bus mastering; see :class:`PciDevice`."""
        if self._host is not None and self._host.memory.enabled:
            self._host.call_soon_threadsafe(self._go_on)

    def _go_on(self) -> None:
        assert self._host is not None
        if self._queues.resume():
            self._host.call_soon_threadsafe(self._go_on)

    # Registers.

    def read(self, bar: int, offset: int, size: int) -> int:
        """Read a register; see :class:`PciDevice`. Doorbells read as 0."""
        if bar or offset >= DOORBELLS:
            return 0
        registers = bytearray(0x48)
        for register, length, value in (
            (Register.CAP, 8, _CAP),
            (Register.VS, 4, VERSION),
            (Register.INTMS, 4, self._queues.masked),
            (Register.INTMC, 4, self._queues.masked),
            (Register.CC, 4, self._cc),
            (Register.CSTS, 4, self._csts),
            (Register.AQA, 4, self._aqa),
            (Register.ASQ, 8, self._asq),
            (Register.ACQ, 8, self._acq),
        ):
            registers[register : register + length] = value.to_bytes(length, "little")
        return int.from_bytes(registers[offset : offset + size], "little")

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write a register; see :class:`PciDevice`."""
        if bar:
            return
        if offset >= DOORBELLS:
            self._fault(INVALID_REGISTER, f"{size} bytes at {offset:#x} are no doorbell")
            return
        if size == 8:
            self._write_word(offset, value & 0xFFFFFFFF)
            self._write_word(offset + 4, value >> 32)
        elif size == 4:
            self._write_word(offset, value)
        else:
            self._say("%d bytes written at %#x: registers have four or eight", size, offset)

    def _write_word(self, offset: int, value: int) -> None:
        if offset == Register.CC:
            self._write_cc(value)
        elif offset == Register.INTMS:
            self._queues.mask(value)
        elif offset == Register.INTMC:
            self._queues.unmask(value)
        elif self._cc & CC_ENABLE:
            # The admin queue's registers must not change while it is in use.
            if offset in range(Register.AQA, Register.ACQ + 8):
                self._say("the driver writes register %#x of an enabled controller", offset)
        elif offset == Register.AQA:
            self._aqa = value & 0x0FFF0FFF
        elif offset == Register.ASQ:
            self._asq = self._asq & ~0xFFFFFFFF | value & ~(PAGE - 1)
        elif offset == Register.ASQ + 4:
            self._asq = self._asq & 0xFFFFFFFF | value << 32
        elif offset == Register.ACQ:
            self._acq = self._acq & ~0xFFFFFFFF | value & ~(PAGE - 1)
        elif offset == Register.ACQ + 4:
            self._acq = self._acq & 0xFFFFFFFF | value << 32

    def _write_cc(self, value: int) -> None:
        before, self._cc = self._cc, value & 0x00FFFFF1
        if value & CC_ENABLE and not before & CC_ENABLE:
            self._admin.set_sizes(value >> 16 & 15, value >> 20 & 15)
            self._enable()
        elif before & CC_ENABLE and not value & CC_ENABLE:
            self._end_life()
        elif value & CC_ENABLE:
            # Page size, command set and arbitration stay as they were; entry sizes may be chosen
            # before I/O queues are made.
            self._admin.set_sizes(value >> 16 & 15, value >> 20 & 15)
        if value & CC_SHUTDOWN and not before & CC_SHUTDOWN:
            self._shut_down()

    def _enable(self) -> None:
        # 4 KiB pages, the NVM command set, round robin: what CAP allows.
        why = ""
        if self._cc >> 4 & 0x3FF:
            why = f"CC is {self._cc:#x}"
        elif not self._aqa & 0xFFF or not self._aqa >> 16:
            why = f"AQA is {self._aqa:#x}"
        elif max(self._asq, self._acq) > (1 << 64) - 64 * NVME_QUEUE_ENTRIES * 4:
            why = f"the admin queues are at {self._asq:#x} and {self._acq:#x}"
        if why:
            self._say("the controller cannot be enabled: %s", why)
            self._csts |= CSTS_FATAL
        elif self._io.busy:
            # What a driver before had begun must not write to the image after this one has.
            self._starting = True
        else:
            self._become_ready()

    def _idle(self) -> None:
        if self._starting and not self._io.busy:
            self._become_ready()

    def _become_ready(self) -> None:
        self._starting = False
        self._queues.create_completion_queue(0, self._acq, (self._aqa >> 16) + 1, 0)
        self._queues.create_submission_queue(0, self._asq, (self._aqa & 0xFFF) + 1, 0)
        self._csts |= CSTS_READY

    def _end_life(self) -> None:
        """Stop using the driver's memory: nothing is completed any more."""
        if self._csts & CSTS_READY and not self._csts & CSTS_SHUT_DOWN:
            self._logs.counters.unsafe_shutdowns += 1
        self._life += 1
        self._starting = False
        self._queues.reset()
        self._io.forget()
        self._io.write_through = False
        self._admin.reset()
        self._csts = 0

    def reset(self) -> None:
        """Become as at first; see :class:`PciDevice`."""
        if self._host is not None:
            self._end_life()
        self._clear_registers()

    def _shut_down(self) -> None:
        self._csts = self._csts & ~(CSTS_SHUT_DOWN | CSTS_SHUTTING_DOWN) | CSTS_SHUTTING_DOWN
        life = self._life

        def work() -> Work:
            try:
                yield from self._io.flush_all()
            finally:
                assert self._host is not None
                self._host.call_soon_threadsafe(done)
            return Status.SUCCESS

        def done() -> None:
            if life == self._life:
                self._csts = self._csts & ~CSTS_SHUTTING_DOWN | CSTS_SHUT_DOWN

        self._io.background(work())

    # Commands.

    def _command(self, queue: int, data: bytes) -> None:
        command = Command(queue, data, self._life)
        try:
            (self._io if queue else self._admin).begin(command)
        except Failed as failed:
            self._end(command, failed.status, 0, failed.place)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            self._host_log().report("an NVMe command failed", trace=True)
            self._end(command, Status.INTERNAL, 0)

    def _io_ended(self, command: Command, status: int, place: int | None) -> None:
        if command.queue:
            self._end(command, status, 0, place)

    def _end(self, command: Command, status: int, result: int, place: int | None = None) -> None:
        if command.life != self._life:
            # A reset came while the client was asked for memory: nothing is completed any more.
            return
        if status:
            self._logs.note_error(command, _final(status), place)
        self._queues.complete(command.queue, command.cid, _final(status), result)
        self._admin.look_at_deleted(command.queue)

    def _post_event(self, command: Command, status: int, result: int) -> bool:
        if self._queues.complete(0, command.cid, _final(status), result, counted=False):
            return True
        assert self._host is not None
        self._host.call_later(EVENT_RETRY, self._admin.try_again)
        return False

    def _fault(self, kind: int, what: str) -> None:
        self._say("%s", what)
        if kind == BROKEN:
            self._csts |= CSTS_FATAL
            return
        self._logs.note_error(None, Status.INVALID_FIELD)
        if self._csts & CSTS_READY:
            event = INVALID_DOORBELL if kind == INVALID_REGISTER else INVALID_DOORBELL_VALUE
            self._admin.report(event)

    def _say(self, text: str, *args: object) -> None:
        self._host_log().report("NVMe: " + text, *args)

    def _host_log(self) -> RateLimitedLog:
        assert self._host is not None
        return self._host.log

    # The outside.

    def update_size(self) -> None:
        """Take over the sizes that the images have now, and tell the driver of it.

        To be called after an image was enlarged or cut, from any thread.

        Raises:
            DeviceError: An image has no such size; its namespace stays as it was.
        """
        changed = []
        try:
            for each in self.namespaces:
                before = each.image.size
                if each.image.update_size() != before:
                    changed.append(each.number)
        finally:
            if changed and self._host is not None:
                self._host.call_soon_threadsafe(lambda: self._tell_changed(changed))

    def _tell_changed(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._logs.note_changed(number)
        self._admin.report(NAMESPACE_CHANGED)

    def close(self) -> None:
        """Finish what is under way, then close the images. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._host is not None:
            self._io.close()
            return
        for each in self.namespaces:
            each.image.close()


def _final(status: int) -> int:
    """A status as it is posted: with the advice not to try again where that would not help."""
    return status | DO_NOT_RETRY if status and status not in RETRIED else status


def _serial(image: str | os.PathLike[str], serial: str | None) -> str:
    path = os.fspath(image)
    text = os.path.basename(path)[:SERIAL_BYTES] if serial is None else serial  # noqa: PTH119 - a name may be bytes
    made = text.encode("ascii", "replace").decode()
    if len(made) > SERIAL_BYTES:
        raise ValueError(f"serial {text!r} is longer than {SERIAL_BYTES} bytes")
    return made


def _messages(interrupts: str, vectors: int) -> Capability:
    if interrupts == "msix":
        return MsiX(vectors)
    return Msi(1 << (vectors - 1).bit_length())
