"""The round's report: the HTML file, and artifacts for those who watch in Prefect's UI."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.config import BootstrapConfig
from blip_core.evaluation import report
from blip_core.evaluation.card import write_card
from blip_core.evaluation.charts import score_histogram
from blip_core.evaluation.model_card import write_round_cards
from blip_core.evaluation.pictures import sheet
from blip_core.evaluation.tables import GRIDS, RoundTables
from blip_core.stores import each
from tasks.artifacts import show_markdown, show_table
from tasks.workplace import add_seconds, round_of, workspace_of

_PICTURES = 8


@task(name="write-report", task_run_name="write-report", cache_policy=NO_CACHE)
def write_report(config: BootstrapConfig) -> Path:
    """Writes report.html and the cards of corpus and models, unless the report is newer than all that it shows."""
    current = round_of(config)
    shown = [current.evaluation, current.audit, *current.corpus.glob("*.parquet"), *current.metrics.glob("*.jsonl")]
    if current.report.exists():
        written = current.report.stat().st_mtime
        if all(each(shown, lambda path: not path.exists() or path.stat().st_mtime <= written)):
            return current.report
    began = time.monotonic()
    path = report.write_report(workspace_of(config), config.round, config.evaluation.examples)
    write_card(workspace_of(config), config.round)
    write_round_cards(workspace_of(config), config.round)
    add_seconds(config, "report", time.monotonic() - began)
    return path


@task(name="show-report", task_run_name="show-report", cache_policy=NO_CACHE)
def show_report(config: BootstrapConfig) -> None:
    """A page that says where the report lies, with its tables before and after."""
    numbers = report.build_report(workspace_of(config), config.round)
    page = "\n\n".join(filter(None, [_place(config), _counts(numbers), _measures(numbers)]))
    show_markdown("round-report", page, f"Report of round {config.round}")


@task(name="show-numbers", task_run_name="show-numbers", cache_policy=NO_CACHE)
def show_numbers(config: BootstrapConfig) -> None:
    """A table of all of the round's numbers."""
    numbers = report.build_report(workspace_of(config), config.round)
    rows = [{"number": name, "value": _shown(value)} for name, value in _flat(numbers)]
    show_table("round-numbers", rows, f"Numbers of round {config.round}")


@task(name="show-scores", task_run_name="show-scores", cache_policy=NO_CACHE)
def show_scores(config: BootstrapConfig) -> None:
    """A histogram of the scores that the Filter gave to web and synthetic texts."""
    with RoundTables.open(workspace_of(config), config.round) as tables:
        bins = {source: tables.score_bins(source) for source in ("web", "synthetic")}
    if any(map(sum, bins.values())):
        page = f"![histogram of itm_score]({score_histogram(bins, 'picture')})"
        show_markdown("round-scores", page, f"Scores of the texts of round {config.round}")


@task(name="show-pictures", task_run_name="show-pictures", cache_policy=NO_CACHE)
def show_pictures(config: BootstrapConfig) -> None:
    """The best kept, the worst kept and the best rejected pairs, with their pictures."""
    if page := pictures_page(config):
        show_markdown("round-pictures", page, f"Kept and rejected pairs of round {config.round}")


def pictures_page(config: BootstrapConfig) -> str:
    """The same as markdown, the pictures in it; empty where nothing has been scored."""
    with RoundTables.open(workspace_of(config), config.round) as tables:
        grids = {name: tables.grid(name, _PICTURES) for name in GRIDS}
    return "\n\n".join(_grid(name, rows) for name, rows in grids.items() if rows)


def _place(config: BootstrapConfig) -> str:
    """Where the file is: a link where a browser can open it, else its path."""
    path = round_of(config).report
    if config.workspace_url:
        address = f"{config.workspace_url.rstrip('/')}/rounds/{path.parent.name}/{path.name}"
        return f"[The report of round {config.round}]({address})"
    return f"The report of round {config.round} is `{path}`"


def _counts(numbers: Mapping[str, Any]) -> str:
    noise = {"wrong texts on the web": numbers["web_noise"], "wrong texts in the corpus": numbers["corpus_noise"]}
    rows = {
        "URLs": f"{numbers['download']['rows']:,}",
        "images": f"{numbers['images']:,}",
        "texts scored": f"{numbers['candidates']:,}",
        "texts kept": f"{numbers['accepted']:,}",
        "human pairs added": f"{numbers['human']:,}",
        **{title: f"{share:.1%}" for title, share in noise.items() if share is not None},
    }
    if numbers["filter_auc"] is not None:
        rows["AUC of the Filter"] = f"{numbers['filter_auc']:.3f}"
    return _table(["", f"round {numbers['round']}"], ([name, value] for name, value in rows.items()))


def _measures(numbers: Mapping[str, Any]) -> str:
    models = {name: title for name, title in report.MODELS.items() if name in numbers["retrieval"]}
    rows = (
        [row["title"], *(_measured(row["values"].get(name), row["unit"]) for name in models)]
        for row in report.measures(dict(numbers))
    )
    return _table(["held-out pairs", *models.values()], rows) if models else ""


def _measured(value: float | None, unit: str) -> str:
    return "unknown" if value is None else f"{value:.1f}{unit}"


def _table(head: list[str], rows: Iterator[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _grid(name: str, rows: list[dict[str, Any]]) -> str:
    title = name.replace("_", " ").capitalize()
    return f"## {title}\n\n![{title}]({sheet(rows)})"


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(name, value)]
    return [item for key, inner in value.items() for item in _flat(inner, f"{name}.{key}" if name else str(key))]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
