/* Makes some system calls of the process stop or do more at the moment that a test needs.

   Preloaded; a test sets the variables through ctypes. */

#define _GNU_SOURCE
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* Descriptors: one byte is written to the first, then one is read from the second. -1: none. */
int mmap_reached = -1, mmap_goes_on = -1;

/* The same, before the next pwritev, preadv or fdatasync. */
int file_reached = -1, file_goes_on = -1;

/* Before the next pwritev or preadv: shorten this file to so many bytes and touch that address. */
int shorten_fd = -1;
long shorten_to;
volatile char *touch;

void *mmap(void *at, size_t size, int prot, int flags, int fd, off_t offset)
{
    void *made = (void *)syscall(SYS_mmap, at, size, prot, flags, fd, offset);
    char byte = 0;
    /* As the handler of SIGBUS puts an empty page in the place of one that is gone. */
    if (mmap_reached >= 0 && flags == (MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)) {
        int reached = mmap_reached;
        mmap_reached = -1;
        if (write(reached, &byte, 1) != 1 || read(mmap_goes_on, &byte, 1) != 1)
            _exit(9);
    }
    return made;
}

static void shorten(void)
{
    int fd = shorten_fd;
    if (fd < 0)
        return;
    shorten_fd = -1;
    if (ftruncate(fd, shorten_to))
        _exit(9);
    (void)*touch;
}

static void stop(void)
{
    int reached = file_reached;
    char byte = 0;
    if (reached < 0)
        return;
    file_reached = -1;
    if (write(reached, &byte, 1) != 1 || read(file_goes_on, &byte, 1) != 1)
        _exit(9);
}

ssize_t pwritev(int fd, const struct iovec *vec, int count, off_t offset)
{
    shorten();
    stop();
    return syscall(SYS_pwritev, fd, vec, count, offset, 0);
}

ssize_t preadv2(int fd, const struct iovec *vec, int count, off_t offset, int flags)
{
    shorten();
    stop();
    return syscall(SYS_preadv2, fd, vec, count, offset, 0, flags);
}

int fdatasync(int fd)
{
    stop();
    return syscall(SYS_fdatasync, fd);
}

/* What the same calls are called with _FILE_OFFSET_BITS. */
void *mmap64(void *at, size_t size, int prot, int flags, int fd, off_t offset)
    __attribute__((alias("mmap")));
ssize_t pwritev64(int fd, const struct iovec *vec, int count, off_t offset)
    __attribute__((alias("pwritev")));
ssize_t preadv64v2(int fd, const struct iovec *vec, int count, off_t offset, int flags)
    __attribute__((alias("preadv2")));
