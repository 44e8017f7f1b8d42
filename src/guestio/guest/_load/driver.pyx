"""The driver's side of a split virtqueue in memory of our own, for C callers.

It works on the host addresses of the ring's pages, which may lie anywhere, as they do behind an
IOMMU. The device is not trusted: a used ring that contradicts what was made available is reported
and never followed. :class:`guestio.virtio.driver.DriverQueue` is the same for any guest memory.

Source: virtio 1.3 sections 2.7.5 to 2.7.8 (layout), 2.7.7 and 2.7.10 (notification suppression),
2.7.13 and 2.7.14 (order of operations).
"""

from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.unistd cimport write

from guestio._core.base.checks cimport as_address, u32, u64
from guestio.guest._load.extents cimport PAGE, page_at

cdef extern from * nogil:
    """
    #include <stdint.h>
    #define ring_load16(p) __atomic_load_n((const uint16_t *)(p), __ATOMIC_ACQUIRE)
    #define ring_load32(p) __atomic_load_n((const uint32_t *)(p), __ATOMIC_RELAXED)
    #define ring_store16(p, v) __atomic_store_n((uint16_t *)(p), (v), __ATOMIC_RELEASE)
    #define ring_barrier() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    """
    u16 ring_load16(const void *p)
    u32 ring_load32(const void *p)
    void ring_store16(void *p, u16 v)
    void ring_barrier()

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <poll.h>
    #include <sys/socket.h>
    /* A device that does not read for a second counts as stalled later, for want of progress. */
    static void send_all(int fd, const unsigned char *data, size_t left)
    {
        while (left) {
            ssize_t sent = send(fd, data, left, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (sent > 0) {
                data += sent;
                left -= sent;
            } else if (errno == EAGAIN) {
                struct pollfd room = {fd, POLLOUT, 0};
                if (poll(&room, 1, 1000) <= 0)
                    return;
            } else if (errno != EINTR) {
                return;
            }
        }
    }
    """
    void send_all(int fd, const unsigned char *data, size_t left)

cdef enum:
    AVAIL_NO_INTERRUPT = 1
    USED_NO_NOTIFY = 1
    MOST_ENTRIES = 32768


cdef int ring_open(
    Ring *ring, u32 size, bint event_idx, object desc, object avail, object used, int kick,
    bytes message=b"",
) except -1:
    """Set a ring up whose three parts are on the given pages; `ring` must be zeroed.

    Raises:
        ValueError: The size is not a power of two up to 32768, pages are missing, or the message
            is too long.
    """
    cdef u32 i
    if len(message) > sizeof(ring.message):
        raise ValueError(f"a message of {len(message)} bytes, at most {sizeof(ring.message)}")
    memcpy(ring.message, <const unsigned char *>message, len(message))
    ring.message_bytes = len(message)
    if not 0 < size <= MOST_ENTRIES or size & (size - 1):
        raise ValueError(f"a queue of {size} entries: must be a power of two up to {MOST_ENTRIES}")
    for name, pages, length in (
        ("desc", desc, 16 * size), ("avail", avail, 6 + 2 * size), ("used", used, 6 + 8 * size),
    ):
        if len(pages) * PAGE < length:
            raise ValueError(f"{name} has {len(pages)} pages and needs {length} bytes")
    ring.size, ring.event_idx, ring.kick = size, event_idx, kick
    ring.desc, ring.avail = page_addresses(desc), page_addresses(avail)
    ring.used = page_addresses(used)
    ring.link = <u16 *>calloc(size, sizeof(u16))
    ring.counts = <u16 *>calloc(size, sizeof(u16))
    ring.owners = <u32 *>calloc(size, sizeof(u32))
    if ring.link == NULL or ring.counts == NULL or ring.owners == NULL:
        raise MemoryError
    for pages in (desc, avail, used):
        for address in pages:
            memset(<void *><size_t>address, 0, PAGE)
    for i in range(size):
        ring.link[i] = i + 1
    ring.free_descs = size
    ring_quieten(ring)
    return 0


cdef void ring_close(Ring *ring) noexcept:
    free(ring.desc)
    free(ring.avail)
    free(ring.used)
    free(ring.link)
    free(ring.counts)
    free(ring.owners)


cdef void ring_add(Ring *ring, Desc *chain, u32 count, u32 token) noexcept nogil:
    """Put a chain into free descriptors, of which there must be as many; see `ring_publish`."""
    cdef u16 head = ring.free_desc, here = 0
    cdef u32 i
    for i in range(count):
        here = ring.free_desc
        ring.free_desc = ring.link[here]
        if i + 1 < count:
            chain[i].flags |= DESC_NEXT
            chain[i].next = ring.free_desc
        memcpy(page_at(ring.desc, here * DESC_BYTES), &chain[i], DESC_BYTES)
    ring.free_descs -= count
    ring.counts[head] = count
    ring.owners[head] = token + 1
    ring_store16(page_at(ring.avail, 4 + 2 * (ring.added & (ring.size - 1))), head)
    ring.added += 1


cdef bint ring_publish(Ring *ring) noexcept nogil:
    """Publish what was added, notify the device if it wants that; whether there was anything."""
    cdef u16 before = ring.published, event
    cdef u64 one = 1
    cdef bint wanted
    if ring.added == before:
        return False
    ring.outstanding += <u16>(ring.added - before)
    ring.published = ring.added
    ring_store16(page_at(ring.avail, 2), ring.added)
    # Our index is stored before we look at the device's wish, and the device does the reverse.
    ring_barrier()
    if ring.event_idx:
        event = ring_load16(page_at(ring.used, 4 + 8 * ring.size))
        wanted = <u16>(ring.added - event - 1) < <u16>(ring.added - before)
    else:
        wanted = not ring_load16(page_at(ring.used, 0)) & USED_NO_NOTIFY
    if wanted:
        ring.kicks += 1
        if ring.message_bytes:
            send_all(ring.kick, ring.message, ring.message_bytes)
        else:
            write(ring.kick, &one, sizeof(one))
    return True


cdef int ring_next(Ring *ring, u32 *token, u32 *written, Trouble *trouble) noexcept nogil:
    """Take one finished chain; 1 if there was one, 0 if not, -1 if the used ring is wrong."""
    cdef u32 at, head
    cdef u16 link, i
    if ring.collected == ring.seen:
        ring.seen = ring_load16(page_at(ring.used, 2))
        if ring.collected == ring.seen:
            return 0
        if <u16>(ring.seen - ring.collected) > ring.outstanding:
            return fail(trouble, USED_INDEX, ring.seen, ring.collected, ring.outstanding)
    at = 4 + 8 * (ring.collected & (ring.size - 1))
    head = ring_load32(page_at(ring.used, at))
    written[0] = ring_load32(page_at(ring.used, at + 4))
    if head >= ring.size or not ring.owners[head]:
        return fail(trouble, USED_ID, head, ring.collected)
    token[0] = ring.owners[head] - 1
    ring.owners[head] = 0
    link = head
    for i in range(ring.counts[head] - 1):
        link = ring.link[link]
    ring.link[link] = ring.free_desc
    ring.free_desc = head
    ring.free_descs += ring.counts[head]
    ring.outstanding -= 1
    ring.collected += 1
    return 1


cdef bint ring_arm(Ring *ring, u32 count=1) noexcept nogil:
    """Ask for an interrupt once so many chains are finished; whether they are already."""
    if ring.event_idx:
        ring_store16(page_at(ring.avail, 4 + 2 * ring.size), <u16>(ring.collected + count - 1))
    else:
        ring_store16(page_at(ring.avail, 0), 0)
    # Our wish is stored before we look at the device's index, and the device does the reverse.
    ring_barrier()
    return ring_has(ring, count)


cdef bint ring_has(const Ring *ring, u32 count) noexcept nogil:
    """Whether so many chains, or more, are finished and not taken."""
    return <u16>(ring_load16(page_at(ring.used, 2)) - ring.collected) >= count


cdef void ring_quieten(Ring *ring) noexcept nogil:
    """Ask for no interrupts; with EVENT_IDX an index just passed comes up again last."""
    if ring.event_idx:
        ring_store16(page_at(ring.avail, 4 + 2 * ring.size), ring.collected - 1)
    else:
        ring_store16(page_at(ring.avail, 0), AVAIL_NO_INTERRUPT)


cdef int fail(
    Trouble *trouble, int code, u64 a=0, u64 b=0, u64 c=0, u64 d=0
) noexcept nogil:
    """Note what is wrong, unless something was before; -1."""
    if not trouble.code:
        trouble.code = code
        trouble.values[0], trouble.values[1] = a, b
        trouble.values[2], trouble.values[3] = c, d
    return -1


cdef u64 *page_addresses(object addresses) except NULL:
    """An array of addresses; free it."""
    cdef u64 *pages = <u64 *>calloc(len(addresses) or 1, sizeof(u64))
    cdef Py_ssize_t i
    if pages == NULL:
        raise MemoryError
    try:
        for i in range(len(addresses)):
            pages[i] = as_address(addresses[i], "page")
    except BaseException:
        free(pages)
        raise
    return pages
