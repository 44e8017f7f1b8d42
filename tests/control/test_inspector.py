"""The inspector in a real browser: what it shows, obeys, survives and draws."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestio.addr import Permissions
from guestio.control.client import ControlClient
from guestio.guest.load import Load
from guestio.guest.plan import LoadPlan
from guestio.virtio.blk import BlockDevice
from tests.kit.browser import Browser, Keys, open_browser
from tests.kit.serving import Driver, Mirror, Serving, until

SIZE = 16 << 20
PICTURES = Path(__file__).parents[2] / "docs" / "images"
WANTED = "GUESTIO_SCREENSHOTS" in os.environ
"""Whether the pictures of the documents are taken anew."""

MAP = '[data-of="addresses"] canvas'
READ = '[data-of="addresses"] output'
MEMORY = '[data-of="memory"] canvas'
HOSTILE = "<img src=x onerror=struck=1>&lt;b\u202e"


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def browser(started: Browser) -> Iterator[Browser]:
    """The browser; at the end its console had nothing to complain about."""
    started.leave()
    yield started
    assert started.leave() == []


class Disk:
    """A disk that is served, watched at a Unix socket and over TCP."""

    def __init__(self, serving: Serving, client: ControlClient) -> None:
        self.serving, self.client = serving, client
        control = serving.backend.control
        assert control is not None
        self.url = f"http://{control.http}/"


@pytest.fixture
def disk(browser: Browser, tmp_path: Path) -> Iterator[Disk]:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(SIZE))
    device = BlockDevice(image)
    try:
        options = {"control": tmp_path / "control", "http": "127.0.0.1:0", "track_dirty": True}
        with Serving(device, tmp_path / "disk.sock", **options) as serving:
            yield Disk(serving, ControlClient(tmp_path / "control", timeout=30))
            # Before the server ends, which the console would complain about.
            assert browser.leave() == []
    finally:
        device.close()


def live(browser: Browser, state: str = "live") -> None:
    browser.until(f"document.documentElement.dataset.state === '{state}'")


def updates(browser: Browser) -> int:
    return int(browser.data("html").get("updates", 0))


def next_update(browser: Browser, times: int = 1) -> None:
    before = updates(browser)
    browser.until(f"document.documentElement.dataset.updates >= {before + times}")


def tile(browser: Browser, name: str) -> str:
    return browser.text(f'#tiles [data-name="{name}"] dd')


def settled(disk: Disk) -> Any:
    """The status once nothing is under way."""
    found = [disk.client.status()]

    def stands() -> bool:
        found.append(disk.client.status())
        return found[-1]["counts"] == found[-2]["counts"]

    until(stands)
    return found[-1]


def test_it_shows_what_the_status_says(browser: Browser, disk: Disk) -> None:
    with Load(str(disk.serving.path), LoadPlan(workload="randrw", depth=8, iommu="strict")) as load:
        browser.open(disk.url)
        live(browser)
        load.run_requests(400)
        status = settled(disk)
        done = f"{status['queues'][0]['completed']:,}"
        browser.until_so(lambda: tile(browser, "Completed") == f"{done}in all", "all are counted")
        next_update(browser)
        # Every count, fault and limit.
        shown = {row[0].replace(" ", "_"): row[1] for row in browser.rows("#count-table")}
        assert shown == {name: f"{count:,}" for name, count in status["counts"].items()}
        shown = {row[0].replace(" ", "_"): row[1] for row in browser.rows("#fault-table")}
        assert shown == {name: f"{count:,}" for name, count in status["faults"].items()}
        limits = {row[0].replace(" ", "_"): row[2] for row in browser.rows("#budget-table")}
        assert limits == {name: f"{each['limit']:,}" for name, each in status["budgets"].items()}
        (row,) = browser.rows("#queue-table")
        queue = status["queues"][0]
        names = ("index", "size", "next_avail", "depth", "held", "taken", "completed")
        assert [row[0], *row[2:8]] == [f"{queue[name]:,}" for name in names]
        assert row[1] == "running"
        # Features by name, each with its place in the specification.
        names = "return [...document.querySelectorAll(arguments[0])].map(li => li.dataset.name)"
        assert browser.run(names, "#features li") == status["peer"]["features"]
        assert browser.run(names, "#protocol-features li") == status["peer"]["protocol_features"]
        links = "return [...document.querySelectorAll('.names a')].map(a => a.href)"
        assert all(":~:text=V" in link for link in browser.run(links))
        assert browser.text("#device") == "BlockDevice over vhost-user"
        assert f"process {os.getpid()}" in browser.text("#where")
        assert tile(browser, "Faults") == "0"
        events = {row[1] for row in browser.rows("#event-table")}
        assert events <= {
            "message",
            "dirty bits harvested",
            "harvest",
            "queue started",
            "queue stopped",
        }


def test_it_follows_what_happens(browser: Browser, disk: Disk) -> None:
    browser.open(disk.url)
    live(browser, "idle")
    assert browser.text("#features-none") == "No front-end has negotiated any."
    browser.until(
        "document.querySelectorAll('.map .empty')[0].textContent === 'Nothing is mapped.'"
    )
    with Load(str(disk.serving.path), LoadPlan(workload="randrw", depth=8, iommu="strict")) as load:
        live(browser)
        browser.run("document.getElementById('follow').click()")
        browser.until("document.getElementById('capture-note').textContent.startsWith('following')")

        def drawn() -> bool:
            load.run_requests(50)
            return browser.run(
                "return document.getElementById('latency').dataset.cells > 0 &&"
                " document.getElementById('timeline').dataset.requests > 20 &&"
                " document.getElementById('timeline').dataset.marks > 20 &&"
                " /read [1-9].* write [1-9]/.test(document.getElementById('iops-read').textContent)"
            )

        browser.until_so(drawn, "requests, latencies and translations are drawn")
        assert "within" in browser.text("#latency-read")
        browser.press("#timeline", Keys.ARROW_RIGHT)
        assert "given back after" in browser.text("#timeline-read")
        browser.run("document.getElementById('follow').click()")
        until(lambda: "requests" not in disk.client.status()["trace"]["groups"])
        # Of memory, what was written.
        browser.run("document.getElementById('memory').scrollIntoView()")
        browser.until(f"document.querySelector('{MEMORY}').dataset.entries > 0")
        dirty = disk.client.status()["dirty"]["pages"]
        assert dirty > 0
        found = browser.run(
            "return fetch('/map?address=0&length=0x1000000000&parts=1024&of=memory')"
            ".then(answer => answer.json())"
        )
        assert sum(found["dirty_pages"]) == dirty
    live(browser, "idle")


def test_it_pauses_and_goes_on(browser: Browser, disk: Disk) -> None:
    browser.open(disk.url)
    live(browser, "idle")
    until(lambda: browser.data("html").get("updates", "0") > "1")
    browser.press("body", "p")
    live(browser, "paused")
    before = updates(browser)
    browser.until_so(lambda: not streams(disk), "no stream is open while it is paused")
    assert browser.run("return new Promise(done => setTimeout(() => done(1), 2500))")
    assert updates(browser) == before
    browser.press("body", "p")
    live(browser, "idle")
    next_update(browser)


def streams(disk: Disk) -> list[Any]:
    """Connections on which events are sent."""
    control = disk.serving.backend.control
    assert control is not None
    return [
        each
        for server, _ in control._servers
        for each in list(server.server_state.connections)
        if each.streaming
    ]


def test_it_is_used_by_keyboard(browser: Browser, disk: Disk) -> None:
    with Load(str(disk.serving.path), LoadPlan(workload="randrw", depth=8, iommu="static")) as load:
        load.run_requests(50)
        browser.open(disk.url)
        live(browser)
        # The first stop of Tab leads past everything.
        browser.press("body", Keys.TAB)
        assert browser.run("return document.activeElement.className") == "skip"
        browser.press("body", "?")
        assert not browser.run("return document.getElementById('keys').hidden")
        for number, section in ((7, "faults"), (4, "addresses")):
            browser.press("body", str(number))
            assert browser.run("return document.activeElement.id") == f"{section}-title"
        browser.until(f"document.querySelector('{MAP}').dataset.bits < 64")
        fitted = browser.data(MAP)
        browser.press(MAP, "-")
        browser.until(f"document.querySelector('{MAP}').dataset.bits == {fitted['bits']} + 4")
        browser.press(MAP, Keys.HOME)
        browser.until(f"document.querySelector('{MAP}').dataset.bits == {fitted['bits']}")
        browser.until(f"document.querySelector('{MAP}').dataset.cells > 0")
        # To the first cell that is not empty, and what it leads to.
        start, length = int(fitted["start"], 16), 1 << int(fitted["bits"])
        index = json.loads(disk.client.get(f"/map?address={start}&length={length}&parts=1024"))[
            "cells"
        ]["index"][0]
        browser.press(MAP, Keys.ARROW_RIGHT, *[Keys.ARROW_DOWN] * (index // 64))
        browser.press(MAP, *[Keys.ARROW_RIGHT] * (index % 64))
        address = start + index * length // 1024
        browser.until_so(
            lambda: browser.text(READ).startswith(f"{address:#x} to"), f"{address:#x} is selected"
        )
        assert "mapping" in browser.text(READ)
        browser.press(MAP, "e")
        browser.until("document.querySelector('#explanation table')")
        said = browser.text("#explanation")
        mapping = disk.client.explain(address, length // 1024)["mapped"][0]
        assert f"{mapping['target']:#x}" in said
        # Down to a page, and no further.
        for _ in range(6):
            browser.press(MAP, Keys.ENTER)
        browser.until(f"document.querySelector('{MAP}').dataset.bits === '12'")
        unlabelled = browser.run(
            "return [...document.querySelectorAll('canvas, input, button, [tabindex]')].filter(e =>"
            " !e.getAttribute('aria-label') && !e.textContent.trim() && !e.labels?.length"
            " && e.id !== 'main').map(e => e.outerHTML)"
        )
        assert unlabelled == []


CONTRAST = """
const level = (text) => {
  const parts = text.match(/[0-9.]+/g).slice(0, 3).map((c) => {
    const share = c / 255;
    return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor;
    if (!color.endsWith(", 0)") && color !== "transparent") return color;
  }
  return "rgb(255, 255, 255)";
};
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !element.offsetParent) continue;
  const [a, b] = [level(getComputedStyle(element).color), level(behind(element))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) found.push(`${element.tagName} ${element.textContent.slice(0, 30)} ${ratio}`);
}
return found;
"""


@pytest.mark.parametrize("dark", [False, True])
def test_it_is_readable_in_both_themes_and_widths(
    browser: Browser, disk: Disk, *, dark: bool
) -> None:
    with Load(str(disk.serving.path), LoadPlan(workload="randrw", depth=8, iommu="static")) as load:
        browser.open(disk.url, width=390, height=800, dark=dark)
        live(browser)
        load.run_requests(100)
        browser.run(
            "document.getElementById('capture').click(); document.getElementById('help').click()"
        )
        load.run_requests(100)
        next_update(browser, 2)
        for width in (390, 1280):
            browser.resize(width, 900)
            wide = browser.run("return document.documentElement.scrollWidth")
            assert wide == width, f"{wide} pixels do not fit in {width}"
            assert browser.run(CONTRAST) == []
        shade = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert (shade == "rgb(15, 21, 27)") is dark
        # The switch is stronger than the system, and is kept.
        browser.press("body", "t", *([] if dark else ["t"]))
        other = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert other != shade
        browser.driver.refresh()
        live(browser)
        assert browser.run("return getComputedStyle(document.body).backgroundColor") == other


def test_text_of_others_is_text(browser: Browser, tmp_path: Path) -> None:
    kind = type(HOSTILE, (Mirror,), {})
    path = tmp_path / HOSTILE
    options = {"http": "127.0.0.1:0", "control": tmp_path / "control"}
    with Serving(kind(), path, **options) as serving:
        control = serving.backend.control
        assert control is not None
        browser.open(f"http://{control.http}/")
        live(browser, "idle")
        assert browser.text("#device").startswith(HOSTILE)
        assert HOSTILE in browser.text("#where")
        with Driver(path) as driver:
            # A broken queue says why.
            driver.rings[0].offer(0xFFFF)
            driver.handles[0].kick()
            until(lambda: ControlClient(tmp_path / "control").status()["queues"][0]["broken"])
            browser.until("document.querySelector('#queue-table .bad')")
            browser.run(
                "return import('/page/format.js').then(({ fill, element }) => {"
                "  const table = element('table', {}, element('thead'), element('tbody'));"
                "  fill(table, [{ name: arguments[0] }],"
                "    [[arguments[0]], [{ text: arguments[0] }]]);"
                "  document.body.append(table);"
                "})",
                HOSTILE,
            )
        assert browser.run("return document.querySelectorAll('img').length") == 0
        assert browser.run("return window.struck") is None
        assert browser.problems() == []
        # And if there were a hole, the policy would close it.
        browser.run("document.body.insertAdjacentHTML('beforeend', arguments[0])", HOSTILE)
        browser.until("document.querySelectorAll('img').length === 1")
        browser.until_so(lambda: "Content Security Policy" in str(browser.problems()), "refused")
        assert browser.run("return window.struck") is None
        browser.leave()


DRAW = """
const canvas = document.querySelector(arguments[0]);
const calls = { fillRect: 0, strokeRect: 0, fillText: 0, stroke: 0 };
const kept = {};
for (const name of Object.keys(calls)) {
  kept[name] = CanvasRenderingContext2D.prototype[name];
  CanvasRenderingContext2D.prototype[name] = function (...all) {
    calls[name] += 1;
    return kept[name].apply(this, all);
  };
}
canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
Object.assign(CanvasRenderingContext2D.prototype, kept);
return { ...calls, ...canvas.dataset };
"""


def test_a_million_translations_are_drawn(browser: Browser, disk: Disk) -> None:
    entries = 10**6
    with Driver(disk.serving.path, iommu=True):
        connection: Any = disk.serving.backend._connection
        table = connection._translator.iotlb._map
        before = len(table)
        for i in range(entries):
            # Neither neighbors nor alike, so that none is joined to another.
            table.overwrite(0x1_0000_0000 + (i << 13), 4096, i << 12, Permissions(1 + i % 3))
        assert len(table) == before + entries
        browser.open(disk.url)
        live(browser)
        browser.run("document.getElementById('addresses').scrollIntoView()")
        browser.until(f"document.querySelector('{MAP}').dataset.cells > 200")
        drawn = browser.run(DRAW, MAP)
        print(
            "{entries} translations: answered in {answerMs} ms, {cells} cells drawn in {drawMs} ms "
            "by {fillRect} rectangles".format_map(drawn)
        )
        assert int(drawn["entries"]) == before + entries
        # The work depends on the cells, not on what is in them.
        assert 200 < int(drawn["cells"]) <= 1024
        assert int(drawn["fillRect"]) <= 2 * 1024
        assert drawn["strokeRect"] + drawn["fillText"] + drawn["stroke"] < 100
        size = browser.run(
            "return fetch('/map?address=0&length=0x400000000&parts=1024')"
            ".then(answer => answer.text()).then(text => text.length)"
        )
        assert size < 100_000
        # A window of 4 MiB shows each of them.
        browser.run(
            "const form = document.querySelector('[data-of=addresses] form');"
            "form.querySelector('input').value = '0x180000000'; form.requestSubmit()"
        )
        browser.until(f"document.querySelector('{MAP}').dataset.bits === '22'")
        browser.until(f"document.querySelector('{MAP}').dataset.cells === '512'")
        browser.until(f"document.querySelector('{READ}').textContent.includes('1 mapping')")
        target = (0x180000000 - 0x100000000 >> 13) << 12
        assert f"0x180000000 leads to {target:#x}" in browser.text(READ)


def test_what_the_page_keeps_is_limited(browser: Browser, disk: Disk) -> None:
    browser.open(disk.url)
    live(browser, "idle")
    kept = browser.run(
        """
        return (async () => {
        const [{ Lines, LENGTH }, { Timeline }] = await Promise.all(
          [import("/page/plot.js"), import("/page/timeline.js")]);
        const make = (name) => document.createElement(name);
        const chart = new Lines(make("canvas"), make("output"), { a: ["read", "a"] }, "");
        for (let i = 0; i < 3 * LENGTH; i += 1) chart.add({ a: i });
        const names = ["frame", "none", "key", "read", "note", "capture", "follow"];
        document.body.append(make("i"));
        document.body.lastChild.append(make("b"));
        const parts = Object.fromEntries(names.map((name) => [name, make("p")]));
        make("div").append(parts.frame);
        const line = new Timeline(make("canvas"), parts);
        const real = window.fetch;
        const one = "data: " + JSON.stringify({ time_s: 1, what: "taken", head: 1, queue: 0 });
        window.fetch = async () => new Response((one + "\\n\\n").repeat(20000));
        await line.listen(true);
        window.fetch = real;
        return [chart.samples.length, LENGTH, line.events.length];
        })();
        """
    )
    assert kept[0] == kept[1]
    assert kept[2] == 3000


@contextlib.contextmanager
def inspecting(control: str, *options: str, **environment: str) -> Iterator[tuple[str, Any]]:
    """``guestio inspect``: the page's address, and the process."""
    with subprocess.Popen(
        [sys.executable, "-m", "guestio", "inspect", control, *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


def test_a_server_that_ends_and_comes_again(browser: Browser, tmp_path: Path) -> None:
    control = tmp_path / "control"
    with inspecting(str(control)) as (url, process):
        browser.open(url)
        live(browser, "gone")
        assert "trying again" in browser.text("#state")
        # The token is not to be seen any more.
        assert "token" not in browser.run("return location.href")
        for number in (1, 2):
            with Serving(Mirror(), tmp_path / "socket", control=control) as serving:
                live(browser, "idle")
                with Driver(serving.path) as driver:
                    live(browser)
                    for _ in range(number):
                        driver.run(0, b"seen")
                    done = f"{number}in all"
                    browser.until_so(lambda done=done: tile(browser, "Completed") == done, done)  # type: ignore[misc]
                    browser.driver.refresh()
                    live(browser)
            live(browser, "gone")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        # That nothing answers is what the console complains about.
        assert all("/status" in problem or "502" in problem for problem in browser.problems())
        browser.leave()


def test_a_token_is_asked_for(browser: Browser, tmp_path: Path) -> None:
    options = {"http": "127.0.0.1:0", "http_token": "secret"}
    with Serving(Mirror(), tmp_path / "socket", **options) as serving:
        control = serving.backend.control
        assert control is not None
        browser.open(f"http://{control.http}/")
        live(browser, "token")
        for word, state in (("guess", "token"), ("secret", "idle")):
            field = browser.driver.find_element("id", "token")
            field.send_keys(word, Keys.ENTER)
            browser.until("document.getElementById('token').value === ''")
            live(browser, state)
        assert all("401" in problem for problem in browser.problems())
        with inspecting(f"http://{control.http}", GUESTIO_CONTROL_TOKEN="secret") as (url, _):
            browser.open(url)
            live(browser, "idle")
            browser.leave()


@contextlib.contextmanager
def going_on(load: Load) -> Iterator[None]:
    """Have a load go on in a thread."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            load.run_requests(100)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_pictures_are_taken(browser: Browser, disk: Disk, tmp_path: Path) -> None:
    """Those of the documents: taken anew each time, and kept if that is wanted."""
    place = PICTURES if WANTED else tmp_path
    place.mkdir(exist_ok=True)
    pictures = {
        "inspect-overview": ("overview", 910, False),
        "inspect-addresses": ("addresses", 560, False),
        "inspect-timeline": ("requests", 420, True),
    }
    plan = LoadPlan(workload="randrw", depth=8, iommu="strict")
    with Load(str(disk.serving.path), plan) as load, going_on(load):
        browser.open(disk.url)
        live(browser)
        next_update(browser, 50 if WANTED else 1)
        for name, (section, height, dark) in pictures.items():
            browser.resize(1280, height)
            browser.prefer(dark=dark)
            place_of = "document.getElementById(arguments[0])"
            browser.run(
                "document.documentElement.style.scrollBehavior = 'auto';"
                f"if (arguments[1]) {place_of}.scrollIntoView(); else scrollTo(0, 0)",
                section,
                section != "overview",
            )
            next_update(browser, 3 if WANTED else 1)
            if section == "requests":
                browser.until("document.getElementById('timeline').dataset.requests > 10")
            browser.picture(place / f"{name}.png")
    for name in pictures:
        content = (place / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert 10_000 < len(content) < 400_000
