"""Query results for people and for programs."""

import base64
import csv
import json
import sys
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from blip_core.errors import ConfigError

_SHOWN_ROWS = 100
_NUMERIC = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)  # a sum of integers is a decimal

Format = Literal["table", "json", "csv", "parquet"]


def print_rows(rows: pa.Table, console: Console | None = None) -> None:
    """Prints the first rows as a table on stdout; bytes are shown as their number."""
    console = console or Console(highlight=False)
    table = Table()
    for field in rows.schema:
        numeric = any(is_kind(field.type) for is_kind in _NUMERIC)
        table.add_column(field.name, justify="right" if numeric else "left", overflow="fold")
    shown = rows.slice(0, _SHOWN_ROWS)
    for row in zip(*(column.to_pylist() for column in shown.columns), strict=True):
        table.add_row(*(_cell(value) for value in row))
    console.print(table)
    if rows.num_rows > _SHOWN_ROWS:
        console.print(f"{_SHOWN_ROWS} of {rows.num_rows} rows; --json prints all")


def show_as(format: Format) -> Callable[[pa.Table], None]:
    """What prints a result on stdout. Raises ConfigError for Parquet on a terminal."""
    if format == "parquet" and sys.stdout.isatty():
        raise ConfigError("--format parquet: bytes are not for a terminal; send them to a file: > rows.parquet")
    return {"table": print_rows, "json": _print_json, "csv": _print_csv, "parquet": _print_parquet}[format]


def _print_json(rows: pa.Table) -> None:
    sys.stdout.write(f"{to_json(rows)}\n")


def _print_csv(rows: pa.Table) -> None:
    """With a line of names; bytes in base64, lists and structs as JSON."""
    written = csv.writer(sys.stdout, lineterminator="\n")
    written.writerow(rows.column_names)
    for batch in rows.to_batches():
        written.writerows(
            [_csv_cell(value) for value in row] for row in zip(*(column.to_pylist() for column in batch), strict=True)
        )


def _csv_cell(value: Any) -> Any:
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=_plain)
    return _plain(value) if isinstance(value, bytes) else value


def _print_parquet(rows: pa.Table) -> None:
    pq.write_table(rows, sys.stdout.buffer, compression="zstd")


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


def _plain(value: Any) -> str | int | float:
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
