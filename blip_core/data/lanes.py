"""The order of the training pairs: sample n is the next of lane n % lanes, whoever reads it.

A lane is an endless reader of its own. In each of its epochs it owns every lanes-th of the shuffled units, reads a
window of them at a time and shuffles the window's pairs. So what a lane gives, crops and flips included, follows
from (sources, lanes, seed) alone; processes and workers only share the lanes out.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip_core.data.images import UnreadableImage, decode_image
from blip_core.data.pairs import ImageText, PairSource, count_pairs, read_pairs, row_groups
from blip_core.data.transforms import Transform
from blip_core.errors import InputError

# What all lanes together hold in memory, in row groups; more only where there are more lanes than that.
WINDOW = 16
# Row groups are cut until each lane has so many units in an epoch, as far as their rows allow.
UNITS_OF_A_LANE = 4


class Unit(NamedTuple):
    """What is read at once: the rows share, share + parts ... of a row group."""

    source: int  # its number in the sources
    group: int
    share: int
    parts: int


class Progress(NamedTuple):
    """How far a lane has been read."""

    consumed: int = 0  # pairs that have been given or passed over
    undecodable: int = 0  # of these, the ones without an image that can be decoded


class Sample(NamedTuple):
    """One pair, ready for a batch: the image as (3, S, S), and how far its lane is when it is used."""

    image: Tensor
    text: str
    image_id: int  # equal where the encoded image is
    lane: int
    progress: Progress


class Lanes:
    """All lanes of a training. What is asked of one reads that one's units alone, as long as images can be decoded.

    Args:
        sources: where the pairs are; each text of an image is a pair of its own.
        lanes: how many.
        transform: picture to tensor; may draw from torch's global generator, which is seeded for every pair.
        seed: decides order and augmentation, >= 0.

    Raises ShardError where a file cannot be read, InputError where it lacks a column.
    """

    def __init__(self, sources: Sequence[PairSource], lanes: int, transform: Transform, seed: int) -> None:
        self.sources = list(sources)
        self.lanes = lanes
        self.transform = transform
        self.seed = seed
        rows = [(source, group, rows) for source, path in enumerate(sources) for group, rows in _groups(path)]
        parts = -(-UNITS_OF_A_LANE * lanes // max(1, len(rows)))
        self.window = max(1, WINDOW * parts // lanes)
        self.units = [
            Unit(source, group, share, cut)
            for source, group, count in rows
            for cut in [min(parts, count)]
            for share in range(cut)
        ]
        self._counts: dict[tuple[int, int], list[int]] = {}
        self._usable = False  # whether a pair is known whose image can be decoded

    def samples(self, first: int, step: int, progress: Mapping[int, Progress]) -> Iterator[Sample]:
        """The samples number first, first + step, first + 2 step ... of the order, without end.

        Args:
            progress: how far each lane has been read before; a lane that is not named begins.

        Raises InputError where no pair can be used at all.
        """
        begun: dict[int, Iterator[Sample]] = {}
        for number in itertools.count(first, step):
            lane = number % self.lanes
            if lane not in begun:
                begun[lane] = self._samples_of(lane, progress.get(lane, Progress()))
            yield next(begun[lane])

    def units_of(self, lane: int, epoch: int) -> list[Unit]:
        """What a lane reads in one of its epochs, in its order; over all lanes, every unit once."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.units))
        # the turn changes, so that each lane has its share even of fewer units than there are lanes
        return [self.units[place] for place in order[(lane + epoch) % self.lanes :: self.lanes]]

    def _samples_of(self, lane: int, progress: Progress) -> Iterator[Sample]:
        consumed, undecodable = progress
        for image, text in self._pairs_of(lane, consumed):
            tensor = self._tensor(image, lane, consumed)
            consumed += 1
            undecodable += tensor is None
            if tensor is not None and image is not None:
                yield Sample(tensor, text, _hash(image), lane, Progress(consumed, undecodable))

    def _tensor(self, image: bytes | None, lane: int, place: int) -> Tensor | None:
        """The image as the model sees it; None where it cannot be decoded."""
        picture = _decoded(image)
        if picture is None:
            return None
        self._usable = True
        # transforms draw on the CPU alone; torch.manual_seed would walk all devices, for every picture
        torch.default_generator.manual_seed(_hash(f"{self.seed} {lane} {place}".encode()))
        return self.transform(picture)

    def _pairs_of(self, lane: int, skipped: int) -> Iterator[ImageText]:
        """The pairs of a lane without end, after the first `skipped`, whose images are not read."""
        for epoch in itertools.count():
            left = skipped
            units = self.units_of(lane, epoch)
            for start in range(0, len(units), self.window):
                window = units[start : start + self.window]
                size = sum(map(self._count, window)) if skipped else 0
                if skipped and skipped >= size:
                    skipped -= size
                    continue
                yield from self._shuffled(window, np.random.default_rng((self.seed, epoch, 1 + lane, start)), skipped)
                skipped = 0
            if not self._usable and skipped == left:  # an epoch that led nowhere: would any?
                self._find_a_usable_pair()

    def _shuffled(self, window: list[Unit], generator: np.random.Generator, skipped: int) -> Iterator[ImageText]:
        pairs = self._read(window)
        for place in generator.permutation(len(pairs))[skipped:]:
            yield pairs[place]

    def _read(self, window: list[Unit]) -> list[ImageText]:
        """The pairs of some units; shares of the same row group are read at once."""
        shares: dict[tuple[int, int, int], set[int]] = {}
        for source, group, share, parts in window:
            shares.setdefault((source, group, parts), set()).add(share)
        return [
            pair
            for (source, group, parts), wanted in shares.items()
            for pair in read_pairs(self.sources[source], group, wanted, parts)
        ]

    def _count(self, unit: Unit) -> int:
        """How many pairs a unit has, from its texts alone."""
        place = (unit.source, unit.group)
        if place not in self._counts:
            self._counts[place] = count_pairs(self.sources[unit.source], unit.group, unit.parts)
        return self._counts[place][unit.share]

    def _find_a_usable_pair(self) -> None:
        """Looks through all pairs for one whose image can be decoded, so that nobody searches for ever."""
        seen = 0
        for source, group in dict.fromkeys((unit.source, unit.group) for unit in self.units):
            for image, _ in read_pairs(self.sources[source], group):
                seen += 1
                if _decoded(image) is not None:
                    self._usable = True
                    return
        names = ", ".join(str(source.path) for source in self.sources[:3]) or "no file"
        if seen:
            raise InputError(f"training pairs: none of the {seen} images in {names} can be decoded; one at least must")
        raise InputError(f"training pairs: none found in {names}; an image with a text is needed")


def _groups(source: PairSource) -> list[tuple[int, int]]:
    """(number, rows) of the row groups of a source that have a row."""
    return [(group, rows) for group, rows in enumerate(row_groups(source)) if rows]


def _decoded(image: bytes | None) -> Image.Image | None:
    try:
        return None if image is None else decode_image(image)
    except UnreadableImage:
        return None


def _hash(data: bytes) -> int:
    """63 bits of a digest: an image's id, or a seed all of whose bits depend on all of the data."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1
