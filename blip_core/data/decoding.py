"""Pictures for the models, decoded in worker processes while a model computes.

A picture is decoded once, at a fraction of its size where that is enough, whatever number of sizes is wanted of it.
Pixels come back as bytes in shared memory; what a model makes of them (`transforms.normalise`) is done on its device.
"""

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from blip_core.data.children import begin, fork_server
from blip_core.data.images import UnreadableImage, decode_image
from blip_core.data.transforms import to_pixels
from blip_core.errors import CapfiltError

# Images that travel together.
CHUNK = 16


class Decoded(NamedTuple):
    """What became of some images.

    Attributes:
        pixels: for each size S, uint8 (R, 3, S, S): the R images that can be read, in order.
        reasons: for each image why it cannot be read, one of blip_core.data.shards.REASONS; None where it can.
    """

    pixels: dict[int, Tensor]
    reasons: list[str | None]


def decode(images: Sequence[bytes], sizes: Sequence[int]) -> Decoded:
    """Decodes images, squashed to squares of these sides as `eval_transform` does."""
    views = {size: to_pixels(size) for size in sizes}
    found: dict[int, list[Tensor]] = {size: [] for size in sizes}
    reasons: list[str | None] = []
    for data in images:
        try:
            picture = decode_image(data, size=max(sizes))
        except UnreadableImage as error:
            reasons.append(error.reason)
            continue
        reasons.append(None)
        for size, view in views.items():
            found[size].append(view(picture))
    return Decoded({size: _stacked(tensors, size) for size, tensors in found.items()}, reasons)


class Decoder:
    """Decodes batches in the order in which they were begun. Made by `decoder`; any thread may use it.

    Without workers, batches are decoded in a thread of this process.
    """

    def __init__(self, sizes: Iterable[int], workers: int, pinned: bool) -> None:
        self.sizes = sorted(set(sizes))
        self.workers = workers
        self.pinned = pinned
        self._pool = _new_pool(workers)  # starts no process before there is work
        self._renewing = threading.Lock()
        self._gatherer = ThreadPoolExecutor(1, thread_name_prefix="gather-pictures")

    def begin(self, images: Sequence[bytes]) -> Future[Decoded]:
        """Begins to decode a batch. One at which a process dies is tried once again.

        This, or the result, raises CapfiltError where processes have died twice.
        """
        if not self.workers or not images:
            return self._gatherer.submit(lambda: self._joined([decode(images, self.sizes)]))
        chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
        return self._gatherer.submit(self._gather, chunks, self._submit(chunks))

    def close(self) -> None:
        """Ends threads and processes; what has not been decoded is given up."""
        self._gatherer.shutdown(wait=False, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._gatherer.shutdown(wait=True)

    def _submit(self, chunks: list[Sequence[bytes]]) -> list[Future[Decoded]]:
        """Hands chunks to the processes, to new ones where those have died."""
        with self._renewing:
            try:
                return [self._pool.submit(decode, chunk, self.sizes) for chunk in chunks]
            except BrokenProcessPool:
                self._pool.shutdown(wait=True, cancel_futures=True)
                self._pool = _new_pool(self.workers)
            try:
                return [self._pool.submit(decode, chunk, self.sizes) for chunk in chunks]
            except BrokenProcessPool as error:
                raise self._died(chunks) from error

    def _gather(self, chunks: list[Sequence[bytes]], begun: list[Future[Decoded]]) -> Decoded:
        try:
            return self._joined([future.result() for future in begun])
        except (BrokenProcessPool, MemoryError):
            begun = self._submit(chunks)
        try:
            return self._joined([future.result() for future in begun])
        except (BrokenProcessPool, MemoryError) as error:
            raise self._died(chunks) from error

    def _died(self, chunks: list[Sequence[bytes]]) -> CapfiltError:
        return CapfiltError(
            f"{sum(map(len, chunks))} images could not be decoded: a process that decodes died, and one more when they "
            f"were tried again (killed, or out of memory or of /dev/shm; {self.workers} share those). Give "
            "annotate.workers a smaller number"
        )

    def _joined(self, parts: list[Decoded]) -> Decoded:
        """The parts of a batch as one, in memory from which a GPU can copy by itself where `pinned`."""
        reasons = [reason for part in parts for reason in part.reasons]
        pixels = {
            size: torch.empty((reasons.count(None), 3, size, size), dtype=torch.uint8, pin_memory=self.pinned)
            for size in self.sizes
        }
        for size, tensor in pixels.items():
            torch.cat([part.pixels[size] for part in parts], out=tensor)
        return Decoded(pixels, reasons)


@contextmanager
def decoder(sizes: Iterable[int], workers: int | None = None, pinned: bool = False) -> Iterator[Decoder]:
    """A Decoder, which ends with the block.

    Args:
        sizes: sides of the squares wanted of every picture, in pixels.
        workers: processes that decode; 0: none; None: one for every two cores, 16 at most.
        pinned: puts the pixels into page-locked memory, for copies to a GPU that do not hold up the program.
    """
    made = Decoder(sizes, default_workers() if workers is None else workers, pinned)
    try:
        yield made
    finally:
        made.close()


def default_workers() -> int:
    """One process for every two cores that this process may use, 1..16."""
    return min(16, max(1, len(os.sched_getaffinity(0)) // 2))


def _stacked(tensors: list[Tensor], size: int) -> Tensor:
    return torch.stack(tensors) if tensors else torch.empty((0, 3, size, size), dtype=torch.uint8)


def _new_pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max(1, workers), mp_context=fork_server(), initializer=_begin_to_decode)


def _begin_to_decode() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; whoever asked for pictures handles it
    begin()
