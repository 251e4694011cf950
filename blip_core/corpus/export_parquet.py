"""Pairs as Hugging Face `datasets` have them in Parquet: the image is a struct of bytes and path, and the schema's
metadata says that it is one, so that `load_dataset("parquet", ...)` shows pictures.

With a page index a viewer fetches single rows; with content-defined chunks, what has not changed between two exports is
not uploaded again.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blip_core.corpus.export_format import Entry, Pair
from blip_core.corpus.schemas import CORPUS_SCHEMA

GROUP_BYTES, GROUP_ROWS = 16 * 2**20, 1_000
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
FEATURE_TYPES = {pa.float32(): "float32"}
# Images, texts and addresses do not repeat; a dictionary of them would be as large as they are.
REPETITIVE = ["shard", "source", "captioner", "filter", "candidate", "round"]


def dataset_schema() -> pa.Schema:
    """`image`, then the columns of the corpus, with the metadata that `datasets` reads."""
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    for field in CORPUS_SCHEMA:
        features[field.name] = {"dtype": FEATURE_TYPES.get(field.type, str(field.type)), "_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([pa.field("image", IMAGE), *CORPUS_SCHEMA], metadata=metadata)


def encode_row(pair: Pair) -> Entry:
    """A row of the table; its size is that of the image and the texts, before compression."""
    picture = {"bytes": pair.picture.image, "path": f"{pair.key}.{pair.picture.extension}"}
    texts = sum(len(value.encode()) for value in pair.row.values() if isinstance(value, str))
    return Entry({"image": picture, **pair.row}, len(pair.picture.image or b"") + texts)


def write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Writes rows as one file; holds one row group."""
    schema = dataset_schema()
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=REPETITIVE,
        write_page_index=True,
        use_content_defined_chunking=True,
    ) as writer:
        for group in _groups(rows):
            writer.write_table(pa.Table.from_pylist(group, schema), row_group_size=len(group))


def _groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows by row group."""
    group: list[dict[str, Any]] = []
    held = 0
    for row in rows:
        group.append(row)
        held += len(row["image"]["bytes"] or b"")
        if held >= GROUP_BYTES or len(group) == GROUP_ROWS:
            yield group
            group, held = [], 0
    if group:
        yield group
