"""C view of a controller's queues: where a doorbell that was written arrives."""

from guestio._core.base.checks cimport u8, u32, u64
from guestio._core.iommu.address_space cimport AddressSpace
from guestio._core.iommu.misses cimport Misses
from guestio._core.memory.image cimport ImageFile
from guestio._core.memory.vector cimport IoVector
from guestio._core.pci.doorbell cimport Doorbell

cdef enum:
    MAX_QUEUES = 64          # of each kind, that of the admin commands included: bits of a word
    ENTRY = 64               # bytes of a submission queue entry
    COMPLETION = 16          # bytes of a completion queue entry
    PAGE = 4096              # memory page of the controller (CC.MPS is 0)
    LIST = 512               # entries of a page of a PRP list


cdef struct Submission:
    bint live
    u64 base
    u32 size                 # entries
    u32 head
    u32 tail
    u32 completions          # its completion queue
    u32 outstanding          # commands that were fetched and are not completed


cdef struct Completion:
    bint live
    u64 base
    u32 size
    u32 head
    u32 tail
    u32 phase
    u32 outstanding          # entries that are kept free for commands that were fetched
    u32 users                # submission queues that complete here
    u64 blocked              # bits of those of them that wait for a free entry
    int vector               # -1: no interrupts


cdef class NvmeQueues(Doorbell):
    cdef Submission sq[MAX_QUEUES]
    cdef Completion cq[MAX_QUEUES]
    cdef u8 entries[PAGE]        # submission entries, as they were fetched
    cdef u64 listed[LIST]          # a page of a PRP list, or of SGL descriptors
    cdef object memory
    cdef object command
    cdef object interrupt
    cdef int call[MAX_QUEUES]    # eventfds of the vectors that are signalled here; -1: none
    cdef object fault
    cdef list faults             # wrong doorbells, to be reported
    cdef list held               # completions that wait for bus mastering: queue, address, entry
    cdef list namespaces
    cdef u32 most_queues
    cdef u64 max_transfer
    cdef u64 turn_bytes
    cdef u64 turn_ns
    cdef u64 ready               # bits of submission queues that may have commands
    cdef u64 due                 # bits of completion queues whose interrupt is due
    cdef u32 next_queue
    cdef bint running
    cdef bint broken
    cdef u64 shadow              # address of the shadow doorbells; 0: none
    cdef u64 events              # address of the event indices
    cdef u64 generation          # of the queues: changes with each reset
    cdef u64 moved               # bytes in this turn
    cdef u64 run_start           # neighboring pieces of memory that are translated together
    cdef u64 run_length
    cdef u32 interrupt_mask
    cdef IoVector scratch        # a part of a queue, or a list
    cdef IoVector data
    cdef Misses failed
    cdef public bint fast        # whether reads and writes are served here
    cdef public bint write_through
    cdef public u32 origin       # the server's number in records of tracepoints
    cdef dict traced             # what is known of commands whose taking was traced, by queue and id
    cdef readonly u64 commands
    cdef readonly u64 served
    cdef readonly u64 reads
    cdef readonly u64 writes
    cdef readonly u64 bytes_read
    cdef readonly u64 bytes_written

    cdef int note(self, u64 offset, u64 value) except -1
    cdef int fail(self, int kind, str what) except -1
    cdef int report_faults(self) except -1
    cdef int serve_queue(self, u32 number) except -1
    cdef bint serve_entry(self, const u8 *entry) except -1
    cdef bint gather(self, AddressSpace space, const u8 *entry, u64 length, int access) except -1
    cdef bint gather_prps(
        self, AddressSpace space, u64 first, u64 second, u64 length, int access
    ) except -1
    cdef bint gather_sgl(
        self, AddressSpace space, const u8 *descriptor, u64 length, int access
    ) except -1
    cdef bint append(self, AddressSpace space, u64 addr, u64 length, int access) except -1
    cdef bint flush_run(self, AddressSpace space, int access) except -1
    cdef bint fetch(self, u64 addr, u8 *buffer, u64 length, bint may_ask) except -1
    cdef bint store(self, u64 addr, const u8 *buffer, u64 length, bint in_two) except -1
    cdef int put(self, u32 target, u64 addr, const u8 *entry) except -1
    cdef int trace_taken(self, u32 number, const u8 *entry, u32 position, u64 found) except -1
    cdef int trace_interrupt(self, u32 number) except -1
    cdef int trace_completed(self, u32 number, u32 cid, u32 status, bint traced) except -1
    cdef int post(self, u32 number, u32 cid, u32 status, u32 result) except -1
    cdef int signal(self) except -1
    cdef u32 room(self, u32 number) noexcept
    cdef int move_head(self, u32 number, u32 value) except -1
    cdef int read_shadow_tail(self, u32 number) except -1
    cdef int read_shadow_head(self, u32 number) except -1
    cdef int announce(self, u32 index, u32 value) except -1
    cdef u32 check_number(self, number) except? 0xFFFFFFFF
    cdef int check_range(self, u64 base, u32 size, u64 each) except -1
    cdef int break_down(self, str what) except -1
