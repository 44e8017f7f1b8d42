"""What ``GET /status`` returns: one JSON object, a :class:`Status`.

Names end with their unit: ``_s`` seconds, ``_bytes`` bytes, ``_per_s`` a second. Counts begin with
the server, go on over all its front-ends or clients, and never fall. Times are seconds of
CLOCK_MONOTONIC, but for ``started``. Fields may be added; those that are here keep their meaning
as long as ``schema`` is 1.
"""

from __future__ import annotations

from typing import Final, TypedDict

SCHEMA: Final = 1


class Process(TypedDict):
    """The process that serves."""

    pid: int
    """Its number, as it sees it itself."""
    started: float
    """When the server was made, in seconds since 1970."""
    uptime_s: float
    """For how long it has been there."""


class DeviceInfo(TypedDict):
    """What is served, and how."""

    kind: str
    """The class of the device."""
    transport: str
    """``vhost-user`` or ``vfio-user``."""
    path: str
    """Its socket; empty if that has no name."""
    origin: int
    """The number of the server in records of tracepoints."""
    device_id: int | None
    """The type of a virtio device (virtio 1.4, section 5); null of a PCI device that is none."""
    config: str
    """Its configuration space when the server began, in hexadecimal."""


class Peer(TypedDict):
    """The front-end or client that is served now."""

    number: int
    """Which one it is since the server began, from 1."""
    connected_s: float
    """For how long."""
    features: list[str]
    """The feature bits that were negotiated, by name; ``bit N`` if it has none here."""
    feature_bits: int
    """The same as a number."""
    protocol_features: list[str]
    """Those of vhost-user's protocol."""
    status: list[str]
    """The device status that its driver has set."""


class Latency(TypedDict):
    """How long something took. Quantiles are right to 6 %; all are 0 if nothing was measured."""

    count: int
    """How many were measured."""
    sum_s: float
    """All of them together."""
    mean_s: float
    """On average."""
    p50_s: float
    """The time that half of them took at most."""
    p90_s: float
    """The same for 90 %."""
    p99_s: float
    """The same for 99 %."""
    p999_s: float
    """The same for 99.9 %."""
    max_s: float
    """The end of the bucket of the longest."""
    buckets: list[tuple[float, int]]
    """``(seconds, count)``: how many took less than so long and not less than half of it,
    ascending, without empty ones. What took less than 8 ns is in the first."""


class Rates(TypedDict):
    """What happened a second, over the last second or somewhat more."""

    requests_per_s: float
    """Requests taken."""
    bytes_per_s: float
    """Bytes of them."""
    notifications_per_s: float
    """Notifications of the driver."""


class Queue(TypedDict):
    """A virtqueue."""

    index: int
    """Its number."""
    enabled: bool
    """Whether the driver wants it served."""
    running: bool
    """Whether it is."""
    size: int
    """Entries of its ring; 0 while there is none."""
    next_avail: int
    """The ring position that is taken next."""
    next_used: int
    """The ring position that is published next."""
    depth: int
    """Requests taken and not given back."""
    held: int
    """Those of them that the device answers later."""
    stalled: bool
    """Whether it waits for translations."""
    stalled_s: float
    """For how long."""
    broken: str | None
    """Why it is not served any more."""
    taken: int
    """Requests taken."""
    completed: int
    """Requests given back to the driver."""
    bytes: int
    """Bytes that the requests gave to read and to write."""
    notifications: int
    """Notifications that the driver wanted."""
    rates: Rates
    """Of these."""
    latency: dict[str, Latency]
    """By operation: ``read``, ``write``, ``flush``, ``other``; from being found with all that it
    needs to being given back, without what it waited for translations before. Only operations that
    happened; measured since the control socket has been open."""
    latency_all: Latency
    """The same of all operations together."""


class IotlbInfo(TypedDict):
    """Translations in front of guest memory; null where addresses are physical."""

    entries: int
    """Mappings."""
    capacity: int | None
    """At most, if that is limited."""
    hits: int
    """Lookups that resolved, of this front-end or client."""
    lookup_misses: int
    """Lookups that lacked something."""
    hit_rate: float
    """The share of hits; 0 before the first lookup."""
    access_fails: int
    """Lookups that were forbidden."""
    evictions: int
    """Mappings dropped for want of room."""
    pending: int
    """Misses without an answer yet."""
    miss_latency: Latency
    """How long answers to misses took."""


class Region(TypedDict):
    """A piece of memory that the front-end or client shares."""

    address: int
    """Guest physical address, or for vfio-user the place in the space of the client's files."""
    length_bytes: int
    """How much."""
    user_address: int | None
    """Its address in the front-end."""


class Dirty(TypedDict):
    """Pages that the device writes."""

    tracked: bool
    """Whether they are counted (``--track-dirty``)."""
    logging: bool
    """Whether the front-end wants them in its log."""
    pages: int
    """Different pages written, of this front-end; 0 unless they are counted."""
    pages_per_s: float
    """New ones a second."""


class Budget(TypedDict):
    """A limit, and how much of it is used."""

    used: int
    """At this moment."""
    limit: int
    """At most."""


class Ring(TypedDict):
    """A ring of records of tracepoints, for ``guestio.trace.TraceReader``."""

    number: int
    """Its number."""
    fd: int
    """Its descriptor in the process that serves."""


class Trace(TypedDict):
    """Tracepoints."""

    version: int
    """Of the records' layout."""
    groups: list[str]
    """The groups that are written now."""
    rings: list[Ring]
    """Where they are."""
    unheld: int
    """Records that were lost for want of a ring."""


class Status(TypedDict):
    """A server at a moment."""

    schema: int
    """1."""
    version: str
    """Of guestio."""
    time_s: float
    """When this was so."""
    process: Process
    """The process."""
    device: DeviceInfo
    """What is served."""
    peer: Peer | None
    """Whom."""
    counts: dict[str, int]
    """All counters of the server, as its ``statistics`` have them."""
    rates: dict[str, float]
    """How much each of them grew, a second."""
    queues: list[Queue]
    """The virtqueues; none of a PCI device that is no virtio device."""
    iotlb: IotlbInfo | None
    """Translations."""
    memory: list[Region]
    """Memory."""
    faults: dict[str, int]
    """Those of the counts that are mistakes: of drivers, front-ends, the device, the host."""
    dirty: Dirty
    """Written pages."""
    budgets: dict[str, Budget]
    """Limits."""
    rules: int | None
    """Rules that the device misbehaves by at this moment, see ``/fault``; null if it obeys none."""
    trace: Trace
    """Tracepoints."""


class Cells(TypedDict):
    """Those parts of a survey in which something is mapped, as columns of equal length."""

    index: list[int]
    """Which part, from 0; ascending."""
    entries: list[int]
    """Mappings that lie in it, of those that were looked at."""
    mapped_bytes: list[int]
    """Bytes that they map."""
    unseen_bytes: list[int]
    """Bytes at its end that were not looked at, since so many mappings came before."""
    access: list[str]
    """What is allowed: ``r``, ``w``, ``rw``, or several of them, as in ``r+rw``."""
    address: list[int]
    """The first mapped address in it."""
    target: list[int]
    """Where that leads to."""


class Survey(TypedDict):
    """What a range of addresses has, in equal parts."""

    address: int
    """Where the range begins."""
    length_bytes: int
    """How long it is."""
    parts: int
    """How many parts it has."""
    translated: bool
    """Whether there is an IOMMU in front; otherwise, and of memory, addresses are physical."""
    entries: int
    """Mappings, or pieces of memory, in all."""
    extent: tuple[int, int] | None
    """The first and the last address of all of them."""
    cells: Cells
    """The parts that are not empty."""
    recorded_s: float
    """For how long changes of translations have been recorded; 0 if that begins with this
    question."""
    age_s: list[float | None] | None
    """For each cell, how long ago something was mapped in it last, as far as that is still in a
    ring of records. null unless asked for."""
    hits: list[int] | None
    """For each cell, how many buffers of requests touched it, of those in the rings of records.
    null unless asked for."""
    hits_s: float
    """The seconds that these hits are from; 0 if none was recorded."""
    dirty_pages: list[int] | None
    """For each cell, pages that the device has written in it. null unless they are counted."""


class Recorded(TypedDict):
    """An event that concerned an address, as far as it is still in a ring of records."""

    time_s: float
    """When it happened."""
    what: str
    """The event, as `guestio.trace.What` names it."""
    address: int
    """Where it began."""
    length_bytes: int
    """How far it reached."""
    detail: int
    """What it says besides."""
    result: int
    """And this: of events of a virtio-iommu the domain, of its faults the endpoint."""
    access: str
    """``r``, ``w``, ``rw`` or nothing."""


class Mapping(TypedDict):
    """A mapping that an address lies in."""

    address: int
    """Where it begins."""
    length_bytes: int
    """How long it is."""
    target: int
    """Where it leads to: guest physical, or in the space of a client's files."""
    access: str
    """What it allows: ``r``, ``w`` or ``rw``."""
    since_s: float | None
    """For how long, if the event that made it is still in a ring of records."""


class Reserved(TypedDict):
    """What an endpoint's driver cannot map."""

    address: int
    """Where it begins."""
    length_bytes: int
    """How long it is."""
    subtype: int
    """``VIRTIO_IOMMU_RESV_MEM_T_*`` (virtio 1.4, section 5.13.6.8.3)."""


class Held(TypedDict):
    """Memory that a client of an endpoint has exported."""

    address: int
    """Where it begins, I/O virtual."""
    length_bytes: int
    """How long it is."""
    broken: bool
    """Whether its session is to end."""


class EndpointInfo(TypedDict):
    """An endpoint of a virtio-iommu."""

    number: int
    """Its id."""
    domain: int | None
    """The domain it is attached to; null if to none."""
    bypass: bool
    """Whether it reaches all of memory, untranslated."""
    others: list[int]
    """Other endpoints of that domain, which share its mappings; 64 at most."""
    reserved: list[Reserved]
    """What is reserved in the range; 64 at most."""
    held: list[Held]
    """What clients hold of the range; 64 at most."""


class Explanation(TypedDict):
    """What an address leads to, what an access to it would meet, and what happened to it last."""

    address: int
    """The address."""
    length_bytes: int
    """The bytes from there on."""
    translated: bool
    """Whether there is an IOMMU in front; otherwise addresses are physical."""
    mapped: list[Mapping]
    """The mappings that lie in the range; 64 at most."""
    read: str
    """What a read would meet."""
    write: str
    """What a write would meet."""
    pending: bool
    """Whether its translation has been asked for, and no answer has come yet."""
    endpoint: EndpointInfo | None
    """Whose access it is, behind a virtio-iommu that is served; null if none was asked about."""
    recorded_s: float
    """For how long changes of translations have been recorded; 0 if that begins with this
    question."""
    last: list[Recorded]
    """The latest events about it, the newest first; 20 at most."""
