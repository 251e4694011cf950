"""The round's report: the HTML file, and Prefect artifacts for those who watch in the UI."""

import time
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from blip_core.config import BootstrapConfig
from blip_core.evaluation import report
from blip_core.evaluation.pictures import thumbnail
from blip_core.evaluation.tables import GRIDS, RoundTables
from tasks.workplace import add_seconds, round_of, workspace_of

_PICTURES = 8
_PICTURE_SIDE = 96


@task(name="write-report", task_run_name="write-report", cache_policy=NO_CACHE)
def write_report(config: BootstrapConfig) -> Path:
    """Writes report.html, unless it is newer than everything that it shows."""
    current = round_of(config)
    shown = [current.evaluation, *current.corpus.glob("*.parquet"), *current.metrics.glob("*.jsonl")]
    if current.report.exists() and all(
        path.stat().st_mtime <= current.report.stat().st_mtime for path in shown if path.exists()
    ):
        return current.report
    began = time.monotonic()
    path = report.write_report(workspace_of(config), config.round, config.evaluation.examples)
    add_seconds(config, "report", time.monotonic() - began)
    return path


@task(name="show-numbers", task_run_name="show-numbers", cache_policy=NO_CACHE)
def show_numbers(config: BootstrapConfig) -> None:
    """A table artifact of the round's numbers."""
    numbers = report.build_report(workspace_of(config), config.round)
    create_table_artifact(
        key="round-numbers",
        table=[{"number": name, "value": _shown(value)} for name, value in _flat(numbers)],
        description=f"Round {config.round} of {config.workspace}",
    )


@task(name="show-pictures", task_run_name="show-pictures", cache_policy=NO_CACHE)
def show_pictures(config: BootstrapConfig) -> None:
    """A markdown artifact with the best kept, the worst kept and the best rejected pairs."""
    with RoundTables.open(workspace_of(config), config.round) as tables:
        grids = {name: tables.grid(name, _PICTURES) for name in GRIDS}
    create_markdown_artifact(
        key="round-pictures",
        markdown="\n\n".join(_grid(name, rows) for name, rows in grids.items()),
        description=f"Kept and rejected pairs of round {config.round}",
    )


def _grid(name: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"## {name.replace('_', ' ').capitalize()}",
        "| picture | text | source | itm_score |",
        "|---|---|---|---|",
    ]
    for row in rows:
        text = " ".join(row["text"].split()).replace("|", r"\|")
        picture = f"![{row['uid']}]({thumbnail(row['image'], _PICTURE_SIDE)})"
        lines.append(f"| {picture} | {text} | {row['source']} | {row['itm_score']:.3f} |")
    return "\n".join(lines)


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(name, value)]
    return [item for key, inner in value.items() for item in _flat(inner, f"{name}.{key}" if name else str(key))]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
