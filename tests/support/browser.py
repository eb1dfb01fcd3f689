"""Opens a page in headless Chromium without a network, and returns what a reader would see.

Chromium speaks its DevTools protocol over a pipe (descriptors 3 and 4), so nothing but the standard
library is needed and the page under test is opened as it is, not a changed copy of it.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
SKIP = "Chromium is not installed: no browser test was run. On Debian: apt-get install chromium"

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--disable-extensions", "--disable-dev-shm-usage", "--mute-audio",
    "--hide-scrollbars",
    # Two locks: no name resolves, and the proxy is a port without a server. The second is for
    # addresses without a name, and "<-loopback>" sends those of this machine there as well.
    "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=http://127.0.0.1:1",
    "--proxy-bypass-list=<-loopback>",
]  # fmt: skip

# What a reader would see of every figure: the box of the drawing that is shown, and how much is
# drawn in it. An empty <svg> has a box, given by its style, and nothing inside.
LOOK = """
(() => [...document.querySelectorAll("[data-figure]")].map(figure => {
  const shown = [...figure.querySelectorAll("svg, img, canvas")]
    .filter(drawing => drawing.getClientRects().length);
  const box = shown.length ? shown[0].getBoundingClientRect() : {width: 0, height: 0};
  const ink = shown.flatMap(drawing => [...drawing.querySelectorAll("path, use, text")])
    .filter(mark => { const b = mark.getBoundingClientRect(); return b.width + b.height > 0; });
  const right = Math.max(0, ...ink.map(mark => mark.getBoundingClientRect().right));
  return {id: figure.id, drawings: shown.length, width: box.width, height: box.height,
          marks: ink.length, overhang: Math.max(0, right - box.right)};
}))()
"""


@dataclass(frozen=True)
class Seen:
    """The state of a page in the browser.

    Args:
        errors: Messages of the console, of uncaught exceptions and of loads that failed.
        requests: Addresses that were asked for, the page itself not counted.
        figures: For every element with ``data-figure``: ``id``, ``drawings`` shown, ``width``,
            ``height`` (CSS pixels), ``marks`` drawn, ``overhang`` (pixels outside, to the right).
        width: Width of the content in CSS pixels; more than the window's means it scrolls sideways.
        text: The text that is shown.
    """

    errors: tuple[str, ...]
    requests: tuple[str, ...]
    figures: tuple[dict[str, Any], ...]
    width: int
    text: str

    def problems(self) -> list[str]:
        """Return all problems of the page; an empty list if there are none."""
        found = [f"error: {message}" for message in self.errors]
        found += [f"asks for {address}" for address in self.requests]
        for figure in self.figures:
            if figure["drawings"] != 1:
                found.append(f"figure {figure['id']} shows {figure['drawings']} drawings")
            elif not (figure["width"] > 50 and figure["height"] > 50):
                found.append(f"figure {figure['id']} has no size")
            elif figure["marks"] < 5:
                found.append(f"figure {figure['id']} is empty")
        return found


class Browser:
    """A headless Chromium without a network. Use it as a context manager."""

    def __enter__(self) -> Browser:
        assert CHROMIUM is not None, SKIP
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Chromium wants its pipe at 3 and 4. A small process in between puts it there: in this one
        # those numbers may be taken.
        launch = (
            "import os, sys\n"
            "r, w = (os.dup(int(n)) for n in sys.argv[1:3])\n"
            "r, w = os.dup2(r, 20), os.dup2(w, 21)\n"
            "os.dup2(r, 3); os.dup2(w, 4)\n"
            "os.execv(sys.argv[3], sys.argv[3:])\n"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", launch, str(to_read), str(to_write), CHROMIUM, *FLAGS,
             "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank"],
            pass_fds=(to_read, to_write), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._number, self._events = b"", 0, []
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._say("Browser.close")
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired, AssertionError):
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def look(
        self, page: Path, width: int = 1200, screenshot: Path | None = None, media: str = "screen"
    ) -> Seen:
        """Open ``page`` in a window ``width`` CSS pixels wide and return what it shows."""
        target = self._say("Target.createTarget", url="about:blank")["targetId"]
        session = self._say("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

        def say(method: str, **params: Any) -> Any:
            return self._say(method, session, **params)

        self._events = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            say(f"{domain}.enable")
        say("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0,
            uploadThroughput=0)  # fmt: skip
        say("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=2
            if width < 600 else 1, mobile=width < 600)  # fmt: skip
        say("Emulation.setEmulatedMedia", media=media)
        address = page.resolve().as_uri()
        say("Page.navigate", url=address)
        self._until("Page.loadEventFired")
        # Two frames after the load everything has been laid out and the load's errors are in.
        frames = "done => requestAnimationFrame(() => requestAnimationFrame(() => later(done)))"
        later = "const later = done => setTimeout(done, 50)"
        say("Runtime.evaluate", awaitPromise=True, expression=f"{later}; new Promise({frames})")

        def value(expression: str) -> Any:
            return say("Runtime.evaluate", expression=expression, returnByValue=True)["result"][
                "value"
            ]

        figures = value(LOOK)
        across, text = value("[document.documentElement.scrollWidth, document.body.innerText]")
        if screenshot is not None:
            shot = say("Page.captureScreenshot", captureBeyondViewport=True)
            screenshot.write_bytes(base64.b64decode(shot["data"]))
        events, self._events = self._events, []
        self._say("Target.closeTarget", targetId=target)
        return Seen(
            errors=tuple(message for event in events for message in _complaint(event)),
            requests=tuple(
                event["params"]["request"]["url"]
                for event in events
                if event["method"] == "Network.requestWillBeSent"
                and event["params"]["request"]["url"] != address
            ),
            figures=tuple(figures),
            width=int(across),
            text=text,
        )

    def _say(self, method: str, session: str | None = None, **params: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._events.append(answer)
        assert "error" not in answer, f"{method}: {answer.get('error')}"
        return answer["result"]

    def _until(self, method: str) -> None:
        while not any(event["method"] == method for event in self._events):
            self._events.append(self._next())

    def _next(self, seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            left = end - time.monotonic()
            ready = left > 0 and select.select([self._read], [], [], left)[0]
            assert ready, f"Chromium said nothing for {seconds} s."
            piece = os.read(self._read, 1 << 20)
            assert piece, "Chromium ended early."
            self._buffer += piece
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)


def _complaint(event: dict[str, Any]) -> list[str]:
    params = event.get("params", {})
    if event["method"] == "Runtime.exceptionThrown":
        details = params["exceptionDetails"]
        return [details.get("exception", {}).get("description", details["text"])]
    if event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
        return [" ".join(str(a.get("value", a.get("description"))) for a in params["args"])]
    if event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
        entry = params["entry"]
        return [f"{entry['text']} {entry.get('url', '')}".strip()]
    if event["method"] == "Network.loadingFailed":
        return [f"load failed: {params.get('errorText') or params.get('blockedReason')}"]
    return []
