"""A real headless browser, driven by chromedriver over plain HTTP (W3C WebDriver)."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


class Browser:
    """One window."""

    def __init__(self, address: str) -> None:
        self._address = address

    def ask(self, method: str, path: str, content: dict[str, Any] | None = None) -> Any:
        """A WebDriver command; its value."""
        data = None if content is None else json.dumps(content).encode()
        asked = urllib.request.Request(self._address + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(asked, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, address: str) -> None:
        self.ask("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns in the page."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def until(self, script: str, timeout: float = 60) -> Any:
        """What a script returns once that is true."""
        deadline = time.monotonic() + timeout
        while not (found := self.run(script)):
            assert time.monotonic() < deadline, f"still not true after {timeout} s: {script}"
            time.sleep(0.3)
        return found

    def errors(self) -> list[str]:
        """Messages of level SEVERE in the console, failed requests among them."""
        found = self.ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in found if entry["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """Every address that pages asked for since the last call; its own first page and inline data left out."""
        found = self.ask("POST", "/se/log", {"type": "performance"})
        sent = [json.loads(entry["message"])["message"] for entry in found]
        asked = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
        return [address for address in asked if not address.startswith(("chrome", "data:"))]

    def screenshot(self, path: Path, width: int = 1400, height: int = 1000) -> None:
        """Writes what a window of this size shows as a PNG."""
        self.ask("POST", "/window/rect", {"width": width, "height": height})
        path.write_bytes(base64.b64decode(self.ask("GET", "/screenshot")))


@contextmanager
def browser() -> Iterator[Browser]:
    """A fresh browser; the test is skipped where none is installed."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no browser: install the packages chromium and chromium-driver")
    port = free_port()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            await_port(port)
            options = {"binary": binary, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
            window = Browser(f"http://127.0.0.1:{port}")
            session = window.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            window = Browser(f"http://127.0.0.1:{port}/session/{session}")
            try:
                yield window
            finally:
                window.ask("DELETE", "")
        finally:
            process.terminate()
            process.wait(30)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def await_port(port: int, timeout: float = 60) -> None:
    """Returns when something listens there."""
    deadline = time.monotonic() + timeout
    while True:
        with socket.socket() as asking:
            if asking.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, f"nothing listens on port {port}"
        time.sleep(0.2)
