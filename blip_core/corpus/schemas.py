"""The columns of annotations and of the corpus, and how their parts are written.

Scores carry no image bytes, so their row groups are large (122,880 rows, DuckDB's own vector of work) and
an aggregate reads only the columns it names. Imports no DuckDB: annotating needs none.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from blip_core.files import atomic_file

ROW_GROUP_ROWS = 122_880

ANNOTATION_VERSION = "annotation/1"
CORPUS_VERSION = "corpus/1"
EMBEDDING_VERSION = "embedding/1"

SCHEMA_KEY = "capfilt.schema"
FINGERPRINT_KEY = "capfilt.fingerprint"
# Of annotations: what made them, and how many images, candidates, and candidates without scores there are.
CAPTIONER_KEY = "capfilt.captioner"
FILTER_KEY = "capfilt.filter"
PRECISION_KEY = "capfilt.precision"
GENERATION_KEY = "capfilt.generation"  # as JSON; parts of earlier versions have none
IMAGES_KEY = "capfilt.images"
ROWS_KEY = "capfilt.rows"
UNSCORED_KEY = "capfilt.unscored"
# Of annotations that rows were taken out of: the sha256 of the part before that.
BEFORE_KEY = "capfilt.before"

# Why a candidate of a readable image has no scores; of another image it is the reason why it cannot be read.
EMPTY_TEXT, TEXT_TOO_LONG = "empty_text", "text_too_long"

# What both know of a candidate.
_CANDIDATE = {
    "uid": pa.string(),
    "shard": pa.string(),
    "url": pa.string(),
    "image_sha256": pa.string(),
    "text": pa.string(),
    "source": pa.string(),
    "candidate": pa.int8(),
    "itm_score": pa.float32(),
    "itc_score": pa.float32(),
    "logprob": pa.float32(),
    "captioner": pa.string(),
    "filter": pa.string(),
    "seed": pa.int64(),
}

# One row per candidate, sorted by uid and candidate. The scores are null where `reason` is not.
ANNOTATION_SCHEMA = pa.schema(
    {
        **_CANDIDATE,
        "reason": pa.string(),
    }
)

# The candidates that passed, and the human pairs; sorted by uid and candidate.
CORPUS_SCHEMA = pa.schema(
    {
        **_CANDIDATE,
        "width": pa.int32(),
        "height": pa.int32(),
        "round": pa.int32(),
    }
)


def embedding_schema(width: int) -> pa.Schema:
    """One row per image that can be decoded, sorted by uid: the Filter's ITC embedding of it, of length 1."""
    return pa.schema({"uid": pa.string(), "embedding": pa.list_(pa.float16(), width)})


COLUMN_MEANINGS = {
    "uid": "the image within the workspace: the caller's own key, or a hash of url and text",
    "shard": "the shard that holds the image; null for a human pair",
    "url": "where the image came from",
    "caption": "the web text that came with the image",
    "status": "'ok' or 'failed'",
    "image_sha256": "identity of the stored image bytes",
    "sha256": "identity of the stored image bytes",
    "image": "the stored image bytes; null where the download failed",
    "text": "the candidate",
    "source": "who wrote the text: 'web', 'synthetic' or 'human'",
    "candidate": "0 for the web text, 1..k for sampled captions; the caption's index for a human pair",
    "itm_score": "the Filter's probability of 'match', 0..1",
    "itc_score": "cosine of image and text embeddings, -1..1",
    "logprob": "mean token log-probability of a sampled caption; null for other texts",
    "captioner": "digest of the Captioner that sampled the text",
    "filter": "digest of the Filter that scored the text",
    "seed": "the seed that the caption was sampled with; null for other texts",
    "reason": "why the row failed or has no scores; null where all is well",
    "width": "width of the stored image, pixels",
    "height": "height of the stored image, pixels",
    "original_width": "width of the image as downloaded, pixels",
    "original_height": "height of the image as downloaded, pixels",
    "embedding": "the Filter's ITC embedding of the image, of length 1",
    "round": "the round that the row belongs to",
    "promoted": "whether the corpus view reads this round",
    "state": "what became of the round: promoted, candidate, rejected, rolled back or superseded",
    "why": "the reason for the state, where there is more to say",
    "model": "the model that was trained",
    "web_noise": "share of wrong texts among the web texts, 0..1; null where the truth is not known",
    "corpus_noise": "share of wrong texts in the corpus, 0..1; null where the truth is not known",
    "audited_noise": "share of wrong texts in the corpus as a person's marks of a sample say, 0..1; null without any",
    "audited_noise_low": "lower end of the 95% interval of audited_noise",
    "audited_noise_high": "upper end of the 95% interval of audited_noise",
    "filter_auc": "area under the Filter's ROC curve on web texts, 0.5..1; null where the truth is not known",
    "image_to_text_r1": "recall at 1 of the model retrained on the corpus, image to text, 0..1",
    "text_to_image_r1": "recall at 1 of the model retrained on the corpus, text to image, 0..1",
    "bleu4": "BLEU-4 of the model retrained on the corpus, 0..1",
    "cider": "CIDEr of the model retrained on the corpus",
    "image_to_text_r1_raw": "recall at 1 of the model retrained on the raw web pairs, image to text, 0..1",
    "text_to_image_r1_raw": "recall at 1 of the model retrained on the raw web pairs, text to image, 0..1",
    "bleu4_raw": "BLEU-4 of the model retrained on the raw web pairs, 0..1",
    "cider_raw": "CIDEr of the model retrained on the raw web pairs",
    "rows": "rows of the URL table that the shard stands for",
    "images": "images that the step worked on; null where it does not count them",
    "shards.images": "rows whose image arrived",
    "failed": "rows without an image",
    "step": "the step that failed, or that worked: download, annotate, ...",
    "training_metrics.step": "optimiser steps done",
    "failures.round": "the round of the annotation; null for a download, which all rounds share",
    "failures.candidate": "the candidate without scores; null for a download",
    "failures.source": "who wrote the candidate without scores; null for a download",
    "seconds": "seconds of work, summed over all runs of the step and all its threads",
    "loss": "the sum of the objectives",
    "itc": "loss of the contrast",
    "itm": "loss of the matching",
    "lm": "loss of the language modeling",
    "learning_rate": "as the schedule has it at that step",
    "gradient_norm": "norm of the gradient before it was clipped",
    "images_per_second": "of all processes, since the last line",
    "data_wait": "share of that time in which the first process waited for its batch, 0..1",
    "undecodable": "images that were passed over so far because they cannot be decoded, in all processes",
}


def write_part(
    target: Path, rows: pa.Table, version: str, mark: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a part under its final name in one step: sorted by uid and candidate, the same bytes for the same rows.

    Args:
        version: ANNOTATION_VERSION or CORPUS_VERSION.
        mark: fingerprint of what the part was made from.
        metadata: further key-value metadata.
    """
    with part_writer(target, rows.schema, version, mark, metadata) as writer:
        writer.write(rows.sort_by([("uid", "ascending"), ("candidate", "ascending")]))


@contextmanager
def part_writer(
    target: Path, schema: pa.Schema, version: str, mark: str, metadata: Mapping[str, str] | None = None
) -> Iterator["PartWriter"]:
    """Yields what takes the rows of a part, which gets its final name when the block ends without an error.

    It holds one row group at most, and how the rows were cut when they came does not show in the bytes. The arguments
    are those of write_part.
    """
    schema = schema.with_metadata({SCHEMA_KEY: version, FINGERPRINT_KEY: mark, **(metadata or {})})
    with atomic_file(target) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as file:
        writer = PartWriter(file, schema)
        yield writer
        writer.finish()


class PartWriter:
    """Takes the rows of a part in their order."""

    def __init__(self, file: pq.ParquetWriter, schema: pa.Schema) -> None:
        self.rows = 0
        self._file = file
        self._waiting = schema.empty_table()

    def write(self, rows: pa.Table) -> None:
        """Adds rows of the part's schema."""
        self.rows += rows.num_rows
        self._waiting = pa.concat_tables([self._waiting, rows.replace_schema_metadata(self._waiting.schema.metadata)])
        while self._waiting.num_rows >= ROW_GROUP_ROWS:
            self._write_group(self._waiting.slice(0, ROW_GROUP_ROWS))
            self._waiting = self._waiting.slice(ROW_GROUP_ROWS)

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Adds key-value metadata that is known only when all rows are: to the file, not to its Arrow schema."""
        self._file.add_key_value_metadata(dict(metadata))

    def finish(self) -> None:
        """Writes what still waits."""
        if self._waiting.num_rows:
            self._write_group(self._waiting)

    def _write_group(self, rows: pa.Table) -> None:
        self._file.write_table(rows.combine_chunks(), row_group_size=ROW_GROUP_ROWS)
