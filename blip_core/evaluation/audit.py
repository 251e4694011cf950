"""How noisy the web and the corpus are, and how well the Filter tells right from wrong, where the truth is known.

The truth is read here alone; no step of the cycle sees it. A web text is judged by its kind in the truth table,
a synthetic one by reading it back against the scene that its image shows.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from blip_core import stores
from blip_core.corpus.schemas import EMPTY_TEXT, TEXT_TOO_LONG
from blip_core.errors import InputError
from blip_core.scenes.grammar import is_right
from blip_core.workspace import Workspace

NORMAL_975 = 1.959963984540054  # a 95% interval
MATCH = 0.5  # the Filter's argmax says 'match' above it
RIGHT = "right"


class AUC(NamedTuple):
    """Area under the ROC curve with its 95% interval."""

    value: float
    low: float
    high: float


class Verdict(NamedTuple):
    """One text: whether it is right (None: the truth does not know its image) and its itm_score (None: unscored)."""

    source: str
    right: bool | None
    itm_score: float | None


def auc(scores: Sequence[float], labels: Sequence[bool]) -> AUC | None:
    """How often a right text scores above a wrong one, ties counted half; None where either kind is missing.

    The interval is DeLong's (Biometrics 44, 1988), by midranks (Sun and Xu, 2014), clipped to 0..1.
    """
    values, right = np.asarray(scores, float), np.asarray(labels, bool)
    positives, negatives = values[right], values[~right]
    m, n = len(positives), len(negatives)
    if not m or not n:
        return None
    ranks = _midranks(np.concatenate([positives, negatives]))
    value = (ranks[:m].sum() - m * (m + 1) / 2) / (m * n)
    over_negatives = (ranks[:m] - _midranks(positives)) / n  # for each right text, the share of wrong ones below
    over_positives = 1 - (ranks[m:] - _midranks(negatives)) / m
    variance = sum(shares.var(ddof=1) / len(shares) for shares in (over_negatives, over_positives) if len(shares) > 1)
    width = NORMAL_975 * float(np.sqrt(variance))
    return AUC(float(value), max(0.0, float(value) - width), min(1.0, float(value) + width))


def _midranks(values: np.ndarray) -> np.ndarray:
    """1-based ranks; equal values share the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]


def audit(workspace: Workspace, round: int, truth: Path) -> dict[str, Any]:
    """The noise of a round before and after, and the Filter's quality on web texts, JSON-like.

    Noise is the share of wrong texts, 0..1: `web_noise` over the web texts of images that arrived,
    `synthetic_noise` over the Captioner's, `corpus_noise` over the web and synthetic texts that were kept. A
    number is null where there is nothing to count. Texts of images that the truth does not know are left out,
    and counted as `unknown`. Raises InputError where `truth` is not a table of uid, kind and scene.
    """
    known = _read_truth(truth)
    paths = workspace.round(round)
    annotated = list(_verdicts(paths.annotations, known, ["reason"]))
    kept = [row for row in _verdicts(paths.corpus, known, []) if row.source != "human"]
    web = [row for row in annotated if row.source == "web" and row.right is not None]
    scored = [(row.itm_score, bool(row.right)) for row in web if row.itm_score is not None]
    area = auc([score for score, _ in scored], [right for _, right in scored])
    matched = [right for score, right in scored if score > MATCH]
    return {
        "web_noise": _noise(web),
        "synthetic_noise": _noise([row for row in annotated if row.source == "synthetic"]),
        "corpus_noise": _noise(kept),
        "corpus_web_noise": _noise([row for row in kept if row.source == "web"]),
        "corpus_synthetic_noise": _noise([row for row in kept if row.source == "synthetic"]),
        "filter_auc": area.value if area else None,
        "filter_auc_interval": [area.low, area.high] if area else None,
        "filter_precision": _share(matched),
        "filter_recall": sum(matched) / right_texts if (right_texts := sum(right for _, right in scored)) else None,
        "web_texts": len(web),
        "unknown": sum(row.right is None for row in annotated),
    }


def _read_truth(path: Path) -> dict[str, tuple[str, dict[str, Any] | None]]:
    """Kind and scene by uid."""
    try:
        table = pq.read_table(stores.readable(path), columns=["uid", "kind", "scene"])
    except stores.errors(pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"truth {path}: not a Parquet table with uid, kind and scene ({reason})") from error
    rows = zip(*(table[name].to_pylist() for name in ("uid", "kind", "scene")), strict=True)
    return {uid: (kind, json.loads(scene) if scene else None) for uid, kind, scene in rows}


def _verdicts(folder: Path, known: dict[str, tuple[str, dict[str, Any] | None]], extra: list[str]) -> Iterator[Verdict]:
    """The verdict on every row of a folder's parts whose image could be read."""
    columns = ["uid", "text", "source", "itm_score", *extra]
    parts = sorted(folder.glob("*.parquet"))
    for rows in stores.each(parts, lambda part: pq.read_table(stores.readable(part), columns=columns)):
        for row in rows.to_pylist():
            if row.get("reason") in (None, EMPTY_TEXT, TEXT_TOO_LONG):
                right = _is_right(row["source"], row["text"], *known.get(row["uid"], (None, None)))
                yield Verdict(row["source"], right, row["itm_score"])


def _is_right(source: str, text: str, kind: str | None, scene: dict[str, Any] | None) -> bool | None:
    if source == "web":
        return None if kind is None else kind == RIGHT
    return None if scene is None else is_right(text, scene)


def _noise(rows: Sequence[Verdict]) -> float | None:
    right = _share([row.right for row in rows if row.right is not None])
    return None if right is None else 1 - right


def _share(right: Sequence[bool]) -> float | None:
    return sum(right) / len(right) if right else None
