"""`capfilt query`: one SELECT over the workspace's views, which can change nothing and read nothing outside it.

Two locks, because either alone has a gap: DuckDB's own settings confine every path to the workspace but let a
statement write there, and a SELECT may hide a COPY ... TO in its WITH clause; so the statement's syntax tree
is checked against what only reads.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import duckdb
import pyarrow as pa

from blip_core.corpus.catalog import VIEW_MEANINGS, create_views
from blip_core.corpus.embed_text import register_embed_text
from blip_core.corpus.macros import ROW_MACROS
from blip_core.corpus.rounds import promoted_round
from blip_core.corpus.sql import confine, let_reach, nodes, one_line, syntax_tree
from blip_core.errors import QueryError
from blip_core.workspace import Workspace

EXPLAIN = re.compile(r"\s*explain(\s+analyze\b|\s*\([^()]*\))?", re.IGNORECASE)

READING_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}

READING_FUNCTIONS = re.compile(
    r"read_(parquet|json|json_auto|json_objects|json_objects_auto|ndjson|ndjson_auto|ndjson_objects|csv|csv_auto|text|blob)"
    r"|parquet_\w+|sniff_csv|glob|range|generate_series|unnest|repeat|json_each|json_tree|duckdb_\w+|pragma_\w+|summary"
)

ALLOWED = "a query is one SELECT (or FROM, WITH, DESCRIBE, SHOW, SUMMARIZE, EXPLAIN) that only reads"


def run_query(workspace: Workspace, sql: str, filter: str | None = None) -> pa.Table:
    """The result of one reading statement over the views of the catalog.

    Args:
        filter: the checkpoint of the promoted round's Filter, for `embed_text` where the workspace does not have it.

    The views are made anew for each query, in memory: they are never older than the files, and no other
    process that holds catalog.duckdb is in the way. Raises QueryError, in one line, for a statement that fails,
    that is not a single reading one, or that names a file outside the workspace.
    """
    try:
        with reading(workspace, filter) as connection:
            check_statement(connection, sql)
            return connection.sql(sql).to_arrow_table()
    except duckdb.PermissionException as error:
        views = ", ".join(VIEW_MEANINGS)
        reach = f"a query reads the views {views}, and files under {workspace.root} by their full path"
        raise QueryError(f"query: {one_line(error)}; {reach}") from error
    except duckdb.Error as error:
        raise QueryError(f"query: {_told(error)}") from error


def _told(error: duckdb.Error) -> str:
    """DuckDB's message in one line; of a function of ours that failed, its own words."""
    message = one_line(error)
    _, of_ours, own = message.partition("while executing the UDF: ")
    return own.partition(": ")[2] if of_ours else message


@contextmanager
def reading(workspace: Workspace, filter: str | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with the views and macros of the workspace, which can name no file outside of it, and changes no
    setting. `filter` is as run_query takes it."""
    with tempfile.TemporaryDirectory(prefix="capfilt-query-") as spill, duckdb.connect() as connection:
        let_reach(connection, workspace.root)
        # Footers of parts stay in memory: a look at each path is dear. DuckDB reads those of a changed file anew.
        connection.execute("SET parquet_metadata_cache = true")
        register_embed_text(connection, workspace, promoted_round(workspace), filter)
        create_views(connection, workspace, folder=f"{workspace.root}/", embeds=True)
        confine(connection, workspace.root, spill)
        yield connection


def check_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Raises QueryError where `sql` is not exactly one statement that only reads."""
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise QueryError(f"query: {len(statements)} statements; {ALLOWED}")
    kind = _kind(statements[0])
    if kind == "EXPLAIN":
        sql = EXPLAIN.sub("", sql, count=1)  # EXPLAIN ANALYZE runs what it explains
    elif kind != "SELECT":
        raise QueryError(f"query: a statement of the kind {kind}; {ALLOWED}")
    tree = syntax_tree(connection, sql)
    if tree is None:
        raise QueryError(f"query: not a plain SELECT; {ALLOWED}")
    for node in nodes(tree):
        _check_node(node)


def _kind(statement: duckdb.Statement) -> str:
    """The name of a statement's kind; DuckDB has kinds that its Python package has no name for."""
    try:
        return str(statement.type.name)
    except ValueError:
        return "UNKNOWN"


def _check_node(node: dict[str, Any]) -> None:
    kind = str(node.get("type", ""))
    if kind.endswith("_NODE") and kind not in READING_NODES:
        raise QueryError(f"query: holds a {kind.removesuffix('_QUERY_NODE').removesuffix('_NODE')}; {ALLOWED}")
    if kind == "TABLE_FUNCTION":
        name = str(node["function"].get("function_name", ""))
        if name.lower() not in ROW_MACROS and not READING_FUNCTIONS.fullmatch(name.lower()):
            raise QueryError(f"query: the table function {name} is not among those that only read; {ALLOWED}")
