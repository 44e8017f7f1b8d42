"""Records of tracepoints: each is read once or counted as lost, and none is torn."""

import errno
import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest

from guestio._core.trace import tracepoints
from guestio._core.trace.latencies import Latencies
from guestio.trace import (
    FIELDS,
    RECORD,
    Group,
    TraceReader,
    Tracing,
    What,
    event,
    new_origin,
    wanted,
)

LIMIT = 60.0


@pytest.fixture(autouse=True)
def _capacity():
    """Room for what a test writes, in the build with the least capacities, too."""
    tracepoints.set_capacity(1 << 10)
    yield
    tracepoints.set_capacity(tracepoints.NORMAL_CAPACITY)
    assert wanted() == 0


def in_thread(work):
    """Run in a new thread, which has a ring of its own if it writes."""
    errors = []

    def run():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(LIMIT)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def own(reader, origin):
    """The records of one test, whatever other threads write."""
    records, lost = reader.read()
    return records[records["origin"] == origin], lost


def test_the_layout_is_what_the_core_writes():
    assert RECORD.itemsize == tracepoints.RECORD_BYTES == 64
    origin = new_origin()
    values = {
        "origin": origin, "queue": 3, "head": 7, "address": 2**64 - 1, "length": 2**63,
        "detail": 5, "access": 2, "result": -(2**63), "since": 9, "time": 11,
    }  # fmt: skip
    with TraceReader() as reader:
        in_thread(lambda: tracepoints.put(int(What.TAKEN), **values))
        records, lost = own(reader, origin)
    assert lost == 0
    assert len(records) == 1
    assert {name: int(records[0][name]) for name in values} == values
    assert records[0]["what"] == What.TAKEN
    assert records[0]["thread"] > 0
    assert {field.name for field in FIELDS} == {*values, "what", "thread"}


def test_numbers_of_events_are_the_cores():
    for name, number in tracepoints.CORE_WHAT.items():
        assert What[name.upper()] == number
    for name, bit in tracepoints.GROUPS.items():
        assert Group[name.upper()] == bit


@pytest.mark.parametrize("capacity", [1, 2, 3, 7])
def test_what_is_not_read_in_time_is_lost_and_counted(capacity):
    """A model: the last `capacity` records are there, all before them are lost."""
    tracepoints.set_capacity(capacity)
    origin = new_origin()
    chance = random.Random(capacity)
    seen, lost = [], 0

    def work():
        nonlocal lost
        written = read = 0
        # The thread's ring is there before its first record is read.
        tracepoints.put(1, origin=origin, length=written)
        written += 1
        (mine,) = [
            each
            for each in tracepoints.open_rings()
            if np.frombuffer(each.read(), RECORD)["origin"].tolist() == [origin] * min(1, capacity)
        ]
        read = written
        seen.append(0)
        for _ in range(300):
            for _ in range(chance.randrange(2 * capacity + 2)):
                tracepoints.put(1, origin=origin, length=written)
                written += 1
            most = chance.choice([1, 2, capacity, 1 << 20])
            found = np.frombuffer(mine.read(most), RECORD)["length"].tolist()
            # Whole is what the writer has not begun to write over: here it stands still.
            first = max(read, written - capacity)
            expected = list(range(first, min(first + most, written)))
            assert found == expected
            lost += first - read
            read = first + len(expected)
            assert (mine.lost, mine.position) == (lost, read)
            seen.extend(found)
        assert len(seen) + mine.lost + (mine.written - mine.position) == written == mine.written

    in_thread(work)
    assert lost > 0


@pytest.mark.parametrize("capacity", [tracepoints.NORMAL_CAPACITY, 64, 5])
def test_a_reader_beside_the_writer(capacity):
    """10^5 records and a reader that goes on meanwhile: in order, whole, and none unaccounted."""
    tracepoints.set_capacity(capacity)
    origin, count = new_origin(), 100_000
    going, done = threading.Event(), threading.Event()

    def write():
        put = tracepoints.put
        going.wait(LIMIT)
        for i in range(count):
            put(1, origin=origin, length=i, address=i * 3, detail=~i & (2**64 - 1), result=-i)
        done.set()

    with TraceReader() as reader:
        writer = threading.Thread(target=write)
        writer.start()
        going.set()
        batches, lost = [], 0
        over = False
        while not over:
            over = done.is_set()
            records, gone = own(reader, origin)
            batches.append(records)
            lost += gone
        writer.join(LIMIT)
    found = np.concatenate(batches)
    assert len(found) + lost == count
    numbers = found["length"].astype(np.int64)
    assert (np.diff(numbers) > 0).all()
    assert (found["address"] == found["length"] * 3).all()
    assert (found["detail"] == ~found["length"]).all()
    assert (found["result"] == -numbers).all()
    assert numbers[-1] == count - 1


def test_two_readers_do_not_disturb_each_other():
    origin = new_origin()
    with TraceReader() as one, TraceReader() as other:
        in_thread(lambda: [tracepoints.put(1, origin=origin, length=i) for i in range(5)])
        assert own(one, origin)[0]["length"].tolist() == [*range(5)]
        in_thread(lambda: tracepoints.put(1, origin=origin, length=5))
        assert own(other, origin)[0]["length"].tolist() == [*range(6)]
        assert own(one, origin)[0]["length"].tolist() == [5]
        with TraceReader(from_start=True) as late:
            assert own(late, origin)[0]["length"].tolist() == [*range(6)]


def test_rings_go_with_the_last_that_wants_them():
    origin = new_origin()
    tracing, reader = Tracing(Group.LIFE), TraceReader()
    event(What.RESET, origin=origin)
    assert tracepoints.rings()
    tracing.close()
    assert own(reader, origin)[0]["what"].tolist() == [What.RESET]
    reader.close()
    reader.close()
    assert not tracepoints.rings()
    # A thread whose ring has gone gets another one.
    with Tracing(Group.LIFE), TraceReader() as again:
        event(What.ERROR, origin=origin)
        assert own(again, origin)[0]["what"].tolist() == [What.ERROR]
    assert not tracepoints.rings()


def test_threads_that_come_and_go_share_a_few_rings():
    origin = new_origin()
    in_thread(lambda: tracepoints.put(1, origin=origin))
    before = len(tracepoints.rings())
    with TraceReader() as reader:
        for i in range(50):
            in_thread(lambda i=i: tracepoints.put(1, origin=origin, length=i))
        records, lost = own(reader, origin)
    assert records["length"].tolist() == [*range(50)]
    assert lost == 0
    assert len(set(records["thread"].tolist())) > 1
    assert len(tracepoints.rings()) <= before + 1


def test_records_without_a_ring_are_counted():
    tracepoints.set_capacity(3)
    room = tracepoints.MOST_RINGS - len(tracepoints.rings())
    hold, ready = threading.Event(), threading.Semaphore(0)

    def work():
        tracepoints.put(1)
        ready.release()
        hold.wait(LIMIT)

    threads = [threading.Thread(target=work) for _ in range(room)]
    with TraceReader() as reader:
        before = tracepoints.unheld()
        try:
            for thread in threads:
                thread.start()
            for _ in threads:
                assert ready.acquire(timeout=LIMIT)
            reader.read()
            # Rings of another size that are not written any more make room, one by one.
            lost_before = tracepoints.unheld()
            idle = sum(1 for _ in range(3) if not in_thread(lambda: tracepoints.put(1)))
            assert idle == 3
            assert tracepoints.unheld() - lost_before + reader.read().lost >= 0
        finally:
            hold.set()
            for thread in threads:
                thread.join(LIMIT)
        assert len(tracepoints.rings()) <= tracepoints.MOST_RINGS
        assert reader.lost == tracepoints.unheld() - before


def test_events_are_written_while_someone_wants_them():
    origin = new_origin()
    with TraceReader() as reader:
        event(What.RESET, origin=origin)
        with Tracing(Group.LIFE):
            event(What.RESET, origin=origin)
            event(What.MISS, origin=origin)
            with Tracing(Group.TRANSLATIONS):
                assert wanted() == Group.LIFE | Group.TRANSLATIONS
                event(What.MISS, origin=origin)
            event(What.MISS, origin=origin)
        event(What.RESET, origin=origin)
        records, _ = own(reader, origin)
    assert records["what"].tolist() == [What.RESET, What.MISS]
    closed = Tracing(Group.LIFE)
    closed.close()
    closed.close()
    assert wanted() == 0


def test_every_event_has_a_group():
    for what in What:
        assert what.group in Group
        assert what.group & (Group.ALL | Group.CONTENTS)


def test_a_childs_records_are_its_own():
    origin = new_origin()
    with Tracing(Group.LIFE), TraceReader() as reader:
        event(What.RESET, origin=origin)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            status = 1
            try:
                quiet = wanted() == 0 and not tracepoints.rings()
                tracepoints.put(int(What.ERROR), origin=origin)
                os.write(writing, bytes([quiet, len(tracepoints.rings())]))
                status = 0
            finally:
                os._exit(status)
        os.close(writing)
        try:
            assert os.waitpid(child, 0)[1] == 0
            assert os.read(reading, 2) == bytes([1, 1])
        finally:
            os.close(reading)
        event(What.RESET, origin=origin)
        assert own(reader, origin)[0]["what"].tolist() == [What.RESET, What.RESET]


OTHER = """
import sys
from guestio._core.trace import tracepoints
tracepoints.set_capacity(1 << 10)
for i in range(10):
    tracepoints.put(1, length=i)
print(tracepoints.rings()[0][0], tracepoints.rings()[0][1], flush=True)
sys.stdin.readline()
for i in range(10, 20):
    tracepoints.put(1, length=i)
print("more", flush=True)
sys.stdin.readline()
"""


def test_another_process_is_read_and_may_be_killed():
    with subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            number, fd = map(int, other.stdout.readline().split())
            reader = TraceReader([(number, fd)], process=other.pid, from_start=True)
            assert reader.read().records["length"].tolist() == [*range(10)]
            print(file=other.stdin, flush=True)
            assert other.stdout.readline() == "more\n"
            other.kill()
            other.wait(LIMIT)
            # The memory is there as long as a reader has it.
            assert reader.read().records["length"].tolist() == [*range(10, 20)]
            with pytest.raises(FileNotFoundError):
                TraceReader([(number, fd)], process=other.pid)
        finally:
            other.kill()


@pytest.mark.parametrize("content", [b"", b"x" * 4096, b"GIOTRACE" + bytes(8192)])
@pytest.mark.parametrize("sealed", [False, True])
def test_what_is_no_ring_is_refused(content, sealed):
    import fcntl

    fd = os.memfd_create("no ring", os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, content)
        if sealed:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        with pytest.raises(OSError) as caught:
            tracepoints.RingReader(fd)
        assert caught.value.errno == errno.EPROTO
    finally:
        os.close(fd)


def test_a_capacity_is_a_number():
    for wrong in (0, 2**24 + 1):
        with pytest.raises(ValueError, match="records"):
            tracepoints.set_capacity(wrong)


def test_latencies_are_right_to_an_eighth():
    latencies = Latencies()
    chance = random.Random(1)
    times = [0, 1, 7, 8, 9, 15, 16, 2**62]
    times += [chance.randrange(2 ** chance.randrange(1, 60)) for _ in range(2000)]
    for took in times:
        latencies.note(1, 1000, 1000 + took)
    latencies.note(0, 5, 3)  # a clock that goes back
    buckets = latencies.buckets(1)
    assert sum(count for *_, count in buckets) == len(times)
    assert latencies.sum_ns(1) == sum(times) % 2**64
    assert latencies.buckets(0) == [(0, 1, 1)]
    assert latencies.buckets(2) == []
    for first, end, count in buckets:
        assert count == sum(first <= took < end for took in times)
        assert end - first <= max(1, first // 8)
    for call in (latencies.buckets, latencies.sum_ns):
        with pytest.raises(ValueError, match="kind"):
            call(4)
    with pytest.raises(ValueError, match="kind"):
        latencies.note(-1, 0, 1)
