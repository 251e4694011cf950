"""An image's captions and scores once more, from what is recorded of them: the proof that the corpus is what it says.

Texts have to be equal. Scores are rounded differently in a batch of other images, so they may differ by TOLERANCE, the
more so the fewer bits a model computes in. The Filter judges the texts that are recorded, so that a wrong text does not
hide whether its scores are right.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from blip_core.capfilt.candidates import device_of, unjudged_reason
from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.capfilt.recorded import Recorded, Row
from blip_core.corpus.schemas import TEXT_TOO_LONG
from blip_core.data.decoding import decode
from blip_core.data.transforms import normalise
from blip_core.errors import ShardError
from blip_core.med.inference import Precision
from blip_core.texts import candidate_text

SCORES = ("itm_score", "itc_score", "logprob")
# The most by which a score may differ, in its own unit (docs/workspace.md says what was measured).
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "int8": 0.02, "bf16": 0.02}


def replay(recorded: Recorded, captioner: Captioner, filter: Filter) -> dict[str, Any]:
    """Computes an image's candidates again and compares, JSON-like.

    Keys: round, shard, precision, generation, generation_recorded, tolerance, image_agrees (its bytes are those that
    were annotated), candidates, agrees (all of it). Of each candidate: source, candidate, text (computed again; of a
    web text that of the shard), text_agrees, reason, reason_agrees, differences {SCORES: computed less recorded, None
    where neither has one}, scores_agree, agrees.

    Args:
        captioner, filter: of the recorded digests, in the recorded precision.

    Raises ShardError for a synthetic text that is recorded without a seed.
    """
    tolerance = TOLERANCE[recorded.precision]
    computed = _compute(recorded, captioner, filter)
    candidates = [_compare(row, again, tolerance) for row, again in zip(recorded.rows, computed, strict=True)]
    digest = hashlib.sha256(recorded.image).hexdigest()
    same_image = all(row["image_sha256"] == digest for row in recorded.rows)
    return {
        "round": recorded.round,
        "shard": recorded.shard,
        "precision": recorded.precision,
        "generation": asdict(recorded.generation),
        "generation_recorded": recorded.told,
        "tolerance": tolerance,
        "image_agrees": same_image,
        "candidates": candidates,
        "agrees": same_image and all(candidate["agrees"] for candidate in candidates),
    }


def _compute(recorded: Recorded, captioner: Captioner, filter: Filter) -> list[Row]:
    """text, reason and SCORES of each row of the image."""
    decoded = decode([recorded.image], [captioner.med.image_size, filter.med.image_size])
    (unreadable,) = decoded.reasons
    if unreadable:
        texts = [candidate_text(recorded.caption).text, *("" for _ in recorded.rows[1:])]
        return [{"text": text, "reason": unreadable, **dict.fromkeys(SCORES)} for text in texts]
    seeds = [_seed(recorded, row) for row in recorded.rows if row["candidate"]]
    images = _view(decoded.pixels, captioner)
    written = captioner.caption(images, recorded.generation, [seeds])[0] if seeds else []
    judged = ["" if row["reason"] == TEXT_TOO_LONG else row["text"] for row in recorded.rows]
    (scores,) = filter.judge(_view(decoded.pixels, filter), [judged])
    said = iter([*written])
    rows = []
    for row, score in zip(recorded.rows, scores, strict=True):
        text, logprob = next(said) if row["candidate"] else (candidate_text(recorded.caption).text, None)
        found = {"itm_score": score.itm, "itc_score": score.itc} if score else {"itm_score": None, "itc_score": None}
        reason = None if score else unjudged_reason(recorded.caption, row["candidate"])
        rows.append({"text": text, "logprob": logprob, "reason": reason, **found})
    return rows


def _seed(recorded: Recorded, row: Row) -> int:
    if row["seed"] is None:
        raise ShardError(
            f"round {recorded.round}, shard {recorded.shard}: the synthetic text {row['candidate']} of {row['uid']!r} "
            "has no seed; it cannot be sampled again"
        )
    return int(row["seed"])


def _view(pixels: Mapping[int, Tensor], model: Captioner | Filter) -> Tensor:
    return normalise(pixels[model.med.image_size].to(device_of(model)))


def _compare(row: Row, again: Row, tolerance: float) -> dict[str, Any]:
    one_alone = any((row[name] is None) != (again[name] is None) for name in SCORES)
    both = [name for name in SCORES if row[name] is not None and again[name] is not None]
    known: dict[str, float] = {name: again[name] - row[name] for name in both}
    found = {
        "text_agrees": again["text"] == row["text"],
        "reason_agrees": again["reason"] == row["reason"],
        "scores_agree": not one_alone and all(abs(value) <= tolerance for value in known.values()),
    }
    return {
        **{name: row[name] for name in ("source", "candidate")},
        **{name: again[name] for name in ("text", "reason")},
        "differences": {name: known.get(name) for name in SCORES},
        **found,
        "agrees": all(found.values()),
    }
