"""The B+tree under the interval map: nodes, searches, insertion and removal of entries.

It knows entries and nothing of policies. Leaves hold ``[first, last]`` (inclusive, so the last
byte of the space can be mapped), the difference between target and source, and permissions. Nodes
are many cache lines wide, but a search reads two of them.

Nothing here is safe against concurrent use; :class:`~guestio._core.iommu.intervals.IntervalMap` sees to
that.
"""

from libc.stdint cimport uint16_t

from guestio._core.base.checks cimport u8, u32, u64
from guestio._core.base.capacity cimport TREE_FANOUT, TREE_LINE, TREE_MAX_HEIGHT
from guestio._core.iommu.slabs cimport Slabs

cdef extern from * nogil:
    """
    #ifndef GUESTIO_TREE
    #define GUESTIO_TREE
    #include <stddef.h>
    #include <stdint.h>
    #include "capacity.h"

    enum { LINE = TREE_LINE, LINES = TREE_LINE, NODE_CAPACITY = TREE_FANOUT };

    /* The head that leaves and inner nodes share, so that one search serves both. Unused keys are
       UINT64_MAX. In a leaf a key is an entry's first address; in an inner node key[i] bounds
       child[i] from below and child[i - 1] from above. The guide holds the last key of each cache
       line of keys but the last, and shares its own line with the count, so that a search reads
       two lines of a node. */
    typedef struct Node {
        uint64_t guide[LINES - 1];
        uint32_t count;
        uint16_t is_leaf;
        uint16_t slot;
        uint64_t key[NODE_CAPACITY];
    } Node;
    _Static_assert(offsetof(Node, key) == LINE * sizeof(uint64_t), "a guide shares its line");

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
        Entry entry[NODE_CAPACITY];
        struct Leaf *prev;
        struct Leaf *next;
        uint64_t padding[6];
    } Leaf;

    typedef struct Inner {
        Node head;
        Node *child[NODE_CAPACITY];
    } Inner;

    #if defined(__x86_64__) && defined(__gnu_linux__)
    #define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
    #else
    #define WIDE
    #endif
    #define INLINE static inline __attribute__((always_inline))

    /* How many keys of a cache line are <= x. Left as a loop, it is vectorised for each target. */
    INLINE unsigned rank_in_line(const uint64_t *line, uint64_t x)
    {
        uint64_t above = 0;
    #pragma GCC unroll 1
        for (int i = 0; i < LINE; i++)
            above += line[i] > x;
        return LINE - (unsigned)above;
    }

    INLINE unsigned line_of(const Node *node, uint64_t x)
    {
        /* A whole line is compared, as vectors are, and what follows the guide taken off again. */
        const uint64_t *head = (const uint64_t *)node;
        return rank_in_line(head, x) - (head[LINE - 1] <= x);
    }

    /* How many keys are <= x, if line_of() told the line. Unused keys count only if x is
       UINT64_MAX, hence the cap. */
    INLINE unsigned rank_from(const Node *node, unsigned line, uint64_t x)
    {
        unsigned n = line * LINE + rank_in_line(&node->key[line * LINE], x);
        if (__builtin_expect(n == NODE_CAPACITY, 0))
            n = node->count;
        return n;
    }

    INLINE unsigned rank_in(const Node *node, uint64_t x)
    {
        return rank_from(node, line_of(node, x), x);
    }

    /* GCC 12 computes the address of guide[i] from that of the key (ivopts), loses what it points
       to, takes a function that does nothing else for one without an effect, and drops its calls
       wherever they are not inlined. An atomic store is an effect in any case. */
    INLINE void refresh_guide(Node *node)
    {
    #pragma GCC unroll 8
        for (int i = 0; i < LINES - 1; i++)
            __atomic_store_n(&node->guide[i], node->key[i * LINE + LINE - 1], __ATOMIC_RELAXED);
    }

    /* Which child of an inner node x belongs to. The first key of an inner node is the bound that
       its parent has for it, and 0 in the root, so no x that leads here is below it. */
    INLINE unsigned child_from(const Node *node, unsigned line, uint64_t x)
    {
        unsigned n = rank_from(node, line, x);
        GUESTIO_ASSERT(!node->is_leaf && n - 1 < node->count);
        GUESTIO_ASSERT(node->key[n - 1] <= x && (n == node->count || x < node->key[n]));
        return n - 1;
    }

    INLINE void stamp_entry(Entry *entry, uint64_t stamp)
    {
        __atomic_store_n(&entry->stamp, stamp, __ATOMIC_RELAXED);
    }

    /* A batched lookup that is not a plain hit in one entry: what it is, by the rules of
       IntervalMap.lookup_many. */
    static __attribute__((noinline)) uint8_t resolve_slowly(
        Leaf *leaf, int rank, uint64_t x, uint64_t size, uint64_t wanted, uint64_t stamp,
        uint64_t *target)
    {
        uint64_t last = x + (size - 1);
        if (!size)
            return 0;
        if (last < x)
            return 1;
        if (rank < 0) {
            leaf = leaf->prev;
            if (!leaf)
                return 1;
            rank = (int)leaf->head.count - 1;
        }
        Entry *entry = &leaf->entry[rank];
        if (entry->last < x)
            return 1;
        uint64_t delta = entry->delta;
        int whole = 1, allowed = 1;
        for (;;) {
            if (stamp)
                stamp_entry(entry, stamp);
            whole &= entry->delta == delta;
            allowed &= !(wanted & ~entry->perm);
            if (entry->last >= last)
                break;
            uint64_t next = entry->last + 1;
            if (++rank == (int)leaf->head.count) {
                leaf = leaf->next;
                rank = 0;
            }
            if (!leaf || leaf->head.key[rank] != next)
                return 1;
            entry = &leaf->entry[rank];
        }
        if (!allowed)
            return 2;
        if (!whole)
            return 3;
        *target = x + delta;
        return 0;
    }

    /* Many lookups, a group at a time: each level of the tree is passed by the whole group before
       the next, so that the cache misses of a group overlap. The addresses are copied first; a
       caller's array may be memory that another thread writes to. */
    WIDE static void lookup_batch(
        Node *root, int height, const uint64_t *starts, const uint64_t *sizes, int stride,
        size_t n, uint64_t wanted, uint64_t stamp, uint64_t *target, uint8_t *status,
        uint64_t *counts)
    {
        Node *at[TREE_GROUP];
        uint64_t x[TREE_GROUP];
        unsigned line[TREE_GROUP];
        int rank[TREE_GROUP];
        size_t plain = 0;
        for (size_t base = 0; base < n; base += TREE_GROUP) {
            int group = n - base < TREE_GROUP ? (int)(n - base) : TREE_GROUP;
            for (int i = 0; i < group; i++) {
                x[i] = __atomic_load_n(&starts[base + i], __ATOMIC_RELAXED);
                at[i] = root;
            }
            for (int level = 0; level < height; level++) {
                for (int i = 0; i < group; i++) {
                    line[i] = line_of(at[i], x[i]);
                    __builtin_prefetch(&at[i]->key[line[i] * LINE]);
                }
                for (int i = 0; i < group; i++) {
                    at[i] = ((const Inner *)at[i])->child[child_from(at[i], line[i], x[i])];
                    __builtin_prefetch(at[i]->guide);
                }
            }
            for (int i = 0; i < group; i++) {
                line[i] = line_of(at[i], x[i]);
                __builtin_prefetch(&at[i]->key[line[i] * LINE]);
            }
            for (int i = 0; i < group; i++) {
                rank[i] = (int)rank_from(at[i], line[i], x[i]) - 1;
                __builtin_prefetch(&((Leaf *)at[i])->entry[rank[i] & (NODE_CAPACITY - 1)]);
            }
            for (int i = 0; i < group; i++) {
                Leaf *leaf = (Leaf *)at[i];
                Entry *entry = &leaf->entry[rank[i] & (NODE_CAPACITY - 1)];
                uint64_t size = __atomic_load_n(&sizes[(base + i) * stride], __ATOMIC_RELAXED);
                uint64_t last = x[i] + (size - 1);
                if (__builtin_expect(rank[i] >= 0 && size && last >= x[i] && last <= entry->last
                                         && !(wanted & ~entry->perm), 1)) {
                    if (stamp)
                        stamp_entry(entry, stamp);
                    target[base + i] = x[i] + entry->delta;
                    status[base + i] = 0;
                    plain++;
                } else {
                    target[base + i] = 0;
                    status[base + i] = resolve_slowly(
                        leaf, rank[i], x[i], size, wanted, stamp, &target[base + i]);
                    counts[status[base + i]]++;
                }
            }
        }
        counts[0] += plain;
    }

    /* Down one level. The child is in one line, known as soon as the line of its key is. */
    INLINE unsigned child_of(const Node *node, uint64_t x)
    {
        unsigned line = line_of(node, x);
        __builtin_prefetch(&((const Inner *)node)->child[line * LINE]);
        return child_from(node, line, x);
    }

    WIDE static Leaf *find_leaf(Node *node, int height, uint64_t x, int *rank)
    {
        while (height--)
            node = ((Inner *)node)->child[child_of(node, x)];
        Leaf *leaf = (Leaf *)node;
        unsigned line = line_of(node, x);
        __builtin_prefetch(&node->key[line * LINE]);
        for (int i = 0; i < LINE; i += 2)
            __builtin_prefetch(&leaf->entry[line * LINE + i]);
        *rank = (int)rank_from(node, line, x) - 1;
        return leaf;
    }

    static unsigned rank_of(const Node *node, uint64_t x) { return rank_in(node, x); }

    /* The way down to where x belongs. */
    typedef struct Path {
        Inner *node[TREE_MAX_HEIGHT];
        int index[TREE_MAX_HEIGHT];
    } Path;

    /* Also fetches what a change there moves, all lines at once. */
    WIDE static Leaf *trace(Node *node, int height, uint64_t x, Path *path)
    {
        for (int level = 0; level < height; level++) {
            path->node[level] = (Inner *)node;
            path->index[level] = (int)child_of(node, x);
            node = path->node[level]->child[path->index[level]];
        }
        Leaf *leaf = (Leaf *)node;
        unsigned i = line_of(node, x) * LINE;
        for (unsigned k = i; k < node->count; k += LINE)
            __builtin_prefetch(&node->key[k], 1);
        for (; i < node->count; i += 2)
            __builtin_prefetch(&leaf->entry[i], 1);
        return leaf;
    }

    static void open_node(Node *node, int is_leaf)
    {
        for (int i = 0; i < NODE_CAPACITY; i++)
            node->key[i] = UINT64_MAX;
        for (int i = 0; i < LINES - 1; i++)
            node->guide[i] = UINT64_MAX;
        node->count = 0;
        node->is_leaf = is_leaf;
    }
    #endif
    """
    ctypedef struct Node:
        u64 *guide
        u64 *key
        u32 count
        uint16_t is_leaf
        uint16_t slot

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

    ctypedef struct Path:
        Inner **node
        int *index

    void stamp_entry(Entry *entry, u64 stamp)
    void lookup_batch(
        Node *root, int height, const u64 *starts, const u64 *sizes, int stride, size_t n,
        u64 wanted, u64 stamp, u64 *target, u8 *status, u64 *counts,
    )
    Leaf *find_leaf(Node *node, int height, u64 x, int *rank)
    unsigned rank_of(const Node *node, u64 x)
    Leaf *trace(Node *node, int height, u64 x, Path *path)
    void open_node(Node *node, int is_leaf)
    void refresh_guide(Node *node)


cdef struct Tree:
    Node *root
    int height
    Leaf *first_leaf
    size_t entries
    size_t reserved   # slots for nodes that the change under way may still take
    Slabs nodes


cdef struct Cursor:
    Leaf *leaf
    int index


# What is noexcept is plain C on the tree's nodes; room for them is made by `reserve`.
cdef int open_tree(Tree *tree) except -1
cdef void close_tree(Tree *tree) noexcept nogil
cdef int reserve(Tree *tree, int inserts) except -1
cdef void insert_entry(Tree *tree, u64 first, Entry entry) noexcept nogil
cdef void erase_entry(Tree *tree, u64 first) noexcept nogil
cdef int check_tree(const Tree *tree) except -1


cdef inline void step(Cursor *at) noexcept nogil:
    """To the next entry; the leaf is NULL after the last."""
    at.index += 1
    if at.index == <int>at.leaf.head.count:
        at.leaf, at.index = at.leaf.next, 0


cdef inline void step_back(Cursor *at) noexcept nogil:
    """To the entry before; the leaf is NULL before the first."""
    if at.index:
        at.index -= 1
    else:
        at.leaf = at.leaf.prev
        at.index = <int>at.leaf.head.count - 1 if at.leaf is not NULL else 0


cdef inline Cursor floor_of(const Tree *tree, u64 x) noexcept nogil:
    """The entry with the greatest first address that is <= x. O(log n)."""
    cdef Cursor at
    at.leaf = find_leaf(tree.root, tree.height, x, &at.index)
    if at.index < 0:
        at.leaf = at.leaf.prev
        if at.leaf is not NULL:
            at.index = <int>at.leaf.head.count - 1
    return at


cdef inline bint is_gap(const Tree *tree, Cursor before, u64 first, u64 last) noexcept nogil:
    """Whether no entry touches a range, given the :func:`floor_of` its first address. O(1)."""
    if before.leaf is NULL:
        before.leaf, before.index = tree.first_leaf, 0
        return not before.leaf.head.count or before.leaf.head.key[0] > last
    if before.leaf.entry[before.index].last >= first:
        return False
    step(&before)
    return before.leaf is NULL or before.leaf.head.key[before.index] > last


cdef inline Cursor ceiling_of(const Tree *tree, u64 x) noexcept nogil:
    """The entry that holds x, or the first one after it. O(log n)."""
    cdef Cursor at = floor_of(tree, x)
    if at.leaf is NULL:
        at.leaf, at.index = tree.first_leaf, 0
        if not at.leaf.head.count:
            at.leaf = NULL
    elif at.leaf.entry[at.index].last < x:
        step(&at)
    return at
