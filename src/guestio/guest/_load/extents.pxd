"""Bytes that lie in a row for a driver, on pages from anywhere, and what is written into them.

Only for memory of our own guest, which cannot be taken away: accesses are plain.
"""

from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from guestio._core.base.checks cimport u8, u32, u64


cdef enum:
    PAGE = 4096
    PAGE_SHIFT = 12
    SECTOR = 512
    POISON = 0x5A
    GUARD = 64            # bytes around what the device may write that are looked at


cdef struct Extent:
    u64 *device           # address of each page for the device; not used where each use is mapped
    u64 *host             # and in this process
    u32 pages
    u32 base              # where in the first page the extent begins


cdef inline u64 mix(u64 x) noexcept nogil:
    # The finaliser of SplitMix64.
    x = (x ^ x >> 30) * <u64>0xBF58476D1CE4E5B9
    x = (x ^ x >> 27) * <u64>0x94D049BB133111EB
    return x ^ x >> 31


cdef inline void contents(u64 sector, u64 version, u64 *words) noexcept nogil:
    """What a version of a sector holds: its name, then 496 bytes that follow from it."""
    cdef u64 state = mix(sector ^ mix(version))
    cdef u32 i
    words[0], words[1] = sector, version
    for i in range(2, 64):
        state += <u64>0x9E3779B97F4A7C15
        words[i] = mix(state)


cdef inline void *page_at(const u64 *pages, u32 offset) noexcept nogil:
    return <void *>(pages[offset >> PAGE_SHIFT] + (offset & (PAGE - 1)))


cdef inline void *extent_at(const Extent *extent, u32 offset) noexcept nogil:
    return page_at(extent.host, extent.base + offset)


cdef inline void extent_write(Extent *extent, u32 at, const void *data, u32 size) noexcept nogil:
    cdef const u8 *source = <const u8 *>data
    cdef u32 step
    while size:
        step = min(PAGE - ((extent.base + at) & (PAGE - 1)), size)
        memcpy(extent_at(extent, at), source, step)
        source += step
        at += step
        size -= step


cdef inline void extent_read(Extent *extent, u32 at, void *data, u32 size) noexcept nogil:
    cdef u8 *target = <u8 *>data
    cdef u32 step
    while size:
        step = min(PAGE - ((extent.base + at) & (PAGE - 1)), size)
        memcpy(target, extent_at(extent, at), step)
        target += step
        at += step
        size -= step


cdef inline void extent_poison(Extent *extent) noexcept nogil:
    cdef u32 i
    for i in range(extent.pages):
        memset(<void *>extent.host[i], POISON, PAGE)


cdef inline int64_t extent_stray(Extent *extent, u32 at, u32 size) noexcept nogil:
    """Where around a part of a poisoned extent something was written; -1 if nowhere."""
    cdef u32 end = extent.pages * PAGE - extent.base, i
    for i in range(at - GUARD if at > GUARD else 0, at):
        if (<const u8 *>extent_at(extent, i))[0] != POISON:
            return i
    for i in range(at + size, min(at + size + GUARD, end)):
        if (<const u8 *>extent_at(extent, i))[0] != POISON:
            return i
    return -1


cdef inline void extent_fill(Extent *extent, u32 size, u64 seed) noexcept nogil:
    cdef u64 words[64]
    cdef u32 at = 0
    while at < size:
        contents(at, seed, words)
        extent_write(extent, at, words, min(SECTOR, size - at))
        at += SECTOR


cdef inline u32 extent_runs(const Extent *extent) noexcept nogil:
    """Stretches of an extent that are contiguous for the device."""
    cdef u32 i, runs = 1
    for i in range(1, extent.pages):
        runs += extent.device[i] != extent.device[i - 1] + PAGE
    return runs
