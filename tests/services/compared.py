"""A round of random images for rules that compare them, and its publication without Prefect."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from blip_core.corpus.left_out import compare_round, part_of, read_left_out
from blip_core.corpus.rules import PublishConfig
from blip_core.corpus.schemas import (
    ANNOTATION_SCHEMA,
    ANNOTATION_VERSION,
    EMBEDDING_VERSION,
    embedding_schema,
    part_writer,
    write_part,
)
from blip_core.corpus.selection import publish_shard
from blip_core.data.shards import SHARD_SCHEMA, write_shard
from blip_core.files import fingerprint
from blip_core.workspace import Workspace

WIDTH = 16
HOSTS = (
    "a.test",
    "www.a.test",
    "B.test:8080",
    "user@b.test",
    "c.example.co.uk",
    "d.example.co.uk",
    "[2001:db8::1]",
    "10.0.0.1",
)


@dataclass
class Made:
    """A round of random images, and what was put into it."""

    workspace: Workspace
    names: list[str]
    rows: list[dict] = field(default_factory=list)
    vectors: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)


def make(root: Path, seed: int, shards: int = 4, images: int = 30) -> Made:
    """Few different pictures, scores and hosts, so that much is equal; uids that more than one shard has."""
    chance, noise = random.Random(seed), np.random.default_rng(seed)
    made = Made(Workspace.open(root), [fingerprint("across", seed, number) for number in range(shards)])
    centres = noise.standard_normal((12, WIDTH))
    for name in made.names:
        rows, pictures = [], []
        for number in range(images):
            uid, sha = f"{chance.randrange(10**6):06d}-{number}", f"{chance.randrange(3 * images):064x}"
            url = f"https://{chance.choice(HOSTS)}/{number}.jpg"
            vector = centres[chance.randrange(12)] + chance.choice((0, 0.02, 0.3)) * noise.standard_normal(WIDTH)
            made.vectors[name, uid] = (vector / np.linalg.norm(vector)).astype(np.float16)
            pictures.append({"uid": uid, "url": url, "status": "ok", "width": 64, "height": 48, "sha256": sha})
            for candidate in range(2):
                row = {"uid": uid, "shard": name, "url": url, "image_sha256": sha, "text": f"text {number}"}
                row |= {"source": ("web", "synthetic")[candidate], "candidate": candidate}
                rows.append(row | {"itm_score": chance.randrange(10) / 10, "itc_score": 0.0})
        made.rows += rows
        order = sorted(pictures, key=lambda row: row["uid"])
        write_shard(made.workspace.shard(name), [pa.Table.from_pylist(order, SHARD_SCHEMA)], "0", images)
        part = made.workspace.round(1).annotations / f"{name}.parquet"
        write_part(part, pa.Table.from_pylist(rows, ANNOTATION_SCHEMA), ANNOTATION_VERSION, "0")
        write_embeddings(made, name)
    return made


def write_embeddings(made: Made, name: str) -> None:
    own = sorted((uid, vector) for (shard, uid), vector in made.vectors.items() if shard == name)
    schema = embedding_schema(WIDTH)
    table = pa.table({"uid": [uid for uid, _ in own], "embedding": pa.array([v for _, v in own], schema.field(1).type)})
    with part_writer(made.workspace.round(1).embeddings / f"{name}.parquet", schema, EMBEDDING_VERSION, "0") as writer:
        writer.write(table.cast(schema))


def publish(made: Made, config: PublishConfig, names: list[str] | None = None) -> dict[str, bool]:
    """Compares the images and publishes the shards in that order; says which parts stood already."""
    compare_round(made.workspace, 1, made.names, config)
    skipped = {}
    for name in names or made.names:
        current = made.workspace.round(1)
        parts = (
            current.annotations / f"{name}.parquet",
            made.workspace.shard(name),
            current.corpus / f"{name}.parquet",
        )
        lost = read_left_out(part_of(current, name))
        summary = publish_shard(*parts, config.where, 1, config.best_of, config.text, config.images, lost)
        assert summary.kept + summary.rejected == 2 * len({r["uid"] for r in made.rows if r["shard"] == name})
        assert summary.rejected == sum(summary.by_reason.values())
        skipped[name] = summary.skipped
    return skipped


def kept(made: Made) -> set[tuple[str, str, int]]:
    table = pq.read_table(made.workspace.round(1).corpus, partitioning=None)
    return {(row["shard"], row["uid"], row["candidate"]) for row in table.to_pylist()}
