"""Debian's Chromium without a window, driven by Playwright, with a note of every address that it asks for."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from services.program import find_program

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    # what the browser itself might ask for, beside the pages
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]
SIZE = {"width": 1440, "height": 900}
WAIT_SECONDS = 60
LOOPBACK = ("127.0.0.1", "localhost")


class Browser:
    """A page in a browser of its own, and the hosts other than this machine's that any page has asked.

    Requests to them are noted and refused: a test never leaves the machine.
    """

    def __init__(self, context: BrowserContext) -> None:
        self.foreign: set[str] = set()
        context.set_default_timeout(WAIT_SECONDS * 1000)
        expect.set_options(timeout=WAIT_SECONDS * 1000)
        context.route(re.compile(f"^https?://(?!{'|'.join(map(re.escape, LOOPBACK))})"), lambda route: route.abort())
        context.on("request", lambda request: self._note(request.url))
        self.page: Page = context.pages[0] if context.pages else context.new_page()
        self.page.on("websocket", lambda socket: self._note(socket.url))

    def _note(self, url: str) -> None:
        if not is_local(url):
            self.foreign.add(urlsplit(url).hostname or url)


def is_local(url: str) -> bool:
    """Whether the address is this machine's own, or no address but the thing itself."""
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob", "about", "file") or parts.hostname in LOOPBACK


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A running browser whose profile is this empty folder; skips the test where Chromium is not installed."""
    program = find_program("chromium")
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            folder, executable_path=program, headless=True, args=FLAGS, viewport=SIZE, locale="en-GB"
        )
        try:
            yield Browser(context)
        finally:
            context.close()
