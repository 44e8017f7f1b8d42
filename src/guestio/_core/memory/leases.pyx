"""Which translations are in use at this moment.

An access enters a lease for the range that it translates, and leaves it when the last byte has
moved. A revocation removes the translation first, so that no new access can
find it, and then waits for the leases that overlap it. Readers never wait: not for each other and
not for a revocation.
"""

import threading
import time

cimport cython
from cpython.exc cimport PyErr_CheckSignals, PyErr_NoMemory
from cpython.pythread cimport PyThread_get_thread_ident
from libc.math cimport INFINITY
from libc.stdint cimport UINT64_MAX
from libc.stdlib cimport free, malloc, realloc

from guestio._core.base.checks cimport Span, as_seconds, as_span, u64
from guestio._core.base.capacity cimport GUESTIO_ASSERT, LEASES_FIRST

cdef extern from "<time.h>" nogil:
    enum:
        CLOCK_MONOTONIC
    int clock_gettime(int, timespec *)

cdef enum:
    NO_OWNER = 0  # no thread's ident
    PATIENCE_NS = 50_000_000  # how long a wait goes on before it looks for a signal to Python


cdef class Leases:
    """A table of the ranges in use. Every method may be called from any thread."""

    def __cinit__(self):
        cdef pthread_condattr_t steady
        self.free_slot = -1
        if (
            pthread_mutex_init(&self.mutex, NULL)
            or pthread_condattr_init(&steady)
            or pthread_condattr_setclock(&steady, CLOCK_MONOTONIC)
            or pthread_cond_init(&self.released, &steady)
        ):
            raise MemoryError

    def __dealloc__(self):
        free(self.slot)
        pthread_cond_destroy(&self.released)
        pthread_mutex_destroy(&self.mutex)

    cdef int enter(self, u64 first, u64 last) except -1:
        """Take a lease and return its slot. O(1).

        Takes the GIL, and so does every lookup that does not lock the tree: while a thread holds
        it, no other begins to use a translation.
        """
        cdef int slot
        cdef Lease *grown
        pthread_mutex_lock(&self.mutex)
        if self.free_slot < 0:
            grown = <Lease *>realloc(self.slot, (self.slots * 2 + LEASES_FIRST) * sizeof(Lease))
            if grown is NULL:
                pthread_mutex_unlock(&self.mutex)
                PyErr_NoMemory()
            self.slot = grown
            for slot in range(self.slots, self.slots * 2 + LEASES_FIRST):
                self.slot[slot].serial = 0
                self.slot[slot].next_free = self.free_slot
                self.free_slot = slot
            self.slots = self.slots * 2 + LEASES_FIRST
        slot = self.free_slot
        GUESTIO_ASSERT(0 <= slot < self.slots)
        GUESTIO_ASSERT(not self.slot[slot].serial)
        self.free_slot = self.slot[slot].next_free
        self.serial += 1
        self.slot[slot].first, self.slot[slot].last = first, last
        self.slot[slot].serial = self.serial
        self.slot[slot].owner = PyThread_get_thread_ident()
        self.held += 1
        pthread_mutex_unlock(&self.mutex)
        return slot

    cdef void leave(self, int slot) noexcept nogil:
        """Give a lease back. O(1)."""
        pthread_mutex_lock(&self.mutex)
        GUESTIO_ASSERT(0 <= slot < self.slots)
        GUESTIO_ASSERT(self.slot[slot].serial != 0)
        self.slot[slot].serial = 0
        self.slot[slot].next_free = self.free_slot
        self.free_slot = slot
        self.held -= 1
        if self.waiting:
            pthread_cond_broadcast(&self.released)
        pthread_mutex_unlock(&self.mutex)

    cdef void disown(self, int slot) noexcept nogil:
        """Have a lease belong to no thread, as another one is to leave it. O(1)."""
        pthread_mutex_lock(&self.mutex)
        GUESTIO_ASSERT(0 <= slot < self.slots)
        GUESTIO_ASSERT(self.slot[slot].serial != 0)
        self.slot[slot].owner = NO_OWNER
        pthread_mutex_unlock(&self.mutex)

    def abandon(self, start, length):
        """Have every wait pass over the leases on a range: what they lead to was taken away.

        Args:
            start: First address.
            length: Bytes, greater than 0.

        Returns:
            The whole ranges of these leases, as ``(first, last)``. Cost: O(leases).
        """
        cdef Span span
        cdef Lease *lease
        cdef int i, found = 0
        cdef u64 *ends
        as_span(start, length, &span, False)
        pthread_mutex_lock(&self.mutex)
        # No Python object is made under the mutex.
        ends = <u64 *>malloc((self.held + 1) * 2 * sizeof(u64))
        if ends is not NULL:
            for i in range(self.slots):
                lease = &self.slot[i]
                if lease.serial and lease.serial <= self.serial and (
                    lease.first <= span.last and span.first <= lease.last
                ):
                    ends[2 * found], ends[2 * found + 1] = lease.first, lease.last
                    lease.serial, lease.owner = UINT64_MAX, NO_OWNER
                    found += 1
            if found and self.waiting:
                pthread_cond_broadcast(&self.released)
        pthread_mutex_unlock(&self.mutex)
        if ends is NULL:
            PyErr_NoMemory()
        try:
            return [(ends[2 * i], ends[2 * i + 1]) for i in range(found)]
        finally:
            free(ends)

    cdef bint busy(self, Span span, u64 before) noexcept nogil:
        """Whether a lease taken up to ``before`` overlaps. Needs the mutex."""
        cdef int i
        cdef Lease *lease
        if not self.held:
            return False
        for i in range(self.slots):
            lease = &self.slot[i]
            if lease.serial and lease.serial <= before and (
                lease.first <= span.last and span.first <= lease.last
            ):
                return True
        return False

    cdef bint used(self, u64 first, u64 last) noexcept nogil:
        """Whether a lease overlaps ``[first, last]``. O(leases)."""
        cdef bint found
        pthread_mutex_lock(&self.mutex)
        found = self.busy(Span(first, last, False), self.serial)
        pthread_mutex_unlock(&self.mutex)
        return found

    cdef bint used_by_me(self, Span span, Lease *found) noexcept:
        """Whether this very thread holds a lease that overlaps, and one such."""
        cdef unsigned long me = PyThread_get_thread_ident()
        cdef Lease *lease
        cdef int i
        cdef bint mine = False
        pthread_mutex_lock(&self.mutex)
        if self.held:
            for i in range(self.slots):
                lease = &self.slot[i]
                if lease.serial and lease.owner == me and (
                    lease.first <= span.last and span.first <= lease.last
                ):
                    found[0], mine = lease[0], True
        pthread_mutex_unlock(&self.mutex)
        return mine

    cdef int check_self(self, Span span) except -1:
        cdef Lease mine
        if self.used_by_me(span, &mine):
            self.refuse(span, mine)
        return 0

    cdef int refuse(self, Span span, Lease mine) except -1:
        """Refuse to wait for a lease of this very thread."""
        raise RuntimeError(
            f"thread {threading.current_thread().name} would wait for itself: it still uses "
            f"{mine.first:#x}..{mine.last:#x} (inclusive), which a change of "
            f"{span.first:#x}..{span.last:#x} takes away; leave the guard, close the slices or "
            "complete the request that holds it first"
        )

    cdef bint wait(self, Span span, timeout):
        """Wait for the overlapping leases that exist now; False when the time is up."""
        cdef u64 before
        cdef bint idle
        cdef timespec until
        deadline = None
        if timeout is not None:
            deadline = time.monotonic() + as_seconds(timeout, "timeout", INFINITY)
        pthread_mutex_lock(&self.mutex)
        before = self.serial
        idle = not self.busy(span, before)
        pthread_mutex_unlock(&self.mutex)
        if idle:
            return True
        self.check_self(span)
        while not idle:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            PyErr_CheckSignals()
            with nogil:
                clock_gettime(CLOCK_MONOTONIC, &until)
                until.tv_nsec += PATIENCE_NS
                if until.tv_nsec >= 1_000_000_000:
                    until.tv_sec, until.tv_nsec = until.tv_sec + 1, until.tv_nsec - 1_000_000_000
                pthread_mutex_lock(&self.mutex)
                self.waiting += 1
                if self.busy(span, before):
                    pthread_cond_timedwait(&self.released, &self.mutex, &until)
                self.waiting -= 1
                idle = not self.busy(span, before)
                pthread_mutex_unlock(&self.mutex)
        return True

    cdef Guard hold(self, Span span):
        """A guard of a range; what it leads to is still to be put in."""
        cdef Guard guard = Guard()
        guard.leases = self
        if not span.empty:
            guard.slot = self.enter(span.first, span.last)
        return guard

    def __len__(self):
        """How many leases are held."""
        return self.held


# A lease is given back to its table, so the table must still be there when the guard goes.
@cython.no_gc_clear
cdef class Guard:
    """A translation in use; leaving it (or dropping the object) ends the use."""

    def __cinit__(self):
        self.slot = -1

    def __enter__(self):
        return self.ranges

    def __exit__(self, *exc):
        self.close()

    def close(self):
        """End the use. Calling it again does nothing."""
        if self.slot >= 0:
            self.leases.leave(self.slot)
            self.slot = -1

    def __dealloc__(self):
        if self.slot >= 0:
            self.leases.leave(self.slot)
