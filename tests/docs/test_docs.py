"""What the documents show is so: code runs, names and links lead somewhere, QEMU takes its lines.

In a page, a ```` ```python run ```` block is run, together with the others of its page as one
program. A plain ```` ```python ```` block must compile, and every name in it must be known from
itself or from the blocks before it.
"""

import ast
import hashlib
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from guestio.cli import cli
from lab import parts
from lab.guest import Guest, Script, VhostUserDisk, Viommu, _tcg_arguments
from tests.kit.names import resolves

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]
QEMU_PAGES = [ROOT / "README.md", ROOT / "docs/running-with-qemu.md"]
PATH = re.compile(r"(?:src|tests|lab|docs|bench|examples|\.ci)/[\w./-]*\w/?")
BOOT_LIMIT = 280


def name_of(value: object) -> str:
    """What to call a parameter in a test's name."""
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else str(value)


class Block(NamedTuple):
    """A fenced block: the words behind the fence, and the text."""

    info: str
    text: str


@cache
def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(info.strip(), text) for info, text in found]


@cache
def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def python(page: Path, *infos: str) -> str:
    return "\n".join(text for info, text in blocks(page) if info in infos)


def commands(page: Path, program: str) -> list[list[str]]:
    """Every command line that begins with a program, in shell blocks and in running text."""
    lines = [
        line
        for info, text in blocks(page)
        if info in {"sh", "bash", "console"}
        for line in text.replace("\\\n", " ").splitlines()
    ]
    split = [shlex.split(line, comments=True) for line in lines]
    # A placeholder such as [--read-only] is in brackets in running text and in synopses.
    split += [shlex.split(code) for code in inline_code(page) if code.startswith(program + " ")]
    return [words for words in split if words and words[0] == program]


@pytest.mark.parametrize("page", [p for p in PAGES if python(p, "python run")], ids=name_of)
def test_code_that_is_marked_so_runs(page: Path, tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    program.write_text(python(page, "python run"))
    done = subprocess.run(
        [sys.executable, "-W", "error", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [p for p in PAGES if python(p, "python")], ids=name_of)
def test_other_code_compiles_and_its_names_are_known(page: Path) -> None:
    source = python(page, "python", "python run")
    tree = ast.parse(source, page.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("guestio"):
            module = importlib.import_module(node.module or "")
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{page.name}: {node.module} has no {missing}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821", "--quiet", "-"],
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        assert not anchor or anchor in anchors(target), f"{page.name}: no heading for {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_names_in_running_text_exist(page: Path) -> None:
    for code in inline_code(page):
        if PATH.fullmatch(code):
            assert (ROOT / code).exists(), f"{page.name} names {code}, which is not there"
        elif re.fullmatch(r"guestio(\.\w+)+", code):
            assert resolves(code), f"{page.name} names {code}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_of_ours_exist(page: Path) -> None:
    for words in commands(page, "guestio"):
        named = [word.strip("[]") for word in words[1:]]
        command = cli.commands.get(named[0])
        assert command or named[0].startswith("-"), f"{page.name}: guestio {named[0]}"
        known = {"--help", "-h", "--version"}
        for parameter in (command or cli).params:
            if isinstance(parameter, click.Option):
                known.update(parameter.opts)
        options = {word.partition("=")[0] for word in named if word.startswith("-")}
        assert options <= known, f"{page.name}: {options - known} of {' '.join(words)}"
    script = (ROOT / "run").read_text()
    for words in commands(page, "./run"):
        assert re.search(rf"^    {re.escape(words[1])}\)$", script, re.MULTILINE), words


def test_log_lines_that_are_explained_are_logged() -> None:
    text = (ROOT / "docs/running-with-qemu.md").read_text()
    table = text.partition("| the back-end says |")[2].partition("\n\n")[0]
    explained = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(explained) > 5
    files = [
        *(ROOT / "src/guestio").glob("peer/*.py"),
        *(ROOT / "src/guestio").glob("vhost_user/*.py"),
        *(ROOT / "src/guestio").glob("virtio/*.py"),
        ROOT / "src/guestio/ratelog.py",
    ]
    sources = "".join(path.read_text() for path in files)
    for line in explained:
        wanted = re.sub(r"\b[NS]\b", "%d", line.removesuffix("..."))
        wanted = re.sub(r"\b(IMAGE|WHAT|METHOD)\b|^front-end(?= disconnected)", "%s", wanted)
        assert f'"{wanted}' in sources, f"no code logs {line!r}"


@contextmanager
def back_end(command: list[str], directory: Path) -> Iterator[Path]:
    """A back-end that is ready; the file with what it says."""
    log = directory / "back-end.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, cwd=directory, stderr=stderr)
    try:
        deadline = time.monotonic() + 60
        while "listening on" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield log
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def boot(command: list[str], guest: Guest, directory: Path) -> dict[str, str]:
    """Boot a documented command line with the lab's kernel; what the guest reports."""
    initrd, report = directory / "initrd", directory / "report"
    initrd.write_bytes(guest.initramfs())
    qemu = os.environ.get("GUESTIO_LAB_QEMU") or parts.require_program(
        command[0], "qemu-system-x86"
    )
    given = {"vmlinuz": str(parts.kernel().image), "initrd": str(initrd)}
    words = [given.get(word, word) for word in command[1:]]
    words = [word.replace("path=/tmp/", f"path={directory}/") for word in words]
    words[words.index("-append") + 1] += " quiet panic=-1"
    done = subprocess.run(
        # The second serial port is for the report; the kernel ends QEMU should this test die.
        [
            *("setpriv", "--pdeathsig", "KILL"),
            *(qemu, *_tcg_arguments(qemu), *words),
            *("-serial", f"file:{report}"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BOOT_LIMIT,
        check=False,
    )
    text = report.read_text().replace("\r\n", "\n")
    assert "GUEST-RESULT rc=0\n" in text, f"{done.stderr}\n{done.stdout}\n{text}"
    return dict(re.findall(r"^FACT (\w+)=(.*)$", text, re.MULTILINE))


def documented_boots() -> list[list[str]]:
    """Of vhost-user; tests/system/test_pci_device.py boots the README's PCI device."""
    lines = [words for page in QEMU_PAGES for words in commands(page, "qemu-system-x86_64")]
    return [words for words in lines if "vfio-user-pci" not in str(words)]


def test_every_kind_of_iommu_has_a_command_line() -> None:
    devices = [
        " ".join(words) for words in documented_boots() if "vhost-user-blk-pci" in str(words)
    ]
    assert sum("iommu" not in line for line in devices) == 1
    assert sum("virtio-iommu-pci" in line for line in devices) == 1
    assert sum("intel-iommu" in line for line in devices) == 1


@pytest.mark.system
@pytest.mark.parametrize("command", documented_boots(), ids=range(len(documented_boots())))
def test_a_linux_guest_uses_the_device_of_a_command_line(
    command: list[str], tmp_path: Path
) -> None:
    line = " ".join(command)
    viommu = Viommu.VIRTIO if "virtio-iommu" in line else Viommu.NONE
    entropy = "vhost-user-rng" in line
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(1 << 20))
    if entropy:
        readme = blocks(ROOT / "README.md")
        source = next(text for info, text in readme if info == "python" and "class Entropy" in text)
        (tmp_path / "rng.py").write_text(source)
        server = [sys.executable, "rng.py", str(tmp_path / "rng.sock")]
        reads = 'echo "FACT read=$(dd if=/dev/hwrng bs=4096 count=8 2>/dev/null | wc -c)"\n'
        guest = Guest(viommu=viommu, modules=["virtio-rng"], scripts=[Script("rng", reads)])
    else:
        [server] = commands(QEMU_PAGES[1], "guestio")[:1]
        socket = server[server.index("--socket") + 1]
        assert f"path={socket}" in line
        server = [sys.executable, "-m", *server]
        server[server.index(socket)] = str(tmp_path / Path(socket).name)
        disk = VhostUserDisk(Path("unused"))
        guest = Guest(disks=[disk], viommu=viommu, scripts=[Script.named("sha256")])
    with back_end(server, tmp_path) as log:
        facts = boot(command, guest, tmp_path)
        if entropy:
            assert int(facts["read"]) == 8 * 4096
            return
        assert facts["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
        deadline = time.monotonic() + 60
        while not (counts := dict(re.findall(r"(\w+)=(\d+)", log.read_text()))):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
    assert int(counts["failed"]) == 0
    behind_iommu = "iommu_platform=on" in line
    assert (int(counts["iotlb_misses"]) > 0) == behind_iommu
    assert facts["iommu"].startswith("DMA") == behind_iommu
