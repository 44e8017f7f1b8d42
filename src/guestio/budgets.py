"""What a peer, a guest or a device may cost: limits on time, memory, descriptors and log lines.

Each constant names the resource, its unit and what happens once it is used up. Limits of the
compiled core's own structures (tree fan-out, slab sizes) are not budgets: they are in its header.
`docs/limits.md` lists the same for users.
"""

from __future__ import annotations

STOP_TIMEOUT = 1.0
"""Seconds that a stop waits for requests that a device still holds; then they are disowned."""

PERSIST_TIMEOUT = 60.0
"""Seconds that the stop of the last queue waits for what its device has acknowledged to be on the
medium; then the front-end is told that the queue has stopped, and the log that it is not."""

DEVICE_STATE = 1 << 20
"""Bytes of a device's state that it takes at most from a front-end, unless its class says otherwise
(`Device.max_state`); more is refused. A console takes what may wait for its guest besides, a
virtio-iommu all the mappings that it may have."""

FRONTEND_STATE = 1 << 28
"""Bytes of a device's state that a `Frontend` takes from a back-end, unless told otherwise."""

COPY_GRACE = 0.25
"""Seconds beyond its limit that a stop waits for system calls that move a request's memory."""

CANCEL_SECONDS = 0.1
"""Seconds that the futures of disowned requests may take in all to be cancelled, when a class of
the device's own does more than setting a flag; those that are left are not cancelled."""

LONGEST_TIMEOUT = 3600.0
"""Seconds that a time limit of a back-end may be set to at most; more is refused."""

IOMMU_DOMAIN_MAPPINGS = 1 << 20
"""Mappings of one domain of a virtio-iommu; a MAP beyond is answered with NOMEM."""
IOMMU_TOTAL_MAPPINGS = 1 << 22
"""Mappings of all domains of a virtio-iommu, those of each domain counted once more for every DMA
target that holds them. About 130 bytes each in a domain, 400 in the list of a target. A MAP, or an
ATTACH of an endpoint with a target, beyond is answered with NOMEM."""
IOMMU_WAITING_REQUESTS = 256
"""Requests of a virtio-iommu that wait for their answers. Those behind them in its queue are begun
when one has been answered; a request that comes without a queue is answered with NOMEM."""
IOMMU_EVENTS_PER_TURN = 256
"""Buffers for the fault records of a virtio-iommu that are filled before the loop serves others."""
IOMMU_REVOKE_AFTER = 5.0
"""Seconds that a client of exported memory has to release what the guest unmapped; then it is
revoked. A Linux driver spins while it waits for the answer."""
IOMMU_REVOKE_AT_STOP = 0.5
"""Seconds that such a client has if the queue with the request is to stop meanwhile. Less than
STOP_TIMEOUT, so that the request is answered before it is given up."""
IOMMU_BYPASS_WAIT = 1.0
"""Seconds that a change of a virtio-iommu's bypass mode waits for accesses that have begun; it
takes effect later then."""
IOMMU_FAULT_RATE = 1000.0
"""Fault records a second that one endpoint of a virtio-iommu may cause in the long run; more faults
are only counted."""
IOMMU_FAULT_BURST = 1024
"""Fault records that one endpoint may cause at once; more faults are only counted."""
IOMMU_FAULT_RECORDS = 4096
"""Fault records that wait for the guest's event queue; more faults are only counted."""
IOMMU_RECORDS_PER_ACCESS = 16
"""Fault records that one access causes, for the first pieces that it could not reach."""

ENDPOINT_ANSWER_TIMEOUT = 5.0
"""Seconds that a device behind a virtio-iommu in this process has for a request that it answers
later; then the request fails, and its memory is taken from the device."""

EXPORT_RANGES = 4096
"""Different ranges that an export session holds; an export beyond is refused."""
EXPORT_SESSIONS = 256
"""Export sessions of one client in another process; one more is refused."""
EXPORT_PIECES = 1 << 16
"""Pieces of memory that one export to another process consists of; it is refused beyond."""
EXPORT_BACKLOG = 1 << 20
"""Bytes of answers that wait to be sent to such a client; nothing more is read from it until it has
taken them."""

CLOSE_GRACE = 0.02
"""Seconds that closing a peer's descriptors is waited for, so that in the ordinary case they are
closed afterwards. What takes longer goes on in its thread; until then no close is waited for."""

MAX_CLOSERS = 256
"""Threads that close descriptors of peers at the same time, in the whole process. Each takes one
that blocks; the descriptors of further ones stay open until a thread has time."""

MAX_PIPES = 64
"""Pipes that are notified in place of an eventfd at a time, each by a thread, in the whole process;
further ones are refused."""

MAX_QUEUED = 4096
"""Messages that may wait in a socket which is given as call descriptor; with more it is closed. A
socket's buffer holds some hundred."""

FRONTEND_MISSES_PER_TURN = 1024
"""Requests of a back-end that a front-end answers before it returns to its caller, or stops."""

LOG_BURST = 10
"""Log lines of one kind that a guest, a peer or a device causes in an interval of LOG_INTERVAL, in
the whole process; further ones are counted, and the count is logged when the interval is over."""

LOG_LINES = 60
"""Such lines of all kinds together."""

LOG_INTERVAL = 10.0
"""Seconds."""

LOG_QUEUE = 1000
"""Lines of the log of a server command that wait for standard error to be read; further ones are
lost, and counted."""

LOG_TEXT = 400
"""Characters of one text that foreign code puts into a log line, that of a device's exception for
example; the rest is cut off, and the line says how long it was."""

LOG_TRACE = 4000
"""Characters of a traceback in the log; its beginning is cut off."""

LOG_FRAMES = 16
"""Calls of a traceback in the log, the last ones."""

LOG_CAUSES = 4
"""Exceptions in a traceback in the log: the one that was raised last and what led to it."""

TURN_BYTES = 4 << 20
"""Bytes of a queue's requests that are moved before the loop serves the main channel, other queues
and the stop flag. The last request may exceed it, by INLINE_BYTES at most."""

TURN_SECONDS = 0.01
"""Seconds after which callbacks that wait let the descriptors be looked at again, and after which a
device is given no more of the requests that were taken: the others are put back into the ring."""

SLOW_DEVICE = 1.0
"""Seconds that a device may work on requests in the thread of their queue without being reported.
The thread serves nothing else meanwhile."""

SLOW_ANSWER = 10.0
"""Seconds that a device may take to answer a request later without being named in the log."""

INLINE_BYTES = 2 << 20
"""Bytes of a block request that are moved where the ring is walked; larger ones are moved by the
device's threads, in slices."""

SLICE_BYTES = 4 << 20
"""Bytes of a block request that a thread moves before it serves another queue, and before it
checks whether the request is to be given up."""

TRIM_SLICE_BYTES = 32 << 20
"""The same for discards and writing zeroes."""

TRIM_SECTORS = 1 << 18
"""Sectors of one range of a discard or write-zeroes request, which has up to 32; one with more, or
with ranges that overlap, fails as a whole."""

GIVE_UP_AFTER = 0.5
"""Seconds after which a block request in slices is given up once its queue is to stop; it fails
then. Less than STOP_TIMEOUT, so that it is not disowned."""

ENTROPY_BYTES = 1 << 16
"""Bytes that an entropy device gives in answer to one request; a driver requests the rest."""

CONSOLE_INPUT = 1 << 16
"""Bytes that wait for a guest which does not read from a port of its console device; the descriptor
they come from is not read on, and `ConsolePort.send` takes no more."""

CONSOLE_OUTPUT = 1 << 16
"""Bytes that a guest wrote to a port and that wait for their reader; no more buffers of the guest
are taken until it has read them. Once more as much from a buffer that was being written out when
its queue stopped."""

CONSOLE_PATIENCE = 1.0
"""Seconds that the reader of a console may take nothing; then output is dropped until it does.
Linux spins while a console does not take its output. Other ports wait for their readers."""

CONTROL_TURN = 64
"""Control messages of a console device that are sent before control returns to the loop."""

INPUT_EVENTS = 1024
"""Events of an input device that wait for a guest to take them; reports beyond are dropped."""

INPUT_STATUS_EVENTS = 256
"""Events of one request on the status queue of an input device that are looked at."""

DEVICE_CLOSE_TIMEOUT = 0.3
"""Seconds that closing a block device waits for requests under way. The image stays open if that is
not enough, until they are done."""

OUTSTANDING_PIECES = 1 << 19
"""Pieces of memory (about 80 bytes each) that the requests held by the device of one front-end
consist of. Beyond, a ring is read on only once one of its requests is completed."""

HALF_MESSAGE_TIMEOUT = 1.0
"""Seconds that a front-end may take for the rest of a message; then it is disconnected."""

FIRST_MESSAGE_TIMEOUT = 1.0
"""Seconds after which a front-end that has not sent a message makes way for another that waits."""

CONNECT_PAUSE = 0.1
"""Seconds after which a back-end that connects to a front-end tries again. Twice as many after each
further attempt, up to CONNECT_LONGEST_PAUSE."""

CONNECT_LONGEST_PAUSE = 2.0
"""Seconds between such attempts at most. A front-end that stayed as long is tried again after
CONNECT_PAUSE once it is gone; one that hangs up at once is not."""

MAX_WAITING = 16
"""Front-ends that wait until the one that is served goes; one more is hung up."""

WAITING_LOOK = 0.5
"""Seconds between looks at front-ends that wait: one that is gone is forgotten, and one that has
passed descriptors is hung up. None does so before it is answered, and a descriptor that is not
received stays open: the other end of the connection that is served, say, which then never ends."""

SEND_TIMEOUT = 5.0
"""Seconds that a peer may read nothing of what it was sent; then it is disconnected. Nothing more
is read from it meanwhile, and its queues are served on."""

SEND_RETRY = 0.01
"""Seconds between attempts to send to a peer that does not read."""

MAX_BACKLOG = 1 << 18
"""Bytes of misses and reports that wait for a front-end to read them; more are dropped, and
sent again later."""

MAX_GUEST_MEMORY = 1 << 45
"""Bytes of guest memory that one front-end may share; a table or region beyond is refused."""
MAX_DIRTY_LOG = 1 << 37
"""Bytes of a front-end's dirty log, enough for guest addresses of 52 bits; a larger one ends the
connection."""

DMA_MAPPINGS = 1 << 20
"""Mappings of one vfio-user client; one more is refused (ENOSPC). About 60 bytes each."""

DMA_UNMAP_STEP = 1 << 15
"""Mappings that an unmap of very many removes before the loop serves others; about 5 ms."""

DMA_FILES = 64
"""Files that mappings of a vfio-user client lead to; a mapping of one more is refused (ENOSPC)."""

DMA_IDLE_FILES = 4
"""Files that stay mapped although no mapping leads to them any more; the oldest goes."""

DMA_REVOKE_AFTER = 4.0
"""Seconds that an access of a PCI device may go on after its client has unmapped the memory; then
the memory is taken away from it. The client waits: QEMU with the whole guest, for 5 s at most."""

BUS_PATIENCE = 0.5
"""Seconds that a virtqueue of a PCI function waits for memory that is not mapped; then its request
fails, or the queue breaks if that memory is its ring. A client that rearranges its maps takes them
away for a moment."""

BUS_LOOK = 0.01
"""Seconds between looks whether it is mapped."""

DMA_COPY = 1 << 24
"""Bytes of memory that a client does not share which one access reaches; it fails beyond."""

DMA_ANSWER_TIMEOUT = 5.0
"""Seconds that a client may take to answer a DMA_READ or DMA_WRITE; then the access fails."""

DMA_NESTED = 16
"""Answers of a client that are waited for at a time: what it writes to registers meanwhile may have
the device ask again. One more access fails."""

BAR_ACCESSES = 8
"""Accesses to a PCI device's registers that one message asks for and that are made before it is
looked whether the turn (TURN_SECONDS) is over; the rest is gone on with when others had theirs."""

DMA_LOOK = 0.001
"""Seconds between looks whether such an access has ended."""

DMA_STOP_LOOK = 0.05
"""Seconds between looks whether the server is to stop, while a client is waited for."""

CLIENT_TIMEOUT = 10.0
"""Seconds that a vfio-user server may take to answer, unless a `Client` is told otherwise; then its
connection is ended."""

CLIENT_VECTORS = 4096
"""Interrupts of one kind that a vfio-user server may say its device has; more are refused."""

CLIENT_AREAS = 1024
"""Areas of a region that can be mapped, or that have a descriptor to notify; more are refused."""

EXIT_TIMEOUT = 1.4
"""Seconds that a server command or `guestio.serve` waits after SIGINT or SIGTERM for its front-end
to be let go of; then it removes its socket and ends all the same, with status 0."""

CLOSE_TIMEOUT = 1.75
"""Seconds that a server command waits after SIGINT or SIGTERM for a device that is being made,
attached or closed; then it does the same."""

NVME_QUEUES = 63
"""I/O queues of each kind that an NVMe controller has at most."""

NVME_QUEUE_ENTRIES = 1024
"""Entries of a queue of an NVMe controller; a larger one is refused (CAP.MQES)."""

NVME_TRANSFER_BYTES = 512 << 10
"""Bytes that an NVMe command moves at most, a power of two of pages; more is refused (MDTS)."""

NVME_EVENTS = 4
"""Asynchronous event requests of a driver that wait for an event; more are refused (AERL)."""

NVME_SGL_DESCRIPTORS = 1024
"""Descriptors of the SGL of one NVMe command; it fails beyond."""

NVME_BUFFER_BYTES = 16 << 20
"""Bytes of NVMe commands that are copied because they wait for the disk, are flushed, compared, or
in memory that is not shared; further commands are begun when others have ended."""

NVME_TURN_BYTES = 4 << 20
"""Bytes that an NVMe controller moves before the loop serves others. The last command may exceed
it, by 512 KiB at most."""

NVME_TURN_SECONDS = 0.002
"""Seconds that it serves its queues before the loop serves others, but for the last command."""

NET_TURN_FRAMES = 128
"""Frames that a network device moves to its driver before control returns to the loop."""

NET_TURN_BYTES = 4 << 20
"""Their bytes; the last frame may exceed it."""

NET_BACKLOG_FRAMES = 512
"""Frames of a port without a descriptor that wait for buffers of the driver; more are dropped."""

NET_BACKLOG_BYTES = 2 << 20
"""Their bytes."""

NET_CONTROL_BYTES = 64 << 10
"""Bytes of a network driver's control command; a longer one fails."""

NET_FILTER_ADDRESSES = 64
"""Addresses that a network device filters by; with more in the driver's table it receives all."""

NET_RETRY = 0.1
"""Seconds until a port is read again after an error that may pass, as of a tap that is down."""

NET_CAPTURE_BYTES = 4 << 30
"""Bytes of a capture of frames; it ends then."""

NET_LEASES = 256
"""Addresses that the built-in DHCP server has given away at most; the oldest is given to the next
client then."""

CONTROL_CONNECTIONS = 32
"""Connections to a control socket at a time; with one more, the one that has been there longest
without a stream of events goes."""
CONTROL_STREAMS = 8
"""Streams of events of a server at a time; another one is refused (503)."""
CONTROL_REQUEST_SECONDS = 5.0
"""Seconds that a client of a control socket has to send a request, or to take what it is sent; then
it is disconnected."""
CONTROL_HEADER_BYTES = 16384
"""Bytes of a request's first line and headers; one with more is refused and disconnected."""
CONTROL_EVENTS = 500
"""Events that a stream is sent in a tenth of a second; more are only counted as lost."""
CONTROL_EXPLAIN_BYTES = 1 << 20
"""Bytes of a range that is explained at once; a longer one is refused (400)."""
CONTROL_RECALL_SECONDS = 600.0
"""Seconds after the last question about an address for which translations are recorded."""
CONTROL_HEAT_SECONDS = 5.0
"""Seconds after the last survey with hits for which requests are recorded."""
CONTROL_SURVEY_PARTS = 4096
"""Parts of a survey of addresses; one with more is refused (400)."""
CONTROL_SURVEY_ENTRIES = 64
"""Mappings that a survey looks at in each part; what comes after them in it is not looked at."""
CONTROL_RELAY_BYTES = 65536
"""Bytes of a request's body that `guestio inspect` passes on; a longer one is refused (413)."""
CONTROL_END_SECONDS = 1.0
"""Seconds that the end of a server waits for its control thread."""

FAULT_RULES = 256
"""Rules in force of a device that misbehaves on command; a further one is refused."""

FAULT_RULE_CHARS = 1000
"""Characters of such a rule."""

FAULT_PAGES = 4096
"""Pages of buffers that such a device remembers, to access them after they were unmapped; the
oldest is forgotten for a further one."""

JUDGE_REASONS = 1
"""Breaches of one demand that `check --front-end` keeps the reason of; further ones are counted."""

JUDGE_MISSES = 4096
"""Translations that such a judge asks for at a time for one range; the rest follows."""

JUDGE_PIECE = 1 << 20
"""Bytes that such a judge's device moves in one step."""

RECORD_OPEN_REQUESTS = 1 << 20
"""Requests of a recording that wait for their completion; beyond, all of them are written as they
are."""

RECORD_OPEN_MAPPINGS = 1 << 20
"""Mappings of a recording whose ends are waited for; the lifetimes of more are not written."""

RECORD_RING = 1 << 18
"""Records of 64 bytes that the ring of a thread holds while a recording is made."""

RECORD_DATA_RING = 1 << 19
"""The same where all bytes of requests are recorded, 40 to a record: two of the largest fit."""

RECORD_CONTENT_BYTES = 8 << 20
"""Bytes of a request that are recorded, and over which a hash is taken; the rest is left out."""

RECORD_BYTES = 16 << 30
"""Bytes of a recording while it runs, unless it is told otherwise; it ends then."""

RECORD_FINISH_BYTES = 8 << 20
"""Bytes of records that a server command makes a Parquet file at its end, which is due in a moment;
more are left as they were written."""

RECORD_DISK_FREE = 64 << 20
"""Bytes that a recording leaves free in its file system; it ends before."""

RECORD_PEERS = 1000
"""Front-ends or clients that a recording describes; the oldest of more is left out."""

REPORT_MEMORY_BYTES = 600 << 20
"""Bytes of memory that DuckDB may use for a report, on each machine of a cluster, unless it is told
otherwise; more goes to temporary files."""

REPORT_LEAST_BYTES = 64 << 20
"""Bytes of memory that a report takes at least."""

REPORT_MERGE_BYTES = 200 << 20
"""Of these, bytes with which answers of parts are put together."""

REPORT_PART_ROWS = 1 << 20
"""Rows of a recording that a report looks at together, at most, but for larger row groups."""

REPORT_QUEUES = 1000
"""Queues, each kind of operation by itself, that a report lists; totals are of all."""

REPORT_MISSES = 1000
"""Missing translations of a request that a report tells apart; requests with more count as this."""

REPORT_PLACES = 20
"""Pages of memory, and places of an image, that a report lists: those used most."""

REPORT_FAULTS = 100
"""Kinds of faults that a report lists: those seen most."""

REPORT_RECORDINGS = 1000
"""Recordings that a report describes, and as many that could not be read; more are counted."""

REPORT_CLUSTER_WAIT = 60.0
"""Seconds after which a report gives up a cluster without workers."""

PROXY_MESSAGES = 64
"""Messages that wait in a proxy for one peer to read them, what a rule delays included; nothing
more is read from the others meanwhile."""

PROXY_PENDING = 1024
"""Requests on their way through a proxy whose answers are to come; with more the connection is
cut."""

PROXY_CONNECT_SECONDS = 5.0
"""Seconds that a front-end of a proxy waits for a back-end that does not listen yet, or not any
more; then it is cut."""

PROXY_CONNECT_RETRY = 0.05
"""Seconds between attempts to connect to it."""

PROXY_OWN_QUEUES = 64
"""Queues that a proxy can relay: for each of them it has half a MiB of addresses for rings."""

PROXY_MISS_AGAIN = 0.02
"""Seconds until a proxy that relays asks again for the translation of a ring."""

PROXY_LOOK = 0.01
"""Seconds between looks at rings in use whose notifications were not seen; ten times as many while
nothing happens there."""

REPLAY_MEMORY = 1 << 42
"""Bytes of guest memory that the recorded addresses of a replay may span; more is refused. Only
what is written takes memory."""

REPLAY_REGIONS = 6
"""Regions of guest memory that a replay shares besides one for its rings: with those, as many as
every back-end takes. Addresses far apart share a region, whose gaps take no memory."""

REPLAY_PAGES = 1 << 22
"""Pages of I/O virtual addresses that the requests of a replay may use behind an IOMMU, about 200
bytes each; more is refused."""

RECORD_CONVERTED = 1 << 25
"""Events of a recording that are converted for other programs at a time, about 5 GiB of memory;
more is refused."""

FUZZ_CASE_SECONDS = 30.0
"""Seconds that the steps of one case of `guestio fuzz` may take; those that are left are not
played."""

FUZZ_REPLIES = 8
"""Messages of a fuzzed back-end that are read after one that was sent to it."""

FUZZ_KICKS = 16
"""Notifications that one step of a case gives."""

FUZZ_STDERR_LINES = 20
"""Lines of the standard error of a back-end that a finding keeps, each of at most 300 characters;
earlier ones are forgotten."""

FUZZ_MINIMIZE_RUNS = 80
"""How often a case that fails is played at most to make it smaller."""

FUZZ_MINIMIZE_SECONDS = 60.0
"""Seconds that this may take; what it has come to is kept then."""

FUZZ_FINDINGS = 200
"""Different findings of a campaign that are written; it ends with that many."""

FUZZ_HISTORY = 100
"""Cases before a failing one, since the back-end was started, that a finding names."""

FUZZ_FILE_BYTES = 1 << 24
"""Bytes of a file of a case, or of the state of a campaign, that is read; more is refused."""

FUZZ_LINE_BYTES = 1 << 16
"""Bytes of a line that a fuzzed guest prints; what is longer is taken as several lines."""
