"""Worker processes that decode and augment for a training process, and hand their samples back in chunks.

How they begin and end is in blip_core.data.children.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from blip_core.data.children import begin, fork_server
from blip_core.data.lanes import Lanes, Progress, Sample
from blip_core.errors import CapfiltError

# Samples that travel together. Each worker is at most two chunks and the one in its hands ahead of the training.
CHUNK = 16

Value = TypeVar("Value")


class Share(NamedTuple):
    """The samples of one process: of those that come from number `sample` on, every world-th."""

    lanes: Lanes
    sample: int
    rank: int
    world: int
    progress: Mapping[int, Progress]

    def samples(self, worker: int = 0, workers: int = 1) -> Iterator[Sample]:
        """Every workers-th of them, which the worker with that number makes."""
        reader, readers = self.rank + self.world * worker, self.world * workers
        return self.lanes.samples(self.sample + (reader - self.sample) % readers, readers, self.progress)

    def first_worker(self, workers: int) -> int:
        """The worker that makes the first sample."""
        readers = self.world * workers
        return min(range(workers), key=lambda worker: (self.rank + self.world * worker - self.sample) % readers)


class Chunk(NamedTuple):
    """Some samples of a worker, one after the other."""

    images: Tensor  # (CHUNK, 3, S, S), which travels as one piece of shared memory
    rest: list[tuple[str, int, int, Progress]]  # the other fields of each Sample


class Chunks(IterableDataset[Chunk | CapfiltError]):
    """What the workers make of a share. An error is handed over as it is, so that its message stays one line."""

    def __init__(self, share: Share) -> None:
        self.share = share

    def __iter__(self) -> Iterator[Chunk | CapfiltError]:
        info = get_worker_info()
        samples = self.share.samples(info.id, info.num_workers) if info else self.share.samples()
        try:
            while True:
                taken = list(itertools.islice(samples, CHUNK))
                yield Chunk(torch.stack([sample.image for sample in taken]), [sample[1:] for sample in taken])
        except CapfiltError as error:
            yield error


def samples_from_workers(share: Share, workers: int) -> Iterator[Sample]:
    """The samples of a share in their order, made by so many processes, which live as long as the iterator."""
    loader = DataLoader(
        Chunks(share),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        multiprocessing_context=fork_server(),
        worker_init_fn=_begin,
        generator=torch.Generator(),  # the loader draws a seed, and would otherwise draw it from the trainer's chance
    )
    chunks = iter(loader)
    first = share.first_worker(workers)
    try:
        while True:
            parts = [_opened(next(chunks)) for _ in range(workers)]
            for samples in zip(*parts[first:], *parts[:first], strict=True):
                yield from samples
    finally:
        del chunks  # ends the workers now, and not when an error that holds this frame is forgotten


def _opened(chunk: Chunk | CapfiltError) -> Sequence[Sample]:
    if isinstance(chunk, CapfiltError):
        raise chunk
    return [Sample(image, *rest) for image, rest in zip(chunk.images, chunk.rest, strict=True)]


def _as_it_is(value: Value) -> Value:
    return value


def _begin(worker: int) -> None:
    begin()
