"""The registry of rounds: what is shown, what is gone on with, what became of each."""

from pathlib import Path
from typing import Any

import pytest

from blip_core.corpus.catalog import build_catalog
from blip_core.corpus.query import run_query
from blip_core.corpus.rounds import (
    Begun,
    begin_round,
    choose_round,
    list_rounds,
    promote,
    promoted_round,
    rollback,
    round_states,
)
from blip_core.corpus.selection import publish_shard
from blip_core.errors import WorkspaceError
from blip_core.files import read_json, write_json
from blip_core.workspace import Workspace

SHARDS = ["aaaa000000000001", "bbbb000000000002"]


def publish(workspace: Workspace, round: int, where: str = "itm_score > 0.45") -> None:
    for annotation in sorted(workspace.round(1).annotations.glob("*.parquet")):
        target = workspace.round(round).corpus / annotation.name
        publish_shard(annotation, workspace.shard(annotation.stem), target, where, round)


def judge(workspace: Workspace, round: int, passed: bool | None, run: str = "a run", **more: Any) -> None:
    verdict = {"passed": passed, "reasons": ["CIDEr: too low"], "run": run, "estimated_noise": 0.25, **more}
    write_json(workspace.round(round).verdict, verdict)


def candidate(workspace: Workspace, round: int = 2) -> None:
    begin_round(workspace, round)
    publish(workspace, round)


def shown(workspace: Workspace) -> list[int]:
    return run_query(workspace, "SELECT DISTINCT round FROM corpus ORDER BY round")["round"].to_pylist()


def states(workspace: Workspace) -> dict[int, str]:
    return {number: state.state for number, state in round_states(workspace).items()}


def test_beginning_a_candidate_keeps_what_is_shown(workspace: Workspace) -> None:
    publish(workspace, 1)
    assert begin_round(workspace, 2) == Begun(SHARDS, 1)
    publish(workspace, 2)
    assert shown(workspace) == [1]
    assert read_json(workspace.promoted) == {"round": 1, "history": [], "rolled_back": []}
    assert states(workspace) == {1: "promoted", 2: "candidate"}


def test_what_stood_when_a_round_began_is_written_once(workspace: Workspace) -> None:
    publish(workspace, 1)
    begun = begin_round(workspace, 2)
    workspace.shard("cccc000000000003").write_bytes(workspace.shard(SHARDS[0]).read_bytes())
    assert begin_round(workspace, 2) == begun


def test_a_first_candidate_is_shown_only_when_it_is_promoted(workspace: Workspace) -> None:
    begin_round(workspace, 1)
    publish(workspace, 1)
    assert promoted_round(workspace) is None
    assert shown(workspace) == []
    assert not workspace.promoted.exists()
    promote(workspace, 1)
    assert shown(workspace) == [1]


def test_promotions_and_rollbacks_move_the_view_of_the_catalog(workspace: Workspace) -> None:
    publish(workspace, 1)
    for number in (2, 3):
        candidate(workspace, number)
        promote(workspace, number)
    assert (shown(workspace), states(workspace)) == ([3], {1: "superseded", 2: "superseded", 3: "promoted"})
    assert read_json(workspace.promoted)["history"] == [1, 2]
    assert rollback(workspace) == 2
    assert (shown(workspace), states(workspace)) == ([2], {1: "superseded", 2: "promoted", 3: "rolled back"})
    assert rollback(workspace) == 1
    assert shown(workspace) == [1]
    with pytest.raises(WorkspaceError, match="no round was promoted before"):
        rollback(workspace)
    promote(workspace, 3)
    assert states(workspace) == {1: "superseded", 2: "rolled back", 3: "promoted"}
    assert rollback(workspace) == 1


def test_promoting_what_is_promoted_changes_nothing(workspace: Workspace) -> None:
    publish(workspace, 1)
    candidate(workspace)
    promote(workspace, 2)
    before = workspace.promoted.read_bytes()
    promote(workspace, 2)
    assert workspace.promoted.read_bytes() == before


def test_a_round_that_is_not_there_or_has_no_corpus_is_not_promoted(workspace: Workspace) -> None:
    publish(workspace, 1)
    begin_round(workspace, 2)
    with pytest.raises(WorkspaceError, match=r"there is no round 7; the rounds are: 1, 2"):
        promote(workspace, 7)
    with pytest.raises(WorkspaceError, match="round 2 has no corpus; publish it first"):
        promote(workspace, 2)
    assert shown(workspace) == [1]


class TestChoice:
    """Which round a run of `re-bootstrap` works on."""

    def test_is_the_first_where_nothing_stands(self, tmp_path: Path) -> None:
        assert choose_round(Workspace.open(tmp_path), "a run") == 1

    def test_is_the_one_that_was_begun_and_never_published(self, workspace: Workspace) -> None:
        assert choose_round(workspace, "a run") == 1

    def test_is_the_next_where_one_is_published(self, workspace: Workspace) -> None:
        publish(workspace, 1)
        assert choose_round(workspace, "a run") == 2

    @pytest.mark.parametrize("passed", [None, True])
    def test_is_a_candidate_that_is_undecided_or_not_yet_promoted(
        self, workspace: Workspace, passed: bool | None
    ) -> None:
        publish(workspace, 1)
        candidate(workspace)
        assert choose_round(workspace, "a run") == 2
        judge(workspace, 2, passed)
        assert choose_round(workspace, "another run") == 2

    def test_is_a_new_one_after_a_candidate_that_was_rejected_or_rolled_back(self, workspace: Workspace) -> None:
        publish(workspace, 1)
        candidate(workspace)
        judge(workspace, 2, False)
        assert choose_round(workspace, "another run") == 3
        judge(workspace, 2, True)
        promote(workspace, 2)
        rollback(workspace)
        assert choose_round(workspace, "another run") == 3

    def test_is_a_new_one_where_the_first_was_rejected(self, workspace: Workspace) -> None:
        candidate(workspace, 1)
        judge(workspace, 1, False)
        assert promoted_round(workspace) is None
        assert choose_round(workspace, "another run") == 2

    @pytest.mark.parametrize("passed", [True, False, None])
    def test_is_the_one_that_this_very_run_has_judged(self, workspace: Workspace, passed: bool | None) -> None:
        publish(workspace, 1)
        candidate(workspace)
        judge(workspace, 2, passed, run="this run")
        if passed:
            promote(workspace, 2)
        assert choose_round(workspace, "this run") == 2

    def test_is_not_a_round_that_somebody_made_by_hand(self, workspace: Workspace) -> None:
        publish(workspace, 1)
        promote(workspace, 1)
        publish(workspace, 2)
        assert choose_round(workspace, "a run") == 3
        assert states(workspace) == {1: "promoted", 2: "candidate"}


def test_rounds_are_listed_with_what_they_hold_and_why_they_are_what_they_are(workspace: Workspace) -> None:
    publish(workspace, 1)
    retrained = {"retrieval": {"retrained": {"text_to_image": {"r1": 0.5}}}, "audit": {"corpus_noise": 0.125}}
    write_json(workspace.round(1).evaluation, retrained)
    candidate(workspace)
    judge(workspace, 2, False)
    first, second = list_rounds(workspace)
    (kept,) = run_query(workspace, "SELECT count(*) AS texts FROM corpus WHERE source <> 'human'").to_pylist()
    assert (first["round"], first["state"], first["why"]) == (1, "promoted", "")
    assert first["kept"] == kept["texts"] == 8
    assert (first["text_to_image_r1"], first["corpus_noise"], first["cider"]) == (0.5, 0.125, None)
    assert (second["state"], second["why"], second["estimated_noise"]) == ("rejected", "CIDEr: too low", 0.25)
    build_catalog(workspace)
    view = run_query(workspace, "SELECT round, state, why, promoted FROM rounds ORDER BY round").to_pylist()
    assert view == [
        {"round": 1, "state": "promoted", "why": "", "promoted": True},
        {"round": 2, "state": "rejected", "why": "CIDEr: too low", "promoted": False},
    ]


@pytest.mark.parametrize(
    ("passed", "why"), [(None, "waits for approval"), (True, "waits for its promotion"), ("none", "is not judged yet")]
)
def test_a_candidate_says_what_it_waits_for(workspace: Workspace, passed: Any, why: str) -> None:
    publish(workspace, 1)
    candidate(workspace)
    if passed != "none":
        judge(workspace, 2, passed)
    assert round_states(workspace)[2] == ("candidate", why)
