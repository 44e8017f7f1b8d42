"""System calls on descriptors that a peer shares, none of which waits for the peer.

The peer shares the open file description, so it can clear O_NONBLOCK at any moment: a check before
a call proves nothing. What is used here does not depend on that flag:

* `write(2)` to an eventfd at its maximum waits, and eventfds refuse RWF_NOWAIT for writes. The
  kernel itself adds to an eventfd without ever waiting, for example when an asynchronous read that
  names one completes (IOCB_FLAG_RESFD, io_submit(2)). So a notification is an asynchronous read of
  0 bytes from an eventfd of our own, which completes at once.
* A read of an eventfd with RWF_NOWAIT does not wait.
* `close(2)` may wait as long as the peer likes: a socket with SO_LINGER, a file of a FUSE server.
  There is no way to find out, so it is done in a thread. The descriptor's number is free as soon as the
  call began.
"""

import os

cdef extern from * nogil:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <limits.h>
    #include <linux/aio_abi.h>
    #include <poll.h>
    #include <pthread.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/eventfd.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>

    static int accept_one(int fd)
    {
        int accepted = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        return accepted < 0 ? -errno : accepted;
    }

    enum { COMPLETIONS = 128, ATTEMPTS = 16, CLOSER_STACK = 64 * 1024 };

    static aio_context_t completions;   /* 0: there is none, or not in this process */
    static int source = -1;             /* what is read: an eventfd of our own */

    static void open_completions(void)
    {
        aio_context_t made = 0, none = 0;
        if (syscall(SYS_io_setup, COMPLETIONS, &made))
            return;
        if (!__atomic_compare_exchange_n(&completions, &none, made, 0, __ATOMIC_SEQ_CST,
                                         __ATOMIC_SEQ_CST))
            syscall(SYS_io_destroy, made);
    }

    static void forget_completions(void) { completions = 0; }

    static int set_up_notifications(void)
    {
        int first = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        /* If the process was started with standard descriptors closed, theirs stay free. */
        source = fcntl(first, F_DUPFD_CLOEXEC, 3);
        close(first);
        open_completions();
        /* A child of fork(2) has no asynchronous I/O of its parent's. */
        return source < 0 ? -1 : pthread_atfork(NULL, NULL, forget_completions);
    }

    static void notify_fd(int fd)
    {
        static const uint64_t one = 1;
        struct io_event done[COMPLETIONS];
        struct timespec now = {0, 0};
        struct pollfd ready = {.fd = fd, .events = POLLOUT};
        struct iocb read_nothing;
        struct iocb *requests = &read_nothing;
        aio_context_t context = __atomic_load_n(&completions, __ATOMIC_RELAXED);
        int i;
        if (!context) {
            open_completions();
            context = __atomic_load_n(&completions, __ATOMIC_RELAXED);
        }
        memset(&read_nothing, 0, sizeof read_nothing);
        read_nothing.aio_fildes = source;
        read_nothing.aio_lio_opcode = IOCB_CMD_PREAD;
        read_nothing.aio_flags = IOCB_FLAG_RESFD;
        read_nothing.aio_resfd = fd;
        for (i = 0; context && i < ATTEMPTS; i++) {
            if (syscall(SYS_io_submit, context, 1, &requests) == 1 || errno == EINVAL ||
                errno == EBADF)
                return;
            if (errno != EAGAIN)
                break;
            syscall(SYS_io_getevents, context, 0, COMPLETIONS, done, &now);
        }
        /* The host has no asynchronous I/O. If the peer is quick and hostile, this waits. */
        fcntl(fd, F_SETFL, O_RDWR | O_NONBLOCK);
        if (poll(&ready, 1, 0) == 1 && write(fd, &one, sizeof one)) {}
    }

    static void drain_fd(int fd)
    {
        uint64_t count;
        struct iovec vec = {&count, sizeof count};
        if (preadv2(fd, &vec, 1, -1, RWF_NOWAIT)) {}
    }

    static int seals_of(int fd) { return fcntl(fd, F_GET_SEALS); }

    static int option_of(int fd, int option)
    {
        int value = 0;
        socklen_t size = sizeof value;
        return getsockopt(fd, SOL_SOCKET, option, &value, &size) ? -1 : value;
    }

    static pthread_mutex_t closers_lock = PTHREAD_MUTEX_INITIALIZER;
    static pthread_cond_t closer_ended = PTHREAD_COND_INITIALIZER;
    static int closers;                 /* threads that are closing */
    static int *waiting;                /* descriptors for the next thread that is free */
    static int waiting_count, waiting_room;

    static void *close_one_by_one(void *first)
    {
        int fd = (int)(intptr_t)first;
        for (;;) {
            close(fd);
            pthread_mutex_lock(&closers_lock);
            if (!waiting_count)
                break;
            fd = waiting[--waiting_count];
            pthread_mutex_unlock(&closers_lock);
        }
        closers--;
        pthread_cond_broadcast(&closer_ended);
        pthread_mutex_unlock(&closers_lock);
        return NULL;
    }

    /* With the lock held; -1 if there can be no thread. */
    static int start_closer(int fd)
    {
        pthread_attr_t attributes;
        sigset_t all, before;
        pthread_t thread;
        int error;
        if (pthread_attr_init(&attributes))
            return -1;
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attributes, CLOSER_STACK);
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        error = pthread_create(&thread, &attributes, close_one_by_one, (void *)(intptr_t)fd);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attributes);
        if (error)
            return -1;
        closers++;
        return 0;
    }

    /* With the lock held; -1 if there is no memory. */
    static int leave_to_closers(int fd)
    {
        if (waiting_count == waiting_room) {
            int room = waiting_room ? 2 * waiting_room : 64;
            int *larger = realloc(waiting, room * sizeof *larger);
            if (!larger)
                return -1;
            waiting = larger, waiting_room = room;
        }
        waiting[waiting_count++] = fd;
        return 0;
    }

    static int close_all_aside(const int *fds, int count, double grace, int most)
    {
        struct timespec until;
        int i, left, alone;
        pthread_mutex_lock(&closers_lock);
        alone = !closers;
        for (i = 0; i < count; i++) {
            if (closers < most ? !start_closer(fds[i]) : !leave_to_closers(fds[i]))
                continue;
            pthread_mutex_unlock(&closers_lock);
            close(fds[i]);
            pthread_mutex_lock(&closers_lock);
        }
        /* Nearly always this is a matter of microseconds. */
        if (alone && grace > 0) {
            clock_gettime(CLOCK_REALTIME, &until);
            until.tv_nsec += (long)(grace * 1e9);
            until.tv_sec += until.tv_nsec / 1000000000;
            until.tv_nsec %= 1000000000;
            while (closers && !pthread_cond_timedwait(&closer_ended, &closers_lock, &until)) {}
        }
        left = closers + waiting_count;
        pthread_mutex_unlock(&closers_lock);
        return left;
    }
    """
    int accept_one(int fd)
    int close(int fd)
    int set_up_notifications()
    void notify_fd(int fd)
    void drain_fd(int fd)
    int seals_of(int fd)
    int option_of(int fd, int option)
    int SO_DOMAIN
    int SO_TYPE
    int close_all_aside(const int *fds, int count, double grace, int most)

cdef enum:
    MOST_AT_ONCE = 256


if set_up_notifications():
    raise OSError("this process cannot have an eventfd")


cdef void notify(int fd) noexcept nogil:
    notify_fd(fd)


def notify_eventfd(int fd):
    """Add one to an eventfd. Never waits, also if it is at its maximum; anything else is ignored."""
    with nogil:
        notify_fd(fd)


def drain_eventfd(int fd):
    """Set an eventfd to 0. Never waits, whatever its owner made of the file description."""
    with nogil:
        drain_fd(fd)


def accept_stream(int fd):
    """Take the next connection of a listening socket, which does not wait.

    Unlike :meth:`socket.socket.accept` it loses no descriptor for want of memory.

    Returns:
        A descriptor, which does not wait either.

    Raises:
        OSError: There is none, or it cannot be taken.
    """
    cdef int accepted = accept_one(fd)
    if accepted < 0:
        raise OSError(-accepted, os.strerror(-accepted))
    try:
        return accepted
    except BaseException:
        close(accepted)
        raise


def is_memory(int fd):
    """Whether the kernel itself holds a file's contents: memfd, tmpfs, POSIX shm, hugetlbfs.

    Only these know seals, and the query involves no file system. It never waits.
    """
    return seals_of(fd) >= 0


def socket_kind(int fd):
    """Family and type of a socket, None if it is none. Takes no lock that a peer may hold."""
    cdef int family = option_of(fd, SO_DOMAIN)
    return None if family < 0 else (family, option_of(fd, SO_TYPE))


def close_aside(fds, double grace, int most):
    """Close descriptors of any kind in threads of their own; the caller does not wait.

    Args:
        fds: Descriptors; their numbers must not be used from now on.
        grace: Seconds to wait for it, if none is being closed at the moment, so that descriptors
            that close at once are closed when this returns.
        most: Threads at most; further descriptors are queued.

    Returns:
        How many are not closed yet, those of others included.
    """
    cdef int batch[MOST_AT_ONCE]
    cdef int count = 0, left
    if not 0 <= grace <= 1:
        raise ValueError(f"grace {grace} is not in 0..1")
    if most < 1:
        raise ValueError(f"most {most} must be at least 1")
    for fd in fds:
        batch[count] = fd
        count += 1
        if count == MOST_AT_ONCE:
            with nogil:
                close_all_aside(batch, count, 0, most)
            count = 0
    with nogil:
        left = close_all_aside(batch, count, grace, most)
    return left
