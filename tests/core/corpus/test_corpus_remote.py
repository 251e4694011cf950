"""Catalog, queries and report tables of a workspace in an object store; a query reaches nothing outside of it."""

import os
from collections.abc import Callable
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from services.filters import save_filter
from services.s3 import S3

from blip_core.corpus.catalog import VIEW_MEANINGS, build_catalog
from blip_core.corpus.confined import Confined
from blip_core.corpus.export import export_corpus
from blip_core.corpus.query import run_query
from blip_core.corpus.schemas import EMBEDDING_VERSION, FILTER_KEY, embedding_schema, part_writer
from blip_core.corpus.selection import publish_shard
from blip_core.errors import QueryError, WorkspaceError
from blip_core.evaluation.tables import RoundTables
from blip_core.stores import located
from blip_core.workspace import Workspace


def put(workspace: Workspace, url: str) -> Workspace:
    """The same workspace in a store."""
    fsspec.filesystem("s3").put(str(workspace.root), url, recursive=True)
    return Workspace.existing(url)


def publish(workspace: Workspace) -> None:
    for annotation in sorted(workspace.round(1).annotations.glob("*.parquet")):
        target = workspace.round(1).corpus / annotation.name
        publish_shard(annotation, workspace.shard(annotation.stem), target, "itm_score > 0.45", 1)


@pytest.fixture(scope="module")
def remote(shared_workspace: Workspace, make_bucket: Callable[[], str]) -> Workspace:
    """A published round in a bucket, with its catalog, and with secrets beside it and in another bucket."""
    bucket = make_bucket()
    stored = put(shared_workspace, f"{bucket}/deep/work")
    publish(stored)
    build_catalog(stored)
    fs = fsspec.filesystem("s3")
    for place in (f"{bucket}/secret.csv", f"{bucket}/deep/work2/secret.csv", f"{bucket}-other/secret.csv"):
        fs.makedirs(place.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(place, b"secret\n1\n")
    return stored


def test_what_is_published_from_the_store_is_what_is_published_from_a_folder(workspace: Workspace, bucket: str) -> None:
    stored = put(workspace, f"{bucket}/work")
    publish(workspace)
    publish(stored)
    parts = sorted(workspace.round(1).corpus.glob("*.parquet"))
    assert parts
    for part in parts:
        assert (stored.round(1).corpus / part.name).read_bytes() == part.read_bytes()
    tables = []
    for each in (workspace, stored):
        with RoundTables.open(each, 1) as opened:
            tables.append((opened.by_source(), opened.scores(), opened.rules(), opened.grid("best_kept", 3)))
    assert tables[0] == tables[1]
    for view in VIEW_MEANINGS:
        sql = f"SELECT * FROM {view} ORDER BY ALL"
        assert run_query(stored, sql) == run_query(workspace, sql)


def test_images_of_a_workspace_in_a_store_are_searched_by_words(workspace: Workspace, bucket: str) -> None:
    rows = [{"uid": f"aaaa-{number}", "embedding": list(np.eye(16, dtype=np.float16)[number])} for number in range(5)]
    table = pa.Table.from_pylist(rows, embedding_schema(16))
    part = workspace.round(1).embeddings / workspace.shard_paths()[0].name
    digest = save_filter(workspace.round(1).filter)
    with part_writer(part, table.schema, EMBEDDING_VERSION, "0", {FILTER_KEY: digest}) as writer:
        writer.write(table)
    publish(workspace)
    stored = put(workspace, f"{bucket}/work")
    for sql in ("FROM image_search('a red circle', 3)", "FROM near_duplicates(-1)", "SELECT embed_text('a star')"):
        assert run_query(stored, sql) == run_query(workspace, sql)
        assert run_query(stored, sql).num_rows > 0


def test_a_query_sees_a_part_the_moment_another_client_has_put_it(workspace: Workspace, bucket: str) -> None:
    stored = put(workspace, f"{bucket}/work")
    count = "SELECT count(*) AS n FROM corpus"
    assert run_query(stored, count)["n"].to_pylist() == [0]
    publish(workspace)
    part = next(workspace.round(1).corpus.glob("*.parquet"))
    client = fsspec.filesystem("s3", skip_instance_cache=True)
    client.put_file(str(part), f"{stored.round(1).corpus}/{part.name}")
    assert run_query(stored, count)["n"].to_pylist() == [pq.read_metadata(part).num_rows]


def test_files_of_the_workspace_can_be_read_by_their_url(remote: Workspace) -> None:
    assert run_query(remote, f"SELECT count(*) AS n FROM '{remote.round(1).corpus}/*.parquet'")["n"].to_pylist() == [8]
    by_name = "SELECT count(*) AS n FROM read_parquet(in_workspace('rounds/0001/corpus/*.parquet'))"
    assert run_query(remote, by_name)["n"].to_pylist() == [8]


EVIL = [
    "FROM '{bucket}/secret.csv'",
    "FROM read_text('{bucket}/secret.csv')",
    "FROM read_text('{work}/../../secret.csv')",
    "FROM read_text('{work}/../work2/secret.csv')",
    "FROM read_text('{work}2/secret.csv')",
    "FROM read_text('{work}*/secret.csv')",
    "FROM read_text('{work}/*/../../../secret.csv')",
    "FROM read_csv('{bucket}-other/secret.csv')",
    "FROM '{bucket}-other/secret.csv'",
    "FROM 's3a://{name}-other/secret.csv'",
    "FROM 'S3://{name}-other/secret.csv'",
    "FROM 's3:/{name}-other/secret.csv'",
    "FROM glob('{bucket}/*')",
    "FROM glob('s3://*/*')",
    "FROM glob('s3://**')",
    "FROM read_text(['{work}/seconds.json', '{bucket}/secret.csv'])",
    "FROM read_csv('{outside}/secret.csv')",
    "FROM '{outside}/secret.csv'",
    "FROM read_text('file://{outside}/secret.csv')",
    "FROM read_text('/etc/passwd')",
    "FROM read_text('/proc/self/environ')",
    "FROM glob('/*')",
    "FROM read_text('{endpoint}/{name}-other/secret.csv')",
    "FROM read_text('https://web.test/')",
    "FROM read_text('gs://other/secret.csv')",
    "FROM read_text('memory://secret.csv')",
    "FROM read_text('simplecache::{bucket}/secret.csv')",
    "COPY (SELECT 1) TO '{work}/evil.csv'",
    "COPY (SELECT 1) TO '{bucket}/evil.csv'",
    "COPY (SELECT 1) TO '{outside}/evil.csv'",
    "WITH a AS (COPY (SELECT 1) TO '{work}/evil.csv') FROM a",
    "ATTACH '{work}/evil.duckdb'",
    "ATTACH '{work}/catalog.duckdb'",
    "INSTALL httpfs",
    "SET enable_external_access = true",
    "SET allowed_directories = ['{bucket}']",
    "CREATE SECRET (TYPE s3)",
]


@pytest.mark.parametrize("sql", EVIL)
def test_a_statement_that_writes_or_leaves_the_workspace_in_the_store_is_refused(
    remote: Workspace, store: S3, tmp_path: Path, sql: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.csv").write_text("secret\n1\n")
    bucket = remote.root.parts[0].rstrip("/")
    words = {
        "bucket": f"s3://{bucket}",
        "name": bucket,
        "work": remote.root,
        "outside": outside,
        "endpoint": os.environ["AWS_ENDPOINT_URL"],
    }
    seen = len(store.requests())
    with pytest.raises(QueryError) as caught:
        run_query(remote, sql.format(**words))
    assert "\n" not in str(caught.value)
    assert not [line for line in store.requests()[seen:] if "secret" in line or "evil" in line or "-other" in line]
    assert [path.name for path in outside.iterdir()] == ["secret.csv"]


def test_the_catalog_in_the_store_holds_urls_and_no_rows(remote: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "catalog.duckdb"
    path.write_bytes(remote.catalog.read_bytes())
    with duckdb.connect(path, read_only=True) as connection:
        [(sql,)] = connection.execute("SELECT sql FROM duckdb_views() WHERE view_name = 'corpus'").fetchall()
        assert f"{remote.root}/rounds/0001/corpus/*.parquet" in sql
        connection.register_filesystem(fsspec.filesystem("s3"))
        assert connection.sql("SELECT count(*) FROM corpus").fetchall() == [(8,)]


def test_the_file_system_of_a_query_reads_below_its_root_and_does_nothing_else(remote: Workspace) -> None:
    bucket = str(remote.root.parent.parent).rstrip("/")
    confined = Confined(fsspec.filesystem("s3"), str(remote.root).removeprefix("s3://"))
    part = f"{remote.round(1).corpus}/aaaa000000000001.parquet"
    assert confined.open(part).read(4) == b"PAR1"
    assert confined.glob(f"{bucket}/d*/w*/rounds/*/corpus/a*.parquet") == [part.removeprefix("s3://")]
    for outside in (f"{bucket}/secret.csv", f"{remote.root}2/secret.csv", f"{remote.root}/../../secret.csv"):
        for attempt in (confined.open, confined.info, confined.cat_file, confined.ls, confined.modified):
            with pytest.raises(PermissionError, match="outside"):
                attempt(outside)
    for mode in ("wb", "ab", "r+b", "xb"):
        with pytest.raises(PermissionError, match="written"):
            confined.open(part, mode)
    for attempt in (confined.rm_file, confined.touch):
        with pytest.raises((PermissionError, NotImplementedError)):
            attempt(part)
    assert confined.exists(part)


@pytest.mark.parametrize("format", ["parquet", "webdataset", "uids", "csv"])
def test_an_export_from_and_into_the_store_is_that_of_a_folder(
    format: str, workspace: Workspace, bucket: str, tmp_path: Path
) -> None:
    publish(workspace)
    where = "source = 'web'"
    for part in workspace.round(1).corpus.glob("*.parquet"):
        table = pq.read_table(part)
        if format == "uids":
            uids = [uid.replace("-", "0") for uid in table["uid"].to_pylist()]
            pq.write_table(table.set_column(0, "uid", [uids]), part)
    stored, out = put(workspace, f"{bucket}/work"), located(f"{bucket}/out")

    def stop(done: int, _: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    size = {"parquet": 4_000, "webdataset": 40_000}.get(format, 1_000)
    if format != "uids":
        with pytest.raises(KeyboardInterrupt):
            export_corpus(stored, out, format, where=where, shard_size=size, progress=stop)
    export_corpus(stored, out, format, where=where, shard_size=size)
    assert export_corpus(stored, out, format, where=where, shard_size=size).written == 0
    export_corpus(workspace, tmp_path / "out", format, where=where, shard_size=size)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()
    }
    with pytest.raises(WorkspaceError, match="holds"):
        export_corpus(stored, out, "blip")
