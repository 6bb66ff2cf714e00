"""A real browser for tests of pages: Debian's Chromium without a window, spoken to over its DevTools pipe.

The pipe needs nothing but the standard library: messages are JSON with a NUL behind, on file descriptors 3 and 4.

    python tests/support/browser.py PAGE OUT.png [SELECTOR [NUMBER]]    # a screenshot, after a click on an element
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")

_FLAGS = (
    "--headless",
    "--no-sandbox",  # root cannot have it, and the only pages are the tests' own
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def chromium() -> str | None:
    """Chromium's path, or None."""
    return os.environ.get("XCOS_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


def require() -> None:
    """Skip the test where there is no Chromium; fail where there has to be one (XCOS_BROWSER=required, as in CI)."""
    if chromium() is None:
        reason = "no Chromium on this machine (Debian: apt-get install chromium; or set XCOS_CHROMIUM)"
        if os.environ.get("XCOS_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)


_KEYS = {
    "Tab": 9, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip


class Browser:
    """One tab. Use :func:`open_browser`."""

    def __init__(self, profile: str) -> None:
        path = chromium()
        assert path is not None
        theirs_in, self._out = self._pipe()
        self._in, theirs_out = self._pipe()
        actions = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4)]
        actions.append((os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0))  # type: ignore[arg-type]
        self._pid = os.posix_spawn(
            path,
            [path, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            {**os.environ, "HOME": profile},
            file_actions=actions,
            setpgroup=0,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    @staticmethod
    def _pipe() -> tuple[int, int]:
        # Away from 3 and 4, which the child gets.
        ends = os.pipe()
        moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
        for end in ends:
            os.close(end)
        return moved[0], moved[1]

    # --- protocol

    def ask(self, method: str, timeout: float = 60, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol; gives its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        number = self._number
        deadline = time.monotonic() + timeout
        while True:
            answer = self._message(deadline, method)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _message(self, deadline: float, waiting_for: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left = deadline - time.monotonic()
            ready = select.select([self._in], [], [], max(left, 0))[0]
            assert ready, f"Chromium did not answer: {waiting_for}"
            piece = os.read(self._in, 1 << 20)
            assert piece, "Chromium has gone"
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def wait_for(self, event: str, timeout: float = 60) -> dict[str, Any]:
        """The next event of a name, among those that came and those that will."""
        deadline = time.monotonic() + timeout
        seen = 0
        while True:
            for message in self.events[seen:]:
                if message["method"] == event:
                    return message
            seen = len(self.events)
            self._message(deadline, event)

    # --- what tests do

    def open(
        self, page: Path, *, width: int = 1200, height: int = 900, dark: bool = False, phone: bool = False
    ) -> None:
        """Load a file as ``file://`` and wait until it is complete."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri())
        self.wait_for("Page.loadEventFired")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def middle(self, selector: str, which: int = 0) -> tuple[float, float]:
        """Scroll an element into view and give its middle in the window."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{which}];"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        return x, y

    def hover(self, selector: str, which: int = 0) -> None:
        """Move the mouse onto an element."""
        x, y = self.middle(selector, which)
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str, which: int = 0) -> None:
        """Click an element with the mouse."""
        x, y = self.middle(selector, which)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def press(self, key: str) -> None:
        """Press a key, by its name, e.g. ``ArrowDown``."""
        for kind in ("rawKeyDown", "keyUp"):
            code = {
                "Tab": 9,
                "Escape": 27,
                "Home": 36,
                "End": 35,
                "ArrowLeft": 37,
                "ArrowUp": 38,
                "ArrowRight": 39,
                "ArrowDown": 40,
            }
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code[key])

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Save a screenshot as PNG, of the window or of the whole page."""
        data = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))[
            "data"
        ]
        path.write_bytes(base64.b64decode(data))

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def complaints(self) -> list[str]:
        """Errors, dialogs and requests for anything that is not in the page, since it was opened."""
        self.run("new Promise((done) => setTimeout(done, 50))")
        found = []
        for event in self.events:
            name, parameters = event["method"], event["params"]
            if name == "Runtime.exceptionThrown":
                found.append(f"exception: {parameters['exceptionDetails']}")
            elif name == "Runtime.consoleAPICalled":
                found.append(f"console: {parameters['args']}")
            elif name == "Log.entryAdded":
                found.append(f"log: {parameters['entry']['text']}")
            elif name == "Page.javascriptDialogOpening":
                found.append(f"dialog: {parameters['message']}")
            elif name == "Network.requestWillBeSent":
                url = parameters["request"]["url"]
                if not url.startswith("data:") and parameters.get("type") != "Document":
                    found.append(f"request: {url}")
        return found

    @contextlib.contextmanager
    def inside_frame(self, which: int = 0) -> Iterator[None]:
        """:meth:`run` in a frame of the page that is a document apart (as sandboxed ones are)."""
        outer, self._session = self._session, None
        frames = [t["targetId"] for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "iframe"]
        try:
            self._session = self.ask("Target.attachToTarget", targetId=frames[which], flatten=True)["sessionId"]
            self.ask("Runtime.enable")
            self.ask("Log.enable")
            yield
        finally:
            self._session = outer

    def close(self) -> None:
        """End the browser and everything that it started."""
        self._session = None
        with contextlib.suppress(AssertionError, OSError):
            self.ask("Browser.close", timeout=5)
        deadline = time.monotonic() + 5
        while os.waitpid(self._pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                break
            time.sleep(0.02)
        os.close(self._in)
        os.close(self._out)


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser with an empty profile that is gone afterwards."""
    profile = tempfile.mkdtemp(prefix="xcos-browser-")
    try:
        with contextlib.closing(Browser(profile)) as browser:
            yield browser
    finally:
        shutil.rmtree(profile, ignore_errors=True)


def main(page: str, out: str, selector: str | None = None, which: str = "0") -> None:
    """Save a screenshot of a page's first 1200 x 1220 pixels."""
    with open_browser() as browser:
        browser.open(Path(page), height=1220)
        if selector is not None:
            browser.click(selector, int(which))
            browser.run("scrollTo(0, 0)")
        browser.picture(Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
