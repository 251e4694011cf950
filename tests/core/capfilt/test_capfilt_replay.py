"""What is on record of an image comes out again, and what was changed afterwards does not."""

from collections.abc import Callable
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_core.capfilt.annotate import annotate_shard
from blip_core.capfilt.by_digest import find_by_digest
from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.capfilt.parts import AnnotateConfig
from blip_core.capfilt.recorded import read_recorded
from blip_core.capfilt.replay import replay
from blip_core.corpus.schemas import ANNOTATION_SCHEMA
from blip_core.errors import CheckpointError, InputError, ShardError
from blip_core.med.decoding import GenerationConfig
from blip_core.workspace import Workspace

SHARD = "c0ffee0000000001"
Models = tuple[Captioner, Filter]
# none of them is the default
GENERATION = GenerationConfig(p=0.95, temperature=1.5, max_length=7, min_length=2)


@pytest.fixture
def workspace(make_shard: Callable[..., Path], tmp_path: Path, models: Models) -> Workspace:
    """Six images, one of which cannot be decoded, with two captions each, annotated in batches of four."""
    shard = make_shard(SHARD, [1, 2, 3, b"no image", 4, 5])
    made = Workspace(tmp_path)
    part = made.round(1).annotations / shard.name
    annotate_shard(shard, part, *models, AnnotateConfig(candidates=2, batch_size=4, workers=0), GENERATION, seed=7)
    return made


def part_of(workspace: Workspace) -> Path:
    return workspace.round(1).annotations / f"{SHARD}.parquet"


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], forget: str | None = None) -> None:
    """Writes a part anew with its rows changed, and one key of its metadata taken away."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    for row in rows:
        change(row)
    kept = {**pq.read_metadata(path).metadata, **table.schema.metadata}
    metadata = {key: value for key, value in kept.items() if key != (forget or "").encode() and key != b"ARROW:schema"}
    pq.write_table(pa.Table.from_pylist(rows, ANNOTATION_SCHEMA.with_metadata(metadata)), path)


def nothing(row: dict[str, Any]) -> None:
    pass


@pytest.mark.parametrize("number", range(6))
def test_every_image_of_a_batch_comes_out_alone_as_it_was_recorded(
    number: int, workspace: Workspace, models: Models
) -> None:
    recorded = read_recorded(workspace, 1, SHARD, f"a0000{number}")
    assert (recorded.generation, recorded.told, recorded.precision) == (GENERATION, True, "fp32")
    found = replay(recorded, *models)
    assert found["agrees"]
    assert [row["text"] for row in found["candidates"]] == [row["text"] for row in recorded.rows]
    if number == 3:
        assert {row["reason"] for row in found["candidates"]} == {"not_an_image"}
        return
    differences = [value for row in found["candidates"] for value in row["differences"].values() if value is not None]
    assert len(differences) == 3 + 2 + 3
    assert max(map(abs, differences)) < 1e-5


@pytest.mark.parametrize(
    ("column", "value", "candidate", "blamed"),
    [
        ("text", "a blue star", 1, ("text_agrees", "scores_agree")),
        ("text", "a blue star", 0, ("text_agrees", "scores_agree")),
        ("itm_score", 0.999, 0, ("scores_agree",)),
        ("itc_score", None, 2, ("scores_agree",)),
        ("logprob", -9.0, 2, ("scores_agree",)),
        ("seed", 5, 1, ("text_agrees", "scores_agree")),
        ("reason", "empty_text", 0, ("reason_agrees",)),
    ],
)
def test_what_was_changed_in_a_part_is_found(
    column: str, value: Any, candidate: int, blamed: tuple[str, ...], workspace: Workspace, models: Models
) -> None:
    def change(row: dict[str, Any]) -> None:
        if (row["uid"], row["candidate"]) == ("a00001", candidate):
            row[column] = value

    rewrite(part_of(workspace), change)
    found = replay(read_recorded(workspace, 1, SHARD, "a00001"), *models)
    assert not found["agrees"]
    assert [row["candidate"] for row in found["candidates"] if not row["agrees"]] == [candidate]
    verdicts = {name: found["candidates"][candidate][name] for name in ("text_agrees", "scores_agree", "reason_agrees")}
    assert {name for name, agrees in verdicts.items() if not agrees} == set(blamed)
    assert replay(read_recorded(workspace, 1, SHARD, "a00002"), *models)["agrees"]


def test_another_image_under_the_same_uid_is_found(
    workspace: Workspace, models: Models, make_shard: Callable[..., Path]
) -> None:
    make_shard(SHARD, [1, 9, 3, b"no image", 4, 5])
    found = replay(read_recorded(workspace, 1, SHARD, "a00001"), *models)
    assert not found["image_agrees"]
    assert not found["agrees"]


def test_a_part_that_does_not_tell_its_settings_is_replayed_with_the_default_ones_and_says_so(
    workspace: Workspace, models: Models
) -> None:
    rewrite(part_of(workspace), nothing, forget="capfilt.generation")
    recorded = read_recorded(workspace, 1, SHARD, "a00001")
    assert (recorded.generation, recorded.told) == (GenerationConfig(), False)
    assert replay(recorded, *models)["generation_recorded"] is False
    assert replay(changed(recorded, generation=GENERATION), *models)["agrees"]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [("filter", "another", "name several filters"), ("captioner", None, "name several captioners")],
)
def test_a_part_of_several_models_is_refused(
    column: str, value: str | None, message: str, workspace: Workspace
) -> None:
    rewrite(part_of(workspace), lambda row: row.update({column: value}))
    with pytest.raises(ShardError, match=message):
        read_recorded(workspace, 1, SHARD, "a00001")


def test_a_text_without_a_seed_and_an_image_that_is_gone_are_named(workspace: Workspace, models: Models) -> None:
    rewrite(part_of(workspace), lambda row: row.update(seed=None))
    with pytest.raises(ShardError, match="synthetic text 1 of 'a00001' has no seed"):
        replay(read_recorded(workspace, 1, SHARD, "a00001"), *models)
    with pytest.raises(InputError, match=rf"{SHARD}\.parquet: has no image 'gone'"):
        read_recorded(workspace, 1, SHARD, "gone")


def test_a_model_is_found_by_its_digest_in_whatever_round_has_it(
    workspace: Workspace, models: Models, checkpoints: tuple[Path, Path]
) -> None:
    captioner = models[0].digest
    with pytest.raises(CheckpointError, match=rf"no round of .* has the captioner {captioner}.*--captioner SRC"):
        find_by_digest(workspace, "captioner", captioner)
    workspace.round(3).captioner.parent.mkdir(parents=True)
    workspace.round(3).med.symlink_to(checkpoints[0])
    assert find_by_digest(workspace, "captioner", captioner) == workspace.round(3).med
    assert find_by_digest(workspace, "captioner", captioner, str(checkpoints[0])) == str(checkpoints[0])


def test_a_model_of_another_digest_is_refused_and_one_whose_weights_were_changed_too(
    workspace: Workspace, models: Models, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    captioner, filter = models
    with pytest.raises(
        CheckpointError, match=rf"its digest is {filter.digest}; .* with the captioner {captioner.digest}"
    ):
        find_by_digest(workspace, "captioner", captioner.digest, str(checkpoints[1]))
    forged = tmp_path / "forged"
    forged.mkdir()
    for file in checkpoints[0].iterdir():
        (forged / file.name).write_bytes(file.read_bytes())
    (forged / "model.safetensors").write_bytes((checkpoints[1] / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=rf"has the digest {filter.digest}, and config\.json beside it says"):
        find_by_digest(workspace, "captioner", captioner.digest, str(forged))
