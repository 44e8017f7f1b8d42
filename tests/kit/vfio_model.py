"""A vfio-user client whose every answer is known beforehand, from a model of mapped pages.

The device does DMA where its registers are told to, so that what it reaches is seen in the answers
and in the files of the client. The model is a dictionary of pages, too simple to be wrong.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import time
from typing import Any, Final

from guestio.addr import Permissions
from guestio.errors import GuestioError
from guestio.pci import Bar, CallbackDoorbell, EventfdDoorbell, PciDevice, PciHost
from guestio.vfio_user.channel import Channel, Message
from guestio.vfio_user.connection import Connection
from guestio.vfio_user.messages import Command, HeaderFlag
from guestio.vfio_user.statistics import Statistics
from guestio.virtio.loop import EventLoop
from guestio.virtio.statistics import RateLimitedLog
from tests.kit.serving import WAIT
from tests.kit.vfio_client import PAGE, memory_file

PAGES: Final = 48
"""I/O virtual pages that are used, the last ones of the address space among them."""
FILE_PAGES: Final = 16
FILES: Final = 3
TOP: Final = 2**64 - 16 * PAGE
_HEADER: Final = struct.Struct("<HHIII")
_MAP: Final = struct.Struct("<IIQQQ")
_UNMAP: Final = struct.Struct("<IIQQ")
_ACCESS: Final = struct.Struct("<QII")
_NO_REPLY: Final = int(HeaderFlag.NO_REPLY)
DATA, ADDRESS, STORE, HOLD, RELEASE, HELD = 0, 8, 16, 0x20, 0x24, 0x28
BELLS, BELL_BYTES, COUNTER = 0x800, 64, 0x840


def address_of(page: int) -> int:
    """The address of a page, of which the last 16 are at the end of the address space."""
    return page * PAGE if page < PAGES - 16 else TOP + (page - PAGES + 16) * PAGE


class Probe(PciDevice):
    """Reads and writes memory as its registers say, and notes how its doorbells are rung.

    Register ADDRESS is where; a read of DATA reads as many bytes as are asked for, a write to STORE
    writes as many. HOLD takes a lease on the page and on as many behind it as are written there;
    HELD reads or writes a byte of its last page, RELEASE ends it.

    Attributes:
        lets_go: Whether it lets go of memory that was unmapped too long ago.
    """

    vendor_id, device_id = 0x1234, 0x5678
    bars = {0: Bar(PAGE, width=8)}  # noqa: RUF012 - never changed

    def __init__(self) -> None:
        self.host: PciHost
        self.registers: dict[int, int] = {}
        self.tails: dict[int, int] = {}
        self.held: Any = None
        self.lets_go = False
        self.counter = os.eventfd(0, os.EFD_NONBLOCK)

    def attached(self, host: PciHost) -> None:
        self.host = host
        host.add_doorbell(0, BELLS, BELL_BYTES, CallbackDoorbell(self._rung))
        host.add_doorbell(0, COUNTER, 4, EventfdDoorbell(self.counter))
        host.offer_ioeventfd(0, COUNTER)

    def _rung(self, offset: int, size: int, value: int) -> None:
        self.tails[offset] = value

    def reset(self) -> None:
        self.registers.clear()
        self.release()

    def revoked(self, address: int, size: int) -> None:
        if self.lets_go:
            self.release()

    def release(self) -> None:
        held, self.held = self.held, None
        if held is not None:
            held.close()

    def read(self, bar: int, offset: int, size: int) -> int:
        if offset == DATA:
            found = self.host.memory.read(self.registers.get(ADDRESS, 0), size)
            return int.from_bytes(found, "little")
        if offset == HELD:
            return -1 if self.held is None else self.held.read(self.held.total - PAGE, 1)[0]
        return self.registers.get(offset, 0)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        if offset == STORE:
            self.host.memory.write(self.registers.get(ADDRESS, 0), value.to_bytes(size, "little"))
        elif offset == HOLD:
            self.release()
            address = self.registers.get(ADDRESS, 0) // PAGE * PAGE
            self.held = self.host.memory.gather(address, (1 + value) * PAGE, Permissions.READ_WRITE)
        elif offset == HELD:
            if self.held is not None:
                self.held.write(bytes([value & 255]), self.held.total - PAGE)
        elif offset == RELEASE:
            self.release()
        else:
            self.registers[offset] = value


class SlowConnection(Connection):
    """A connection whose every message takes the way through Python."""

    def _feed_core(self) -> None:
        pass

    def _next(self) -> Message | None:
        return self._channel.recv()


class _Silent(RateLimitedLog):
    """No lines: nearly every one of thousands of messages would be worth one."""

    def report(self, message: str, *args: object, trace: bool | BaseException = False) -> None:
        pass


class Side:
    """A device and its connection in this process, driven by hand.

    Args:
        fast: Whether plain messages are for the core.
        revoke_after: As for a `Server`.
    """

    def __init__(self, *, fast: bool = True, revoke_after: float = 0.0) -> None:
        self.loop, self.device, self.stats = EventLoop(), Probe(), Statistics()
        self.host = PciHost(self.device, self.loop)
        self.host.log = _Silent()
        self.device.attached(self.host)
        ours, self.peer = socket.socketpair()
        self.peer.setblocking(False)
        kind = Connection if fast else SlowConnection
        self.connection = kind(
            Channel(ours),
            self.host,
            self.loop,
            self.stats,
            revoke_after=revoke_after,
            ending=lambda: False,
        )

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Have bytes arrive, with descriptors; what was sent before is handled by and by."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if fds:
                socket.send_fds(self.peer, [data], list(fds))
            else:
                self.peer.sendall(data)

    def settle(self, least: int = 0) -> bytes:
        """Have all that arrived be handled; what was answered, without the descriptors.

        Args:
            least: Bytes of answers that are waited for.
        """
        answer = bytearray()
        until = time.monotonic() + WAIT
        while True:
            while self.loop.pending:
                self.loop.run_once(0)
            more = self.answers()
            answer += more
            if more:
                continue
            if len(answer) >= least or self.connection.closed or time.monotonic() > until:
                return bytes(answer)
            self.loop.run_once(0.05)

    def answers(self) -> bytes:
        """What was sent back so far."""
        found = bytearray()
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while True:
                data, fds, _, _ = socket.recv_fds(self.peer, 1 << 16, 16)
                for fd in fds:
                    os.close(fd)
                if not data:
                    break
                found += data
        return bytes(found)

    def close(self) -> None:
        self.device.release()
        self.connection.close()
        self.peer.close()
        self.loop.close()
        os.close(self.device.counter)


class Campaign:
    """Random messages to a side, each of whose answers is known before it is sent.

    Args:
        choose: Where choices come from.
        side: What is driven; it is negotiated with here.
        waits: Whether an unmap waits until the device lets go of the memory, for longer than that
            takes here. Otherwise it is cut off at once.

    Attributes:
        messages: How many were sent.
    """

    BATCH = 96

    def __init__(self, choose: random.Random, side: Side, *, waits: bool = False) -> None:
        self.choose, self.side, self.waits = choose, side, waits
        self.files = [memory_file(FILE_PAGES * PAGE) for _ in range(FILES)]
        self.read_only = os.open(f"/proc/self/fd/{self.files[0]}", os.O_RDONLY)
        self.contents = [bytearray(FILE_PAGES * PAGE) for _ in range(FILES)]
        for index, content in enumerate(self.contents):
            for page in range(FILE_PAGES):
                content[page * PAGE : (page + 1) * PAGE] = bytes([16 * index + page + 1]) * PAGE
            os.pwrite(self.files[index], content, 0)
        self.sizes = [FILE_PAGES] * FILES
        # A page leads to a file, a page of it, and what is allowed; to no file if that is None.
        self.pages: dict[int, tuple[int | None, int, int]] = {}
        self.starts: dict[int, int] = {}
        self.registers: dict[int, int] = {}
        self.tails: dict[int, int] = {}
        # The pages that the device holds, and where the last one leads to; None once cut off, when
        # it has a page of its own there, which is empty at first.
        self.held: list[int] = []
        self.own = 0
        self.held_place: tuple[int, int] | None = None
        self.asking = False
        self.master = False
        self.asked = 0
        self.number = 0
        self.messages = 0
        self.expected = bytearray()
        self.out = bytearray()
        said = b'{"capabilities":{"max_data_xfer_size":1048576}}'.ljust(214) + b"\0"
        self._send(Command.VERSION, bytes(4) + said)
        self._flush()
        side.settle()
        self.messages = 0
        self.expected.clear()
        self._switch(True)

    def close(self) -> None:
        for fd in (*self.files, self.read_only):
            os.close(fd)

    # What is sent, and what is to come back.

    def _send(
        self,
        command: int,
        payload: bytes,
        fd: int = -1,
        *,
        error: int | bool = False,
        answer: bytes = b"",
        posted: bool = False,
    ) -> None:
        self.number = number = (self.number + 1) & 0xFFFF
        self.messages += 1
        data = (
            _HEADER.pack(number, command, 16 + len(payload), _NO_REPLY if posted else 0, 0)
            + payload
        )
        if fd >= 0:
            self._flush()
            self.side.send(data, (fd,))
        else:
            self.out += data
        if posted:
            return
        if error:
            # Which error is not predicted.
            self.expected += _HEADER.pack(number, command, 16, 0x21, 0)
        else:
            self.expected += _HEADER.pack(number, command, 16 + len(answer), 1, 0) + answer

    def _flush(self) -> None:
        if self.out:
            self.side.send(bytes(self.out))
            self.out.clear()

    def run(self, batches: int) -> None:
        """Send so many batches, and compare all that comes back and all memory."""
        for _ in range(batches):
            for _ in range(self.choose.randrange(1, self.BATCH)):
                self.step()
            self.check()

    def check(self) -> None:
        """Have all be handled, and compare."""
        self._flush()
        got = bytearray(self.side.settle(len(self.expected)))
        at = 0
        while at + 16 <= len(got):
            number, command, size, flags, error = _HEADER.unpack_from(got, at)
            assert bool(flags & 0x20) == bool(error), (number, command, flags, error)
            _HEADER.pack_into(got, at, number, command, size, flags, 0)
            at += size
        if got != self.expected:
            raise AssertionError(self._difference(bytes(got)))
        self.expected.clear()
        assert self.side.device.tails == self.tails, "doorbells were rung otherwise"
        for fd, content, size in zip(self.files, self.contents, self.sizes, strict=True):
            there = os.pread(fd, len(content), 0)
            assert there == content[: size * PAGE], "memory was written that may not be"
        count = len(self.side.connection._dma)
        assert count == len(self.starts), f"{count} mappings, not {len(self.starts)}"

    def _difference(self, got: bytes) -> str:
        at = 0
        wanted = bytes(self.expected)
        while at < min(len(got), len(wanted)):
            size = _HEADER.unpack_from(wanted, at)[2]
            if got[at : at + size] != wanted[at : at + size]:
                break
            at += size
        return f"message {self.messages}: {got[at:][:64].hex()} instead of {wanted[at:][:64].hex()}"

    # Messages.

    def step(self) -> None:
        """Send one message, or a few that belong together."""
        what = self.choose.randrange(52)
        if what < 10:
            self._map()
        elif what < 18:
            self._unmap()
        elif what < 34:
            self._ring()
        elif what < 38:
            self._point()
        elif what < 42:
            self._load()
        elif what < 46:
            self._store()
        elif what < 51:
            self._hold()
        else:
            self._rare()

    def _map(self) -> None:
        choose = self.choose
        first, count = choose.randrange(PAGES), choose.randrange(1, 4)
        file, at = choose.randrange(FILES), choose.randrange(FILE_PAGES)
        perm = (3, 3, 3, 1, 2, 0, 7)[choose.randrange(7)]
        address, size, offset = address_of(first), count * PAGE, at * PAGE
        fd: int | None = self.files[file]
        kind = choose.randrange(16)
        if kind == 0:
            fd = None
        elif kind == 1:
            file, fd = 0, self.read_only
        elif kind == 2:
            fd = self.side.device.counter
        elif kind == 3:
            address += (1, 2048, 0)[choose.randrange(3)]
        elif kind == 4:
            size += (1, -PAGE * count, 2**64 - size)[choose.randrange(3)]
        elif kind == 5:
            offset += (8, 2**64 - PAGE - offset, FILE_PAGES * PAGE)[choose.randrange(3)]
        inside = range(first, first + count)
        good = (
            perm in (1, 2, 3)
            and not (address | size) % PAGE
            and 0 < size == count * PAGE
            and address + size <= 2**64
            and (first >= PAGES - 16 or first + count <= PAGES - 16)
            and not any(page in self.pages for page in inside)
        )
        if good and fd is not None:
            good = not offset % PAGE and offset + size <= self.sizes[file] * PAGE and kind != 2
            good = good and not (kind == 1 and perm & 2)
        elif first < PAGES - 16 < first + count:
            # Behind the low pages nothing is used, so this is a mapping that the model lacks.
            return
        payload = _MAP.pack(32, perm, offset % 2**64, address, size % 2**64)
        posted = choose.randrange(8) == 0
        self._send(
            Command.DMA_MAP, payload, -1 if fd is None else fd, error=not good, posted=posted
        )
        if good:
            self.starts[first] = count
            for page in inside:
                self.pages[page] = (None if fd is None else file, at + page - first, perm)

    def _unmap(self) -> None:
        choose = self.choose
        flags = 0
        if self.held_place is not None and not choose.randrange(4):
            page = self.held[choose.randrange(len(self.held))]
            first = max(start for start in self.starts if start <= page)
            address, size = address_of(first), self.starts[first] * PAGE
        elif self.starts and choose.randrange(4):
            first = list(self.starts)[choose.randrange(len(self.starts))]
            count = self.starts[first]
            if not choose.randrange(8):
                count += 1
            address, size = address_of(first), count * PAGE
        elif choose.randrange(4):
            first, count = choose.randrange(PAGES), choose.randrange(1, 6)
            address, size = address_of(first), count * PAGE
        else:
            first, count = 0, 10 * PAGES
            address, size = ((0, 0), (0, 2**63), (PAGE, 2**64 - PAGE), (3, PAGE), (0, 0))[
                choose.randrange(5)
            ]
            flags = 2 * (address == size == 0)
        end = 2**64 if flags else address + size
        bad = end > 2**64 or (not flags and (not size or (address | size) % PAGE))
        hit = []
        for start, length in self.starts.items():
            begin = address_of(start)
            if begin < end and address < begin + length * PAGE:
                hit.append(start)
                bad = bad or begin < address or begin + length * PAGE > end
        posted = choose.randrange(8) == 0
        payload = _UNMAP.pack(24, flags, address, size % 2**64)
        gone = [page for start in hit for page in range(start, start + self.starts[start])]
        used = not bad and self.held_place is not None and not set(gone).isdisjoint(self.held)
        if used and self.waits:
            if self.asking:
                return  # what comes later is sent already
            self._unmap_late(payload, posted=posted)
        else:
            self._send(Command.DMA_UNMAP, payload, error=bad, posted=posted)
        if not bad:
            for start in hit:
                del self.starts[start]
            for page in gone:
                del self.pages[page]
        if used:
            # The device is cut off: what it holds leads nowhere.
            self.held_place, self.own = None, 0
            if self.waits or self.side.device.lets_go:
                self.held = []
        if used and self.waits:
            self.check()

    def _unmap_late(self, payload: bytes, *, posted: bool) -> None:
        """Unmap what the device holds: that is answered when it lets go, and so is what follows."""
        self.check()
        self._send(Command.DMA_UNMAP, payload, posted=posted)
        value = self.choose.getrandbits(8)
        before = dict(self.tails)
        self._write(BELLS, bytes([value]), posted=False)
        self._flush()
        early = self.side.settle()
        assert not early, f"answered while an access is under way: {early.hex()}"
        assert self.side.device.tails == before, "a message was obeyed before an unmap that waits"
        self.tails[0] = value
        # What it does until then is done.
        held, value = self.side.device.held, self.choose.getrandbits(8)
        assert self.held_place is not None
        file, page = self.held_place
        held.write(bytes([value]), held.total - PAGE)
        self.contents[file][page * PAGE] = value
        assert held.read(0, held.total)[-PAGE:] == self.contents[file][page * PAGE :][:PAGE]
        self.side.device.release()

    def _write(self, offset: int, data: bytes, *, posted: bool) -> None:
        payload = _ACCESS.pack(offset, 0, len(data)) + data
        # The answer says again where it was written to, and how much.
        self._send(Command.REGION_WRITE, payload, posted=posted, answer=payload[: _ACCESS.size])

    def _ring(self) -> None:
        choose = self.choose
        size = (4, 4, 2, 8, 1)[choose.randrange(5)]
        offset = BELLS + choose.randrange(BELL_BYTES // size) * size
        if not choose.randrange(8):
            offset = COUNTER
        value = choose.getrandbits(8 * size)
        self._write(offset, value.to_bytes(size, "little"), posted=choose.randrange(4) > 0)
        if offset < COUNTER:
            self.tails[offset - BELLS] = value
        elif size > 4:
            self.registers[offset] = value

    def _point(self) -> None:
        page = self.choose.randrange(PAGES)
        if self.pages and self.choose.randrange(4):
            page = list(self.pages)[self.choose.randrange(len(self.pages))]
        address = address_of(page) + self.choose.randrange(PAGE // 8) * 8
        if not self.choose.randrange(8):
            address = (address + PAGE - 1 - self.choose.randrange(8)) % 2**64
        self.registers[ADDRESS] = address
        self._write(ADDRESS, address.to_bytes(8, "little"), posted=bool(self.choose.randrange(2)))

    def _reached(self, size: int, access: int) -> list[tuple[int | None, int]] | None:
        """Where each byte of the device's next access is; None if it fails."""
        address = self.registers.get(ADDRESS, 0)
        if not self.master or address + size > 2**64:
            return None
        found = []
        for at in range(address, address + size):
            page = at // PAGE if at < TOP else PAGES - 16 + (at - TOP) // PAGE
            # Pages behind the low ones have no number.
            known = self.pages.get(page) if at < (PAGES - 16) * PAGE or at >= TOP else None
            if known is None or not known[2] & access:
                return None
            found.append((known[0], known[1] * PAGE + at % PAGE))
        return found

    def _load(self) -> None:
        size = (1, 2, 4, 8)[self.choose.randrange(4)]
        where = self._reached(size, 1)
        data = b"\xff" * size
        # Memory that is not shared is not reached while the client waits.
        if where is not None and all(file is not None for file, _ in where):
            data = bytes(self.contents[file][at] for file, at in where if file is not None)
        asked = _ACCESS.pack(DATA, 0, size)
        self._send(Command.REGION_READ, asked, answer=asked + data)

    def _store(self) -> None:
        size = (1, 2, 4, 8)[self.choose.randrange(4)]
        value = self.choose.getrandbits(8 * size).to_bytes(size, "little")
        where = self._reached(size, 2)
        remote = where is not None and any(file is None for file, _ in where)
        if remote and not all(file is None for file, _ in where or ()):
            return
        self._write(STORE, value, posted=bool(self.choose.randrange(2)))
        if where is not None and not remote:
            for (file, at), byte in zip(where, value, strict=True):
                assert file is not None
                self.contents[file][at] = byte
        elif remote:
            self._answer_write(value)

    def _answer_write(self, value: bytes) -> None:
        """Answer the DMA_WRITE that the last message leads to, after other messages perhaps."""
        self.asked = (self.asked + 1) & 0xFFFF
        place = struct.pack("<QQ", self.registers.get(ADDRESS, 0), len(value))
        size = 32 + len(value)
        self.expected += _HEADER.pack(self.asked, Command.DMA_WRITE, size, 0, 0) + place + value
        # The mapping that is written to stays until then: the client answers as it likes.
        self.asking = True
        for _ in range(self.choose.randrange(3)):
            (self._ring, self._map, self._unmap)[self.choose.randrange(3)]()
        self.asking = False
        self.messages += 1
        self.out += _HEADER.pack(self.asked, Command.DMA_WRITE, 32, 1, 0) + place

    def _hold(self) -> None:
        what = self.choose.randrange(4)
        if what == 0:
            self._take_lease(self.choose.randrange(3))
        elif what == 1:
            value = self.choose.getrandbits(8)
            self._write(HELD, bytes([value]), posted=True)
            if self.held_place is not None:
                file, page = self.held_place
                self.contents[file][page * PAGE] = value
            self.own = value
        elif what == 2:
            asked = _ACCESS.pack(HELD, 0, 1)
            if self.held_place is not None:
                file, page = self.held_place
                data = self.contents[file][page * PAGE : page * PAGE + 1]
            else:
                data = bytearray([self.own if self.held else 0xFF])
            self._send(Command.REGION_READ, asked, answer=asked + data)
        else:
            self._write(RELEASE, b"\1", posted=True)
            self.held, self.held_place = [], None

    def _take_lease(self, more: int) -> None:
        """Have the device hold the page that it is pointed at, and some behind it."""
        start = self.registers.get(ADDRESS, 0) // PAGE * PAGE
        held = []
        known = []
        for address in range(start, start + (1 + more) * PAGE, PAGE):
            page = address // PAGE if address < TOP else PAGES - 16 + (address - TOP) // PAGE
            if TOP > address >= (PAGES - 16) * PAGE:
                page = -1
            held.append(page)
            known.append(self.pages.get(page, (None, 0, 0)))
        reached = self.master and all(perm == 3 for _, _, perm in known)
        if reached and any(file is None for file, _, _ in known):
            return  # would be asked for
        self._write(HOLD, bytes([more]), posted=True)
        self.held, self.held_place = [], None
        if reached:
            file, at, _ = known[-1]
            assert file is not None
            self.held, self.held_place = held, (file, at)

    def _rare(self) -> None:
        what = self.choose.randrange(8)
        if what < 4:
            self._switch(bool(what))
        elif what == 4:
            self._resize()
        elif what == 6:
            self._send(Command.DEVICE_RESET, b"")
            self.master = False
            self.registers.clear()
            self.held, self.held_place = [], None
            if self.choose.randrange(4):
                self._switch(True)
        else:
            self._send(99, b"garbage", error=True)

    def _resize(self) -> None:
        """Cut the last file or enlarge it again, while nothing leads to its second half."""
        half, last = FILE_PAGES // 2, FILES - 1
        if any(file == last and at >= half for file, at, _ in self.pages.values()):
            return
        self.check()
        self.sizes[last] = half if self.sizes[last] > half else FILE_PAGES
        os.ftruncate(self.files[last], self.sizes[last] * PAGE)
        self.contents[last][half * PAGE :] = bytes(half * PAGE)

    def _switch(self, master: bool) -> None:
        self.master = master
        place = _ACCESS.pack(4, 7, 2)
        self._send(Command.REGION_WRITE, place + (b"\6\0" if master else b"\2\0"), answer=place)


def run_campaign(
    choose: random.Random, batches: int, *, fast: bool = True, waits: bool = False
) -> int:
    """Drive a new side with so many batches; the messages that were sent.

    Raises:
        AssertionError: Something is not as the model says.
    """
    side = Side(fast=fast, revoke_after=3600.0 if waits else 0.0)
    side.device.lets_go = choose.randrange(2) == 0
    campaign = Campaign(choose, side, waits=waits)
    try:
        campaign.run(batches)
        return campaign.messages
    except GuestioError as error:
        raise AssertionError(f"{error!r} after {campaign.messages} messages") from error
    finally:
        side.close()
        campaign.close()
