"""The images of many shards in batches, read and decoded ahead of the models that use them.

While a model computes, the next batches are in the making, those of the next shard as well. A batch is of one shard,
so that what a shard gives does not depend on the shards beside it.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import pyarrow.compute as pc

from blip_core.capfilt.parts import ShardJob, count_images
from blip_core.data.decoding import CHUNK, Decoded, Decoder
from blip_core.data.shards import iterate_shard
from blip_core.errors import CapfiltError, ShardError
from blip_core.texts import MAX_CHARACTERS

Row = dict[str, Any]
Value = TypeVar("Value")
Standing = TypeVar("Standing")

COLUMNS = ["uid", "url", "caption", "status", "sha256", "image"]


class Batch(NamedTuple):
    """Some images of a shard: their rows without the images' bytes, the pictures, and how many the shard has."""

    rows: list[Row]
    decoded: Future[Decoded]
    total: int


class Step(NamedTuple, Generic[Standing]):
    """What comes of a job: what stands already, an error, or one batch after the other, at least one."""

    job: ShardJob
    content: Batch | CapfiltError | Standing
    last: bool  # of this job


class ShardReader(Generic[Standing]):
    """Reads jobs in their order.

    Args:
        jobs: may be made as they are asked for.
        standing: what stands of a job already; None where nothing does. May raise CapfiltError.
        decoder: makes the pictures.
        batch_size: images in a batch; the last one of a shard may have fewer.
    """

    def __init__(
        self,
        jobs: Iterable[ShardJob],
        standing: Callable[[ShardJob], Standing | None],
        decoder: Decoder,
        batch_size: int,
    ) -> None:
        self.jobs = jobs
        self.standing = standing
        self.decoder = decoder
        self.batch_size = batch_size
        self._abandoned: ShardJob | None = None

    def steps(self) -> Generator[Step[Standing], None, None]:
        """The steps of all jobs, made ahead in a thread of their own."""
        # two batches beside that of the models, and enough for two chunks in the hands of every process
        return run_ahead(self._steps(), 2 + -(-2 * CHUNK * self.decoder.workers // self.batch_size))

    def abandon(self, job: ShardJob) -> None:
        """Says that no more of a job is needed; a last step of it still comes."""
        self._abandoned = job

    def _steps(self) -> Generator[Step[Standing], None, None]:
        for job in self.jobs:
            try:
                standing = self.standing(job)
                if standing is not None:
                    yield Step(job, standing, last=True)
                else:
                    yield from self._read(job)
            except CapfiltError as error:
                yield Step(job, error, last=True)

    def _read(self, job: ShardJob) -> Iterator[Step[Standing]]:
        total = count_images(job.shard)
        held: Batch | None = None  # until it is known whether it is the last one
        for rows in image_rows(job.shard, self.batch_size):
            if held is not None:
                yield Step(job, held, last=False)
            held = self._batch(rows, total)
            if self._abandoned is job:
                break
        yield Step(job, held or self._batch([], total), last=True)

    def _batch(self, rows: list[Row], total: int) -> Batch:
        return Batch(rows, self.decoder.begin([row.pop("image") or b"" for row in rows]), total)


def image_rows(shard: Path, size: int) -> Iterator[list[Row]]:
    """The rows of a shard that have an image, in the order of uid, `size` at a time; of a text that is too long its
    first MAX_CHARACTERS + 1.

    Raises ShardError where the shard is not in that order.
    """
    waiting: list[Row] = []
    before: str | None = None
    for part in iterate_shard(shard, COLUMNS):
        for uid in part["uid"].to_pylist():
            if uid is None or (before is not None and uid <= before):
                raise ShardError(f"{shard}: uid {uid!r} comes after {before!r}; a shard has every uid once, sorted")
            before = uid
        place = part.schema.get_field_index("caption")
        part = part.set_column(place, "caption", pc.utf8_slice_codeunits(part["caption"], 0, MAX_CHARACTERS + 1))
        waiting += part.filter(pc.equal(part["status"], "ok")).to_pylist()
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting:
        yield waiting


def run_ahead(values: Generator[Value, None, None], window: int) -> Generator[Value, None, None]:
    """The same values, made in a thread of their own, at most `window` of them before they are asked for."""
    with closing(values), ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        waiting = deque(thread.submit(next, values, None) for _ in range(window))
        try:
            while (value := waiting.popleft().result()) is not None:
                waiting.append(thread.submit(next, values, None))
                yield value
        finally:
            for future in waiting:
                future.cancel()
