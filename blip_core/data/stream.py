"""The training stream: endless batches of pairs, the same for any number of processes and workers.

Process r of W has the samples n = r (mod W) of the order that the lanes define, its worker k of K every K-th of
these. How far each lane has been read says all that a resumed training needs to go on exactly.
"""

import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from blip_core.data.lanes import Lanes, Progress, Sample
from blip_core.data.pairs import PairSource
from blip_core.data.transforms import Transform
from blip_core.data.workers import Share, samples_from_workers
from blip_core.errors import ConfigError


class PairBatch(NamedTuple):
    """B pairs: images (B, 3, S, S), their texts, and (B,) int64 that is equal where the image is."""

    images: Tensor
    texts: list[str]
    image_ids: Tensor


class Position(TypedDict):
    """Where the next batch begins; equal to itself after a trip through JSON."""

    sample: int  # the next batch's first number in the global order
    lanes: int  # of the whole training
    progress: list[list[int]]  # [lane, pairs consumed, undecodable ones among them], ascending


def merge_positions(positions: Sequence[Position]) -> Position:
    """The position of the whole training from those of all its processes, at the same batch.

    Raises ConfigError where they are not of one batch of one training.
    """
    places = sorted({(position["sample"], position["lanes"]) for position in positions})
    if len(places) != 1:
        found = ", ".join(f"sample {sample} of {lanes} lanes" for sample, lanes in places) or "nowhere"
        raise ConfigError(f"positions: the processes stand at {found}; all must stand at the same batch")
    progress = sorted(row for position in positions for row in position["progress"])
    return {**positions[0], "progress": progress}


class PairStream:
    """An endless stream of batches.

    Args:
        sources: where the pairs are; each text of an image is a pair of its own.
        batch_size: pairs of a batch over all processes; this one's batches have batch_size / world.
        transform: picture to tensor; may draw from torch's global generator, which is seeded for every pair.
        seed: decides order and augmentation, together with `lanes`.
        rank, world: the number of this process, and of all.
        lanes: parallel readers of the data, a multiple of world x workers.
        workers: processes that decode for this one; 0: it decodes itself.

    Raises ConfigError where the numbers do not divide, ShardError where a file cannot be read, and, with the first
    batch, InputError where the sources hold no pair that can be used.
    """

    def __init__(
        self,
        sources: Sequence[PairSource],
        batch_size: int,
        transform: Transform,
        seed: int,
        rank: int = 0,
        world: int = 1,
        lanes: int = 8,
        workers: int = 0,
    ) -> None:
        _check_division(batch_size, world, lanes, workers)
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.lanes = Lanes(sources, lanes, transform, seed)
        self.workers = workers
        self.waited = 0.0  # seconds in which the next batch was waited for
        self._start(None)

    @property
    def position(self) -> Position:
        """Where the batch after the last one that was given begins, in this process."""
        progress = [[lane, *progress] for lane, progress in sorted(self._progress.items())]
        return {"sample": self._sample, "lanes": self.lanes.lanes, "progress": progress}

    @property
    def undecodable(self) -> int:
        """Images that were passed over in this process's lanes, since the training's beginning."""
        return sum(progress.undecodable for progress in self._progress.values())

    def batches(self, position: Position | None = None) -> Generator[PairBatch, None, None]:
        """Batches from a position on, this process's or a merged one; from the beginning where there is none.

        Raises ConfigError where the position is of another number of lanes, or lacks one of this process's.
        """
        self._start(position)
        return self._batches()

    def _start(self, position: Position | None) -> None:
        own = range(self.rank, self.lanes.lanes, self.world)
        self._sample, self._progress = 0, dict.fromkeys(own, Progress())
        if position is not None:
            saved = {lane: Progress(*progress) for lane, *progress in position["progress"]}
            if position["lanes"] != self.lanes.lanes:
                raise ConfigError(
                    f"lanes: {self.lanes.lanes} lanes cannot go on from a position of {position['lanes']}; "
                    f"keep the {position['lanes']} of the training that was begun"
                )
            missing = [lane for lane in own if lane not in saved]
            if missing:
                raise ConfigError(
                    f"position: lane {missing[0]} is not in it; merge the positions of all processes before another "
                    "process goes on from them"
                )
            self._sample, self._progress = position["sample"], {lane: saved[lane] for lane in own}

    def _batches(self) -> Generator[PairBatch, None, None]:
        began = time.monotonic()
        samples = self._samples()
        while True:
            batch = list(itertools.islice(samples, self.batch_size // self.world))
            self._sample += self.batch_size
            self._progress.update({sample.lane: sample.progress for sample in batch})
            images, ids = torch.stack([sample.image for sample in batch]), [sample.image_id for sample in batch]
            self.waited += time.monotonic() - began
            yield PairBatch(images, [sample.text for sample in batch], torch.tensor(ids))
            began = time.monotonic()

    def _samples(self) -> Iterator[Sample]:
        """This process's samples, in their order."""
        share = Share(self.lanes, self._sample, self.rank, self.world, dict(self._progress))
        return samples_from_workers(share, self.workers) if self.workers else share.samples()


def _check_division(batch_size: int, world: int, lanes: int, workers: int) -> None:
    if batch_size % world:
        raise ConfigError(
            f"batch_size: a batch of {batch_size} pairs does not divide among {world} processes; "
            f"take a multiple of {world}"
        )
    readers = world * max(1, workers)
    if lanes % readers:
        raise ConfigError(
            f"lanes: {lanes} lanes do not divide among {readers} readers ({world} processes x "
            f"{max(1, workers)} workers); take a multiple of {readers}"
        )
