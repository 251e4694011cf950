"""The gate: whether a candidate round may take the promoted round's place (docs/rounds.md).

Pure: the numbers of two rounds in, a verdict with its table out. A number that is missing, or that cannot be
compared, is said to be so and never guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from blip_core.corpus.rounds import look_up
from blip_core.settings import Settings, setting

MODEL = "retrained"
METRICS: Mapping[str, tuple[str, ...]] = {
    **{
        f"{title} R@{k}": ("retrieval", MODEL, direction, f"r{k}")
        for title, direction in (("image to text", "image_to_text"), ("text to image", "text_to_image"))
        for k in (1, 5, 10)
    },
    "BLEU-4": ("captioning", MODEL, "bleu4"),
    "CIDEr": ("captioning", MODEL, "cider"),
}
TRUE_NOISE = "noise, by the truth"
ESTIMATED_NOISE = "noise, as the Filter estimates it"
ROUNDING = 1e-9  # a number that is exactly at its limit passes, however it was rounded


@dataclass(frozen=True)
class RoundsConfig(Settings):
    """How `re-bootstrap` makes a round, and when it promotes it."""

    retrain: bool = setting(False, "train a MED on each round's corpus, whose held-out scores the gate compares")
    finetune: bool = setting(
        False, "fine-tune Captioner and Filter anew, from the MED that was retrained on the promoted round's corpus"
    )
    tolerance: float = setting(
        0.05, "how much of each of the promoted round's recalls, BLEU-4 and CIDEr may be lost, as a share", ge=0, le=1
    )
    noise_tolerance: float = setting(
        0.0, "how much higher than the promoted round's the share of wrong texts may be; absolute", ge=0, le=1
    )
    approval: Literal["none", "required"] = setting(
        "none", "required: nothing is promoted before a person approves it in the Prefect UI"
    )


class RoundNumbers(NamedTuple):
    """What the gate looks at: a round's evaluation.json ({} without one), and what its Filter says of its corpus.

    `estimated_noise` is 1 - the mean itm_score of the web and synthetic texts that were kept, None where none were;
    `filters` are the digests of those that gave these scores.
    """

    round: int
    evaluation: Mapping[str, Any]
    estimated_noise: float | None
    filters: tuple[str, ...]


class Criterion(NamedTuple):
    """One row of the table. `passed` is None where the criterion cannot be judged; the note says why."""

    name: str
    candidate: float | None
    promoted: float | None
    limit: float | None
    passed: bool | None
    note: str


class Verdict(NamedTuple):
    """Whether the candidate passes, why, in words, and the table that it was read from."""

    passed: bool
    reasons: list[str]
    table: list[Criterion]


def judge(candidate: RoundNumbers, promoted: RoundNumbers | None, config: RoundsConfig) -> Verdict:
    """The verdict on a candidate round.

    Without a promoted round it passes. Otherwise every criterion that can be judged must hold, and at least one must
    be one that can: `noise` always is asked for, the metrics of the retrained model where `config.retrain`.
    """
    metrics = [_metric(name, candidate, promoted, config.tolerance) for name in METRICS] if config.retrain else []
    table = [*metrics, _noise(candidate, promoted, config.noise_tolerance)]
    if promoted is None:
        return Verdict(True, ["no round is promoted yet"], table)
    failed = [f"{row.name}: {row.note}" for row in table if row.passed is False]
    if failed:
        return Verdict(False, failed, table)
    held = sum(row.passed is True for row in table)
    if not held:
        notes = "; ".join(dict.fromkeys(row.note for row in table))
        return Verdict(False, [f"nothing could be compared with round {promoted.round} ({notes})"], table)
    return Verdict(True, [f"no worse than round {promoted.round} by {held} of {len(table)} criteria"], table)


def _metric(name: str, candidate: RoundNumbers, promoted: RoundNumbers | None, tolerance: float) -> Criterion:
    """Higher is better; the limit is the promoted round's value less a share of it."""
    new = look_up(candidate.evaluation, METRICS[name])
    if promoted is None:
        return Criterion(name, new, None, None, None, "no round is promoted yet")
    old = look_up(promoted.evaluation, METRICS[name])
    if old is None:
        return Criterion(name, new, None, None, None, f"round {promoted.round} has no such number")
    limit = old * (1 - tolerance)
    if new is None:
        return Criterion(name, None, old, limit, False, f"is missing, and round {promoted.round} has it")
    if (ours := _held_out(candidate)) != (theirs := _held_out(promoted)):
        note = f"was measured on {ours}, and that of round {promoted.round} on {theirs}"
        return Criterion(name, new, old, None, False, note)
    passed = new >= limit - ROUNDING
    note = f"{new:.4g} is {'not ' if passed else ''}below {limit:.4g}, round {promoted.round}'s {old:.4g} less "
    return Criterion(name, new, old, limit, passed, f"{note}{tolerance:.3g} of it")


def _held_out(numbers: RoundNumbers) -> str:
    counts = (look_up(numbers.evaluation, ("retrieval", MODEL, key)) for key in ("images", "texts"))
    return " and ".join(f"{count} {what}" for count, what in zip(counts, ("images", "texts"), strict=True))


def _noise(candidate: RoundNumbers, promoted: RoundNumbers | None, tolerance: float) -> Criterion:
    """Lower is better. By the truth where it is known of both, else by the Filter, where both had the same one."""
    path = ("audit", "corpus_noise")
    new, old = look_up(candidate.evaluation, path), look_up(promoted.evaluation, path) if promoted else None
    if new is not None and (promoted is None or old is not None):
        return _not_higher(TRUE_NOISE, new, old, promoted, tolerance)
    new, old = candidate.estimated_noise, promoted.estimated_noise if promoted else None
    if promoted is not None and new is not None and old is not None and candidate.filters != promoted.filters:
        note = f"was estimated by another Filter than that of round {promoted.round}: the two cannot be compared"
        return Criterion(ESTIMATED_NOISE, new, old, None, None, note)
    return _not_higher(ESTIMATED_NOISE, new, old, promoted, tolerance)


def _not_higher(
    name: str, new: float | None, old: float | None, promoted: RoundNumbers | None, tolerance: float
) -> Criterion:
    if promoted is None:
        return Criterion(name, new, None, None, None, "no round is promoted yet")
    if old is None:
        return Criterion(name, new, None, None, None, f"round {promoted.round} keeps no web or synthetic text")
    limit = old + tolerance
    if new is None:
        note = f"is missing: no web or synthetic text was kept, and round {promoted.round} keeps some"
        return Criterion(name, None, old, limit, False, note)
    passed = new <= limit + ROUNDING
    note = f"{new:.4g} is {'not ' if passed else ''}above {limit:.4g}, round {promoted.round}'s {old:.4g}"
    return Criterion(name, new, old, limit, passed, f"{note} and {tolerance:.3g} more" if tolerance else note)
