"""What Linux does when its virtio devices misbehave: a table.

    ./run lab-faults                          every rule below, all five devices in one guest each
    ./run lab-faults --rule 'wrong-head nth=4' --rule 'corrupt every=3' --keep DIRECTORY
    ./run lab-faults --guest uml              User-mode Linux: disk, net, console
    ./run lab-faults --devices "disk net" --viommu virtio --rule refuse

`guestio blk`, `net`, `rng`, `input` and `console` serve them with `--fault`. Devices that hang or
crash a guest when all are there are used again one at a time, so that each verdict is a device's
own. `lab/scripts/faults.sh` runs in the guest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
}
"""What serves each."""
MODULES = {
    "disk": "virtio_blk",
    "net": "virtio_net",
    "rng": "virtio_rng",
    "keyboard": "virtio_input evdev",
    "console": "virtio_console",
}
RULES = (
    "error every=5", "delay=20ms", "stall after=3", "drop nth=4", "reorder every=3",
    "short=8 every=3", "corrupt every=3", "stale every=4",
    "used-length nth=4", "used-length=0 nth=4", "wrong-head nth=4", "wrong-head=3 nth=4",
    "duplicate-completion nth=4", "index-jump nth=4", "index-jump=300 nth=4",
    "skip-interrupt every=3", "late-interrupt=20ms", "spurious-interrupt", "ignore-event-idx",
    "needs-reset nth=4", "config-flip", "feature-lie=28", "feature-lie=29", "feature-lie=32",
)  # fmt: skip
"""Over vhost-user, without an IOMMU."""
PCI_RULES = (
    "status-lie=0x40", "msi-lost every=3", "bad-bar every=9", "master-abort op=read every=9",
    "surprise-remove after=60", "needs-reset nth=4",
)  # fmt: skip
"""Over vfio-user."""
IOMMU_RULES = (
    "access-after-unmap every=3",
    "miss-storm",
    "refuse every=20",
    "wrong-permission every=3",
)
"""Behind a virtio-iommu."""

USE_SECONDS = 25
BOOT_SECONDS = 120.0
CRASH = re.compile(
    r"Kernel panic|Oops|BUG: (?!soft lockup|workqueue)|general protection fault|KASAN"
    r"|unable to handle|stack segment"
)
WARNING = re.compile(
    r"virtio\S* virtio\d+:.*|.*I/O error.*|.*Buffer I/O.*|WARNING: .*|.*virtio.*(?:fail|error|bad)"
    r".*|.*NETDEV WATCHDOG.*|.*blocked for more than.*|.*rcu.*stall.*|.*soft lockup.*|net eth0.*",
    re.IGNORECASE,
)
USUAL = re.compile(r"logical blocks|default/read/poll queues|renamed from|detected capacity")
"""Messages of an honest device."""
OWN = {
    "disk": r"virtio_blk|vda",
    "net": r"virtio_net|eth0|NETDEV",
    "rng": r"virtio_rng|hwrng|hw_random",
    "keyboard": r"virtio_input",
    "console": r"virtio_console|hvc",
}
"""What names a device in a kernel message."""


@dataclass(frozen=True)
class Outcome:
    """What a driver made of a device.

    Attributes:
        verdict: ``survived``, ``warned``, ``hung`` or ``crashed``.
        detail: What its user saw, if not that all is well, or the first message of the kernel.
    """

    verdict: str
    detail: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.detail}" if self.detail else self.verdict


@contextlib.contextmanager
def served(
    name: str, rule: str, transport: str, directory: Path, more: Sequence[str]
) -> Iterator[Path]:
    """A device that misbehaves: its socket; ended by SIGTERM."""
    socket, log = directory / f"{name}.sock", directory / f"{name}.log"
    image, keys = directory / "disk.img", directory / "keys"
    image.write_bytes(bytes(2 * MIB))
    keys.write_text("+0.05 KEY_A\n" * 4000)
    replaced = {"IMAGE": str(image), "KEYS": str(keys)}
    words = [replaced.get(word, word) for word in DEVICES[name]]
    rules = [] if rule == "none" else ["--fault", rule]
    command = [sys.executable, "-m", "guestio", *words, *rules, *more]
    with log.open("wb") as stderr, (directory / f"{name}.out").open("wb") as output:
        process = subprocess.Popen(
            [*command, "--socket", str(socket), "--transport", transport],
            stdin=subprocess.DEVNULL if name != "console" else subprocess.PIPE,
            stdout=output,
            stderr=stderr,
        )
    try:
        end = time.monotonic() + BOOT_SECONDS
        while "listening on" not in log.read_text():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"guestio {' '.join(words)} does not start: {log.read_text()}")
            time.sleep(0.02)
        yield socket
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(f"guestio {name} did not obey SIGTERM") from None


def front_end(name: str, socket: Path, transport: str, kind: type[Guest]) -> Disk:
    """What QEMU has for a device."""
    if transport == "vfio-user":
        return VfioUserDevice(socket)
    match name:
        case "disk" if kind is UmlGuest:
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


def run(
    names: Sequence[str],
    rule: str,
    transport: str,
    viommu: Viommu,
    directory: Path,
    kind: type[Guest],
) -> GuestResult:
    """Boot a guest that uses devices which obey a rule."""
    more = ["--iommu", "off"] if kind is UmlGuest else []
    with contextlib.ExitStack() as stack:
        devices = [
            front_end(
                name,
                stack.enter_context(served(name, rule, transport, directory, more)),
                transport,
                kind,
            )
            for name in names
        ]
        modules = " ".join(MODULES[name] for name in names).split()
        known = kind().booted_kernel()
        base = [] if kind is UmlGuest else ["virtio_pci"]
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


def look(
    names: Sequence[str],
    rule: str,
    transport: str,
    viommu: Viommu,
    keep: Path | None,
    kind: type[Guest],
) -> dict[str, Outcome]:
    """What becomes of each device under a rule; alone, if a guest with all of them ends badly."""
    with tempfile.TemporaryDirectory(prefix="guestio-faults-") as temporary:
        directory = Path(temporary)
        result = run(names, rule, transport, viommu, directory, kind)
        found = judge(names, result)
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            label = re.sub(
                r"[^\w.=-]+", "_", f"{kind.__name__}-{transport}-{rule}-{'-'.join(names)}"
            )
            (keep / f"{label}.console").write_text(result.console)
            (keep / f"{label}.report").write_text(result.report)
            (keep / f"{label}.qemu").write_text(result.qemu_log)
    shared = any(
        each.verdict == "crashed" or "stands still" in each.detail for each in found.values()
    )
    if shared and len(names) > 1:
        for name in names:
            found |= look([name], rule, transport, viommu, keep, kind)
    return found


def main() -> None:
    """Run the rules and print the table, in Markdown."""
    parser = argparse.ArgumentParser(
        prog="./run lab-faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rule", action="append", help="instead of all; may be given again")
    parser.add_argument("--devices", default=" ".join(DEVICES), help="words; all by default")
    parser.add_argument("--transport", choices=["vhost-user", "vfio-user"], default="vhost-user")
    parser.add_argument("--viommu", choices=["none", "virtio"], default="none")
    parser.add_argument("--guest", choices=["qemu", "uml"], default="qemu")
    parser.add_argument("--keep", type=Path, help="a directory for consoles and logs")
    options = parser.parse_args()
    names = options.devices.split()
    try:
        kind: type[Guest] = Guest
        if options.guest == "uml":
            kind = UmlGuest
            names = [name for name in names if name in ("disk", "net", "console")]
        else:
            os.environ.setdefault("GUESTIO_LAB_QEMU", str(new_qemu()))
        viommu = {"none": Viommu.NONE, "virtio": Viommu.VIRTIO}[options.viommu]
        if options.rule:
            plan = [(rule, options.transport, viommu) for rule in options.rule]
        else:
            plan = [
                ("none", "vhost-user", Viommu.NONE),
                *((rule, "vhost-user", Viommu.NONE) for rule in RULES),
            ]
            if kind is not UmlGuest:
                plan += ((rule, "vfio-user", Viommu.NONE) for rule in PCI_RULES)
                plan += ((rule, "vhost-user", Viommu.VIRTIO) for rule in IOMMU_RULES)
        print("|".join(["", " rule ", *(f" {name} " for name in names), ""]))
        print("|---" * (1 + len(names)) + "|", flush=True)
        for rule, transport, behind in plan:
            found = look(names, rule, transport, behind, options.keep, kind)
            cells = [f" `{rule}` ", *(f" {found[name]} " for name in names)]
            print("|".join(["", *cells, ""]), flush=True)
    except PartsError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
