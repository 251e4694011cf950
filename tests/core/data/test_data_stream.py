"""The training stream: the same batches for any number of processes, gone on with exactly where it stood."""

import itertools
import json
import time
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor

from blip_core.data.pairs import PairSource
from blip_core.data.shards import SHARD_SCHEMA, write_shard
from blip_core.data.stream import PairBatch, PairStream, Position, merge_positions
from blip_core.data.transforms import eval_transform, train_transform
from blip_core.errors import ConfigError, InputError

PLAIN = eval_transform(4)
AUGMENTED = train_transform(8, 0.3, flip=True, augment=True)


@pytest.fixture
def sources(write_pairs: Callable[..., PairSource]) -> list[PairSource]:
    """45 pairs with an image and 5 without in 18 row groups."""
    broken = [3, 11, 12, 31, 44]
    return [write_pairs("a", range(30), 3, broken), write_pairs("b", range(30, 50), 2, broken)]


def ranks_of(sources: list[PairSource], world: int, batch_size: int = 8) -> list[PairStream]:
    return [PairStream(sources, batch_size, AUGMENTED, seed=3, rank=rank, world=world) for rank in range(world)]


def through_json(position: Position) -> Position:
    return json.loads(json.dumps(position))


def same(one: PairBatch, other: PairBatch) -> bool:
    return (
        torch.equal(one.images, other.images)
        and one.texts == other.texts
        and torch.equal(one.image_ids, other.image_ids)
    )


def interleaved(parts: list[PairBatch]) -> PairBatch:
    """The whole batch from those of all processes: its row n is of process n % world."""

    def rows(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors, dim=1).flatten(0, 1)

    texts = [text for texts in zip(*(part.texts for part in parts), strict=True) for text in texts]
    return PairBatch(rows([part.images for part in parts]), texts, rows([part.image_ids for part in parts]))


def test_a_batch_has_images_texts_and_ids_that_are_equal_where_the_image_is(sources: list[PairSource]) -> None:
    ids: dict[str, set[int]] = {}
    for batch in itertools.islice(PairStream(sources, 6, PLAIN, seed=3).batches(), 30):
        assert batch.images.shape == (6, 3, 4, 4)
        assert batch.image_ids.dtype == torch.int64
        for text, image_id in zip(batch.texts, batch.image_ids.tolist(), strict=True):
            ids.setdefault(text, set()).add(image_id)
    assert {len(found) for found in ids.values()} == {1}
    assert len(set.union(*ids.values())) == len(ids) == 45
    assert min(set.union(*ids.values())) >= 0


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_processes_batches_interleaved_are_those_of_one_process(sources: list[PairSource], world: int) -> None:
    alone = PairStream(sources, 8, AUGMENTED, seed=3)
    ranks = ranks_of(sources, world)
    for whole, *parts in itertools.islice(zip(alone.batches(), *(rank.batches() for rank in ranks), strict=True), 15):
        assert {len(part.texts) for part in parts} == {8 // world}
        assert same(interleaved(parts), whole)
    assert sum(rank.undecodable for rank in ranks) == alone.undecodable > 5
    assert merge_positions([rank.position for rank in ranks]) == alone.position


def test_a_stream_goes_on_from_each_position_as_if_it_had_not_stopped(sources: list[PairSource]) -> None:
    stream = PairStream(sources, 4, AUGMENTED, seed=1)
    positions, whole, undecodable = [stream.position], [], [0]
    for batch in itertools.islice(stream.batches(), 40):
        whole.append(batch)
        positions.append(stream.position)
        undecodable.append(stream.undecodable)
    for start in (0, 1, 5, 13, 29):
        again = PairStream(sources, 4, AUGMENTED, seed=1)
        batches = again.batches(through_json(positions[start]))
        assert (again.position, again.undecodable) == (positions[start], undecodable[start])
        assert all(map(same, itertools.islice(batches, 10), whole[start:]))
        assert (again.position, again.undecodable) == (positions[start + 10], undecodable[start + 10])


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 4), (4, 2)])
def test_another_number_of_processes_goes_on_where_the_last_stood(
    sources: list[PairSource], before: int, after: int
) -> None:
    ranks = ranks_of(sources, before)
    for rank in ranks:
        list(itertools.islice(rank.batches(), 9))
    position = through_json(merge_positions([rank.position for rank in ranks]))
    alone = list(itertools.islice(PairStream(sources, 8, AUGMENTED, seed=3).batches(), 16))[9:]
    later = ranks_of(sources, after)
    for whole, *parts in zip(alone, *(rank.batches(position) for rank in later), strict=False):
        assert same(interleaved(parts), whole)
    assert position["sample"] == 72


def test_a_batch_of_another_size_goes_on_with_the_next_sample(sources: list[PairSource]) -> None:
    stream = PairStream(sources, 6, PLAIN, seed=3)
    first = list(itertools.islice(stream.batches(), 7))
    ranks = ranks_of(sources, 4)
    later = [next(rank.batches(stream.position)) for rank in ranks]
    alone = next(PairStream(sources, 50, PLAIN, seed=3).batches()).texts
    assert [text for batch in first for text in batch.texts] == alone[:42]
    # sample 42 belongs to process 42 % 4 = 2
    assert interleaved([later[rank] for rank in (2, 3, 0, 1)]).texts == alone[42:50]


def test_positions_that_do_not_fit_are_refused(sources: list[PairSource]) -> None:
    two = ranks_of(sources, 2)
    positions = [rank.position for rank in two]
    next(two[0].batches())
    with pytest.raises(ConfigError, match="stand at sample 0 of 8 lanes, sample 8 of 8 lanes; all must"):
        merge_positions([two[0].position, positions[1]])
    with pytest.raises(ConfigError, match="stand at nowhere"):
        merge_positions([])
    with pytest.raises(ConfigError, match="16 lanes cannot go on from a position of 8; keep the 8"):
        PairStream(sources, 8, PLAIN, 3, lanes=16).batches(merge_positions(positions))
    with pytest.raises(ConfigError, match="lane 1 is not in it; merge the positions"):
        PairStream(sources, 8, PLAIN, 3).batches(positions[0])


def test_numbers_that_do_not_divide_are_refused(sources: list[PairSource]) -> None:
    with pytest.raises(ConfigError, match=r"batch_size: a batch of 10 pairs .* 4 processes; take a multiple of 4"):
        PairStream(sources, 10, PLAIN, 3, world=4)
    with pytest.raises(ConfigError, match=r"lanes: 8 lanes .* 12 readers \(4 processes x 3 workers\); .* of 12"):
        PairStream(sources, 8, PLAIN, 3, world=4, workers=3)
    with pytest.raises(ConfigError, match=r"lanes: 8 lanes .* 3 readers \(3 processes x 1 workers\)"):
        PairStream(sources, 9, PLAIN, 3, world=3)


def test_sources_without_a_pair_are_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    import pyarrow as pa

    path = tmp_path_factory.mktemp("shards") / "failed.parquet"
    row = {"uid": "a", "caption": "x", "status": "failed", "reason": "dns"}
    write_shard(path, [pa.Table.from_pylist([row], SHARD_SCHEMA)], "settings", 1)
    with pytest.raises(InputError, match=r"training pairs: none found in .*failed\.parquet"):
        next(PairStream([PairSource(path)], 2, PLAIN, seed=0).batches())
    with pytest.raises(InputError, match="none found in no file"):
        next(PairStream([], 2, PLAIN, seed=0).batches())


def test_what_is_waited_for_is_the_batch_and_not_the_training(sources: list[PairSource]) -> None:
    def slow(picture: Image.Image) -> Tensor:
        time.sleep(0.01)
        return PLAIN(picture)

    stream = PairStream(sources, 4, slow, seed=3)
    began = time.monotonic()
    for _ in itertools.islice(stream.batches(), 3):
        time.sleep(0.1)
    assert 12 * 0.01 <= stream.waited <= time.monotonic() - began - 2 * 0.1
