"""vfio-user's messages as they are on the wire, and the system calls that move them.

Source: QEMU docs/interop/vfio-user.rst (vfio-user 0.1).
"""

from guestio._core.base.checks cimport u8, u32, u64

cdef extern from * nogil:
    """
    #ifndef GUESTIO_VFIO_USER_WIRE
    #define GUESTIO_VFIO_USER_WIRE
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/socket.h>
    #include <sys/stat.h>
    #include <sys/uio.h>
    #include <unistd.h>

    /* Bytes that one call reads of a socket: hundreds of messages. And mappings that one message
       removes before others have their turn; about 5 ms. */
    #ifdef GUESTIO_TINY
    enum { INBOX_READ = 100, DMA_UNMAP_AT_ONCE = 2 };
    #else
    enum { INBOX_READ = 32768, DMA_UNMAP_AT_ONCE = 1 << 15 };
    #endif

    /* SCM_MAX_FD of Linux, and what it may add: a pidfd, and what is no descriptor. */
    enum { PASSED_AT_ONCE = 253 + 3, PASSED_EXTRA = 256, KIND_PIDFD = 4 };
    enum { ODD_NOTHING = 0, ODD_CUT = 1, ODD_DATA = 2, ODD_BESIDE = 3 };

    /* One recvmsg(2): bytes, or -errno. Descriptors go to `fds`, all of them, whatever they came
       as; `odd` says what came beside the bytes that no peer may send. */
    static ssize_t receive_with_fds(int fd, void *buffer, size_t size, int *fds, int *count, int *odd)
    {
        union {
            char bytes[CMSG_SPACE(253 * sizeof(int)) + PASSED_EXTRA];
            struct cmsghdr aligned;
        } control;
        struct iovec vec = {buffer, size};
        struct msghdr message;
        struct cmsghdr *each;
        ssize_t got;
        memset(&message, 0, sizeof message);
        message.msg_iov = &vec, message.msg_iovlen = 1;
        message.msg_control = &control, message.msg_controllen = sizeof control;
        *count = 0, *odd = ODD_NOTHING;
        do
            got = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        while (got < 0 && errno == EINTR);
        if (got < 0)
            return -errno;
        for (each = CMSG_FIRSTHDR(&message); each; each = CMSG_NXTHDR(&message, each)) {
            size_t have = (each->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            if (each->cmsg_level != SOL_SOCKET || each->cmsg_type != SCM_RIGHTS)
                *odd = ODD_DATA;
            if (each->cmsg_level == SOL_SOCKET &&
                (each->cmsg_type == SCM_RIGHTS || each->cmsg_type == KIND_PIDFD))
                for (size_t i = 0; i < have && *count < PASSED_AT_ONCE; i++)
                    memcpy(&fds[(*count)++], CMSG_DATA(each) + i * sizeof(int), sizeof(int));
        }
        if (message.msg_flags & MSG_CTRUNC)
            *odd = ODD_CUT;
        return got;
    }

    /* What a file of the client is; 0, or -1 if the kernel itself does not hold its contents, or if
       nothing is known of it. Only files that know seals are asked: the others may wait. */
    static int describe_memory(int fd, uint64_t *device, uint64_t *inode, uint64_t *size, int *mode)
    {
        struct stat about;
        int flags;
        if (fcntl(fd, F_GET_SEALS) < 0 || fstat(fd, &about) || (flags = fcntl(fd, F_GETFL)) < 0)
            return -1;
        *device = about.st_dev, *inode = about.st_ino;
        *size = (uint64_t)about.st_size, *mode = flags & O_ACCMODE;
        return 0;
    }

    static void close_memory(int fd) { close(fd); }
    #endif
    """
    enum:
        INBOX_READ
        DMA_UNMAP_AT_ONCE
        PASSED_AT_ONCE
        ODD_NOTHING
        ODD_BESIDE
        O_RDWR
        O_WRONLY
        EAGAIN
    Py_ssize_t receive_with_fds(int fd, void *buffer, size_t size, int *fds, int *count, int *odd)
    int describe_memory(int fd, u64 *device, u64 *inode, u64 *size, int *mode)
    void close_memory(int fd)

cdef enum:
    HEADER_BYTES = 16
    # Commands.
    DMA_MAP = 2
    DMA_UNMAP = 3
    REGION_WRITE = 10
    # Flags of a header.
    REPLY = 1
    NO_REPLY = 16
    # Mappings begin and end at multiples of so many bytes.
    PAGE = 4096


cdef packed struct Header:
    unsigned short number
    unsigned short request
    u32 size          # the header's bytes included
    u32 flags
    u32 error


cdef packed struct MapRequest:
    u32 argsz
    u32 flags
    u64 offset
    u64 address
    u64 size


cdef packed struct UnmapRequest:
    u32 argsz
    u32 flags
    u64 address
    u64 size


cdef packed struct WriteRequest:
    u64 offset
    u32 region
    u32 count
