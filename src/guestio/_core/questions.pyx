"""The questions about translations that are in flight, and who waits for the answers.

Behind an IOMMU a request of the driver costs a handful of them. They live in a table of fixed size,
found by page and access in O(1), and no Python object is made for one unless it is refused.

An acknowledgement costs both sides a system call and wakes us, and mostly it says nothing that the
translation did not say before. So only the last question of a batch has the flag NEED_REPLY
(vhost-user specification, section VHOST_USER_PROTOCOL_F_REPLY_ACK). A front-end deals with messages
in their order (QEMU: backend_read in hw/virtio/vhost-user.c, which goes on only when its UPDATE was
acknowledged), so that acknowledgement says that the whole batch was dealt with. What is still open
then was most likely refused. It is asked once more, page by page with NEED_REPLY, which names what
is refused, and costs nothing but a question if the translation was only late.
"""

from libc.string cimport memcpy, memset

from guestio._core.border cimport Span, as_address, as_span
from guestio._core.misses cimport Misses
from guestio._core.wire cimport (
    ACK_BYTES, FROM_BACKEND, HEADER_BYTES, MESSAGE_BYTES, MISS, NEED_REPLY, REPLY, VERSION,
    VERSION_MASK, Header, Message, look, put_message, take,
)

cdef extern from * nogil:
    """
    #define lowest_bit(v) __builtin_ctzll(v)
    """
    int lowest_bit(u64 v)

PAGE = PAGE_BYTES
"""Front-ends answer a page at a time, so that is how they are asked."""

MAX_OUTSTANDING = SLOTS // 2
"""Questions in flight at a time. All of them fit in a socket's buffer, so asking never waits."""

cdef int LIMIT = MAX_OUTSTANDING

cdef enum:
    READ = 1
    READ_WRITE = 3
    # Questions that share an acknowledgement: half of all, so that there is room again before the
    # last of many is answered.
    BATCH = 256


cdef class Question:
    """A page whose translation was refused, or not given in time.

    Attributes:
        iova: Its address.
        access: What was to be done with it.
        waiting: Who needs it, as numbers.
    """

    cdef readonly u64 iova
    cdef readonly int access
    cdef readonly list waiting


cdef class MissTable:
    """Misses in flight, at most one for a page and access, and who waits for them.

    What is needed for reading and for writing at the same time is asked for once, for both. A
    waiter is a number below 256, such as that of a queue. Not safe for several threads at once.

    Args:
        time_limit: Seconds after which an unanswered question counts as refused.

    Attributes:
        asked: Messages that asked so far; a question may take two.
        refused: Questions refused or not answered in time so far.
        timeouts: Those of them that were not answered in time.
    """

    def __init__(self, time_limit):
        self.time_limit = time_limit
        self.clear()

    cdef int clear(self) except -1:
        """Forget everything but the counts."""
        cdef int i
        memset(self.slots, 0, sizeof(self.slots))
        memset(self.lacking, 0, sizeof(self.lacking))
        for i in range(SLOTS):
            self.heads[i] = -1
            self.slots[i].next = i + 1 if i + 1 < SLOTS else -1
        self.free_slot = 0
        self.order_first, self.order_count, self.open_count, self.under_way = 0, 0, 0, 0
        self.starved_waiters = set()
        return 0

    def __len__(self):
        return self.open_count

    cdef int16_t find(self, u64 iova, int access) noexcept:
        """The open question about a page and access, or -1."""
        cdef int16_t slot = self.heads[hash_of(iova, access)]
        while slot >= 0 and (self.slots[slot].iova != iova or self.slots[slot].access != access):
            slot = self.slots[slot].next
        return slot

    cdef void enter(self, int16_t slot) noexcept:
        """Make an open question findable."""
        cdef int at = hash_of(self.slots[slot].iova, self.slots[slot].access)
        self.slots[slot].next = self.heads[at]
        self.heads[at] = slot

    cdef void unlink(self, int16_t slot) noexcept:
        cdef int16_t *link = &self.heads[
            hash_of(self.slots[slot].iova, self.slots[slot].access)
        ]
        while link[0] != slot:
            link = &self.slots[link[0]].next
        link[0] = self.slots[slot].next

    cdef int16_t open_slot(self, u64 iova, int access, double now) noexcept:
        """A new question; there must be room."""
        cdef int16_t slot = self.free_slot
        cdef Slot *question = &self.slots[slot]
        self.free_slot = question.next
        memset(question, 0, sizeof(Slot))
        question.iova, question.access, question.asked = iova, <u8>access, now
        question.open, question.fresh, question.last = True, True, -1
        self.enter(slot)
        self.open_count += 1
        return slot

    cdef void expect(self, int16_t slot, int batch) noexcept:
        """Await an acknowledgement; it speaks for so many messages, of which it is the last."""
        self.slots[slot].expected, self.slots[slot].batch = True, <int16_t>batch
        self.order[(self.order_first + self.order_count) % SLOTS] = slot
        self.order_count += 1
        self.under_way += batch

    cdef int16_t expected_next(self) noexcept:
        """Await the next acknowledgement no more; whose it was. There must be one."""
        cdef int16_t slot = self.order[self.order_first % SLOTS]
        self.order_first += 1
        self.order_count -= 1
        self.under_way -= self.slots[slot].batch
        self.slots[slot].expected = False
        return slot

    cdef void form_batches(self, const int16_t *fresh, int count) noexcept:
        """Have the last of new questions acknowledged, on behalf of all of them."""
        cdef int first, i, size
        cdef int16_t last
        for first in range(0, count, BATCH):
            size = min(count - first, BATCH)
            last = fresh[first + size - 1]
            for i in range(first, first + size - 1):
                self.slots[fresh[i]].last = last
            self.slots[last].unsettled = <int16_t>(size - 1)
            self.expect(last, size)

    cdef void leave_batch(self, int16_t slot) noexcept:
        cdef int16_t last = self.slots[slot].last
        if last >= 0:
            self.slots[last].unsettled -= 1
            self.slots[slot].last = -1

    cdef void release(self, int16_t slot) noexcept:
        """Use a slot again once nothing is to come for it any more."""
        if not self.slots[slot].open and not self.slots[slot].expected:
            self.slots[slot].next = self.free_slot
            self.free_slot = slot

    cdef void drop_stale(self, double now) noexcept:
        """Expect no acknowledgement any more of questions that were settled long ago."""
        cdef Slot *question
        while self.order_count:
            question = &self.slots[self.order[self.order_first % SLOTS]]
            # As long as questions of its batch are open, they refer to it.
            if question.open or question.unsettled or now - question.asked < self.time_limit:
                break
            self.release(self.expected_next())

    cdef bint has_room(self, int fresh, double now) noexcept:
        """Whether one more may be asked, beyond ``fresh`` ones that are not sent yet."""
        if self.under_way + fresh >= LIMIT:
            self.drop_stale(now)
        return self.open_count < LIMIT and self.under_way + fresh < LIMIT

    def ask(self, waiter, missing, double now, *, bint acknowledged, skip=()):
        """Note that ``waiter`` needs ranges.

        Args:
            waiter: Who.
            missing: ``(IovaRange, access)`` each.
            now: The time.
            acknowledged: Whether the front-end acknowledges questions, in order, if asked to. Then
                the last new one here is marked (and each 256th, if there are more), and its
                acknowledgement speaks for those before it.
            skip: Pages ``(iova, access)`` that are not to be asked for.

        Returns:
            The messages to send, for what nobody has asked yet, as bytes. If too much is in flight
            already the rest is left out; the waiter is woken to ask again when there is room.

        Raises:
            ValueError: ``waiter`` is not below 256.

        Cost: O(1) a page.
        """
        cdef int16_t fresh[SLOTS]
        cdef int count = 0, who = waiter_of(waiter)
        cdef Misses known
        cdef Span span
        cdef size_t i
        if isinstance(missing, Misses):
            known = missing
            for i in range(known.count):
                if not self.ask_range(
                    who, known.item[i].first, known.item[i].last, known.item[i].access, now, skip,
                    fresh, &count,
                ):
                    break
        else:
            for (base, length), access in missing:
                as_span(base, length, &span, False)
                if not self.ask_range(
                    who, span.first, span.last, access, now, skip, fresh, &count
                ):
                    break
        if acknowledged:
            self.form_batches(fresh, count)
        return self.messages(fresh, count)

    cdef bytes messages(self, const int16_t *which, int count):
        """Questions as they are sent."""
        cdef bytearray out = bytearray(count * MESSAGE_BYTES)
        cdef u8[::1] view = out
        cdef Header header = Header(FROM_BACKEND, VERSION, sizeof(Message))
        cdef Message message
        cdef Slot *question
        cdef int i
        self.asked += count
        memset(&message, 0, sizeof(Message))
        message.kind, message.size = MISS, PAGE_BYTES
        for i in range(count):
            question = &self.slots[which[i]]
            question.fresh = False
            header.flags = VERSION | NEED_REPLY if question.expected else VERSION
            message.iova, message.perm = question.iova, question.access
            put_message(&view[i * MESSAGE_BYTES], &header, &message)
        return bytes(out)

    cdef int ask_range(
        self, int waiter, u64 first, u64 last, int access, double now, skip, int16_t *fresh,
        int *count,
    ) except -1:
        """Ask for the pages of a range; False once there is no room."""
        cdef u64 iova = first // PAGE_BYTES * PAGE_BYTES
        while True:
            if not skip or (iova, access) not in skip:
                if not self.ask_page(waiter, iova, access, now, skip, fresh, count):
                    return False
            if last - iova < PAGE_BYTES:
                return True
            iova += PAGE_BYTES

    cdef int ask_page(
        self, int waiter, u64 iova, int access, double now, skip, int16_t *fresh, int *count,
    ) except -1:
        cdef int16_t slot = self.find(iova, access)
        cdef Slot *question
        if slot < 0 and (not skip or (iova, READ_WRITE) not in skip):
            slot = self.find_wider(iova, access)
        if slot < 0:
            if not self.has_room(count[0], now):
                self.starved_waiters.add(waiter)
                return False
            slot = self.open_slot(iova, access, now)
            fresh[count[0]] = slot
            count[0] += 1
        question = &self.slots[slot]
        if not question.waiting[waiter // 64] >> (waiter % 64) & 1:
            question.waiting[waiter // 64] |= <u64>1 << (waiter % 64)
            self.lacking[waiter] += 1
        return True

    cdef int16_t find_wider(self, u64 iova, int access) noexcept:
        """A question for both accesses, made of one that is not sent yet if need be; or -1."""
        cdef int16_t slot = self.find(iova, READ_WRITE)
        cdef int other
        if slot >= 0:
            return slot
        for other in range(READ, READ_WRITE):
            slot = self.find(iova, other)
            if slot >= 0 and self.slots[slot].fresh:
                self.unlink(slot)
                self.slots[slot].access = READ_WRITE
                self.enter(slot)
                return slot
        return -1

    def answered(self, iova, size, int perm):
        """A translation of a range arrived.

        Args:
            iova, size: The range.
            perm: What it allows. Who needs more goes on waiting.

        Returns:
            The waiters that miss nothing any more.

        Cost: O(1) for a page; O(questions) for more.
        """
        cdef list ready = []
        cdef u64 first = as_address(iova, "iova")
        self.answer(first, size - 1, perm, ready)
        return ready

    cdef int answer(self, u64 first, u64 span, int perm, list ready) except -1:
        cdef int access
        cdef int16_t slot
        cdef u64 page = first // PAGE_BYTES * PAGE_BYTES
        if not self.open_count:
            return 0
        if span < PAGE_BYTES:
            for access in range(1, 4):
                slot = self.find(page, access)
                if slot >= 0:
                    self.answer_one(slot, perm, ready)
        else:
            for slot in range(SLOTS):
                page = self.slots[slot].iova
                if self.slots[slot].open and (
                    page + (PAGE_BYTES - 1) >= first and page <= first + span
                ):
                    self.answer_one(slot, perm, ready)
        return self.relieve(ready)

    cdef int answer_one(self, int16_t slot, int perm, list ready) except -1:
        if self.slots[slot].access & ~perm:
            self.slots[slot].forbidden = True
            return 0
        return self.settle(slot, ready)

    cdef int settle(self, int16_t slot, list ready) except -1:
        """Take a question off the table and note who misses nothing any more."""
        cdef Slot *question = &self.slots[slot]
        cdef u64 left
        cdef int word, waiter
        self.unlink(slot)
        self.leave_batch(slot)
        question.open = False
        self.open_count -= 1
        for word in range(WAITER_WORDS):
            left = question.waiting[word]
            while left:
                waiter = 64 * word + lowest_bit(left)
                left &= left - 1
                self.lacking[waiter] -= 1
                if not self.lacking[waiter]:
                    ready.append(waiter)
        self.release(slot)
        return 0

    cdef int relieve(self, list ready) except -1:
        """Add those who could not ask for want of room, once there is some."""
        if self.starved_waiters and max(self.open_count, self.under_way) <= LIMIT // 2:
            ready.extend(self.starved_waiters)
            self.starved_waiters.clear()
        return 0

    cdef object question(self, int16_t slot):
        """A question as Python sees it; to be made before its slot is used again."""
        cdef Question found = Question.__new__(Question)
        found.iova, found.access = self.slots[slot].iova, self.slots[slot].access
        found.waiting = [
            waiter for waiter in range(WAITERS)
            if self.slots[slot].waiting[waiter // 64] >> (waiter % 64) & 1
        ]
        return found

    def receive(self, int fd):
        """Take the front-end's acknowledgements from a socket, oldest question first.

        An acknowledgement should not be taken before the UPDATE messages that arrived earlier were
        applied, or else what they answer is asked once more.

        Args:
            fd: The back-end channel's socket; no message on it may be taken in part.

        Returns:
            ``(all, refused, ready, again)``: whether there was something and all of it was whole
            acknowledgements, the questions that were refused, the waiters that miss nothing any
            more, and messages to send, as bytes: what is still open of a batch that was dealt with
            is asked once more. What follows stays in the socket.

        Cost: O(1) an acknowledgement; O(questions) if it leaves some of its batch open.
        """
        cdef Header header
        cdef u64 value
        cdef size_t size, at = 0
        cdef list refused = [], ready = []
        cdef int16_t again[SLOTS]
        cdef int count = 0
        with nogil:
            size = look(fd, self.buffer)
        while size - at >= ACK_BYTES:
            memcpy(&header, self.buffer + at, HEADER_BYTES)
            if header.request != FROM_BACKEND or header.size != 8 or (
                header.flags & (VERSION_MASK | REPLY) != VERSION | REPLY
            ):
                break
            memcpy(&value, self.buffer + at + HEADER_BYTES, 8)
            self.acknowledge_one(value != 0, refused, ready, again, &count)
            at += ACK_BYTES
        with nogil:
            take(fd, self.buffer, at)
        self.relieve(ready)
        return size > 0 and at == size, refused, ready, self.messages(again, count)

    def acknowledge(self, value):
        """Take one acknowledgement; returns ``(refused, ready, again)`` as :meth:`receive` does."""
        cdef list refused = [], ready = []
        cdef int16_t again[SLOTS]
        cdef int count = 0
        self.acknowledge_one(value != 0, refused, ready, again, &count)
        self.relieve(ready)
        return refused, ready, self.messages(again, count)

    cdef int acknowledge_one(
        self, bint refuse, list refused, list ready, int16_t *again, int *count
    ) except -1:
        """Take the next acknowledgement; add to ``again`` what is to be asked once more."""
        cdef int16_t slot
        if not self.order_count:
            return 0
        slot = self.expected_next()
        if self.slots[slot].unsettled:
            self.follow_up(slot, refused, ready, again, count)
        # Without a refusal, the translation may still be under way on the other channel.
        if self.slots[slot].open and (refuse or self.slots[slot].forbidden):
            self.refuse(slot, refused, ready)
        else:
            self.release(slot)
        return 0

    cdef int follow_up(
        self, int16_t last, list refused, list ready, int16_t *again, int *count
    ) except -1:
        """Find out about what is open of a batch that the front-end has dealt with."""
        cdef int16_t slot
        cdef Slot *question
        for slot in range(SLOTS):
            question = &self.slots[slot]
            if not question.open or question.last != last:
                continue
            if question.forbidden:
                self.refuse(slot, refused, ready)
            elif not is_awaited(question):
                self.settle(slot, ready)
            else:
                # It was refused, or its translation is on its way.
                self.leave_batch(slot)
                self.expect(slot, 1)
                again[count[0]] = slot
                count[0] += 1
            if not self.slots[last].unsettled:
                break
        return 0

    cdef int refuse(self, int16_t slot, list refused, list ready) except -1:
        refused.append(self.question(slot))
        self.refused += 1
        return self.settle(slot, ready)

    def expired(self, double now):
        """Give up the questions whose time is over; they are refused.

        Returns:
            Those questions, oldest first.

        Cost: O(questions).
        """
        cdef list late = [], unused = []
        cdef int16_t slot
        for slot in range(SLOTS):
            if self.slots[slot].open and now - self.slots[slot].asked >= self.time_limit:
                late.append((self.slots[slot].asked, len(late), self.question(slot)))
                self.settle(slot, unused)
        self.refused += len(late)
        self.timeouts += len(late)
        return [question for _, _, question in sorted(late)]

    def starved(self, double now):
        """Waiters that could not ask for want of room, if there is room now."""
        cdef list ready = []
        self.drop_stale(now)
        self.relieve(ready)
        return ready

    def deadline(self):
        """When to call :meth:`expired` and :meth:`starved`; None if nothing is to be expected.

        Cost: O(questions).
        """
        cdef int16_t slot
        cdef int left = self.open_count
        cdef double first = -1
        for slot in range(SLOTS):
            if not left:
                break
            if self.slots[slot].open:
                left -= 1
                if first < 0 or self.slots[slot].asked < first:
                    first = self.slots[slot].asked
        if self.starved_waiters and self.order_count:
            slot = self.order[self.order_first % SLOTS]
            if first < 0 or self.slots[slot].asked < first:
                first = self.slots[slot].asked
        return None if first < 0 else first + self.time_limit

    def awaited(self, waiter):
        """How many questions of a waiter are not settled."""
        return self.lacking[waiter_of(waiter)]

    def reset(self):
        """Forget all questions, because no answer to them can be told from others any more.

        Returns:
            Everybody who waited and has to ask again.
        """
        cdef int waiter
        waiters = self.starved_waiters.union(
            [waiter for waiter in range(WAITERS) if self.lacking[waiter]]
        )
        self.clear()
        return list(waiters)

    def forget(self, waiter):
        """Somebody does not wait any more."""
        cdef int who = waiter_of(waiter)
        cdef int16_t slot
        self.starved_waiters.discard(who)
        self.lacking[who] = 0
        for slot in range(SLOTS):
            self.slots[slot].waiting[who // 64] &= ~(<u64>1 << (who % 64))


cdef inline bint is_awaited(const Slot *question) noexcept:
    """Whether anybody needs the answer."""
    cdef int word
    for word in range(WAITER_WORDS):
        if question.waiting[word]:
            return True
    return False


cdef int waiter_of(object waiter) except -1:
    cdef u64 number = as_address(waiter, "waiter")
    if number >= WAITERS:
        raise ValueError(f"waiter {number} is not below {WAITERS}")
    return <int>number


cdef inline int hash_of(u64 iova, int access) noexcept:
    return <int>((((iova // PAGE_BYTES) * 4 + access) * <u64>0x9E3779B97F4A7C15) >> 54)


def touched(missing, known):
    """Those of the ``known`` pages ``(iova, access)`` that ranges touch, as a set."""
    cdef u64 iova, last
    cdef set found = set()
    if not known:
        return found
    for (base, length), access in missing:
        last = base + (length - 1)
        iova = <u64>base // PAGE_BYTES * PAGE_BYTES
        while True:
            page = (iova, access)
            if page in known:
                found.add(page)
            if last - iova < PAGE_BYTES:
                break
            iova += PAGE_BYTES
    return found
