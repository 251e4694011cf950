"""`capfilt query` answers what only reads, and refuses the rest in one line."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_core.corpus.query import run_query
from blip_core.corpus.selection import publish_shard
from blip_core.errors import QueryError
from blip_core.workspace import Workspace


@pytest.fixture(scope="module")
def published(shared_workspace: Workspace) -> Workspace:
    """A published round, with a folder of secrets beside the workspace."""
    for annotation in sorted(shared_workspace.round(1).annotations.glob("*.parquet")):
        target = shared_workspace.round(1).corpus / annotation.name
        publish_shard(annotation, shared_workspace.shard(annotation.stem), target, "itm_score > 0.45", 1)
    outside = shared_workspace.root.parent / "outside"
    outside.mkdir()
    (outside / "secret.csv").write_text("secret\n1\n", encoding="utf-8")
    pq.write_table(pa.table({"secret": [1]}), outside / "secret.parquet")
    return shared_workspace


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("SELECT source, count(*) FROM corpus GROUP BY 1 ORDER BY 1", [("synthetic", 4), ("web", 4)]),
        ("FROM annotations SELECT count(*) WHERE reason = 'empty_text'", [(2,)]),
        (
            "WITH failed AS (FROM images WHERE status = 'failed') SELECT reason, count(*) FROM failed GROUP BY 1;",
            [("not_found", 2)],
        ),
        ("SELECT count(*) FROM corpus JOIN images USING (uid, shard) WHERE octet_length(image) > 0", [(8,)]),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3) SELECT max(i) FROM n", [(3,)]),
        ("SELECT sum(i)::INTEGER FROM range(4) AS r(i)", [(6,)]),
        ("VALUES (1), (2)", [(1,), (2,)]),
        ("FROM (PIVOT corpus ON source IN ('web') USING count(*) GROUP BY round)", [(1, 4)]),
        ("SELECT 'COPY x TO y; DROP TABLE z'", [("COPY x TO y; DROP TABLE z",)]),
    ],
)
def test_reading_statement_gives_its_rows(published: Workspace, sql: str, rows: list[tuple]) -> None:
    table = run_query(published, sql)
    assert isinstance(table, pa.Table)
    assert [tuple(row.values()) for row in table.to_pylist()] == rows


@pytest.mark.parametrize(
    "sql", ["DESCRIBE corpus", "SHOW TABLES", "SUMMARIZE corpus", "EXPLAIN SELECT 1", "EXPLAIN ANALYZE FROM corpus"]
)
def test_statement_that_describes_is_answered(published: Workspace, sql: str) -> None:
    assert run_query(published, sql).num_rows > 0


def test_files_of_the_workspace_can_be_read_by_their_path(published: Workspace) -> None:
    path = published.round(1).corpus / "*.parquet"
    assert run_query(published, f"SELECT count(*) AS n FROM '{path}'")["n"].to_pylist() == [8]


def test_query_sees_a_part_the_moment_it_stands(workspace: Workspace) -> None:
    assert run_query(workspace, "SELECT count(*) AS n FROM corpus")["n"].to_pylist() == [0]
    annotation = workspace.round(1).annotations / "aaaa000000000001.parquet"
    publish_shard(annotation, workspace.shard(annotation.stem), workspace.round(1).corpus / annotation.name, "true", 1)
    assert run_query(workspace, "SELECT count(*) AS n FROM corpus")["n"].to_pylist() == [9]


EVIL = [
    "COPY (SELECT 1) TO '{inside}/evil.csv'",
    "COPY (SELECT 1) TO '{outside}/evil.csv'",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{inside}/evil.csv'",
    "EXPLAIN (ANALYZE) COPY (SELECT 1) TO '{inside}/evil.csv'",
    "WITH a AS (COPY (SELECT 1) TO '{inside}/evil.csv') FROM a",
    "WITH a AS (COPY (SELECT 1) TO '{inside}/evil.csv') SELECT 1",
    "EXPLAIN ANALYZE WITH a AS (COPY (SELECT 1) TO '{inside}/evil.csv') FROM a",
    "SELECT * FROM (WITH a AS (COPY (SELECT 1) TO '{inside}/evil.csv') FROM a)",
    "FROM query('WITH a AS (COPY (SELECT 1) TO ''{inside}/evil.csv'') FROM a')",
    "FROM json_execute_serialized_sql(json_serialize_sql('WITH a AS (COPY (SELECT 1) TO ''{inside}/e'') FROM a'))",
    "FROM enable_logging(storage='file', storage_config={{'path': '{inside}/evil'}})",
    "SELECT 1; COPY (SELECT 1) TO '{inside}/evil.csv'",
    "SELECT 1; DROP VIEW corpus",
    "CREATE TABLE evil AS SELECT 1",
    "CREATE OR REPLACE VIEW corpus AS SELECT 1",
    "INSERT INTO corpus VALUES (1)",
    "DELETE FROM corpus",
    "DROP VIEW corpus",
    "ATTACH '{inside}/evil.duckdb'",
    "ATTACH '{outside}/evil.duckdb'",
    "EXPORT DATABASE '{inside}/evil'",
    "IMPORT DATABASE '{outside}'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "RESET lock_configuration",
    "PRAGMA enable_profiling",
    "CALL enable_logging()",
    "CHECKPOINT",
    "PREPARE evil AS SELECT 1",
    "BEGIN TRANSACTION",
    "USE memory",
    "FROM read_csv('{outside}/secret.csv')",
    "FROM read_text('{outside}/secret.csv')",
    "FROM read_text('{inside}/../outside/secret.csv')",
    "FROM '{outside}/secret.csv'",
    "FROM glob('/*')",
    "FROM glob('{outside}/*')",
    "FROM read_parquet('{outside}/*.parquet')",
    "FROM read_text('https://web.test/')",
    "SELECT (SELECT content FROM read_text('/etc/passwd'))",
    "FROM read_blob('/etc/passwd')",
    "FROM read_json('{outside}/secret.csv')",
    "FROM read_ndjson_objects('/etc/passwd')",
    "FROM sniff_csv('{outside}/secret.csv')",
    "FROM parquet_metadata('{outside}/secret.parquet')",
    "FROM parquet_schema('{outside}/secret.parquet')",
    "FROM parquet_kv_metadata('{outside}/secret.parquet')",
    "FROM parquet_file_metadata('{outside}/*.parquet')",
    "FROM read_parquet(['{inside}/rounds/0001/corpus/*.parquet', '{outside}/secret.parquet'], union_by_name = true)",
    "FROM read_text('file://{outside}/secret.csv')",
    "FROM read_text('/proc/self/environ')",
    "FROM read_text('{inside}-beside/secret.csv')",
    "FROM read_text('secret.csv')",
    "FROM 'secret.csv'",
    "FROM 'https://web.test/secret.parquet'",
    "FROM read_csv('s3://bucket/secret.csv')",
    "FROM read_parquet('hf://datasets/web/secret.parquet')",
    "FROM sqlite_scan('{outside}/secret.csv', 'x')",
    "FROM postgres_query('host=web.test', 'SELECT 1')",
    "FROM query_table('{outside}/secret.csv')",
    "FROM (SELECT * FROM query('FROM read_text(''/etc/passwd'')'))",
    "SELECT getenv('HOME')",
    "SELECT (FROM glob('/*') SELECT count(*)) FROM corpus",
    "DESCRIBE FROM '{outside}/secret.csv'",
    "SUMMARIZE FROM '{outside}/secret.csv'",
    "SUMMARIZE '{outside}/secret.csv'",
    "EXPLAIN ANALYZE FROM read_text('/etc/passwd')",
    "COPY corpus TO '{inside}/rounds/0001/corpus/evil.parquet'",
    "COPY corpus TO '/dev/stdout'",
    "COPY corpus FROM '{outside}/secret.csv'",
    "COPY FROM DATABASE memory TO memory",
    "EXPLAIN ANALYZE CREATE TABLE evil AS SELECT 1",
    "EXPLAIN ANALYZE INSERT INTO corpus VALUES (1)",
    "CREATE MACRO evil() AS 1",
    "CREATE TEMP TABLE evil AS FROM corpus",
    "CREATE SCHEMA evil",
    "CREATE TYPE evil AS ENUM ('x')",
    "CREATE SECRET evil (TYPE s3, KEY_ID 'x', SECRET 'y')",
    "UPDATE corpus SET text = ''",
    "TRUNCATE corpus",
    "MERGE INTO corpus USING images USING (uid) WHEN MATCHED THEN DELETE",
    "ALTER VIEW corpus RENAME TO evil",
    "COMMENT ON VIEW corpus IS 'evil'",
    "DROP MACRO nearest",
    "DETACH memory",
    "FORCE INSTALL sqlite FROM '{outside}'",
    "LOAD '{outside}/evil.duckdb_extension'",
    "UPDATE EXTENSIONS",
    "SET VARIABLE evil = 1",
    "SET allowed_directories = ['/']",
    "SET temp_directory = '{inside}/evil'",
    "PRAGMA database_list",
    "PRAGMA enable_logging",
    "CALL pragma_version()",
    "VACUUM",
    "ANALYZE",
    "EXECUTE evil",
    "COMMIT",
    "",
    "-- nothing",
]


@pytest.mark.parametrize("sql", EVIL)
def test_statement_that_writes_or_leaves_the_workspace_is_refused_in_one_line(
    published: Workspace, monkeypatch: pytest.MonkeyPatch, sql: str
) -> None:
    outside = published.root.parent / "outside"
    monkeypatch.chdir(outside)
    before = everything(outside.parent)
    with pytest.raises(QueryError) as caught:
        run_query(published, sql.format(inside=published.root, outside=outside))
    assert "\n" not in str(caught.value)
    assert everything(outside.parent) == before


def everything(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def test_error_of_duckdb_keeps_its_hint_and_loses_its_caret(published: Workspace) -> None:
    with pytest.raises(QueryError) as caught:
        run_query(published, "SELECT\n  itm_skore\nFROM corpus")
    assert "itm_skore" in str(caught.value)
    assert "itm_score" in str(caught.value)
    assert "^" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refused_path_says_what_may_be_read(published: Workspace) -> None:
    with pytest.raises(QueryError, match=f"images, annotations, corpus.*{published.root}"):
        run_query(published, "FROM '/etc/passwd.csv'")


def test_folder_with_a_quote_and_glob_signs_in_its_name_is_read(workspace: Workspace, tmp_path: Path) -> None:
    odd = workspace.root.rename(tmp_path / "o'dd [1] *")
    assert run_query(Workspace.open(odd), "SELECT count(*) AS n FROM annotations")["n"].to_pylist() == [20]
