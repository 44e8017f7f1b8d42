"""What Linux does when its virtio devices misbehave: a table.

    ./run lab-faults                          every rule below, all devices in one guest each
    ./run lab-faults --rule 'wrong-head nth=4' --rule 'corrupt every=3' --keep DIRECTORY
    ./run lab-faults --guest uml              User-mode Linux: disk, net, console
    ./run lab-faults --devices "disk net" --way virtio-iommu --rule refuse

`guestio blk`, `net`, `rng`, `input`, `console` and `nvme` serve them with `--fault`; rules of
notifications are a proxy's, in front of an honest device. Devices that hang or crash a guest when
all are there are used again one at a time, so that each verdict is a device's own.
`lab/scripts/faults.sh` runs in the guest.

Each cell is kept in a file as soon as it is known (`--results`), and is not made again by the next
run that is given the file; `--again` forgets it. A row takes 10 to 60 s, or several minutes where
each device must be used alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lab.guest import (
    MIB,
    Disk,
    Guest,
    GuestResult,
    Script,
    VfioUserDevice,
    VhostUserDevice,
    VhostUserDisk,
    VhostUserNet,
    Viommu,
)
from lab.parts import PartsError
from lab.qemu import new_qemu
from lab.uml import UmlGuest

DEVICES = {
    "disk": ("blk", "IMAGE"),
    "net": ("net", "--responder", "10.0.2.1/24"),
    "rng": ("rng",),
    "keyboard": ("input", "keyboard", "--script", "KEYS"),
    "console": ("console", "--stdio"),
    "nvme": ("nvme", "IMAGE"),
}
"""What serves each."""
VIRTIO = ("disk", "net", "rng", "keyboard", "console")
MODULES = {
    "disk": "virtio_blk",
    "net": "virtio_net",
    "rng": "virtio_rng",
    "keyboard": "virtio_input evdev",
    "console": "virtio_console",
    "nvme": "nvme",
}

VHOST_USER, VFIO_USER, IOMMU, PROXY = "vhost-user", "vfio-user", "virtio-iommu", "proxy"
WAYS = {
    VHOST_USER: "over vhost-user, without an IOMMU",
    VFIO_USER: "over vfio-user, without an IOMMU",
    IOMMU: "over vhost-user, behind a virtio-iommu",
    PROXY: "over vhost-user, the rule is obeyed by a proxy in between",
}
"""How a device comes to the guest."""
RULES = {
    VHOST_USER: (
        "none",
        "error every=5", "delay=20ms", "stall after=3", "drop nth=4", "reorder every=3",
        "short=8 every=3", "corrupt every=3", "stale every=4",
        "used-length nth=4", "used-length=0 nth=4", "wrong-head nth=4", "wrong-head=3 nth=4",
        "duplicate-completion nth=4", "index-jump nth=4", "index-jump=300 nth=4",
        "skip-interrupt every=3", "late-interrupt=20ms", "spurious-interrupt", "ignore-event-idx",
        "needs-reset nth=4",
        "config-flip", "feature-lie=28", "feature-lie=29", "feature-lie=32", "status-lie=0x40",
        "hang-up op=SET_VRING_KICK", "slow=20ms", "bad-reply op=GET_FEATURES",
        "no-reply op=GET_FEATURES", "wrong-fds op=GET_FEATURES",
    ),
    VFIO_USER: (
        "none", "needs-reset nth=4", "generation-stuck", "status-lie=0x40", "msi-lost every=3",
        "bad-bar every=9", "master-abort op=read every=9", "surprise-remove after=60",
    ),
    IOMMU: (
        "none", "access-after-unmap every=3", "miss-storm", "refuse every=20",
        "wrong-permission every=3",
    ),
    PROXY: ("none", "skip-kick every=3", "late-kick=20ms"),
}  # fmt: skip
"""What is run on each way."""

NOT_IN_UML = {
    VFIO_USER: "User-mode Linux has no PCI bus that a server can be on",
    IOMMU: "User-mode Linux has no IOMMU",
    "rng": "Debian's User-mode Linux has no virtio_rng",
    "keyboard": "Debian's User-mode Linux has no virtio_input",
}
"""Why a way or a device does not apply there."""
NOT_AS_NVME = {
    "needs-reset nth=4": "a rule of virtio",
    "generation-stuck": "a rule of virtio",
    "status-lie=0x40": "a rule of virtio",
}
"""Rules of a way that PCI functions of another kind have not."""

USE_SECONDS = 25
BOOT_SECONDS = 120.0
END_SECONDS = 60.0
"""For a server to obey SIGTERM; 2, but on a machine that is overloaded."""
CRASH = re.compile(
    r"Kernel panic|Oops|BUG: (?!soft lockup|workqueue)|general protection fault|KASAN"
    r"|unable to handle|stack segment"
)
WARNING = re.compile(
    r"virtio\S* virtio\d+:.*|.*I/O error.*|.*Buffer I/O.*|WARNING: .*|.*virtio.*(?:fail|error|bad)"
    r".*|.*NETDEV WATCHDOG.*|.*blocked for more than.*|.*rcu.*stall.*|.*soft lockup.*|net eth0.*",
    re.IGNORECASE,
)
USUAL = re.compile(
    r"Modules linked in|logical blocks|default/read/poll queues|renamed from|detected capacity"
)
"""Messages of an honest device."""
OWN = {
    "disk": r"virtio_blk|vda",
    "net": r"virtio_net|eth0|NETDEV",
    "rng": r"virtio_rng|hwrng|hw_random",
    "keyboard": r"virtio_input",
    "console": r"virtio_console|hvc",
    "nvme": r"nvme",
}
"""What names a device in a kernel message."""


@dataclass(frozen=True)
class Outcome:
    """What a driver made of a device.

    Attributes:
        verdict: ``survived``, ``warned``, ``hung`` or ``crashed``; ``no guest`` if what runs the
            guest gave up, ``does not apply`` if there is nothing to run.
        detail: What its user saw, if not that all is well, or the first message of the kernel.
    """

    verdict: str
    detail: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.detail}" if self.detail else self.verdict


@dataclass(frozen=True)
class Case:
    """A rule, and how devices that obey it come to a guest.

    Attributes:
        guest: ``qemu`` or ``uml``.
        way: A key of `WAYS`.
        rule: As for ``--fault``.
    """

    guest: str
    way: str
    rule: str

    @property
    def devices(self) -> tuple[str, ...]:
        """What may be used: a PCI function that is no virtio device only over vfio-user."""
        return (*VIRTIO, "nvme") if self.way == VFIO_USER else VIRTIO

    def excuse(self, name: str) -> str:
        """Why it cannot be run with a device; nothing if it can."""
        if self.guest == "uml":
            return NOT_IN_UML.get(self.way) or NOT_IN_UML.get(name, "")
        return NOT_AS_NVME.get(self.rule, "") if name == "nvme" else ""


class Results:
    """Cells that are known, in a file of a JSON object per line; a later line of a cell wins.

    Args:
        path: The file; it is made if there is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cells: dict[tuple[Case, str], Outcome] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):  # of a run that was killed
                cell = json.loads(line)
                case = Case(cell["guest"], cell["way"], cell["rule"])
                self._cells[case, cell["device"]] = Outcome(cell["verdict"], cell["detail"])

    def get(self, case: Case, name: str) -> Outcome | None:
        """What is known of a device under a rule."""
        if excuse := case.excuse(name):
            return Outcome("does not apply", excuse)
        return self._cells.get((case, name))

    def add(self, case: Case, found: dict[str, Outcome]) -> None:
        """Keep what was found."""
        with self._path.open("a") as file:
            for name, outcome in found.items():
                self._cells[case, name] = outcome
                cell = asdict(case) | {"device": name} | asdict(outcome)
                file.write(json.dumps(cell) + "\n")

    def missing(self, case: Case, names: Iterable[str]) -> list[str]:
        """Devices of which nothing is known."""
        return [name for name in names if name in case.devices and self.get(case, name) is None]


@contextlib.contextmanager
def server(words: Sequence[str], log: Path, **streams: object) -> Iterator[None]:
    """A command of `guestio` that listens; ended by SIGTERM.

    Raises:
        RuntimeError: It does not begin, or does not obey.
    """
    with log.open("wb") as stderr:
        process = subprocess.Popen(  # type: ignore[call-overload]  # a dict has one type for all
            [sys.executable, "-m", "guestio", *words], stderr=stderr, **streams
        )
    try:
        end = time.monotonic() + BOOT_SECONDS
        while "listening on" not in log.read_text():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"guestio {' '.join(words)} does not start: {log.read_text()}")
            time.sleep(0.02)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(f"guestio {words[0]} did not obey SIGTERM") from None


@contextlib.contextmanager
def served(name: str, case: Case, directory: Path) -> Iterator[Path]:
    """A device that misbehaves: its socket; ended by SIGTERM."""
    socket, front = directory / f"{name}.sock", directory / f"{name}.front"
    image, keys = directory / f"{name}.img", directory / "keys"
    image.write_bytes(bytes(2 * MIB))
    keys.write_text("+0.05 KEY_A\n" * 4000)
    replaced = {"IMAGE": str(image), "KEYS": str(keys)}
    words = [replaced.get(word, word) for word in DEVICES[name]]
    rule = [] if case.rule == "none" else ["--fault", case.rule]
    if case.way != PROXY:
        words += rule
    words += ["--socket", str(socket)]
    if name != "nvme":
        words += ["--transport", VFIO_USER if case.way == VFIO_USER else VHOST_USER]
    if case.guest == "uml":
        words += ["--iommu", "off"]
    standard_input = subprocess.PIPE if name == "console" else subprocess.DEVNULL
    with contextlib.ExitStack() as stack:
        output = stack.enter_context((directory / f"{name}.out").open("wb"))
        stack.enter_context(
            server(words, directory / f"{name}.log", stdin=standard_input, stdout=output)
        )
        if case.way != PROXY:
            yield socket
            return
        words = ["proxy", "--listen", str(front), "--connect", str(socket), *rule]
        stack.enter_context(server(words, directory / f"{name}.proxy.log"))
        yield front


def front_end(name: str, socket: Path, case: Case) -> Disk:
    """What QEMU, or User-mode Linux, has for a device."""
    if case.way == VFIO_USER:
        return VfioUserDevice(socket)
    match name:
        case "disk" if case.guest == "uml":
            return VhostUserDevice(socket, 2)
        case "disk":
            return VhostUserDisk(socket)
        case "net":
            return VhostUserNet(socket)
        case "rng":
            return VhostUserDevice(socket, 4)
        case "keyboard":
            return VhostUserDevice(socket, 18, num_queues=2, config_size=136)
        case _:
            return VhostUserDevice(socket, 3, num_queues=2, config_size=12)


def run(names: Sequence[str], case: Case, directory: Path) -> GuestResult:
    """Boot a guest that uses devices which obey a rule."""
    uml = case.guest == "uml"
    kind: type[Guest] = UmlGuest if uml else Guest
    viommu = Viommu.VIRTIO if case.way == IOMMU else Viommu.NONE
    with contextlib.ExitStack() as stack:
        devices = [
            front_end(name, stack.enter_context(served(name, case, directory)), case)
            for name in names
        ]
        modules = " ".join(MODULES[name] for name in names).split()
        known = kind().booted_kernel()
        base = [] if uml else ["virtio_pci"]
        there = {each.name for each in known.modules([*viommu.modules, *base])}
        # Not as disks, whose driver is inserted at first: a fault may keep that from ending.
        late = [each for each in known.modules(modules) if each.name not in there]
        guest = kind(
            viommu=viommu,
            devices=devices,
            modules=base,
            scripts=[Script.named("faults")],
            environment={
                "DEVICES": " ".join(names),
                "LATE": " ".join(each.name for each in late),
                "LIMIT": str(USE_SECONDS),
                "ROUTER": "10.0.2.1",
            },
            files={f"/lab/late/{each.name}.ko": each.data for each in late},
            append="i8042.nokbd i8042.noaux loglevel=6",
            timeout=BOOT_SECONDS + 2 * USE_SECONDS,
        )
        with guest.boot(directory / "guest") as running:
            # A guest that stands still, or crawls, is not waited for until its limit.
            last, at = -1, time.monotonic()
            while (status := running.ended) is None:
                beat = int(running.facts().get("beat", "0"))
                if beat != last:
                    last, at = beat, time.monotonic()
                told = running.facts().keys() >= set(names)
                if (
                    told
                    or beat >= USE_SECONDS - 1
                    or time.monotonic() - at > (30 if last > 0 else BOOT_SECONDS)
                ):
                    break
                time.sleep(0.1)
            if status is None:
                time.sleep(1)  # Its last messages.
            return running.kill()


def judge(names: Sequence[str], result: GuestResult) -> dict[str, Outcome]:
    """What became of each device."""
    console = result.console
    lines = [re.sub(r"^\[[^\]]*\] ", "", line).strip() for line in console.splitlines()]
    crash = next((line for line in lines if CRASH.search(line)), "")
    alive = int(result.facts.get("beat", "0")) >= USE_SECONDS - 2
    found = {}
    for name in names:
        said = result.facts.get(name, "")
        own = next(
            (
                line
                for line in lines
                if WARNING.search(line) and re.search(OWN[name], line) and not USUAL.search(line)
            ),
            "",
        )
        wrong = "" if said == "ok" else said
        if crash:
            found[name] = Outcome("crashed", crash[:100])
        elif not said and "kernel" not in result.facts:
            found[name] = Outcome("no guest", _last_line(result))
        elif not said and result.qemu_status >= 0:
            found[name] = Outcome("no guest", f"it ended: {_last_line(result)}")
        elif not said:
            where = "its user waits" if alive else "the guest stands still"
            own = next((line for line in lines if "soft lockup" in line), own)
            found[name] = Outcome("hung", "; ".join(filter(None, (where, own[:90]))))
        elif own or wrong:
            found[name] = Outcome(
                "warned" if own else "survived", "; ".join(filter(None, (wrong, own[:90])))
            )
        else:
            found[name] = Outcome("survived", "")
    return found


def _last_line(result: GuestResult) -> str:
    """What the process that runs the guest said last."""
    lines = [line for line in result.qemu_log.splitlines() if line.strip()]
    said = re.sub(r"/\S*/", "", lines[-1])[:110] if lines else "no message"
    return f"{'waits' if result.qemu_status < 0 else 'ends'}: {said}"


def look(
    names: Sequence[str], case: Case, keep: Path | None, results: Results
) -> dict[str, Outcome]:
    """What becomes of each device under a rule; alone, if a guest with all of them ends badly.

    Each is added to the results as soon as it is known.
    """
    with tempfile.TemporaryDirectory(prefix="guestio-faults-") as temporary:
        directory = Path(temporary)
        result = run(names, case, directory)
        found = judge(names, result)
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            label = re.sub(
                r"[^\w.=-]+", "_", f"{case.guest}-{case.way}-{case.rule}-{'-'.join(names)}"
            )
            (keep / f"{label}.console").write_text(result.console)
            (keep / f"{label}.report").write_text(result.report)
            (keep / f"{label}.qemu").write_text(result.qemu_log)
    shared = any(
        each.verdict in ("crashed", "no guest") or "stands still" in each.detail
        for each in found.values()
    )
    if shared and len(names) > 1:
        for name in names:
            found |= look([name], case, keep, results)
    else:
        results.add(case, found)
    return found


def table(cases: Sequence[Case], names: Sequence[str], results: Results) -> Iterator[str]:
    """Lines of Markdown: a table for each way."""
    for way, text in WAYS.items():
        rows = [case for case in cases if case.way == way]
        if not rows:
            continue
        columns = [name for name in names if name in rows[0].devices]
        never = {name: {case.excuse(name) for case in rows} for name in columns}
        columns = [name for name in columns if "" in never[name] or len(never[name]) > 1]
        yield f"{rows[0].guest}, {text}:"
        yield ""
        yield "|".join(["", " rule ", *(f" {name} " for name in columns), ""])
        yield "|---" * (1 + len(columns)) + "|"
        for case in rows:
            cells = [str(results.get(case, name) or "not run") for name in columns]
            yield "|".join(["", f" `{case.rule}` ", *(f" {cell} " for cell in cells), ""])
        yield ""
        for name, reasons in never.items():
            if name not in columns:
                yield f"* {name} does not apply: {', '.join(reasons)}."


def main() -> None:
    """Run what is not known yet, and print the tables, in Markdown."""
    parser = argparse.ArgumentParser(
        prog="./run lab-faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rule", action="append", help="instead of all; may be given again")
    parser.add_argument("--devices", default=" ".join(DEVICES), help="words; all by default")
    parser.add_argument("--way", action="append", choices=[*WAYS], help="all by default")
    parser.add_argument("--guest", choices=["qemu", "uml"], default="qemu")
    parser.add_argument("--keep", type=Path, help="a directory for consoles and logs")
    parser.add_argument("--results", type=Path, help="what is known (build/lab-faults-GUEST.jsonl)")
    parser.add_argument("--again", action="store_true", help="run what is known, too")
    parser.add_argument("--print", action="store_true", help="run nothing")
    options = parser.parse_args()
    names = options.devices.split()
    if unknown := set(names) - DEVICES.keys():
        parser.error(f"--devices: {' '.join(unknown)} is none of {' '.join(DEVICES)}")
    results = Results(options.results or Path(f"build/lab-faults-{options.guest}.jsonl"))
    cases = [
        Case(options.guest, way, rule)
        for way in options.way or WAYS
        if options.guest != "uml" or way not in NOT_IN_UML
        for rule in options.rule or RULES[way]
    ]
    failed = False
    try:
        if options.guest != "uml":
            os.environ.setdefault("GUESTIO_LAB_QEMU", str(new_qemu()))
        for number, case in enumerate(cases, 1):
            wanted = [name for name in names if name in case.devices and not case.excuse(name)]
            wanted = wanted if options.again else results.missing(case, wanted)
            if options.print or not wanted:
                continue
            began = time.monotonic()
            try:
                found = look(wanted, case, options.keep, results)
            except RuntimeError as error:
                # A server that fails is a defect of ours: told, and the others are run.
                print(f"{case.way}, {case.rule}: {error}", file=sys.stderr, flush=True)
                failed = True
                continue
            said = ", ".join(f"{name} {outcome.verdict}" for name, outcome in found.items())
            print(
                f"{number} of {len(cases)}, {time.monotonic() - began:.0f} s: {case.way}, "
                f"{case.rule}: {said}",
                file=sys.stderr,
                flush=True,
            )
    except PartsError as error:
        sys.exit(str(error))
    for line in table(cases, names, results):
        print(line)
    if failed:
        sys.exit("some servers failed, see above")


if __name__ == "__main__":
    main()
