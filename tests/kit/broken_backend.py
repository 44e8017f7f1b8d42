"""A small block back-end in plain Python, which is right, unless it is told how to be wrong.

It shares no code with guestio, so that a check and what it checks are not wrong in the same way.
Each fault is a word; `FAULTS` says where it acts. Everything is served by one thread.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import select
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

FEATURES = (
    (1 << 32) | (1 << 30) | (1 << 28) | (1 << 29) | (1 << 9) | (1 << 6) | (1 << 14) | (1 << 26)
)
FEATURES |= 1 << 33
MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG = 1 << 0, 1 << 1, 1 << 3, 1 << 5, 1 << 9
INFLIGHT, RESET_DEVICE, MEM_SLOTS, STATUS = 1 << 12, 1 << 13, 1 << 15, 1 << 16
PROTOCOL = MQ | LOG_SHMFD | REPLY_ACK | BACKEND_REQ | CONFIG | RESET_DEVICE | MEM_SLOTS | STATUS
GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE = 1, 2, 3, 4, 5
SET_LOG_BASE, SET_LOG_FD, SET_NUM, SET_ADDR, SET_BASE, GET_BASE = 6, 7, 8, 9, 10, 11
SET_KICK, SET_CALL, SET_ERR, GET_PROTOCOL, SET_PROTOCOL, GET_QUEUES = 12, 13, 14, 15, 16, 17
SET_ENABLE, SET_BACKEND, IOTLB, GET_CONFIG, SET_CONFIG = 18, 21, 22, 24, 25
RESET, GET_SLOTS, ADD_REG, REM_REG, SET_STATUS, GET_STATUS = 34, 36, 37, 38, 39, 40
OWN_REPLY = {GET_FEATURES, GET_BASE, GET_PROTOCOL, GET_QUEUES, IOTLB, GET_CONFIG, GET_SLOTS}
OWN_REPLY |= {GET_STATUS, SET_LOG_BASE}
WITH_DESCRIPTORS = {SET_MEM_TABLE, SET_LOG_BASE, SET_KICK, SET_CALL, SET_ERR, SET_BACKEND, ADD_REG}
SECTORS = 2048
SLOTS = 16


class RefusedError(Exception):
    """A request that is answered with a failure, or ends the connection."""


class BrokenError(Exception):
    """A ring that makes no sense."""


class MissingError(Exception):
    """A translation that was asked for."""


class DiedError(Exception):
    """The whole back-end has crashed."""


def is_eventfd(fd: int) -> bool:
    return str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("anon_inode:[eventfd")


class Ring:
    def __init__(self) -> None:
        self.num = 0
        self.where: tuple[int, int, int] | None = None
        self.log = 0
        self.logged = False
        self.base = 0
        self.kick: int | None = None
        self.call: int | None = None
        self.err: int | None = None
        self.enabled = False
        self.running = False
        self.broken = False
        self.used_before = 0


class Region:
    def __init__(self, guest: int, size: int, user: int, offset: int, fd: int, lie: int) -> None:
        if not size or max(guest, user, offset) + size > 1 << 64 or offset % 4096:
            raise RefusedError("a region that makes no sense")
        if os.fstat(fd).st_size < offset + size:
            raise RefusedError("a region beyond its file")
        self.guest, self.size, self.user, self.offset = guest, size, user, offset
        self.map = mmap.mmap(fd, size, offset=offset if not lie else 0)


class BrokenBackend:
    """Serves a disk of 1 MiB at a path, with the faults that are named.

    Attributes:
        seen: Faults that have acted, so that a test can tell one that never does.
    """

    def __init__(self, path: str, *faults: str, features: int = FEATURES) -> None:
        self.path = path
        self.faults = set(faults)
        self.disk = bytearray(bytes(range(1, 256)) * 4112 + bytes(SECTORS * 512))[: SECTORS * 512]
        self.features = features
        self.offers = 0
        self.stopper = os.eventfd(0)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.status = 0
        self.kept: list[int] = []

    def __enter__(self) -> BrokenBackend:  # noqa: PYI034 - local
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.eventfd_write(self.stopper, 1)
        self.thread.join(30)
        assert not self.thread.is_alive()
        os.close(self.stopper)
        self.listener.close()
        for fd in self.kept:
            os.close(fd)

    def has(self, fault: str) -> bool:
        return fault in self.faults

    # Connections

    def serve(self) -> None:
        while True:
            ready, _, _ = select.select([self.listener, self.stopper], [], [])
            if self.stopper in ready:
                return
            conn, _ = self.listener.accept()
            try:
                with conn:
                    self.connection(conn)
            except DiedError:
                self.listener.close()
                Path(self.path).unlink()
                return
            except RefusedError:
                pass
            finally:
                self.forget()
            if self.has("ends-with-front-end"):
                # Its process, a moment later; until then others connect to its socket in vain.
                time.sleep(0.2)
                os._exit(0)
            if self.has("one-front-end"):
                select.select([self.stopper], [], [])
                return

    def connection(self, conn: socket.socket) -> None:
        self.conn = conn
        self.regions: list[Region] = []
        self.rings = [Ring() for _ in range(2)]
        self.negotiated = 0
        self.protocol = 0
        if not self.has("status-for-the-next"):
            self.status = 0
        self.log: mmap.mmap | None = None
        self.back: socket.socket | None = None
        self.pages: dict[int, tuple[int, int]] = {}
        self.asked: set[int] = set()
        self.owned: list[int] = []
        conn.setblocking(False)
        self.data = bytearray()
        self.fds: list[int] = []
        while True:
            kicks = {r.kick: r for r in self.rings if r.kick is not None}
            ready, _, _ = select.select([conn, self.stopper, *kicks], [], [])
            if self.stopper in ready:
                os.eventfd_write(self.stopper, 1)
                raise RefusedError("the end")
            for fd in ready:
                if fd in kicks:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(fd)
                    kicks[fd].running = True
                    self.run(kicks[fd])
            if conn in ready and not self.receive():
                return

    def forget(self) -> None:
        if self.has("keeps-descriptors"):
            self.kept += self.owned
            self.kept += [self.back.detach()] if self.back is not None else []
        else:
            for fd in self.owned:
                os.close(fd)
            if self.back is not None:
                self.back.close()
        self.owned = []
        for ring in self.rings:
            if self.has("serves-the-dead") and ring.where:
                # As a back-end would that polls on.
                threading.Timer(0.03, self.haunt, [self.regions]).start()

    @staticmethod
    def haunt(regions: list[Region]) -> None:
        for region in regions:
            region.map[-1:] = b"\0"

    def receive(self) -> bool:
        try:
            data, ancillary, _, _ = self.conn.recvmsg(65536, socket.CMSG_SPACE(4 * 253))
        except ConnectionResetError:
            return False
        for _, _, raw in ancillary:
            came = array.array("i", raw[: len(raw) // 4 * 4])
            self.fds += came
            self.owned += came
        if not data:
            return False
        self.data += data
        while len(self.data) >= 12:
            code, flags, size = struct.unpack_from("=III", self.data)
            if size > 4096 and not self.has("waits-for-payload"):
                raise RefusedError("too large")
            if len(self.data) < 12 + size:
                if self.has("whole-messages") and len(data) < 12 + size:
                    raise RefusedError("half a message")
                break
            payload = bytes(self.data[12 : 12 + size])
            del self.data[: 12 + size]
            fds, self.fds = self.fds, []
            self.handle(code, flags, payload, fds)
            if self.has("drops-the-rest"):
                self.data.clear()
        if self.has("whole-messages") and self.data:
            raise RefusedError("half a message")
        return True

    def send(self, code: int, payload: bytes) -> None:
        flags = 1 if self.has("no-reply-flag") else 5
        if self.has("reply-version"):
            flags = 6
        if self.has("wrong-code"):
            code += 1
        data = struct.pack("=III", code, flags, len(payload)) + payload
        with contextlib.suppress(BrokenPipeError):
            self.conn.send(data * 2 if self.has("answers-twice") else data)

    def handle(self, code: int, flags: int, payload: bytes, fds: list[int]) -> None:
        if flags & 3 != 1 or flags & 4:
            raise RefusedError("no request")
        wanted = flags >> 3 & 1 and (self.protocol & REPLY_ACK or self.has("ack-always"))
        try:
            answer = self.act(code, payload, fds)
            value = 0
        except RefusedError:
            if not wanted or code in OWN_REPLY:
                raise
            answer, value = None, 1
        except (struct.error, OSError, ValueError, IndexError, KeyError) as error:
            if self.has("fragile"):
                raise DiedError from error
            raise RefusedError("garbage") from error
        if code == 0x7E57 and not self.has("unknown-succeeds"):
            value = 1
        if fds and code not in WITH_DESCRIPTORS and not self.has("keeps-surplus"):
            for fd in fds:
                os.close(fd)
                self.owned.remove(fd)
        if self.has(f"nack-{code}"):
            value = 1
        if self.has("always-succeeds"):
            value = 0
        if answer is not None:
            self.send(code, answer)
            if self.has("ack-besides") and wanted:
                self.send(code, bytes(8))
        elif wanted or self.has("ack-unasked"):
            self.send(code, struct.pack("=Q", value))

    # Messages

    def ring(self, index: int) -> Ring:
        if index >= len(self.rings):
            if self.has("fragile"):
                raise DiedError
            if self.has("always-succeeds"):
                return Ring()
            raise RefusedError("no such ring")
        return self.rings[index]

    def act(self, code: int, payload: bytes, fds: list[int]) -> bytes | None:
        u64 = struct.Struct("=Q")
        if code == GET_FEATURES:
            self.offers += 1
            offered = self.features
            if self.has("features-change") and self.offers % 2:
                offered ^= 1 << 9
            if self.has("short-features"):
                return offered.to_bytes(8, "little")[:4]
            return u64.pack(offered)
        if code == SET_FEATURES:
            (chosen,) = u64.unpack(payload)
            if chosen & ~self.features:
                if self.has("fragile"):
                    raise DiedError
                raise RefusedError("not offered")
            if self.has("wants-all-features") and chosen & (1 << 28) == 0:
                raise RefusedError("not all features")
            if self.has("features-once") and self.negotiated and chosen != self.negotiated:
                raise RefusedError("features again")
            self.negotiated = chosen
            if not chosen & 1 << 30 and not self.has("never-enabled-alone"):
                for ring in self.rings:
                    ring.enabled = True
        elif code in {SET_OWNER, SET_LOG_FD}:
            pass
        elif code == RESET_OWNER:
            if self.has("reset-owner-hangs-up"):
                self.conn.shutdown(socket.SHUT_RDWR)
        elif code == GET_PROTOCOL:
            if self.has("protocol-after-features") and not self.negotiated:
                raise RefusedError("too early")
            extra = 1 << 60 if self.has("unknown-protocol") else 0
            extra |= 1 << 14 if self.has("inband-alone") else 0
            return u64.pack(PROTOCOL & ~(MQ if self.has("no-mq") else 0) | extra)
        elif code == SET_PROTOCOL:
            (chosen,) = u64.unpack(payload)
            if chosen & ~PROTOCOL & ~(1 << 14):
                if self.has("fragile"):
                    raise DiedError
                raise RefusedError("not offered")
            self.protocol = chosen
        elif code == GET_QUEUES:
            return u64.pack(0 if self.has("no-queues") else len(self.rings))
        elif code == SET_MEM_TABLE:
            self.table(payload, fds)
        elif code == SET_NUM:
            index, num = struct.unpack("=II", payload)
            ring = self.ring(index)
            if not 0 < num <= 32768 or num & num - 1 or (self.has("small-rings") and num > 256):
                if self.has("fragile"):
                    raise DiedError
                raise RefusedError("ring size")
            ring.num = num
        elif code == SET_ADDR:
            index, ring_flags, desc, used, avail, log = struct.unpack("=IIQQQQ", payload)
            ring = self.ring(index)
            if desc % 16 or avail % 2 or used % 4:
                if self.has("fragile"):
                    raise DiedError
                raise RefusedError("alignment")
            ring.where, ring.log, ring.logged = (desc, avail, used), log, bool(ring_flags & 1)
        elif code == SET_BASE:
            index, num = struct.unpack("=II", payload)
            if num > 0xFFFF:
                if self.has("fragile"):
                    raise DiedError
                raise RefusedError("base")
            self.ring(index).base = 0 if self.has("base-ignored") else num
        elif code == GET_BASE:
            return self.stop(payload)
        elif code in {SET_KICK, SET_CALL, SET_ERR}:
            self.descriptor(code, payload, fds)
        elif code == SET_ENABLE:
            index, num = struct.unpack("=II", payload)
            if num > 1:
                if self.has("fragile"):
                    raise DiedError
                raise RefusedError("enable")
            ring = self.ring(index)
            ring.enabled = bool(num)
            if self.has("serves-unkicked"):
                ring.running = True
            if not self.has("enable-forgets"):
                self.run(ring)
        elif code == SET_BACKEND:
            if self.back is not None:
                self.back.close()
            self.back = socket.socket(fileno=os.dup(fds[0]))
        elif code == IOTLB:
            return u64.pack(self.iotlb(payload))
        elif code == GET_CONFIG:
            return self.get_config(payload)
        elif code == SET_CONFIG:
            offset, size, _ = struct.unpack_from("=III", payload)
            if self.has("config-writable"):
                self.overlay = (offset, payload[12 : 12 + size])
            else:
                raise RefusedError("read-only")
        elif code == RESET:
            if not self.has("reset-does-nothing"):
                self.rings = [Ring() for _ in self.rings]
        elif code == GET_SLOTS:
            return u64.pack(0 if self.has("no-slots") else SLOTS)
        elif code == ADD_REG:
            _, *place = struct.unpack("=QQQQQ", payload)
            if len(fds) != 1 or len(self.regions) >= (SLOTS + 4 * self.has("too-many-slots")):
                raise RefusedError("slots")
            self.add(place, fds[0], self.regions)
        elif code == REM_REG:
            self.remove(payload)
        elif code == SET_STATUS:
            (value,) = u64.unpack(payload)
            if value > 255:
                if self.has("fragile"):
                    raise DiedError
                raise RefusedError("status")
            if not value and not self.has("status-reset-keeps-rings"):
                self.rings = [Ring() for _ in self.rings]
            self.status = value if value or not self.has("status-stays") else self.status
            if self.has("status-lost"):
                self.status = 0
            for ring in self.rings:
                self.run(ring)
        elif code == GET_STATUS:
            return u64.pack(self.status | (4 if self.has("status-begins") else 0))
        elif code == SET_LOG_BASE:
            size, offset = struct.unpack("=QQ", payload)
            if offset + size > os.fstat(fds[0]).st_size:
                raise RefusedError("log")
            self.log = mmap.mmap(fds[0], size, offset=offset)
            return bytes(8)
        elif self.has("hangs-up-at-unknown"):
            raise RefusedError("unknown")
        return None

    def table(self, payload: bytes, fds: list[int]) -> None:
        (count,) = struct.unpack_from("=I4x", payload)
        if count != len(fds) and not self.has("descriptors-uncounted"):
            raise RefusedError("descriptors")
        regions: list[Region] = []
        for at in range(count):
            place = list(struct.unpack_from("=QQQQ", payload, 8 + 32 * at))
            if at >= len(fds):
                break
            self.add(place, fds[0 if self.has("first-descriptor") else at], regions)
        if self.has("table-once") and self.regions:
            return
        if self.has("keeps-old-memory"):
            regions += self.regions
        self.regions = regions

    def add(self, place: list[int], fd: int, regions: list[Region]) -> None:
        guest, size, user, offset = place
        if any(guest < r.guest + r.size and r.guest < guest + size for r in regions):
            raise RefusedError("overlap")
        regions.append(Region(guest, size, user, offset, fd, self.has("offset-ignored")))

    def remove(self, payload: bytes) -> None:
        _, guest, size, user, offset = struct.unpack("=QQQQQ", payload)
        found = [
            r
            for r in self.regions
            if (r.guest, r.size, r.user) == (guest, size, user)
            and (not self.has("offset-compared") or r.offset == offset)
        ]
        if not found and not self.has("removes-anything"):
            raise RefusedError("no such region")
        if not self.has("never-removes"):
            self.regions = [r for r in self.regions if r not in found]

    def stop(self, payload: bytes) -> bytes:
        index, _ = struct.unpack("=II", payload)
        ring = self.ring(index)
        base = ring.base
        if not self.has("runs-on-when-stopped"):
            ring.running = False
            if not self.has("keeps-the-kick"):
                ring.kick = None
        if self.has("calls-when-stopped") and ring.call is not None:
            call = ring.call
            threading.Timer(0.02, lambda: os.eventfd_write(call, 1)).start()
        if self.has("writes-when-stopped") and self.regions:
            threading.Timer(0.02, self.haunt, [self.regions]).start()
        if self.has("stops-at-zero"):
            base = 0
        if self.has("stops-one-early"):
            base = base - 1 & 0xFFFF
        if self.has("stops-wide"):
            base |= 1 << 20
        if self.has("stops-another"):
            index += 1
        if self.has("never-stops"):
            return None  # type: ignore[return-value]  # on purpose
        return struct.pack("=II", index, base)

    def descriptor(self, code: int, payload: bytes, fds: list[int]) -> None:
        (value,) = struct.unpack("=Q", payload)
        has_fd = not value & 0x100
        if len(fds) != has_fd:
            raise RefusedError("descriptor")
        ring = self.ring(value & 0xFF)
        fd = fds[0] if has_fd else None
        if fd is not None and not is_eventfd(fd):
            if self.has("fragile"):
                raise DiedError
            raise RefusedError("no eventfd")
        if fd is not None:
            os.set_blocking(fd, False)
        if code == SET_KICK:
            if self.has("kick-once") and ring.kick is not None:
                return
            ring.kick = fd
            ring.broken = False
            if fd is None:
                raise RefusedError("polling")
        elif code == SET_CALL:
            if self.has("call-once") and ring.call is not None:
                return
            if self.has("wants-a-call") and fd is None:
                raise RefusedError("no call descriptor")
            ring.call = fd
        else:
            if self.has("wants-an-error") and fd is None:
                raise RefusedError("no error descriptor")
            ring.err = fd

    def get_config(self, payload: bytes) -> bytes:
        offset, size, flags = struct.unpack_from("=III", payload)
        if len(payload) != 12 + size:
            if self.has("leaks-config"):
                return struct.pack("=III", offset, size, flags) + bytes(2000)
            return b""
        space = bytearray(struct.pack("<Q", 0 if self.has("no-capacity") else SECTORS) + bytes(88))
        struct.pack_into("<I", space, 20, 500 if self.has("odd-block-size") else 512)
        struct.pack_into("<II", space, 48, 0 if self.has("no-zeroes-limit") else 4096, 1)
        if self.has("padding"):
            space[33] = 7
        at, data = getattr(self, "overlay", (0, b""))
        space[at : at + len(data)] = data
        if offset + size > len(space):
            return b""
        offset_ = 0 if self.has("config-from-start") else offset
        if self.has("config-short"):
            size -= 1
        if self.has("config-changes"):
            self.offers += 1
            space[90] = self.offers & 0xFF
        return struct.pack("=III", offset, size, flags) + bytes(space[offset_ : offset_ + size])

    def iotlb(self, payload: bytes) -> int:
        iova, size, user, perm, kind = struct.unpack("=QQQBB6x", payload)
        if kind not in {2, 3} or not size or iova + size > 1 << 64 or size > 1 << 32:
            return 1
        for page in range(iova & ~4095, iova + size, 4096):
            if kind == 3:
                if not self.has("invalidation-ignored"):
                    self.pages.pop(page, None)
            elif not self.has("update-ignored-if-known") or page not in self.pages:
                self.pages[page] = (user + page - iova, perm)
        self.asked.clear()
        if kind == 2:
            for ring in self.rings:
                self.run(ring)
        return 1 if self.has("iotlb-refused") else 0

    # Memory

    def at(self, address: int, length: int, *, user: bool = False, write: bool = False) -> Any:
        """Pieces of memory: map and offset, for a guest, user or I/O virtual address."""
        if address + length > 1 << 64:
            raise BrokenError("past 2^64")
        pieces = []
        translate = bool(self.negotiated & 1 << 33)
        while length:
            where, room = address, length
            if translate:
                page = address & ~4095
                room = min(room, page + 4096 - address)
                known = self.pages.get(page)
                if known is None or (
                    write and not known[1] & 2 and not self.has("permission-ignored")
                ):
                    self.miss(address, 2 if write and not self.has("misses-read") else 1)
                    raise MissingError
                where = known[0] + address - page
            for region in self.regions:
                start = region.user if user or translate else region.guest
                if start <= where < start + region.size:
                    piece = min(room, start + region.size - where)
                    pieces.append((region, where - start, piece))
                    break
            else:
                raise BrokenError(f"{where:#x} is nowhere")
            if self.has("one-region") and piece < room:
                raise BrokenError("a buffer in two regions")
            address += piece
            length -= piece
        return pieces

    def miss(self, iova: int, perm: int) -> None:
        if self.back is None or iova in self.asked or self.has("never-asks"):
            return
        self.asked.add(iova)
        if self.has("asks-elsewhere"):
            iova += 1 << 50
        message = struct.pack("=IIIQQQBB6x", 1, 1, 32, iova, 1, 0, perm, 1)
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            self.back.setblocking(False)
            self.back.send(message)

    def read(self, address: int, length: int, *, user: bool = False) -> bytes:
        return b"".join(
            region.map[at : at + size] for region, at, size in self.at(address, length, user=user)
        )

    def write(self, address: int, data: bytes, *, user: bool = False) -> None:
        done = 0
        for region, at, size in self.at(address, len(data), user=user, write=True):
            region.map[at : at + size] = data[done : done + size]
            done += size
            if not user and not self.has("data-unlogged"):
                self.mark(region.guest + at, size)

    def mark(self, guest: int, size: int) -> None:
        if self.log is None or not (self.negotiated & 1 << 26 or self.has("log-always")):
            return
        for page in range(guest // 4096, (guest + size - 1) // 4096 + 1):
            if page // 8 < len(self.log):
                self.log[page // 8] |= 1 << page % 8
        if self.has("marks-all"):
            self.log[:] = b"\xff" * len(self.log)

    # Rings

    def run(self, ring: Ring) -> None:
        live = ring.running and (ring.enabled or self.has("serves-disabled"))
        if not live or ring.broken or ring.where is None or not ring.num:
            return
        if self.protocol & STATUS and not self.status & 4 and not self.has("ignores-driver-ok"):
            return
        try:
            self.requests(ring)
        except MissingError:
            if self.has("hangs-at-miss"):
                self.hang()
        except BrokenError as error:
            if self.has("fragile"):
                raise DiedError from error
            ring.broken = True
            if ring.err is not None:
                with contextlib.suppress(OSError):
                    os.eventfd_write(ring.err, 1)

    def requests(self, ring: Ring) -> None:
        assert ring.where is not None
        desc, avail, used = ring.where
        event_idx = bool(self.negotiated & 1 << 29)
        if not self.has("no-used-index-kept"):
            ring.used_before = int.from_bytes(self.read(used + 2, 2, user=True), "little")
        while True:
            index = int.from_bytes(self.read(avail + 2, 2, user=True), "little")
            pending = index - ring.base & 0xFFFF
            if pending > ring.num:
                raise BrokenError("the index jumped")
            if self.has("flags-odd"):
                self.write(used, b"\4\0", user=True)
            if self.has("flags-with-event") and event_idx:
                self.write(used, b"\1\0", user=True)
            if self.has("suppresses-kicks"):
                self.write(used, b"\1\0", user=True)
            if event_idx:
                event = index + (1000 if self.has("event-far") else 0) & 0xFFFF
                self.write(used + 4 + 8 * ring.num, event.to_bytes(2, "little"), user=True)
            if not pending:
                return
            count = 1 if self.has("one-a-kick") else pending
            for _ in range(count):
                slot = avail + 4 + 2 * (ring.base % ring.num)
                if self.has("slot-not-wrapped"):
                    slot = avail + 4 + 2 * ring.base
                head = int.from_bytes(self.read(slot, 2, user=True), "little")
                if head >= ring.num:
                    raise BrokenError("no such head")
                self.request(ring, desc, used, head)
            self.notify(ring, avail, used, event_idx)
            if self.has("one-a-kick"):
                return

    def request(self, ring: Ring, desc: int, used: int, head: int) -> None:
        assert ring.where is not None
        chain = self.chain(ring, desc, head)
        readable = b"".join(self.read(at, size) for at, size, flags in chain if not flags & 2)
        writable = [(at, size) for at, size, flags in chain if flags & 2]
        for at, size in writable:
            self.at(at, size, write=True)
        answer, written = self.disk_request(readable, sum(size for _, size in writable), chain)
        done = 0
        for at, size in writable:
            if done >= len(answer):
                break
            if not self.has("writes-nothing") or done:
                self.write(at, answer[done : done + size])
            done += size
        if self.has("overruns") and writable:
            at, size = writable[-1]
            self.write(at + size, b"!")
        if self.has("writes-readable"):
            at, _, flags = chain[0]
            if not flags & 2:
                self.write(at, b"!")
        if self.has("writes-table"):
            self.write(desc + 16 * ring.num - 8, b"!", user=True)
        if self.has("writes-avail"):
            self.write(ring.where[1] + 4 + 2 * ring.num - 2, b"!", user=True)
        ring.base = ring.base + 1 & 0xFFFF
        entry = head
        if self.has("wrong-id"):
            entry = (head + 1) % ring.num
        if self.has("length-too-long"):
            written += 1 << 16
        for _ in range(2 if self.has("uses-twice") else 1):
            self.publish(ring, used, entry, written)

    def publish(self, ring: Ring, used: int, entry: int, written: int) -> None:
        before = int.from_bytes(self.read(used + 2, 2, user=True), "little")
        slot = used + 4 + 8 * (before % ring.num)
        self.write(slot, struct.pack("<II", entry, written), user=True)
        self.write(used + 2, (before + 1 & 0xFFFF).to_bytes(2, "little"), user=True)
        if ring.logged and not self.has("used-unlogged"):
            self.mark(ring.log + slot - used, 8)
            self.mark(ring.log, 4)

    def notify(self, ring: Ring, avail: int, used: int, event_idx: bool) -> None:
        if ring.call is None or self.has("never-calls"):
            return
        flags = int.from_bytes(self.read(avail, 2, user=True), "little")
        index = int.from_bytes(self.read(used + 2, 2, user=True), "little")
        event = int.from_bytes(self.read(avail + 4 + 2 * ring.num, 2, user=True), "little")
        if self.has("event-always"):
            event_idx = True
        if self.has("event-never"):
            event_idx = False
        if event_idx:
            wanted = index - event - 1 & 0xFFFF < index - ring.used_before & 0xFFFF
            if self.has("event-exactly"):
                wanted = event == index - 1 & 0xFFFF
        else:
            wanted = not flags & 1
        ring.used_before = index
        if wanted or self.has("calls-always"):
            try:
                os.eventfd_write(ring.call, 1)
            except BlockingIOError:
                if self.has("blocks-at-call"):
                    self.hang()

    def hang(self) -> None:
        select.select([self.stopper], [], [])

    def chain(self, ring: Ring, desc: int, head: int) -> list[tuple[int, int, int]]:
        pieces: list[tuple[int, int, int]] = []
        index, table, size, user = head, desc, ring.num, True
        left = ring.num * 2
        while True:
            raw = self.read(table + 16 * index, 16, user=user)
            at, length, flags, following = struct.unpack("<QIHH", raw)
            if flags & 4:
                if not user or not self.negotiated & 1 << 28 or flags & 1 or not length:
                    raise BrokenError("indirect")
                if flags & 2 and self.has("refuses-write-flag"):
                    raise BrokenError("writable table")
                if pieces and self.has("indirect-first-only"):
                    raise BrokenError("a table behind descriptors")
                if at % 16 and self.has("aligned-tables"):
                    raise BrokenError("a table out of line")
                if length % 16 or length // 16 > 1024:
                    raise BrokenError("length of a table")
                if self.has("writes-indirect"):
                    self.write(at, bytes([raw[0] ^ 1]))
                index, table, size, user = 0, at, length // 16, False
                continue
            if not length:
                raise BrokenError("an empty descriptor")
            if pieces and pieces[-1][2] & 2 and not flags & 2:
                raise BrokenError("readable behind writable")
            pieces.append((at, length, flags))
            if not flags & 1:
                return pieces
            left -= 1
            if left < 0 and self.has("follows-loops"):
                self.hang()
            if left < 0 or following >= size:
                raise BrokenError("a loop")
            index = index + 1 if self.has("next-ignored") else following
            if index >= size:
                raise BrokenError("beyond the table")

    # The disk

    def disk_request(self, readable: bytes, room: int, chain: list[Any]) -> tuple[bytes, int]:
        if not room or (len(chain) < 2 and self.has("fragile")):
            return b"", 0
        if self.has("fixed-framing") and chain[0][1] != 16:
            return bytes(room - 1) + b"\1", room
        if len(readable) < 16:
            return bytes(room - 1) + b"\1", room
        kind, _, sector = struct.unpack_from("<IIQ", readable)
        data = readable[16:]
        status, answer = self.command(kind, sector, data, room - 1)
        if self.has("status-ok"):
            status = 0
        if self.has("status-odd"):
            status = 7
        answer = answer[: room - 1] + bytes(max(room - 1 - len(answer), 0))
        return answer + bytes([status]), room

    def command(self, kind: int, sector: int, data: bytes, room: int) -> tuple[int, bytes]:
        start = sector * 512
        if self.has("sector-wraps"):
            start &= (1 << 64) - 1
        if kind == 0:
            if room % 512 or start + room > len(self.disk):
                return 1, b""
            if self.has("reads-garbage"):
                return 0, os.urandom(room)
            if self.has("reads-start") and room > 512:
                return 0, bytes(self.disk[:512]) * (room // 512)
            return 0, bytes(self.disk[start : start + room])
        if kind == 1:
            if len(data) % 512 or start + len(data) > len(self.disk):
                return 1, b""
            if not self.has("loses-writes"):
                self.disk[start : start + len(data)] = data
            if self.has("writes-more"):
                self.disk[start + len(data) : start + len(data) + 1] = b"!"
            return 0, b""
        if kind == 4:
            return (2 if self.has("flush-unsupported") else 0), b""
        if kind == 8:
            return 0, b"toy\0X" if self.has("id-unpadded") else b"toy"
        if kind == 13:
            if len(data) != 16:
                return 1, b""
            at, count, flags = struct.unpack_from("<QII", data)
            if flags & ~1:
                return (0 if self.has("zeroes-any-flags") else 2), b""
            at *= 512
            if at + count * 512 > len(self.disk):
                return 1, b""
            if not self.has("zeroes-nothing"):
                self.disk[at : at + count * 512] = bytes(count * 512)
            return 0, b""
        if 15 <= kind <= 26 and self.has("zones-fail"):
            return 1, b""
        return (1 if self.has("unknown-fails") else 2), b""


if __name__ == "__main__":
    with BrokenBackend(*sys.argv[1:]):
        select.select([], [], [])
