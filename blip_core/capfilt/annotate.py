"""CapFilt over shards: every image gets synthetic texts, and every text, web or synthetic, its scores.

Nothing is thrown away here: the corpus is a SQL predicate over what this writes (BLIP, section 3.3, figure 3). The
Filter's embeddings of the images get their name before the annotations do, so that no annotation part is without.
Memory grows neither with the size of a shard nor with their number.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar, cast

from blip_core.capfilt.candidates import Annotator, Row, device_of
from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.embeddings import embedding_mark, embeddings_stand
from blip_core.capfilt.filter import Filter
from blip_core.capfilt.parts import (
    COUNT_KEYS,
    AnnotateConfig,
    AnnotationSummary,
    FailedShard,
    Progress,
    ShardJob,
    ShardProgress,
    annotated_part,
    batch_size_on,
    mark_of,
    standing_part,
)
from blip_core.capfilt.reading import Batch, ShardReader, Step
from blip_core.corpus.schemas import (
    ANNOTATION_SCHEMA,
    ANNOTATION_VERSION,
    CAPTIONER_KEY,
    EMBEDDING_VERSION,
    FILTER_KEY,
    GENERATION_KEY,
    PRECISION_KEY,
    PartWriter,
    embedding_schema,
    part_writer,
)
from blip_core.data.decoding import Decoded, decoder
from blip_core.errors import CapfiltError, ShardError
from blip_core.files import sweep
from blip_core.med.decoding import GenerationConfig

Value = TypeVar("Value")


def annotate_shard(
    shard: Path,
    target: Path,
    captioner: Captioner,
    filter: Filter,
    config: AnnotateConfig,
    generation: GenerationConfig,
    seed: int,
    embeddings: Path | None = None,
) -> AnnotationSummary:
    """Annotates one shard as annotate_shards does, and raises the error where it fails."""
    job = ShardJob(shard, target, embeddings)
    (result,) = annotate_shards([job], captioner, filter, config, generation, seed)
    if isinstance(result, FailedShard):
        raise result.error
    return result


def annotate_shards(
    jobs: Iterable[ShardJob],
    captioner: Captioner,
    filter: Filter,
    config: AnnotateConfig,
    generation: GenerationConfig,
    seed: int,
    progress: Progress | None = None,
) -> Iterator[AnnotationSummary | FailedShard]:
    """Captions and scores shards, each into one annotation part, unless the same part stands already.

    Every image with status 'ok' gives 1 + `config.candidates` rows; a candidate that cannot be scored (an empty
    text, an image that cannot be decoded) has a reason and no scores. A job that names a place for embeddings gets
    such a part first, one row for each image that can be decoded; where it alone is missing, nothing is captioned or
    scored anew. A shard that fails does not hold up the others.

    Args:
        jobs: may be made as they are asked for; they are read ahead of the models.
        captioner, filter: both on one device, and in `config.precision`.
        progress: called after every batch.

    Yields:
        A result for each job, in their order: FailedShard where the shard is torn or not sorted, or the part cannot
        be written.
    """
    run = _Run(captioner, filter, config, generation, seed, progress)
    views = [captioner.med.image_size, filter.med.image_size]
    with decoder(views, config.workers, pinned=device_of(captioner).type == "cuda") as pictures:
        reader = ShardReader(jobs, run.standing, pictures, run.annotator.batch_size)
        with closing(reader.steps()) as steps:
            clock = _Clock()
            while (step := clock.wait(lambda: next(steps, None))) is not None:
                yield run.finish(step, steps, reader, clock)
                clock = _Clock()


class _Clock:
    """Seconds since it was made, and those of them spent waiting."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._made = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._made

    def wait(self, get: Callable[[], Value]) -> Value:
        began = time.monotonic()
        try:
            return get()
        finally:
            self.waited += time.monotonic() - began


class _Run:
    """The models and the settings, at work on one shard after the other."""

    def __init__(
        self,
        captioner: Captioner,
        filter: Filter,
        config: AnnotateConfig,
        generation: GenerationConfig,
        seed: int,
        progress: Progress | None,
    ) -> None:
        batch_size = batch_size_on(device_of(captioner).type, config)
        self.annotator = Annotator(captioner, filter, generation, config.candidates, batch_size, seed)
        self.progress = progress
        self.judged_by = {FILTER_KEY: filter.digest, PRECISION_KEY: config.precision}
        self.generation = json.dumps(asdict(generation), sort_keys=True)
        self.settings = (captioner.digest, filter.digest, config, generation, seed)
        self._swept: set[Path] = set()

    def standing(self, job: ShardJob) -> AnnotationSummary | None:
        """The summary of what stands for this job already, from metadata alone."""
        for folder in {part.parent for part in (job.target, job.embeddings) if part is not None} - self._swept:
            self._swept.add(folder)
            sweep(folder)
        return standing_part(job, *self.settings)

    def finish(
        self,
        step: Step[AnnotationSummary],
        steps: Iterator[Step[AnnotationSummary]],
        reader: ShardReader[AnnotationSummary],
        clock: _Clock,
    ) -> AnnotationSummary | FailedShard:
        """Makes the part of the job that `step` begins; takes the other steps of that job."""
        name = step.job.shard.stem
        if isinstance(step.content, AnnotationSummary):
            return step.content
        if isinstance(step.content, CapfiltError):
            return FailedShard(name, step.content)
        contents = _contents(step, steps, clock)
        try:
            return self._write(step.job, step.content.total, contents, clock)
        except CapfiltError as error:
            reader.abandon(step.job)
            for _ in contents:
                pass
            return FailedShard(name, error)

    def _write(
        self, job: ShardJob, total: int, contents: Iterator[Batch | CapfiltError], clock: _Clock
    ) -> AnnotationSummary:
        name = job.shard.stem
        pictures = self._pictures(name, total, contents, clock)
        if (standing := annotated_part(job, *self.settings)) is not None:
            self._add_embeddings(job, pictures)
            return standing
        unscored = 0
        # what is opened last is closed, and gets its name, first
        with ExitStack() as parts:
            part = parts.enter_context(self._annotation_writer(job))
            vectors = parts.enter_context(self._embedding_writer(job)) if self._lacks_embeddings(job) else None
            for rows, decoded in pictures:
                made = self.annotator.annotate(name, rows, decoded)
                part.write(made.rows)
                unscored += made.rows.num_rows - made.rows["reason"].null_count
                if vectors is not None:
                    vectors.write(made.embeddings)
            self._check_complete(job, part, total)
            part.describe(dict(zip(COUNT_KEYS, map(str, (total, part.rows, unscored)), strict=True)))
        return AnnotationSummary(name, total, part.rows, unscored, clock.seconds, clock.waited, skipped=False)

    def _add_embeddings(self, job: ShardJob, pictures: Iterator[tuple[list[Row], Decoded]]) -> None:
        """Makes the embedding part of a shard whose annotations stand: the Filter's image encoder alone is run."""
        with self._embedding_writer(job) as vectors:
            for rows, decoded in pictures:
                vectors.write(self.annotator.embed(job.shard.stem, rows, decoded))

    def _lacks_embeddings(self, job: ShardJob) -> bool:
        """Whether embeddings are wanted, and those of this Filter do not stand already, as where a worker was killed
        between the two parts."""
        return job.embeddings is not None and not embeddings_stand(job.embeddings, *self.judged_by.values())

    def _annotation_writer(self, job: ShardJob) -> AbstractContextManager[PartWriter]:
        made_by = {CAPTIONER_KEY: self.annotator.captioner.digest, **self.judged_by, GENERATION_KEY: self.generation}
        mark = mark_of(job, *self.settings)
        return part_writer(job.target, ANNOTATION_SCHEMA, ANNOTATION_VERSION, mark, made_by)

    def _embedding_writer(self, job: ShardJob) -> AbstractContextManager[PartWriter]:
        schema = embedding_schema(self.annotator.filter.width)
        mark = embedding_mark(job.shard.stem, *self.judged_by.values())
        return part_writer(cast("Path", job.embeddings), schema, EMBEDDING_VERSION, mark, self.judged_by)

    def _pictures(
        self, name: str, total: int, contents: Iterator[Batch | CapfiltError], clock: _Clock
    ) -> Iterator[tuple[list[Row], Decoded]]:
        """The batches of a shard, decoded; says how far it is when the next one is asked for."""
        done = 0
        for content in contents:
            if isinstance(content, CapfiltError):
                raise content
            yield content.rows, clock.wait(content.decoded.result)
            done += len(content.rows)
            if self.progress is not None:
                self.progress(ShardProgress(name, done, total, clock.seconds, clock.waited))

    def _check_complete(self, job: ShardJob, part: PartWriter, total: int) -> None:
        expected = total * (1 + len(self.annotator.numbers))
        if part.rows != expected:
            raise ShardError(f"{job.shard}: {part.rows} candidates for {expected} expected; the part is not written")


def _contents(
    step: Step[AnnotationSummary], steps: Iterator[Step[AnnotationSummary]], clock: _Clock
) -> Iterator[Batch | CapfiltError]:
    """What the steps of one job hold, from its first one to its last."""
    yield cast("Batch", step.content)
    while not step.last:
        step = clock.wait(lambda: next(steps))
        yield cast("Batch | CapfiltError", step.content)
