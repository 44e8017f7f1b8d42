/* Time that passes SLOWER times slower, for a program in callgrind (bench/instructions.py).
 *
 * Callgrind makes a program some fifty times slower than its peer, and a busy machine may give it a
 * small share of its time. What it does at certain times (asking again for a translation that is
 * late, say) would then be counted many times too often.
 */
#define _GNU_SOURCE
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SLOWER = 1000 };

static struct timespec start;

__attribute__((constructor)) static void begin(void)
{
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &start);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int failed = (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_MONOTONIC) {
        long long passed = (now->tv_sec - start.tv_sec) * 1000000000LL + now->tv_nsec - start.tv_nsec;
        passed = passed / SLOWER + start.tv_nsec;
        now->tv_sec = start.tv_sec + passed / 1000000000LL;
        now->tv_nsec = passed % 1000000000LL;
    }
    return failed;
}

int epoll_wait(int epoll, struct epoll_event *events, int most, int timeout)
{
    if (timeout > 0)
        timeout = timeout > 1 << 21 ? -1 : timeout * SLOWER;
    return (int)syscall(SYS_epoll_pwait, epoll, events, most, timeout, (void *)0, 8L);
}
