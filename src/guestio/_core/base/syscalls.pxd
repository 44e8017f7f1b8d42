"""C view of descriptors that a peer shares."""

cdef void notify(int fd) noexcept nogil
