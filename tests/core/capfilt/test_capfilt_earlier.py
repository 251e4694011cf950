"""What a round takes over from earlier ones: parts of the same shard, models and settings; and the models."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from blip_core.capfilt.annotate import annotate_shard
from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.earlier import find_model, take_over_parts
from blip_core.capfilt.filter import Filter
from blip_core.capfilt.parts import AnnotateConfig, ShardJob
from blip_core.errors import CheckpointError
from blip_core.med.decoding import GenerationConfig
from blip_core.workspace import Workspace

CONFIG = AnnotateConfig(batch_size=4, workers=0)
GENERATION = GenerationConfig(max_length=5, min_length=1)
SEED = 3


class Annotated(NamedTuple):
    """A workspace with two shards, annotated in round 1."""

    workspace: Workspace
    shards: list[Path]
    models: tuple[Captioner, Filter]

    def annotate(self, round: int, seed: int = SEED) -> None:
        for shard in self.shards:
            job = ShardJob.of(self.workspace.round(round), shard)
            annotate_shard(shard, job.target, *self.models, CONFIG, GENERATION, seed, job.embeddings)

    def take_over(self, round: int, seed: int = SEED) -> int:
        earlier = [self.workspace.round(number) for number in reversed(range(1, round))]
        digests = [model.digest for model in self.models]
        target = self.workspace.round(round)
        return take_over_parts(self.shards, target, earlier, *digests, CONFIG, GENERATION, seed)


@pytest.fixture
def annotated(make_shard: Callable[..., Path], models: tuple[Captioner, Filter], tmp_path: Path) -> Annotated:
    made = Annotated(Workspace(tmp_path), [make_shard("aa", [1, 2, 3]), make_shard("bb", [4])], models)
    made.annotate(1)
    return made


def parts(annotated: Annotated, round: int) -> dict[str, bytes]:
    return {part.stem: part.read_bytes() for part in annotated.workspace.round(round).annotations.iterdir()}


def vectors(annotated: Annotated, round: int) -> dict[str, bytes]:
    return {part.stem: part.read_bytes() for part in annotated.workspace.round(round).embeddings.glob("*")}


def test_parts_of_the_same_models_and_settings_are_taken_over_byte_by_byte(annotated: Annotated) -> None:
    assert annotated.take_over(2) == 2
    assert parts(annotated, 2) == parts(annotated, 1)
    assert vectors(annotated, 2) == vectors(annotated, 1) != {}
    assert annotated.take_over(2) == 0


def test_annotations_of_a_round_without_embeddings_are_taken_over_and_the_annotation_adds_what_is_missing(
    annotated: Annotated,
) -> None:
    before = vectors(annotated, 1)
    shutil.rmtree(annotated.workspace.round(1).embeddings)
    assert annotated.take_over(2) == 2
    taken = parts(annotated, 2)
    assert vectors(annotated, 2) == {}
    annotated.annotate(2)
    assert vectors(annotated, 2) == before
    assert parts(annotated, 2) == taken


def test_torn_embeddings_are_not_taken_over(annotated: Annotated) -> None:
    torn = annotated.workspace.round(1).embeddings / "aa.parquet"
    torn.write_bytes(torn.read_bytes()[:-20])
    assert annotated.take_over(2) == 2
    assert vectors(annotated, 2).keys() == {"bb"}


def test_parts_of_other_settings_are_not(annotated: Annotated) -> None:
    assert annotated.take_over(2, seed=4) == 0
    assert not annotated.workspace.round(2).annotations.exists()


def test_the_last_round_that_has_a_part_gives_it(annotated: Annotated) -> None:
    annotated.annotate(2, seed=4)
    assert annotated.take_over(3) == 2
    assert parts(annotated, 3) == parts(annotated, 1)
    assert annotated.take_over(4, seed=4) == 2
    assert parts(annotated, 4) == parts(annotated, 2)


def test_a_torn_part_is_left_to_be_made_again_and_what_stands_is_not_touched(annotated: Annotated) -> None:
    torn = annotated.workspace.round(1).annotations / "aa.parquet"
    torn.write_bytes(torn.read_bytes()[:-20])
    own = annotated.workspace.round(2).annotations / "bb.parquet"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"somebody's")
    assert annotated.take_over(2) == 0
    assert parts(annotated, 2) == {"bb": b"somebody's"}


def test_a_part_that_was_taken_over_outlives_the_one_that_it_came_from(annotated: Annotated) -> None:
    annotated.take_over(2)
    before = parts(annotated, 2)
    annotated.annotate(1, seed=4)  # written anew, under the same names
    assert parts(annotated, 2) == before != parts(annotated, 1)


def test_the_models_of_a_rounds_annotations_are_found_in_the_round_that_trained_them(
    annotated: Annotated, checkpoints: tuple[Path, Path]
) -> None:
    workspace = annotated.workspace
    shutil.copytree(checkpoints[0], workspace.round(1).captioner)
    shutil.copytree(checkpoints[1], workspace.round(1).filter)
    shutil.copytree(checkpoints[1], workspace.round(2).captioner)  # another model in the same place
    annotated.take_over(2)
    assert find_model(workspace, workspace.round(2), "captioner") == workspace.round(1).captioner
    assert find_model(workspace, workspace.round(2), "filter") == workspace.round(1).filter
    shutil.rmtree(workspace.round(1).filter)
    with pytest.raises(CheckpointError, match=r"round 2 was annotated by the filter \w+.*checkpoints\.filter"):
        find_model(workspace, workspace.round(2), "filter")
    with pytest.raises(CheckpointError, match="round 3 has no annotations"):
        find_model(workspace, workspace.round(3), "filter")
