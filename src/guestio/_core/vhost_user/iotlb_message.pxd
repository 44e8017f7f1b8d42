"""IOTLB messages (struct vhost_iotlb_msg behind a vhost-user header) and the sockets they cross."""

from libc.string cimport memcpy

from guestio._core.base.checks cimport u8, u32, u64
from guestio._core.base.capacity cimport READ_AHEAD
from guestio._core.base.sockets cimport MSG_DONTWAIT, MSG_NOSIGNAL, c_recv, c_send

cdef extern from * nogil:
    """
    #include <string.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    /* Only looks. 0 also if descriptors came along: what takes them must not let the kernel close
       them in this thread, which may wait. */
    static ssize_t look_at_bytes(int fd, void *buffer, size_t size)
    {
        struct iovec vec = {buffer, size};
        struct msghdr message;
        ssize_t got;
        memset(&message, 0, sizeof message);
        message.msg_iov = &vec, message.msg_iovlen = 1;
        got = recvmsg(fd, &message, MSG_DONTWAIT | MSG_PEEK);
        return message.msg_flags & MSG_CTRUNC ? 0 : got;
    }
    """
    Py_ssize_t look_at_bytes(int fd, void *buffer, size_t size)

cdef enum:
    HEADER_BYTES = 12
    MESSAGE_BYTES = HEADER_BYTES + 32
    ACK_BYTES = HEADER_BYTES + 8
    # Requests, by direction, and bits of a header's flags.
    FROM_BACKEND = 1
    FROM_FRONTEND = 22
    VERSION = 1
    VERSION_MASK = 3
    REPLY = 4
    NEED_REPLY = 8
    # Types of struct vhost_iotlb_msg.
    MISS = 1
    UPDATE = 2
    INVALIDATE = 3


cdef struct Header:
    u32 request
    u32 flags
    u32 size


cdef struct Message:
    u64 iova
    u64 size
    u64 uaddr
    u8 perm
    u8 kind
    u8 padding[6]


cdef inline void put_message(u8 *at, const Header *header, const Message *message) noexcept nogil:
    memcpy(at, header, HEADER_BYTES)
    memcpy(at + HEADER_BYTES, message, sizeof(Message))


cdef inline size_t look(int fd, u8 *buffer) noexcept nogil:
    """See what has arrived, up to READ_AHEAD, without taking it. 0 also if there is an error.

    0 as well if file descriptors are with it, so that nothing is taken here that carries some.
    """
    cdef Py_ssize_t size = look_at_bytes(fd, buffer, READ_AHEAD)
    return <size_t>size if size > 0 else 0


cdef inline void take(int fd, u8 *buffer, size_t size) noexcept nogil:
    """Take what was looked at."""
    if size:
        c_recv(fd, buffer, size, MSG_DONTWAIT)
