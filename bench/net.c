/* The driver's side of a network card's rings, the traffic on the other side of a tap, and a program
   that moves the same frames by the same system calls and does nothing else. Used by net.py. */

#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct used_elem { uint32_t id, len; };

/* A split ring without event indices, whose buffer i is at buffers + i * stride. */
struct ring {
    struct desc *desc;
    uint16_t *avail;          /* flags, index, entries */
    uint16_t *used;           /* flags, index, then elements */
    uint32_t size;
    int kick;
    uint64_t buffers, stride;
    uint16_t added, seen;
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void publish(struct ring *r)
{
    uint64_t one = 1;
    __atomic_store_n(&r->avail[1], r->added, __ATOMIC_SEQ_CST);
    if (!(__atomic_load_n(&r->used[0], __ATOMIC_SEQ_CST) & 1))
        (void)!write(r->kick, &one, 8);
}

static void add(struct ring *r, uint16_t i)
{
    r->avail[2 + r->added % r->size] = i;
    r->added++;
}

/* Fills a ring with its buffers, of length bytes each. */
void ring_fill(struct ring *r, uint32_t length, int writable)
{
    for (uint32_t i = 0; i < r->size; i++) {
        r->desc[i] = (struct desc){r->buffers + i * r->stride, length, writable ? 2 : 0, 0};
        add(r, i);
    }
    publish(r);
}

/* Makes buffers available again as they are used, for a time; the number used. */
uint64_t ring_run(struct ring *r, double seconds, uint64_t most)
{
    double until = now() + seconds;
    uint64_t done = 0;
    const struct used_elem *elements = (const void *)(r->used + 2);
    while (done < most) {
        uint16_t index = __atomic_load_n(&r->used[1], __ATOMIC_ACQUIRE);
        if (index == r->seen) {
            struct timespec nap = {0, 20000};
            if (now() >= until)
                break;
            nanosleep(&nap, NULL);
            continue;
        }
        while (r->seen != index) {
            add(r, elements[r->seen % r->size].id);
            r->seen++;
            done++;
        }
        publish(r);
        if (now() >= until)
            break;
    }
    return done;
}

/* Sends a frame again and again, for a time. */
uint64_t flood(int fd, const void *frame, size_t size, double seconds)
{
    double until = now() + seconds;
    struct iovec vec = {(void *)frame, size};
    struct mmsghdr messages[64];
    uint64_t done = 0;
    memset(messages, 0, sizeof messages);
    for (int i = 0; i < 64; i++)
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &vec, .msg_iovlen = 1};
    while (now() < until) {
        int n = sendmmsg(fd, messages, 64, 0);
        if (n > 0)
            done += n;
        else {
            struct timespec nap = {0, 50000};
            nanosleep(&nap, NULL);
        }
    }
    return done;
}

/* The reference: frames from memory to a tap, by one writev each. */
uint64_t plain_send(int fd, char *memory, uint32_t buffers, uint64_t stride, size_t size,
                    double seconds, uint64_t most)
{
    static char header[12];
    double until = now() + seconds;
    uint64_t done = 0;
    while (done < most && ((done & 63) || now() < until)) {
        struct iovec vec[2] = {{header, 12}, {memory + done % buffers * stride + 12, size}};
        if (writev(fd, vec, 2) < 0 && errno != EAGAIN)
            return done;
        done++;
    }
    return done;
}

/* The reference: frames from a tap to memory, by one readv each, asleep while there are none. */
uint64_t plain_receive(int fd, char *memory, uint32_t buffers, uint64_t stride, size_t size,
                       double seconds)
{
    static char rest[65536];
    char header[12];
    double until = now() + seconds;
    uint64_t done = 0;
    struct epoll_event event = {.events = EPOLLIN};
    int epoll = epoll_create1(0);
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
    while (now() < until) {
        epoll_wait(epoll, &event, 1, 50);
        for (int i = 0; i < 128; i++) {
            struct iovec vec[3] = {
                {header, 12}, {memory + done % buffers * stride + 12, size}, {rest, sizeof rest}};
            if (readv(fd, vec, 3) < 0)
                break;
            done++;
        }
    }
    close(epoll);
    return done;
}
