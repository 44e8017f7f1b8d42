"""Ordered map of disjoint ranges of a 64-bit address space to ranges of another.

One structure, a B+tree, serves both policies: :meth:`IntervalMap.overwrite` and
:meth:`~IntervalMap.cut` split and merge what they meet, as a cache may;
:meth:`~IntervalMap.add` and :meth:`~IntervalMap.take` refuse instead, as a domain of an IOMMU must.
A batch of lookups goes down the tree side by side, so that their cache misses overlap.

Threads: every method may be called from any thread. The tree is looked at while the GIL is held
and is not touched by anything else then; a writer holds the lock exclusively as well,
and batch lookups hold the lock shared and release the GIL. Between looking at a node and being
done with it no Python object is made: making one may run the garbage collector, and with it
arbitrary code.
"""

import numpy as np

cimport cython
from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.ref cimport Py_INCREF
from libc.stdlib cimport free
from libc.stdint cimport UINT64_MAX

from guestio._core.base.checks cimport (
    Span, as_access, as_address, as_size, as_span, as_u64_array, span_length, u8, u32, u64,
)
from guestio._core.iommu.eviction cimport (
    add_pin, check_queue, close_queue, drop_pin, enqueue, evict, make_room,
)
from guestio._core.memory.leases cimport Guard, Lease
from guestio._core.iommu.misses cimport Misses
from guestio._core.iommu.pieces cimport (
    ACCESS_FAIL, FRAGMENTED, MISS, OK, Outcome, Piece, Pieces, add_piece, close_pieces, make_range,
    open_pieces,
)
from guestio._core.iommu.tree cimport (
    Cursor, Entry, Leaf, Tree, ceiling_of, check_tree, close_tree, erase_entry, floor_of,
    insert_entry, lookup_batch, open_tree, reserve, stamp_entry, step, step_back,
)

from guestio.addr import IovaRange, MappedRange, Permissions
from guestio.errors import IotlbFails

cdef enum:
    SURVEY_COLUMNS = 6
    SURVEY_PARTS = 64  # parts of a survey between which others may change the map

cdef u64 last_generation = 0


cdef inline u64 next_generation() noexcept:
    """A number that no map has had as its generation. Needs the GIL.

    It cannot raise: a C integer of the module is counted up, 64 bits wide.
    """
    global last_generation
    last_generation += 1
    return last_generation


cdef tuple PERMISSIONS = tuple(Permissions(n) for n in range(4))


cdef tuple mapping_tuple(const Piece *piece):
    return (
        piece.first, span_length(piece.first, piece.last), piece.target, PERMISSIONS[piece.perm]
    )


# A map that follows another points into it, so that one must still be there when the map goes.
@cython.no_gc_clear
cdef class IntervalMap:
    """Disjoint address ranges, each with a target and permissions.

    Args:
        merge: Join neighbors whose targets are contiguous too and whose permissions are equal.
        capacity: Largest number of entries; beyond it the least recently used one that is neither
            pinned nor in use is evicted. A change looks at a limited number of those that are;
            the capacity is exceeded until it finds others. None for no limit.

    Attributes:
        hits: Lookups that resolved.
        misses: Lookups with an unmapped byte.
        access_fails: Lookups that were mapped throughout but forbidden somewhere.
        evictions: Entries dropped to keep within the capacity.
        origin: The number of its server, for records of tracepoints.

    Several maps can show the mappings of one, see :func:`follow`.

    Memory: 50 to 65 bytes an entry, up to twice as much after removals; with a capacity, up to 64
    more.
    """

    def __cinit__(self, *, bint merge=True, capacity=None):
        cdef pthread_rwlockattr_t fair
        self.merging = merge
        self.limit = 0
        if capacity is not None:
            self.limit = as_size(capacity, "capacity")
            if not self.limit:
                raise ValueError("capacity must be at least 1")
        self.leases = Leases()
        self.at = &self.own
        self.own.generation = next_generation()
        # A stream of batch lookups must not keep a change waiting for ever.
        if (
            pthread_rwlockattr_init(&fair)
            or pthread_rwlockattr_setkind_np(&fair, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP)
            or pthread_rwlock_init(&self.own.lock, &fair)
        ):
            raise MemoryError
        open_tree(&self.own.tree)

    def __dealloc__(self):
        close_tree(&self.own.tree)
        close_queue(&self.queue)
        pthread_rwlock_destroy(&self.own.lock)

    cdef int begin_change(self, int inserts) except -1:
        """Lock the tree for a change that inserts at most so many entries.

        The GIL is let go of to wait, so nothing that was seen before may be relied on after.
        """
        if self.source is not None:
            raise RuntimeError(
                "this map shows the mappings of another one, such as a domain's; change them there"
            )
        if pthread_rwlock_trywrlock(&self.at.lock):
            with nogil:
                pthread_rwlock_wrlock(&self.at.lock)
        try:
            reserve(&self.at.tree, inserts)
            if self.limit:
                make_room(&self.queue, &self.at.tree, inserts)
        except BaseException:
            pthread_rwlock_unlock(&self.at.lock)
            raise
        return 0

    cdef void end_change(self) noexcept:
        cdef size_t gone
        if self.limit and self.at.tree.entries > self.limit:
            gone = evict(&self.queue, &self.at.tree, self.leases, self.limit, &self.tick, self.origin)
            self.evictions += gone
            if gone:
                self.at.generation = next_generation()
        pthread_rwlock_unlock(&self.at.lock)

    cdef void refuse_change(self) noexcept:
        """Unlock the tree without a change, not even an eviction that others left to be done."""
        pthread_rwlock_unlock(&self.at.lock)

    cdef void put(self, u64 first, Entry entry) noexcept:
        if self.limit:
            enqueue(&self.queue, entry.stamp, first)
        insert_entry(&self.at.tree, first, entry)

    cdef bint cut_span(self, Span span) noexcept:
        """Unmap a span, splitting what reaches out of it. Needs one reserved insertion.

        Returns whether anything was mapped there. O((k + 1) log n) for k entries met.
        """
        cdef Cursor at = ceiling_of(&self.at.tree, span.first)
        cdef Entry entry
        cdef u64 start
        cdef bint met = False
        while at.leaf is not NULL and at.leaf.head.key[at.index] <= span.last:
            met = True
            start, entry = at.leaf.head.key[at.index], at.leaf.entry[at.index]
            if start < span.first:
                at.leaf.entry[at.index].last = span.first - 1
            else:
                erase_entry(&self.at.tree, start)
            if entry.last >= span.last:
                if entry.last > span.last:
                    self.put(span.last + 1, entry)
                break
            at = ceiling_of(&self.at.tree, entry.last + 1)
        if met:
            self.at.generation = next_generation()
        return met

    cdef bint takes_away(self, Span span, u64 target, u64 perm) noexcept:
        """Whether mapping a span like this moves or restricts anything that is mapped now."""
        cdef Cursor at = ceiling_of(&self.at.tree, span.first)
        while at.leaf is not NULL and at.leaf.head.key[at.index] <= span.last:
            if at.leaf.entry[at.index].delta != target - span.first:
                return True
            if at.leaf.entry[at.index].perm & ~perm:
                return True
            step(&at)
        return False

    cdef void overwrite_span(self, Span span, u64 target, u64 perm) noexcept:
        """Map a span, whatever was there before. Needs two reserved insertions."""
        cdef Entry entry
        cdef Cursor at = ceiling_of(&self.at.tree, span.first)
        self.tick += 1
        entry.last, entry.delta, entry.perm = span.last, target - span.first, perm
        entry.stamp = self.tick
        if at.leaf is not NULL and at.leaf.head.key[at.index] <= span.last:
            if self.merging and at.leaf.head.key[at.index] <= span.first and (
                at.leaf.entry[at.index].last >= span.last
            ) and joins(&at.leaf.entry[at.index], &entry):
                at.leaf.entry[at.index].stamp = self.tick
                return
            self.cut_span(span)
            at = ceiling_of(&self.at.tree, span.first)
        if self.merging:
            if at.leaf is not NULL and at.leaf.head.key[at.index] - 1 == span.last and joins(
                &at.leaf.entry[at.index], &entry
            ):
                entry.last = at.leaf.entry[at.index].last
                erase_entry(&self.at.tree, span.last + 1)
                at = ceiling_of(&self.at.tree, span.first)
            if at.leaf is NULL:
                at = floor_of(&self.at.tree, span.first)
            else:
                step_back(&at)
            if at.leaf is not NULL and at.leaf.entry[at.index].last + 1 == span.first and joins(
                &at.leaf.entry[at.index], &entry
            ):
                at.leaf.entry[at.index].last = entry.last
                at.leaf.entry[at.index].stamp = self.tick
                return
        self.put(span.first, entry)

    cdef void touch(self, Entry *entry) noexcept nogil:
        """Note that an entry was used."""
        if self.limit:
            self.tick += 1
            stamp_entry(entry, self.tick)

    cdef int collect(self, Span span, Pieces *found) except -1:
        """The entries that touch a span, whole."""
        cdef Cursor at
        cdef Entry *entry
        cdef u64 first
        if span.empty:
            return 0
        at = ceiling_of(&self.at.tree, span.first)
        while at.leaf is not NULL and at.leaf.head.key[at.index] <= span.last:
            first, entry = at.leaf.head.key[at.index], &at.leaf.entry[at.index]
            add_piece(found, first, entry.last, first + entry.delta, entry.perm, OK)
            step(&at)
        return 0

    cdef Outcome resolve(self, Span span, u64 wanted, Pieces *found) except -1:
        """What every part of a span is: mapped, missing or forbidden. Clipped, ascending."""
        cdef Cursor at = ceiling_of(&self.at.tree, span.first)
        cdef Outcome outcome = OK, part
        cdef u64 x = span.first, first, last
        cdef Entry *entry
        while True:
            if at.leaf is NULL or at.leaf.head.key[at.index] > span.last:
                add_piece(found, x, span.last, 0, 0, MISS)
                return MISS
            first, entry = at.leaf.head.key[at.index], &at.leaf.entry[at.index]
            if first > x:
                add_piece(found, x, first - 1, 0, 0, MISS)
                outcome = MISS
                x = first
            last = min(entry.last, span.last)
            part = ACCESS_FAIL if wanted & ~entry.perm else OK
            if part != OK and outcome == OK:
                outcome = ACCESS_FAIL
            add_piece(found, x, last, x + entry.delta, entry.perm, part)
            self.touch(entry)
            if last == span.last:
                return outcome
            x = last + 1
            step(&at)

    cdef void count_outcome(self, Outcome outcome) noexcept:
        if outcome == MISS:
            self.misses += 1
        elif outcome == ACCESS_FAIL:
            self.access_fails += 1
        else:
            self.hits += 1

    def overwrite(self, start, length, target, perm, *, bint drain=False):
        """Map ``[start, start + length)`` to ``target``, replacing whatever overlaps.

        Targets are taken modulo ``2**64``. What reaches out of the range stays mapped as it was.

        Args:
            start: First address.
            length: Bytes, greater than 0.
            target: Where ``start`` leads.
            perm: What is allowed.
            drain: If a translation was removed, return only when it is no longer in use.

        Returns:
            Whether a translation was taken away: moved elsewhere or restricted.

        Raises:
            TypeError, ValueError: Bad numbers, or a length of 0; nothing changed.
            RuntimeError: ``drain``, and this very thread uses what would be taken away; nothing
                changed.

        Cost: O((k + 1) log n) for k entries replaced.
        """
        cdef Span span
        as_span(start, length, &span, False)
        cdef u64 to = as_address(target, "target")
        cdef u64 access = as_access(perm, "perm")
        cdef bint taken
        cdef Lease mine
        self.begin_change(3)
        taken = self.takes_away(span, to, access)
        if drain and taken and self.leases.used_by_me(span, &mine):
            self.refuse_change()
            self.leases.refuse(span, mine)
        self.overwrite_span(span, to, access)
        self.end_change()
        if drain and taken:
            self.leases.wait(span, None)
        return taken

    def cut(self, start, length, *, bint drain=False):
        """Unmap ``[start, start + length)``, splitting mappings that reach out of it.

        Args:
            start: First address.
            length: Bytes, greater than 0.
            drain: Return only when no translation of the range is in use any more.

        Returns:
            Whether anything was mapped there.

        Raises:
            TypeError, ValueError: Bad numbers, or a length of 0; nothing changed.
            RuntimeError: ``drain``, and this very thread uses a translation of the range; nothing
                changed.

        Cost: O((k + 1) log n) for k entries met.
        """
        cdef Span span
        cdef bint met
        as_span(start, length, &span, False)
        if drain:
            self.leases.check_self(span)
        self.begin_change(2)
        met = self.cut_span(span)
        self.cuts += 1
        self.end_change()
        if drain:
            self.leases.wait(span, None)
        return met

    def clear(self, *, bint drain=False):
        """Unmap everything; ``drain`` as for :meth:`cut`. Cost: O(n), if little."""
        cdef Span span = Span(0, UINT64_MAX, False)
        cdef Tree old, fresh
        if drain:
            self.leases.check_self(span)
        open_tree(&fresh)
        try:
            self.begin_change(0)
        except BaseException:
            close_tree(&fresh)
            raise
        old, self.at.tree = self.at.tree, fresh
        free(self.queue.heap)
        self.queue.heap, self.queue.count, self.queue.room = NULL, 0, 0
        self.at.generation = next_generation()
        self.cuts += 1
        self.end_change()
        close_tree(&old)
        if drain:
            self.leases.wait(span, None)

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
        cdef bint free_of_others
        as_span(start, length, &span, False)
        cdef u64 to = as_address(target, "target")
        cdef u64 access = as_access(perm, "perm")
        self.begin_change(3)
        at = ceiling_of(&self.at.tree, span.first)
        free_of_others = at.leaf is NULL or at.leaf.head.key[at.index] > span.last
        if free_of_others:
            self.overwrite_span(span, to, access)
            self.end_change()
        else:
            self.refuse_change()
        return free_of_others

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
        cdef Pieces found
        cdef size_t i
        cdef bint whole = True, collected = False
        as_span(start, length, &span, False)
        open_pieces(&found)
        self.begin_change(0)
        try:
            self.collect(span, &found)
            collected = True
        finally:
            if collected and found.count:
                whole = found.item[0].first >= span.first and (
                    found.item[found.count - 1].last <= span.last
                )
            if collected and found.count and whole:
                for i in range(found.count):
                    erase_entry(&self.at.tree, found.item[i].first)
                self.at.generation = next_generation()
                self.end_change()
            else:
                self.refuse_change()
        try:
            return list_of_mappings(&found) if whole else None
        finally:
            close_pieces(&found)

    cpdef list lookup(self, start, length, access):
        """See :meth:`Lookups.lookup <guestio._core.iommu.lookups.Lookups.lookup>`."""
        cdef Span span
        cdef u64 wanted = as_access(access)
        as_span(start, length, &span, True)
        return [] if span.empty else self.lookup_span(span, wanted)

    cdef list lookup_span(self, Span span, u64 wanted):
        cdef Cursor at = floor_of(&self.at.tree, span.first)
        cdef Entry *entry
        cdef u64 target
        cdef list found
        if at.leaf is not NULL:
            entry = &at.leaf.entry[at.index]
            if span.last <= entry.last and not wanted & ~entry.perm:
                self.hits += 1
                self.touch(entry)
                target = span.first + entry.delta
                found = PyList_New(1)
                item = make_range(MappedRange, target, span.first, span.last)
                Py_INCREF(item)
                PyList_SET_ITEM(found, 0, item)
                return found
        found = []
        misses, refused = [], []
        if self.resolve_to(span, wanted, found, misses, refused) != OK:
            raise IotlbFails(misses, refused)
        return found

    cdef int fails_of(self, Span span, u64 wanted, Misses failed) except -1:
        """Add what keeps a span from resolving; counts as a lookup."""
        cdef Pieces pieces
        cdef Piece *piece
        cdef size_t i
        open_pieces(&pieces)
        try:
            self.count_outcome(self.resolve(span, wanted, &pieces))
            for i in range(pieces.count):
                piece = &pieces.item[i]
                if piece.outcome != OK:
                    failed.add(piece.first, piece.last, <int>wanted, piece.outcome != MISS)
        finally:
            close_pieces(&pieces)
        return 0

    cdef Outcome resolve_to(
        self, Span span, u64 wanted, list found, list misses, list refused
    ) except -1:
        """Add the targets, the missing and the forbidden parts of a span to the lists."""
        cdef Pieces pieces
        cdef Piece *piece
        cdef Outcome outcome
        cdef size_t i
        open_pieces(&pieces)
        try:
            outcome = self.resolve(span, wanted, &pieces)
            self.count_outcome(outcome)
            for i in range(pieces.count):
                piece = &pieces.item[i]
                if piece.outcome != OK:
                    (misses if piece.outcome == MISS else refused).append(
                        make_range(IovaRange, piece.first, piece.first, piece.last)
                    )
                else:
                    found.append(make_range(MappedRange, piece.target, piece.first, piece.last))
        finally:
            close_pieces(&pieces)
        return outcome

    cpdef Guard guard(self, start, length, access):
        """See :meth:`Lookups.guard <guestio._core.iommu.lookups.Lookups.guard>`."""
        cdef Span span
        cdef u64 wanted = as_access(access)
        as_span(start, length, &span, True)
        # Held before it is looked up, so that no revocation fits in between.
        cdef Guard held = self.leases.hold(span)
        try:
            held.ranges = [] if span.empty else self.lookup_span(span, wanted)
        except BaseException:
            held.close()
            raise
        return held

    def drain(self, start, length, timeout=None):
        """See :meth:`Lookups.drain <guestio._core.iommu.lookups.Lookups.drain>`."""
        cdef Span span
        as_span(start, length, &span, True)
        return span.empty or self.leases.wait(span, timeout)

    def check_drain(self, start, length):
        """Raise the RuntimeError that :meth:`drain` would raise now."""
        cdef Span span
        as_span(start, length, &span, True)
        if not span.empty:
            self.leases.check_self(span)

    def lookup_many(self, starts, lengths, access):
        """See :meth:`Lookups.lookup_many <guestio._core.iommu.lookups.Lookups.lookup_many>`."""
        cdef u64 wanted = as_access(access)
        cdef const u64[::1] x = as_u64_array(starts, "starts")
        cdef const u64[::1] size = as_u64_array(lengths, "lengths")
        cdef Py_ssize_t n = x.shape[0]
        cdef bint same = not isinstance(lengths, (list, tuple)) and np.ndim(lengths) == 0
        if not same and size.shape[0] != n:
            raise ValueError(f"{n} starts but {size.shape[0]} lengths")
        targets = np.empty(n, np.uint64)
        status = np.empty(n, np.uint8)
        cdef u64[::1] target = targets
        cdef u8[::1] outcome = status
        cdef u64 stamp = 0
        cdef IntervalMap source = self.source  # keeps it, whatever this map follows meanwhile
        cdef Mappings *at = self.at
        cdef u64 counts[4]
        counts[:] = [0, 0, 0, 0]
        if self.limit:
            self.tick += 1
            stamp = self.tick
        if n:
            with nogil:
                pthread_rwlock_rdlock(&at.lock)
                lookup_batch(
                    at.tree.root, at.tree.height, &x[0], &size[0], 0 if same else 1, n,
                    wanted, stamp, &target[0], &outcome[0], counts,
                )
                pthread_rwlock_unlock(&at.lock)
        self.hits += counts[OK] + counts[FRAGMENTED]
        self.misses += counts[MISS]
        self.access_fails += counts[ACCESS_FAIL]
        return targets, status

    def overlapping(self, start, length):
        """The mappings that touch ``[start, start + length)``, unclipped, ascending.

        Returns:
            ``(start, length, target, perm)`` each.

        Cost: O(log n + k).
        """
        cdef Span span
        cdef Pieces found
        as_span(start, length, &span, True)
        open_pieces(&found)
        try:
            self.collect(span, &found)
            return list_of_mappings(&found)
        finally:
            close_pieces(&found)

    def survey(self, start, length, parts, most):
        """What is mapped in each of equal parts of a range, without going through all of it.

        Args:
            start: First address.
            length: Bytes, greater than 0; a multiple of ``parts``.
            parts: How many, 2 or more.
            most: Entries that are looked at in a part; 1 or more.

        Returns:
            ``(rows, extent)``. A row of 64-bit numbers for each part: entries, bytes that they map,
            bytes at its end that were not looked at because ``most`` entries came before, a bit
            ``1 << perm`` for each kind of permission, the first address that is mapped and its
            target. The extent is the first and the last address of all mappings, or None.

        It counts as no lookup and is no use of an entry. The parts are not of one moment: a change
        waits for SURVEY_PARTS of them at most, and lookups do not wait.

        Cost: O(parts * (log n + most)); the GIL is released.
        """
        cdef Span span
        cdef size_t count = as_size(parts, "parts"), limit = as_size(most, "most"), begin = 0, end
        cdef u64 size, low = 0, high = 0
        cdef Cursor last
        cdef bint mapped = False
        cdef IntervalMap source = self.source  # keeps it, whatever this map follows meanwhile
        cdef Mappings *at = self.at
        as_span(start, length, &span, False)
        if count < 2 or not limit:
            raise ValueError(f"a survey has 2 parts or more, of 1 entry or more: {parts}, {most}")
        size = (span.last - span.first) // count + 1
        if size * (count - 1) + (size - 1) != span.last - span.first:
            raise ValueError(f"{length:#x} bytes are not {parts} equal parts")
        rows = np.zeros((count, SURVEY_COLUMNS), np.uint64)
        cdef u64[:, ::1] view = rows
        with nogil:
            while begin < count:
                end = min(begin + SURVEY_PARTS, count)
                pthread_rwlock_rdlock(&at.lock)
                survey_parts(&at.tree, span.first, size, begin, end, limit, &view[0, 0])
                if end == count:
                    last = floor_of(&at.tree, UINT64_MAX)
                    if last.leaf is not NULL:
                        mapped = True
                        low, high = at.tree.first_leaf.head.key[0], last.leaf.entry[last.index].last
                pthread_rwlock_unlock(&at.lock)
                begin = end
        return rows, (low, high) if mapped else None

    def neighbours(self, addr):
        """The mapping before and the one after ``addr``, as in :meth:`overlapping`, or None each.

        A mapping that holds ``addr`` is neither. Cost: O(log n).
        """
        cdef u64 x = as_address(addr)
        cdef Cursor at = floor_of(&self.at.tree, x), after = ceiling_of(&self.at.tree, x)
        cdef Piece before_piece, after_piece
        cdef bint has_before, has_after
        if at.leaf is not NULL and at.leaf.entry[at.index].last >= x:
            step_back(&at)
        if after.leaf is not NULL and after.leaf.head.key[after.index] <= x:
            step(&after)
        has_before, has_after = at.leaf is not NULL, after.leaf is not NULL
        if has_before:
            before_piece = piece_at(&at)
        if has_after:
            after_piece = piece_at(&after)
        return (
            mapping_tuple(&before_piece) if has_before else None,
            mapping_tuple(&after_piece) if has_after else None,
        )

    def pin(self, start, length):
        """Keep whatever is or becomes mapped in a range from being evicted. Counted."""
        cdef Span span
        as_span(start, length, &span, False)
        add_pin(&self.queue, span.first, span.last)

    def unpin(self, start, length):
        """Undo one :meth:`pin` of exactly this range; ValueError if it is not pinned."""
        cdef Span span
        as_span(start, length, &span, False)
        if not drop_pin(&self.queue, span.first, span.last):
            raise ValueError(f"{start:#x}+{length:#x} is not pinned")

    @property
    def invalidations(self):
        """Calls of :meth:`cut` and :meth:`clear`, also those that were seen while following."""
        return self.cuts if self.source is None else self.cuts + self.source.cuts - self.seen_cuts

    @property
    def generation(self):
        """Changes whenever a mapping is removed, cut, replaced or evicted."""
        return self.at.generation

    @property
    def capacity(self):
        """Largest number of entries, or None."""
        return self.limit or None

    def __len__(self):
        return self.at.tree.entries

    def __iter__(self):
        """The mappings as they are now: ``(IovaRange, MappedRange, Permissions)``, ascending."""
        cdef Pieces found
        cdef Piece *piece
        cdef size_t i
        cdef list listed = []
        open_pieces(&found)
        try:
            self.collect(Span(0, UINT64_MAX, False), &found)
            for i in range(found.count):
                piece = &found.item[i]
                listed.append((
                    make_range(IovaRange, piece.first, piece.first, piece.last),
                    make_range(MappedRange, piece.target, piece.first, piece.last),
                    PERMISSIONS[piece.perm],
                ))
        finally:
            close_pieces(&found)
        return iter(listed)

    def check(self):
        """Walk every invariant of the structure; for tests.

        Raises:
            AssertionError: One does not hold.
        """
        check_tree(&self.at.tree)
        check_queue(&self.queue)
        before = None
        for first, length, target, perm in self.overlapping(0, 1 << 64):
            delta = (target - first) % (1 << 64)
            if before is not None:
                assert before[0] <= first, "entries overlap"
                if self.merging and before[0] == first:
                    assert (delta, perm) != before[1:], "neighbors were not joined"
            before = (first + length, delta, perm)


def follow(IntervalMap map not None, IntervalMap source):
    """Have lookups in a map see the mappings of another one instead of its own.

    It must have none of its own. Lookups count and hold leases in the follower, so
    :meth:`~IntervalMap.drain` of each follower waits for its own users only. Changes are made at
    ``source`` and seen at once; at the follower they raise RuntimeError. Whoever takes a mapping
    away there, or has a map follow something else, waits afterwards for those who use it:
    :func:`users_of`, :meth:`~IntervalMap.drain`.

    Args:
        map: The follower.
        source: A map without capacity that follows none; None to see nothing again.

    Raises:
        ValueError: ``map`` has mappings or a capacity, or ``source`` is not such a map.

    Cost: O(1).
    """
    if map.own.tree.entries or map.limit:
        raise ValueError("a map with mappings of its own, or a capacity, cannot follow another")
    if source is not None and (source is map or source.source is not None or source.limit):
        raise ValueError("only a map without capacity that follows none can be followed")
    cdef IntervalMap old = map.source  # lives until all is exchanged
    map.cuts = map.invalidations + 1
    # A number that no lookup has seen yet, so that what was looked up before is looked up again.
    map.own.generation = next_generation()
    map.source = source
    map.at = &map.own if source is None else &source.own
    map.seen_cuts = 0 if source is None else source.cuts


def users_of(dict maps, start, length):
    """Those of several maps of which a translation in a range is in use at this moment.

    Args:
        maps: The maps, as values.
        start: First address.
        length: Bytes, greater than 0.

    Cost: O(maps + leases).
    """
    cdef Span span
    cdef IntervalMap map
    as_span(start, length, &span, False)
    return [map for map in maps.values() if map.leases.used(span.first, span.last)]


cdef void survey_parts(
    const Tree *tree, u64 first, u64 size, size_t part, size_t end, size_t most, u64 *rows
) noexcept nogil:
    """Fill the rows of some parts; they are zeroed. Plain C under the map's lock."""
    cdef Cursor at
    cdef Entry *entry
    cdef u64 *row
    cdef u64 low, high, start
    while part < end:
        low = first + part * size
        high = low + (size - 1)
        at = ceiling_of(tree, low)
        if at.leaf is NULL:
            return
        if at.leaf.head.key[at.index] > high:
            # Nothing is mapped up to there.
            part = <size_t>min((at.leaf.head.key[at.index] - first) // size, <u64>end)
            continue
        row = rows + part * SURVEY_COLUMNS
        while at.leaf is not NULL and at.leaf.head.key[at.index] <= high:
            start, entry = max(at.leaf.head.key[at.index], low), &at.leaf.entry[at.index]
            if row[0] == most:
                row[2] = high - start + 1
                break
            if not row[0]:
                row[4], row[5] = start, start + entry.delta
            row[0] += 1
            row[1] += min(entry.last, high) - start + 1
            row[3] |= <u64>1 << entry.perm
            step(&at)
        part += 1


cdef list list_of_mappings(const Pieces *pieces):
    cdef size_t i
    return [mapping_tuple(&pieces.item[i]) for i in range(pieces.count)]


cdef Piece piece_at(const Cursor *at) noexcept nogil:
    cdef Entry *entry = &at.leaf.entry[at.index]
    cdef u64 first = at.leaf.head.key[at.index]
    return Piece(first, entry.last, first + entry.delta, entry.perm, OK)


cdef inline bint joins(const Entry *a, const Entry *b) noexcept nogil:
    return a.delta == b.delta and a.perm == b.perm
