"""A Redis of a test's own, from Debian's package."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.server import free_port
from services.program import Program, find_program


class Redis(Program):
    """The server as a program, and its port."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        program = find_program("redis-server")
        words = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        super().__init__([program, *words], folder / "redis.log", self._answers)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


@contextmanager
def redis(folder: Path) -> Iterator[Redis]:
    """A running Redis that keeps nothing; skips the test where it is not installed."""
    with Redis(folder) as server:
        server.start()
        yield server
