/* Makes the nth call of one function fail, in a program that is started with LD_PRELOAD.
 *
 * Another process says what is to happen in a shared page (the file FAIL_NTH names), at any moment.
 * Until then, and afterwards, every call does what it always does. A failing call has no effect,
 * except that close(2) does close, as Linux does whatever it returns, and shutdown(2) shuts down.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* The order is that of FUNCTIONS in shim.py. */
#define EACH(f) \
    f(read) f(write) f(close) f(recv) f(send) f(recvmsg) f(sendmsg) f(accept4) f(epoll_create1) \
    f(epoll_ctl) f(epoll_wait) f(eventfd) f(eventfd_write) f(mmap) f(ftruncate) \
    f(memfd_create) f(fallocate) f(fdatasync) f(preadv2) f(pwritev) f(pwrite) f(poll) f(fstat) \
    f(fcntl) f(getpeername) f(pthread_create) f(malloc) f(python) \
    f(socket) f(connect) f(shutdown) f(open) f(process_vm_readv) f(process_vm_writev)

#define NUMBER(name) F_##name,
enum { EACH(NUMBER) FUNCTIONS };

struct page {
    uint32_t armed;
    uint32_t function;
    uint64_t nth;       /* 1 is the next call; 0 only counts */
    int32_t error;      /* of errno; minus a signal's number: raise it before the call */
    uint32_t injected;
    uint64_t calls[64];
};

static struct page *page;

__attribute__((constructor)) static void open_page(void)
{
    const char *path = getenv("FAIL_NTH");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    struct page *found = mmap(NULL, sizeof *found, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (found != MAP_FAILED)
        page = found;
}

static int count(unsigned function)
{
    uint64_t number = __atomic_add_fetch(&page->calls[function], 1, __ATOMIC_RELAXED);
    if (page->function != function || page->nth != number)
        return 0;
    __atomic_add_fetch(&page->injected, 1, __ATOMIC_RELAXED);
    if (page->error < 0) {
        raise(-page->error);
        return 0;
    }
    errno = page->error;
    return 1;
}

static int fails(unsigned function)
{
    if (!page || !__atomic_load_n(&page->armed, __ATOMIC_ACQUIRE))
        return 0;
    return count(function);
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) \
        real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define WRAP(function, type, name, parameters, arguments) \
    type name parameters \
    { \
        REAL(name); \
        return fails(F_##function) ? (type)-1 : real arguments; \
    }

WRAP(read, ssize_t, read, (int fd, void *to, size_t size), (fd, to, size))
WRAP(write, ssize_t, write, (int fd, const void *from, size_t size), (fd, from, size))
WRAP(recv, ssize_t, recv, (int fd, void *to, size_t size, int flags), (fd, to, size, flags))
WRAP(send, ssize_t, send, (int fd, const void *from, size_t size, int flags),
     (fd, from, size, flags))
WRAP(recvmsg, ssize_t, recvmsg, (int fd, struct msghdr *message, int flags), (fd, message, flags))
WRAP(sendmsg, ssize_t, sendmsg, (int fd, const struct msghdr *message, int flags),
     (fd, message, flags))
WRAP(accept4, int, accept4, (int fd, struct sockaddr *address, socklen_t *size, int flags),
     (fd, address, size, flags))
WRAP(epoll_create1, int, epoll_create1, (int flags), (flags))
WRAP(epoll_wait, int, epoll_wait, (int epoll, struct epoll_event *events, int most, int timeout),
     (epoll, events, most, timeout))
WRAP(eventfd, int, eventfd, (unsigned value, int flags), (value, flags))
WRAP(eventfd_write, int, eventfd_write, (int fd, eventfd_t value), (fd, value))
WRAP(ftruncate, int, ftruncate64, (int fd, off64_t size), (fd, size))
WRAP(memfd_create, int, memfd_create, (const char *name, unsigned flags), (name, flags))
WRAP(fallocate, int, fallocate, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size))
WRAP(fallocate, int, fallocate64, (int fd, int mode, off64_t at, off64_t size),
     (fd, mode, at, size))
WRAP(fdatasync, int, fdatasync, (int fd), (fd))
WRAP(preadv2, ssize_t, preadv64v2,
     (int fd, const struct iovec *to, int count, off64_t at, int flags),
     (fd, to, count, at, flags))
WRAP(pwritev, ssize_t, pwritev64, (int fd, const struct iovec *from, int count, off64_t at),
     (fd, from, count, at))
WRAP(pwrite, ssize_t, pwrite64, (int fd, const void *from, size_t size, off64_t at),
     (fd, from, size, at))
WRAP(poll, int, poll, (struct pollfd *fds, nfds_t count, int timeout), (fds, count, timeout))
WRAP(fstat, int, fstat64, (int fd, struct stat64 *status), (fd, status))
WRAP(getpeername, int, getpeername, (int fd, struct sockaddr *address, socklen_t *size),
     (fd, address, size))
WRAP(socket, int, socket, (int family, int type, int protocol), (family, type, protocol))
WRAP(connect, int, connect, (int fd, const struct sockaddr *to, socklen_t size), (fd, to, size))
WRAP(process_vm_readv, ssize_t, process_vm_readv,
     (pid_t pid, const struct iovec *here, unsigned long count, const struct iovec *there,
      unsigned long pieces, unsigned long flags),
     (pid, here, count, there, pieces, flags))
WRAP(process_vm_writev, ssize_t, process_vm_writev,
     (pid_t pid, const struct iovec *here, unsigned long count, const struct iovec *there,
      unsigned long pieces, unsigned long flags),
     (pid, here, count, there, pieces, flags))

int shutdown(int fd, int how)
{
    REAL(shutdown);
    int result = real(fd, how), kept = errno;
    if (fails(F_shutdown))
        return -1;
    errno = kept;
    return result;
}

int open64(const char *path, int flags, ...)
{
    REAL(open64);
    va_list rest;
    va_start(rest, flags);
    int mode = va_arg(rest, int);
    va_end(rest);
    return fails(F_open) ? -1 : real(path, flags, mode);
}

int epoll_ctl(int epoll, int what, int fd, struct epoll_event *event)
{
    REAL(epoll_ctl);
    /* What is there can be removed in any case. */
    return what != EPOLL_CTL_DEL && fails(F_epoll_ctl) ? -1 : real(epoll, what, fd, event);
}

int close(int fd)
{
    REAL(close);
    int result = real(fd), kept = errno;
    if (fails(F_close))
        return -1;
    errno = kept;
    return result;
}

int fcntl64(int fd, int command, ...)
{
    REAL(fcntl64);
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return fails(F_fcntl) ? -1 : real(fd, command, argument);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *with)
{
    REAL(pthread_create);
    return fails(F_pthread_create) ? errno : real(thread, how, run, with);
}

/* Memory. Requests of the compiled core and those of everything else are counted apart. */

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);

enum { MODULES = 64 };
static struct { uintptr_t start, end; } module[MODULES];
static unsigned modules;

static int note_module(struct dl_phdr_info *info, size_t size, void *unused)
{
    (void)size, (void)unused;
    if (!strstr(info->dlpi_name, "guestio/_core/"))
        return 0;
    for (int i = 0; i < info->dlpi_phnum && modules < MODULES; i++) {
        const ElfW(Phdr) *part = &info->dlpi_phdr[i];
        if (part->p_type == PT_LOAD && part->p_flags & PF_X) {
            module[modules].start = info->dlpi_addr + part->p_vaddr;
            module[modules].end = module[modules].start + part->p_memsz;
            modules++;
        }
    }
    return 0;
}

static int in_core(const void *caller)
{
    static int noted;
    if (!__atomic_exchange_n(&noted, 1, __ATOMIC_ACQ_REL))
        dl_iterate_phdr(note_module, NULL);
    for (unsigned i = 0; i < modules; i++)
        if ((uintptr_t)caller >= module[i].start && (uintptr_t)caller < module[i].end)
            return 1;
    return 0;
}

static int memory_fails(const void *caller, unsigned of_core)
{
    if (!page || !__atomic_load_n(&page->armed, __ATOMIC_ACQUIRE))
        return 0;
    return count(in_core(caller) ? of_core : F_python);
}

void *mmap64(void *at, size_t size, int prot, int flags, int fd, off64_t offset)
{
    REAL(mmap64);
    if (memory_fails(__builtin_return_address(0), F_mmap))
        return MAP_FAILED;
    return real(at, size, prot, flags, fd, offset);
}

void *malloc(size_t size)
{
    return memory_fails(__builtin_return_address(0), F_malloc) ? NULL : __libc_malloc(size);
}

void *calloc(size_t count_, size_t size)
{
    return memory_fails(__builtin_return_address(0), F_malloc) ? NULL : __libc_calloc(count_, size);
}

void *realloc(void *at, size_t size)
{
    return memory_fails(__builtin_return_address(0), F_malloc) ? NULL : __libc_realloc(at, size);
}
