"""One batch of images to rows of annotations: the Captioner writes, the Filter judges every text, web and synthetic.

Nothing is thrown away here: a text that cannot be judged has a row with the reason. The Filter's embedding of an image
comes from the same features as its scores, so that an image is encoded once.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.embeddings import embedding_table
from blip_core.capfilt.filter import Filter, Score
from blip_core.corpus.schemas import ANNOTATION_SCHEMA, EMPTY_TEXT, TEXT_TOO_LONG
from blip_core.data.decoding import Decoded
from blip_core.data.transforms import normalise
from blip_core.errors import CapfiltError
from blip_core.med.decoding import GenerationConfig
from blip_core.med.generation import caption_seed
from blip_core.texts import candidate_text

Row = dict[str, Any]
Value = TypeVar("Value")

# What torch's allocator for the CPU says, which has no exception class of its own.
NO_MEMORY = ("DefaultCPUAllocator", "can't allocate memory")

logger = logging.getLogger(__name__)


class Candidate(NamedTuple):
    """One text of an image, its log-probability if it was sampled, and its scores if it could be judged."""

    text: str
    logprob: float | None
    score: Score | None


class Judgement(NamedTuple):
    """What there is to say of one image: its texts, and its embedding, (E,) float16."""

    candidates: list[Candidate]
    embedding: np.ndarray


class Annotated(NamedTuple):
    """What a batch gives: rows of ANNOTATION_SCHEMA, and of embedding_schema for the images that can be decoded."""

    rows: pa.Table
    embeddings: pa.Table


class Annotator:
    """Both models, and how they are used.

    Args:
        candidates: synthetic texts of each image.
        batch_size: images captioned and scored at once; less from the moment on when memory does not do.
        seed: the run's seed, of which that of every caption is made.
    """

    def __init__(
        self,
        captioner: Captioner,
        filter: Filter,
        generation: GenerationConfig,
        candidates: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.captioner = captioner
        self.filter = filter
        self.generation = generation
        self.numbers = range(1, 1 + candidates)
        self.batch_size = batch_size
        self.seed = seed

    def annotate(self, shard: str, rows: list[Row], decoded: Decoded) -> Annotated:
        """1 + candidates rows for each image, in order, and the images' embeddings.

        Raises CapfiltError where the memory does not do for one image alone.
        """
        readable = _readable(rows, decoded)
        judgements = self._in_memory(shard, readable, decoded.pixels, self._judge)
        judged = iter(judgements)
        records = [
            self._record(shard, row, number, candidate, reason)
            for row, reason in zip(rows, decoded.reasons, strict=True)
            for number, candidate in enumerate(next(judged).candidates if reason is None else self._unjudged(row))
        ]
        embeddings = [judgement.embedding for judgement in judgements]
        return Annotated(pa.Table.from_pylist(records, ANNOTATION_SCHEMA), self._embedding_table(readable, embeddings))

    def embed(self, shard: str, rows: list[Row], decoded: Decoded) -> pa.Table:
        """The images' embeddings alone, for a shard whose annotations stand. Raises as `annotate` does."""
        readable = _readable(rows, decoded)
        return self._embedding_table(readable, self._in_memory(shard, readable, decoded.pixels, self._embed))

    def _embedding_table(self, rows: list[Row], embeddings: list[np.ndarray]) -> pa.Table:
        return embedding_table([row["uid"] for row in rows], embeddings, self.filter.width)

    def _in_memory(
        self,
        shard: str,
        rows: list[Row],
        pixels: Mapping[int, Tensor],
        work: Callable[[list[Row], Mapping[int, Tensor]], list[Value]],
    ) -> list[Value]:
        """What `work` gives for each of the readable images, by as many at once as the memory allows."""
        done: list[Value] = []
        while len(done) < len(rows):
            part = slice(len(done), len(done) + self.batch_size)
            some = rows[part]
            try:
                done += work(some, {size: tensor[part] for size, tensor in pixels.items()})
                continue
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not _is_out_of_memory(error):
                    raise
                message = str(error).partition("\n")[0]
            self._shrink(shard, some, message)  # the error is gone by now, and with it what its frames held
        return done

    def _shrink(self, shard: str, rows: list[Row], message: str) -> None:
        if len(rows) == 1:
            raise CapfiltError(f"shard {shard}, image {rows[0]['uid']}: out of memory with one image alone ({message})")
        self.batch_size = len(rows) // 2
        logger.warning("out of memory with %d images at once; going on with %d", len(rows), self.batch_size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _judge(self, rows: list[Row], pixels: Mapping[int, Tensor]) -> list[Judgement]:
        seeds = [[self._seed(row, number) for number in self.numbers] for row in rows]
        captions = self.captioner.caption(_images(pixels, self.captioner), self.generation, seeds)
        web = [candidate_text(row["caption"]) for row in rows]
        texts = [[of_web.text, *(text for text, _ in some)] for of_web, some in zip(web, captions, strict=True)]
        logprobs = [[None, *(logprob for _, logprob in some)] for some in captions]
        judged = [["" if of_web.too_long else row[0], *row[1:]] for of_web, row in zip(web, texts, strict=True)]
        scores, embeddings = self.filter.judge_and_embed(_images(pixels, self.filter), judged)
        candidates = (
            [Candidate(*parts) for parts in zip(*of_image, strict=True)]
            for of_image in zip(texts, logprobs, scores, strict=True)
        )
        return list(map(Judgement, candidates, _half(embeddings)))

    def _embed(self, rows: list[Row], pixels: Mapping[int, Tensor]) -> list[np.ndarray]:
        return _half(self.filter.embed(_images(pixels, self.filter)))

    def _unjudged(self, row: Row) -> list[Candidate]:
        return [
            Candidate(text, None, None) for text in (candidate_text(row["caption"]).text, *("" for _ in self.numbers))
        ]

    def _record(self, shard: str, row: Row, number: int, candidate: Candidate, reason: str | None) -> Row:
        score = candidate.score
        return {
            "uid": row["uid"],
            "shard": shard,
            "url": row["url"],
            "image_sha256": row["sha256"],
            "text": candidate.text,
            "source": "synthetic" if number else "web",
            "candidate": number,
            "itm_score": score.itm if score else None,
            "itc_score": score.itc if score else None,
            "logprob": candidate.logprob,
            "captioner": self.captioner.digest,
            "filter": self.filter.digest,
            "seed": self._seed(row, number) if number else None,
            "reason": None if score else reason or unjudged_reason(row["caption"], number),
        }

    def _seed(self, row: Row, number: int) -> int:
        return caption_seed(self.seed, row["sha256"], number)


def unjudged_reason(caption: str | None, number: int) -> str:
    """Why candidate `number` of a readable image has no scores; candidate 0 is that of its web text."""
    return TEXT_TOO_LONG if number == 0 and candidate_text(caption).too_long else EMPTY_TEXT


def device_of(model: Captioner | Filter) -> torch.device:
    """Where a model computes."""
    return next(model.med.parameters()).device


def _images(pixels: Mapping[int, Tensor], model: Captioner | Filter) -> Tensor:
    """What a model sees: (B, 3, S, S), on its device."""
    return normalise(pixels[model.med.image_size].to(device_of(model), non_blocking=True))


def _readable(rows: list[Row], decoded: Decoded) -> list[Row]:
    return [row for row, reason in zip(rows, decoded.reasons, strict=True) if reason is None]


def _half(embeddings: Tensor) -> list[np.ndarray]:
    """Embeddings (B, E) as B arrays of float16."""
    return list(embeddings.half().cpu().numpy())


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)
