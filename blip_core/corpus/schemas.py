"""The columns of annotations and of the corpus, and how their parts are written.

Scores carry no image bytes, so their row groups are large (122,880 rows, DuckDB's own vector of work) and
an aggregate reads only the columns it names. Imports no DuckDB: annotating needs none.
"""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from blip_core.files import atomic_file

ROW_GROUP_ROWS = 122_880

ANNOTATION_VERSION = "annotation/1"
CORPUS_VERSION = "corpus/1"

SCHEMA_KEY = "capfilt.schema"
FINGERPRINT_KEY = "capfilt.fingerprint"

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
    "round": "the round that the row belongs to",
    "promoted": "whether the corpus view reads this round",
    "model": "the model that was trained",
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
    entries = {SCHEMA_KEY: version, FINGERPRINT_KEY: mark, **(metadata or {})}
    rows = rows.sort_by([("uid", "ascending"), ("candidate", "ascending")]).replace_schema_metadata(entries)
    with atomic_file(target) as temporary:
        pq.write_table(rows, temporary, compression="zstd", row_group_size=ROW_GROUP_ROWS)
