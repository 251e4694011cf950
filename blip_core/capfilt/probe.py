"""How fast this machine annotates: the real engine, models and settings, on made-up photographs, for a short time.

What the engine does at its beginning (processes that start, layers that are compiled) is left out; a full run does it
once.
"""

import io
import itertools
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa
from PIL import Image

from blip_core.capfilt.annotate import annotate_shards
from blip_core.capfilt.candidates import device_of
from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.capfilt.parts import AnnotateConfig, AnnotationSummary, FailedShard, ShardJob, ShardProgress
from blip_core.data.images import JPEG_QUALITY
from blip_core.data.shards import SHARD_SCHEMA, write_shard
from blip_core.med.decoding import GenerationConfig
from blip_core.workspace import Round

Results = Generator[AnnotationSummary | FailedShard, None, None]

SECONDS = 20.0
PICTURES = 32  # made; each is there many times
LEVELS = 5  # of detail in a picture, from blots to grain
WARM_UP_ON_CPU, WARM_UP_ON_GPU = 1, 4  # batches; on a GPU, shapes of later ones may be compiled as well

TEXTS = (
    "sunset over the old harbour, photo by the author",
    "red running shoes for women, size 38, free shipping on all orders",
    "IMG_2041.JPG",
    "a dog on the beach",
)


class Probe(NamedTuple):
    """What was measured: images annotated, in how many seconds, and how many of those were spent waiting for pictures.

    `batches` are those that were counted.
    """

    images: int
    batches: int
    seconds: float
    waited: float

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


def probe(
    captioner: Captioner,
    filter: Filter,
    config: AnnotateConfig,
    generation: GenerationConfig,
    seed: int,
    image_size: int,
    rows: int,
    texts: Sequence[str] = TEXTS,
    seconds: float = SECONDS,
) -> Probe:
    """Annotates shards in a temporary folder until `seconds` have passed since the warm-up, and one batch at least.

    Args:
        captioner, filter, config, generation, seed: as annotate_shards takes them.
        image_size: shorter side of the stored images, pixels.
        rows: images in a shard.
        texts: web texts, taken in turn.

    Raises what fails in annotation.
    """
    watch = _StopWatch(seconds, WARM_UP_ON_CPU if device_of(captioner).type == "cpu" else WARM_UP_ON_GPU)
    with tempfile.TemporaryDirectory(prefix="capfilt-probe-") as folder:
        shard = Path(folder) / "probe.parquet"
        write_sample(shard, rows, image_size, texts)
        made = Round(0, Path(folder))
        jobs = (
            ShardJob(shard, made.annotations / name, made.embeddings / name)
            for name in map("{}.parquet".format, itertools.count())
        )
        results = annotate_shards(jobs, captioner, filter, config, generation, seed, watch)
        with suppress(_TimeIsUp), closing(cast(Results, results)) as running:
            for result in running:
                if isinstance(result, FailedShard):
                    raise result.error
    return watch.measured()


class _TimeIsUp(Exception):
    """Ends the annotation between two batches."""


class _StopWatch:
    """Takes the engine's progress: counts images from the end of the warm-up on, and ends the run when it is time."""

    def __init__(self, seconds: float, warm_up: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.warm_up = warm_up
        self.clock = clock
        self.batches = self.images = 0
        self.waited = 0.0
        self._began = self._now = clock()
        self._before: ShardProgress | None = None

    def __call__(self, shard: ShardProgress) -> None:
        self._now = self.clock()
        self.batches += 1
        before = self._before
        same = before is not None and shard.done > before.done
        self._before = shard
        if self.batches <= self.warm_up:
            self._began = self._now
            return
        self.images += shard.done - (before.done if before and same else 0)
        self.waited += shard.waited - (before.waited if before and same else 0)
        if self._now - self._began >= self.seconds:
            raise _TimeIsUp

    def measured(self) -> Probe:
        return Probe(self.images, self.batches - self.warm_up, self._now - self._began, self.waited)


def write_sample(path: Path, rows: int, image_size: int, texts: Sequence[str]) -> None:
    """A shard of made-up photographs, 4:3, as img2dataset would have stored them: JPEGs of that shorter side."""
    pictures = [_photograph(number, image_size) for number in range(PICTURES)]
    write_shard(path, _groups(rows, pictures, texts), "probe", rows)


def _groups(rows: int, pictures: Sequence[bytes], texts: Sequence[str]) -> Iterator[pa.Table]:
    for start in range(0, rows, 1000):
        yield pa.Table.from_pylist(
            [
                {
                    "uid": f"{row:012d}",
                    "url": f"https://probe.invalid/{row}.jpg",
                    "caption": texts[row % len(texts)],
                    "status": "ok",
                    "sha256": f"{row:064x}",  # every image has its own captions, as if it were there once
                    "image": pictures[row % len(pictures)],
                }
                for row in range(start, min(start + 1000, rows))
            ],
            schema=SHARD_SCHEMA,
        )


def _photograph(number: int, image_size: int) -> bytes:
    """Noise at several scales, the coarse ones the strongest, as in photographs: JPEGs of like size come of it."""
    draw = np.random.default_rng(number)
    width, height = round(image_size * 4 / 3), image_size
    canvas = np.zeros((height, width, 3))
    for level in range(LEVELS):
        side = 2 + 4**level
        blots = Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8))
        canvas += np.asarray(blots.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / 2 ** (level + 1)
    buffer = io.BytesIO()
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
