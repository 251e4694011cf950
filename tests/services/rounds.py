"""A round of drawn pictures with texts and scores of a test's own, published, without any model."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from blip_core.corpus.schemas import ANNOTATION_SCHEMA, ANNOTATION_VERSION, write_part
from blip_core.corpus.selection import publish_shard
from blip_core.workspace import Workspace
from services.shards import make_shards


def make_round(root: Path, texts: Sequence[str], where: str = "itm_score > 0.5") -> Workspace:
    """Round 1 of a workspace, a picture for each text; every second text is a synthetic one, and scores rise."""
    workspace = Workspace.open(root)
    (name,) = make_shards(root, 1, len(texts))
    rows = [
        {"uid": f"{number:08d}", "shard": name, "text": text, "source": ("web", "synthetic")[number % 2]}
        | {"candidate": number % 2, "itm_score": (number + 0.5) / len(texts), "itc_score": 0.0}
        for number, text in enumerate(texts)
    ]
    part = workspace.round(1).annotations / f"{name}.parquet"
    write_part(part, pa.Table.from_pylist(rows, ANNOTATION_SCHEMA), ANNOTATION_VERSION, "0")
    publish_shard(part, workspace.shard(name), workspace.round(1).corpus / part.name, where, 1)
    return workspace
