"""A process that is run one instruction at a time."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

_SINGLESTEP = 9  # PTRACE_SINGLESTEP


class Traced:
    """A process that is run one instruction at a time (ptrace(2))."""

    def __init__(self, program: str, *fds: int, arguments: tuple[str, ...]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ptrace.argtypes = (
            ctypes.c_long,
            ctypes.c_long,
            ctypes.c_void_p,
            ctypes.c_void_p,
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, fds), *arguments], pass_fds=fds
        )

    def wait(self) -> int:
        """The signal it stopped for, or -1 if it ended."""
        _, status = os.waitpid(self.process.pid, 0)
        if not os.WIFSTOPPED(status):
            self.process.returncode = os.waitstatus_to_exitcode(status)
            return -1
        return os.WSTOPSIG(status)

    def step(self) -> int:
        """Run one instruction; the signal it then stopped for."""
        self._libc.ptrace(_SINGLESTEP, self.process.pid, None, None)
        return self.wait()

    def kill(self) -> None:
        """End it wherever it is."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()
