"""An object store of a test's own: moto's server, which speaks S3, on loopback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows.server import free_port
from services.program import Program, accepts

pytest.importorskip("s3fs")
pytest.importorskip("moto")


class S3(Program):
    """The server as a program, the variables that lead a client to it, and its log of requests."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        super().__init__(command, folder / "s3.log", lambda: accepts(port))
        self.variables = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost"])),
        }

    def requests(self) -> list[str]:
        """The requests so far, such as `GET /bucket/key HTTP/1.1`."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line.split('"')[1] for line in lines if '" ' in line and " HTTP/1" in line]


@contextmanager
def s3(folder: Path) -> Iterator[S3]:
    """A running store without buckets; its log lies in the folder."""
    with S3(folder) as server:
        yield server.start()
