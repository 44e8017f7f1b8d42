"""What a vfio-user client has mapped for DMA: addresses that lead to places in its files.

Each file has a window of 2**48 bytes of a space of our own, whose number is the file's; window 0 is
of memory without a file. Mappings come and go with every request of a driver behind an IOMMU; files
stay. So what concerns files that are known is done here, and the rest is left to Python, which
judges new files and waits for accesses.
"""

from libc.stdint cimport uint16_t
from libc.stdlib cimport calloc, free

from guestio._core.base.capacity cimport GUESTIO_ASSERT
from guestio._core.base.checks cimport Span, as_access, as_address, as_size, as_span, u64
from guestio._core.iommu.intervals cimport IntervalMap
from guestio._core.iommu.pieces cimport Pieces, close_pieces, open_pieces
from guestio._core.iommu.tree cimport Cursor, Entry, ceiling_of, floor_of, step
from guestio._core.memory.leases cimport (
    Lease, Leases, pthread_mutex_lock, pthread_mutex_unlock,
)
from guestio._core.trace.tracepoints cimport (
    TRANSLATIONS, TraceRecord, WHAT_DMA_MAP, WHAT_DMA_UNMAP, trace, trace_record, tracing,
)
from guestio._core.vfio_user.wire cimport (
    DMA_UNMAP_AT_ONCE, O_RDWR, O_WRONLY, PAGE, describe_memory,
)

from guestio.addr import Permissions

cdef enum:
    WINDOW = 48
    WRITE = 2


cdef class DmaTable:
    """The mappings of a client, and its files.

    Args:
        map: Where addresses lead to. It does not merge.
        files: Files at most.
        most: Mappings at most.

    Attributes:
        map: That map.

    For the thread of the event loop, with the GIL; lookups in the map may come from any.
    """

    def __cinit__(self, IntervalMap map not None, files, most):
        self.map = map
        self.file_count = as_size(files, "files") + 1
        self.most = as_size(most, "most")
        self.files = <File *>calloc(self.file_count, sizeof(File))
        if self.files is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.files)

    cdef size_t find(self, u64 device, u64 inode, bint writable) noexcept:
        """The number of a file that is known, or 0. O(files). Plain C: it cannot raise."""
        cdef size_t number = self.latest
        cdef File *file = &self.files[number]
        if file.size and file.inode == inode and file.device == device and (
            file.writable == writable
        ):
            return number
        for number in range(1, self.file_count):
            file = &self.files[number]
            if file.size and file.inode == inode and file.device == device and (
                file.writable == writable
            ):
                self.latest = number
                return number
        return 0

    cdef bint map_known(self, u64 address, u64 size, u64 perm, int fd, u64 offset) except -1:
        """Map a range of a file that is known; False, and nothing changed, if there is more to it.

        What is refused here for a reason is refused by Python, which knows how to say so.
        """
        cdef u64 device = 0, inode = 0, length = 0
        cdef int mode = 0
        cdef size_t number
        cdef File *file
        cdef Span span
        cdef Cursor at
        if not size or (address | size | offset) % PAGE or not 0 < perm <= 3:
            return False
        if size - 1 > <u64>-1 - address or self.map.at.tree.entries >= self.most:
            return False
        # The descriptor is the client's choice, each time anew: nothing is known of it before.
        if describe_memory(fd, &device, &inode, &length, &mode) < 0 or mode == O_WRONLY:
            return False
        if perm & WRITE and mode != O_RDWR:
            return False
        number = self.find(device, inode, mode == O_RDWR)
        if not number:
            return False
        file = &self.files[number]
        if offset > file.size or size > file.size - offset:
            return False
        if offset > length or size > length - offset:
            return False
        span = Span(address, address + (size - 1), False)
        self.map.begin_change(3)
        at = ceiling_of(&self.map.at.tree, span.first)
        if at.leaf is not NULL and at.leaf.head.key[at.index] <= span.last:
            self.map.refuse_change()
            return False
        self.map.overwrite_span(span, (<u64>number << WINDOW) + offset, perm)
        self.map.end_change()
        file.mappings += 1
        if tracing & TRANSLATIONS:
            self.trace_map(address, size, (<u64>number << WINDOW) + offset, perm)
        return True

    # Plain C: they cannot raise.
    cdef void trace_map(self, u64 address, u64 size, u64 target, u64 perm) noexcept:
        cdef TraceRecord record = trace_record(WHAT_DMA_MAP, self.map.origin)
        record.address, record.length, record.detail = address, size, target
        record.access = <uint16_t>perm
        trace(&record)

    cdef void trace_unmap(self, u64 first, u64 last, u64 count) noexcept:
        cdef TraceRecord record = trace_record(WHAT_DMA_UNMAP, self.map.origin)
        record.address, record.length, record.detail = first, last - first + 1, count
        trace(&record)

    cdef bint unmap_idle(self, u64 address, u64 size) except -1:
        """Unmap a range that no access uses; False if there is more to it: nothing changed then,
        or the first of very many mappings are gone and the rest is to be removed step by step.
        """
        cdef u64 last = address + (size - 1), reached = 0
        cdef Leases leases = self.map.leases
        if not size or (address | size) % PAGE or size - 1 > <u64>-1 - address:
            return False
        self.map.begin_change(2)
        # The GIL is held from here to the end, and needed for a lease.
        if self.cuts(address, last) or (leases.held and leases.used(address, last)):
            self.map.refuse_change()
            return False
        self.forget_span(address, last, DMA_UNMAP_AT_ONCE, &reached)
        return reached == last

    cdef bint cuts(self, u64 first, u64 last) noexcept:
        """Whether a mapping reaches out of a range. O(log n). Plain C: it cannot raise."""
        cdef Cursor at = ceiling_of(&self.map.at.tree, first)
        if at.leaf is not NULL and at.leaf.head.key[at.index] < first:
            return True
        at = floor_of(&self.map.at.tree, last)
        return at.leaf is not NULL and at.leaf.head.key[at.index] >= first and (
            at.leaf.entry[at.index].last > last
        )

    cdef u64 forget_span(self, u64 first, u64 last, u64 most, u64 *reached) noexcept:
        """Remove up to ``most`` mappings of a range that cuts none, and unlock the map; how many.

        It cannot raise: all is plain C on memory that was reserved when the map was locked.

        Args:
            reached: The last address up to which nothing is mapped now.

        O((k + 1) log n) for k mappings removed.
        """
        cdef u64 count = 0, target, end = last
        cdef Entry *entry
        cdef Cursor at = ceiling_of(&self.map.at.tree, first)
        while at.leaf is not NULL and at.leaf.head.key[at.index] <= last:
            if count == most:
                end = at.leaf.head.key[at.index] - 1
                break
            entry = &at.leaf.entry[at.index]
            target = at.leaf.head.key[at.index] + entry.delta
            GUESTIO_ASSERT(target >> WINDOW < self.file_count)
            self.files[target >> WINDOW].mappings -= 1
            count += 1
            step(&at)
        reached[0] = end
        self.removed += count
        if count:
            self.map.cut_span(Span(first, end, False))
            self.map.end_change()
            if tracing & TRANSLATIONS:
                self.trace_unmap(first, end, count)
        else:
            self.map.refuse_change()
        return count

    def check_cut(self, address, size):
        """Whether an unmap of a range would cut a mapping. O(log n)."""
        cdef Span span
        as_span(address, size, &span, False)
        return self.cuts(span.first, span.last)

    def forget(self, address, size, most):
        """Remove up to ``most`` mappings of a range that cuts none.

        Returns:
            ``(count, end, used)``: how many were removed; the address up to which nothing is mapped
            now, which is the range's end once all are removed; and those of the removed mappings
            that accesses under way may lead through, as ``(address, size, target, permissions)``,
            some perhaps twice.

        Raises:
            ValueError: A mapping would be cut; nothing changed.

        Cost: O((k + 1) log n) for k mappings removed, and O(leases).
        """
        cdef Span span
        cdef Pieces found
        cdef u64 reached = 0, count
        cdef u64 at_once = as_address(most, "most")
        cdef bint whole = False
        cdef size_t i
        as_span(address, size, &span, False)
        open_pieces(&found)
        try:
            self.map.begin_change(2)
            # From here to the end of the change no lease begins: the GIL is held.
            try:
                whole = not self.cuts(span.first, span.last)
                if whole:
                    self.collect_used(span, &found)
            except BaseException:
                self.map.refuse_change()
                raise
            if not whole:
                self.map.refuse_change()
                raise ValueError(f"{address:#x}+{size:#x} would cut a mapping")
            count = self.forget_span(span.first, span.last, at_once, &reached)
            used = [
                (
                    found.item[i].first, found.item[i].last - found.item[i].first + 1,
                    found.item[i].target, Permissions(found.item[i].perm),
                )
                for i in range(found.count) if found.item[i].last <= reached
            ]
        finally:
            close_pieces(&found)
        return count, int(reached) + 1, used

    cdef int collect_used(self, Span span, Pieces *found) except -1:
        """The mappings of a span that leases overlap. No Python object is made."""
        cdef Leases leases = self.map.leases
        cdef Lease *lease
        cdef Span part
        cdef int i
        part.empty = False
        pthread_mutex_lock(&leases.mutex)
        try:
            for i in range(leases.slots if leases.held else 0):
                lease = &leases.slot[i]
                # Those that were abandoned have a serial number that none is given.
                if lease.serial and lease.serial <= leases.serial and (
                    lease.first <= span.last and span.first <= lease.last
                ):
                    part.first = max(lease.first, span.first)
                    part.last = min(lease.last, span.last)
                    self.map.collect(part, found)
        finally:
            pthread_mutex_unlock(&leases.mutex)
        return 0

    def add(self, address, size, target, perm):
        """Map a range that leads to a target, in whichever window.

        Returns:
            False if something overlaps; nothing changed then.

        Cost: O(log n).
        """
        cdef u64 number = as_address(target, "target") >> WINDOW
        as_access(perm, "perm")
        if number >= self.file_count or (number and not self.files[number].size):
            raise ValueError(f"target {target:#x} is in no window of a file that is known")
        if not self.map.add(address, size, target, perm):
            return False
        self.files[number].mappings += 1
        if tracing & TRANSLATIONS:
            self.trace_map(address, size, target, perm)
        return True

    def know(self, number, device, inode, writable, size):
        """Take note of a file that is mapped here, or that it is mapped with another size.

        Args:
            number: Its window's, from 1.
            device, inode: Which file it is.
            writable: Whether it may be written.
            size: Bytes that are mapped.
        """
        cdef size_t which = as_size(number, "number")
        if not 0 < which < self.file_count:
            raise ValueError(f"number {number} is not in 1..{self.file_count - 1}")
        cdef File *file = &self.files[which]
        file.device, file.inode = as_address(device, "device"), as_address(inode, "inode")
        file.writable, file.size = bool(writable), as_address(size, "size")

    def forget_file(self, number):
        """Free the number of a file that no mapping leads to."""
        cdef size_t which = as_size(number, "number")
        if not 0 < which < self.file_count or self.files[which].mappings:
            raise ValueError(f"file {number} is not known, or mapped")
        self.files[which].size = 0

    def file(self, device, inode, writable):
        """The number of a file that is known, or 0. Cost: O(files)."""
        return self.find(
            as_address(device, "device"), as_address(inode, "inode"), bool(writable)
        )

    def mappings(self, number):
        """How many mappings lead to a file."""
        cdef size_t which = as_size(number, "number")
        if which >= self.file_count:
            raise ValueError(f"number {number} is not below {self.file_count}")
        return self.files[which].mappings
