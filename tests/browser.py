"""A headless Chromium, spoken to over the DevTools protocol: opens a page, runs scripts in it, takes pictures.

    python tests/browser.py REPORT --pictures docs        the pictures of docs/report.md

The browser is told to let no page reach the network, and keeps nothing: its profile is a temporary folder.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
_SECONDS = 30.0


class Page:
    """One tab. `messages` is what the page has put on the console, and exceptions that nobody caught."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._number = socket, 0
        self.messages: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser for something and wait for its answer."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=_SECONDS))
            self._note(message)
            if message.get("id") == self._number:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.messages.append(details.get("exception", {}).get("description") or details["text"])
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(one.get("value")) for one in parameters["args"]))
        elif message.get("method") == "Log.entryAdded":
            self.messages.append(parameters["entry"]["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def open(self, path: Path, fragment: str = "", query: str = "") -> None:
        """Load a file and wait until it is there."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=f"{path.resolve().as_uri()}{query}{fragment}")
        end = time.monotonic() + _SECONDS
        while not self.ask("document.readyState === 'complete' && location.href !== 'about:blank'"):
            assert time.monotonic() < end, "the page does not load"
            time.sleep(0.05)

    def ask(self, script: str) -> Any:
        """The value of an expression in the page; an object comes as plain data."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def size(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """The size of the window in CSS pixels, and the device's colours."""
        scale = 2 if phone else 1
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, target: Path, *, whole: bool = False) -> None:
        """Save what is seen as a PNG, or the whole page."""
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        target.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser() -> Iterator[Page]:
    """A browser with one empty tab, which is gone after the block."""
    from websockets.sync.client import connect

    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        command = [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars"),
            *("--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"),
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = _port(Path(profile) / "DevToolsActivePort", process)
            with connect(_tab(port), max_size=None, proxy=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _port(path: Path, process: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and (lines := path.read_text().splitlines()):
            return int(lines[0])
        time.sleep(0.05)
    raise AssertionError("the browser does not start")


def _tab(port: int) -> str:
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/json/list", timeout=_SECONDS) as answer:
        address: str = next(tab for tab in json.load(answer) if tab["type"] == "page")["webSocketDebuggerUrl"]
    return address


PICTURES = (
    ("overview-light", "#0/overview", 1200, 900, False, False),
    ("overview-dark", "#0/overview", 1200, 900, True, False),
    ("curves-dark", "#0/curves", 1200, 1000, True, False),
    ("reward-light", "#0/reward", 1200, 1250, False, False),
    ("samples-dark", "#0/samples", 1200, 800, True, False),
    ("phone-light", "#0/overview", 390, 844, False, True),
    ("phone-dark", "#0/samples", 390, 844, True, True),
)
"""Name, page, width, height, dark, phone."""


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path, help="a page that trivet report wrote")
    parser.add_argument("--pictures", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--only", default="", help="only pictures whose name contains this")
    parser.add_argument("--whole", action="store_true", help="the whole page instead of a screen")
    arguments = parser.parse_args()
    with browser() as page:
        for name, fragment, width, height, dark, phone in PICTURES:
            if arguments.only in name:
                page.size(width, height, dark=dark, phone=phone)
                page.open(arguments.report, fragment)
                page.picture(arguments.pictures / f"report-{name}.png", whole=arguments.whole)
        print("\n".join(page.messages) or "nothing on the console", file=sys.stderr)


if __name__ == "__main__":
    main()
