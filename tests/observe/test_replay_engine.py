"""A replay of requests that a test makes up: order, layout, mappings, and what it finds."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from guestio.errors import DeviceError
from guestio.observe.player import ReplayResult, _Player, _Whole
from guestio.observe.script import RecordedRequest, Revocation, Script
from guestio.testing import serving
from guestio.vhost_user import Backend
from guestio.vhost_user.channel import PeerGoneError
from guestio.vhost_user.frontend import Frontend, NoAnswerError
from guestio.virtio import Device
from guestio.virtio.blk import BlockDevice
from tests.kit.serving import nothing_left

SECTOR = 512
SECTORS = 512
HEADER = struct.Struct("<IIQ")
IN, OUT = 0, 1
MS = 1_000_000


class Tape:
    """Makes a script of block requests, and knows what they must answer."""

    def __init__(self, seed: int, *, iommu: bool, queues: int = 1) -> None:
        self.rng = random.Random(seed)
        self.iommu = iommu
        self.queues = queues
        self.image = bytearray(self.rng.randbytes(SECTORS * SECTOR))
        self.start = bytes(self.image)
        self.requests: list[RecordedRequest] = []
        self.revocations: list[Revocation] = []
        self.now = 10**15
        self.next = 0xFFFF_0000 if iommu else 0x10_0000

    def place(self, length: int) -> list[tuple[int, int]]:
        """Somewhere in memory, in one piece or some, beginning anywhere in a page."""
        if self.iommu:
            self.next -= (length // 4096 + 2) * 4096
            return [(self.next + self.rng.randrange(4096), length)]
        found = []
        while length:
            size = min(length, self.rng.choice([1, 16, 17, 512, 4096, length]))
            found.append((self.next + self.rng.randrange(64), size))
            self.next += size + 64
            length -= size
        if self.rng.random() < 0.01:
            self.next += 1 << 32
        return found

    def request(self, kind: int, sector: int, count: int, start: int, end: int) -> RecordedRequest:
        header = HEADER.pack(kind, 0, sector)
        at, size = sector * SECTOR, count * SECTOR
        if kind == OUT:
            data = self.rng.randbytes(size)
            self.image[at : at + size] = data
            answer = b"\0"
            readable, writable = self.place(16) + self.place(size), self.place(1)
        else:
            data = b""
            answer = bytes(self.image[at : at + size]) + b"\0"
            readable, writable = self.place(16), self.place(size) + self.place(1)
        made = RecordedRequest(
            number=len(self.requests),
            queue=self.rng.randrange(self.queues),
            sequence=len(self.requests),
            operation="write" if kind == OUT else "read",
            offset=at,
            found=start,
            start=start,
            end=end,
            readable=readable,
            writable=writable,
            content=header + data,
            written=len(answer),
            status=0,
            answer=answer,
            answer_hash=None,
        )
        self.requests.append(made)
        return made

    def burst(self, count: int) -> None:
        """Requests that overlap, each of sectors of its own; then nothing for a while."""
        start = self.now
        sectors = self.rng.sample(range(0, SECTORS, 16), count)
        made = [
            self.request(
                self.rng.choice([IN, OUT]), sector, self.rng.randrange(1, 17), start + i, 0
            )
            for i, sector in enumerate(sectors)
        ]
        ends = list(range(start + count + 1, start + 2 * count + 1))
        self.rng.shuffle(ends)
        for each, end in zip(made, ends, strict=True):
            each.end = end
        self.now = start + 3 * count
        if self.iommu and self.rng.random() < 0.7:
            for address, length in made[0].readable + made[-1].writable:
                first = address - address % 4096
                self.revocations.append(Revocation(self.now, first, length + address - first))
                self.now += 1
        self.now += MS

    def script(self, **changes: Any) -> Script:
        order = sorted(self.requests, key=lambda each: each.end)
        values: dict[str, Any] = {
            "requests": self.requests,
            "ends": [each.end for each in order],
            "by_end": [each.number for each in order],
            "revocations": self.revocations,
            "device_id": 2,
            "features": None,
            "iommu": self.iommu,
            "sizes": {0: 128},
            "left_out": {},
        }
        return Script(**values | changes)


def play(
    script: Script,
    path: str,
    iommu: Any = "as-recorded",
    speed: float | None = None,
    timeout: float = 20.0,
    tick: Any = None,
) -> ReplayResult:
    with Frontend(path, timeout=timeout, answer="caller") as frontend:
        whole = _Whole(len(script.requests), 1 << 20)
        player = _Player(script, frontend, iommu, timeout, whole)
        try:
            return player.run(speed, tick)
        finally:
            player.close()


def disk(tmp_path: Path, content: bytes) -> BlockDevice:
    image = tmp_path / "image"
    image.write_bytes(content)
    return BlockDevice(image, num_queues=2)


def tape(seed: int, *, iommu: bool, bursts: int = 40, queues: int = 2) -> Tape:
    made = Tape(seed, iommu=iommu, queues=queues)
    for _ in range(bursts):
        made.burst(made.rng.randrange(1, 16))
    return made


@pytest.mark.parametrize("iommu", ["as-recorded", "off", "strict"])
@pytest.mark.parametrize("recorded", [False, True], ids=["physical", "iommu"])
def test_requests_are_answered_as_they_were(tmp_path: Path, recorded: bool, iommu: Any) -> None:
    made = tape(1, iommu=recorded)
    device = disk(tmp_path, made.start)
    with nothing_left(), serving(device) as path:
        result = play(made.script(), path, iommu)
    device.close()
    assert result.ok, result.text()
    total = len(made.requests)
    assert result.requests == total
    assert result.compared == {"status": total, "length": total, "data": total}
    assert (tmp_path / "image").read_bytes() == made.image
    behind = iommu == "strict" or (recorded and iommu == "as-recorded")
    assert (result.misses > total / 2) is behind
    if behind and iommu == "as-recorded":
        assert result.invalidations == len(made.revocations) > 10
    elif behind:
        assert result.invalidations > 40


class Watch(BlockDevice):
    """A disk that notes how many requests it has at a time, and answers after a while."""

    def __init__(self, image: Path, pause: float = 0.0) -> None:
        super().__init__(image, num_queues=2)
        self.seen: list[tuple[int, int]] = []
        self.pause = pause

    def process(self, queue: int, chain: Any) -> Any:
        self.seen.append((queue, len(chain.readable)))
        if self.pause:
            time.sleep(self.pause)
        return super().process(queue, chain)


def in_turn(count: int, gap_ns: int) -> Tape:
    """Writes of one sector, each followed by a read of it, one at a time."""
    made = Tape(3, iommu=False, queues=2)
    for i in range(count):
        for kind in (OUT, IN):
            made.request(kind, 7, 1, made.now, made.now + 10)
            made.now += gap_ns
        assert i < count
    return made


def test_what_did_not_overlap_does_not(tmp_path: Path) -> None:
    """On two queues, with a thread each: a read sees what was written before, every time."""
    made = in_turn(100, 20)
    device = disk(tmp_path, made.start)
    with nothing_left(), serving(device, queue_threads=True) as path:
        result = play(made.script(), path)
    device.close()
    assert {request.queue for request in made.requests} == {0, 1}
    assert result.ok, result.text()
    assert len({request.answer for request in made.requests[1::2]}) == 100


def test_what_overlapped_may_overlap(tmp_path: Path) -> None:
    made = Tape(4, iommu=False)
    for i in range(32):
        made.request(IN, 8 * i, 1, made.now + i, made.now + 100 + i)
    script = made.script()
    most = []
    with Frontend(*front(tmp_path, made), answer="caller") as frontend:
        player = _Player(script, frontend, "off", 20.0, _Whole(len(script.requests), 1 << 20))
        collect = player._collect

        def watched() -> Any:
            most.append(player._queues[0].ring.outstanding)
            return collect()

        player._collect = watched  # type: ignore[method-assign]
        try:
            assert player.run(None, None).ok
        finally:
            player.close()
    assert max(most) > 8


def front(tmp_path: Path, made: Tape) -> tuple[socket.socket]:
    """A front-end's end of a back-end that serves until that is closed."""
    ours, theirs = socket.socketpair()
    device = disk(tmp_path, made.start)
    backend = Backend(device, theirs)

    def serve() -> None:
        with backend:
            backend.serve()
        device.close()

    threading.Thread(target=serve, daemon=True).start()
    return (ours,)


@pytest.mark.parametrize(("speed", "least", "most"), [(1.0, 0.4, 3.0), (4.0, 0.1, 1.0)])
def test_times_are_kept(tmp_path: Path, speed: float, least: float, most: float) -> None:
    made = in_turn(5, 44_000_000)  # 0.4 s from the first to the last
    device = disk(tmp_path, made.start)
    with serving(device) as path:
        result = play(made.script(), path, speed=speed)
    device.close()
    assert result.ok
    assert result.recorded_seconds == pytest.approx(0.396, abs=0.001)
    assert least * 0.98 < result.seconds < most
    assert result.latest_seconds < 1


class Wrong(BlockDevice):
    """A disk that changes one byte of what is read at an offset, or claims too much."""

    bad = 77 * SECTOR

    def process(self, queue: int, chain: Any) -> Any:
        _, _, sector = HEADER.unpack(bytes(chain.readable.read(0, 16)))
        done = super().process(queue, chain)
        if sector * SECTOR == self.bad and isinstance(done, int) and done > 1:
            chain.writable.write(bytes([chain.writable.read(100, 1)[0] ^ 1]), 100)
        return done


def test_another_answer_is_a_difference(tmp_path: Path) -> None:
    made = Tape(5, iommu=False)
    for sector in (5, 77, 6):
        made.request(IN, sector, 1, made.now, made.now + 5)
        made.now += 10
    made.requests[2].status = 1
    made.requests[0].written += 1
    (tmp_path / "image").write_bytes(made.start)
    device = Wrong(tmp_path / "image")
    with serving(device) as path:
        result = play(made.script(), path)
    device.close()
    assert not result.ok
    assert result.different == 3
    found = [(each.number, each.what) for each in result.differences]
    assert found == [(0, "length"), (1, "data"), (2, "status")]
    data = result.differences[1]
    assert data.offset == 77 * SECTOR
    assert "at byte 100" in data.recorded
    assert data.recorded != data.replayed
    text = result.text()
    assert "3 requests were answered otherwise" in text
    assert "request 1 (read at 0x9a00): data" in text
    assert "status 0, recorded 1" in text


class Forgetful(BlockDevice):
    """A disk that writes no data after the first read, and says that it did."""

    reads = 0

    def process(self, queue: int, chain: Any) -> Any:
        self.reads += 1
        if self.reads > 1:
            chain.writable.write(b"\0", 512)
            return 513
        return super().process(queue, chain)


def test_what_was_there_before_is_no_answer(tmp_path: Path) -> None:
    """Two reads of a sector into the same buffer, of which the second is not written."""
    made = Tape(10, iommu=False)
    first = made.request(IN, 3, 1, made.now, made.now + 5)
    second = made.request(IN, 3, 1, made.now + 10, made.now + 15)
    second.readable, second.writable = first.readable, first.writable
    (tmp_path / "image").write_bytes(made.start)
    device = Forgetful(tmp_path / "image")
    with serving(device) as path:
        result = play(made.script(), path)
    device.close()
    assert [(each.number, each.what) for each in result.differences] == [(1, "data")]
    assert "a5 a5" in result.differences[0].replayed


class Silent(Device):
    """Answers the first requests of a disk, then none."""

    device_id = 2
    num_queues = 1

    def __init__(self, answers: int) -> None:
        self.left = answers
        self.held: list[Any] = []

    def process(self, queue: int, chain: Any) -> Any:
        from concurrent.futures import Future

        self.left -= 1
        if self.left >= 0:
            chain.writable.fill(0, 0, len(chain.writable))
            return len(chain.writable)
        self.held.append(chain)
        return Future()


def test_a_back_end_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    made = Tape(6, iommu=False)
    for _ in range(5):
        made.request(IN, 9, 1, made.now, made.now + 5)
        made.now += 10
    with nothing_left(), serving(Silent(3)) as path:
        began = time.monotonic()
        with pytest.raises(NoAnswerError, match=r"none of 1 requests for 0\.5 s.*request 3 of q"):
            play(made.script(), path, timeout=0.5)
        assert time.monotonic() - began < 10


def test_a_pause_in_the_recording_is_no_silence(tmp_path: Path) -> None:
    made = in_turn(2, 300_000_000)
    device = disk(tmp_path, made.start)
    with serving(device) as path:
        assert play(made.script(), path, speed=0.5, timeout=0.4).ok
    device.close()


def test_a_back_end_that_goes_away_is_said(tmp_path: Path) -> None:
    made = in_turn(5, 100_000_000)
    listener = socket.socket(socket.AF_UNIX)
    path = str(tmp_path / "s")
    listener.bind(path)
    listener.listen()

    def go() -> None:
        listener.accept()[0].close()

    threading.Thread(target=go, daemon=True).start()
    with pytest.raises((PeerGoneError, ConnectionError)):
        play(made.script(), path)
    listener.close()


def test_refused_pages_are_refused_again(tmp_path: Path) -> None:
    made = Tape(7, iommu=True)
    good = made.request(IN, 1, 1, made.now, made.now + 5)
    bad = made.request(IN, 2, 8, made.now + 10, made.now + 20)
    page = bad.writable[0][0] & -4096
    bad.refused = frozenset([page])
    bad.answer, bad.status, bad.written = None, 1, 0
    # What a disk answers whose read meets a page that it may not write.
    device = disk(tmp_path, made.start)
    with serving(device) as path:
        result = play(made.script(), path)
        assert result.misses > 2
        assert [each.number for each in result.differences if each.number == good.number] == []
        found = {(each.number, each.what) for each in result.differences}
        assert (bad.number, "data") not in found
        assert (bad.number, "status") not in found, result.text()
    device.close()


def test_what_the_back_end_cannot_do_is_said_first(tmp_path: Path) -> None:
    made = Tape(8, iommu=True)
    made.request(IN, 1, 1, made.now, made.now + 5)
    device = disk(tmp_path, made.start)
    with serving(device, iommu="off") as path:
        with pytest.raises(DeviceError, match=r"offers no IOMMU .* --iommu off"):
            play(made.script(), path)
        assert play(made.script(), path, "off").ok
        made.requests[0].queue = 5
        with pytest.raises(DeviceError, match="uses 6 queues, the back-end has 2"):
            play(made.script(sizes={}), path, "off")
    device.close()


def test_long_chains_and_many_places(tmp_path: Path) -> None:
    """More pieces than the recorded queue has entries; addresses all over the space."""
    made = Tape(9, iommu=False)
    one = made.request(IN, 1, 16, made.now, made.now + 5)
    data = [(0x1000_0000 * i, 32) for i in range(1, 257)]
    one.writable = [*data, (1 << 41, 1)]
    device = disk(tmp_path, made.start)
    with serving(device) as path:
        result = play(made.script(sizes={0: 16}), path)
        assert result.ok, result.text()
        one.writable[-9:] = [(each << 50, 32) for each in range(1, 9)] + [(9 << 50, 1)]
        with pytest.raises(DeviceError, match=r"span .* bytes of guest memory"):
            play(made.script(), path)
    device.close()


def test_progress_is_told(tmp_path: Path) -> None:
    made = in_turn(4, 60_000_000)
    device = disk(tmp_path, made.start)
    told: list[tuple[int, int]] = []
    with serving(device) as path:
        play(made.script(), path, speed=1.0, tick=lambda *each: told.append(each))
    device.close()
    assert told == sorted(told)
    assert told[-1] == (8, 8)
    assert len(told) > 2
