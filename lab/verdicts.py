"""What the catalogue says of other programs' back-ends: a table, and whether it says so again.

    ./run lab-verdicts                        each back-end below, twice with the same seed
    ./run lab-verdicts --of virtiofsd --seed 7 --keep DIRECTORY

Fetches what it needs into the lab's cache (`lab.qemu`). Each run is a process of `guestio check`
with `--json`, which `--keep` keeps. Exit status is 0 if every run came to its end and the verdicts
of each back-end were equal, whatever they are.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lab.parts import PartsError, cache_directory
from lab.qemu import DPDK, NEW_QEMU, OLD_QEMU, VIRTIOFSD, Programs

BAD: Final = {"FAIL", "WEDGED", "CRASH"}
MIB: Final = 1 << 20
LIMIT: Final = 3600.0
"""Seconds that one run may take."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A back-end that is judged.

    Attributes:
        programs: What it is fetched with.
        program: Its name there.
        device: The type of its device.
        command: Words of its command; PROGRAM, SOCKET, DIRECTORY and ROOT are replaced.
        options: More of `guestio check`.
    """

    programs: Programs
    program: str
    device: str
    command: str
    options: tuple[str, ...] = ()

    def starting(self, starter: Path, directory: Path) -> str:
        """The command, as `guestio check --command` takes it."""
        words = self.command
        for name, value in (
            ("PROGRAM", starter),
            ("SOCKET", directory / "subject.sock"),
            ("DIRECTORY", directory),
            ("ROOT", cache_directory() / "qemu" / self.programs.name / "root"),
        ):
            words = words.replace(name, shlex.quote(str(value)))
        return words


_DISK: Final = (
    "PROGRAM --blockdev driver=file,node-name=disk,filename=DIRECTORY/disk.img --export "
    "type=vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path=SOCKET"
)
_DPDK_DRIVERS: Final = ("net_vhost", "bus_vdev", "mempool_ring")

SUBJECTS: Final = {
    "qemu-storage-daemon 7.2": Subject(
        OLD_QEMU, "qemu-storage-daemon", "blk", _DISK, ("--writable",)
    ),
    "qemu-storage-daemon 11.1": Subject(
        NEW_QEMU, "qemu-storage-daemon", "blk", _DISK, ("--writable",)
    ),
    "virtiofsd 7.2": Subject(
        OLD_QEMU,
        "virtiofsd",
        "fs",
        "PROGRAM -f --socket-path=SOCKET -o source=DIRECTORY/shared -o sandbox=chroot",
    ),
    "virtiofsd 1.13": Subject(
        VIRTIOFSD,
        "virtiofsd",
        "fs",
        "PROGRAM --socket-path=SOCKET --shared-dir=DIRECTORY/shared --sandbox=none",
    ),
    "testpmd 24.11": Subject(
        DPDK,
        "testpmd",
        "net",
        "PROGRAM -l 0,1 --no-pci --no-huge -m 256 --file-prefix=guestio "
        + "".join(
            f"-d ROOT/usr/lib/x86_64-linux-gnu/librte_{name}.so.25 " for name in _DPDK_DRIVERS
        )
        + "--vdev net_vhost0,iface=SOCKET,queues=1 -- --forward-mode=rxonly --auto-start "
        "--stats-period=3600 --no-mlockall --total-num-mbufs=4096",
    ),
}
"""What is judged, by the name that its column has."""


def judged(
    subject: Subject, starter: Path, arguments: argparse.Namespace, directory: Path
) -> dict[str, Any]:
    """The report of one run.

    Raises:
        RuntimeError: The run did not come to its end.
    """
    (directory / "shared").mkdir(exist_ok=True)
    (directory / "disk.img").write_bytes(bytes(range(256)) * (16 * MIB // 256))
    command = [sys.executable, "-m", "guestio", "check", str(directory / "subject.sock")]
    command += ["--device", subject.device, *subject.options, "--json"]
    command += ["--seed", str(arguments.seed), "--patience", str(arguments.patience)]
    command += ["--command", subject.starting(starter, directory)]
    for name in arguments.only:
        command += ["--only", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    if done.returncode not in {0, 1} or not done.stdout:
        raise RuntimeError(f"{shlex.join(command)}: status {done.returncode}: {done.stderr}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def verdicts(report: dict[str, Any]) -> dict[str, str]:
    """The verdict of each check."""
    return {result["id"]: result["verdict"] for result in report["results"]}


def table(reports: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: how often each verdict came out, and each check that was bad anywhere."""
    names = list(reports)
    cells = {name: [verdicts(each) for each in runs] for name, runs in reports.items()}
    lines = [f"| check | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    totals = [
        ", ".join(f"{n} {v}" for v, n in sorted(Counter(cells[name][0].values()).items()))
        for name in names
    ]
    lines.append(f"| (all) | {' | '.join(totals)} |")
    order = list(dict.fromkeys(check for runs in cells.values() for check in runs[0]))
    for check in order:
        found = [_cell(check, cells[name]) for name in names]
        if any(word in BAD for each in found for word in each.split(" / ")):
            lines.append(f"| `{check}` | {' | '.join(found)} |")
    return "\n".join(lines)


def _cell(check: str, runs: Sequence[dict[str, str]]) -> str:
    found = dict.fromkeys(run.get(check, "") for run in runs)
    if len(found) == 1:
        (only,) = found
        return only if only in BAD else "-" if only else ""
    return " / ".join(found)


def differing(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Checks whose verdicts were not the same in each run."""
    each = [verdicts(report) for report in runs]
    return [check for check in each[0] if len({found.get(check) for found in each}) > 1]


def say(line: str) -> None:
    """Tell the one who waits."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge each back-end as often as wanted, and print what came out."""
    parser = argparse.ArgumentParser(
        prog="./run lab-verdicts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--of", action="append", choices=sorted(SUBJECTS), help="only this one; may be repeated"
    )
    parser.add_argument("--only", action="append", default=[], help="only these checks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=2, help="of each [2]")
    parser.add_argument("--patience", type=float, default=3.0, help="seconds for an answer [3]")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="where to keep the reports")
    options = parser.parse_args(arguments)
    reports: dict[str, list[dict[str, Any]]] = {}
    failed = False
    for name in options.of or list(SUBJECTS):
        subject = SUBJECTS[name]
        try:
            starter = subject.programs.starter(subject.program, say)
            for run in range(options.runs):
                with tempfile.TemporaryDirectory(prefix="guestio-verdicts-") as directory:
                    report = judged(subject, starter, options, Path(directory))
                reports.setdefault(name, []).append(report)
                say(f"{name}, run {run + 1}: {len(report['results'])} checks, {report['counts']}")
                if options.keep is not None:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    file = options.keep / f"{name.replace(' ', '-')}-{run + 1}.json"
                    file.write_text(json.dumps(report, indent=1))
        except (PartsError, RuntimeError, subprocess.TimeoutExpired) as error:
            say(f"{name}: {error}")
            failed = True
            continue
        different = differing(reports[name])
        if different:
            failed = True
            say(f"{name}: verdicts differ from run to run: {', '.join(different)}")
    if reports:
        print(table(reports))
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
