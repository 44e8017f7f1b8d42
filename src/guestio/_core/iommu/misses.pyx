"""What a translation lacks, collected while rings are walked.

Behind an IOMMU nearly every new request lacks something, so this is kept as plain numbers; Python
objects are made only when they are read.
"""

from cpython.exc cimport PyErr_NoMemory
from libc.stdlib cimport free, realloc

from guestio._core.base.checks cimport span_length
from guestio._core.base.capacity cimport GUESTIO_ASSERT, MISSES_FIRST

from guestio.addr import IovaRange
from guestio.errors import IotlbFails


cdef class Misses:
    """A sequence of ``(IovaRange, access)``: what is not mapped, or not for this access.

    Grows only inside the core. Reading it from several threads is safe.
    """

    def __dealloc__(self):
        free(self.item)

    cdef int add(self, u64 first, u64 last, int access, bint refused) except -1:
        """Add a range; ``refused`` if it is mapped, but not for the access. O(1) amortised."""
        cdef Miss *item
        if self.count == self.room:
            item = <Miss *>realloc(self.item, (2 * self.room + MISSES_FIRST) * sizeof(Miss))
            if item is NULL:
                PyErr_NoMemory()
            self.item, self.room = item, 2 * self.room + MISSES_FIRST
        GUESTIO_ASSERT(self.count < self.room)
        self.item[self.count] = Miss(first, last, <u8>access, refused)
        self.count += 1
        return 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        cdef Py_ssize_t at = index
        if at < 0:
            at += self.count
        if not 0 <= at < <Py_ssize_t>self.count:
            raise IndexError(f"miss {index} of {self.count}")
        return self.range_at(at), self.item[at].access

    cdef object range_at(self, size_t at):
        cdef Miss *item = &self.item[at]
        return IovaRange(item.first, span_length(item.first, item.last))

    cdef object error(self):
        """The exception that tells all of it."""
        cdef size_t i
        cdef list misses = [], refused = []
        for i in range(self.count):
            (refused if self.item[i].refused else misses).append(self.range_at(i))
        return IotlbFails(misses, refused)

    def __iter__(self):
        cdef size_t at
        for at in range(self.count):
            yield self.range_at(at), self.item[at].access

    def __repr__(self):
        return f"<Misses {list(self)}>"


def touched(missing, known):
    """Those of the ``known`` pages ``(iova, access)`` that ranges touch, as a set.

    Cost: for each range, O(its pages) or O(known pages), whatever is less.
    """
    cdef u64 iova, last
    cdef set found = set()
    cdef size_t count = len(known)
    if not count:
        return found
    for (base, length), access in missing:
        last = base + (length - 1)
        iova = <u64>base // PAGE_BYTES * PAGE_BYTES
        if (last - iova) // PAGE_BYTES >= count:
            found.update(page for page in known if page[1] == access and iova <= page[0] <= last)
            continue
        while True:
            page = (iova, access)
            if page in known:
                found.add(page)
            if last - iova < PAGE_BYTES:
                break
            iova += PAGE_BYTES
    return found
