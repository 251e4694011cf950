"""The DuckDB catalog: views and macros over the workspace's files, so that a question to the corpus is one SELECT.

The catalog holds no data. Its paths are relative to the workspace, so any DuckDB client that is started in
that folder can open it, and it stands in place of the last one in one atomic step. In an object store they are URLs.
"""

# ruff: noqa: S608  (a view cannot take parameters; every value that is put into it is quoted, or a number of ours)

import glob
from collections.abc import Mapping
from pathlib import Path

import duckdb
import pyarrow as pa

from blip_core import stores
from blip_core.corpus.audited import AUDITED, audited_columns
from blip_core.corpus.macros import create_macros
from blip_core.corpus.retried import any_retried, settled_once
from blip_core.corpus.rounds import ROUND_NUMBERS, look_up, promoted_round, round_states
from blip_core.corpus.schemas import ANNOTATION_SCHEMA, COLUMN_MEANINGS, CORPUS_SCHEMA
from blip_core.corpus.sql import let_reach, quoted
from blip_core.data.shards import SHARD_SCHEMA
from blip_core.files import atomic_file, read_json
from blip_core.workspace import Workspace

VIEW_MEANINGS = {
    "images": "every input row, one image each: as downloaded, or the reason why it failed",
    "annotations": "every candidate of every round, with its scores",
    "corpus": "the candidates that passed in the promoted round, and the human pairs",
    "embeddings": "the Filter's embedding of every image that can be decoded, of every round",
    "rounds": "the rounds, what became of them, and their numbers",
    "shards": "the shards, and how many of their rows arrived",
    "failures": "everything that failed, and why: rows without an image, and candidates without scores",
    "training_metrics": "the losses of every training, by step",
    "runs": "how long the steps of each round worked, and on how many images",
}

# The DuckDB types of an empty view's columns.
SQL_TYPES = {
    pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
    pa.int8(): "TINYINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
}

METRIC_TYPES = {
    "model": "VARCHAR",
    "step": "BIGINT",
    "loss": "DOUBLE",
    "itc": "DOUBLE",
    "itm": "DOUBLE",
    "lm": "DOUBLE",
    "learning_rate": "DOUBLE",
    "gradient_norm": "DOUBLE",
    "images_per_second": "DOUBLE",
    "data_wait": "DOUBLE",
    "undecodable": "BIGINT",
}


# Views over views.
SHARDS = """SELECT shard, count(*) AS rows, count(*) FILTER (status = 'ok') AS images,
    count(*) FILTER (status <> 'ok') AS failed
FROM images GROUP BY shard"""

FAILURES = """SELECT uid, shard, url, 'download' AS step, NULL::INTEGER AS round, NULL::VARCHAR AS source,
    NULL::TINYINT AS candidate, reason
FROM images WHERE status <> 'ok'
UNION ALL
SELECT uid, shard, url, 'annotate', round, source, candidate, reason FROM annotations WHERE reason IS NOT NULL"""


def build_catalog(workspace: Workspace) -> Path:
    """Writes `catalog.duckdb` anew and returns its path. Call it again when a step has written its first part, and when
    a retry is planned.

    Raises WorkspaceError where the workspace cannot be written or promoted.json is torn.
    """
    with atomic_file(workspace.catalog) as temporary, duckdb.connect(temporary) as connection:
        # The views are bound while they are made, from wherever this process runs.
        if stores.is_remote(workspace.root):
            let_reach(connection, workspace.root)
            create_views(connection, workspace, folder=f"{workspace.root}/")
        else:
            connection.execute(f"SET file_search_path = {quoted(str(workspace.root))}")
            create_views(connection, workspace, folder="")
    return workspace.catalog


def create_views(
    connection: duckdb.DuckDBPyConnection, workspace: Workspace, folder: str, embeds: bool = False
) -> None:
    """Makes the views, the macros, and their comments.

    Args:
        folder: stands before every path: '' or the workspace with a slash.
        embeds: whether the connection has a function `embed_text`.
    """
    folder = glob.escape(folder)
    promoted = promoted_round(workspace)
    definitions = {
        "images": _images(workspace, folder),
        "annotations": _annotations(workspace, folder),
        "corpus": _corpus(workspace, folder, promoted),
        "embeddings": _embeddings(workspace, folder),
        "rounds": _rounds(workspace),
        "shards": SHARDS,
        "failures": FAILURES,
        "training_metrics": _training_metrics(workspace, folder),
        "runs": _runs(workspace),
    }
    for view, definition in definitions.items():
        connection.execute(f"CREATE VIEW {view} AS {definition}")
        connection.execute(f"COMMENT ON VIEW {view} IS {quoted(VIEW_MEANINGS[view])}")
        for column in connection.table(view).columns:
            meaning = COLUMN_MEANINGS.get(f"{view}.{column}") or COLUMN_MEANINGS[column]
            connection.execute(f'COMMENT ON COLUMN {view}."{column}" IS {quoted(meaning)}')
    searchable = promoted is not None and _any(workspace.round(promoted).embeddings)
    create_macros(connection, folder, promoted, searchable, embeds)


def _images(workspace: Workspace, folder: str) -> str:
    if not _any(workspace.shards):
        return _empty({"shard": "VARCHAR", **_types(SHARD_SCHEMA)})
    parts = quoted(f"{folder}shards/*.parquet")
    once = f" WHERE {settled_once(_parquet(parts))}" if any_retried(workspace) else ""
    return f"SELECT parse_filename(filename, true) AS shard, * EXCLUDE (filename) FROM {_parquet(parts)}{once}"


def _annotations(workspace: Workspace, folder: str) -> str:
    if not any(_any(workspace.round(number).annotations) for number in workspace.round_numbers()):
        return _empty({**_types(ANNOTATION_SCHEMA), "round": "INTEGER"})
    parts = quoted(f"{folder}rounds/*/annotations/*.parquet")
    return f"SELECT * EXCLUDE (filename), {_round_of('filename')} AS round FROM {_parquet(parts)}"


def _corpus(workspace: Workspace, folder: str, promoted: int | None) -> str:
    if promoted is None or not _any(workspace.round(promoted).corpus):
        return _empty(_types(CORPUS_SCHEMA))
    return f"SELECT * FROM read_parquet({quoted(f'{folder}rounds/{promoted:04d}/corpus/*.parquet')})"


def _embeddings(workspace: Workspace, folder: str) -> str:
    if not any(_any(workspace.round(number).embeddings) for number in workspace.round_numbers()):
        return _empty({"round": "INTEGER", "shard": "VARCHAR", "uid": "VARCHAR", "embedding": "FLOAT[]"})
    parts = _parquet(quoted(f"{folder}rounds/*/embeddings/*.parquet"))
    columns = f"{_round_of('filename')} AS round, parse_filename(filename, true) AS shard, uid, embedding"
    return f"SELECT {columns} FROM {parts}"


def _rounds(workspace: Workspace) -> str:
    types = {"round": "INTEGER", "promoted": "BOOLEAN", "state": "VARCHAR", "why": "VARCHAR"}
    types |= dict.fromkeys([*ROUND_NUMBERS, *AUDITED], "DOUBLE")
    rows = []
    for number, (state, why) in round_states(workspace).items():
        evaluation = workspace.round(number).evaluation
        numbers = read_json(evaluation) if evaluation.exists() else {}
        values = [number, state == "promoted", quoted(state), quoted(why)]
        values += [look_up(numbers, path) for path in ROUND_NUMBERS.values()]
        values += audited_columns(workspace.round(number)).values()
        literals = ("NULL" if value is None else str(value) for value in values)
        rows.append(f"({', '.join(literals)})")
    return _values(types, rows)


def _runs(workspace: Workspace) -> str:
    types = {"round": "INTEGER", "step": "VARCHAR", "seconds": "DOUBLE", "images": "BIGINT"}
    rows = []
    for number in workspace.round_numbers():
        made = workspace.round(number)
        seconds, images = (read_json(path) if path.exists() else {} for path in (made.seconds, made.images))
        for step, spent in seconds.items():
            rows.append(f"({number}, {quoted(step)}, {float(spent)}, {images.get(step, 'NULL')})")
    return _values(types, rows)


def _values(types: Mapping[str, str], rows: list[str]) -> str:
    """A view of literal rows."""
    if not rows:
        return _empty(types)
    columns = ", ".join(f"{name}::{kind} AS {name}" for name, kind in types.items())
    return f"SELECT {columns} FROM (VALUES {', '.join(rows)}) AS numbers({', '.join(types)})"


def _training_metrics(workspace: Workspace, folder: str) -> str:
    if not any(_any(workspace.round(number).metrics, "*.jsonl") for number in workspace.round_numbers()):
        return _empty({"round": "INTEGER", **METRIC_TYPES})
    files = quoted(f"{folder}rounds/*/metrics/*.jsonl")
    # The last line of a file that is being written may be torn: it is a row of nulls, and passed over.
    read = f"read_ndjson({files}, columns = {METRIC_TYPES!r}, filename = true, ignore_errors = true)"
    return f"SELECT {_round_of('filename')} AS round, * EXCLUDE (filename) FROM {read} WHERE step IS NOT NULL"


def _parquet(parts: str) -> str:
    return f"read_parquet({parts}, filename = true)"


def _round_of(path: str) -> str:
    """The number in `rounds/<number>/<kind>/<part>`; a pattern would take as long as reading the part's scores."""
    return f"parse_path({path}, 'both_slash')[-3]::INTEGER"


def _any(folder: Path, pattern: str = "*.parquet") -> bool:
    return next(folder.glob(pattern), None) is not None


def _types(schema: pa.Schema) -> dict[str, str]:
    return {field.name: SQL_TYPES[field.type] for field in schema}


def _empty(types: Mapping[str, str]) -> str:
    columns = ", ".join(f'NULL::{kind} AS "{name}"' for name, kind in types.items())
    return f"SELECT {columns} WHERE false"
