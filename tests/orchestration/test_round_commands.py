"""The commands about rounds: what they print, what they move, and how they refuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from blip_core.corpus.query import run_query
from blip_core.corpus.rounds import begin_round
from blip_core.corpus.schemas import CORPUS_SCHEMA, CORPUS_VERSION, write_part
from blip_core.files import write_json
from blip_core.workspace import Workspace

Capfilt = Callable[..., tuple[int, str, str]]
Configure = Callable[..., Path]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Round 1 with a corpus, and round 2, which the gate rejected."""
    made = Workspace.open(tmp_path / "rounds-workspace")
    publish(made, 1)
    begin_round(made, 2)
    publish(made, 2)
    verdict: dict[str, Any] = {"passed": False, "reasons": ["CIDEr: 0.5 is below 0.95"], "run": "a run"}
    write_json(made.round(2).verdict, verdict | {"estimated_noise": 0.25})
    return made


def publish(workspace: Workspace, round: int) -> None:
    rows = pa.Table.from_pylist(
        [{"uid": "u", "text": f"of round {round}", "source": "web", "candidate": 0, "round": round}], CORPUS_SCHEMA
    )
    counts = {"capfilt.kept": "1", "capfilt.rejected": "0"}
    write_part(workspace.round(round).corpus / "0123456789abcdef.parquet", rows, CORPUS_VERSION, "mark", counts)


def shown(workspace: Workspace) -> list[str]:
    return run_query(workspace, "SELECT text FROM corpus")["text"].to_pylist()


def test_rounds_prints_a_table_or_json(capfilt: Capfilt, workspace: Workspace) -> None:
    status, out, _ = capfilt("rounds", "--workspace", str(workspace.root))
    assert status == 0
    assert [line.split()[1:4:2] for line in out.splitlines() if line.startswith("│")] == [
        ["1", "promoted"],
        ["2", "rejected"],
    ]
    assert out.splitlines()[-1] == "round 2, rejected: CIDEr: 0.5 is below 0.95"
    status, out, _ = capfilt("rounds", "--workspace", str(workspace.root), "--json")
    assert status == 0
    first, second = json.loads(out)
    assert (first["round"], first["state"], first["kept"]) == (1, "promoted", 1)
    assert (second["state"], second["why"], second["estimated_noise"]) == ("rejected", "CIDEr: 0.5 is below 0.95", 0.25)


def test_rounds_tells_the_noise_by_hand_with_its_interval(capfilt: Capfilt, workspace: Workspace) -> None:
    noise = {"value": 0.035, "low": 0.0164, "high": 0.0661}
    counts = {"where": None, "rules": {}, "level": 0.95, "right": 190, "wrong": 7}
    write_json(workspace.round(1).audit, {"estimates": {"all": {"corpus_noise": noise}}, **counts})
    status, out, _ = capfilt("rounds", "--workspace", str(workspace.root))
    assert status == 0
    by_hand = "round 1, marked by hand: 3.5% of the corpus's texts are wrong (95% interval 1.6 to 6.6%)"
    assert by_hand in out.splitlines()
    assert next(line for line in out.splitlines() if "promoted" in line).split("│")[5].strip() == "0.035"
    _, out, _ = capfilt("rounds", "--workspace", str(workspace.root), "--json")
    assert [row["audited_noise_high"] for row in json.loads(out)] == [0.0661, None]


def test_promote_and_rollback_move_the_view_and_the_catalog(capfilt: Capfilt, workspace: Workspace) -> None:
    place = ("--workspace", str(workspace.root))
    assert shown(workspace) == ["of round 1"]
    status, _, err = capfilt("promote", "2", *place)
    assert (status, err.strip()) == (0, "promote: the corpus is that of round 2")
    assert shown(workspace) == ["of round 2"]
    assert workspace.catalog.is_file()
    status, _, err = capfilt("rollback", *place)
    assert (status, err.strip()) == (0, "rollback: the corpus is that of round 1")
    assert shown(workspace) == ["of round 1"]


def test_what_cannot_be_promoted_or_taken_back_gets_one_line(capfilt: Capfilt, workspace: Workspace) -> None:
    place = ("--workspace", str(workspace.root))
    for command, message in (
        (("promote", "7"), "there is no round 7"),
        (("rollback",), "no round was promoted before"),
    ):
        status, _, err = capfilt(*command, *place)
        assert status == 1
        assert message in err
        assert err.count("\n") == 1
    assert shown(workspace) == ["of round 1"]


def test_re_bootstrap_asks_for_what_the_next_round_needs_before_anything_is_started(
    capfilt: Capfilt, configure: Configure
) -> None:
    status, _, err = capfilt("re-bootstrap", str(configure(human=None)))
    assert status == 2
    assert err.startswith("error: human: missing")
    status, _, err = capfilt("re-bootstrap", str(configure(rounds={"approval": "perhaps"})))
    assert status == 2
    assert "rounds.approval: " in err
