"""A headless Chromium for tests of pages: how they are laid out, and what they look like.

    with Browser(tmp_path) as browser:
        page = browser.open("file:///tmp/report.html", width=390)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.screenshot(tmp_path / "phone.png")

It speaks the Chrome DevTools Protocol with whichever Chromium or Chrome is installed (Debian:
`apt-get install chromium`); CHROMIUM names another one. Nothing is downloaded.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 60


def chromium() -> str | None:
    """The path of an installed browser."""
    named = os.environ.get("CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


needs_chromium = pytest.mark.skipif(
    chromium() is None, reason="no Chromium is installed (apt-get install chromium)"
)


class Browser:
    """A browser process, and one page in it.

    Args:
        profile: an existing directory for the browser's files.
    """

    def __init__(self, profile: Path) -> None:
        self.profile = profile
        self.events: list[dict[str, Any]] = []
        self._sent = 0

    def __enter__(self) -> Self:
        executable = chromium()
        assert executable is not None, "mark the test with needs_chromium"
        command = [
            executable, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-port=0",
            f"--user-data-dir={self.profile}", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._loop = asyncio.new_event_loop()
        try:
            self._run(self._connect())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if hasattr(self, "_session"):
            self._run(self._session.close())
        self._loop.close()
        self._process.terminate()
        self._process.communicate(timeout=TIMEOUT_S)

    def open(self, url: str, *, width: int, height: int = 900) -> Self:
        """Load a page in a window of this size; below 600 pixels it is a phone's."""
        phone = width < 600
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=phone,
        )  # fmt: skip
        self.call("Page.navigate", url=url)
        self._run(self._until("Page.loadEventFired"))
        return self

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> Path:
        """The whole page as a PNG file."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path

    def happened(self, method: str) -> list[dict[str, Any]]:
        """The parameters of all events of this kind since the page was opened."""
        return [event["params"] for event in self.events if event["method"] == method]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer."""
        answer: dict[str, Any] = self._run(self._call(method, **params))
        return answer

    def _run(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, TIMEOUT_S))

    async def _connect(self) -> None:
        assert self._process.stderr is not None
        found = None
        while not found:
            line = self._process.stderr.readline()
            assert line, "the browser ended before it listened"
            found = re.search(r"DevTools listening on ws://([\d.:]+)/", line)
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://{found[1]}/json/list") as answer:
            pages = [page for page in await answer.json() if page["type"] == "page"]
        self._socket = await self._session.ws_connect(
            pages[0]["webSocketDebuggerUrl"], max_msg_size=0
        )
        for domain in ("Page", "Network", "Log", "Runtime"):
            await self._call(f"{domain}.enable")

    async def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._sent += 1
        await self._socket.send_json({"id": self._sent, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._sent:
                assert "error" not in message, message
                answer: dict[str, Any] = message["result"]
                return answer
            self.events.append(message)

    async def _until(self, method: str) -> None:
        while not self.happened(method):
            self.events.append(await self._socket.receive_json())
