"""Doorbells: registers whose writes are handled in the core.

A driver writes to a doorbell once or twice per request, and expects nothing but that the device
looks at a queue. A transport that finds such a write among its messages rings the doorbell, and
after all messages that had arrived has it serve what was rung for: once, however often it was rung.
"""

from libc.stdlib cimport free, realloc
from libc.string cimport memmove

from guestio._core.base.capacity cimport GUESTIO_ASSERT
from guestio._core.base.checks cimport as_address, as_fd, u64
from guestio._core.base.naming cimport publish_type
from guestio._core.base.syscalls cimport notify


cdef class Doorbell:
    """A range of a BAR's registers where a driver's writes are handled in the core.

    A device registers it with `PciHost.add_doorbell`. It is made in Cython: a subclass overrides
    the C methods ``ring`` and ``serve``; `CallbackDoorbell` and `EventfdDoorbell` are ready-made
    ones. All is called in the thread of the event loop, with the GIL held.
    """

    cdef bint ring(self, u64 offset, u64 value, int size) except -1:
        """Note a write.

        It must not wait, and not do what was asked for: the driver may wait for the answer, and
        more writes may follow at once.

        Args:
            offset: Where in the doorbell's range, a multiple of ``size``.
            value: What was written.
            size: 1, 2, 4 or 8 bytes.

        Returns:
            True; or False if the device's ``write`` is to be called instead.
        """
        return False

    cdef bint serve(self) except -1:
        """Do what was asked for since the last time.

        It is called after the writes of one turn, from within the event loop's wait, in a time that
        others may be kept waiting for: a millisecond or some MiB.

        Returns:
            Whether there is more to do: it is called again when others had their turn.
        """
        return False

    cdef int forget(self) except -1:
        """Forget what was asked for: the function is reset."""
        return 0


cdef class EventfdDoorbell(Doorbell):
    """Adds one to an eventfd when it is rung; several times in a turn count as one.

    Args:
        fd: The eventfd, which stays the caller's and is open while the doorbell is registered.

    Raises:
        TypeError, ValueError: That is no descriptor.
    """

    cdef int fd

    def __init__(self, fd):
        self.fd = as_fd(fd)

    cdef bint ring(self, u64 offset, u64 value, int size) except -1:
        return True

    cdef bint serve(self) except -1:
        with nogil:
            notify(self.fd)
        return False


cdef class CallbackDoorbell(Doorbell):
    """Calls a Python function for what was written.

    Of several writes to one offset in a turn only the last one is passed on, in the order of the
    first ones, as suits the tail of a queue.

    Args:
        callback: Called with ``(offset, size, value)``.

    Raises:
        TypeError: It cannot be called.
    """

    cdef readonly object callback
    cdef dict written

    def __cinit__(self, *_, **__):
        self.in_python = True

    def __init__(self, callback):
        if not callable(callback):
            raise TypeError(f"callback must be callable, not {type(callback).__name__}")
        self.callback = callback
        self.written = {}

    cdef bint ring(self, u64 offset, u64 value, int size) except -1:
        self.written[offset] = size, value
        return True

    cdef bint serve(self) except -1:
        cdef Py_ssize_t left = len(self.written)
        # A call may have the function be reset, which empties it.
        while left and self.written:
            left -= 1
            offset = next(iter(self.written))
            size, value = self.written.pop(offset)
            self.callback(offset, size, value)
        return False

    cdef int forget(self) except -1:
        self.written.clear()
        return 0


cdef class Doorbells:
    """The doorbells of a device, by BAR and offset, and those that were rung.

    Args:
        failed: Called with the name of a method of a doorbell that raised, while the exception is
            being handled.

    Attributes:
        silent: BARs whose writes ring nothing at the moment, as bits.

    For the thread of the event loop.
    """

    def __init__(self, failed):
        if not callable(failed):
            raise TypeError(f"failed must be callable, not {type(failed).__name__}")
        self.failed = failed
        self.doorbells, self.rung = [], []

    def __dealloc__(self):
        free(self.range_of)

    def __len__(self):
        return self.count

    def add(self, bar, offset, size, int width, Doorbell doorbell not None):
        """Register a doorbell.

        Args:
            bar: The BAR's index.
            offset: Where it begins.
            size: Its bytes, at least 1.
            width: Bytes of a write at most: 1, 2, 4 or 8. Wider ones do not ring it.
            doorbell: What is rung.

        Raises:
            ValueError: Bad numbers, or it overlaps another one; nothing changed.
        """
        cdef u64 index = as_address(bar, "bar"), first = as_address(offset, "offset")
        cdef u64 length = as_address(size, "size")
        cdef int place = 0
        cdef DoorbellRange *grown
        if not length or first + (length - 1) < first:
            raise ValueError(f"a doorbell at {first:#x}+{length:#x} is empty or leaves its BAR")
        if width not in (1, 2, 4, 8):
            raise ValueError(f"width {width} is not 1, 2, 4 or 8")
        while place < self.count and (
            self.range_of[place].bar < index
            or (self.range_of[place].bar == index and self.range_of[place].last < first)
        ):
            place += 1
        if place < self.count and self.range_of[place].bar == index and (
            self.range_of[place].first <= first + (length - 1)
        ):
            raise ValueError(
                f"a doorbell at {first:#x}+{length:#x} of BAR {index} overlaps the one at "
                f"{self.range_of[place].first:#x}"
            )
        grown = <DoorbellRange *>realloc(
            self.range_of, (self.count + 1) * sizeof(DoorbellRange)
        )
        if grown is NULL:
            raise MemoryError
        self.range_of = grown
        self.doorbells.insert(place, doorbell)
        memmove(
            &self.range_of[place + 1], &self.range_of[place],
            (self.count - place) * sizeof(DoorbellRange),
        )
        self.range_of[place] = DoorbellRange(index, first, first + (length - 1), width)
        self.count += 1
        doorbell.registered += 1

    def remove(self, bar, offset):
        """Remove the doorbell that begins at ``offset``; it is rung and served no more.

        Raises:
            ValueError: There is none.
        """
        cdef u64 index = as_address(bar, "bar"), first = as_address(offset, "offset")
        cdef int place
        cdef Doorbell doorbell
        for place in range(self.count):
            if self.range_of[place].bar == index and self.range_of[place].first == first:
                break
        else:
            raise ValueError(f"no doorbell begins at {first:#x} of BAR {index}")
        doorbell = self.doorbells.pop(place)
        self.count -= 1
        doorbell.registered -= 1
        memmove(
            &self.range_of[place], &self.range_of[place + 1],
            (self.count - place) * sizeof(DoorbellRange),
        )
        if doorbell.rung and not doorbell.registered:
            self.rung.remove(doorbell)
            doorbell.rung = False

    cdef int find(self, u64 bar, u64 offset, u64 size) noexcept:
        """The place of the doorbell that a write rings, or -1. Plain C: it cannot raise.

        O(log n).
        """
        cdef int low = 0, high = self.count, middle
        cdef DoorbellRange *found
        if self.silent and (bar > 63 or self.silent >> bar & 1):
            return -1
        while low < high:
            middle = (low + high) // 2
            found = &self.range_of[middle]
            if found.bar < bar or (found.bar == bar and found.last < offset):
                low = middle + 1
            else:
                high = middle
        if low == self.count:
            return -1
        found = &self.range_of[low]
        if found.bar != bar or offset < found.first or size > <u64>found.width:
            return -1
        # The last byte of the write is within: no sum is too large, as the offset is.
        if size - 1 > found.last - offset or (size & (size - 1)) or offset & (size - 1):
            return -1
        return low

    cdef bint ring(self, int place, u64 offset, u64 value, int size) except -1:
        """Ring a doorbell that was found; False if the device's ``write`` is to be called."""
        cdef Doorbell doorbell
        GUESTIO_ASSERT(0 <= place < self.count)
        doorbell = self.doorbells[place]
        try:
            if not doorbell.ring(offset - self.range_of[place].first, value, size):
                return False
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            self.report("ring")
            return True
        if not doorbell.rung:
            self.rung.append(doorbell)
            doorbell.rung = True
        return True

    def write(self, bar, offset, int size, value):
        """A driver's write, which may be one to a doorbell.

        Returns:
            Whether a doorbell was rung for it; :meth:`serve_rung` is to be called then.
        """
        cdef u64 at = as_address(offset, "offset")
        cdef int place = -1
        if size > 0:
            place = self.find(as_address(bar, "bar"), at, size)
        return place >= 0 and self.ring(place, at, as_address(value, "value"), size)

    cdef int report(self, str method) except -1:
        self.failed(method)
        self.reported = True
        return 0

    def serve_rung(self):
        """Have the doorbells that were rung serve; whether there is more to do."""
        return self.serve(True)

    cdef bint serve(self, bint may_call_python) except -1:
        """Have the doorbells that were rung serve.

        Args:
            may_call_python: Whether those may that call Python; they are left rung otherwise.

        Returns:
            Whether there is something for Python: more to serve, or an error was reported.
        """
        cdef list rung = self.rung
        cdef Doorbell doorbell
        cdef bint reported = self.reported
        if not rung:
            self.reported = False
            return reported
        self.rung = []
        for doorbell in rung:
            # It may be rung while it serves, and is served again then.
            doorbell.rung = False
        self.serving += 1
        try:
            self.serve_each(rung, may_call_python)
        finally:
            self.serving -= 1
        reported, self.reported = self.reported, False
        return reported or bool(self.rung)

    cdef int serve_each(self, list rung, bint may_call_python) except -1:
        cdef Doorbell doorbell
        cdef bint more
        cdef u64 lives = self.lives
        for doorbell in rung:
            if lives != self.lives:
                # One before it had the function be reset.
                break
            if not doorbell.registered:
                # One before it has removed it.
                continue
            more = doorbell.in_python and not may_call_python
            if not more:
                try:
                    more = doorbell.serve()
                except (KeyboardInterrupt, SystemExit):
                    raise
                except BaseException:
                    self.report("serve")
                    # What else it was rung for.
                    more = doorbell.in_python and lives == self.lives
            if more and not doorbell.rung and doorbell.registered:
                self.rung.append(doorbell)
                doorbell.rung = True
        return 0

    cdef bint rung_any(self) noexcept:
        """Whether doorbells are to serve. A look at a list: it cannot raise."""
        return len(self.rung) > 0

    def finish(self):
        """Have the doorbells that were rung serve once more, and forget the rest: before a reset.

        A reset that comes while they serve, as one of them waits for an answer, has them forget all.
        """
        if not self.serving:
            self.serve(True)
        self.forget_rung()

    def forget_rung(self):
        """Serve nothing of what was rung for so far: its driver is gone."""
        cdef Doorbell doorbell
        self.rung = []
        self.lives += 1
        for doorbell in self.doorbells:
            doorbell.rung = False
            doorbell.forget()


publish_type(
    Doorbell,
    "guestio.pci.Doorbell",
    "Doorbell()\n--\n\n"
    "A range of a BAR's registers where a driver's writes are handled in the core.\n\n"
    "Registered with `PciHost.add_doorbell`, it is rung by writes that lie in its range, and\n"
    "serves once after those that had arrived. `CallbackDoorbell` and `EventfdDoorbell` are\n"
    "ready-made; others are subclasses in Cython, with `ring` and `serve`. All is called in the\n"
    "thread of the event loop.",
)
publish_type(
    EventfdDoorbell,
    "guestio.pci.EventfdDoorbell",
    "EventfdDoorbell(fd)\n--\n\n"
    "Adds one to an eventfd when it is rung; several times in a turn count as one.\n\n"
    "Args:\n"
    "    fd: The eventfd. It stays the caller's, and is to be open while the doorbell is\n"
    "        registered.\n\n"
    "Raises:\n"
    "    TypeError, ValueError: That is no descriptor.",
)
publish_type(
    CallbackDoorbell,
    "guestio.pci.CallbackDoorbell",
    "CallbackDoorbell(callback)\n--\n\n"
    "Calls a Python function for what a driver wrote.\n\n"
    "Of several writes to one offset in a turn only the last one is passed on, in the order of\n"
    "the first ones, as suits the tail of a queue. What it raises is logged and counted.\n\n"
    "Args:\n"
    "    callback: Called with (offset, size, value) in the thread of the event loop. The offset\n"
    "        is counted in bytes from where the doorbell's own range begins, not from that of\n"
    "        the BAR; size is 1, 2, 4 or 8.\n\n"
    "Raises:\n"
    "    TypeError: It cannot be called.",
)
