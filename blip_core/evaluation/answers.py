"""A person's answers to the audit's page: read, checked against their sample, and made into estimates of the round."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blip_core import stores
from blip_core.errors import InputError
from blip_core.evaluation.estimates import LEVEL, MEASURES, estimate
from blip_core.evaluation.sample import MOST_PAIRS, Sample, Stratum, draw_sample
from blip_core.files import write_json
from blip_core.workspace import Workspace

ANSWERS_VERSION = "audit-answers/1"
RIGHT, WRONG, UNSURE = ANSWERS = ("right", "wrong", "unsure")
ALL = "all"


class Answers(NamedTuple):
    """What a file of answers holds: which sample it is of, how that was drawn, and an answer by number of the pair."""

    sample: str
    round: int
    seed: int
    pairs: int
    marks: dict[int, str]


def audit_answers(workspace: Workspace, path: Path, round: int | None = None) -> dict[str, Any]:
    """Estimates a round's noise and its Filter's quality from answers; stores them in `audit.json`, returns them.

    The sample is drawn again and has to be the one that was answered. Keys: sample, round, seed, where, rules, drawn,
    right, wrong, unsure (pairs), level (of the intervals), estimates {all, web, synthetic: {MEASURES: value, low,
    high, or null where nothing tells}}, strata.

    Args:
        path: the JSON that the page gave.
        round: the round that the answers have to be of; any if not given.

    Raises InputError where the file is none of answers, or of another sample.
    """
    answers = read_answers(path)
    if round is not None and round != answers.round:
        raise InputError(f"answers {path}: they are of round {answers.round}, not {round}")
    sample = draw_sample(workspace, answers.round, answers.pairs, answers.seed)
    if sample.name != answers.sample:
        raise InputError(
            f"answers {path}: they are of the sample {answers.sample}, and the round gives {sample.name}; it is another"
            " workspace's, or the round was annotated or published anew since: draw and mark another sample"
        )
    found = estimates_of(sample, answers.marks, str(path))
    write_json(workspace.round(sample.round).audit, found)
    return found


def read_answers(path: Path) -> Answers:
    """Reads the JSON that the page gave. Raises InputError where it is not of that form."""
    try:
        value = json.loads(stores.read_bytes(path).decode())
    except stores.errors(ValueError) as error:
        raise InputError(f"answers {path}: not a readable JSON file ({stores.reason(error)})") from error
    if not isinstance(value, dict) or value.get("schema") != ANSWERS_VERSION:
        found = value.get("schema") if isinstance(value, dict) else value
        raise InputError(
            f"answers {path}: not answers of the audit's page (schema {found!r:.80}, not {ANSWERS_VERSION})"
        )
    bounds = {"round": (1, 9999), "seed": (0, 2**63 - 1), "pairs": (1, MOST_PAIRS)}
    numbers = {key: _whole(value.get(key), f"answers {path}: {key}", *limits) for key, limits in bounds.items()}
    sample, marks = value.get("sample"), value.get("answers")
    if not isinstance(sample, str) or not isinstance(marks, dict):
        raise InputError(f"answers {path}: sample and answers must be a text and an object by number of the pair")
    return Answers(sample, marks=dict(_mark(path, number, mark) for number, mark in marks.items()), **numbers)


def estimates_of(sample: Sample, marks: Mapping[int, str], name: str = "the answers") -> dict[str, Any]:
    """The estimates of `audit_answers` for pairs marked by their number, from 1, in the order of the sample.

    Raises InputError where a number is not of the sample, or no pair is marked right or wrong.
    """
    if unknown := [number for number in marks if not 1 <= number <= len(sample.drawn)]:
        raise InputError(f"answers {name}: there is no pair {unknown[0]}; the sample has 1 to {len(sample.drawn)}")
    counts = Counter((sample.drawn[number - 1].stratum, mark) for number, mark in marks.items())
    by_answer = {mark: [counts[place, mark] for place in range(len(sample.strata))] for mark in ANSWERS}
    if not any(by_answer[RIGHT]) and not any(by_answer[WRONG]):
        raise InputError(f"answers {name}: no pair is marked right or wrong; mark some on the page first")
    sources = sorted({stratum.source for stratum in sample.strata}, reverse=True)
    return {
        **{key: getattr(sample, key) for key in ("round", "seed", "where", "rules")},
        "sample": sample.name,
        "drawn": len(sample.drawn),
        **{mark: sum(numbers) for mark, numbers in by_answer.items()},
        "level": LEVEL,
        "estimates": {source: _estimates(sample.strata, by_answer, source) for source in (ALL, *sources)},
        "strata": [
            asdict(stratum) | {mark: by_answer[mark][place] for mark in ANSWERS}
            for place, stratum in enumerate(sample.strata)
        ],
    }


def _estimates(strata: Sequence[Stratum], by_answer: Mapping[str, Sequence[int]], source: str) -> dict[str, Any]:
    """MEASURES of one source, or of all."""
    places = [place for place, stratum in enumerate(strata) if source in (ALL, stratum.source)]
    right, wrong = (np.asarray(by_answer[mark])[places] for mark in (RIGHT, WRONG))
    found = estimate([strata[place] for place in places], right, wrong)
    return {name: _to_json(*map(float, found[name])) for name in MEASURES}


def _to_json(value: float, low: float, high: float) -> dict[str, float] | None:
    return None if math.isnan(value) else {"value": round(value, 6), "low": round(low, 6), "high": round(high, 6)}


def _whole(value: Any, name: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"{name}: must be a whole number of {least} to {most}, not {value!r:.80}")
    return value


def _mark(path: Path, number: str, mark: Any) -> tuple[int, str]:
    if not (number.isascii() and number.isdecimal() and len(number) < 10) or mark not in ANSWERS:
        what = f"{number!r:.80}: {mark!r:.80}"
        raise InputError(f"answers {path}: {what} is not the number of a pair with one of {', '.join(ANSWERS)}")
    return int(number), mark
