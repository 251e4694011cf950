"""What all that asks DuckDB shares: how it reaches a store, SQL as a tree, and its errors in one line."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb

from blip_core import stores
from blip_core.corpus.confined import Confined

# The host in a column `url`: in lower case, without user name and port; an address in its brackets.
HOST = r"lower(regexp_extract(url, '^[^:]+://(?:[^/?#]*@)?(\[[^\]]*\]|[^/?#:]*)', 1))"


def let_reach(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    """Lets a connection read what lies below `root` in a store as it is now, by the store's own client: DuckDB's own
    would be an extension, which has to be downloaded."""
    if stores.is_remote(root):
        connection.register_filesystem(Confined(stores.snapshot(root), stores.key(root)))


def confine(connection: duckdb.DuckDBPyConnection, folder: Path, spill: str) -> None:
    """Locks a connection: it reads below `folder` and nothing else, and spills into `spill`. Statements may still write
    below `folder`: see to it that none that does gets through."""
    connection.execute("SET autoinstall_known_extensions = false")
    connection.execute("SET autoload_known_extensions = false")
    connection.execute("SET temp_directory = ?", [spill])
    root = str(folder)
    # DuckDB compares a glob as it is written, so the folder's escaped name is allowed beside its own.
    connection.execute("SET allowed_directories = ?", [[root, glob.escape(root)]])
    connection.execute("SET python_enable_replacements = false")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def unstable_functions(connection: duckdb.DuckDBPyConnection, expression: str) -> list[str]:
    """The functions of an expression that differ from run to run."""
    tree = syntax_tree(connection, f"SELECT {expression}")
    used = {node["function_name"] for node in nodes(tree) if "function_name" in node}
    stable = "SELECT function_name FROM duckdb_functions() WHERE stability IN ('VOLATILE', 'CONSISTENT_WITHIN_QUERY')"
    return sorted(used & {name for (name,) in connection.execute(stable).fetchall()})


def quoted(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def one_line(error: duckdb.Error) -> str:
    """DuckDB's message without its excerpt of the statement and the caret under it."""
    message = str(error).split("\n\nLINE ")[0].split("\nLINE ")[0]
    return " ".join(message.split())


def syntax_tree(connection: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any] | None:
    """DuckDB's own parse of a SELECT, as JSON; None where `sql` is not one SELECT."""
    [(text,)] = connection.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
    tree = json.loads(text)
    return None if tree["error"] or len(tree["statements"]) != 1 else tree


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of a syntax tree, outermost first."""
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from nodes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from nodes(value)
