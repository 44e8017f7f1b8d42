"""Ordered map of disjoint ranges of a 64-bit address space to ranges of another.

A B+tree whose leaves hold ``[first, last]`` (inclusive, so the last byte of the space can be
mapped), the difference between target and source, and permissions. One structure serves both
policies: :meth:`IntervalMap.overwrite` and :meth:`~IntervalMap.cut` split and merge what they
meet, as a cache may; :meth:`~IntervalMap.add` and :meth:`~IntervalMap.take` refuse instead, as a
domain of an IOMMU must.

Nodes are a few cache lines wide; a search compares a whole node at once, and a batch of searches
goes down the tree side by side, so that their cache misses overlap.

Threads: every method may be called from any thread. Mutations hold the GIL and the lock
exclusively; batch lookups hold the lock shared and release the GIL.
"""

import heapq

import numpy as np

from cpython.exc cimport PyErr_NoMemory
from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport UINT64_MAX
from libc.stdlib cimport free
from libc.string cimport memcpy, memmove

from guestio._core.border cimport (
    Span, as_access, as_address, as_size, as_span, span_length, u8, u32, u64,
)

from guestio.addr import IovaRange, MappedRange, Permissions
from guestio.errors import IotlbFails

cdef extern from * nogil:
    """
    #include <stdlib.h>

    enum { GROUP = 16 };

    #if defined(__x86_64__) && defined(__gnu_linux__)
    #define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
    #else
    #define WIDE
    #endif

    /* How many keys are <= x. Unused keys count only if x is UINT64_MAX, hence the cap. */
    static inline __attribute__((always_inline)) unsigned rank_in(const Node *node, uint64_t x)
    {
        unsigned n = 0;
        for (unsigned i = 0; i < NODE_CAPACITY; i++)
            n += node->key[i] <= x;
        if (__builtin_expect(n == NODE_CAPACITY, 0))
            n = node->count;
        return n;
    }

    static inline void prefetch_keys(const Node *node)
    {
        __builtin_prefetch(&node->key[0]);
        __builtin_prefetch(&node->key[8]);
        __builtin_prefetch(&node->key[16]);
        __builtin_prefetch(&node->key[24]);
    }

    /* One level down for a group of searches. */
    WIDE static void descend_group(Node **at, const uint64_t *x, int n)
    {
        for (int i = 0; i < n; i++) {
            const Inner *inner = (const Inner *)at[i];
            Node *child = inner->child[rank_in(&inner->head, x[i]) - 1];
            prefetch_keys(child);
            at[i] = child;
        }
    }

    /* The ranks of a group of searches in their leaves. */
    WIDE static void rank_group(Node *const *at, const uint64_t *x, int n, int *rank)
    {
        for (int i = 0; i < n; i++) {
            rank[i] = (int)rank_in(at[i], x[i]) - 1;
            __builtin_prefetch(&((const Leaf *)at[i])->entry[rank[i] & (NODE_CAPACITY - 1)]);
        }
    }

    WIDE static Leaf *find_leaf(Node *node, int height, uint64_t x, int *rank)
    {
        while (height--)
            node = ((Inner *)node)->child[rank_in(node, x) - 1];
        *rank = (int)rank_in(node, x) - 1;
        return (Leaf *)node;
    }

    static unsigned rank_of(const Node *node, uint64_t x) { return rank_in(node, x); }
    static Node *new_node(int is_leaf)
    {
        Node *node = aligned_alloc(64, is_leaf ? sizeof(Leaf) : (sizeof(Inner) + 63) / 64 * 64);
        if (node) {
            for (int i = 0; i < NODE_CAPACITY; i++)
                node->key[i] = UINT64_MAX;
            node->count = 0;
            node->is_leaf = is_leaf;
        }
        return node;
    }
    """
    enum:
        GROUP
    void descend_group(Node **at, const u64 *x, int n)
    void rank_group(Node **at, const u64 *x, int n, int *rank)
    Leaf *find_leaf(Node *node, int height, u64 x, int *rank)
    unsigned rank_of(const Node *node, u64 x)
    Node *new_node(int is_leaf)

cdef extern from "Python.h":
    ctypedef struct PyTypeObject:
        PyObject *(*tp_alloc)(PyTypeObject *, Py_ssize_t) except NULL
    void PyTuple_SET_ITEM(PyObject *, Py_ssize_t, PyObject *)

cdef enum:
    MERGE_BELOW = 8    # a node with fewer entries looks for a neighbour to join
    MERGE_UP_TO = 24   # ... and joins it if both fit in this many
    SPARES_KEPT = 64   # emptied nodes of each kind that are kept for the next insertions

cdef enum Status:
    OK = 0
    MISS = 1
    ACCESS_FAIL = 2
    FRAGMENTED = 3

cdef tuple PERMISSIONS = tuple(Permissions(n) for n in range(4))


cdef object make_range(object cls, u64 base, object length):
    # A NamedTuple built without the cost of its Python-level constructor.
    cdef PyObject *pair = (<PyTypeObject *>cls).tp_alloc(<PyTypeObject *>cls, 2)
    cdef object number = base
    Py_INCREF(number)
    PyTuple_SET_ITEM(pair, 0, <PyObject *>number)
    Py_INCREF(length)
    PyTuple_SET_ITEM(pair, 1, <PyObject *>length)
    result = <object>pair
    # tp_alloc returned a reference of its own, `result` took another.
    drop_reference(pair)
    return result

cdef extern from *:
    void drop_reference "Py_DECREF"(PyObject *)


cdef class IntervalMap:
    """Disjoint address ranges, each with a target and permissions.

    Args:
        merge: Join neighbours whose targets are contiguous too and whose permissions are equal.
        capacity: Largest number of entries; beyond it the least recently used one that is not
            pinned is evicted. None for no limit.

    Attributes:
        generation: Changes whenever a mapping is removed, cut, replaced or evicted.
        hits: Lookups that resolved.
        misses: Lookups with an unmapped byte.
        access_fails: Lookups that were mapped throughout but forbidden somewhere.
        evictions: Entries dropped to keep within the capacity.
        invalidations: Calls of :meth:`cut` and :meth:`clear`.

    Memory: 48 to 96 bytes an entry.
    """

    def __cinit__(self, *, bint merge=True, capacity=None):
        self.merging = merge
        self.limit = 0
        if capacity is not None:
            self.limit = as_size(capacity, "capacity")
            if not self.limit:
                raise ValueError("capacity must be at least 1")
        self.heap = []
        self.pins = []
        self.leases = Leases()
        if pthread_rwlock_init(&self.lock, NULL):
            raise MemoryError
        self.root = new_node(True)
        if self.root is NULL:
            PyErr_NoMemory()
        self.first_leaf = <Leaf *>self.root
        self.first_leaf.prev = self.first_leaf.next = NULL

    def __dealloc__(self):
        if self.root is not NULL:
            free_tree(self.root)
        free_list(self.spare_leaves)
        free_list(self.spare_inners)
        pthread_rwlock_destroy(&self.lock)

    cdef Cursor floor(self, u64 x) noexcept nogil:
        """The entry with the greatest first address that is <= x."""
        cdef Cursor at
        at.leaf = find_leaf(self.root, self.height, x, &at.index)
        if at.index < 0:
            at.leaf = at.leaf.prev
            if at.leaf is not NULL:
                at.index = <int>at.leaf.head.count - 1
        return at

    cdef Cursor ceiling(self, u64 x) noexcept nogil:
        """The entry that holds x, or the first one after it."""
        cdef Cursor at = self.floor(x)
        if at.leaf is NULL:
            at.leaf, at.index = self.first_leaf, 0
            if not at.leaf.head.count:
                at.leaf = NULL
        elif at.leaf.entry[at.index].last < x:
            step(&at)
        return at

    cdef int reserve(self, int inserts) except -1:
        """Allocate ahead what ``inserts`` insertions can need, so that none fails half-way."""
        cdef Node *node
        while self.spare_leaf_count < inserts:
            node = new_node(True)
            if node is NULL:
                PyErr_NoMemory()
            self.keep_spare(node)
        while self.spare_inner_count < inserts * (self.height + 2):
            node = new_node(False)
            if node is NULL:
                PyErr_NoMemory()
            self.keep_spare(node)
        return 0

    cdef void keep_spare(self, Node *node) noexcept:
        if node.is_leaf:
            next_spare(node)[0], self.spare_leaves = self.spare_leaves, node
            self.spare_leaf_count += 1
        else:
            next_spare(node)[0], self.spare_inners = self.spare_inners, node
            self.spare_inner_count += 1

    cdef void recycle(self, Node *node) noexcept:
        cdef int i
        if (self.spare_leaf_count if node.is_leaf else self.spare_inner_count) >= SPARES_KEPT:
            free(node)
            return
        for i in range(NODE_CAPACITY):
            node.key[i] = UINT64_MAX
        node.count = 0
        self.keep_spare(node)

    cdef Node *take_spare(self, bint is_leaf) noexcept:
        cdef Node *node
        if is_leaf:
            node = self.spare_leaves
            self.spare_leaves = next_spare(node)[0]
            self.spare_leaf_count -= 1
        else:
            node = self.spare_inners
            self.spare_inners = next_spare(node)[0]
            self.spare_inner_count -= 1
        return node

    cdef Leaf *trace(self, u64 x, Path *path) noexcept:
        cdef Node *node = self.root
        cdef int level
        for level in range(self.height):
            path.node[level] = <Inner *>node
            path.index[level] = <int>rank_of(node, x) - 1
            node = path.node[level].child[path.index[level]]
        return <Leaf *>node

    cdef int insert_entry(self, u64 first, Entry entry) except -1:
        """Insert an entry that overlaps no other. Needs one reserved insertion. O(log n)."""
        cdef Path path
        cdef Leaf *leaf = self.trace(first, &path)
        cdef Leaf *right
        cdef int at = <int>rank_of(&leaf.head, first)
        if self.limit:
            heapq.heappush(self.heap, (entry.stamp, first))
        self.entries += 1
        if leaf.head.count < NODE_CAPACITY:
            put_entry(leaf, at, first, entry)
            return 0
        right = <Leaf *>self.take_spare(True)
        right.prev, right.next = leaf, leaf.next
        if leaf.next is not NULL:
            leaf.next.prev = right
            split_leaf(leaf, right)
        elif at < NODE_CAPACITY:
            split_leaf(leaf, right)
        leaf.next = right
        if at > <int>leaf.head.count or (at == <int>leaf.head.count and not right.head.count):
            put_entry(right, at - <int>leaf.head.count, first, entry)
        else:
            put_entry(leaf, at, first, entry)
        self.insert_child(&path, right.head.key[0], &right.head)
        return 0

    cdef void insert_child(self, Path *path, u64 key, Node *child) noexcept:
        cdef int level = self.height - 1
        cdef Inner *inner
        cdef Inner *right
        cdef int at
        while level >= 0:
            inner, at = path.node[level], path.index[level] + 1
            if inner.head.count < NODE_CAPACITY:
                put_child(inner, at, key, child)
                return
            right = <Inner *>self.take_spare(False)
            split_inner(inner, right)
            if at > <int>inner.head.count:
                put_child(right, at - <int>inner.head.count, key, child)
            else:
                put_child(inner, at, key, child)
            key, child = right.head.key[0], &right.head
            level -= 1
        inner = <Inner *>self.take_spare(False)
        put_child(inner, 0, 0, self.root)
        put_child(inner, 1, key, child)
        self.root = &inner.head
        self.height += 1

    cdef void erase_entry(self, u64 first) noexcept:
        """Remove the entry that starts at ``first``. O(log n)."""
        cdef Path path
        cdef Leaf *leaf = self.trace(first, &path)
        cdef int at = <int>rank_of(&leaf.head, first) - 1
        cdef int left
        cdef Inner *parent
        cut_keys(&leaf.head, at)
        memmove(&leaf.entry[at], &leaf.entry[at + 1], (leaf.head.count - at) * sizeof(Entry))
        self.entries -= 1
        if not self.height or leaf.head.count >= MERGE_BELOW:
            return
        parent, at = path.node[self.height - 1], path.index[self.height - 1]
        if not leaf.head.count:
            self.drop_child(&path, self.height - 1, at)
            return
        left = merge_partner(parent, at)
        if left >= 0:
            join_leaves(<Leaf *>parent.child[left], <Leaf *>parent.child[left + 1])
            self.drop_child(&path, self.height - 1, left + 1)

    cdef void drop_child(self, Path *path, int level, int at) noexcept:
        """Remove an emptied child and mend the levels above."""
        cdef Inner *inner = path.node[level]
        cdef Node *gone = inner.child[at]
        cdef u64 bound = inner.head.key[0]
        cdef int left
        if gone.is_leaf:
            self.unlink(<Leaf *>gone)
        cut_keys(&inner.head, at)
        memmove(&inner.child[at], &inner.child[at + 1], (inner.head.count - at) * sizeof(Node *))
        if inner.head.count:
            inner.head.key[0] = bound
        self.recycle(gone)
        if level == 0:
            while self.height and self.root.count == 1:
                gone, self.root = self.root, (<Inner *>self.root).child[0]
                self.height -= 1
                self.recycle(gone)
            return
        if inner.head.count >= MERGE_BELOW:
            return
        at = path.index[level - 1]
        if not inner.head.count:
            self.drop_child(path, level - 1, at)
            return
        left = merge_partner(path.node[level - 1], at)
        if left >= 0:
            join_inners(path.node[level - 1], left)
            self.drop_child(path, level - 1, left + 1)

    cdef void unlink(self, Leaf *leaf) noexcept:
        if leaf.prev is not NULL:
            leaf.prev.next = leaf.next
        else:
            self.first_leaf = leaf.next
        if leaf.next is not NULL:
            leaf.next.prev = leaf.prev

    cdef int cut_span(self, u64 first, u64 last) except -1:
        """Unmap a span, splitting what reaches out of it. Needs one reserved insertion.

        Returns whether anything was mapped there. O((k + 1) log n) for k entries met.
        """
        cdef Cursor at = self.ceiling(first)
        cdef Entry entry
        cdef u64 start
        cdef bint met = False
        while at.leaf is not NULL and at.leaf.head.key[at.index] <= last:
            met = True
            start, entry = at.leaf.head.key[at.index], at.leaf.entry[at.index]
            if start < first:
                at.leaf.entry[at.index].last = first - 1
            else:
                self.erase_entry(start)
            if entry.last > last:
                self.insert_entry(last + 1, entry)
                break
            if entry.last == UINT64_MAX:
                break
            at = self.ceiling(entry.last + 1)
        if met:
            self.generation += 1
        return met

    cdef int overwrite_span(self, u64 first, u64 last, u64 target, u64 perm) except -1:
        """Map a span, whatever was there before. Needs two reserved insertions.

        Returns whether a different mapping was replaced.
        """
        cdef Entry entry
        cdef Cursor at = self.floor(first)
        cdef bint replaced
        self.tick += 1
        entry.last, entry.delta, entry.perm, entry.stamp = last, target - first, perm, self.tick
        if at.leaf is not NULL and self.merging:
            if at.leaf.entry[at.index].last >= last and joins(&at.leaf.entry[at.index], &entry):
                at.leaf.entry[at.index].stamp = self.tick
                return False
        replaced = self.cut_span(first, last)
        if self.merging and last != UINT64_MAX:
            at = self.floor(last + 1)
            if at.leaf is not NULL and at.leaf.head.key[at.index] == last + 1 and joins(
                &at.leaf.entry[at.index], &entry
            ):
                entry.last = at.leaf.entry[at.index].last
                self.erase_entry(last + 1)
        if self.merging and first:
            at = self.floor(first - 1)
            if at.leaf is not NULL and at.leaf.entry[at.index].last == first - 1 and joins(
                &at.leaf.entry[at.index], &entry
            ):
                at.leaf.entry[at.index].last = entry.last
                at.leaf.entry[at.index].stamp = self.tick
                return replaced
        self.insert_entry(first, entry)
        return replaced

    cdef int evict(self) except -1:
        """Drop the least recently used entries that are beyond the capacity and not pinned."""
        cdef Cursor at
        cdef u64 stamp, first
        cdef list kept = []
        if len(self.heap) > 4 * self.entries + 64:
            self.heap = [(entry[4], entry[0]) for entry in self.dump()]
            heapq.heapify(self.heap)
        while self.entries > self.limit and self.heap:
            stamp, first = heapq.heappop(self.heap)
            at = self.floor(first)
            if at.leaf is NULL or at.leaf.head.key[at.index] != first:
                continue
            if at.leaf.entry[at.index].stamp != stamp:
                # Used since it was queued: it waits again, at its new place.
                heapq.heappush(self.heap, (at.leaf.entry[at.index].stamp, first))
            elif self.is_pinned(first, at.leaf.entry[at.index].last):
                kept.append((stamp, first))
            else:
                self.erase_entry(first)
                self.evictions += 1
                self.generation += 1
        for item in kept:
            heapq.heappush(self.heap, item)
        return 0

    cdef bint is_pinned(self, u64 first, u64 last) except -1:
        for start, end in self.pins:
            if start <= last and first <= end:
                return True
        return False

    cdef list dump(self):
        cdef Leaf *leaf = self.first_leaf
        cdef Entry *entry
        cdef int i
        cdef list found = []
        while leaf is not NULL:
            for i in range(<int>leaf.head.count):
                entry = &leaf.entry[i]
                found.append(
                    (leaf.head.key[i], entry.last, entry.delta, entry.perm, entry.stamp)
                )
            leaf = leaf.next
        return found

    def overwrite(self, start, length, target, perm):
        """Map ``[start, start + length)`` to ``target``, replacing whatever overlaps.

        Targets are taken modulo ``2**64``. What reaches out of the range stays mapped as it was.

        Returns:
            Whether a different mapping was replaced.

        Raises:
            TypeError, ValueError: Bad numbers, or a length of 0; nothing changed.

        Cost: O((k + 1) log n) for k entries replaced.
        """
        cdef Span span
        as_span(start, length, &span, False)
        cdef u64 to = as_address(target, "target")
        cdef u64 access = as_access(perm, "perm")
        cdef bint replaced
        self.reserve(3)
        pthread_rwlock_wrlock(&self.lock)
        try:
            replaced = self.overwrite_span(span.first, span.last, to, access)
            if self.limit and self.entries > self.limit:
                self.evict()
        finally:
            pthread_rwlock_unlock(&self.lock)
        return replaced

    def cut(self, start, length):
        """Unmap ``[start, start + length)``, splitting mappings that reach out of it.

        Returns:
            Whether anything was mapped there.

        Raises:
            TypeError, ValueError: Bad numbers, or a length of 0; nothing changed.

        Cost: O((k + 1) log n) for k entries met.
        """
        cdef Span span
        cdef bint met
        as_span(start, length, &span, False)
        self.reserve(2)
        pthread_rwlock_wrlock(&self.lock)
        try:
            met = self.cut_span(span.first, span.last)
            self.invalidations += 1
            if self.limit and self.entries > self.limit:
                self.evict()
        finally:
            pthread_rwlock_unlock(&self.lock)
        return met

    def clear(self):
        """Unmap everything. Cost: O(n)."""
        cdef Node *fresh = new_node(True)
        if fresh is NULL:
            PyErr_NoMemory()
        pthread_rwlock_wrlock(&self.lock)
        free_tree(self.root)
        self.root, self.height, self.entries = fresh, 0, 0
        self.first_leaf = <Leaf *>fresh
        self.first_leaf.prev = self.first_leaf.next = NULL
        self.heap = []
        self.generation += 1
        self.invalidations += 1
        pthread_rwlock_unlock(&self.lock)

    def add(self, start, length, target, perm):
        """Map ``[start, start + length)`` to ``target`` unless any of it is mapped already.

        Returns:
            False if something overlaps; nothing changed then.

        Raises:
            TypeError, ValueError: Bad numbers, or a length of 0; nothing changed.

        Cost: O(log n).
        """
        cdef Span span
        cdef Cursor at
        as_span(start, length, &span, False)
        cdef u64 to = as_address(target, "target")
        cdef u64 access = as_access(perm, "perm")
        at = self.ceiling(span.first)
        if at.leaf is not NULL and at.leaf.head.key[at.index] <= span.last:
            return False
        self.reserve(3)
        pthread_rwlock_wrlock(&self.lock)
        try:
            self.overwrite_span(span.first, span.last, to, access)
            if self.limit and self.entries > self.limit:
                self.evict()
        finally:
            pthread_rwlock_unlock(&self.lock)
        return True

    def take(self, start, length):
        """Unmap all that lies in ``[start, start + length)``, if nothing reaches out of it.

        Returns:
            The removed mappings as ``(start, length, target, perm)``, ascending, or None if one
            of them would have to be split; nothing changed then.

        Raises:
            TypeError, ValueError: Bad numbers, or a length of 0; nothing changed.

        Cost: O((k + 1) log n) for k entries removed.
        """
        cdef Span span
        as_span(start, length, &span, False)
        cdef list found = self.overlapping(start, length)
        if found:
            head, tail = found[0], found[-1]
            if head[0] < span.first or tail[0] + tail[1] - 1 > span.last:
                return None
            pthread_rwlock_wrlock(&self.lock)
            for entry in found:
                self.erase_entry(entry[0])
            self.generation += 1
            pthread_rwlock_unlock(&self.lock)
        return found

    def lookup(self, start, length, access):
        """Resolve ``[start, start + length)`` for ``access``, whole or not at all.

        Returns:
            The targets as :class:`~guestio.MappedRange`, in order of the source; their lengths sum
            to ``length``. Empty for a length of 0, which touches nothing and always succeeds.

        Raises:
            IotlbFails: Lists every sub-range that is missing and every one that is forbidden.
            TypeError, ValueError: Bad numbers, or a range past ``2**64``.

        Cost: O(log n + k) for k entries in the range.
        """
        cdef Span span
        cdef Cursor at
        cdef u64 wanted = as_access(access)
        cdef u64 x, last
        cdef Entry *entry
        as_span(start, length, &span, True)
        if span.empty:
            return []
        at = self.floor(span.first)
        if at.leaf is not NULL:
            entry = &at.leaf.entry[at.index]
            if span.last <= entry.last and not wanted & ~entry.perm:
                self.hits += 1
                if self.limit:
                    self.tick += 1
                    entry.stamp = self.tick
                found = PyList_New(1)
                item = make_range(MappedRange, span.first + entry.delta, length)
                Py_INCREF(item)
                PyList_SET_ITEM(found, 0, item)
                return found
        return self.lookup_pieces(span, wanted)

    def guard(self, start, length, access):
        """Look a range up and hold the translation in one step.

        Returns:
            A context manager; entering it gives the list that :meth:`lookup` returns. Until it is
            left, :meth:`drain` of an overlapping range waits.

        Raises:
            As :meth:`lookup`.
        """
        cdef Span span
        found = self.lookup(start, length, access)
        as_span(start, length, &span, True)
        return self.leases.hold(span, found)

    def drain(self, start, length, timeout=None):
        """Wait until nobody uses a translation of this range that was looked up before now.

        Returns:
            False if ``timeout`` seconds passed first.

        Raises:
            RuntimeError: This very thread holds one; it would wait for itself.
        """
        cdef Span span
        as_span(start, length, &span, True)
        return span.empty or self.leases.wait(span, timeout)

    def check_drain(self, start, length):
        """Raise the RuntimeError that :meth:`drain` would raise now."""
        cdef Span span
        as_span(start, length, &span, True)
        if not span.empty:
            self.leases.check_self(span)

    cdef list lookup_pieces(self, Span span, u64 wanted):
        cdef list found = [], misses = [], refused = []
        cdef Cursor at = self.ceiling(span.first)
        cdef u64 x = span.first, first, last
        cdef Entry *entry
        self.tick += 1
        while True:
            if at.leaf is NULL or at.leaf.head.key[at.index] > span.last:
                misses.append(make_range(IovaRange, x, span_length(x, span.last)))
                break
            first, entry = at.leaf.head.key[at.index], &at.leaf.entry[at.index]
            if first > x:
                misses.append(make_range(IovaRange, x, first - x))
                x = first
            last = min(entry.last, span.last)
            if wanted & ~entry.perm:
                refused.append(make_range(IovaRange, x, span_length(x, last)))
            else:
                found.append(make_range(MappedRange, x + entry.delta, span_length(x, last)))
                entry.stamp = self.tick
            if last == span.last:
                break
            x = last + 1
            step(&at)
        if misses or refused:
            if misses:
                self.misses += 1
            else:
                self.access_fails += 1
            raise IotlbFails(misses, refused)
        self.hits += 1
        return found

    def lookup_many(self, starts, lengths, access):
        """Resolve many ranges at once.

        Args:
            starts: First addresses; an integer array, or what converts to one without loss.
            lengths: Bytes for each, or one number for all.
            access: What every one of them wants to do.

        Returns:
            ``(targets, status)``: a ``uint64`` and a ``uint8`` array. Status 0: ``targets`` holds
            where the range begins, and all of it is contiguous there. 1: some of it is unmapped,
            or it passes ``2**64``. 2: all is mapped but some forbids the access. 3: all is
            accessible, but it is not contiguous. The target is 0 where the status is not 0.
            A length of 0 has status 0.

        Raises:
            TypeError, ValueError: Not integers, negative, or arrays of different lengths.

        Cost: O(n log m + k) for n ranges that meet k of m entries; the GIL is released.
        """
        cdef u64 wanted = as_access(access)
        cdef const u64[::1] x = as_u64_array(starts, "starts")
        cdef const u64[::1] size = as_u64_array(lengths, "lengths")
        cdef Py_ssize_t n = x.shape[0]
        cdef bint same = np.ndim(lengths) == 0
        if not same and size.shape[0] != n:
            raise ValueError(f"{n} starts but {size.shape[0]} lengths")
        targets = np.empty(n, np.uint64)
        status = np.empty(n, np.uint8)
        cdef u64[::1] target = targets
        cdef u8[::1] outcome = status
        if n:
            with nogil:
                if self.limit:
                    pthread_rwlock_wrlock(&self.lock)
                else:
                    pthread_rwlock_rdlock(&self.lock)
                self.lookup_batch(&x[0], &size[0], 0 if same else 1, n, wanted, &target[0], &outcome[0])
                pthread_rwlock_unlock(&self.lock)
            self.count_batch(status)
        return targets, status

    cdef void lookup_batch(
        self, const u64 *x, const u64 *size, int stride, Py_ssize_t n, u64 wanted,
        u64 *target, u8 *status,
    ) noexcept nogil:
        cdef Node *at[GROUP]
        cdef int rank[GROUP]
        cdef Py_ssize_t base = 0
        cdef int group, i, level
        while base < n:
            group = GROUP if n - base >= GROUP else <int>(n - base)
            for i in range(group):
                at[i] = self.root
            for level in range(self.height):
                descend_group(at, x + base, group)
            rank_group(at, x + base, group, rank)
            for i in range(group):
                status[base + i] = self.resolve_one(
                    <Leaf *>at[i], rank[i], x[base + i], size[(base + i) * stride], wanted,
                    target + base + i,
                )
            base += group

    cdef u8 resolve_one(
        self, Leaf *leaf, int rank, u64 x, u64 size, u64 wanted, u64 *target
    ) noexcept nogil:
        cdef Cursor at
        cdef Entry *entry
        cdef u64 last
        target[0] = 0
        if not size:
            return OK
        last = x + (size - 1)
        if last < x:
            return MISS
        at.leaf, at.index = leaf, rank
        if rank < 0:
            at.leaf = leaf.prev
            if at.leaf is NULL:
                return MISS
            at.index = <int>at.leaf.head.count - 1
        entry = &at.leaf.entry[at.index]
        if entry.last < x:
            return MISS
        if self.limit:
            self.tick += 1
            entry.stamp = self.tick
        if last > entry.last:
            return self.resolve_pieces(at, x, last, wanted, target)
        if wanted & ~entry.perm:
            return ACCESS_FAIL
        target[0] = x + entry.delta
        return OK

    cdef u8 resolve_pieces(
        self, Cursor at, u64 x, u64 last, u64 wanted, u64 *target
    ) noexcept nogil:
        """As :meth:`resolve_one` for a range that leaves the entry it begins in."""
        cdef Entry *entry = &at.leaf.entry[at.index]
        cdef u64 delta = entry.delta
        cdef bint whole = True, allowed = not wanted & ~entry.perm
        while entry.last < last:
            if self.limit:
                entry.stamp = self.tick
            x = entry.last + 1
            step(&at)
            if at.leaf is NULL or at.leaf.head.key[at.index] != x:
                return MISS
            entry = &at.leaf.entry[at.index]
            whole = whole and entry.delta == delta
            allowed = allowed and not wanted & ~entry.perm
        if not allowed:
            return ACCESS_FAIL
        if not whole:
            return FRAGMENTED
        target[0] = x + delta
        return OK

    def count_batch(self, status):
        """Add the outcome of a batch to the statistics."""
        counts = np.bincount(status, minlength=4)
        self.hits += counts[OK] + counts[FRAGMENTED]
        self.misses += counts[MISS]
        self.access_fails += counts[ACCESS_FAIL]

    def overlapping(self, start, length):
        """The mappings that touch ``[start, start + length)``, unclipped, ascending.

        Returns:
            ``(start, length, target, perm)`` each.

        Cost: O(log n + k).
        """
        cdef Span span
        cdef Cursor at
        cdef Entry *entry
        cdef u64 first
        cdef list found = []
        as_span(start, length, &span, True)
        if span.empty:
            return found
        at = self.ceiling(span.first)
        while at.leaf is not NULL and at.leaf.head.key[at.index] <= span.last:
            first, entry = at.leaf.head.key[at.index], &at.leaf.entry[at.index]
            found.append(
                (first, span_length(first, entry.last), first + entry.delta,
                 PERMISSIONS[entry.perm])
            )
            step(&at)
        return found

    def neighbours(self, addr):
        """The mapping before and the one after ``addr``, as in :meth:`overlapping`, or None each.

        A mapping that holds ``addr`` is neither. Cost: O(log n).
        """
        cdef u64 x = as_address(addr)
        cdef Cursor at = self.floor(x)
        cdef list found = [None, None]
        cdef u64 first
        cdef Entry *entry
        if at.leaf is not NULL and at.leaf.entry[at.index].last >= x:
            if at.index:
                at.index -= 1
            else:
                at.leaf = at.leaf.prev
                at.index = <int>at.leaf.head.count - 1 if at.leaf is not NULL else 0
        if at.leaf is not NULL:
            first, entry = at.leaf.head.key[at.index], &at.leaf.entry[at.index]
            found[0] = (first, span_length(first, entry.last), first + entry.delta,
                        PERMISSIONS[entry.perm])
        at = self.ceiling(x)
        if at.leaf is not NULL and at.leaf.head.key[at.index] <= x:
            step(&at)
        if at.leaf is not NULL:
            first, entry = at.leaf.head.key[at.index], &at.leaf.entry[at.index]
            found[1] = (first, span_length(first, entry.last), first + entry.delta,
                        PERMISSIONS[entry.perm])
        return tuple(found)

    def pin(self, start, length):
        """Keep whatever is or becomes mapped in a range from being evicted. Counted."""
        cdef Span span
        as_span(start, length, &span, False)
        self.pins.append((span.first, span.last))

    def unpin(self, start, length):
        """Undo one :meth:`pin` of exactly this range.

        Raises:
            ValueError: The range is not pinned.
        """
        cdef Span span
        as_span(start, length, &span, False)
        if (span.first, span.last) not in self.pins:
            raise ValueError(f"{start:#x}+{length:#x} is not pinned")
        self.pins.remove((span.first, span.last))

    @property
    def capacity(self):
        """Largest number of entries, or None."""
        return self.limit or None

    def __len__(self):
        return self.entries

    def __iter__(self):
        """The mappings as they are now: ``(IovaRange, MappedRange, Permissions)``, ascending."""
        for first, last, delta, perm, _ in self.dump():
            length = span_length(first, last)
            target = (<u64>first) + (<u64>delta)
            yield IovaRange(first, length), MappedRange(target, length), PERMISSIONS[perm]

    def check(self):
        """Walk every invariant of the structure; for tests.

        Raises:
            AssertionError: One does not hold.
        """
        cdef Leaf *leaf = self.first_leaf
        cdef size_t total = 0
        assert leaf.prev is NULL
        check_node(self.root, self.height, 0, UINT64_MAX)
        before = None
        while leaf is not NULL:
            assert leaf.next is NULL or leaf.next.prev is leaf
            total += leaf.head.count
            leaf = leaf.next
        assert total == self.entries, (total, self.entries)
        for first, last, delta, perm, _ in self.dump():
            assert first <= last and perm <= 3
            if before is not None:
                assert before[0] < first, "entries overlap"
                if self.merging and before[0] + 1 == first:
                    assert (delta, perm) != before[1:], "neighbours were not joined"
            before = (last, delta, perm)


cdef inline void step(Cursor *at) noexcept nogil:
    at.index += 1
    if at.index == <int>at.leaf.head.count:
        at.leaf, at.index = at.leaf.next, 0


cdef inline bint joins(const Entry *a, const Entry *b) noexcept nogil:
    return a.delta == b.delta and a.perm == b.perm


cdef inline Node **next_spare(Node *node) noexcept nogil:
    # A spare node's first key is free to hold the link.
    return <Node **>&(<Inner *>node).child[0] if not node.is_leaf else <Node **>&(<Leaf *>node).next


cdef void put_key(Node *node, int at, u64 key) noexcept nogil:
    memmove(&node.key[at + 1], &node.key[at], (node.count - at) * sizeof(u64))
    node.key[at] = key
    node.count += 1


cdef void cut_keys(Node *node, int at) noexcept nogil:
    node.count -= 1
    memmove(&node.key[at], &node.key[at + 1], (node.count - at) * sizeof(u64))
    node.key[node.count] = UINT64_MAX


cdef void put_entry(Leaf *leaf, int at, u64 first, Entry entry) noexcept nogil:
    memmove(&leaf.entry[at + 1], &leaf.entry[at], (leaf.head.count - at) * sizeof(Entry))
    leaf.entry[at] = entry
    put_key(&leaf.head, at, first)


cdef void put_child(Inner *inner, int at, u64 key, Node *child) noexcept nogil:
    memmove(&inner.child[at + 1], &inner.child[at], (inner.head.count - at) * sizeof(Node *))
    inner.child[at] = child
    put_key(&inner.head, at, key)


cdef void move_keys(Node *left, int start, Node *right) noexcept nogil:
    cdef int i, moved = <int>left.count - start
    memcpy(&right.key[right.count], &left.key[start], moved * sizeof(u64))
    right.count += moved
    left.count = start
    for i in range(start, NODE_CAPACITY):
        left.key[i] = UINT64_MAX


cdef void split_leaf(Leaf *leaf, Leaf *right) noexcept nogil:
    cdef int half = NODE_CAPACITY // 2
    memcpy(&right.entry[0], &leaf.entry[half], (NODE_CAPACITY - half) * sizeof(Entry))
    move_keys(&leaf.head, half, &right.head)


cdef void split_inner(Inner *inner, Inner *right) noexcept nogil:
    cdef int half = NODE_CAPACITY // 2
    memcpy(&right.child[0], &inner.child[half], (NODE_CAPACITY - half) * sizeof(Node *))
    move_keys(&inner.head, half, &right.head)


cdef int merge_partner(Inner *parent, int at) noexcept nogil:
    """Index of the left one of two neighbours that include ``at`` and fit in one node, or -1."""
    cdef u32 count = parent.child[at].count
    if at + 1 < <int>parent.head.count and count + parent.child[at + 1].count <= MERGE_UP_TO:
        return at
    if at > 0 and count + parent.child[at - 1].count <= MERGE_UP_TO:
        return at - 1
    return -1


cdef void join_leaves(Leaf *left, Leaf *right) noexcept nogil:
    memcpy(&left.entry[left.head.count], &right.entry[0], right.head.count * sizeof(Entry))
    move_keys(&right.head, 0, &left.head)


cdef void join_inners(Inner *parent, int at) noexcept nogil:
    cdef Inner *left = <Inner *>parent.child[at]
    cdef Inner *right = <Inner *>parent.child[at + 1]
    right.head.key[0] = parent.head.key[at + 1]
    memcpy(&left.child[left.head.count], &right.child[0], right.head.count * sizeof(Node *))
    move_keys(&right.head, 0, &left.head)


cdef void free_tree(Node *node) noexcept nogil:
    cdef u32 i
    if not node.is_leaf:
        for i in range(node.count):
            free_tree((<Inner *>node).child[i])
    free(node)


cdef void free_list(Node *node) noexcept nogil:
    cdef Node *following
    while node is not NULL:
        following = next_spare(node)[0]
        free(node)
        node = following


cdef int check_node(Node *node, int height, u64 low, u64 high) except -1:
    cdef u32 i
    assert bool(node.is_leaf) == (height == 0)
    assert height == 0 or node.count > 0
    for i in range(node.count):
        assert low <= node.key[i] <= high, "a key out of its parent's bounds"
        assert i == 0 or node.key[i - 1] < node.key[i]
        if height:
            check_node(
                (<Inner *>node).child[i], height - 1, node.key[i],
                node.key[i + 1] - 1 if i + 1 < node.count else high,
            )
    for i in range(node.count, NODE_CAPACITY):
        assert node.key[i] == UINT64_MAX
    return 0


cdef object as_u64_array(object values, str name):
    array = np.asarray(values)
    if array.dtype.kind == "i" and array.size and array.min() < 0:
        raise ValueError(f"{name} must not be negative")
    if array.dtype.kind not in "ui" and array.size:
        raise TypeError(f"{name} must be integers that fit in 64 bits, not {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.uint64).reshape(-1)
