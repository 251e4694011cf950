"""A small workspace with real files: two shards of six rows, annotations of the rows that have an image."""

import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip_core.corpus.schemas import ANNOTATION_SCHEMA, ANNOTATION_VERSION, write_part
from blip_core.corpus.selection import publish_human, publish_shard
from blip_core.data.shards import SHARD_SCHEMA
from blip_core.data.tables import PairTable
from blip_core.workspace import Workspace

SHARDS = ("aaaa000000000001", "bbbb000000000002")


def picture(width: int, height: int, colour: tuple[int, int, int], kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, kind)
    return file.getvalue()


def shard_rows(shard: str) -> list[dict]:
    rows = []
    for number in range(6):
        row = {"uid": f"{shard[:4]}-{number}", "url": f"http://web.test/{shard[:4]}/{number}.jpg"}
        row |= {"caption": f"web text {number} of {shard[:4]}"}
        if number == 5:
            rows.append(row | {"status": "failed", "reason": "not_found"})
            continue
        image = picture(40 + number, 30, (number * 40, 20, 90))
        size = {"width": 40 + number, "height": 30, "original_width": 400, "original_height": 300}
        rows.append(row | size | {"status": "ok", "sha256": hashlib.sha256(image).hexdigest(), "image": image})
    return rows


def annotation_rows(shard: str) -> list[dict]:
    """Scores 0.00, 0.10, ... over the candidates; the last synthetic text is empty and has no scores."""
    rows = []
    for row in shard_rows(shard)[:5]:
        shared = {"uid": row["uid"], "shard": shard, "url": row["url"], "image_sha256": row["sha256"]}
        shared |= {"captioner": "c0ffee", "filter": "f11733"}
        for candidate, source in enumerate(("web", "synthetic")):
            place = len(rows)
            scored = {"itm_score": place / 10, "itc_score": place / 20, "reason": None}
            if place == 9:
                scored = {"itm_score": None, "itc_score": None, "reason": "empty_text"}
            sampled = {"logprob": -1.5, "seed": place} if source == "synthetic" else {}
            text = "" if place == 9 else f"{source} text {place}"
            rows.append(shared | {"text": text, "source": source, "candidate": candidate} | scored | sampled)
    return rows


def write_shard_file(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, SHARD_SCHEMA)
    table = table.replace_schema_metadata({"capfilt.schema": "shard/1", "capfilt.settings": "0"})
    pq.write_table(table, path, compression="zstd", row_group_size=1000)


def write_annotation_file(path: Path, rows: list[dict]) -> None:
    write_part(path, pa.Table.from_pylist(rows, ANNOTATION_SCHEMA), ANNOTATION_VERSION, "0123456789abcdef")


def make(root: Path) -> Workspace:
    workspace = Workspace.open(root)
    for shard in SHARDS:
        write_shard_file(workspace.shard(shard), shard_rows(shard))
        write_annotation_file(workspace.round(1).annotations / f"{shard}.parquet", annotation_rows(shard))
    return workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Round 1 annotated, not yet published."""
    return make(tmp_path / "workspace")


@pytest.fixture(scope="module")
def shared_workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The same, for the tests of a module that only read."""
    return make(tmp_path_factory.mktemp("shared") / "workspace")


class Published(NamedTuple):
    """A published round with human pairs, the table of those, and all rows of the corpus as the parts have them."""

    workspace: Workspace
    human: PairTable
    rows: list[dict]


def publish_all(workspace: Workspace, where: str = "itm_score > 0.25") -> Published:
    """Publishes round 1 of a workspace, and three human pairs of two images, one of which is a PNG."""
    for annotation in sorted(workspace.round(1).annotations.glob("*.parquet")):
        target = workspace.round(1).corpus / annotation.name
        publish_shard(annotation, workspace.shard(annotation.stem), target, where, 1)
    images = [picture(21, 11, (9, 99, 9)), picture(22, 12, (99, 9, 9), "PNG")]
    texts = [["a green box", 'a box, "green"\nand wide'], ["a red box"]]
    human = PairTable(str(workspace.root.parent / "human.parquet"))
    pq.write_table(pa.table({"image": images, "caption": texts}), human.path)
    publish_human(human, workspace.round(1).corpus, 1)
    parts = sorted(workspace.round(1).corpus.glob("*.parquet"))
    return Published(workspace, human, [row for part in parts for row in pq.read_table(part).to_pylist()])


@pytest.fixture
def published(workspace: Workspace) -> Published:
    return publish_all(workspace)


@pytest.fixture(scope="module")
def shared_published(shared_workspace: Workspace) -> Published:
    """The same, for the tests of a module that only read."""
    return publish_all(shared_workspace)
