"""System call filters by libseccomp: its own Python module, or `pyseccomp`, which has its face.

What is not listed fails with EPERM. The kernel remembers which calls are allowed whatever their
arguments are, so those of the data path cost no run of the filter (Linux 5.11).
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import termios
from typing import Any, Final

_ALLOWED: Final = """
    accept accept4 access arch_prctl brk capget clock_getres clock_gettime clock_nanosleep close
    close_range copy_file_range dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait
    epoll_pwait2 epoll_wait eventfd eventfd2 exit exit_group faccessat faccessat2 fadvise64
    fallocate fcntl fdatasync flock fstat fstatfs fsync ftruncate futex futex_requeue futex_wait
    futex_waitv futex_wake get_mempolicy get_robust_list getcpu getcwd getdents64 getegid geteuid
    getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid getrandom getresgid
    getresuid getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid
    io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit ioctl
    landlock_add_rule landlock_create_ruleset landlock_restrict_self lseek lstat madvise mbind
    membarrier memfd_create mincore mlock mmap mprotect mremap msync munlock munmap nanosleep
    newfstatat pause pipe pipe2 poll ppoll pread64 preadv preadv2 pselect6 pwrite64 pwritev
    pwritev2 read readahead readlink readlinkat readv recvfrom recvmmsg recvmsg restart_syscall
    riscv_flush_icache rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend
    rt_sigtimedwait sched_get_priority_max sched_get_priority_min sched_getaffinity
    sched_getparam sched_getscheduler sched_setaffinity sched_yield seccomp select sendfile
    sendmmsg sendmsg sendto set_robust_list set_tid_address setitimer setsockopt shutdown
    sigaltstack signalfd4 splice stat statfs statx sync_file_range sysinfo tee
    timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create
    timerfd_gettime timerfd_settime times uname vmsplice wait4 waitid write writev
"""

_NOT_KNOWN: Final = "cachestat clone3 fchmodat2 map_shadow_stack mseal openat2"
"""What fails as on an older kernel: the C library then does it in another way, or not."""

_FILES: Final = "chmod fchmod fchmodat rename renameat renameat2"
"""What makes the file of a recording, besides opening it."""

_REMOVE: Final = "unlink unlinkat"

_CHANGES: Final = f"{_FILES} {_REMOVE} link linkat mkdir mkdirat rmdir symlink symlinkat truncate"

_TMPFILE: Final = os.O_TMPFILE & ~os.O_DIRECTORY
_WRITING: Final = (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, _TMPFILE)
_CLONE_THREAD: Final = 0x10000
_LOW: Final = (1 << 32) - 1
_SOCKET_TYPE: Final = 0xF
_STREAM_UNIX: Final = (1, 1)
_PRCTL: Final = (3, 15, 16, 38, 39, 0x53564D41)
"""PR_GET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS, PR_SET_VMA.
"""
_TIOCLINUX: Final = 0x541C
_NEWER_FLAGS: Final = ((7, 1), (8, 2))
"""Attributes that older libraries lack: CTL_SSB, or kernels before 5.16 make all speculation of a
filtered process slower, which is meant for code that is not trusted; CTL_OPTIMIZE, a binary tree.
"""


class MissingError(Exception):
    """There is no library for filters."""


class Filters:
    """Makes and loads the filters of a process.

    Raises:
        MissingError: The library is not there; the text says how to get it.
    """

    def __init__(self) -> None:
        self._library = _load_library()

    def limit_process(
        self, *, connects: bool, writes: bool, removes: bool, everywhere: bool = True
    ) -> None:
        """Limit all threads of the process.

        Args:
            connects: Whether Unix sockets can be made, and connected.
            writes: Whether files can be opened for writing, and renamed.
            removes: Whether files can be removed.
            everywhere: False for the calling thread, and those that it starts, alone.

        Raises:
            OSError: The system refuses.
        """
        lib = self._library
        filter_ = lib.SyscallFilter(lib.ERRNO(errno.EPERM))
        for name in _ALLOWED.split():
            self._add(filter_, lib.ALLOW, name)
        for name in _NOT_KNOWN.split():
            self._add(filter_, lib.ERRNO(errno.ENOSYS), name)
        for name in (*(_FILES.split() if writes else ()), *(_REMOVE.split() if removes else ())):
            self._add(filter_, lib.ALLOW, name)
        for name, at in (("openat", 2), ("open", 1)):
            if writes:
                self._add(filter_, lib.ALLOW, name)
            else:
                mask = os.O_ACCMODE | sum(_WRITING[2:])
                self._add(filter_, lib.ALLOW, name, lib.Arg(at, lib.MASKED_EQ, mask, 0))
        thread = lib.Arg(0, lib.MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD)
        self._add(filter_, lib.ALLOW, "clone", thread)
        own = lib.Arg(0, lib.EQ, os.getpid())
        for name in ("kill", "tgkill", "process_vm_readv", "process_vm_writev"):
            self._add(filter_, lib.ALLOW, name, own)
        self._add(filter_, lib.ALLOW, "prlimit64", lib.Arg(0, lib.EQ, 0))
        for option in _PRCTL:
            self._add(filter_, lib.ALLOW, "prctl", lib.Arg(0, lib.EQ, option))
        stream = (
            lib.Arg(0, lib.EQ, _STREAM_UNIX[0]),
            lib.Arg(1, lib.MASKED_EQ, _SOCKET_TYPE, _STREAM_UNIX[1]),
        )
        self._add(filter_, lib.ALLOW, "socketpair", *stream)
        if connects:
            self._add(filter_, lib.ALLOW, "socket", *stream)
            self._add(filter_, lib.ALLOW, "connect")
        filter_.set_attr(lib.Attr.CTL_TSYNC, int(everywhere))
        self._finish(filter_)

    def limit_thread(self) -> None:
        """Have the calling thread, and those that it starts, neither write nor remove files.

        Raises:
            OSError: The system refuses.
        """
        lib = self._library
        refuse = lib.ERRNO(errno.EPERM)
        filter_ = lib.SyscallFilter(lib.ALLOW)
        for name in _CHANGES.split():
            self._add(filter_, refuse, name)
        for name, at in (("openat", 2), ("open", 1)):
            for bit in _WRITING:
                self._add(filter_, refuse, name, lib.Arg(at, lib.MASKED_EQ, bit, bit))
        self._add(filter_, refuse, "creat")
        # What types on a terminal, for the shell that comes back to it.
        for request in (termios.TIOCSTI, _TIOCLINUX):
            self._add(filter_, refuse, "ioctl", lib.Arg(1, lib.MASKED_EQ, _LOW, request))
        self._finish(filter_)

    def _add(self, filter_: Any, action: int, name: str, *arguments: Any) -> None:
        """Add a rule for a call that this machine and this library know."""
        lib = self._library
        with contextlib.suppress(ValueError):
            number = lib.resolve_syscall(lib.Arch.NATIVE, name)
            if number >= 0:
                filter_.add_rule(action, number, *arguments)

    def _finish(self, filter_: Any) -> None:
        for attribute, value in _NEWER_FLAGS:
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                filter_.set_attr(attribute, value)
        filter_.load()


def _load_library() -> Any:
    missing: list[str] = []
    # The library's own module, which distributions have, cannot be had by pip.
    for name in ("seccomp", "pyseccomp"):
        try:
            module = importlib.import_module(name)
            if hasattr(module, "SyscallFilter"):
                return module
        except (ImportError, RuntimeError) as error:
            missing.append(str(error))
    why = missing[-1]
    hint = "pip install 'guestio[sandbox]'" if "No module" in why else "install libseccomp2"
    raise MissingError(f"{why} ({hint}, or --sandbox off)")
