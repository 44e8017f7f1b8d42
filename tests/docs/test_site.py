"""The documentation site is built, strictly; its reference has every public name and command."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docsite.hooks import MODULES
from guestio.cli import cli

ROOT = Path(__file__).parents[2]


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Have mkdocs build a site."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "mkdocs", "build", "--strict"),
            *("-f", str(config), "-d", str(site)),
        ],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site."""
    path = tmp_path_factory.mktemp("site")
    built = build(ROOT / "docsite/mkdocs.yml", path)
    assert built.returncode == 0, built.stderr
    return path


def anchors(page: Path) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', page.read_text()))


@pytest.mark.parametrize("page", MODULES)
def test_every_public_name_is_in_the_reference(site: Path, page: str) -> None:
    module = importlib.import_module(MODULES[page])
    own = [name for name, value in vars(module).items() if not name.startswith("_")]
    names = getattr(module, "__all__", None) or [
        name
        for name in own
        if getattr(getattr(module, name), "__module__", None) == module.__name__
    ]
    found = anchors(site / f"reference/{page}.html")
    missing = {
        name
        for name in names
        if f"{module.__name__}.{name}" not in found
        # Numbers have no docstring; what is called as a module is hidden by it.
        and not isinstance(getattr(module, name), int)
        and not (Path(module.__file__ or "").parent / f"{name}.py").exists()
    }
    assert not missing


def test_every_command_is_in_the_reference(site: Path) -> None:
    found = anchors(site / "reference/commands.html")
    assert set(cli.commands) <= {name.removeprefix("guestio-") for name in found} | found


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """It can be read from a folder, without a network."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*rel="stylesheet"[^>]*href="([^"]+)"', text)
        assert not [address for address in loaded if "//" in address], page
        assert "```" not in re.sub(r"<code.*?</code>", "", text, flags=re.DOTALL), page


def test_what_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# A page\n\n[there](nowhere.md)\n")
    config = (ROOT / "docsite/mkdocs.yml").read_text()
    config = config.replace("docs_dir: ../docs", "docs_dir: docs").partition("\nnav:\n")[0] + "\n"
    config = re.sub(r"hooks: .*\n", "", config)
    config = re.sub(r"  - mkdocstrings:\n(?:      .*\n)+", "", config)
    (tmp_path / "mkdocs.yml").write_text(config)
    built = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert built.returncode == 1
    assert "nowhere.md" in built.stderr
