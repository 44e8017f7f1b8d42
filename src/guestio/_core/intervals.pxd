"""C view of the interval map, for the modules of the core that look addresses up in bulk."""

from guestio._core.border cimport Span, u8, u32, u64
from guestio._core.leases cimport Leases

cdef extern from * nogil:
    """
    #include <stdint.h>

    enum { NODE_CAPACITY = 32, MAX_HEIGHT = 16 };

    /* The head that leaves and inner nodes share, so that one search serves both. Unused keys are
       UINT64_MAX. In a leaf a key is an entry's first address; in an inner node key[i] bounds
       child[i] from below and child[i - 1] from above. */
    typedef struct Node {
        uint64_t key[NODE_CAPACITY];
        uint32_t count;
        uint32_t is_leaf;
    } Node;

    /* Half a cache line: a hit costs one line beyond the keys. Ends are inclusive. The delta, not
       the target, is stored, so that two entries are one exactly if their deltas are equal. */
    typedef struct Entry {
        uint64_t last;
        uint64_t delta;
        uint64_t stamp;
        uint64_t perm;
    } Entry;

    typedef struct Leaf {
        Node head;
        struct Leaf *prev;
        struct Leaf *next;
        uint64_t padding[5];
        Entry entry[NODE_CAPACITY];
    } Leaf;

    typedef struct Inner {
        Node head;
        Node *child[NODE_CAPACITY];
    } Inner;
    """
    enum:
        NODE_CAPACITY
        MAX_HEIGHT

    ctypedef struct Node:
        u64 *key
        u32 count
        u32 is_leaf

    ctypedef struct Entry:
        u64 last
        u64 delta
        u64 stamp
        u64 perm

    ctypedef struct Leaf:
        Node head
        Leaf *prev
        Leaf *next
        Entry *entry

    ctypedef struct Inner:
        Node head
        Node **child


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_rwlock_t:
        pass
    int pthread_rwlock_init(pthread_rwlock_t *, void *)
    int pthread_rwlock_destroy(pthread_rwlock_t *)
    int pthread_rwlock_rdlock(pthread_rwlock_t *)
    int pthread_rwlock_wrlock(pthread_rwlock_t *)
    int pthread_rwlock_unlock(pthread_rwlock_t *)


cdef struct Cursor:
    Leaf *leaf
    int index


cdef struct Path:
    Inner *node[MAX_HEIGHT]
    int index[MAX_HEIGHT]


cdef class IntervalMap:
    cdef Node *root
    cdef int height
    cdef Leaf *first_leaf
    cdef size_t entries
    cdef Node *spare_leaves
    cdef Node *spare_inners
    cdef int spare_leaf_count
    cdef int spare_inner_count
    cdef bint merging
    cdef size_t limit
    cdef u64 tick
    cdef list heap
    cdef list pins
    cdef pthread_rwlock_t lock
    cdef readonly Leases leases
    cdef readonly u64 generation
    cdef readonly u64 hits
    cdef readonly u64 misses
    cdef readonly u64 access_fails
    cdef readonly u64 evictions
    cdef readonly u64 invalidations

    cdef Cursor floor(self, u64 x) noexcept nogil
    cdef Cursor ceiling(self, u64 x) noexcept nogil
    cdef int reserve(self, int inserts) except -1
    cdef void keep_spare(self, Node *node) noexcept
    cdef void recycle(self, Node *node) noexcept
    cdef Node *take_spare(self, bint is_leaf) noexcept
    cdef Leaf *trace(self, u64 x, Path *path) noexcept
    cdef int insert_entry(self, u64 first, Entry entry) except -1
    cdef void insert_child(self, Path *path, u64 key, Node *child) noexcept
    cdef void erase_entry(self, u64 first) noexcept
    cdef void drop_child(self, Path *path, int level, int at) noexcept
    cdef void unlink(self, Leaf *leaf) noexcept
    cdef int cut_span(self, u64 first, u64 last) except -1
    cdef int overwrite_span(self, u64 first, u64 last, u64 target, u64 perm) except -1
    cdef int evict(self) except -1
    cdef bint is_pinned(self, u64 first, u64 last) except -1
    cdef list dump(self)
    cdef list lookup_pieces(self, Span span, u64 wanted)
    cdef void lookup_batch(
        self, const u64 *x, const u64 *size, int stride, Py_ssize_t n, u64 wanted,
        u64 *target, u8 *status,
    ) noexcept nogil
    cdef u8 resolve_one(
        self, Leaf *leaf, int rank, u64 x, u64 size, u64 wanted, u64 *target
    ) noexcept nogil
    cdef u8 resolve_pieces(
        self, Cursor at, u64 x, u64 last, u64 wanted, u64 *target
    ) noexcept nogil
