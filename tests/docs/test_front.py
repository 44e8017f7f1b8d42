"""The front of the house: titles, the first device, pictures, messages."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from docsite.hooks import MODULES, REPOSITORY, text_of
from docsite.pictures import OVERVIEW, overview

ROOT = Path(__file__).parents[2]
VERBS = {
    *("Check", "Contribute", "Drive", "Fuzz", "Give", "Harden", "Install", "Keep", "Make"),
    *("Migrate", "Record", "Replay", "Report", "Revoke", "Run", "Serve", "Set", "Simulate"),
    *("Stand", "Test", "Translate", "Upgrade", "Use", "Watch", "Write"),
}
"""What a task begins with."""


def title(text: str) -> str:
    found = re.match(r"# (.+)\n", text)
    assert found, text[:80]
    return found[1]


def is_task_or_question(heading: str) -> bool:
    return heading.endswith("?") or heading.split(maxsplit=1)[0] in VERBS


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_a_page_has_a_task_or_a_question_as_its_title(page: Path) -> None:
    assert is_task_or_question(title(page.read_text()))


@pytest.mark.parametrize("source", REPOSITORY)
def test_files_that_are_pages_have_one_too(source: str) -> None:
    assert is_task_or_question(title(text_of(source)))


def test_what_is_no_task_and_no_question() -> None:
    for subject in ("Architecture", "The IOTLB", "Limits"):
        assert not is_task_or_question(subject)


def test_pages_are_in_the_navigation() -> None:
    config = (ROOT / "docsite/mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"- {page.name}\n" in config, page.name
    for made in (*REPOSITORY.values(), *(f"reference/{name}.md" for name in MODULES)):
        assert f"- {made}\n" in config, made


def block(page: Path, info: str) -> str:
    found = re.search(
        rf"^```{re.escape(info)}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found, f"{page.name} has no block {info}"
    return found[1]


def qemu_line(page: Path) -> list[str]:
    text = page.read_text().replace("\\\n", " ")
    return next(
        shlex.split(line)
        for line in text.splitlines()
        if line.startswith("qemu-system-x86_64") and "vhost-user-rng-pci" in line
    )


def test_the_first_device_works(tmp_path: Path) -> None:
    """What is to be copied, as it stands; QEMU's line is booted as the README's."""
    page = ROOT / "docs/first-device.md"
    for name in ("rng.py", "test_rng.py"):
        (tmp_path / name).write_text(block(page, f"python {name}"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "test_rng.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "random bytes, with an IOMMU and without one\n"
    assert qemu_line(page) == qemu_line(ROOT / "README.md")


def test_the_picture_is_what_its_script_draws() -> None:
    assert OVERVIEW.read_text() == overview()


def test_the_readme_shows_code_within_two_screens() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("```"))
    assert first < 2 * 40
    for image in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", "\n".join(lines)):
        assert (ROOT / image).exists(), image


def test_each_error_has_a_line_that_says_what_to_do() -> None:
    tree = (ROOT / "src/guestio/errors.py").read_text().partition("Misuse by")[0]
    names = re.findall(r"[├└]── (\w+)", tree)
    assert len(names) > 25
    rows = dict(
        re.findall(
            r"^\| `(\w+)` \| .+ \| (.+) \|$", (ROOT / "docs/messages.md").read_text(), re.MULTILINE
        )
    )
    assert set(names) == set(rows)
    assert all(len(advice) > 10 for advice in rows.values())


def test_each_example_has_a_test() -> None:
    gallery = (ROOT / "examples/README.md").read_text()
    for example in (ROOT / "examples").glob("*.py"):
        row = next(line for line in gallery.splitlines() if f"| `examples/{example.name}`" in line)
        test = re.findall(r"`(tests/[\w/]+\.py)`", row)[-1]
        assert example.name in (ROOT / test).read_text(), row
