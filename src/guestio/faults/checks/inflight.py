"""Notes of requests in flight, which outlive a back-end.

Source: vhost-user "Inflight I/O tracking"; layout of a split queue's region: a head of 16 bytes
(features, version, size, last_batch_head, used_idx), then 16 bytes for each descriptor
(inflight, padding, next, counter).
"""

from __future__ import annotations

import mmap
import struct
from typing import Final

from guestio.faults.catalogue import hostile, register, user
from guestio.faults.report import Severity
from guestio.faults.ring import Queue
from guestio.faults.trial import PLAIN, QUIET, Trial
from guestio.vhost_user.messages import FrontendRequest, Inflight, ProtocolFeature

_F = FrontendRequest
_INFLIGHT: Final = ProtocolFeature.INFLIGHT_SHMFD
_SIZE: Final = 64
_HEAD: Final = struct.Struct("<QHHHH")
_ENTRY: Final = struct.Struct("<B5xHQ")
_TRACKING: Final = user("Inflight I/O tracking")


class _Notes:
    """The shared buffer, mapped here.

    Attributes:
        made: What the back-end said of it.
        fd: Its file.
    """

    def __init__(self, t: Trial) -> None:
        reply = t.link.ask(_F.GET_INFLIGHT_FD, Inflight(0, 0, t.index + 1, _SIZE))
        if len(reply.payload) != Inflight.LAYOUT.size:
            t.fail(f"answers GET_INFLIGHT_FD with {len(reply.payload)} bytes")
        self.made = Inflight.decode(reply.payload)
        if not reply.fds or not self.made.mmap_size:
            t.fail("answers GET_INFLIGHT_FD without a buffer")
        self.fd = reply.fds[0]
        least = (t.index + 1) * (_HEAD.size + _SIZE * _ENTRY.size)
        if not least <= self.made.mmap_size <= 1 << 24:
            t.fail(f"made a buffer of {self.made.mmap_size} bytes, where {least} are needed")
        self._share = self.made.mmap_size // (t.index + 1)
        try:
            self._map = mmap.mmap(self.fd, self.made.mmap_size, offset=self.made.mmap_offset)
        except (OSError, ValueError) as error:
            t.fail(f"the buffer cannot be mapped: {error}")
        t.on_close(self._map.close)
        self._at = t.index * self._share

    @property
    def head(self) -> tuple[int, ...]:
        """Features, version, size, last_batch_head, used_idx of the queue."""
        return _HEAD.unpack_from(self._map, self._at)

    def entry(self, index: int) -> tuple[int, ...]:
        """Inflight, next, counter of a descriptor."""
        return _ENTRY.unpack_from(self._map, self._at + _HEAD.size + index * _ENTRY.size)

    def write_entry(self, index: int, inflight: int, counter: int) -> None:
        """Note a request."""
        _ENTRY.pack_into(
            self._map, self._at + _HEAD.size + index * _ENTRY.size, inflight, 0, counter
        )

    def write_head(self, version: int, used: int) -> None:
        """Begin the notes of the queue."""
        _HEAD.pack_into(self._map, self._at, 0, version, _SIZE, 0, used)


def _tracked(t: Trial) -> tuple[_Notes, Queue]:
    """Negotiated, with notes; the ring is not set up yet."""
    t.needs(protocol=_INFLIGHT)
    t.negotiate(protocol=PLAIN | _INFLIGHT)
    notes = _Notes(t)
    t.share()
    return notes, t.new_queue(size=_SIZE)


def _give(t: Trial, notes: _Notes) -> None:
    t.link.do(_F.SET_INFLIGHT_FD, notes.made, [notes.fd])


@register(
    "inflight.get",
    user("GET_INFLIGHT_FD"),
    "GET_INFLIGHT_FD is answered with a buffer that is large enough, and its descriptor.",
)
def _get(t: Trial) -> None:
    _tracked(t)


@register(
    "inflight.zeroed",
    _TRACKING,
    "A new buffer is empty: nothing is in flight in it.",
)
def _zeroed(t: Trial) -> None:
    notes, _ = _tracked(t)
    t.expect(notes.head[1] in {0, 1}, f"its version is {notes.head[1]}")
    t.expect(
        not any(notes.entry(index)[0] for index in range(_SIZE)),
        "a new buffer has requests in flight",
    )


@register("inflight.set", user("SET_INFLIGHT_FD"), "A buffer is taken, and requests are served.")
def _set(t: Trial) -> None:
    notes, queue = _tracked(t)
    _give(t, notes)
    queue.start()
    t.serves(queue, 10)


@register(
    "inflight.cleared",
    _TRACKING,
    "When all requests are used, none is noted as being in flight, and used_idx is up to date.",
)
def _cleared(t: Trial) -> None:
    notes, queue = _tracked(t)
    _give(t, notes)
    queue.start()
    t.serves(queue, 10)
    queue.stop()
    t.expect(
        not any(notes.entry(index)[0] for index in range(_SIZE)),
        "requests that were used are still noted as being in flight",
    )
    used = notes.head[4]
    t.expect(used == queue.used_index, f"notes used index {used}, it is {queue.used_index}")


@register(
    "inflight.head",
    _TRACKING,
    "A buffer in use has version 1 and the ring's size.",
)
def _head(t: Trial) -> None:
    notes, queue = _tracked(t)
    _give(t, notes)
    queue.start()
    t.serves(queue, 2)
    _, version, size, *_ = notes.head
    t.expect(version == 1, f"its version is {version}")
    t.expect(size == _SIZE, f"it is for {size} descriptors, the ring has {_SIZE}")


@register(
    "inflight.resubmitted",
    _TRACKING,
    "Requests that are noted as being in flight are done by the back-end that takes over, once.",
)
def _resubmitted(t: Trial) -> None:
    notes, queue = _tracked(t)
    # As a back-end leaves it that was killed with three requests taken.
    buffers = t.post(queue, 3, kick=False)
    notes.write_head(1, 0)
    for counter, buffer in enumerate(buffers):
        notes.write_entry(buffer.head, 1, counter + 1)
    queue.base = 3
    _give(t, notes)
    queue.start()
    queue.kick()
    for buffer in queue.wait(3, t.patience):
        t.judge(queue, buffer)
    t.serves(queue, 3)
    t.expect(queue.stays_quiet(QUIET), "did a request twice")


@register(
    "inflight.after-reconnect",
    _TRACKING,
    "A buffer that was kept over a reconnection is taken again.",
)
def _kept(t: Trial) -> None:
    notes, queue = _tracked(t)
    _give(t, notes)
    queue.start()
    t.serves(queue, 5)
    fd = t.duplicate(notes.fd)
    base = queue.stop()
    t.reconnect()
    t.negotiate(protocol=PLAIN | _INFLIGHT)
    t.link.do(_F.SET_INFLIGHT_FD, notes.made, [fd])
    t.share()
    queue.link = t.link
    queue.restart(base)
    t.serves(queue, 5)


def _refused(t: Trial, message: Inflight, *, fd: bool = True) -> None:
    notes, _ = _tracked(t)
    t.link.refuses(_F.SET_INFLIGHT_FD, message, [notes.fd] if fd else [])


@hostile(
    "inflight.too-small",
    user("SET_INFLIGHT_FD"),
    "A buffer that is too small for its queues is refused, or not used beyond its end.",
)
def _too_small(t: Trial) -> None:
    notes, queue = _tracked(t)
    small = t.memfd(64)
    t.link.refuses(_F.SET_INFLIGHT_FD, Inflight(64, 0, t.index + 1, _SIZE), [small])
    del notes
    queue.start()
    t.post(queue, 10)
    queue.outcome(QUIET)
    queue.stop()


@hostile(
    "inflight.no-descriptor",
    user("SET_INFLIGHT_FD"),
    "A buffer without a descriptor is refused.",
)
def _no_descriptor(t: Trial) -> None:
    _refused(t, Inflight(4096, 0, t.index + 1, _SIZE), fd=False)


@hostile(
    "inflight.no-queues",
    user("GET_INFLIGHT_FD"),
    "A buffer for no queue, or for more than there are, is refused or harms nothing.",
)
def _no_queues(t: Trial) -> None:
    t.needs(protocol=_INFLIGHT)
    t.negotiate(protocol=PLAIN | _INFLIGHT)
    for queues, size in ((0, _SIZE), (0xFFFF, 0xFFFF), (1, 0)):
        t.link.ask(_F.GET_INFLIGHT_FD, Inflight(0, 0, queues, size))


@hostile(
    "inflight.nonsense",
    _TRACKING,
    "Notes that make no sense are refused, or not followed.",
)
def _nonsense(t: Trial) -> None:
    notes, queue = _tracked(t)
    notes.write_head(1, 0x1234)
    for index in range(_SIZE):
        notes.write_entry(index, t.random.randrange(256), t.random.getrandbits(64))
    t.link.refuses(_F.SET_INFLIGHT_FD, notes.made, [notes.fd])
    t.remember()
    queue.start()
    queue.kick()
    t.aftermath(queue, [(t.ram.start, t.ram.size)], list(range(_SIZE)))


@register(
    "inflight.same-buffer",
    user("GET_INFLIGHT_FD"),
    "A buffer for the same queues has the same size again.",
    severity=Severity.SHOULD,
)
def _same(t: Trial) -> None:
    notes, _ = _tracked(t)
    again = _Notes(t)
    t.expect(
        again.made.mmap_size == notes.made.mmap_size,
        f"made {notes.made.mmap_size} bytes, then {again.made.mmap_size}",
    )
