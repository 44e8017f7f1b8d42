"""What the documentation site has besides docs/: files of the repository, and the reference.

The reference is made of docstrings (mkdocstrings) and of the command line (mkdocs-click), so it
needs no text of its own. Pages refer to files of the repository as GitHub shows them; here such
links lead to the pages that are made of these files.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parent.parent

REPOSITORY: Final = {
    "README.md": "start/readme.md",
    "CONTRIBUTING.md": "start/contributing.md",
    "CHANGELOG.md": "start/changelog.md",
    "examples/README.md": "start/examples.md",
    "tests/ports/README.md": "start/ports.md",
}
"""Files outside docs/ that are pages, and what they are called there."""

TITLES: Final = {
    "CONTRIBUTING.md": "Contribute to guestio",
    "CHANGELOG.md": "What has changed?",
    "tests/ports/README.md": "What became of other projects' tests?",
}
"""Titles of pages of the site, where the file's own is no task and no question."""

MODULES: Final = {
    "guestio": "guestio",
    "memory": "guestio.memory",
    "dma": "guestio.dma",
    "iommu": "guestio.iommu",
    "virtio": "guestio.virtio",
    "virtio-iommu": "guestio.virtio.iommu",
    "virtio-net": "guestio.virtio.net",
    "pci": "guestio.pci",
    "nvme": "guestio.pci.nvme",
    "vhost-user": "guestio.vhost_user",
    "vfio-user": "guestio.vfio_user",
    "guest": "guestio.guest",
    "faults": "guestio.faults",
    "proxy": "guestio.faults.proxy",
    "observe": "guestio.observe",
    "testing": "guestio.testing",
    "errors": "guestio.errors",
    "budgets": "guestio.budgets",
}
"""Pages of the reference, and the modules they describe."""

COMMANDS: Final = """# Which commands are there?

::: mkdocs-click
    :module: guestio.cli
    :command: cli
    :prog_name: guestio
    :depth: 1
    :style: table
"""

_LINK: Final = re.compile(r"\[((?:[^]\[]|\[[^]]*\])*)\]\(([^)\s#]+)((?:#[^)]*)?)\)")
_FENCE: Final = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
_RUN: Final = re.compile(r"^(```\w+) [ \w-]+")
"""What begins a block that the tests run: a language, and what they do with it."""


def text_of(source: str) -> str:
    """A file of the repository, with the title that its page has."""
    text = (ROOT / source).read_text()
    if source in TITLES:
        text = f"# {TITLES[source]}\n" + text.partition("\n")[2]
    return text


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for source, page in REPOSITORY.items():
        files.append(File.generated(config, page, content=text_of(source)))
    files.append(File.generated(config, "reference/commands.md", content=COMMANDS))
    for name, module in MODULES.items():
        text = f"# What is in {module}?\n\n::: {module}\n"
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(
    markdown: str,
    page: Page,
    config: MkDocsConfig,  # noqa: ARG001 - mkdocs passes all four by name
    files: Files,  # noqa: ARG001 - mkdocs passes all four by name
) -> str:
    """Have links lead from page to page, wherever the file that is linked lies."""
    here = page.file.src_uri
    source = next((name for name, made in REPOSITORY.items() if made == here), f"docs/{here}")

    def lead(link: re.Match[str]) -> str:
        text, target, end = link.groups()
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        made = REPOSITORY.get(inside)
        if made is None:
            if not inside.startswith("docs/"):
                return text  # a file that is no page
            made = inside.removeprefix("docs/")
        made = posixpath.relpath(made, posixpath.dirname(here) or ".")
        return f"[{text}]({made}{end})"

    parts = _FENCE.split(markdown)
    return "".join(
        _RUN.sub(r"\1", part) if part.startswith("```") else _LINK.sub(lead, part) for part in parts
    )
