"""The dirty log of a migration."""

from __future__ import annotations

import mmap
from typing import Final

from guestio.faults.catalogue import hostile, register, user
from guestio.faults.outcomes import HungUpError
from guestio.faults.ring import Queue
from guestio.faults.trial import LOG_ALL, PLAIN, QUIET, Trial
from guestio.vhost_user.messages import (
    U64,
    FrontendRequest,
    Log,
    ProtocolFeature,
    VringAddr,
)

_F = FrontendRequest
_LOG: Final = ProtocolFeature.LOG_SHMFD
_PAGE: Final = 4096
_BYTES: Final = 4096
"""Bytes of the log: 32768 pages, 128 MiB."""
_MIGRATION: Final = user("Migration")


class _Logged:
    """A ring, and a log that is on.

    Attributes:
        queue: The ring.
        log: The log's bytes.
    """

    def __init__(self, t: Trial, *, used_ring: bool = True, on: bool = True) -> None:
        t.needs(features=LOG_ALL, protocol=_LOG)
        link = t.negotiate(protocol=PLAIN | _LOG)
        t.share()
        self.t = t
        self.queue: Queue = t.new_queue()
        self.queue.start()
        # Buffers are on other pages than the rings.
        t.ram.take(1, _PAGE)
        t.ram.take(1, _PAGE)
        fd = t.memfd(_BYTES)
        self.log = mmap.mmap(fd, _BYTES)
        t.on_close(self.log.close)
        # What the answer holds is not specified.
        link.ask(_F.SET_LOG_BASE, Log(_BYTES, 0), [fd])
        if on:
            features = link.features | LOG_ALL
            link.do(_F.SET_FEATURES, U64(features))
        if on and used_ring:
            where = self.queue.addresses
            link.do(
                _F.SET_VRING_ADDR,
                VringAddr(where.index, 1, where.desc, where.used, where.avail, self.queue.used),
            )

    def marked(self, address: int) -> bool:
        """Whether the page of a guest address is marked."""
        page = address // _PAGE
        return bool(self.log[page // 8] >> page % 8 & 1)


@register("log.base", user("SET_LOG_BASE"), "SET_LOG_BASE is answered, and the log is taken.")
def _base(t: Trial) -> None:
    _Logged(t, on=False)


@register("log.data", _MIGRATION, "Pages of buffers that are written are marked.")
def _data(t: Trial) -> None:
    if not t.request().room:
        t.skip("requests of this queue have nothing to write")
    side = _Logged(t)
    (buffer,) = t.serves(side.queue)
    for address, _ in buffer.writable:
        t.expect(side.marked(address), f"wrote to page {address:#x} and did not mark it")


@register("log.used-ring", _MIGRATION, "Writes to the used ring are marked at its log address.")
def _used(t: Trial) -> None:
    side = _Logged(t)
    t.serves(side.queue)
    t.expect(side.marked(side.queue.used), "wrote to the used ring and did not mark it")


@register("log.others-not", _MIGRATION, "Pages that are not written are not marked.")
def _others(t: Trial) -> None:
    side = _Logged(t)
    t.serves(side.queue)
    last = t.ram.end - _PAGE
    t.expect(not side.marked(last), f"marked page {last:#x}, which nothing wrote to")


@register("log.off", _MIGRATION, "With LOG_ALL off nothing is marked.")
def _off(t: Trial) -> None:
    side = _Logged(t)
    t.serves(side.queue)
    t.link.do(_F.SET_FEATURES, U64(t.link.features))
    t.link.do(_F.SET_VRING_ADDR, side.queue.addresses)
    side.log[:] = bytes(_BYTES)
    t.ram.take(1, _PAGE)
    t.ram.take(1, _PAGE)
    t.serves(side.queue)
    t.expect(not any(side.log[:]), "marks pages although the log is off")


@register("log.on-while-running", _MIGRATION, "The log can be started while rings run.")
def _on(t: Trial) -> None:
    side = _Logged(t, on=False)
    t.serves(side.queue, 3)
    t.link.do(_F.SET_FEATURES, U64(t.link.features | LOG_ALL))
    t.serves(side.queue, 3)


@hostile(
    "log.too-small",
    user("Log description"),
    "A log that is too small for guest memory is refused, or not written beyond its end.",
)
def _small(t: Trial) -> None:
    t.needs(features=LOG_ALL, protocol=_LOG)
    queue = t.ready(protocol=PLAIN | _LOG)
    fd = t.memfd(8)
    t.link.ask(_F.SET_LOG_BASE, Log(8, 0), [fd])
    t.link.refuses(_F.SET_FEATURES, U64(t.link.features | LOG_ALL))
    t.post(queue, 2)
    queue.outcome(QUIET)
    queue.stop()


@hostile(
    "log.size-lies",
    user("Log description"),
    "A log whose size is more than its file has is refused, or nothing is written beyond its end.",
)
def _lies(t: Trial) -> None:
    t.needs(features=LOG_ALL, protocol=_LOG)
    queue = t.ready(protocol=PLAIN | _LOG)
    for size, offset in ((1 << 62, 0), (4096, (1 << 64) - 4096), (1 << 30, 1 << 40)):
        try:
            t.link.ask(_F.SET_LOG_BASE, Log(size, offset), [t.memfd(4096)])
        except HungUpError:
            t.reject("closed the connection at SET_LOG_BASE")
    t.link.refuses(_F.SET_FEATURES, U64(t.link.features | LOG_ALL))
    t.post(queue, 2)
    queue.outcome(QUIET)
    queue.stop()
