"""The B+tree under the interval map: nodes, searches, insertion and removal of entries.

It knows entries and nothing of policies. Leaves hold ``[first, last]`` (inclusive, so the last
byte of the space can be mapped), the difference between target and source, and permissions. Nodes
are many cache lines wide, but a search reads two of them.

Nothing here is safe against concurrent use; :class:`~guestio._core.intervals.IntervalMap` sees to
that.
"""

from guestio._core.border cimport u8, u32, u64

cdef extern from * nogil:
    """
    #ifndef GUESTIO_TREE
    #define GUESTIO_TREE
    #include <stdint.h>
    #include <stdlib.h>

    enum { LINE = 8, LINES = 8, NODE_CAPACITY = LINE * LINES, MAX_HEIGHT = 12, GROUP = 16 };

    /* The head that leaves and inner nodes share, so that one search serves both. Unused keys are
       UINT64_MAX. In a leaf a key is an entry's first address; in an inner node key[i] bounds
       child[i] from below and child[i - 1] from above. The guide holds the last key of each cache
       line of keys, so that a search reads two lines of a node. */
    typedef struct Node {
        uint64_t guide[LINES];
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
        unsigned line = rank_in_line(node->guide, x);
        return line < LINES ? line : LINES - 1;
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

    static void refresh_guide(Node *node)
    {
        for (int i = 0; i < LINES; i++)
            node->guide[i] = node->key[i * LINE + LINE - 1];
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
       caller's array may be memory that somebody else writes to. */
    WIDE static void lookup_batch(
        Node *root, int height, const uint64_t *starts, const uint64_t *sizes, int stride,
        size_t n, uint64_t wanted, uint64_t stamp, uint64_t *target, uint8_t *status,
        uint64_t *counts)
    {
        Node *at[GROUP];
        uint64_t x[GROUP];
        unsigned line[GROUP];
        int rank[GROUP];
        size_t plain = 0;
        for (size_t base = 0; base < n; base += GROUP) {
            int group = n - base < GROUP ? (int)(n - base) : GROUP;
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
                    at[i] = ((const Inner *)at[i])->child[rank_from(at[i], line[i], x[i]) - 1];
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

    WIDE static Leaf *find_leaf(Node *node, int height, uint64_t x, int *rank)
    {
        while (height--)
            node = ((Inner *)node)->child[rank_in(node, x) - 1];
        *rank = (int)rank_in(node, x) - 1;
        return (Leaf *)node;
    }

    static unsigned rank_of(const Node *node, uint64_t x) { return rank_in(node, x); }

    /* The way down to where x belongs. */
    typedef struct Path {
        Inner *node[MAX_HEIGHT];
        int index[MAX_HEIGHT];
    } Path;

    WIDE static Leaf *trace(Node *node, int height, uint64_t x, Path *path)
    {
        for (int level = 0; level < height; level++) {
            path->node[level] = (Inner *)node;
            path->index[level] = (int)rank_in(node, x) - 1;
            node = path->node[level]->child[path->index[level]];
        }
        return (Leaf *)node;
    }

    static Node *new_node(int is_leaf)
    {
        Node *node = aligned_alloc(64, is_leaf ? sizeof(Leaf) : (sizeof(Inner) + 63) / 64 * 64);
        if (node) {
            for (int i = 0; i < NODE_CAPACITY; i++)
                node->key[i] = UINT64_MAX;
            refresh_guide(node);
            node->count = 0;
            node->is_leaf = is_leaf;
        }
        return node;
    }
    #endif
    """
    enum:
        NODE_CAPACITY
        LINE
        LINES

    ctypedef struct Node:
        u64 *guide
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
    Node *new_node(int is_leaf)
    void refresh_guide(Node *node)


cdef struct Tree:
    Node *root
    int height
    Leaf *first_leaf
    size_t entries
    # Nodes kept for the next insertions, linked.
    Node *spare_leaves
    Node *spare_inners
    int spare_leaf_count
    int spare_inner_count


cdef struct Cursor:
    Leaf *leaf
    int index


cdef int open_tree(Tree *tree) except -1
cdef void close_tree(Tree *tree) noexcept nogil
cdef int reserve(Tree *tree, int inserts) except -1
cdef void insert_entry(Tree *tree, u64 first, Entry entry) noexcept nogil
cdef void erase_entry(Tree *tree, u64 first) noexcept nogil
cdef Node *replace_root(Tree *tree, Node *fresh) noexcept nogil
cdef void free_nodes(Node *node) noexcept nogil
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
