"""`capfilt audit`: a page, answers, a table or JSON, and one line for what does not fit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from services.rounds import make_round

from blip_core.workspace import Workspace

Capfilt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_round(tmp_path / "audited", [f"text {number}" for number in range(120)])


def answered(capfilt: Capfilt, workspace: Workspace, path: Path) -> Path:
    """A file as the page gives it: whoever marked it finds that what scores below 0.5 is wrong."""
    _, out, _ = capfilt("audit", "--workspace", str(workspace.root), "--pairs", "120", "--json")
    drawn = json.loads(out)
    assert drawn["drawn"] == 120
    page = Path(drawn["page"]).read_text(encoding="utf-8")
    texts = [piece.partition("<")[0] for piece in page.split('<p class="text" dir="auto">text ')[1:]]
    answers = {str(place): "right" if int(text) >= 60 else "wrong" for place, text in enumerate(texts, 1)}
    value = {"schema": "audit-answers/1", "sample": drawn["sample"], "round": 1, "seed": 0, "pairs": 120}
    path.write_text(json.dumps(value | {"answers": answers}))
    return path


def test_audit_writes_the_page_of_the_last_round_and_prints_where_it_is(capfilt: Capfilt, workspace: Workspace) -> None:
    status, out, err = capfilt("audit", "--workspace", str(workspace.root), "--pairs", "20", "--seed", "3")
    assert status == 0
    assert out.strip() == str(workspace.round(1).audit_page)
    assert workspace.round(1).audit_page.read_text(encoding="utf-8").count("<article") == 20
    assert "--answers FILE" in err


def test_audit_prints_the_estimates_as_a_table_or_json_and_stores_them(
    capfilt: Capfilt, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    path = answered(capfilt, workspace, tmp_path / "answers.json")
    status, out, _ = capfilt("audit", "--workspace", str(workspace.root), "--answers", str(path))
    assert status == 0
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line[:1] == "│"]
    assert cells == [
        ["candidate noise", *["50.0 (50.0–50.0)"] * 3],
        ["corpus noise", *["0.0 (0.0–0.0)"] * 3],
        ["filter precision", *["100.0 (100.0–100.0)"] * 3],
        ["filter recall", *["100.0 (100.0–100.0)"] * 3],
    ]
    assert "120 of 120 pairs marked, 0 of them unsure" in out
    status, out, _ = capfilt("audit", "--workspace", str(workspace.root), "--answers", str(path), "--json")
    assert status == 0
    assert json.loads(out) == json.loads(workspace.round(1).audit.read_text())


def test_what_does_not_fit_gets_one_line(capfilt: Capfilt, workspace: Workspace, tmp_path: Path) -> None:
    path = answered(capfilt, workspace, tmp_path / "answers.json")
    place = ("audit", "--workspace", str(workspace.root))
    for arguments, message, expected in (
        (("--answers", str(path), "--seed", "1"), "leave out --pairs and --seed", 2),
        (("--answers", str(path), "--round", "2"), "they are of round 1, not 2", 1),
        (("--answers", str(tmp_path / "none.json")), "none.json", 1),
        (("--round", "4"), "there is no round 4", 1),
    ):
        status, out, err = capfilt(*place, *arguments)
        assert (status, out) == (expected, "")
        assert message in err
        assert err.count("\n") == 1
