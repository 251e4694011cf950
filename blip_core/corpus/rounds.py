"""The registry of rounds: whose corpus is shown, how a candidate began, and what became of it (docs/rounds.md).

`promoted.json` says it all in one atomic step: {"round": N, "history": [...]}, the rounds that were promoted before
N, oldest first, and `rolled_back`, those that were taken back. A round's own `begun.json` and `verdict.json` say
what stood when it began, and whether it may be promoted.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from blip_core.corpus.audited import audited_columns
from blip_core.corpus.schemas import ANNOTATION_VERSION, CORPUS_VERSION, IMAGES_KEY
from blip_core.corpus.selection import KEPT_KEY
from blip_core.data.shards import check_part
from blip_core.errors import WorkspaceError
from blip_core.files import read_json, write_json
from blip_core.workspace import Round, Workspace

# The numbers of a round: where each stands in evaluation.json.
ROUND_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "web_noise": ("audit", "web_noise"),
    "corpus_noise": ("audit", "corpus_noise"),
    "filter_auc": ("audit", "filter_auc"),
    **{
        f"{name}{suffix}": (*path[:1], model, *path[1:])
        for suffix, model in (("", "retrained"), ("_raw", "retrained-raw"))
        for name, path in {
            "image_to_text_r1": ("retrieval", "image_to_text", "r1"),
            "text_to_image_r1": ("retrieval", "text_to_image", "r1"),
            "bleu4": ("captioning", "bleu4"),
            "cider": ("captioning", "cider"),
        }.items()
    },
}

STATES = ("promoted", "candidate", "rejected", "rolled back", "superseded")


class Begun(NamedTuple):
    """What stood when a round began: the names of the shards, and the promoted round, None where there was none."""

    shards: list[str]
    promoted: int | None


class RoundState(NamedTuple):
    """One of STATES, and why; the reason is empty where the state says it all."""

    state: str
    why: str


class _Promotions(NamedTuple):
    round: int | None
    history: list[int]
    rolled_back: list[int]


def promoted_round(workspace: Workspace) -> int | None:
    """The round whose corpus the catalog shows; None where there is none.

    It is the one in promoted.json. Without that file, as after a first `bootstrap` or `clean`, it is the last one that
    has a corpus and is no candidate that still waits for its verdict. Raises WorkspaceError where the file is torn.
    """
    return _promotions(workspace).round


def begin_round(workspace: Workspace, number: int) -> Begun:
    """Records once what stands as the round begins: the promoted round for the catalog, and both in begun.json."""
    made = workspace.round(number)
    if (standing := read_begun(made)) is not None:
        return standing
    before = _promotions(workspace)
    promoted = before.round if before.round != number else None
    if promoted is not None and not workspace.promoted.exists():
        _write_promotions(workspace, before)
    begun = Begun([path.stem for path in workspace.shard_paths()], promoted)
    write_json(made.begun, begun._asdict())
    return begun


def read_begun(made: Round) -> Begun | None:
    """What stood when `re-bootstrap` began the round; None where something else made it."""
    if not made.begun.exists():
        return None
    value = read_json(made.begun)
    return Begun(value["shards"], value["promoted"])


def read_verdict(made: Round) -> dict[str, Any] | None:
    """The round's verdict.json; None where it was not judged. `passed` is null while it waits for approval."""
    return read_json(made.verdict) if made.verdict.exists() else None


def choose_round(workspace: Workspace, run: str | None) -> int:
    """The round that `re-bootstrap` works on.

    The one that this very run has judged already, where it was put back; else an undecided candidate, which is gone on
    with; else the first, where nothing stands; else a new one after all others.
    """
    numbers = workspace.round_numbers()
    verdicts = {number: read_verdict(workspace.round(number)) or {} for number in numbers}
    judged = [number for number in numbers if run is not None and verdicts[number].get("run") == run]
    if judged:
        return max(judged)
    promotions = _promotions(workspace)
    undecided = [
        number
        for number in numbers
        if workspace.round(number).begun.exists()
        and number > (promotions.round or 0)
        and number not in promotions.rolled_back
        and verdicts[number].get("passed") is not False
    ]
    if undecided:
        return max(undecided)
    last = max(numbers, default=0)
    if promotions.round is None and last and verdicts[last].get("passed") is not False:
        return last  # begun by `bootstrap` or one of its steps, and not yet published
    return last + 1


def promote(workspace: Workspace, number: int) -> None:
    """Shows the round's corpus from now on. Raises WorkspaceError where there is no such round, or no corpus of it."""
    made = workspace.round(number)
    if number not in workspace.round_numbers():
        listed = ", ".join(map(str, workspace.round_numbers())) or "none"
        raise WorkspaceError(f"{made.root}: there is no round {number}; the rounds are: {listed}")
    if not _has_corpus(made):
        raise WorkspaceError(f"{made.corpus}: round {number} has no corpus; publish it first")
    before = _promotions(workspace)
    history = before.history if before.round in (None, number) else [*before.history, before.round]
    rolled_back = [other for other in before.rolled_back if other != number]
    _write_promotions(workspace, _Promotions(number, [other for other in history if other is not None], rolled_back))


def rollback(workspace: Workspace) -> int:
    """Shows the corpus of the round that was promoted before, and returns its number.

    Raises WorkspaceError where none was, or where it has no corpus any more.
    """
    before = _promotions(workspace)
    if before.round is None or not before.history:
        raise WorkspaceError(f"{workspace.promoted}: no round was promoted before; there is nothing to go back to")
    *history, number = before.history
    if not _has_corpus(workspace.round(number)):
        raise WorkspaceError(f"{workspace.round(number).corpus}: round {number} has no corpus any more")
    rolled_back = [*(other for other in before.rolled_back if other != before.round), before.round]
    _write_promotions(workspace, _Promotions(number, history, rolled_back))
    return number


def round_states(workspace: Workspace) -> dict[int, RoundState]:
    """What became of each round so far."""
    promotions = _promotions(workspace)
    return {number: _state(workspace.round(number), promotions) for number in workspace.round_numbers()}


def list_rounds(workspace: Workspace) -> list[dict[str, Any]]:
    """A row for each round, JSON-like; what is not known is None.

    Keys: round, state, why, images (annotated), kept (web and synthetic texts of the corpus), estimated_noise (the
    Filter's, where the round was judged), AUDITED (by hand), and ROUND_NUMBERS.
    """
    rows = []
    for number, (state, why) in round_states(workspace).items():
        made = workspace.round(number)
        evaluation = read_json(made.evaluation) if made.evaluation.exists() else {}
        row = {"round": number, "state": state, "why": why}
        row |= {"images": _count(made.annotations, "*.parquet", ANNOTATION_VERSION, IMAGES_KEY)}
        row |= {"kept": _count(made.corpus, "[0-9a-f]*.parquet", CORPUS_VERSION, KEPT_KEY)}
        row |= {"estimated_noise": (read_verdict(made) or {}).get("estimated_noise")}
        row |= audited_columns(made)
        rows.append(row | {name: look_up(evaluation, path) for name, path in ROUND_NUMBERS.items()})
    return rows


def look_up(value: Any, path: tuple[str, ...]) -> Any:
    """What stands in nested mappings under these keys; None where nothing does."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _count(folder: Path, pattern: str, version: str, key: str) -> int:
    """A count that each part has in its metadata, summed up. The human pairs' part begins with another letter."""
    return sum(int(check_part(part, version).get(key, 0)) for part in folder.glob(pattern))


def _state(made: Round, promotions: _Promotions) -> RoundState:
    verdict = read_verdict(made) or {}
    if made.number == promotions.round:
        return RoundState("promoted", "")
    if made.number in promotions.rolled_back:
        return RoundState("rolled back", "")
    if verdict.get("passed") is False:
        return RoundState("rejected", "; ".join(verdict["reasons"]))
    if made.number in promotions.history or made.number < (promotions.round or 0):
        return RoundState("superseded", "")
    if "passed" in verdict:
        return RoundState("candidate", "waits for approval" if verdict["passed"] is None else "waits for its promotion")
    return RoundState("candidate", "is not judged yet" if _has_corpus(made) else "has no corpus yet")


def _promotions(workspace: Workspace) -> _Promotions:
    path = workspace.promoted
    if not path.exists():
        numbers = workspace.round_numbers()
        shown = [number for number in numbers if _has_corpus(made := workspace.round(number)) and not _is_open(made)]
        return _Promotions(max(shown, default=None), [], [])
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("round"), int):
        raise WorkspaceError(f'{path}: must be {{"round": N, "history": [...]}}, not {json.dumps(value)}')
    return _Promotions(value["round"], value.get("history", []), value.get("rolled_back", []))


def _write_promotions(workspace: Workspace, promotions: _Promotions) -> None:
    write_json(workspace.promoted, promotions._asdict())


def _is_open(made: Round) -> bool:
    """Whether the round is a candidate without a verdict that it may be promoted."""
    return made.begun.exists() and (read_verdict(made) or {}).get("passed") is not True


def _has_corpus(made: Round) -> bool:
    return next(made.corpus.glob("*.parquet"), None) is not None
