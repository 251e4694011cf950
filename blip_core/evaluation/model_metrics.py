"""What is known of how good a round's model is: held-out scores, the known truth, and a person's audit."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from blip_core.corpus.schemas import ANNOTATION_VERSION, CAPTIONER_KEY, FILTER_KEY
from blip_core.data.shards import check_part
from blip_core.files import read_json
from blip_core.workspace import Round

HELD_OUT = "held-out human pairs"
TRUTH = "web texts, by the known truth"
BY_HAND = "texts marked by hand"
KEYS = {"captioner": CAPTIONER_KEY, "filter": FILTER_KEY}


class Metric(NamedTuple):
    """One number: the hub's name of its task and of itself, what it was measured on, and its 95% interval if known."""

    task: str
    metric: str
    name: str
    measured_on: str
    value: float
    interval: tuple[float, float] | None = None


def metrics_of(made: Round, model: str, digest: str) -> list[Metric]:
    """The metrics of a model of a round; none where nothing was measured.

    Args:
        model: the name of its folder: med, captioner, filter, retrained or retrained-raw.
        digest: of a Captioner or Filter: what is known of a round's texts tells of them only if they are its work.
    """
    evaluation = read_json(made.evaluation) if made.evaluation.exists() else {}
    if model not in KEYS:
        return [*_retrieval(evaluation, model), *_captioning(evaluation, model)]
    if not _worked(made, model, digest):
        return []
    audit = read_json(made.audit) if made.audit.exists() else {}
    found = _filter if model == "filter" else _captioner
    return list(found(evaluation.get("audit") or {}, audit.get("estimates") or {}))


def _worked(made: Round, model: str, digest: str) -> bool:
    """Whether the round's annotations are this model's."""
    part = next(iter(sorted(made.annotations.glob("*.parquet"))), None)
    return part is not None and check_part(part, ANNOTATION_VERSION).get(KEYS[model]) == digest


def _retrieval(evaluation: dict[str, Any], model: str) -> Iterator[Metric]:
    scores = (evaluation.get("retrieval") or {}).get(model) or {}
    for direction in ("text_to_image", "image_to_text"):
        for k in ("1", "5", "10"):
            value = (scores.get(direction) or {}).get(f"r{k}")
            if value is not None:
                task = f"{direction.replace('_', '-')}-retrieval"
                name = f"{direction.replace('_', ' ')}, R@{k}"
                yield Metric(task, f"recall_at_{k}", name, HELD_OUT, value)


def _captioning(evaluation: dict[str, Any], model: str) -> Iterator[Metric]:
    scores = (evaluation.get("captioning") or {}).get(model) or {}
    for key, metric, title in (("bleu4", "bleu", "BLEU-4"), ("cider", "cider", "CIDEr")):
        if scores.get(key) is not None:
            yield Metric("image-to-text", metric, title, HELD_OUT, scores[key])


def _filter(truth: dict[str, Any], by_hand: dict[str, Any]) -> Iterator[Metric]:
    task = "image-text-matching"
    names = {"filter_auc": ("roc_auc", "AUC"), "filter_precision": ("precision", "precision")}
    for key, (metric, title) in {**names, "filter_recall": ("recall", "recall")}.items():
        if truth.get(key) is not None:
            interval = truth.get(f"{key}_interval")
            yield Metric(task, metric, title, TRUTH, truth[key], tuple(interval) if interval else None)
        if estimate := (by_hand.get("all") or {}).get(key):
            yield Metric(task, metric, title, BY_HAND, estimate["value"], (estimate["low"], estimate["high"]))


def _captioner(truth: dict[str, Any], by_hand: dict[str, Any]) -> Iterator[Metric]:
    task, metric, title = "image-to-text", "wrong_texts", "wrong among its texts, before the Filter"
    if truth.get("synthetic_noise") is not None:
        yield Metric(task, metric, title, TRUTH, truth["synthetic_noise"])
    if estimate := (by_hand.get("synthetic") or {}).get("candidate_noise"):
        yield Metric(task, metric, title, BY_HAND, estimate["value"], (estimate["low"], estimate["high"]))
