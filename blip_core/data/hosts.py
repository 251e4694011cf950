"""How many connections one host has to bear at a time, and how soon after each other, from all processes of a machine.

Hosts are told apart by a hash of their name into so many places: two of them may rarely share one, and wait for each
other, but no host gets more than it should. What is made here before processes are forked counts for all of them.
"""

import multiprocessing
import time
import zlib
from collections.abc import Callable

PLACES = 1024


class Hosts:
    """Lets requests to a host begin.

    Args:
        per_host: connections to a host at a time; 0: any number.
        pause_s: seconds between the beginnings of two requests to a host, at least.
    """

    def __init__(self, per_host: int, pause_s: float) -> None:
        context = multiprocessing.get_context("fork")
        self._places = [context.BoundedSemaphore(per_host) for _ in range(PLACES if per_host else 0)]
        self._pause = pause_s
        self._lock = context.Lock()
        self._next = context.RawArray("d", PLACES)  # seconds of the machine's monotonic clock

    def enter(self, host: str) -> Callable[[], None]:
        """Waits until a request to the host may begin; returns what is to be called when it has ended, once or more."""
        number = zlib.crc32(host.lower().encode("utf-8", "surrogatepass")) % PLACES
        leave = _nothing
        if self._places:
            place = self._places[number]
            place.acquire()
            leave = _once(place.release)
        if self._pause:
            self._wait(number)
        return leave

    def _wait(self, number: int) -> None:
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._next[number])
            self._next[number] = begin + self._pause
        time.sleep(begin - now)


def _nothing() -> None:
    """There is nothing to give back."""


def _once(act: Callable[[], object]) -> Callable[[], None]:
    left = [act]

    def leave() -> None:
        while left:  # pop is atomic: of two threads one acts
            left.pop()()

    return leave
