"""Memory for the nodes of a tree: slots of one size, cut from large blocks.

A random access to a large tree misses the cache; with pages of 4 KiB it misses the TLB as well, and
a new node costs a page fault. So a tree that outgrows the TLB lives in huge pages, if the system
has them. Slots that were never used cost no memory, and a block without a used slot goes back to
the system.

Nothing here is safe against concurrent use.
"""

cdef extern from * nogil:
    """
    #ifndef GUESTIO_SLABS
    #define GUESTIO_SLABS
    #include <stdint.h>
    #include <sys/mman.h>
    #include "capacity.h"

    enum { SLAB_HEAD = 64 };

    /* At the start of its block. Slots from `fresh` on were never used. */
    typedef struct Slab {
        struct Slab *prev;
        struct Slab *next;
        void *returned;
        uint32_t used;
        uint32_t fresh;
        uint32_t slots;
        uint32_t bytes;
    } Slab;

    /* Zeroed, it is empty. `room` counts the free slots, `bytes` all blocks. */
    typedef struct Slabs {
        Slab *roomy;
        Slab *full;
        size_t room;
        size_t bytes;
    } Slabs;

    static void link_slab(Slab **list, Slab *slab)
    {
        slab->prev = NULL;
        slab->next = *list;
        if (*list)
            (*list)->prev = slab;
        *list = slab;
    }

    static void unlink_slab(Slab **list, Slab *slab)
    {
        if (slab->prev)
            slab->prev->next = slab->next;
        else
            *list = slab->next;
        if (slab->next)
            slab->next->prev = slab->prev;
    }

    #ifdef GUESTIO_HEAP_SLABS
    static Slab *map_slab(const Slabs *slabs, size_t slot_bytes)
    {
        (void)slabs;
        Slab *slab = calloc(1, SLAB_HEAD + slot_bytes);
        if (slab)
            slab->bytes = (uint32_t)(SLAB_HEAD + slot_bytes);
        return slab;
    }
    static void unmap_slab(Slab *slab) { free(slab); }
    #else
    /* Memory of a size and alignment, of huge pages if possible; NULL if there is none. */
    static void *map_aligned(size_t bytes)
    {
        char *start = mmap(NULL, 2 * bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (start == MAP_FAILED)
            return NULL;
        size_t before = -(uintptr_t)start & (bytes - 1);
        if (before)
            munmap(start, before);
        munmap(start + before + bytes, bytes - before);
    #ifdef MADV_HUGEPAGE
        madvise(start + before, bytes, MADV_HUGEPAGE);
    #endif
        return start + before;
    }

    static Slab *map_slab(const Slabs *slabs, size_t slot_bytes)
    {
        (void)slot_bytes;
        int huge = slabs->bytes >= SLAB_HUGE_ABOVE;
        Slab *slab = huge ? map_aligned(SLAB_HUGE)
                          : mmap(NULL, SLAB_SMALL, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (!slab || slab == MAP_FAILED)
            return NULL;
        slab->bytes = huge ? SLAB_HUGE : SLAB_SMALL;
        return slab;
    }
    static void unmap_slab(Slab *slab) { munmap(slab, slab->bytes); }
    #endif

    /* Make room for more slots; -1 if there is no memory. */
    static int add_slab(Slabs *slabs, size_t slot_bytes)
    {
        Slab *slab = map_slab(slabs, slot_bytes);
        if (!slab)
            return -1;
        slab->slots = (uint32_t)((slab->bytes - SLAB_HEAD) / slot_bytes);
        slabs->room += slab->slots;
        slabs->bytes += slab->bytes;
        link_slab(&slabs->roomy, slab);
        return 0;
    }

    /* Needs room. The slot is not cleared. */
    static void *take_slot(Slabs *slabs, size_t slot_bytes, unsigned *number)
    {
        Slab *slab = slabs->roomy;
        GUESTIO_ASSERT(slabs->room && slab->used < slab->slots);
        void *slot = slab->returned;
        if (slot)
            slab->returned = *(void **)slot;
        else
            slot = (char *)slab + SLAB_HEAD + slab->fresh++ * slot_bytes;
        slabs->room--;
        if (++slab->used == slab->slots) {
            unlink_slab(&slabs->roomy, slab);
            link_slab(&slabs->full, slab);
        }
        *number = (unsigned)(((char *)slot - (char *)slab - SLAB_HEAD) / slot_bytes);
        return slot;
    }

    /* A block that became empty is kept if there were less than `keep` free slots without it. */
    static void return_slot(
        Slabs *slabs, size_t slot_bytes, void *slot, unsigned number, size_t keep)
    {
        Slab *home = (Slab *)((char *)slot - number * slot_bytes - SLAB_HEAD);
        GUESTIO_ASSERT(home->used && number < home->slots);
        if (home->used == home->slots) {
            unlink_slab(&slabs->full, home);
            link_slab(&slabs->roomy, home);
        }
        *(void **)slot = home->returned;
        home->returned = slot;
        slabs->room++;
        if (!--home->used && slabs->room >= keep + home->slots) {
            unlink_slab(&slabs->roomy, home);
            slabs->room -= home->slots;
            slabs->bytes -= home->bytes;
            unmap_slab(home);
        }
    }

    static void drop_slabs(Slabs *slabs)
    {
        Slab *lists[] = {slabs->roomy, slabs->full};
        for (int i = 0; i < 2; i++) {
            for (Slab *slab = lists[i]; slab;) {
                Slab *next = slab->next;
                unmap_slab(slab);
                slab = next;
            }
        }
    }
    #endif
    """
    ctypedef struct Slab:
        Slab *next
        unsigned used
        unsigned slots

    ctypedef struct Slabs:
        Slab *roomy
        Slab *full
        size_t room
        size_t bytes

    int add_slab(Slabs *slabs, size_t slot_bytes)
    void *take_slot(Slabs *slabs, size_t slot_bytes, unsigned *number)
    void return_slot(
        Slabs *slabs, size_t slot_bytes, void *slot, unsigned number, size_t keep
    )
    void drop_slabs(Slabs *slabs)
