"""The round's report: one object of numbers, and one HTML file with pictures that needs nothing beside itself."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from blip_core.corpus.audited import audited_noise
from blip_core.corpus.rules import further_rules
from blip_core.errors import WorkspaceError
from blip_core.evaluation.charts import score_histogram, training_curves
from blip_core.evaluation.pictures import thumbnail
from blip_core.evaluation.tables import GRIDS, RoundTables, read_metrics
from blip_core.files import atomic_file, read_json
from blip_core.workspace import Round, Workspace

MODELS = {
    "med": "pre-trained",
    "retrained-raw": "trained on raw web pairs",
    "retrained": "trained on the corpus",
}
METRIC_ORDER = ("med", "captioner", "filter", "retrained-raw", "retrained")
STEPS = (
    "download",
    "pretrain",
    "finetune_captioner",
    "finetune_filter",
    "annotate",
    "publish",
    "retrain",
    "retrain_raw",
    "evaluation",
    "report",
)
EXAMPLES = 12

# Rows of the before/after table: title, group in the evaluation, path, factor, unit.
MEASURES = (
    *(("text to image, R@" + k, "retrieval", ("text_to_image", "r" + k), 100, "%") for k in ("1", "5", "10")),
    *(("image to text, R@" + k, "retrieval", ("image_to_text", "r" + k), 100, "%") for k in ("1", "5", "10")),
    ("captions, BLEU-4", "captioning", ("bleu4",), 100, ""),
    ("captions, CIDEr", "captioning", ("cider",), 100, ""),
)


def build_report(workspace: Workspace, round: int) -> dict[str, Any]:
    """The numbers of a round, JSON-like; what is not known (yet) is null or empty.

    Keys: round, where, rules {key: value}, models {captioner, filter: digests}, images, candidates, accepted (web and
    synthetic texts), human, by_source, scores {source: means}, unscored, rejected {reason: candidates}, download {rows,
    ok, failed, reasons}, web_noise, corpus_noise, synthetic_noise, audited_noise {value, low, high, level, marked},
    filter_auc, filter_auc_interval, filter_precision, filter_recall, retrieval {model: ...}, captioning {model: ...},
    images_per_second (annotated), seconds {step: ...}.

    Raises WorkspaceError where there is no such round.
    """
    with _tables(workspace, round) as tables:
        return _numbers(tables)


def write_report(workspace: Workspace, round: int, examples: int = EXAMPLES) -> Path:
    """Writes `report.html` of a round and returns its path.

    Args:
        examples: pictures in each grid.

    Raises WorkspaceError where there is no such round.
    """
    paths = workspace.round(round)
    environment = Environment(
        loader=PackageLoader("blip_core.evaluation", ""),
        autoescape=True,  # texts from the web are never markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with _tables(workspace, round) as tables:
        numbers = _numbers(tables)
        bins = {source: tables.score_bins(source) for source in ("web", "synthetic")}
        grids = {name: [_card(row) for row in tables.grid(name, examples)] for name in GRIDS}
    metrics = {name: rows for name, rows in _in_order(read_metrics(paths.metrics), METRIC_ORDER).items() if rows}
    page = environment.get_template("report.html.jinja").render(
        report=numbers,
        histogram=score_histogram(bins) if any(map(sum, bins.values())) else None,
        curves=training_curves(metrics) if metrics else None,
        grids=grids,
        models={name: title for name, title in MODELS.items() if name in numbers["retrieval"]},
        measures=measures(numbers),
        captioned=_captioned(_evaluation(paths.evaluation).get("examples") or {}),
    )
    with atomic_file(paths.report) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return paths.report


def _tables(workspace: Workspace, round: int) -> AbstractContextManager[RoundTables]:
    if round not in workspace.round_numbers():
        there = ", ".join(map(str, workspace.round_numbers())) or "none"
        raise WorkspaceError(f"{workspace.round(round).root}: there is no round {round}; the rounds are: {there}")
    return RoundTables.open(workspace, round)


def _numbers(tables: RoundTables) -> dict[str, Any]:
    paths = tables.workspace.round(tables.number)
    evaluation = _evaluation(paths.evaluation)
    audit = evaluation.get("audit") or {}
    by_hand = audited_noise(paths)
    download, sources, rules = tables.download(), tables.by_source(), tables.rules()
    seconds = read_json(paths.seconds) if paths.seconds.exists() else {}
    return {
        "round": tables.number,
        "where": rules.where if rules else None,
        "rules": further_rules(rules) if rules else {},
        "models": tables.models(),
        "images": download["ok"],
        "candidates": sources["web"]["candidates"] + sources["synthetic"]["candidates"],
        "accepted": sources["web"]["accepted"] + sources["synthetic"]["accepted"],
        "human": sources["human"]["accepted"],
        "by_source": sources,
        "scores": tables.scores(),
        "unscored": tables.unscored(),
        "rejected": tables.rejected(),
        "download": download,
        "web_noise": audit.get("web_noise"),
        "synthetic_noise": audit.get("synthetic_noise"),
        "corpus_noise": audit.get("corpus_noise"),
        "audited_noise": by_hand._asdict() if by_hand else None,
        "filter_auc": audit.get("filter_auc"),
        "filter_auc_interval": audit.get("filter_auc_interval"),
        "filter_precision": audit.get("filter_precision"),
        "filter_recall": audit.get("filter_recall"),
        "retrieval": evaluation.get("retrieval") or {},
        "captioning": evaluation.get("captioning") or {},
        "images_per_second": _speed(paths, seconds.get("annotate", 0)),
        "seconds": _in_order(seconds, STEPS),
    }


def _speed(paths: Round, seconds: float) -> float | None:
    images = read_json(paths.images).get("annotate", 0) if paths.images.exists() else 0
    return images / seconds if images and seconds else None


def _evaluation(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _card(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "image": thumbnail(row["image"])}


def _in_order(values: dict[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """The known names in the order of the cycle, then all others by name."""
    known = [name for name in order if name in values]
    return {name: values[name] for name in [*known, *sorted(values.keys() - set(known))]}


def measures(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """The before/after table of `build_report`'s numbers: a row a measure, a value a model, and the corpus's gain.

    Keys: title, values {model: in percent or times 100}, gain (over the raw web pairs; None where not known), unit.
    """
    rows = []
    for title, group, path, factor, unit in MEASURES:
        values = {model: _lookup(scores, path, factor) for model, scores in numbers[group].items()}
        raw, corpus = values.get("retrained-raw"), values.get("retrained")
        gain = None if raw is None or corpus is None else corpus - raw
        rows.append({"title": title, "values": values, "gain": gain, "unit": unit})
    return rows


def _lookup(scores: dict[str, Any], path: tuple[str, ...], factor: float) -> float | None:
    value: Any = scores
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return None if value is None else value * factor


def _captioned(examples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Held-out pictures with a human caption and each model's, joined by uid."""
    joined: dict[str, dict[str, Any]] = {}
    for model in (name for name in MODELS if name in examples):
        for example in examples[model]:
            card = joined.setdefault(example["uid"], {**example, "captions": {}})
            card["captions"][MODELS[model]] = example["text"]
    return list(joined.values())
