"""Annotation parts: what is asked for, what decides a part, and which parts stand already. Needs no model."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow.compute as pc

from blip_core.capfilt.embeddings import embeddings_stand
from blip_core.corpus.schemas import ANNOTATION_VERSION, FINGERPRINT_KEY, IMAGES_KEY, ROWS_KEY, UNSCORED_KEY
from blip_core.data.shards import check_part, iterate_shard
from blip_core.errors import CapfiltError
from blip_core.files import fingerprint
from blip_core.med.decoding import GenerationConfig
from blip_core.settings import Settings, setting
from blip_core.texts import TEXT_RULES
from blip_core.workspace import Round

COUNT_KEYS = (IMAGES_KEY, ROWS_KEY, UNSCORED_KEY)
BATCH_SIZE_ON_CPU = 16
BATCH_SIZE_ON_GPU = 256


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
        "fp32", "what both models compute in; int8, for CPUs, is for the linear layers that see images"
    )
    compile: bool = setting(False, "on a GPU, compiles both models for batches of one size, decoding as CUDA graphs")


class ShardJob(NamedTuple):
    """A shard, where its annotation part is to stand, and where its embedding part; None: no embeddings are wanted."""

    shard: Path
    target: Path
    embeddings: Path | None = None

    @classmethod
    def of(cls, made: Round, shard: Path) -> "ShardJob":
        """A shard, and the places of its parts in a round."""
        return cls(shard, made.annotations / shard.name, made.embeddings / shard.name)


class AnnotationSummary(NamedTuple):
    """What one shard's annotation holds, and what it took: seconds in all, and those spent waiting for pictures."""

    shard: str
    images: int
    candidates: int
    unscored: int
    seconds: float
    waited: float
    skipped: bool


class FailedShard(NamedTuple):
    """A shard that could not be annotated, and why; no part of it was written."""

    shard: str
    error: CapfiltError


class ShardProgress(NamedTuple):
    """How far a shard is: images done and in all, seconds since it was begun, and those spent waiting for pictures."""

    shard: str
    done: int
    total: int
    seconds: float
    waited: float


Progress = Callable[[ShardProgress], None]


def standing_part(
    job: ShardJob, captioner: str, filter: str, config: AnnotateConfig, generation: GenerationConfig, seed: int
) -> AnnotationSummary | None:
    """The summary of what stands for a job already, from metadata alone; None where either part is missing.

    `captioner` and `filter` are the models' digests. Raises ShardError where something else stands there.
    """
    found = annotated_part(job, captioner, filter, config, generation, seed)
    if found is None or job.embeddings is None or embeddings_stand(job.embeddings, filter, config.precision):
        return found
    return None


def annotated_part(
    job: ShardJob, captioner: str, filter: str, config: AnnotateConfig, generation: GenerationConfig, seed: int
) -> AnnotationSummary | None:
    """The same of the annotation part alone, whether or not there are embeddings beside it."""
    if not job.target.is_file():
        return None
    found = check_part(job.target, ANNOTATION_VERSION)
    mark = mark_of(job, captioner, filter, config, generation, seed)
    if found.get(FINGERPRINT_KEY) != mark or not found.keys() >= set(COUNT_KEYS):
        return None
    images, rows, unscored = (int(found[key]) for key in COUNT_KEYS)
    return AnnotationSummary(job.shard.stem, images, rows, unscored, 0.0, 0.0, skipped=True)


def mark_of(
    job: ShardJob, captioner: str, filter: str, config: AnnotateConfig, generation: GenerationConfig, seed: int
) -> str:
    """The fingerprint of the part that these models and settings make of a shard."""
    models = (captioner, filter, config.precision)
    settings = (*models, config.candidates, asdict(generation), seed)
    return fingerprint(ANNOTATION_VERSION, TEXT_RULES, job.shard.stem, *settings)


def batch_size_on(device: str, config: AnnotateConfig) -> int:
    """Images captioned and scored at once on a device of that type."""
    return config.batch_size or (BATCH_SIZE_ON_CPU if device == "cpu" else BATCH_SIZE_ON_GPU)


def count_images(shard: Path) -> int:
    """How many rows of a shard have an image."""
    return sum(pc.sum(pc.equal(part["status"], "ok")).as_py() or 0 for part in iterate_shard(shard, ["status"]))
