"""What one URL may cost: seconds and bytes, redirects included, held at every single read from its connections.

A timeout of a socket is one of each read, and a server that sends a byte a second keeps it for ever; so each read is
given what is left of the URL's time. Counted is all that is read: heads, bodies and what comes between them.
"""

import io
import socket
import time
from collections.abc import Callable
from http.client import HTTPResponse
from typing import Any


class Refusal(OSError):
    """What is not asked for, or not read on. Never leaves the downloader's processes: its text names the reason."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"refused as {reason}: {detail}")
        self.reason = reason


class Budget:
    """The seconds, the bytes and the redirects that are left to one URL."""

    def __init__(self, seconds: float, max_bytes: int, max_redirects: int) -> None:
        self.seconds, self.max_bytes, self.max_redirects = seconds, max_bytes, max_redirects
        self.left = max_bytes
        self._redirects = 0
        self._deadline = time.monotonic() + seconds

    def timeout(self, longest: float) -> float:
        """Seconds that the next wait may take, `longest` at most. Raises TimeoutError where none are left."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"timed out: it took more than {self.seconds:g} s")
        return min(longest, left)

    def pause(self, seconds: float) -> None:
        """Does not count seconds in which nothing was asked of a server."""
        self._deadline += seconds

    def check(self, announced: int) -> None:
        """Raises Refusal where so many bytes more would be too many."""
        if announced > self.left:
            raise Refusal("too_many_bytes", f"more than {self.max_bytes} bytes")

    def follow(self) -> None:
        """Counts a redirect. Raises Refusal where it is one too many."""
        if self._redirects == self.max_redirects:
            raise Refusal("too_many_redirects", f"more than {self.max_redirects}")
        self._redirects += 1

    def spend(self, count: int) -> None:
        """Counts bytes that were read. Raises Refusal where they are too many."""
        self.check(count)
        self.left -= count


class _Metered(io.RawIOBase):
    """A connection's bytes, within a budget; `done` is called when it is closed."""

    def __init__(self, connection: socket.socket, budget: Budget) -> None:
        super().__init__()
        self.done: Callable[[], None] = lambda: None
        self._connection, self._budget = connection, budget
        self._longest = connection.gettimeout() or budget.seconds
        self._raw = connection.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(self._budget.timeout(self._longest))
        count = self._raw.readinto(buffer) or 0
        self._budget.spend(count)
        return count

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._raw.close()
            self.done()


class _Reader(io.BufferedReader):
    """Refuses a length that is beyond the budget before there is memory for it: servers may claim any."""

    def __init__(self, raw: _Metered, budget: Budget) -> None:
        super().__init__(raw)
        self._budget = budget

    def read(self, size: int | None = -1, /) -> bytes:
        self._budget.check((size or 0) - io.DEFAULT_BUFFER_SIZE)  # of which some may lie in the buffer, counted
        return super().read(size)


class BudgetedResponse(HTTPResponse):
    """An answer that is read within a budget."""

    def __init__(self, connection: socket.socket, *arguments: Any, budget: Budget, **options: Any) -> None:
        super().__init__(connection, *arguments, **options)
        self.fp.close()
        self._metered = _Metered(connection, budget)
        self.fp = _Reader(self._metered, budget)

    def when_closed(self, act: Callable[[], None]) -> None:
        """Has `act` called when nothing more is read from the connection, now where that is so."""
        self._metered.done = act
        if self._metered.closed:
            act()
