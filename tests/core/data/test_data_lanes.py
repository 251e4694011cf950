"""The order of training pairs: every pair once in an epoch, shuffled, dealt out to lanes that read only their own."""

import itertools
from collections import Counter
from collections.abc import Callable, Collection

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from blip_core.data import lanes as lanes_module
from blip_core.data.lanes import Lanes, Progress, Unit
from blip_core.data.pairs import ImageText, PairSource, read_pairs
from blip_core.data.transforms import eval_transform, train_transform
from blip_core.data.workers import Share
from blip_core.errors import InputError

PLAIN = eval_transform(4)


@pytest.fixture
def sources(write_pairs: Callable[..., PairSource]) -> list[PairSource]:
    """48 pairs in 24 row groups of two."""
    return [write_pairs("a", range(30), row_group_size=2), write_pairs("b", range(30, 48), row_group_size=2)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Unit]:
    """Every unit whose images have been read, in order."""
    seen: list[Unit] = []
    files: dict[str, int] = {}

    def recorded(source: PairSource, group: int, shares: Collection[int] = (0,), parts: int = 1) -> list[ImageText]:
        file = files.setdefault(source.path.name, len(files))
        seen.extend(Unit(file, group, share, parts) for share in shares)
        return read_pairs(source, group, shares, parts)

    monkeypatch.setattr(lanes_module, "read_pairs", recorded)
    return seen


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every image that has been decoded."""
    seen: list[bytes] = []
    decode = lanes_module.decode_image

    def recorded(image: bytes) -> object:
        seen.append(image)
        return decode(image)

    monkeypatch.setattr(lanes_module, "decode_image", recorded)
    return seen


def numbers(lanes: Lanes, count: int) -> list[int]:
    return [int(sample.text) for sample in itertools.islice(lanes.samples(0, 1, {}), count)]


@pytest.mark.parametrize("lanes", [1, 2, 3, 8, 12, 24])
def test_an_epoch_of_equal_lanes_has_every_pair_exactly_once(sources: list[PairSource], lanes: int) -> None:
    taken = numbers(Lanes(sources, lanes, PLAIN, seed=3), 3 * 48)
    assert [sorted(taken[start : start + 48]) for start in (0, 48, 96)] == [list(range(48))] * 3


@pytest.mark.parametrize("lanes", [1, 5, 8, 64])
def test_lanes_of_unequal_length_share_every_pair_of_each_epoch(
    write_pairs: Callable[..., PairSource], lanes: int
) -> None:
    sources = [write_pairs("a", range(7), 3), write_pairs("b", range(7, 30), 10), write_pairs("c", [30], 1)]
    reader = Lanes(sources, lanes, PLAIN, seed=1)
    for epoch in (0, 1):
        owned = [unit for lane in range(lanes) for unit in reader.units_of(lane, epoch)]
        texts = [
            pair.text
            for unit in owned
            for pair in read_pairs(sources[unit.source], unit.group, [unit.share], unit.parts)
        ]
        assert sorted(map(int, texts)) == list(range(31))


def test_the_order_changes_with_each_epoch_and_seed_and_not_otherwise(sources: list[PairSource]) -> None:
    taken = numbers(Lanes(sources, 4, PLAIN, seed=3), 96)
    assert taken[:48] != sorted(taken[:48])
    assert taken[:48] != taken[48:]
    assert numbers(Lanes(sources, 4, PLAIN, seed=3), 96) == taken
    assert numbers(Lanes(sources, 4, PLAIN, seed=4), 48) != taken[:48]


def test_a_window_of_a_lane_is_shuffled(write_pairs: Callable[..., PairSource]) -> None:
    lane = numbers(Lanes([write_pairs("one", range(40), 40)], 1, PLAIN, seed=0), 40)
    assert sorted(lane) == list(range(40))
    neighbours = sum(abs(after - before) == 1 for before, after in itertools.pairwise(lane))
    assert neighbours < 10


def test_one_row_group_feeds_all_lanes_evenly(write_pairs: Callable[..., PairSource]) -> None:
    lanes = Lanes([write_pairs("one", range(40), 40)], 8, PLAIN, seed=0)
    sizes = [len(lanes.units_of(lane, 0)) for lane in range(8)]
    assert sizes == [4] * 8


def test_lanes_without_a_pair_in_an_epoch_go_on_to_the_next(write_pairs: Callable[..., PairSource]) -> None:
    taken = numbers(Lanes([write_pairs("few", range(3))], 8, PLAIN, seed=0), 240)
    assert set(taken) == {0, 1, 2}
    assert min(Counter(taken).values()) > 40


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_each_process_and_worker_reads_only_its_own_units(
    sources: list[PairSource], reads: list[Unit], world: int, workers: int
) -> None:
    lanes = Lanes(sources, 8, PLAIN, seed=3)
    epoch: list[Unit] = []
    for rank, worker in itertools.product(range(world), range(workers)):
        reads.clear()
        share = Share(lanes, 0, rank, world, {})
        list(itertools.islice(share.samples(worker, workers), 48 // (world * workers)))
        own = [lane for lane in range(8) if lane % (world * workers) == rank + world * worker]
        assert Counter(reads) == Counter(unit for lane in own for unit in lanes.units_of(lane, 0))
        epoch += reads
    assert Counter(epoch) == Counter(lanes.units)


@pytest.mark.parametrize(("lanes", "groups"), [(2, 8), (8, 2), (16, 1), (20, 1)])
def test_all_lanes_together_hold_sixteen_row_groups_but_one_each_at_least(
    write_pairs: Callable[..., PairSource], reads: list[Unit], lanes: int, groups: int
) -> None:
    reader = Lanes([write_pairs("many", range(160), row_group_size=1)], lanes, PLAIN, seed=0)
    numbers(reader, lanes)
    assert len(reads) == lanes * groups


def test_shares_of_one_row_group_are_read_at_once(
    write_pairs: Callable[..., PairSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(source: PairSource, group: int, shares: Collection[int], parts: int) -> list[ImageText]:
        calls.append(len(shares))
        return read_pairs(source, group, shares, parts)

    monkeypatch.setattr(lanes_module, "read_pairs", counted)
    numbers(Lanes([write_pairs("one", range(64), row_group_size=64)], 2, PLAIN, seed=0), 2)
    assert calls == [4, 4]


@pytest.mark.parametrize("consumed", [1, 6, 9, 12, 13, 30, 61])
def test_a_lane_goes_on_where_it_was_without_reading_or_decoding_what_was_before(
    sources: list[PairSource], reads: list[Unit], decoded: list[bytes], consumed: int
) -> None:
    augmented = train_transform(4, 0.3, flip=True)
    whole = list(itertools.islice(Lanes(sources, 4, augmented, seed=5).samples(2, 4, {}), 80))
    before = len(reads)
    jumped = Lanes(sources, 4, augmented, seed=5)
    reads.clear()
    decoded.clear()
    (sample,) = itertools.islice(jumped.samples(2, 4, {2: Progress(consumed)}), 1)
    assert sample.text == whole[consumed].text
    assert torch.equal(sample.image, whole[consumed].image)
    assert sample.progress == whole[consumed].progress == Progress(consumed + 1)
    assert len(decoded) == 1
    assert len(reads) <= 4 < before  # a window: sixteen row groups over four lanes


def test_augmentation_follows_from_the_seed_alone(write_pairs: Callable[..., PairSource]) -> None:
    source = write_pairs("one", [7])

    def pictures(seed: int) -> list[bytes]:
        torch.manual_seed(seed * 17 + 5)
        lanes = Lanes([source], 2, train_transform(8, 0.2, flip=True), seed)
        return [sample.image.numpy().tobytes() for sample in itertools.islice(lanes.samples(0, 1, {}), 8)]

    assert pictures(0) == pictures(0)
    assert set(pictures(0)).isdisjoint(pictures(1))
    assert len(set(pictures(0))) == 8


def test_images_that_cannot_be_decoded_are_counted_and_another_takes_their_place(
    write_pairs: Callable[..., PairSource],
) -> None:
    lanes = Lanes([write_pairs("some", range(20), broken=[3, 8, 15])], 1, PLAIN, seed=0)
    samples = list(itertools.islice(lanes.samples(0, 1, {}), 34))
    assert Counter(int(sample.text) for sample in samples) == dict.fromkeys(set(range(20)) - {3, 8, 15}, 2)
    last = samples[-1].progress
    assert last.consumed - last.undecodable == 34
    assert 3 <= last.undecodable <= 6
    again = lanes.samples(0, 1, {0: samples[20].progress})
    assert [next(again).progress for _ in range(13)] == [sample.progress for sample in samples[21:]]


def test_a_missing_image_counts_as_one_that_cannot_be_decoded(write_pairs: Callable[..., PairSource]) -> None:
    source = write_pairs("hole", range(6))
    rows = pq.read_table(source.path).to_pylist()
    rows[2]["image"] = None
    pq.write_table(pa.Table.from_pylist(rows), source.path)
    *_, last = itertools.islice(Lanes([source], 1, PLAIN, seed=0).samples(0, 1, {}), 11)
    assert last.progress.undecodable >= 2 - (last.progress.consumed < 12)
    assert last.text != "2"


def test_pairs_none_of_which_can_be_decoded_are_an_error_and_no_endless_search(
    write_pairs: Callable[..., PairSource],
) -> None:
    lanes = Lanes([write_pairs("bad", range(4), broken=range(4))], 8, PLAIN, seed=0)
    with pytest.raises(InputError, match=r"none of the 4 images in .*bad\.parquet can be decoded"):
        next(lanes.samples(0, 1, {}))


def test_one_whole_image_among_broken_ones_is_found_by_every_lane(write_pairs: Callable[..., PairSource]) -> None:
    lanes = Lanes([write_pairs("bad", range(30), broken=range(29))], 4, PLAIN, seed=0)
    assert numbers(lanes, 8) == [29] * 8


def test_a_position_behind_files_that_are_empty_now_is_an_error_and_no_endless_search(
    write_pairs: Callable[..., PairSource],
) -> None:
    source = write_pairs("gone", range(4))
    rows = pq.read_table(source.path)
    pq.write_table(rows.set_column(1, "caption", pa.array([""] * 4)), source.path)
    with pytest.raises(InputError, match=r"none found in .*gone\.parquet"):
        next(Lanes([source], 2, PLAIN, seed=0).samples(0, 1, {0: Progress(9)}))
