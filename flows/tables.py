"""Query results for people and for programs."""

import base64
import json
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table

_SHOWN_ROWS = 100


def print_rows(rows: pa.Table, console: Console | None = None) -> None:
    """Prints the first rows as a table on stdout; bytes are shown as their number."""
    console = console or Console(highlight=False)
    table = Table()
    for field in rows.schema:
        numeric = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        table.add_column(field.name, justify="right" if numeric else "left", overflow="fold")
    shown = rows.slice(0, _SHOWN_ROWS)
    for row in zip(*(column.to_pylist() for column in shown.columns), strict=True):
        table.add_row(*(_cell(value) for value in row))
    console.print(table)
    if rows.num_rows > _SHOWN_ROWS:
        console.print(f"{_SHOWN_ROWS} of {rows.num_rows} rows; --json prints all")


def to_json(rows: pa.Table) -> str:
    """All rows as a JSON list of objects; bytes in base64, times in ISO format, a repeated name numbered."""
    names: list[str] = []
    for name in rows.column_names:
        names.append(f"{name}_{rows.column_names[: len(names)].count(name)}" if name in names else name)
    return json.dumps(rows.rename_columns(names).to_pylist(), indent=2, ensure_ascii=False, default=_plain)


def _cell(value: Any) -> str:
    if value is None:
        return "[dim]null[/dim]"
    if isinstance(value, bytes):
        return f"[dim]{len(value):,} bytes[/dim]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("[", r"\[")


def _plain(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
