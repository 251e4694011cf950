"""`capfilt explain --replay`: models by their digest, what agrees, what does not, and one line for what is lacking."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from services.shards import make_shards

from blip_core.capfilt.annotate import annotate_shard
from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.capfilt.parts import AnnotateConfig
from blip_core.corpus.schemas import ANNOTATION_SCHEMA
from blip_core.med.decoding import GenerationConfig
from blip_core.workspace import Workspace

Capfilt = Callable[..., tuple[int, str, str]]
UID = "00000002"


@pytest.fixture
def annotated(published: Path, tmp_path: Path) -> Workspace:
    """Round 1 of five pictures, annotated in int8 by models that lie in no round."""
    (name,) = make_shards(tmp_path / "workspace", 1, 5)
    workspace = Workspace(tmp_path / "workspace")
    models = (
        Captioner.load(published / "captioner", precision="int8"),
        Filter.load(published / "filter", precision="int8"),
    )
    config = AnnotateConfig(candidates=2, workers=0, precision="int8")
    part = workspace.round(1).annotations / f"{name}.parquet"
    annotate_shard(workspace.shard(name), part, *models, config, GenerationConfig(max_length=8), seed=3)
    return workspace


def explain(capfilt: Capfilt, workspace: Workspace, *options: str) -> tuple[int, str, str]:
    return capfilt("explain", UID, "--workspace", str(workspace.root), *options)


def given(published: Path) -> tuple[str, ...]:
    return ("--replay", "--captioner", str(published / "captioner"), "--filter", str(published / "filter"))


def tamper(workspace: Workspace) -> None:
    """Puts another text in the place of a synthetic one."""
    (part,) = workspace.round(1).annotations.glob("*.parquet")
    table = pq.read_table(part)
    rows: list[dict[str, Any]] = table.to_pylist()
    for row in rows:
        if (row["uid"], row["candidate"]) == (UID, 1):
            row["text"] = "[b]something else"
    metadata = {**pq.read_metadata(part).metadata, **table.schema.metadata}
    metadata.pop(b"ARROW:schema")
    pq.write_table(pa.Table.from_pylist(rows, ANNOTATION_SCHEMA.with_metadata(metadata)), part)


def test_given_models_of_the_recorded_digests_make_the_same_texts_and_scores(
    capfilt: Capfilt, annotated: Workspace, published: Path
) -> None:
    status, out, err = explain(capfilt, annotated, *given(published))
    assert (status, err) == (0, "")
    said = out[out.index("computed again") :].splitlines()
    assert (
        said[0] == f"computed again, round 1, shard {annotated.shard_paths()[0].stem}: int8, scores may differ by 0.02"
    )
    assert [line.split(",")[0] for line in said[1:]] == [
        "  agrees: web 0",
        "  agrees: synthetic 1",
        "  agrees: synthetic 2",
    ]
    status, out, _ = explain(capfilt, annotated, *given(published), "--json")
    assert status == 0
    (made,) = json.loads(out)["replay"]
    assert (made["round"], made["agrees"], made["generation"]["max_length"]) == (1, True, 8)
    assert made["models"]["filter"]["source"] == str(published / "filter")


def test_a_text_that_was_changed_afterwards_is_found_and_the_exit_status_says_so(
    capfilt: Capfilt, annotated: Workspace, published: Path
) -> None:
    before = explain(capfilt, annotated, *given(published), "--json")
    text = json.loads(before[1])["rounds"][0]["candidates"][1]["text"]
    tamper(annotated)
    status, out, err = explain(capfilt, annotated, *given(published))
    assert status == 1
    assert err == f"error: explain --replay: '{UID}' does not come out as recorded in round 1\n"
    assert "  differs: synthetic 1" in out
    assert f"    the text came out as {text!r}" in out
    assert out.count("  agrees: ") == 2
    status, out, _ = explain(capfilt, annotated, *given(published), "--json")
    assert (status, json.loads(out)["replay"][0]["agrees"]) == (1, False)
    assert explain(capfilt, annotated)[0] == 0


@pytest.mark.parametrize(
    ("options", "message", "expected"),
    [
        (("--replay",), "no round of {workspace} has the captioner", 1),
        (("--replay", "--captioner", "{filter}"), "--captioner {filter}: its digest is", 1),
        (("--replay", "--captioner", "{captioner}", "--filter", "{nowhere}"), "{nowhere}: not found", 1),
        (("--replay", "--round", "2"), "round 2 has not annotated it", 1),
        (("--filter", "{filter}"), "are for --replay", 2),
    ],
)
def test_what_cannot_be_computed_again_gets_one_line(
    options: tuple[str, ...], message: str, expected: int, capfilt: Capfilt, annotated: Workspace, published: Path
) -> None:
    places = {"captioner": published / "captioner", "filter": published / "filter"}
    places |= {"workspace": annotated.root, "nowhere": annotated.root / "nowhere"}
    status, out, err = explain(capfilt, annotated, *(option.format(**places) for option in options))
    assert (status, out, err.count("\n")) == (expected, "", 1)
    assert message.format(**places) in err
