"""Serves the pictures of the scenes over HTTP on loopback, always at the same port for the same folder.

The port is part of every URL, and URLs are part of a shard's name: a run that was killed and starts again
must find the shards it made.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from blip_core.errors import WorkspaceError
from blip_core.files import fingerprint, read_json, write_json

PORT_FILE = "port.json"
# Below the range that systems hand out for outgoing connections, so that the port is free again next time.
FIRST_PORT, PORTS = 20_000, 10_000
CONTENT_TYPES = {"jpg": "image/jpeg", "png": "image/png"}
PICTURE = re.compile(r"/images/([0-9a-f]{16}\.(jpg|png))")


class _Server(ThreadingHTTPServer):
    request_queue_size = 256  # a downloader opens its connections all at once


class _PictureHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    wbufsize = -1  # one packet for headers and body
    disable_nagle_algorithm = True

    def __init__(self, *arguments: Any, folder: Path) -> None:
        self.folder = folder
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Sends one picture; anything but the name of a picture is not found."""
        named = PICTURE.fullmatch(self.path)
        path = self.folder / "images" / named[1] if named else None
        if named is None or path is None or not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        body = path.read_bytes()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", CONTENT_TYPES[named[2]])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: dead links are part of the scenes."""


@contextmanager
def serve_scenes(folder: Path, port: int | None = None) -> Iterator[str]:
    """Serves `folder/images` while the block runs; yields the base URL, such as `http://127.0.0.1:23456`.

    Without a port, the one that the folder was served at before is taken again; where that is not free, another
    is chosen and kept for the next time. Raises WorkspaceError where the given port, or every port, is taken.
    """
    server = _listen(folder, port)
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.05), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _listen(folder: Path, port: int | None) -> _Server:
    handler = partial(_PictureHandler, folder=folder)
    kept = folder / PORT_FILE
    for candidate in [port] if port is not None else _candidates(folder):
        try:
            server = _Server(("127.0.0.1", candidate), handler)
        except OSError:
            continue
        if port is None:
            write_json(kept, {"port": server.server_port})
        return server
    ports = f"port {port}" if port is not None else f"every port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1}"
    raise WorkspaceError(f"{ports} on 127.0.0.1: cannot be listened on; choose a free one")


def _candidates(folder: Path) -> Iterator[int]:
    """The port of the last time, then ports from one that the folder's path decides."""
    kept = folder / PORT_FILE
    if kept.exists():
        yield read_json(kept)["port"]
    start = int(fingerprint(str(folder.resolve())), 16)
    for offset in range(PORTS):
        yield FIRST_PORT + (start + offset) % PORTS
