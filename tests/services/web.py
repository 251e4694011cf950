"""The web of the scenes, which can misbehave for a while: busy, broken, slow, or cutting off what it sends."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, TypeVar

Server = TypeVar("Server", bound=ThreadingHTTPServer)
Mood = Literal["well", "429", "500", "slow", "cut"]

RETRY_AFTER = "2"
_TRICKLE_SECONDS = 0.2
_TRICKLE_BYTES = 64


class Web(ThreadingHTTPServer):
    """Serves the files of `folder/images` as its `mood` is; `mistreated` counts the requests not answered well."""

    request_queue_size = 256
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.mood: Mood = "well"
        self.asked = 0
        self.mistreated = 0
        self._plan: tuple[int, Mood, float] | None = None
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def misbehave(self, mood: Mood, after: int, seconds: float) -> None:
        """Plans to change the mood when so many more requests have come, and back after some seconds."""
        with self._lock:
            self._plan = (self.asked + after, mood, seconds)
            self.mistreated = 0

    def count(self) -> None:
        """Counts one more request, and changes the mood when it is time."""
        with self._lock:
            self.asked += 1
            if self._plan and self.asked >= self._plan[0]:
                _, self.mood, seconds = self._plan
                self._plan = None
                threading.Timer(seconds, self.recover).start()
            self.mistreated += self.mood != "well"

    def recover(self) -> None:
        """Behaves well again."""
        self.mood = "well"


@contextmanager
def web(folder: Path) -> Iterator[Web]:
    """A running web, well at first."""
    with serving(Web(folder)) as server:
        yield server


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Runs any server of a test in a thread, for the length of a with block."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        """Answers as the mood is."""
        self.server.count()
        mood = self.server.mood
        path = self.server.folder / "images" / Path(self.path).name
        if mood in ("429", "500"):
            self._refuse(int(mood))
        elif not path.is_file():
            self.send_error(404)
        else:
            self._send(path.read_bytes(), mood)

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", RETRY_AFTER)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, body: bytes, mood: Mood) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/png" if self.path.endswith("png") else "image/jpeg")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if mood == "cut":
            self.wfile.write(body[: len(body) // 2])
        elif mood == "slow":
            self._trickle(body)
        else:
            self.wfile.write(body)

    def _trickle(self, body: bytes) -> None:
        """A few bytes at a time, as long as the mood lasts."""
        while body and self.server.mood == "slow":
            self.wfile.write(body[:_TRICKLE_BYTES])
            body = body[_TRICKLE_BYTES:]
            time.sleep(_TRICKLE_SECONDS)
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Silent."""
