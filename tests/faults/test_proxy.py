"""A proxy between a front-end and a back-end: what passes, what is seen, and what ends it."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestio import budgets
from guestio.control.client import ControlClient
from guestio.errors import DeviceError, GuestioError
from guestio.faults import Faults, Misbehaving
from guestio.faults.link import Link
from guestio.faults.outcomes import HungUpError
from guestio.faults.proxy import AddonError, Proxy, connection
from guestio.faults.proxy.exchange import Exchange
from guestio.observe import Recorder, open_recording
from guestio.trace import Group, TraceReader, Tracing, What
from guestio.vhost_user.messages import (
    FrontendRequest,
    ProtocolFeature,
    VringState,
    encode_message,
)
from tests.kit.proxying import HandBackend, Proxying
from tests.kit.serving import (
    EVENT_IDX,
    OK,
    Driver,
    Later,
    Mirror,
    Serving,
    nothing_left,
    promptly,
    until,
)

F = FrontendRequest
PATIENCE = 10.0


@pytest.fixture
def front(tmp_path: Path) -> Path:
    return tmp_path / "front"


@pytest.fixture
def back(tmp_path: Path) -> Path:
    return tmp_path / "back"


@pytest.fixture
def serving(back: Path) -> Iterator[Serving]:
    with nothing_left(), Serving(Mirror(), back) as serving:
        yield serving


def lines(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(each.getMessage() for each in caplog.records)


# What passes


@pytest.mark.parametrize("notifications", ["watch", "between", "relay"])
@pytest.mark.parametrize("iommu", [False, True])
@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_requests_pass_and_are_seen(
    serving: Serving, front: Path, notifications: Any, iommu: bool, features: int
) -> None:
    with (
        Tracing(Group.ALL),
        TraceReader() as reader,
        Proxying(front, serving.path, notifications=notifications) as proxying,
    ):
        with Driver(front, queues=2, iommu=iommu, features=features) as driver:
            for number in range(100):
                source = b"request %d" % number
                assert driver.run(number % 2, source) == (OK, source[::-1])
            queues = proxying.proxy.status()["queues"]
            assert [each["size"] for each in queues] == [64, 64]
            assert all(each["running"] for each in queues)
            assert [driver.stop(index) for index in (0, 1)] == [50, 50]
        proxying.let_go()
        records = reader.read().records
        origin = proxying.proxy.origin
    assert proxying.stats.requests == proxying.stats.completed == 100
    assert proxying.stats.violations == 0
    assert serving.stats.requests == 100
    mine = records[records["origin"] == origin]
    taken = mine[mine["what"] == What.TAKEN]
    completed = mine[mine["what"] == What.COMPLETED]
    assert len(taken) == len(completed) == 100
    known = taken[taken["result"] >= 0]
    assert len(known) == 100 - proxying.stats.unseen_requests
    if notifications != "watch":
        assert len(known) == 100
        assert proxying.stats.kicks >= 100
    # A request's answer and its status.
    assert all(each["detail"] == each["length"] + 1 for each in known)
    assert set(completed["length"] - 1) == {9, 10}
    if iommu and notifications == "relay":
        # The proxy itself answers what is asked about its rings.
        assert serving.stats.iotlb_updates > proxying.stats.iotlb_updates > 0
    elif iommu:
        assert proxying.stats.iotlb_misses == serving.stats.iotlb_misses > 0
        assert proxying.stats.iotlb_updates == serving.stats.iotlb_updates > 0


def test_translations_that_are_revoked_are_known_no_more(serving: Serving, front: Path) -> None:
    with Proxying(front, serving.path) as proxying, Driver(front, iommu=True) as driver:
        driver.run(0, b"some")
        at = driver.at(driver.buffer(0, 0))
        assert proxying.proxy.explain(at)["read"] == "succeeds"
        driver.frontend.iotlb.unmap((at, 4096))
        assert proxying.proxy.explain(at)["read"].startswith("waits")
        assert proxying.stats.iotlb_invalidations == 1


@pytest.mark.parametrize("notifications", ["between", "relay"])
def test_stops_and_starts_pass_with_their_positions(
    serving: Serving, front: Path, notifications: Any
) -> None:
    with Proxying(front, serving.path, notifications=notifications) as proxying:
        with Driver(front) as driver:
            for count in range(1, 4):
                driver.run(0, b"once")
                assert driver.stop(0) == count
                # The answer may be there before the proxy has noted it.
                until(lambda: not proxying.proxy.status()["queues"][0]["running"])
                driver.start(0, count)
        assert proxying.stats.violations == 0
        proxying.let_go()
    assert proxying.stats.requests == 3


def test_configuration_notes_and_the_back_ends_channel_pass(serving: Serving, front: Path) -> None:
    with Proxying(front, serving.path) as proxying:
        with Driver(front, inflight=True) as driver:
            assert driver.frontend.get_config(0, 64) == bytes(range(64))
            driver.frontend.set_config(3, b"\xff")
            assert driver.frontend.get_config(3, 1) == b"\xff"
            assert driver.run(0, b"noted") == (OK, b"deton")
            changes = serving.stats.config_changes
            serving.backend._host.config_changed()
            until(lambda: serving.stats.config_changes > changes)
        proxying.let_go()
        assert proxying.stats.violations == 0
        assert "inflight" not in str(proxying.proxy.status()["faults"])


def test_the_status_is_that_of_a_server(front: Path, back: Path, tmp_path: Path) -> None:
    control = tmp_path / "control"
    with (
        Serving(Mirror(), back),
        Proxying(front, back, device="rng", control=control) as proxying,
    ):
        client = ControlClient(control)
        assert client.status()["peer"] is None
        with Driver(front) as driver:
            driver.run(0, b"some")
            status = client.status()
            assert status["peer"] is not None
            assert "VERSION_1" in status["peer"]["features"]
            assert "REPLY_ACK" in status["peer"]["protocol_features"]
            assert status["memory"][0]["length_bytes"] == Driver.SIZE
            until(lambda: client.status()["queues"][0]["completed"] == 1)
            assert client.status()["queues"][0]["latency"]["other"]["count"] == 1
        assert status["device"]["kind"] == "rng"
        assert b"guestio_queue_requests_completed_total" in client.get("/metrics")
        proxying.let_go()


def test_every_question_is_answered_as_without_a_proxy(serving: Serving, front: Path) -> None:
    questions = (F.GET_FEATURES, F.GET_PROTOCOL_FEATURES, F.GET_QUEUE_NUM, F.GET_MAX_MEM_SLOTS)
    answers = []
    with Proxying(front, serving.path, strict=True) as proxying:
        for path in (serving.path, front):
            link = Link.connect(str(path), PATIENCE)
            found = []
            for question in questions:
                found.append(link.u64(question))
                if question == F.GET_PROTOCOL_FEATURES:
                    link.do(F.SET_PROTOCOL_FEATURES, struct.pack("=Q", found[-1]))
                    link.protocol = found[-1]
            link.do(F.SET_OWNER)
            link.close()
            serving.let_go()
            answers.append(found)
        assert answers[0] == answers[1]
        assert proxying.stats.violations == 0


def test_what_passes_is_recorded(serving: Serving, front: Path, tmp_path: Path) -> None:
    file = tmp_path / "recording"
    with (
        Proxying(front, serving.path, device="rng", notifications="between") as proxying,
        Recorder(proxying.proxy, file),
        Driver(front) as driver,
    ):
        for _ in range(20):
            driver.run(0, b"recorded")
    with open_recording(file) as recording:
        requests = recording.requests()
        assert requests.num_rows == 20
        assert set(requests["readable"].to_pylist()) == {8}


# Ends


def test_the_back_end_goes_and_comes_back(front: Path, back: Path) -> None:
    with nothing_left(), Proxying(front, back) as proxying:
        for _ in range(2):
            with Serving(Mirror(), back), Driver(front) as driver:
                driver.run(0, b"some")
                # Both go at once: the front-end is cut when its back-end is gone.
                proxying.proxy.loop.call_soon_threadsafe(lambda: None)
            proxying.let_go()
        assert proxying.stats.connections == 2


def test_a_front_end_is_cut_when_its_back_end_hangs_up(front: Path, back: Path) -> None:
    with nothing_left(), HandBackend(back) as hand, Proxying(front, back) as proxying:
        link = Link.connect(str(front), PATIENCE)
        hand.accept()
        link.request(F.GET_FEATURES)
        with hand.receive():
            pass
        # What it said before arrives.
        hand.reply(F.GET_FEATURES, 5)
        hand.hang_up()
        assert link.receive().u64 == 5
        assert link.closed(PATIENCE)
        link.close()
        proxying.let_go()


def test_a_front_end_waits_for_a_back_end_that_starts(front: Path, back: Path) -> None:
    with nothing_left(), Proxying(front, back) as proxying:
        link = Link.connect(str(front), PATIENCE)
        link.request(F.GET_FEATURES)
        time.sleep(0.2)
        with Serving(Mirror(), back):
            assert link.receive().u64
            link.close()
            proxying.check_serves()


def test_a_front_end_is_cut_where_no_back_end_comes(
    front: Path, back: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "PROXY_CONNECT_SECONDS", 0.2)
    with nothing_left(), Proxying(front, back) as proxying:
        link = Link.connect(str(front), PATIENCE)
        assert link.closed(PATIENCE)
        link.close()
        assert f"no back-end at {back}" in lines(caplog)
        proxying.let_go()
        with Serving(Mirror(), back):
            proxying.check_serves()


def test_a_half_message_does_not_hold_the_proxy(serving: Serving, front: Path) -> None:
    with Proxying(front, serving.path) as proxying:
        link = Link.connect(str(front), PATIENCE)
        link.send(encode_message(F.SET_FEATURES, bytes(8))[:15])
        with promptly(budgets.HALF_MESSAGE_TIMEOUT + 0.5):
            assert link.closed(PATIENCE)
        link.close()
        proxying.check_serves()


def test_a_flood_of_requests_is_held_back_and_cut(
    front: Path, back: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with nothing_left(), HandBackend(back) as hand, Proxying(front, back) as proxying:
        link = Link.connect(str(front), PATIENCE)
        hand.accept()
        with pytest.raises(HungUpError):
            for _ in range(100_000):
                link.request(F.GET_FEATURES)
                if not _ % 50:
                    while hand.channel is not None and (message := hand.channel.recv()):
                        message.close()
        link.close()
        proxying.let_go()
        assert "wait for their answers" in lines(caplog)


def test_descriptors_that_are_none_are_refused_and_closed(serving: Serving, front: Path) -> None:
    with Proxying(front, serving.path) as proxying:
        for request in (F.SET_BACKEND_REQ_FD, F.SET_MEM_TABLE, F.SET_VRING_KICK, F.SET_LOG_BASE):
            link = Link.connect(str(front), PATIENCE)
            ours, theirs = os.pipe()
            link.u64(F.GET_FEATURES)
            link.send(encode_message(request, bytes(8)), [ours, theirs] * 4)
            os.close(ours)
            os.close(theirs)
            assert link.closed(PATIENCE)
            link.close()
            proxying.let_go()
        proxying.check_serves()


def test_what_cannot_be_followed_is_not_offered(front: Path, back: Path) -> None:
    with nothing_left(), HandBackend(back) as hand, Proxying(front, back) as proxying:
        link = Link.connect(str(front), PATIENCE)
        hand.accept()
        link.request(F.GET_PROTOCOL_FEATURES)
        with hand.receive():
            pass
        hand.reply(F.GET_PROTOCOL_FEATURES, (1 << 24) - 1)
        hidden = (
            ProtocolFeature.PAGEFAULT | ProtocolFeature.XEN_MMAP | ProtocolFeature.GPA_ADDRESSES
        )
        assert link.receive().u64 == ((1 << 24) - 1) & ~int(hidden)
        link.close()
        proxying.let_go()


# Rules that are broken


def test_strict_cuts_a_front_end_before_the_back_end_sees_it(
    front: Path, back: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with nothing_left(), HandBackend(back) as hand, Proxying(front, back, strict=True) as proxying:
        link = Link.connect(str(front), PATIENCE)
        hand.accept()
        link.request(F.SET_VRING_NUM, VringState(0, 3))
        assert link.closed(PATIENCE)
        with pytest.raises(GuestioError):
            hand.receive()
        link.close()
        assert "the front-end broke the protocol: SET_VRING_NUM" in lines(caplog)
        assert "power of two" in lines(caplog)
        assert proxying.stats.violations == 1
        proxying.let_go()


def test_otherwise_it_is_counted_and_passed_on(front: Path, back: Path) -> None:
    with nothing_left(), HandBackend(back) as hand, Proxying(front, back) as proxying:
        link = Link.connect(str(front), PATIENCE)
        hand.accept()
        link.request(F.SET_VRING_NUM, VringState(0, 3))
        with hand.receive() as message:
            assert message.request == F.SET_VRING_NUM
            assert message.payload == VringState(0, 3).encode()
        assert proxying.stats.violations == 1
        link.close()
        proxying.let_go()


@pytest.mark.parametrize(
    ("asked", "request_", "payload", "fds", "why"),
    [
        (F.GET_FEATURES, F.GET_QUEUE_NUM, bytes(8), 0, "nothing asked"),
        (F.GET_FEATURES, F.GET_FEATURES, bytes(4), 0, "4 bytes, not 8"),
        (F.GET_FEATURES, F.GET_FEATURES, bytes(8), 1, "1 descriptors"),
        (F.GET_VRING_BASE, F.GET_VRING_BASE, bytes([1, 0, 0, 0, 0, 0, 0, 0]), 0, "another ring"),
    ],
)
def test_strict_cuts_a_back_end(
    front: Path,
    back: Path,
    caplog: pytest.LogCaptureFixture,
    asked: F,
    request_: F,
    payload: bytes,
    fds: int,
    why: str,
) -> None:
    with nothing_left(), HandBackend(back) as hand, Proxying(front, back, strict=True) as proxying:
        link = Link.connect(str(front), PATIENCE)
        hand.accept()
        link.request(asked, bytes(8) if asked == F.GET_VRING_BASE else b"")
        with hand.receive():
            pass
        null = os.open(os.devnull, os.O_RDONLY)
        hand.reply(request_, payload, (null,) * fds)
        os.close(null)
        assert link.closed(PATIENCE)
        link.close()
        assert "the back-end broke the protocol" in lines(caplog)
        assert why in lines(caplog)
        proxying.let_go()


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("wrong-head", "names descriptor"),
        ("duplicate-completion", "used index"),
        ("index-jump=100", "ahead of the available index"),
        ("used-length=4000", "has room for"),
    ],
)
def test_strict_cuts_at_a_devices_lie_in_its_ring(
    front: Path, back: Path, caplog: pytest.LogCaptureFixture, rule: str, why: str
) -> None:
    device = Misbehaving(Mirror(), [f"{rule} nth=3"])
    with (
        nothing_left(),
        Serving(device, back),
        Proxying(front, back, strict=True) as proxying,
    ):
        with Driver(front) as driver:
            driver.run(0, b"one")
            driver.run(0, b"two")
            driver.submit(0, b"three")
            until(lambda: proxying.stats.violations == 1)
        assert "the device broke the protocol: queue 0: " in lines(caplog)
        assert why in lines(caplog)
        proxying.check_serves()


# Rules by which it goes wrong


def test_notifications_are_dropped_and_delayed(serving: Serving, front: Path) -> None:
    faults = Faults(["skip-interrupt nth=1", "late-kick=300ms queue=1"])
    with Proxying(front, serving.path, faults=faults) as proxying:
        with Driver(front, queues=2) as driver:
            number = driver.submit(0, b"silent")
            driver.wait(0, number)
            assert not driver.handles[0].wait_call(0.2)
            number = driver.submit(0, b"aloud")
            assert driver.handles[0].wait_call(PATIENCE)
            started = time.monotonic()
            driver.run(1, b"late")
            assert time.monotonic() - started >= 0.3
            proxying.proxy.faults.off(2)  # type: ignore[union-attr] # it has them
            faults.on("skip-kick once")
            number = driver.submit(0, b"lost")
            time.sleep(0.2)
            assert not driver.done(0, number)
            driver.handles[0].kick()
            driver.wait(0, number)
        assert [each.struck for each in faults.counts()] == [1, 1]
        proxying.check_serves()


def test_answers_go_wrong(serving: Serving, front: Path) -> None:
    faults = Faults()
    with Proxying(front, serving.path, faults=faults) as proxying:
        link = Link.connect(str(front), PATIENCE)
        honest = link.u64(F.GET_FEATURES)
        faults.on("bad-reply op=GET_FEATURES once")
        assert (link.u64(F.GET_FEATURES) ^ honest).bit_count() == 1
        faults.on("slow=300ms op=GET_FEATURES once")
        started = time.monotonic()
        link.request(F.GET_FEATURES)
        link.request(F.GET_QUEUE_NUM)
        # Nothing overtakes what waits.
        assert [link.receive().request, link.receive().request] == [
            F.GET_FEATURES,
            F.GET_QUEUE_NUM,
        ]
        assert time.monotonic() - started >= 0.3
        faults.on("wrong-fds op=GET_FEATURES once")
        assert len(link.ask(F.GET_FEATURES).fds) == 1
        faults.on("no-reply op=GET_FEATURES once")
        link.request(F.GET_FEATURES)
        link.request(F.GET_QUEUE_NUM)
        assert link.receive().request == F.GET_QUEUE_NUM
        faults.on("hang-up op=GET_QUEUE_NUM once")
        link.request(F.GET_QUEUE_NUM)
        assert link.closed(PATIENCE)
        link.close()
        proxying.check_serves()


def test_a_back_ends_miss_goes_wrong(serving: Serving, front: Path) -> None:
    faults = Faults(["hang-up op=BACKEND_IOTLB_MSG"])
    with Proxying(front, serving.path, faults=faults) as proxying:
        with Driver(front, iommu=True, map_all=False) as driver:
            driver.submit(0, b"asks")
            until(lambda: faults.counts()[0].struck == 1)
        faults.off(1)
        proxying.check_serves()


def test_rules_that_a_proxy_cannot_obey_are_refused(front: Path, back: Path) -> None:
    for rule, why in (
        ("error", "a proxy does not make requests"),
        ("hang-up op=NONSENSE", "vhost-user has no 'NONSENSE'"),
    ):
        with pytest.raises(ValueError, match=why):
            Proxy(front, back, faults=Faults([rule]))
    with pytest.raises(ValueError, match="only `guestio proxy`"):
        Misbehaving(Mirror(), ["skip-kick"])
    assert not front.exists()


# Addons


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "addon.py"
    path.write_text(text)
    return str(path)


def test_an_addon_sees_requests_before_the_device_and_completions_before_the_driver(
    front: Path, back: Path, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    addon = write(
        tmp_path,
        f"""
def tell(*what):
    with open({str(told)!r}, "a") as file:
        print(*what, file=file)
def request(r):
    tell("request", r.queue, r.known, r.read(), r.writable)
def completion(c):
    tell("completion", c.written, c.read(), c.seconds > 0, c.request.readable)
""",
    )
    with nothing_left(), Serving(Later(), back), Proxying(front, back, addons=[addon]) as proxying:
        with Driver(front, queues=2) as driver:
            number = driver.submit(0, b"LATE")
            until(told.exists)
            # On another queue: what follows at once on the same one the device may find as well.
            driver.submit(1, b"FINISHLATE")
            driver.wait(0, number)
        proxying.let_go()
    assert told.read_text().splitlines()[:2] == [
        "request 0 True b'LATE' 5",
        "request 1 True b'FINISHLATE' 11",
    ]
    assert "completion 5 b'ETALU' True 4" in told.read_text()


def test_an_addon_changes_drops_and_answers_messages(
    serving: Serving, front: Path, tmp_path: Path
) -> None:
    addon = write(
        tmp_path,
        """
def message(m):
    if m.name == "GET_FEATURES" and m.reply:
        m.number |= 1 << 40
    if m.name == "RESET_OWNER":
        m.drop()
    if m.name == "GET_QUEUE_NUM" and not m.reply:
        m.answer(77)
""",
    )
    with Proxying(front, serving.path, addons=[addon]) as proxying:
        link = Link.connect(str(front), PATIENCE)
        link.request(F.GET_FEATURES)
        link.request(F.GET_QUEUE_NUM)
        link.request(F.GET_PROTOCOL_FEATURES)
        # Its answer waits for those before it.
        first, second, third = (link.receive() for _ in range(3))
        assert first.request == F.GET_FEATURES
        assert first.u64 >> 40 & 1
        assert (second.request, second.u64) == (F.GET_QUEUE_NUM, 77)
        assert third.request == F.GET_PROTOCOL_FEATURES
        assert not third.u64 & ProtocolFeature.PAGEFAULT
        link.request(F.RESET_OWNER)
        link.close()
        proxying.check_serves()
        assert proxying.stats.violations == 0


def test_an_addons_errors_are_named_and_end_nothing(
    serving: Serving, front: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    addon = write(
        tmp_path,
        """
import sys
def message(m):
    if m.name == "GET_FEATURES":
        m.payload = "text"
def request(r):
    sys.exit(3)
def completion(c):
    raise KeyError("line 9")
def fault(f):
    pass
""",
    )
    with Proxying(front, serving.path, addons=[addon]) as proxying:
        proxying.check_serves()
        assert proxying.stats.addon_errors >= 3
    said = lines(caplog)
    assert f"the addon's completion failed: {addon}, line 9: KeyError" in said
    assert f"the addon's request failed: {addon}, line 7: SystemExit" in said
    assert "the addon's message failed" in said


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("def message(m:\n", "line 1: SyntaxError"),
        ("x = 1\n1 / 0\n", "line 2: ZeroDivisionError"),
        ("x = 1\n", "is no addon"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_addon_is_refused(
    front: Path, back: Path, tmp_path: Path, text: str | None, why: str
) -> None:
    path = str(tmp_path / "none.py") if text is None else write(tmp_path, text)
    with pytest.raises(AddonError, match=why):
        Proxy(front, back, addons=[path])
    assert not front.exists()


def test_answers_keep_their_order() -> None:
    sent: list[bytes] = []
    exchange = Exchange(lambda data, _: sent.append(data))
    exchange.expect(1, "one", b"", certain=True)
    exchange.answer(2, "two", b"2")
    exchange.expect(22, "iotlb", b"", certain=False)
    exchange.expect(3, "three", b"", certain=True)
    assert not sent
    asked, skipped = exchange.match(1)
    assert asked is not None
    assert asked.name == "one"
    assert skipped is None
    assert not sent
    exchange.settle()
    assert sent == [b"2"]
    # One that need not be answered was not.
    asked, skipped = exchange.match(3)
    assert asked is not None
    assert skipped is None
    assert exchange.match(3) == (None, None)
    exchange.expect(1, "one", b"", certain=True)
    exchange.expect(3, "three", b"", certain=True)
    asked, skipped = exchange.match(3)
    assert skipped is not None
    assert skipped.name == "one"


# The command


def test_the_command_ends_in_time_and_leaves_nothing(
    serving: Serving, front: Path, tmp_path: Path
) -> None:
    control = tmp_path / "control"
    words = ["proxy", "--listen", front, "--connect", serving.path, "--control", control]
    with subprocess.Popen(
        [sys.executable, "-m", "guestio", *words, "--fault", "none"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"listening on {front}\n"
        with Driver(front) as driver:
            assert driver.run(0, b"some") == (OK, b"emos")
            client = ControlClient(control)
            assert client.status()["counts"]["requests"] == 1
            with promptly(2.0):
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
        assert "requests=1 completed=1" in process.stderr.read()
    assert not front.exists()
    assert not control.exists()


def test_bad_arguments_are_one_line_and_status_2(front: Path, back: Path) -> None:
    with pytest.raises(ValueError, match="not passed on"):
        Proxy(front, back, faults=Faults(), notifications="watch")
    with pytest.raises(DeviceError, match="longer than 107 bytes"):
        Proxy(front, "/" + 107 * "x")
    command = ["proxy", "--listen", str(front), "--connect", str(back), "--fault", "error"]
    ended = subprocess.run(
        [sys.executable, "-m", "guestio", *command],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "a proxy does not make requests" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not front.exists()
