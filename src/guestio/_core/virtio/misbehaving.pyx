"""A split ring whose device lies to its driver, on command.

A format of its own, for a device that is to test its driver (:mod:`guestio.faults`): the honest
format has no branch for it, and no ring is made of this class unless a rule asks for one.
"""

from guestio._core.virtio.chain cimport u16
from guestio._core.virtio.ring cimport UsedElem
from guestio._core.virtio.split cimport SplitRing


cdef class MisbehavingRing(SplitRing):
    """A :class:`~guestio._core.virtio.split.SplitRing` that asks before it tells its driver.

    Attributes:
        lies: Asked with the GIL held, in whatever thread publishes. It has three methods:
            ``used(head, written)`` returns the two for the used entry, and whether to write that
            twice; ``ahead()`` returns how many entries too many the index is to announce;
            ``notified(wanted)`` whether the driver is to be notified. What they raise breaks the
            ring. None for an honest ring.
    """

    cdef public object lies

    cdef int put_used(self, const UsedElem *element) except -1:
        cdef UsedElem told
        if self.lies is None:
            return SplitRing.put_used(self, element)
        head, written, twice = self.lies.used(element.head, element.written)
        told.head, told.written = head & 0xFFFFFFFF, written & 0xFFFFFFFF
        SplitRing.put_used(self, &told)
        if twice:
            self.next_used += 1
            SplitRing.put_used(self, &told)
        return 0

    cdef int publish_used(self) except -1:
        cdef u16 ahead = 0
        if self.lies is not None:
            ahead = self.lies.ahead() & 0xFFFF
        if not ahead:
            return SplitRing.publish_used(self)
        return self.store16(self.used, 2, self.next_used + ahead)

    cdef bint wants_notification(self, u16 before) except -1:
        cdef bint wanted = SplitRing.wants_notification(self, before)
        return wanted if self.lies is None else bool(self.lies.notified(wanted))
