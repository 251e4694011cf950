"""The catalog as any DuckDB client sees it, started in the workspace's folder."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from blip_core.corpus.catalog import build_catalog
from blip_core.corpus.rounds import promoted_round
from blip_core.corpus.schemas import EMBEDDING_VERSION, embedding_schema, part_writer
from blip_core.corpus.selection import publish_shard
from blip_core.errors import WorkspaceError
from blip_core.files import write_json
from blip_core.workspace import Workspace

VIEWS = ("images", "annotations", "corpus", "embeddings", "rounds", "shards", "failures", "training_metrics", "runs")


def plain_client(workspace: Workspace, sql: str) -> list:
    """Rows of a query in a process of its own that knows DuckDB alone."""
    code = "import duckdb, json, sys; c = duckdb.connect('catalog.duckdb', read_only=True)\n"
    code += "print(json.dumps(c.execute(sys.argv[1]).fetchall(), default=str))"
    done = subprocess.run(
        [sys.executable, "-c", code, sql], cwd=workspace.root, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def write_embeddings(workspace: Workspace) -> None:
    """Of three images of the first shard of round 1."""
    shard = workspace.shard_paths()[0]
    rows = [{"uid": f"{shard.stem[:4]}-{number}", "embedding": [np.float16(1), np.float16(0)]} for number in range(3)]
    table = pa.Table.from_pylist(rows, embedding_schema(2))
    with part_writer(workspace.round(1).embeddings / shard.name, table.schema, EMBEDDING_VERSION, "0") as writer:
        writer.write(table)


def publish(workspace: Workspace, round: int, where: str) -> None:
    for annotation in sorted(workspace.round(1).annotations.glob("*.parquet")):
        shard = workspace.shard(annotation.stem)
        publish_shard(annotation, shard, workspace.round(round).corpus / annotation.name, where, round)


def test_plain_client_in_the_workspace_reads_every_view(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(workspace, 1, "itm_score > 0.45")
    write_embeddings(workspace)
    write_json(
        workspace.round(1).evaluation,
        {"audit": {"web_noise": 0.5}, "retrieval": {"retrained": {"text_to_image": {"r1": 0.25}}}, "captioning": {}},
    )
    workspace.round(1).metrics.mkdir()
    line = {"model": "med", "step": 20, "loss": 3.5, "itc": 1.0, "itm": 0.6, "lm": None}
    metrics = workspace.round(1).metrics / "med.jsonl"
    metrics.write_text(json.dumps(line) + '\n{"model": "med", "st', encoding="utf-8")
    workspace.round(1).add_seconds("annotate", 2.5)
    workspace.round(1).add_images("annotate", 10)
    workspace.round(1).add_seconds("publish", 1.0)
    monkeypatch.chdir(tmp_path)  # the catalog is built from anywhere
    assert build_catalog(workspace) == workspace.catalog
    counts = " UNION ALL ".join(f"SELECT count(*) FROM {view}" for view in VIEWS)
    assert plain_client(workspace, counts) == [[12], [20], [8], [3], [1], [2], [4], [1], [2]]
    assert plain_client(workspace, "SELECT DISTINCT round FROM annotations") == [[1]]
    assert plain_client(workspace, "SELECT shard, count(image) FROM images GROUP BY 1 ORDER BY 1") == [
        ["aaaa000000000001", 5],
        ["bbbb000000000002", 5],
    ]
    assert plain_client(workspace, "SELECT round, promoted, web_noise, text_to_image_r1, cider_raw FROM rounds") == [
        [1, True, 0.5, 0.25, None]
    ]
    assert plain_client(workspace, "SELECT round, model, step, itm, lm FROM training_metrics") == [
        [1, "med", 20, 0.6, None]
    ]
    assert plain_client(workspace, "FROM shards ORDER BY shard") == [
        ["aaaa000000000001", 6, 5, 1],
        ["bbbb000000000002", 6, 5, 1],
    ]
    assert plain_client(
        workspace, "SELECT uid, step, round, source, candidate, reason FROM failures ORDER BY 1, 2"
    ) == [
        ["aaaa-4", "annotate", 1, "synthetic", 1, "empty_text"],
        ["aaaa-5", "download", None, None, None, "not_found"],
        ["bbbb-4", "annotate", 1, "synthetic", 1, "empty_text"],
        ["bbbb-5", "download", None, None, None, "not_found"],
    ]
    assert plain_client(workspace, "FROM runs ORDER BY step") == [
        [1, "annotate", 2.5, 10],
        [1, "publish", 1.0, None],
    ]


def test_published_parts_are_read_without_the_catalog_too(workspace: Workspace) -> None:
    publish(workspace, 1, "itm_score > 0.45")
    build_catalog(workspace)
    direct = "SELECT * FROM 'rounds/*/corpus/*.parquet' ORDER BY uid, candidate"
    assert plain_client(workspace, direct) == plain_client(workspace, "SELECT * FROM corpus ORDER BY uid, candidate")


def test_views_of_an_empty_workspace_have_the_columns_of_a_full_one(workspace: Workspace, tmp_path: Path) -> None:
    empty = Workspace.open(tmp_path / "empty")
    build_catalog(empty)
    publish(workspace, 1, "true")
    workspace.round(1).metrics.mkdir()
    columns = ("model", "step", "loss", "itc", "itm", "lm", "learning_rate", "gradient_norm")
    columns += ("images_per_second", "data_wait", "undecodable")
    (workspace.round(1).metrics / "med.jsonl").write_text(json.dumps(dict.fromkeys(columns)) + "\n", encoding="utf-8")
    workspace.round(1).add_seconds("annotate", 2.5)
    write_embeddings(workspace)
    build_catalog(workspace)
    shape = "SELECT table_name, column_name, data_type FROM information_schema.columns ORDER BY 1, ordinal_position"
    assert plain_client(empty, shape) == plain_client(workspace, shape)
    counts = " UNION ALL ".join(f"SELECT count(*) FROM {view}" for view in VIEWS)
    assert plain_client(empty, counts) == [[0]] * len(VIEWS)


def test_views_and_columns_carry_comments(workspace: Workspace) -> None:
    build_catalog(workspace)
    comments = dict(plain_client(workspace, "SELECT view_name, comment FROM duckdb_views() WHERE NOT internal"))
    assert set(comments) == set(VIEWS)
    assert all(comments.values())
    [[itm]] = plain_client(
        workspace,
        "SELECT comment FROM duckdb_columns() WHERE table_name = 'annotations' AND column_name = 'itm_score'",
    )
    assert "match" in itm
    silent = "SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal AND comment IS NULL"
    assert plain_client(workspace, silent) == []
    steps = "SELECT table_name, comment FROM duckdb_columns() WHERE column_name = 'step' ORDER BY 1"
    assert len({comment for _, comment in plain_client(workspace, steps)}) == 2  # two meanings


def test_corpus_view_follows_the_promotion_else_the_last_published_round(workspace: Workspace) -> None:
    assert promoted_round(workspace) is None
    publish(workspace, 1, "itm_score > 0.65")
    publish(workspace, 2, "itm_score > 0.25")
    workspace.round(3).annotations.mkdir(parents=True)
    build_catalog(workspace)
    assert plain_client(workspace, "SELECT round, count(*) FROM corpus GROUP BY 1") == [[2, 12]]
    write_json(workspace.root / "promoted.json", {"round": 1})
    build_catalog(workspace)
    assert plain_client(workspace, "SELECT round, count(*) FROM corpus GROUP BY 1") == [[1, 4]]
    assert plain_client(workspace, "SELECT round, promoted FROM rounds ORDER BY 1") == [
        [1, True],
        [2, False],
        [3, False],
    ]


def test_torn_promotion_is_named(workspace: Workspace) -> None:
    write_json(workspace.root / "promoted.json", {"round": "one"})
    with pytest.raises(WorkspaceError, match=r"promoted\.json"):
        build_catalog(workspace)
    assert not workspace.catalog.exists()


def test_catalog_is_replaced_whole_and_leaves_nothing_beside(workspace: Workspace) -> None:
    build_catalog(workspace)
    build_catalog(workspace)
    names = {path.name for path in workspace.root.iterdir()}
    assert names == {"catalog.duckdb", "rounds", "shards"}
