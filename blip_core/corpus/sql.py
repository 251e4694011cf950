"""What all that asks DuckDB shares: how it reaches a store, SQL as a tree, and its errors in one line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb

from blip_core import stores
from blip_core.corpus.confined import Confined


def let_reach(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    """Lets a connection read what lies below `root` in a store as it is now, by the store's own client: DuckDB's own
    would be an extension, which has to be downloaded."""
    if stores.is_remote(root):
        connection.register_filesystem(Confined(stores.snapshot(root), stores.key(root)))


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
