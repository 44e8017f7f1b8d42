"""C view of what is recorded of a request's bytes. Call these only if CONTENTS are wanted."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from guestio._core.memory.vector cimport IoVector

cdef void trace_given(
    IoVector memory, uint16_t origin, uint16_t queue, uint32_t head
) noexcept
cdef void trace_answer(
    IoVector memory, uint64_t written, uint16_t origin, uint16_t queue, uint32_t head
) noexcept
