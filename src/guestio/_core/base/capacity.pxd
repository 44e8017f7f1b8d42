"""What the structures of the core hold, and assertions; see ``capacity.h`` for what they are."""

cdef extern from "capacity.h" nogil:
    enum:
        TREE_LINE
        TREE_FANOUT
        TREE_MERGE_BELOW
        TREE_MERGE_UP_TO
        TREE_APPEND_UP_TO
        TREE_MAX_HEIGHT
        TREE_GROUP
        SLAB_SPARES_KEPT
        PIECES_INSIDE
        VECTOR_INSIDE
        LEASES_FIRST
        MISSES_FIRST
        EVICTION_FIRST
        PINS_FIRST
        EVICTION_KEPT
        EVICTION_LEASES
        EVICTION_STALE
        HOLD_GIL_UP_TO
        IOV_BATCH
        HARVEST_WORDS
        SPOTS_IN_CHUNK
        MISS_BITS
        MISS_SLOTS
        MISS_BATCH
        READ_AHEAD
        RING_LOOK_WORK
        RING_LOOKS
        RING_PUBLISH_EACH
        LOOP_EVENTS
        LOOP_TURNS
        LOOP_REQUESTS
        LOOP_QUEUE_TURNS
        TRACE_RECORDS
        LOAD_PAYLOAD
        LOAD_READ_AHEAD
        LOAD_ANSWERS
        LOAD_EVENTS
        LOAD_SPINS
        LOAD_SPINS_TRANSLATING
        LOAD_TURNS

    void GUESTIO_ASSERT(bint condition)
