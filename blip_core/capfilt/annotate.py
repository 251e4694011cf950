"""CapFilt over one shard: every image gets synthetic texts, and every text, web or synthetic, its scores.

Nothing is thrown away here: the corpus is a SQL predicate over what this writes (BLIP, section 3.3, figure 3).
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.corpus.schemas import ANNOTATION_SCHEMA, write_part
from blip_core.data.images import UnreadableImage, decode_image
from blip_core.data.shards import check_part, read_shard
from blip_core.data.transforms import eval_transform
from blip_core.errors import ShardError
from blip_core.files import fingerprint
from blip_core.med.generation import GenerationConfig, caption_seed
from blip_core.med.tokenizer import clean_caption
from blip_core.settings import Settings, setting

Row = dict[str, Any]


@dataclass(frozen=True)
class AnnotateConfig(Settings):
    """Settings of the annotation."""

    candidates: int = setting(1, "synthetic texts sampled for each image", ge=1, le=100)
    batch_size: int | None = setting(
        None, "images captioned and scored at once; null: 16 on a CPU, 256 on a GPU", ge=1, le=65_536
    )
    workers: int | None = setting(
        None, "processes that decode images; 0: none; null: one for every two cores, 16 at most", ge=0, le=256
    )
    precision: Literal["fp32", "bf16", "int8"] = setting(
        "fp32", "what both models compute in; int8 is for CPUs: linear layers alone, scaled as they run"
    )
    compile: bool = setting(False, "on a GPU, compiles both models for batches of one size, decoding as CUDA graphs")


class AnnotationSummary(NamedTuple):
    """What one shard's annotation holds."""

    shard: str
    images: int
    candidates: int
    unscored: int
    seconds: float
    skipped: bool


def annotate_shard(
    shard: Path,
    target: Path,
    captioner: Captioner,
    filter: Filter,
    config: AnnotateConfig,
    generation: GenerationConfig,
    seed: int,
) -> AnnotationSummary:
    """Captions and scores one shard into one annotation part, unless the same part stands already.

    Every image with status 'ok' gives 1 + `config.candidates` rows; a candidate that cannot be scored (an empty
    text, an image that cannot be decoded) has a reason and no scores.

    Raises ShardError where the shard is torn or rows would be lost.
    """
    began = time.monotonic()
    models = (captioner.digest, filter.digest, config.precision)
    settings = (shard.stem, *models, config.candidates, asdict(generation), seed)
    mark = fingerprint("annotation/1", *settings)
    if target.is_file() and check_part(target, "annotation/1").get("capfilt.fingerprint") == mark:
        return _summary(shard, target, 0.0, skipped=True)
    annotator = _Annotator(shard.stem, captioner, filter, config, generation, seed)
    rows = [row for batch in _batches(shard, config.batch_size or 16) for row in annotator.annotate(batch)]
    _check_complete(shard, rows, config.candidates)
    write_part(target, pa.Table.from_pylist(rows, ANNOTATION_SCHEMA), "annotation/1", mark)
    return _summary(shard, target, time.monotonic() - began, skipped=False)


def _batches(shard: Path, size: int) -> Iterator[list[Row]]:
    """The shard's rows that have an image, in order, `size` at a time."""
    read_shard(shard, columns=["uid"])
    columns = ["uid", "url", "caption", "status", "sha256", "image"]
    waiting: list[Row] = []
    for batch in pq.ParquetFile(shard).iter_batches(batch_size=size, columns=columns):
        waiting += [row for row in batch.to_pylist() if row["status"] == "ok"]
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting:
        yield waiting


def _check_complete(shard: Path, rows: list[Row], candidates: int) -> None:
    status = read_shard(shard, columns=["status"])["status"].to_pylist()
    expected = status.count("ok") * (1 + candidates)
    if len(rows) != expected:
        raise ShardError(f"{shard}: {len(rows)} candidates for {expected} expected; the part is not written")


def _summary(shard: Path, target: Path, seconds: float, skipped: bool) -> AnnotationSummary:
    part = pq.read_table(target, columns=["candidate", "reason"])
    images = part["candidate"].to_pylist().count(0)
    unscored = len(part) - part["reason"].null_count
    return AnnotationSummary(shard.stem, images, len(part), unscored, seconds, skipped)


class _Annotator:
    def __init__(
        self,
        shard: str,
        captioner: Captioner,
        filter: Filter,
        config: AnnotateConfig,
        generation: GenerationConfig,
        seed: int,
    ) -> None:
        self.shard = shard
        self.captioner = captioner
        self.filter = filter
        self.config = config
        self.generation = generation
        self.seed = seed
        self.captioner_view = eval_transform(captioner.med.image_size)
        self.filter_view = eval_transform(filter.med.image_size)

    def annotate(self, rows: list[Row]) -> list[Row]:
        """The candidates of a batch of shard rows, in order."""
        readable, pictures = _decode(rows)
        captioned = self._caption(readable, pictures)
        texts = [[row["caption"] or "", *(text for text, _ in captions)] for row, captions in captioned]
        scored = self._score(pictures, texts)
        found = {
            row["uid"]: self._candidates(row, captions, scores)
            for (row, captions), scores in zip(captioned, scored, strict=True)
        }
        return [candidate for row in rows for candidate in found.get(row["uid"]) or self._unreadable(row)]

    def _caption(self, rows: list[Row], pictures: list[Image.Image]) -> list[tuple[Row, list[tuple[str, float]]]]:
        if not rows:
            return []
        seeds = [[self._caption_seed(row, number) for number in self._numbers()] for row in rows]
        images = self._stack(self.captioner_view, pictures, self.captioner)
        return list(zip(rows, self.captioner.caption(images, self.generation, seeds), strict=True))

    def _score(self, pictures: list[Image.Image], texts: list[list[str]]) -> list[dict[int, tuple[float, float]]]:
        """For each image the scores of its texts by candidate number; an empty text has none."""
        if not texts:
            return []
        images = self._stack(self.filter_view, pictures, self.filter)
        present = [[number for number, text in enumerate(row) if clean_caption(text)] for row in texts]
        wanted = [[row[number] for number in numbers] for row, numbers in zip(texts, present, strict=True)]
        scores = self.filter.score(images, wanted)
        return [dict(zip(numbers, row, strict=True)) for numbers, row in zip(present, scores, strict=True)]

    def _candidates(
        self, row: Row, captions: list[tuple[str, float]], scores: dict[int, tuple[float, float]]
    ) -> list[Row]:
        web = self._candidate(row, 0, row["caption"] or "", None, scores.get(0))
        return [
            web,
            *(
                self._candidate(row, number, text, logprob, scores.get(number))
                for number, (text, logprob) in zip(self._numbers(), captions, strict=True)
            ),
        ]

    def _unreadable(self, row: Row) -> list[Row]:
        texts = [row["caption"] or "", *("" for _ in self._numbers())]
        return [self._candidate(row, number, text, None, None, "image_unreadable") for number, text in enumerate(texts)]

    def _candidate(
        self,
        row: Row,
        number: int,
        text: str,
        logprob: float | None,
        score: tuple[float, float] | None,
        reason: str = "empty_text",
    ) -> Row:
        return {
            "uid": row["uid"],
            "shard": self.shard,
            "url": row["url"],
            "image_sha256": row["sha256"],
            "text": text,
            "source": "synthetic" if number else "web",
            "candidate": number,
            "itm_score": score[0] if score else None,
            "itc_score": score[1] if score else None,
            "logprob": logprob,
            "captioner": self.captioner.digest,
            "filter": self.filter.digest,
            "seed": self._caption_seed(row, number) if number else None,
            "reason": None if score else reason,
        }

    def _numbers(self) -> range:
        return range(1, 1 + self.config.candidates)

    def _caption_seed(self, row: Row, number: int) -> int:
        return caption_seed(self.seed, row["sha256"], number)

    def _stack(self, view: Any, pictures: list[Image.Image], model: Captioner | Filter) -> Tensor:
        device = next(model.med.parameters()).device
        return torch.stack([view(picture) for picture in pictures]).to(device)


def _decode(rows: list[Row]) -> tuple[list[Row], list[Image.Image]]:
    readable, pictures = [], []
    for row in rows:
        try:
            pictures.append(decode_image(row["image"]))
        except UnreadableImage:
            continue
        readable.append(row)
    return readable, pictures
