"""`capfilt clean --dry-run`: what would be done, checked, and how long it takes, measured. Nothing is written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from blip_core.capfilt.parts import batch_size_on
from blip_core.capfilt.probe import SECONDS, Probe, probe
from blip_core.config import BootstrapConfig
from blip_core.corpus.rules import further_rules
from blip_core.data.cutting import DownloadPlan
from blip_core.data.decoding import default_workers
from blip_core.data.download import preview_plan
from blip_core.data.web_rows import open_web_table
from blip_core.workspace import Workspace
from flows.checks import check_inputs
from tasks.annotate import AnnotationPlan, preview_annotation
from tasks.models import device, load_models
from tasks.workplace import captioner_source, filter_source

_TEXTS = 256  # of the table, which the probe's pictures get
_PROBE_ROWS = 2000  # no shard of it is larger


def plan_clean(config: BootstrapConfig, price_per_hour: float | None) -> dict[str, Any]:
    """The plan of `clean`, JSON-like: table, download, annotate, models, settings, writes, estimate.

    Args:
        price_per_hour: of this machine, in whatever currency; the costs are in the same, null without it.

    Raises what `check_inputs` does, and what the probe's annotation raises.
    """
    check_inputs("clean", config, make_workspace=False)
    workspace = Workspace.preview(config.workspace)
    download = preview_plan(config.web, config.download, workspace)
    every = config.web.limit is None
    names = [path.stem for path in workspace.shard_paths()] if every else download.done
    annotation = preview_annotation(config, workspace, names)
    with open_web_table(replace(config.web, limit=None)) as table:
        rows, texts = table.rows, next(table.batches())["caption"].slice(0, _TEXTS).to_pylist()
    captioner, filter = load_models(config)
    sources = {"captioner": captioner_source(config), "filter": filter_source(config)}
    digests = {"captioner": captioner.digest, "filter": filter.digest}
    measured = probe(
        captioner,
        filter,
        config.annotate,
        config.generation,
        config.seed,
        config.download.image_size,
        min(config.download.rows_per_shard, _PROBE_ROWS),
        texts,
        SECONDS,
    )
    return {
        "table": {"path": config.web.path, "rows": rows, "limit": config.web.limit, "taken": download.rows},
        "download": _download(download),
        "annotate": _annotate(annotation, download),
        "models": {name: {"source": str(sources[name]), "digest": digests[name]} for name in sources},
        "settings": _settings(config),
        "writes": _writes(config, workspace),
        "estimate": _estimate(measured, annotation.images + download.missing, rows, price_per_hour),
    }


def _download(plan: DownloadPlan) -> dict[str, int]:
    return {
        "rows_to_fetch": plan.missing,
        "rows_standing": plan.rows - plan.missing,
        "shards_to_fetch": len(plan.names),
        "shards_standing": len(plan.done),
    }


def _annotate(plan: AnnotationPlan, download: DownloadPlan) -> dict[str, int]:
    """Of what is still to be fetched, every row may turn out to be an image."""
    return {
        "images_to_annotate_at_most": plan.images + download.missing,
        "images_standing": plan.standing_images,
        "shards_to_annotate": len(plan.missing) + len(download.names),
        "shards_standing": len(plan.standing),
    }


def _settings(config: BootstrapConfig) -> dict[str, Any]:
    annotate = config.annotate
    return {
        "device": device(),
        "precision": annotate.precision,
        "compile": annotate.compile and device() != "cpu",
        "candidates": annotate.candidates,
        "images_a_batch": batch_size_on(device(), annotate),
        "decoding_processes": default_workers() if annotate.workers is None else annotate.workers,
        "generation": config.generation.method,
        "seed": config.seed,
        "where": config.publish.where,
        "rules": further_rules(config.publish),
        "human_pairs": config.human.path if config.human else None,
    }


def _writes(config: BootstrapConfig, workspace: Workspace) -> dict[str, str]:
    made = workspace.round(config.round)
    places: dict[str, Path] = {
        "shards": workspace.shards,
        "annotations": made.annotations,
        "embeddings": made.embeddings,
        "corpus": made.corpus,
        "report": made.report,
        "catalog": workspace.catalog,
    }
    return {name: str(path) for name, path in places.items()}


def _estimate(measured: Probe, images: int, rows: int, price_per_hour: float | None) -> dict[str, Any]:
    """Of annotation alone; as if every row of the table were an image, which is the most that it can take."""
    speed = measured.images_per_second
    hours = rows / speed / 3600
    return {
        "probe_images": measured.images,
        "probe_seconds": round(measured.seconds, 3),
        "images_per_second": speed,
        "waiting_for_pictures": measured.waited / measured.seconds,
        "hours_of_this_run": images / speed / 3600,
        "hours_of_the_whole_table": hours,
        "price_per_hour": price_per_hour,
        "cost_per_1000_images": None if price_per_hour is None else 1000 / speed / 3600 * price_per_hour,
        "cost_of_the_whole_table": None if price_per_hour is None else hours * price_per_hour,
    }


def print_plan(plan: dict[str, Any]) -> None:
    """Prints the plan on stdout, a table for each part."""
    console = Console(highlight=False)
    table = Table(title="Plan of clean; nothing has been written", title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    for part, values in plan.items():
        for name, value in values.items():
            table.add_row(f"{part}: {name.replace('_', ' ')}", _shown(name, value))
        table.add_section()
    console.print(table)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {inner}" for key, inner in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, tuple):
        return ", ".join(value)
    if name == "waiting_for_pictures":
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and name != "seed" else str(value)
