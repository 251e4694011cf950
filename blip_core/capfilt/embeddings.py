"""Embedding parts: what search and near-duplicates compare, the Filter's ITC embedding of every image. Needs no model.

A part has its own fingerprint: which texts an image has, and how they were sampled, does not change what it looks like.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from blip_core.corpus.schemas import EMBEDDING_VERSION, FINGERPRINT_KEY, embedding_schema
from blip_core.data.shards import check_part
from blip_core.files import fingerprint


def embedding_mark(shard: str, filter: str, precision: str) -> str:
    """The fingerprint of the embedding part that a Filter of that digest makes of a shard."""
    return fingerprint(EMBEDDING_VERSION, shard, filter, precision)


def embeddings_stand(part: Path, filter: str, precision: str) -> bool:
    """Whether a Filter's embeddings of the shard of that name stand at `part`, from the metadata alone.

    Raises ShardError where something else stands there.
    """
    if not part.is_file():
        return False
    return check_part(part, EMBEDDING_VERSION).get(FINGERPRINT_KEY) == embedding_mark(part.stem, filter, precision)


def embedding_table(uids: Sequence[str], embeddings: Sequence[np.ndarray], width: int) -> pa.Table:
    """Rows of embedding_schema: `embeddings` are of `width` float16 each, one for every uid."""
    flat = np.concatenate(embeddings) if embeddings else np.empty(0, np.float16)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float16()), width)
    return pa.Table.from_arrays([pa.array(uids, pa.string()), vectors], schema=embedding_schema(width))
