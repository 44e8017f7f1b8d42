/* How much the compiled core's structures hold, and the assertions that test builds keep.

   A structure goes wrong where it is full, empty or wraps around. With the normal capacities that
   takes thousands of steps; with the smallest legal ones, a dozen. So every capacity stands here,
   and nowhere else, and the tests run against both. None of them is a promise to users: what a
   peer may cost is limited by guestio.budgets.

   -DGUESTIO_TINY        the smallest legal capacities
   -DGUESTIO_CHECKS      assertions that are too dear, or too deep inside, for a normal build
   -DGUESTIO_HEAP_SLABS  a heap block for each node of a tree, so that a sanitizer sees its borders
*/

#ifndef GUESTIO_CAPACITY
#define GUESTIO_CAPACITY

#include <stdio.h>
#include <stdlib.h>

#ifdef GUESTIO_CHECKS
#define GUESTIO_ASSERT(condition) \
    ((condition) ? (void)0 : guestio_assertion_failed(__FILE__, __LINE__, #condition))
static __attribute__((unused, noinline, noreturn, cold)) void guestio_assertion_failed(
    const char *file, int line, const char *condition)
{
    fprintf(stderr, "%s:%d: assertion failed: %s\n", file, line, condition);
    abort();
}
#else
#define GUESTIO_ASSERT(condition) ((void)0)
#endif

/* NORMAL is what users get. Both must keep the rules at the end of this file. */
#ifdef GUESTIO_TINY
#define GUESTIO_CAPACITY_OF(normal, tiny) (tiny)
#else
#define GUESTIO_CAPACITY_OF(normal, tiny) (normal)
#endif

enum {
    /* Tree: keys in a line, which is a cache line, and lines in a node; the guide of a node has a
       word for each line and fills one itself. */
    TREE_LINE = GUESTIO_CAPACITY_OF(8, 2),
    TREE_FANOUT = TREE_LINE * TREE_LINE,
    /* A node with fewer entries looks for a neighbor to join, and joins it if both fit in so many. */
    TREE_MERGE_BELOW = GUESTIO_CAPACITY_OF(16, 2),
    TREE_MERGE_UP_TO = GUESTIO_CAPACITY_OF(48, 3),
    /* Entries that come in order leave some room in a leaf for others between them. */
    TREE_APPEND_UP_TO = GUESTIO_CAPACITY_OF(56, 3),
    /* A thin node has a neighbor that it did not fit in, so that nodes of a tiny tree have 1.5
       entries on average, and of a normal one 8: 2^32 entries do not reach this. */
    TREE_MAX_HEIGHT = GUESTIO_CAPACITY_OF(12, 60),
    /* Lookups of a batch that go down a tree side by side. */
    TREE_GROUP = GUESTIO_CAPACITY_OF(16, 3),

    /* Slabs: bytes of a small block, of a huge one, and how much small ones there are at most. */
    SLAB_SMALL = GUESTIO_CAPACITY_OF(1 << 16, 1 << 12),
    SLAB_HUGE = GUESTIO_CAPACITY_OF(1 << 21, 1 << 13),
    SLAB_HUGE_ABOVE = GUESTIO_CAPACITY_OF(1 << 23, 1 << 14),
    /* Free slots that stay when emptied blocks are given back. */
    SLAB_SPARES_KEPT = GUESTIO_CAPACITY_OF(64, 0),

    /* Lists that are in their owner while they are short, and the first size of those that grow. */
    PIECES_INSIDE = GUESTIO_CAPACITY_OF(8, 1),
    VECTOR_INSIDE = GUESTIO_CAPACITY_OF(4, 1),
    LEASES_FIRST = GUESTIO_CAPACITY_OF(16, 1),
    MISSES_FIRST = GUESTIO_CAPACITY_OF(16, 1),
    EVICTION_FIRST = GUESTIO_CAPACITY_OF(64, 1),
    PINS_FIRST = GUESTIO_CAPACITY_OF(8, 1),

    /* Eviction: entries pinned or in use that a change looks at, leases whose examination counts as
       another, and entries used since they were queued that a change puts back in their place. */
    EVICTION_KEPT = GUESTIO_CAPACITY_OF(64, 8),
    EVICTION_LEASES = GUESTIO_CAPACITY_OF(64, 64),
    EVICTION_STALE = GUESTIO_CAPACITY_OF(1 << 14, 8),

    /* Copies of more bytes release the GIL; one of this size takes 2 us, about what handing the GIL
       over costs. */
    HOLD_GIL_UP_TO = GUESTIO_CAPACITY_OF(65536, 64),
    /* Fragments of a system call (IOV_MAX of Linux). */
    IOV_BATCH = GUESTIO_CAPACITY_OF(1024, 2),
    /* Words of a bitmap that are harvested at a time, through the cache. */
    HARVEST_WORDS = GUESTIO_CAPACITY_OF(1024, 1),
    /* Host mappings that the SIGBUS handler finds in a chunk of its list. */
    SPOTS_IN_CHUNK = GUESTIO_CAPACITY_OF(256, 1),

    /* IOTLB misses: twice the limit, those still open and those that are only to be
       acknowledged; and messages of which one is to be, half of all, so that there is room again
       before the last of many is answered. */
    MISS_BITS = GUESTIO_CAPACITY_OF(10, 3),
    MISS_SLOTS = 1 << MISS_BITS,
    MISS_BATCH = MISS_SLOTS / 4,

    /* Bytes of a socket that are looked at in one go: more than a batch of requests causes. At
       least a message of 44 bytes; the odd rest of a tiny one cuts the next. */
    READ_AHEAD = GUESTIO_CAPACITY_OF(32768, 100),

    /* Rings: descriptors and pieces of memory after which a look ends, looks at a ring between two
       looks elsewhere, and requests served in the core that are published at a time. */
    RING_LOOK_WORK = GUESTIO_CAPACITY_OF(1 << 16, 4),
    RING_LOOKS = GUESTIO_CAPACITY_OF(64, 1),
    RING_PUBLISH_EACH = GUESTIO_CAPACITY_OF(8, 2),

    /* The event loop: events of one wait, waits before control returns to Python, requests that
       are taken from a queue at a time, and how often a busy queue is served before the next. */
    LOOP_EVENTS = GUESTIO_CAPACITY_OF(32, 1),
    LOOP_TURNS = GUESTIO_CAPACITY_OF(64, 2),
    LOOP_REQUESTS = GUESTIO_CAPACITY_OF(64, 2),
    LOOP_QUEUE_TURNS = GUESTIO_CAPACITY_OF(4, 1),

    /* Tracepoints: records in the ring of a thread, unless more are asked for. */
    TRACE_RECORDS = GUESTIO_CAPACITY_OF(1 << 14, 2),

    /* The load generator: bytes that are read ahead (at least the largest message), answers under
       way, events of one wait, looks at rings between two looks at sockets (with translations and
       without), and busy rounds after which sockets are looked at too. */
    LOAD_PAYLOAD = 4096,
    LOAD_READ_AHEAD = GUESTIO_CAPACITY_OF(16384, LOAD_PAYLOAD + 12),
    LOAD_ANSWERS = GUESTIO_CAPACITY_OF(2048, 2),
    LOAD_EVENTS = GUESTIO_CAPACITY_OF(16, 1),
    LOAD_SPINS = GUESTIO_CAPACITY_OF(64, 1),
    LOAD_SPINS_TRANSLATING = GUESTIO_CAPACITY_OF(4, 1),
    LOAD_TURNS = GUESTIO_CAPACITY_OF(16, 1),
};

_Static_assert(TREE_MERGE_BELOW >= 1 && TREE_MERGE_BELOW - 1 + TREE_MERGE_BELOW <= TREE_MERGE_UP_TO,
               "two nodes that are thin fit in one");
_Static_assert(TREE_MERGE_UP_TO <= TREE_FANOUT && TREE_APPEND_UP_TO <= TREE_FANOUT
               && TREE_APPEND_UP_TO >= 1, "what is joined or appended fits");
_Static_assert((TREE_FANOUT & (TREE_FANOUT - 1)) == 0, "a rank is masked");
_Static_assert(!(SLAB_HUGE & (SLAB_HUGE - 1)) && SLAB_SMALL % 4096 == 0, "slabs are pages");
_Static_assert(MISS_SLOTS <= 32768 && MISS_BATCH >= 1, "slots are numbered by int16_t");
_Static_assert(READ_AHEAD >= 44, "the longest plain message fits");
#endif
