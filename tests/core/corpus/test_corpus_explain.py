"""The story of an image is what stands in the files about it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_core.corpus.explain import explain
from blip_core.corpus.schemas import ANNOTATION_SCHEMA, ANNOTATION_VERSION, write_part
from blip_core.corpus.selection import publish_human, publish_shard
from blip_core.data.tables import PairTable
from blip_core.errors import InputError
from blip_core.files import write_json
from blip_core.workspace import Workspace


def publish(workspace: Workspace, where: str, best_of: bool = False) -> None:
    for annotation in sorted(workspace.round(1).annotations.glob("*.parquet")):
        target = workspace.round(1).corpus / annotation.name
        publish_shard(annotation, workspace.shard(annotation.stem), target, where, 1, best_of)


def checkpoint(folder: Path, digest: str, start: str | None) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    sizes = {"med": {}, "faces": ["encoder"], "vocabulary": 100, "digest": digest}
    write_json(folder / "config.json", {**sizes, "seed": 3, "steps": 7, "data": "da7a", "start": start})


def test_an_image_has_its_download_its_texts_and_their_verdicts(workspace: Workspace) -> None:
    publish(workspace, "itm_score > 0.55")
    story = explain(workspace, "aaaa-3")
    (image,) = story["images"]
    assert (image["url"], image["caption"]) == ("http://web.test/aaaa/3.jpg", "web text 3 of aaaa")
    assert (image["status"], image["width"], image["original_width"]) == ("ok", 43, 400)
    (made,) = story["rounds"]
    assert (made["round"], made["promoted"], made["where"], made["rules"]) == (1, True, "itm_score > 0.55", {})
    assert [(row["source"], row["itm_score"], row["kept"], row["why"]) for row in made["candidates"]] == [
        ("web", pytest.approx(0.6), True, "itm_score > 0.55 is true"),
        ("synthetic", pytest.approx(0.7), True, "itm_score > 0.55 is true"),
    ]
    assert [row["seed"] for row in made["candidates"]] == [None, 7]
    web, synthetic = explain(workspace, "aaaa-2")["rounds"][0]["candidates"]
    assert (web["kept"], web["why"]) == (False, "itm_score > 0.55 is not true")
    assert (synthetic["kept"], synthetic["why"]) == (False, "itm_score > 0.55 is not true")


def test_a_text_without_scores_and_a_row_without_an_image_say_why(workspace: Workspace) -> None:
    publish(workspace, "true")
    (_, empty) = explain(workspace, "aaaa-4")["rounds"][0]["candidates"]
    assert (empty["kept"], empty["why"]) == (False, "it has no scores: empty_text")
    story = explain(workspace, "aaaa-5")
    assert [(image["status"], image["reason"]) for image in story["images"]] == [("failed", "not_found")]
    assert story["rounds"] == []


def test_before_it_is_published_nothing_is_decided(workspace: Workspace) -> None:
    (made,) = explain(workspace, "bbbb-0")["rounds"]
    assert made["where"] is None
    assert {(row["kept"], row["why"]) for row in made["candidates"]} == {
        (None, "its shard is not published in this round yet")
    }


def test_the_loser_of_best_of_is_told_so(workspace: Workspace) -> None:
    part = workspace.round(1).annotations / "aaaa000000000001.parquet"
    rows = pq.read_table(part).to_pylist()
    extra = [row | {"candidate": 2, "itm_score": 0.99} for row in rows if row["uid"] == "aaaa-3" and row["candidate"]]
    table = pa.Table.from_pylist([*rows, *extra], ANNOTATION_SCHEMA)
    write_part(part, table, ANNOTATION_VERSION, "another")
    publish(workspace, "itm_score > 0.5", best_of=True)
    (made,) = explain(workspace, "aaaa-3")["rounds"]
    assert [(row["candidate"], row["kept"]) for row in made["candidates"]] == [(0, True), (1, False), (2, True)]
    assert made["candidates"][1]["why"] == "another synthetic text of the image is better, and best_of keeps one"


def test_the_models_are_followed_to_the_one_that_they_began_with(workspace: Workspace) -> None:
    made = workspace.round(1)
    checkpoint(made.captioner, "c0ffee", "3ed")
    checkpoint(made.med, "3ed", None)
    models = explain(workspace, "aaaa-0")["models"]
    assert models["c0ffee"] | {"folder": ""} == {
        "kind": "captioner", "folder": "", "round": 1, "seed": 3, "steps": 7, "data": "da7a", "start": "3ed"
    }  # fmt: skip
    assert models["3ed"]["kind"] == "med"
    assert models["f11733"] == {}  # it was given


def test_a_human_pair_has_its_texts(workspace: Workspace, tmp_path: Path) -> None:
    image = next(row["image"] for row in pq.read_table(workspace.shard_paths()[0]).to_pylist() if row["image"])
    table = pa.table({"uid": ["h1"], "image": [image], "caption": [["a square", "a dark square"]]})
    pq.write_table(table, tmp_path / "human.parquet")
    publish_human(PairTable(str(tmp_path / "human.parquet"), uid="uid"), workspace.round(1).corpus, 1)
    story = explain(workspace, "h1")
    assert [pair["text"] for pair in story["human"]] == ["a square", "a dark square"]
    assert (story["images"], story["rounds"], story["models"]) == ([], [], {})


def test_a_uid_of_nothing_is_named(workspace: Workspace) -> None:
    with pytest.raises(InputError, match=r"uid 'nobody': no image of .* has it"):
        explain(workspace, "nobody")
