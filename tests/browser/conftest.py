"""A headless Chromium, driven over its DevTools protocol through two pipes: nothing to install but the browser."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --remote-debugging-pipe"
)
# the browser reads commands from descriptor 3 and writes answers and events to 4, each message ended by a zero byte
ON_ITS_DESCRIPTORS = 'exec "$@" 3<&{commands} 4>&{answers}'


class BrowserGoneError(Exception):
    """The browser has ended, or never began."""


@dataclass
class Tab:
    """One page. `problems` are its console errors, exceptions and whatever it tried to load."""

    commands: Any
    answers: Any
    session: str = ""
    sent: int = 0
    problems: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command, keep what happens meanwhile, return its answer."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        try:
            self.commands.write(json.dumps(message).encode() + b"\0")
            self.commands.flush()
        except BrokenPipeError as e:
            raise BrowserGoneError from e
        while (answer := self._next()).get("id") != self.sent:
            self._note(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def wait_for(self, event: str) -> None:
        """Read on until an event has happened since the page was opened."""
        while event not in self.seen:
            self._note(self._next())

    def open(self, page: Path, width: int, *, dark: bool = False) -> None:
        """Load a page at a width in CSS pixels, and wait until all of it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.seen.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait_for("Page.loadEventFired")

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def printed(self) -> bytes:
        """Write the page as PDF, as it would be printed."""
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"])

    def _next(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self.answers.read(1)) not in (b"\0", b""):
            message += byte
        if not message:
            raise BrowserGoneError
        event: dict[str, Any] = json.loads(message)
        return event

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method", ""), event.get("params", {})
        self.seen.add(method)
        if method == "Runtime.exceptionThrown":
            self.problems.append(f"exception: {params['exceptionDetails']['text']}")
        if method == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
            self.problems.append(f"log: {params['entry']['text']}")
        if method == "Runtime.consoleAPICalled" and params["type"] in ("warning", "error", "assert"):
            self.problems.append(f"console: {params['args']}")
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("data:", "file:")):
            self.problems.append(f"request: {params['request']['url'][:80]}")


@contextmanager
def opened_tab(browser: str, profile: Path) -> Iterator[Tab | None]:
    """Open a page of a browser that lives as long as the block; None where it does not start."""
    (their_end, commands), (answers, their_answers) = os.pipe(), os.pipe()
    script = ON_ITS_DESCRIPTORS.format(commands=their_end, answers=their_answers)
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", browser, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(their_end, their_answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_end)
    os.close(their_answers)
    try:
        with os.fdopen(commands, "wb") as to_it, os.fdopen(answers, "rb") as from_it:
            tab = Tab(to_it, from_it)
            try:
                target = tab.call("Target.createTarget", url="about:blank")["targetId"]
            except BrowserGoneError:
                yield None
                return
            tab.session = tab.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                tab.call(f"{domain}.enable")
            yield tab
            tab.session = ""
            tab.call("Browser.close")
    finally:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """Open a page of this machine's Chromium; skips where there is none."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)} is installed")
    with opened_tab(browser, tmp_path_factory.mktemp("browser")) as page:
        if page is None:
            pytest.skip(f"{browser} does not start here")
        yield page
