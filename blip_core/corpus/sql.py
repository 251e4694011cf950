"""What the predicate and the query share: reading SQL as a tree, and DuckDB's errors in one line."""

import json
from collections.abc import Iterator
from typing import Any

import duckdb


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
