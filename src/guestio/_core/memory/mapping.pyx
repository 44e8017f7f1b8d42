"""Host memory that stays mapped as long as anything refers to it.

The file behind a mapping may belong to another process, which can truncate it at any time; touching
such a page raises SIGBUS. The handler installed here puts an empty private page in its place and
records where the file was found to end, so that the access that met it fails with an error
instead of killing the process. Memory beyond that point stays refused: what the file held is gone.
"""

from cpython.buffer cimport (
    PyBUF_CONTIG_RO, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from libc.errno cimport errno
from libc.string cimport strerror

from guestio._core.base.checks cimport as_size, u8

from guestio.errors import BackingError

cdef extern from * nogil:
    """
    #include <signal.h>
    #include <stdlib.h>
    #include <sys/mman.h>
    #include <sys/vfs.h>
    #include <unistd.h>

    #include "capacity.h"

    enum { HUGETLBFS = 0x958458f6 };

    /* A list that only grows, because the handler walks it without a lock. */
    typedef struct Chunk {
        Spot spot[SPOTS_IN_CHUNK];
        struct Chunk *next;
    } Chunk;

    static Chunk first_chunk;
    static uint64_t *hole_count;
    static struct sigaction previous_action;

    static void pass_on(int number, siginfo_t *info, void *context)
    {
        if (info->si_code > 0 && (previous_action.sa_flags & SA_SIGINFO)) {
            previous_action.sa_sigaction(number, info, context);
        } else if (info->si_code > 0 && previous_action.sa_handler != SIG_DFL
                   && previous_action.sa_handler != SIG_IGN) {
            previous_action.sa_handler(number);
        } else {
            signal(SIGBUS, SIG_DFL);
            raise(SIGBUS);
        }
    }

    static void on_sigbus(int number, siginfo_t *info, void *context)
    {
        uintptr_t at = (uintptr_t)info->si_addr;
        if (info->si_code == BUS_ADRERR) {
            for (Chunk *c = &first_chunk; c; c = __atomic_load_n(&c->next, __ATOMIC_ACQUIRE)) {
                for (int i = 0; i < SPOTS_IN_CHUNK; i++) {
                    Spot *s = &c->spot[i];
                    uintptr_t start = __atomic_load_n(&s->start, __ATOMIC_ACQUIRE);
                    if (!start || at < start || at >= s->end)
                        continue;
                    uintptr_t page = at & ~(s->page - 1);
                    /* The mark comes first: a thread that reads the empty page looks for the mark
                       afterwards, and must find it. */
                    uintptr_t low = __atomic_load_n(&s->vanished, __ATOMIC_RELAXED);
                    while (page < low && !__atomic_compare_exchange_n(
                               &s->vanished, &low, page, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
                        ;
                    __atomic_fetch_add(hole_count, 1, __ATOMIC_RELEASE);
                    if (mmap((void *)page, s->page, s->prot,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
                        break;
                    return;
                }
            }
        }
        pass_on(number, info, context);
    }

    /* The program may have installed a handler of its own since the last time. */
    static int install_handler(void)
    {
        struct sigaction action = {0}, current;
        if (sigaction(SIGBUS, NULL, &current))
            return -1;
        if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_sigbus)
            return 0;
        previous_action = current;
        action.sa_sigaction = on_sigbus;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigemptyset(&action.sa_mask);
        return sigaction(SIGBUS, &action, NULL);
    }

    static Spot *take_spot(uintptr_t start, size_t size, size_t page, int prot)
    {
        Chunk *c = &first_chunk;
        for (;;) {
            for (int i = 0; i < SPOTS_IN_CHUNK; i++) {
                Spot *s = &c->spot[i];
                if (s->start)
                    continue;
                s->end = start + size;
                s->vanished = UINTPTR_MAX;
                s->page = page;
                s->prot = prot;
                __atomic_store_n(&s->start, start, __ATOMIC_RELEASE);
                return s;
            }
            if (!c->next) {
                Chunk *fresh = calloc(1, sizeof *fresh);
                if (!fresh)
                    return NULL;
                __atomic_store_n(&c->next, fresh, __ATOMIC_RELEASE);
            }
            c = c->next;
        }
    }

    static void give_spot(Spot *s) { __atomic_store_n(&s->start, 0, __ATOMIC_RELEASE); }

    static size_t page_size_of(int fd)
    {
        struct statfs fs;
        if (fd >= 0 && fstatfs(fd, &fs) == 0 && fs.f_type == HUGETLBFS)
            return (size_t)fs.f_bsize;
        return (size_t)sysconf(_SC_PAGESIZE);
    }
    """
    int install_handler()
    u64 *hole_count
    Spot *take_spot(size_t start, size_t size, size_t page, int prot)
    void give_spot(Spot *)
    size_t page_size_of(int fd)

cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_NONE
        PROT_READ
        PROT_WRITE
        MAP_SHARED
        MAP_PRIVATE
        MAP_ANONYMOUS
        MAP_NORESERVE
        MAP_FIXED
    void *MAP_FAILED
    void *mmap(void *, size_t, int, int, int, long)
    int munmap(void *, size_t)

hole_count = &holes


cdef object failure(str what):
    cdef int number = errno
    return BackingError(f"{what}: {strerror(number).decode()}")


cdef class HostMapping:
    """A range of this process's memory, mapped from a file or anonymous.

    Args:
        fd: What to map, or -1 for anonymous memory. It is not kept.
        offset: Where in the file, in bytes; a multiple of the page size.
        size: Bytes to map; greater than 0.
        writable: Whether the memory may be written.
        guard: Keep an inaccessible page on either side.
        over: A contiguous buffer of this process to use instead; nothing is mapped then.

    Raises:
        BackingError: The memory cannot be mapped.

    The memory is unmapped when the object is closed or goes away; a buffer taken from it keeps it
    alive. Closing is refused while one exists.
    """

    def __cinit__(self, int fd=-1, offset=0, size=0, *, bint writable=True, bint guard=False,
                  over=None):
        if over is not None:
            self.adopt(over)
        else:
            self.map(fd, offset, size, writable, guard)

    cdef int adopt(self, object buffer) except -1:
        """Use memory that belongs to a buffer, which stays exported as long as this is open."""
        cdef Py_buffer raw
        view = memoryview(buffer).cast("B")
        if not view.nbytes:
            raise ValueError("size must be greater than 0")
        PyObject_GetBuffer(view, &raw, PyBUF_CONTIG_RO)
        self.lender, self.ptr, self.size = view, <u8 *>raw.buf, raw.len
        self.writable, self.page_size = not raw.readonly, page_size_of(-1)
        PyBuffer_Release(&raw)
        return 0

    cdef int map(self, int fd, object offset, object size, bint writable, bint guard) except -1:
        cdef size_t length = as_size(size, "size")
        cdef long start = <long>as_size(offset, "offset")
        cdef int prot = PROT_READ | (PROT_WRITE if writable else 0)
        cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS if fd < 0 else MAP_SHARED
        cdef size_t page = page_size_of(fd)
        cdef size_t margin = page if guard else 0
        cdef size_t inner, whole
        cdef void *at
        if not length:
            raise ValueError("size must be greater than 0")
        if start % <long>page:
            raise ValueError(f"offset {start:#x} is not a multiple of the page size {page:#x}")
        if length > (<size_t>1 << 62):
            raise BackingError(f"cannot map {length:#x} bytes: more than any process can hold")
        if page == page_size_of(-1):
            # Huge pages that are not reserved now could not be had when they are touched.
            flags |= MAP_NORESERVE
        if install_handler():
            raise failure("cannot install a handler for SIGBUS")
        inner = (length + page - 1) // page * page
        # Room to begin at a multiple of the page size, which the kernel grants small pages only.
        whole = inner + (3 if page > page_size_of(-1) else 2) * margin
        at = mmap(NULL, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) \
            if guard else NULL
        if guard and at == MAP_FAILED:
            raise failure(f"cannot reserve {whole:#x} bytes")
        self.reserved, self.reserved_size = <u8 *>at, whole
        at = mmap(
            <void *>((<size_t>at + 2 * margin - 1) // page * page) if guard else NULL, length, prot,
            flags | (MAP_FIXED if guard else 0), fd, start,
        )
        if at == MAP_FAILED:
            error = failure(f"cannot map {length:#x} bytes of fd {fd} at offset {start:#x}")
            if guard:
                munmap(self.reserved, whole)
            self.reserved = NULL
            raise error
        if not guard:
            self.reserved = <u8 *>at
        self.ptr = <u8 *>at
        self.size, self.writable, self.page_size = length, writable, page
        self.spot = take_spot(<size_t>at, inner, page, prot)
        if self.spot is NULL:
            munmap(self.reserved, whole)
            self.reserved = self.ptr = NULL
            raise MemoryError
        return 0

    def __dealloc__(self):
        self.unmap()

    cdef void unmap(self) noexcept:
        if self.reserved is not NULL:
            give_spot(self.spot)
            munmap(self.reserved, self.reserved_size)
            self.reserved = self.ptr = NULL
        elif self.lender is not None:
            # What lent the memory may run code of its own when it goes, and find this closed.
            lender, self.lender, self.ptr = self.lender, None, NULL

    def close(self):
        """Unmap now. Calling it again does nothing.

        Raises:
            BufferError: The memory is in use; the message says by what.
        """
        cdef list users = []
        if self.tables:
            users.append(
                f"{self.tables} region tables or queues (a memory with this region, or a slice, "
                "vector or ring made from one)"
            )
        if self.exports:
            users.append(f"{self.exports} buffers (memoryview, numpy array or bytes-like)")
        if users:
            raise BufferError(
                f"cannot unmap {self.size:#x} bytes at {<size_t>self.ptr:#x}: still in use by "
                f"{' and '.join(users)}; drop or release them first"
            )
        self.unmap()

    def cut_off(self, offset, size):
        """Put private, zeroed pages in place of a range.

        Whatever still has its address reaches the file no more: it reads zeroes, and what it
        writes goes nowhere. A system call that has the pages already is not affected.

        Args:
            offset: Where the range begins, in bytes from the start of the mapping.
            size: Its bytes. Every page that it touches is replaced.

        Raises:
            ValueError: The range is not in a mapped file, or this is closed.
            BackingError: The kernel refuses.
        """
        cdef size_t start = as_size(offset, "offset"), length = as_size(size, "size")
        cdef size_t first, last
        if self.ptr is NULL or self.spot is NULL:
            raise ValueError("this memory is not mapped here")
        if start > self.size or length > self.size - start:
            raise ValueError(f"{start:#x}+{length:#x} is not within {self.size:#x} bytes")
        if not length:
            return
        first = (<size_t>self.ptr + start) // self.page_size * self.page_size
        last = (<size_t>self.ptr + start + length + self.page_size - 1) // self.page_size
        if mmap(
            <void *>first, last * self.page_size - first, self.spot.prot,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0,
        ) == MAP_FAILED:
            raise failure(f"cannot replace {length:#x} bytes at {first:#x}")

    @property
    def closed(self):
        """Whether the memory has been unmapped."""
        return self.ptr is NULL

    @property
    def address(self):
        """Where the memory is in this process.

        Raises:
            ValueError: It is closed.
        """
        if self.ptr is NULL:
            raise ValueError("this memory is closed")
        return <size_t>self.ptr

    @property
    def vanished(self):
        """Offset from which on the file was found to be truncated, or None."""
        if self.ptr is NULL or self.spot is NULL or self.spot.vanished == <size_t>-1:
            return None
        return self.spot.vanished - <size_t>self.ptr

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self.ptr is NULL:
            raise BufferError("this memory is closed")
        PyBuffer_FillInfo(buffer, self, self.ptr, self.size, not self.writable, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.exports -= 1
