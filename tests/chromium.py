"""A real browser, driven through its DevTools pipe: no port, no WebSocket, no package."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60.0  # seconds for an answer


class Browser:
    """One tab, and all that it said."""

    def __init__(self, profile: Path) -> None:
        assert PROGRAM is not None
        (theirs_in, self.out), (self.inp, theirs_out) = os.pipe(), os.pipe()
        far = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (theirs_in, theirs_out)]  # not 3 or 4 themselves
        words = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]  # fmt: skip
        log = os.open(profile.with_suffix(".log"), os.O_WRONLY | os.O_CREAT, 0o600)
        moves = [(os.POSIX_SPAWN_DUP2, far[0], 3), (os.POSIX_SPAWN_DUP2, far[1], 4), (os.POSIX_SPAWN_DUP2, log, 2)]
        self.process = os.posix_spawn(PROGRAM, words, os.environ, file_actions=moves, setpgroup=0)
        for fd in (theirs_in, theirs_out, *far, log):
            os.close(fd)
        self.number, self.rest, self.session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        os.close(self.out)
        os.close(self.inp)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        call = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.out, json.dumps(call).encode() + b"\0")
        while (answer := self._message()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _message(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.inp], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser says nothing"
            read = os.read(self.inp, 1 << 20)
            assert read, "the browser has ended"
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, url: str, width: int = 1200, dark: bool = False) -> None:
        """Load a page and wait until it is there; what other pages said is forgotten."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.events = []
        self.ask("Page.navigate", url=url)
        while not self.said("Page.loadEventFired"):
            self.events.append(self._message())

    def said(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def run(self, script: str) -> Any:
        """The value of an expression, after the page has had a moment to draw."""
        wrapped = f"new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done))).then(() => ({script}))"
        found = self.ask("Runtime.evaluate", expression=wrapped, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def mouse(self, kind: str, x: float, y: float) -> None:
        self.ask(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=0 if kind == "mouseMoved" else 1, clickCount=1
        )

    def complaints(self) -> list[Any]:
        """Errors, exceptions, words on the console, dialogs."""
        self.run("0")  # what is on its way arrives first
        errors = [entry for entry in self.said("Log.entryAdded") if entry["entry"]["level"] in ("error", "warning")]
        return (errors + self.said("Runtime.exceptionThrown") + self.said("Runtime.consoleAPICalled")
                + self.said("Page.javascriptDialogOpening"))  # fmt: skip

    def requests(self) -> list[str]:
        return [told["request"]["url"] for told in self.said("Network.requestWillBeSent")]


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """
    Args:
        profile: a folder of its own, that need not be there.
    """
    opened = Browser(profile)
    try:
        yield opened
    finally:
        opened.close()
