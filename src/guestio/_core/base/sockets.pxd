"""Sockets, as system calls that never wait."""

cdef extern from "<sys/socket.h>" nogil:
    Py_ssize_t c_recv "recv"(int, void *, size_t, int)
    Py_ssize_t c_send "send"(int, const void *, size_t, int)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL
    int MSG_PEEK
