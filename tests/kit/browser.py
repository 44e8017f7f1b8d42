"""A real browser without a window: Debian's Chromium, driven through its chromedriver."""

from __future__ import annotations

import base64
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys

from lab.parts import PartsError

__all__ = ["Browser", "Keys", "open_browser"]

WAIT: Final = 60.0
FLAGS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


class Browser:
    """One tab.

    Args:
        driver: What drives it.
    """

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show a page in a window of that size."""
        self.resize(width, height)
        self.prefer(dark=dark)
        # Where only the fragment differs, nothing would be loaded.
        self.leave()
        self.driver.get(url)

    def leave(self) -> list[str]:
        """Go to an empty page, and forget what pages keep; the :meth:`problems` until then."""
        found = self.problems()
        if not self.driver.current_url.startswith("about:"):
            self.run("localStorage.clear(); sessionStorage.clear()")
            self.driver.get("about:blank")
            self.driver.get_log("browser")
        return found

    def resize(self, width: int, height: int) -> None:
        """Have the page see a window of that size, which a real one of 500 pixels may not have."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, *, dark: bool) -> None:
        """The system's theme."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script."""
        return self.driver.execute_script(script, *arguments)

    def until(self, condition: str, *arguments: Any, what: str = "") -> Any:
        """Wait until an expression is true; its value."""
        return self.until_so(lambda: self.run(f"return {condition}", *arguments), what or condition)

    def until_so(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until something is so; what it returns."""
        deadline = time.monotonic() + WAIT
        while not (found := condition()):
            assert time.monotonic() < deadline, f"not so: {what}\n{self.text('body')[:3000]}"
            time.sleep(0.1)
        return found

    def text(self, selector: str) -> str:
        """The text of an element, seen or not."""
        found: str = self.run("return document.querySelector(arguments[0]).textContent", selector)
        return found

    def rows(self, selector: str) -> list[list[str]]:
        """The cells of a table's body."""
        script = (
            "return [...document.querySelector(arguments[0]).tBodies[0].rows]"
            ".map(row => [...row.cells].map(cell => cell.textContent))"
        )
        found: list[list[str]] = self.run(script, selector)
        return found

    def data(self, selector: str) -> dict[str, str]:
        """The data attributes of an element."""
        found: dict[str, str] = self.run(
            "return {...document.querySelector(arguments[0]).dataset}", selector
        )
        return found

    def press(self, selector: str, *keys: str) -> None:
        """Type, with the focus on an element."""
        self.run("document.querySelector(arguments[0]).focus({preventScroll: true})", selector)
        self.driver.switch_to.active_element.send_keys(*keys)

    def problems(self) -> list[str]:
        """What the console has had to complain about since the last time."""
        return [
            f"{entry['level']}: {entry['message']}"
            for entry in self.driver.get_log("browser")
            if entry["level"] != "INFO"
        ]

    def picture(self, path: Path) -> None:
        """Save what the window shows."""
        path.write_bytes(base64.b64decode(self.driver.get_screenshot_as_base64()))


@contextmanager
def open_browser(directory: Path) -> Iterator[Browser]:
    """A browser with a profile of its own.

    Args:
        directory: For that profile.

    Raises:
        PartsError: It is not installed.
    """
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in programs.values():
        raise PartsError(
            "tests of the inspector need Debian's packages chromium and chromium-driver"
        )
    options = Options()
    options.binary_location = str(programs["chromium"])
    for flag in (*FLAGS, f"--user-data-dir={directory}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # A sanitizer's runtime is for our own core.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    service = Service(str(programs["chromedriver"]), env=environment)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.set_page_load_timeout(WAIT)
        driver.set_script_timeout(WAIT)
        yield Browser(driver)
    finally:
        driver.quit()
