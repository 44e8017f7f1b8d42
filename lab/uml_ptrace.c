/*
 * Mends two things about User-mode Linux from outside; loaded with LD_PRELOAD.
 *
 * 1. UML (seen in 6.1 and 6.12) keeps 2,696 bytes of a process's extended CPU state. Where the
 *    CPU has more of it (AMX), the host takes back only all of it: "ptrace set fp regs failed,
 *    errno = 14". So what UML does not know is read from the process and given back unchanged.
 * 2. When UML is killed, the host processes that carry its processes would go on by themselves,
 *    and what had been a system call of the guest would be one of the host. They die with it.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static long raw(long request, long pid, void *address, void *data)
{
    return syscall(SYS_ptrace, request, pid, address, data);
}

static long set_all_registers(long pid, void *kind, const struct iovec *known)
{
    static char state[65536]; /* this runs on UML's kernel stacks, and in one thread */
    struct iovec all = {state, sizeof state};

    if (raw(PTRACE_GETREGSET, pid, kind, &all) == -1)
        return -1;
    if (all.iov_len < known->iov_len) {
        errno = EFAULT;
        return -1;
    }
    memcpy(state, known->iov_base, known->iov_len);
    return raw(PTRACE_SETREGSET, pid, kind, &all);
}

long ptrace(enum __ptrace_request request, ...)
{
    va_list arguments;
    long pid, result, word = 0;
    void *address, *data;
    int peeks = request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA ||
                request == PTRACE_PEEKUSER;

    va_start(arguments, request);
    pid = va_arg(arguments, pid_t);
    address = va_arg(arguments, void *);
    data = va_arg(arguments, void *);
    va_end(arguments);

    if (request == PTRACE_SETOPTIONS)
        data = (void *)((long)data | PTRACE_O_EXITKILL);
    /* The system call stores the word that the library's function returns. */
    result = raw(request, pid, address, peeks ? &word : data);
    if (result == -1 && errno == EFAULT && request == PTRACE_SETREGSET &&
        address == (void *)NT_X86_XSTATE)
        return set_all_registers(pid, address, data);
    if (peeks && result == 0) {
        errno = 0;
        return word;
    }
    return result;
}
