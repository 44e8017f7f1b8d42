"""What a front-end and a driver must do, and the book in which a judge keeps what they did.

A :class:`Demand` is one sentence of a specification. Nothing here looks at a message or a ring: a
judge (:mod:`guestio.faults.frontend.judge`, :mod:`guestio.faults.frontend.ring`) tells the
:class:`Book` that a demand was met or broken, as often as it sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from guestio.budgets import JUDGE_REASONS
from guestio.faults.catalogue import user, virtio
from guestio.faults.report import Report, Result, Severity, Verdict, printable

MUST: Final = Severity.MUST
SHOULD: Final = Severity.SHOULD


@dataclass(frozen=True, slots=True)
class Demand:
    """One sentence of a specification that a front-end or a driver keeps to, or breaks.

    Attributes:
        id: Its name: an area, a dot, and what it is about.
        source: Where the specification says so.
        text: What it demands, in our words.
        unseen: What did not happen if it was never judged.
        severity: How strongly.
        devices: The device types that it applies to; empty for all.
    """

    id: str
    source: str
    text: str
    unseen: str
    severity: Severity = MUST
    devices: frozenset[str] = frozenset()

    def applies_to(self, device: str) -> bool:
        """Whether it is for this type of device."""
        return not self.devices or device in self.devices


class Book:
    """What was seen of each demand.

    Args:
        demands: Those that are judged; what is said of others is ignored.
    """

    def __init__(self, demands: Sequence[Demand]) -> None:
        self.demands = tuple(demands)
        self._met = dict.fromkeys((each.id for each in demands), 0)
        self._broken: dict[str, list[str]] = {each.id: [] for each in demands}
        self._breaches = dict.fromkeys(self._met, 0)

    def judge(self, name: str, holds: object, reason: str = "") -> bool:
        """Note whether a demand was met this time, and return that.

        Args:
            name: Of the demand.
            holds: Whether it was met.
            reason: What was wrong if not.
        """
        if holds:
            if name in self._met:
                self._met[name] += 1
            return True
        if name in self._broken:
            self._breaches[name] += 1
            if len(self._broken[name]) < JUDGE_REASONS:
                self._broken[name].append(reason)
        return False

    def met(self, name: str, times: int = 1) -> None:
        """Note that a demand was met so often."""
        if name in self._met:
            self._met[name] += times

    def broken(self, name: str) -> bool:
        """Whether a demand was broken so far."""
        return bool(self._breaches.get(name))

    def result(self, demand: Demand) -> Result:
        """What has come out for a demand so far."""
        name = demand.id
        breaches, met = self._breaches[name], self._met[name]
        if breaches:
            more = f" (and {breaches - 1} more times)" if breaches > 1 else ""
            verdict, reason = Verdict.FAIL, self._broken[name][0] + more
        elif met:
            verdict, reason = Verdict.PASS, f"seen {met} times" if met > 1 else "seen once"
        else:
            verdict, reason = Verdict.SKIP, f"not seen: {demand.unseen}"
        return Result(name, demand.text, demand.source, demand.severity, verdict, printable(reason))

    def report(self, target: str, device: str) -> Report:
        """What has come out so far."""
        report = Report(target, device, 0)
        report.results += map(self.result, self.demands)
        return report


_BLK: Final = frozenset({"blk"})
_DESC: Final = virtio("2.7.5.2")
_INDIRECT: Final = virtio("2.7.5.3.1")
_AVAIL: Final = virtio("2.7.6.1")
_INIT: Final = virtio("3.1.1")
_BLK_DRIVER: Final = virtio("5.2.6.1")
_SLOTS: Final = user("ADD_MEM_REG")
_NO_SLOTS: Final = "no region was added on its own"
_NO_TABLE: Final = "no memory was shared"
_NO_RING: Final = "no ring was set up"
_NO_REQUEST: Final = "no request came"
_NO_UPDATE: Final = "no translation was told"
_NO_STATUS: Final = "the device status was not set"
_NO_CHAIN: Final = "no buffer was made available"
_NO_TABLES: Final = "no indirect table was used"


def _protocol(feature: str, messages: str) -> Demand:
    return Demand(
        f"protocol.{feature}",
        user("Protocol features"),
        f"{messages} only once protocol feature {feature} was negotiated.",
        "none of these messages came",
    )


DEMANDS: Final[tuple[Demand, ...]] = (
    # Messages
    Demand("message.version", user("Header"), "Every message has version 1.", "no message came"),
    Demand(
        "message.no-reply-flag",
        user("Header"),
        "A request does not have the reply flag.",
        "no message came",
    ),
    Demand(
        "message.known",
        user("Front-end message types"),
        "A request is one that the specification knows.",
        "no message came",
    ),
    Demand(
        "message.size",
        user("Message Specification"),
        "A payload has the size that its request says, and counts in it agree with it.",
        "no message came",
    ),
    Demand(
        "message.descriptors",
        user("Communication"),
        "Descriptors come with those requests only that carry them, and as many as they say.",
        "no message came",
    ),
    Demand(
        "message.complete",
        user("Message Specification"),
        "The connection does not end in the middle of a message.",
        "the connection did not end",
    ),
    Demand(
        "ack.negotiated",
        user("VHOST_USER_PROTOCOL_F_REPLY_ACK"),
        "need_reply is set only once REPLY_ACK is negotiated, or by the message that does so.",
        "need_reply was never set",
    ),
    # Negotiation
    Demand(
        "owner.before-rings",
        user("SET_OWNER"),
        "SET_OWNER comes before a ring is started.",
        "no ring was started",
    ),
    Demand(
        "owner.once",
        user("SET_OWNER"),
        "A front-end becomes the owner once per connection.",
        "SET_OWNER did not come",
        SHOULD,
    ),
    Demand(
        "features.asked",
        user("GET_FEATURES"),
        "What is offered is asked for before SET_FEATURES.",
        "SET_FEATURES did not come",
        SHOULD,
    ),
    Demand(
        "features.offered",
        virtio("2.2.1"),
        "No feature is accepted that was not offered.",
        "SET_FEATURES did not come",
    ),
    Demand(
        "features.version-1",
        virtio("6.1"),
        "VIRTIO_F_VERSION_1 is accepted if it is offered.",
        "no ring was started",
    ),
    Demand(
        "features.before-rings",
        _INIT,
        "Features are negotiated before a ring is started.",
        "no ring was started",
    ),
    Demand(
        "features.while-started",
        _INIT,
        "Features, logging aside, do not change while a ring is started.",
        "SET_FEATURES did not come while a ring was started",
    ),
    Demand(
        "protocol.offered-bit",
        user("GET_PROTOCOL_FEATURES"),
        "Protocol features are asked for and set only if GET_FEATURES has told that there are any.",
        "protocol features were not asked for",
    ),
    Demand(
        "protocol.offered",
        user("SET_PROTOCOL_FEATURES"),
        "No protocol feature is set that was not offered.",
        "SET_PROTOCOL_FEATURES did not come",
    ),
    _protocol("MQ", "GET_QUEUE_NUM comes"),
    _protocol("LOG_SHMFD", "SET_LOG_BASE comes"),
    _protocol("BACKEND_REQ", "SET_BACKEND_REQ_FD comes"),
    _protocol("CONFIG", "GET_CONFIG and SET_CONFIG come"),
    _protocol("RESET_DEVICE", "RESET_DEVICE comes"),
    _protocol("CONFIGURE_MEM_SLOTS", "GET_MAX_MEM_SLOTS, ADD_MEM_REG and REM_MEM_REG come"),
    _protocol("STATUS", "GET_STATUS and SET_STATUS come"),
    _protocol("other", "A request that belongs to a feature which is not offered here comes"),
    # Memory
    Demand(
        "memory.before-rings",
        user("SET_MEM_TABLE"),
        "Memory is shared before a ring is started.",
        "no ring was started",
    ),
    Demand("memory.regions", user("SET_MEM_TABLE"), "A table has 1 to 8 regions.", _NO_TABLE),
    Demand(
        "memory.not-empty",
        user("Memory regions description"),
        "No region is empty.",
        _NO_TABLE,
    ),
    Demand(
        "memory.addresses",
        user("Memory regions description"),
        "No region passes the last address: of the guest, of the front-end, of the file.",
        _NO_TABLE,
    ),
    Demand(
        "memory.guest-disjoint",
        user("Memory regions description"),
        "Regions do not overlap for the guest.",
        _NO_TABLE,
    ),
    Demand(
        "memory.user-disjoint",
        user("Memory regions description"),
        "Regions do not overlap in the front-end.",
        _NO_TABLE,
    ),
    Demand(
        "memory.mappable",
        user("SET_MEM_TABLE"),
        "A region's descriptor can be mapped: it is a file that can be read and written.",
        _NO_TABLE,
    ),
    Demand(
        "memory.in-file",
        user("SET_MEM_TABLE"),
        "A region lies in its file, from its offset on.",
        _NO_TABLE,
    ),
    Demand(
        "memory.stays",
        user("Memory access"),
        "Memory that is shared stays: its file is not cut.",
        "no memory was accessed",
    ),
    Demand("slots.limit", _SLOTS, "There are no more regions than slots.", _NO_SLOTS),
    Demand(
        "slots.remove-known",
        user("REM_MEM_REG"),
        "A region that is removed is one that is shared: same addresses, same size.",
        "no region was removed",
    ),
    Demand(
        "slots.remove-unused",
        user("REM_MEM_REG"),
        "A region is not removed while a started ring lies in it.",
        "no region was removed",
        SHOULD,
    ),
    # Rings
    Demand(
        "vring.index",
        user("GET_QUEUE_NUM"),
        "A ring is one of those that the device has.",
        _NO_RING,
    ),
    Demand(
        "vring.size",
        virtio("2.7"),
        "A ring's size is a power of two, at most 32768.",
        "SET_VRING_NUM did not come",
    ),
    Demand(
        "vring.base",
        user("SET_VRING_BASE"),
        "A ring's base is an index of 16 bits.",
        "SET_VRING_BASE did not come",
    ),
    Demand(
        "vring.base-continues",
        user("SET_VRING_BASE"),
        "A ring goes on where it stopped, or from the beginning.",
        "no ring was started again",
    ),
    Demand(
        "vring.base-fits",
        virtio("2.7.6.1"),
        "When a ring starts, no more buffers are in it than it has room for.",
        "no ring was started",
    ),
    Demand(
        "vring.flags",
        user("SET_VRING_ADDR"),
        "A ring has no flags but the log's, and that only with LOG_SHMFD.",
        "SET_VRING_ADDR did not come",
    ),
    Demand(
        "vring.aligned-desc",
        virtio("2.7"),
        "The descriptor table is aligned to 16 bytes.",
        "SET_VRING_ADDR did not come",
    ),
    Demand(
        "vring.aligned-avail",
        virtio("2.7"),
        "The available ring is aligned to 2 bytes.",
        "SET_VRING_ADDR did not come",
    ),
    Demand(
        "vring.aligned-used",
        virtio("2.7"),
        "The used ring is aligned to 4 bytes.",
        "SET_VRING_ADDR did not come",
    ),
    Demand(
        "vring.in-memory",
        user("SET_VRING_ADDR"),
        "Without an IOMMU a ring's parts lie in shared memory, each in one piece.",
        "no ring was started without an IOMMU",
    ),
    Demand(
        "vring.disjoint",
        virtio("2.7"),
        "A ring's parts do not overlap.",
        "no ring was started",
    ),
    Demand(
        "vring.complete",
        user("Ring states"),
        "A ring has its size and its addresses before it is started.",
        "no ring was started",
    ),
    Demand(
        "vring.while-started",
        user("Ring states"),
        "Size, base and addresses of a ring do not change while it is started.",
        "nothing came for a ring that was started",
    ),
    Demand(
        "vring.enable-negotiated",
        user("SET_VRING_ENABLE"),
        "SET_VRING_ENABLE comes only with protocol features negotiated.",
        "SET_VRING_ENABLE did not come",
    ),
    Demand(
        "vring.enable-value",
        user("SET_VRING_ENABLE"),
        "A ring is enabled with 1, disabled with 0.",
        "SET_VRING_ENABLE did not come",
    ),
    # Descriptors of rings
    Demand(
        "fd.bits",
        user("SET_VRING_KICK"),
        "Of what comes with a kick, call or error descriptor, bits above the eighth are 0.",
        "no kick, call or error descriptor came",
    ),
    Demand(
        "fd.flag",
        user("SET_VRING_KICK"),
        "The flag for no descriptor is set if none comes, and only then.",
        "no kick, call or error descriptor came",
    ),
    Demand(
        "fd.kick",
        user("SET_VRING_KICK"),
        "A kick descriptor can be waited for and read: it is an eventfd.",
        "no kick descriptor came",
    ),
    Demand(
        "fd.call",
        user("SET_VRING_CALL"),
        "A call descriptor can be notified: it is an eventfd, a pipe or a socket.",
        "no call descriptor came",
    ),
    Demand(
        "fd.err",
        user("SET_VRING_ERR"),
        "An error descriptor can be notified: it is an eventfd.",
        "no error descriptor came",
    ),
    Demand(
        "fd.channel",
        user("SET_BACKEND_REQ_FD"),
        "The descriptor of the back-end's channel is a connected Unix stream socket.",
        "SET_BACKEND_REQ_FD did not come",
    ),
    # The back-end's channel
    Demand(
        "channel.reply",
        user("Header"),
        "A reply on the back-end's channel has the code of its request, the flag, and 64 bits.",
        "nothing was asked on the back-end's channel",
    ),
    Demand(
        "channel.asked",
        user("VHOST_USER_PROTOCOL_F_REPLY_ACK"),
        "On the back-end's channel only what wants an answer is answered, once.",
        "nothing was asked on the back-end's channel",
    ),
    # Translation
    Demand(
        "iotlb.negotiated",
        user("IOMMU support"),
        "A translation is told only with VIRTIO_F_ACCESS_PLATFORM negotiated.",
        _NO_UPDATE,
    ),
    Demand(
        "iotlb.type",
        user("An IOTLB message"),
        "A front-end tells updates and invalidations, nothing else.",
        "no IOTLB message came",
    ),
    Demand(
        "iotlb.range",
        user("An IOTLB message"),
        "A range of I/O virtual addresses is not empty and passes no last address.",
        "no IOTLB message came",
    ),
    Demand(
        "iotlb.permission",
        user("An IOTLB message"),
        "A translation allows to read, to write, or both.",
        _NO_UPDATE,
    ),
    Demand(
        "iotlb.in-memory",
        user("IOMMU support"),
        "A translation leads into shared memory, as the front-end addresses it.",
        _NO_UPDATE,
    ),
    Demand(
        "iotlb.miss-answered",
        user("IOMMU support"),
        "A miss is answered in time: by a translation or by an acknowledgement that says failure.",
        "no translation was missing",
    ),
    Demand(
        "iotlb.miss-covered",
        user("IOMMU support"),
        "Once a miss is acknowledged with success its address is translated, for the access asked.",
        "no miss was acknowledged with success",
    ),
    # Configuration, status, log
    Demand(
        "config.flags",
        user("GET_CONFIG"),
        "Flags of the configuration space are 0, or 1 for a migration.",
        "the configuration space was not accessed",
    ),
    Demand(
        "config.writable",
        virtio("5.2.4"),
        "Of a disk's configuration space only the cache mode is written, if that was negotiated.",
        "the configuration space was not written",
        devices=_BLK,
    ),
    Demand(
        "status.bits",
        virtio("2.1"),
        "The device status has bits that exist, and none that only a device sets.",
        _NO_STATUS,
    ),
    Demand(
        "status.kept",
        virtio("2.1.1"),
        "No bit of the device status is cleared, but all at once by a reset.",
        _NO_STATUS,
    ),
    Demand(
        "status.order",
        _INIT,
        "DRIVER_OK comes after FEATURES_OK, which comes after DRIVER.",
        "DRIVER_OK was not set",
    ),
    Demand(
        "status.features",
        _INIT,
        "Features do not change once FEATURES_OK is set.",
        "FEATURES_OK was not set",
    ),
    Demand(
        "log.base-first",
        user("Migration"),
        "There is a log before logging is switched on.",
        "logging was not switched on",
    ),
    Demand(
        "log.mappable",
        user("SET_LOG_BASE"),
        "The log's descriptor can be mapped, with as many bytes as are told.",
        "SET_LOG_BASE did not come",
    ),
    Demand(
        "log.covers",
        user("Log description"),
        "The log has a bit for each page of shared memory.",
        "SET_LOG_BASE did not come",
    ),
    # The available ring
    Demand(
        "avail.index-grows",
        _AVAIL,
        "The available index is never decremented.",
        _NO_CHAIN,
    ),
    Demand(
        "avail.room",
        virtio("2.7.6"),
        "No more buffers are available than the ring has entries.",
        _NO_CHAIN,
    ),
    Demand(
        "avail.head",
        virtio("2.7.6"),
        "An available entry names a descriptor of the table.",
        _NO_CHAIN,
    ),
    Demand(
        "avail.head-free",
        virtio("2.7.13"),
        "A descriptor that begins a buffer in flight does not begin another one.",
        _NO_CHAIN,
    ),
    Demand(
        "avail.flags",
        virtio("2.7.6"),
        "The available ring has no flags but the one against interrupts.",
        _NO_CHAIN,
    ),
    Demand(
        "avail.flags-event-idx",
        virtio("2.7.7.1"),
        "With EVENT_IDX the flags of the available ring are 0.",
        "EVENT_IDX was not negotiated",
    ),
    # Descriptors
    Demand("desc.next", virtio("2.7.5"), "A next index is one of the table's.", _NO_CHAIN),
    Demand("desc.no-loop", _DESC, "A chain of descriptors has no loop.", _NO_CHAIN),
    Demand("desc.total", _DESC, "A chain has at most 2**32 bytes in all.", _NO_CHAIN),
    Demand(
        "desc.order",
        virtio("2.7.4.2"),
        "What the device writes comes after all that it reads.",
        _NO_CHAIN,
    ),
    Demand(
        "desc.flags",
        virtio("2.7.5"),
        "A descriptor has no flags that do not exist.",
        _NO_CHAIN,
        SHOULD,
    ),
    Demand(
        "desc.reachable",
        user("Memory access"),
        "A buffer lies in memory that the device may reach, for what it is to do there.",
        _NO_CHAIN,
    ),
    Demand(
        "desc.free",
        virtio("2.7.13"),
        "A descriptor of a buffer in flight belongs to no other buffer.",
        _NO_CHAIN,
    ),
    Demand(
        "desc.kept",
        virtio("2.7.13"),
        "Descriptors of a buffer in flight are not changed.",
        _NO_CHAIN,
    ),
    Demand(
        "indirect.negotiated",
        _INDIRECT,
        "An indirect table is used only if that was negotiated.",
        _NO_TABLES,
    ),
    Demand(
        "indirect.no-next",
        _INDIRECT,
        "A descriptor that refers to an indirect table has no next one.",
        _NO_TABLES,
    ),
    Demand(
        "indirect.not-nested",
        _INDIRECT,
        "An indirect table refers to no other one.",
        _NO_TABLES,
    ),
    Demand(
        "indirect.length",
        virtio("2.7.5.3"),
        "An indirect table has whole descriptors, at least one.",
        _NO_TABLES,
    ),
    Demand(
        "indirect.chain",
        _INDIRECT,
        "A chain has no more descriptors than the ring has entries.",
        _NO_CHAIN,
    ),
    Demand(
        "notify.sent",
        virtio("2.7.13.4"),
        "A notification is sent for new buffers if the device wants one.",
        _NO_CHAIN,
    ),
    # Requests of a disk
    Demand(
        "blk.header",
        virtio("5.2.6"),
        "A request begins with 16 bytes for the device to read.",
        _NO_REQUEST,
        devices=_BLK,
    ),
    Demand(
        "blk.status",
        virtio("5.2.6"),
        "A request ends with a byte for the device to write.",
        _NO_REQUEST,
        devices=_BLK,
    ),
    Demand(
        "blk.type",
        virtio("5.2.6"),
        "A request is of a type that exists and whose feature was negotiated.",
        _NO_REQUEST,
        devices=_BLK,
    ),
    Demand(
        "blk.direction",
        virtio("5.2.6"),
        "Data lies where the device reads it for a write, where it writes it for a read.",
        _NO_REQUEST,
        devices=_BLK,
    ),
    Demand(
        "blk.multiple",
        _BLK_DRIVER,
        "Reads and writes move a multiple of 512 bytes.",
        "no read or write came",
        devices=_BLK,
    ),
    Demand(
        "blk.capacity",
        _BLK_DRIVER,
        "No read or write passes the end of the disk.",
        "no read or write came",
        devices=_BLK,
    ),
    Demand(
        "blk.segments",
        virtio("5.2.4"),
        "With SEG_MAX negotiated, data has no more descriptors than it says.",
        "no read or write came with SEG_MAX negotiated",
        devices=_BLK,
    ),
    Demand(
        "blk.flush-sector",
        _BLK_DRIVER,
        "The sector of a flush is 0.",
        "no flush came",
        devices=_BLK,
    ),
    Demand(
        "blk.flush-data",
        _BLK_DRIVER,
        "A flush has no data.",
        "no flush came",
        SHOULD,
        devices=_BLK,
    ),
    Demand(
        "blk.id-length",
        _BLK_DRIVER,
        "The data of GET_ID is 20 bytes.",
        "no GET_ID came",
        devices=_BLK,
    ),
    Demand(
        "blk.trim-length",
        _BLK_DRIVER,
        "Discards and write-zeroes have ranges of 16 bytes each, as many as the device takes.",
        "no discard or write-zeroes came",
        devices=_BLK,
    ),
    Demand(
        "blk.trim-range",
        _BLK_DRIVER,
        "No range of a discard or write-zeroes passes the end of the disk or the device's limit.",
        "no discard or write-zeroes came",
        devices=_BLK,
    ),
    Demand(
        "blk.trim-flags",
        _BLK_DRIVER,
        "A discard has no flags, write-zeroes none but the one to unmap.",
        "no discard or write-zeroes came",
        devices=_BLK,
    ),
)
"""All demands, in the order in which they are reported."""


def demands(device: str | None = None) -> tuple[Demand, ...]:
    """Every demand, or those that apply to a type of device, in the order of the report."""
    return tuple(each for each in DEMANDS if device is None or each.applies_to(device))
