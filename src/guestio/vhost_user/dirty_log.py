"""The dirty log that a front-end shares while its guest migrates.

The front-end gives the memory (SET_LOG_BASE) and switches logging on and off (VHOST_F_LOG_ALL),
both while rings are running. Every page of guest memory that the device writes is marked in it by
its guest physical address, whatever address the driver used.

Source: QEMU docs/interop/vhost-user.rst, "Migration".
"""

from __future__ import annotations

from guestio.budgets import MAX_DIRTY_LOG
from guestio.errors import BackingError
from guestio.memory import Backing, DirtyLog
from guestio.peer.foreign import check_memory
from guestio.vhost_user.messages import LOG_PAGE, Log


class SharedLog:
    """The dirty log of a connection, and its mapping.

    Attributes:
        marks: What bitmaps of guest memory mark in.

    Threads: from one, while any mark.
    """

    def __init__(self) -> None:
        self.marks = DirtyLog()
        self._backing: Backing | None = None

    @property
    def mapped(self) -> bool:
        """Whether the front-end has given a log."""
        return self._backing is not None

    @property
    def end(self) -> int:
        """The first guest address that the log has no room for."""
        return 8 * self.marks.size * LOG_PAGE

    @property
    def complete(self) -> bool:
        """Whether everything that was to be marked since logging is on was."""
        return not self.marks.lost and not self.marks.vanished

    def replace(self, description: Log, fd: int) -> None:
        """Mark in a log of the front-end's; the one before is not touched any more.

        Args:
            description: Where it is in the file.
            fd: The file, open for reading and writing; it stays the caller's.

        Raises:
            BackingError: It is larger than any guest needs, or it cannot be mapped.
        """
        size, offset = description.size, description.offset
        if size > MAX_DIRTY_LOG:
            raise BackingError(
                f"a dirty log of {size:#x} bytes; {MAX_DIRTY_LOG:#x} are enough for every guest"
            )
        if offset + size >= 1 << 62:
            raise BackingError(
                f"a dirty log at offset {offset:#x}+{size:#x} is beyond the end of any file"
            )
        check_memory(fd)
        backing = Backing.from_fd(fd, size, offset)
        self.marks.use(
            backing._mapping, backing.host_address - backing._mapping.address, backing.size
        )
        before, self._backing = self._backing, backing
        if before is not None:
            before.close()

    def switch(self, *, enable: bool) -> None:
        """Mark what is written, or stop doing so."""
        if enable != self.marks.enabled:
            # What a log of before did not tell is of no interest: the front-end begins anew.
            self.marks.lost = 0
            self.marks.enabled = enable

    def close(self) -> None:
        """Stop marking and let go of the memory. May be called again."""
        self.marks.enabled = False
        self.marks.clear()
        before, self._backing = self._backing, None
        if before is not None:
            before.close()
