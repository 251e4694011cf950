"""The stream of training pairs: complete, shuffled, the same for the same seed, and started from any batch."""

import io
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from blip_core.corpus.schemas import CORPUS_SCHEMA, CORPUS_VERSION, write_part
from blip_core.data.pairs import (
    PairBatch,
    PairSource,
    PairStream,
    corpus_sources,
    human_source,
    iterate_texts,
    pairs_digest,
    web_sources,
)
from blip_core.data.shards import SHARD_SCHEMA, write_shard
from blip_core.data.tables import PairTable
from blip_core.data.transforms import eval_transform, train_transform
from blip_core.errors import InputError, ShardError

PLAIN = eval_transform(4)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (number, 255 - number, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def red(batch: PairBatch) -> list[int]:
    """Which picture stands at each place, read back from its colour."""
    return [round((value.item() * 0.26862954 + 0.48145466) * 255) for value in batch.images[:, 0, 0, 0]]


def human(path: Path, numbers: range, **options: Any) -> PairSource:
    rows = [{"image": png(number), "caption": f"picture {number}"} for number in numbers]
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return human_source(PairTable(str(path)))


def shard(path: Path, rows: list[dict[str, Any]]) -> Path:
    write_shard(path, [pa.Table.from_pylist(rows, SHARD_SCHEMA)], "settings", len(rows))
    return path


def epoch(stream: PairStream, batches: int, first: int = 0) -> list[tuple[int, str]]:
    taken = itertools.islice(stream.batches(first), batches)
    return [pair for batch in taken for pair in zip(red(batch), batch.texts, strict=True)]


@pytest.fixture
def sources(tmp_path: Path) -> list[PairSource]:
    return [
        human(tmp_path / "a.parquet", range(12), row_group_size=3),
        human(tmp_path / "b.parquet", range(12, 20), row_group_size=2),
    ]


def test_an_epoch_has_every_pair_exactly_once(sources: list[PairSource]) -> None:
    pairs = epoch(PairStream(sources, 4, PLAIN, seed=3), 15)
    expected = Counter((number, f"picture {number}") for number in range(20))
    assert [Counter(pairs[start : start + 20]) for start in (0, 20, 40)] == [expected] * 3


def test_the_order_changes_with_each_epoch_and_seed_and_not_otherwise(sources: list[PairSource]) -> None:
    pairs = epoch(PairStream(sources, 5, PLAIN, seed=3), 8)
    assert pairs[:20] != sorted(pairs[:20])
    assert pairs[:20] != pairs[20:]
    assert epoch(PairStream(sources, 5, PLAIN, seed=3), 8) == pairs
    assert epoch(PairStream(sources, 5, PLAIN, seed=4), 4) != pairs[:20]


def test_more_row_groups_than_a_window_are_all_read(tmp_path: Path) -> None:
    source = human(tmp_path / "many.parquet", range(40), row_group_size=1)
    assert sorted(epoch(PairStream([source], 8, PLAIN, seed=0), 5)) == [(n, f"picture {n}") for n in range(40)]


def test_starting_at_a_batch_is_passing_over_those_before(sources: list[PairSource]) -> None:
    stream = PairStream(sources, 3, train_transform(4, 0.3, flip=True), seed=1)
    whole = list(itertools.islice(stream.batches(), 16))
    for first in (1, 6, 7, 13):
        batch = next(stream.batches(first))
        assert torch.equal(batch.images, whole[first].images)
        assert batch.texts == whole[first].texts
        assert torch.equal(batch.image_ids, whole[first].image_ids)


def test_augmentation_follows_from_the_seed_alone(tmp_path: Path) -> None:
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pq.write_table(pa.table({"image": [buffer.getvalue()], "caption": ["noise"]}), tmp_path / "one.parquet")

    def pictures(seed: int) -> torch.Tensor:
        torch.manual_seed(seed * 17 + 5)
        source = PairSource(tmp_path / "one.parquet")
        return next(PairStream([source], 6, train_transform(8, 0.2, flip=True), seed).batches()).images

    assert torch.equal(pictures(0), pictures(0))
    assert not torch.equal(pictures(0), pictures(1))
    assert len({picture.numpy().tobytes() for picture in pictures(0)}) == 6


def test_processes_share_the_pairs_without_overlap(sources: list[PairSource]) -> None:
    alone = epoch(PairStream(sources, 6, PLAIN, seed=3), 3)
    parts = [PairStream(sources, 2, PLAIN, seed=3, rank=rank, world=3) for rank in range(3)]
    shared = [epoch(part, 3) for part in parts]
    assert [shared[number % 3][number // 3] for number in range(18)] == alone
    assert epoch(parts[1], 2, first=1) == shared[1][2:]


def test_each_text_of_an_image_is_a_pair_with_the_same_image_id(tmp_path: Path) -> None:
    rows = [
        {"image": png(1), "caption": ["one", "uno", " "]},
        {"image": png(2), "caption": ["two"]},
        {"image": png(3), "caption": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "lists.parquet")
    stream = PairStream([human_source(PairTable(str(tmp_path / "lists.parquet")))], 3, PLAIN, seed=0)
    batch = next(stream.batches())
    assert sorted(zip(red(batch), batch.texts, strict=True)) == [(1, "one"), (1, "uno"), (2, "two")]
    by_text = dict(zip(batch.texts, batch.image_ids.tolist(), strict=True))
    assert by_text["one"] == by_text["uno"] != by_text["two"]
    assert min(by_text.values()) >= 0


def test_images_may_be_structs_and_columns_have_other_names(tmp_path: Path) -> None:
    rows = [{"picture": {"bytes": png(number), "path": "x.png"}, "text": f"p{number}"} for number in (5, 6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "structs.parquet")
    source = human_source(PairTable(str(tmp_path / "structs.parquet"), image="picture", caption="text"))
    assert sorted(epoch(PairStream([source], 2, PLAIN, seed=0), 1)) == [(5, "p5"), (6, "p6")]
    rows[0]["picture"]["path"] = "moved.png"
    digest = pairs_digest([source])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "structs.parquet")
    assert pairs_digest([source]) == digest


def test_shards_give_the_images_they_have(tmp_path: Path) -> None:
    rows = [
        {"uid": "a", "caption": "here", "status": "ok", "sha256": "1", "image": png(1)},
        {"uid": "b", "caption": "gone", "status": "failed", "reason": "not_found"},
        {"uid": "c", "caption": None, "status": "ok", "sha256": "3", "image": png(3)},
        {"uid": "d", "caption": "there", "status": "ok", "sha256": "4", "image": png(4)},
    ]
    sources = web_sources([shard(tmp_path / "s.parquet", rows)])
    assert list(iterate_texts(sources)) == ["here", "there"]
    assert sorted(epoch(PairStream(sources, 2, PLAIN, seed=0), 1)) == [(1, "here"), (4, "there")]


def test_a_corpus_is_joined_to_the_images_of_its_shards(tmp_path: Path) -> None:
    for name, numbers in (("s1", (1, 2, 3)), ("s2", (4, 5)), ("s3", (6,))):
        rows = [
            {"uid": f"u{n}", "caption": f"web {n}", "status": "ok", "sha256": str(n), "image": png(n)} for n in numbers
        ]
        shard(tmp_path / "shards" / f"{name}.parquet", rows)

    def part(name: str, rows: list[tuple[str, str, str]]) -> None:
        table = [{"uid": uid, "shard": name, "text": text, "source": source} for uid, text, source in rows]
        target = tmp_path / "corpus" / f"{name}.parquet"
        write_part(target, pa.Table.from_pylist(table, CORPUS_SCHEMA), CORPUS_VERSION, "mark")

    part("s1", [("u1", "web 1", "web"), ("u1", "written 1", "synthetic"), ("u3", "written 3", "synthetic")])
    part("s2", [("u5", "web 5", "web")])
    part("s3", [])
    part("human-0", [("u9", "of a person", "human")])
    sources = corpus_sources(tmp_path / "corpus", tmp_path / "shards")
    pairs = epoch(PairStream(sources, 4, PLAIN, seed=0), 1)
    assert sorted(pairs) == [(1, "web 1"), (1, "written 1"), (3, "written 3"), (5, "web 5")]
    assert sorted(iterate_texts(sources)) == ["web 1", "web 5", "written 1", "written 3"]


def test_the_names_of_shards_do_not_decide_the_order(tmp_path: Path) -> None:
    def pairs(names: tuple[str, str], folder: Path) -> tuple[list[PairSource], list[PairSource]]:
        for name, numbers in zip(names, ((1, 2), (3, 4)), strict=True):
            rows = [{"uid": f"u{n}", "caption": f"web {n}", "status": "ok", "image": png(n)} for n in numbers]
            shard(folder / "shards" / f"{name}.parquet", rows)
            kept = [{"uid": f"u{n}", "shard": name, "text": f"kept {n}", "source": "web"} for n in numbers]
            part = pa.Table.from_pylist(kept, CORPUS_SCHEMA)
            write_part(folder / "corpus" / f"{name}.parquet", part, CORPUS_VERSION, "mark")
        found = web_sources(sorted((folder / "shards").glob("*.parquet")))
        return found, corpus_sources(folder / "corpus", folder / "shards")

    here, there = pairs(("a", "b"), tmp_path / "here"), pairs(("b", "a"), tmp_path / "there")
    for one, other in zip(here, there, strict=True):
        assert pairs_digest(one) == pairs_digest(other)
        assert epoch(PairStream(one, 2, PLAIN, seed=0), 4) == epoch(PairStream(other, 2, PLAIN, seed=0), 4)


def test_the_digest_changes_with_texts_and_images_and_nothing_else(tmp_path: Path) -> None:
    digest = pairs_digest([human(tmp_path / "a.parquet", range(4))])
    assert pairs_digest([human(tmp_path / "moved.parquet", range(4), row_group_size=1)]) == digest
    assert pairs_digest([human(tmp_path / "b.parquet", range(1, 5))]) != digest
    rows = [{"image": png(number), "caption": f"Picture {number}"} for number in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    assert pairs_digest([human_source(PairTable(str(tmp_path / "c.parquet")))]) != digest


def test_sources_without_a_pair_are_named(tmp_path: Path) -> None:
    failed = shard(tmp_path / "failed.parquet", [{"uid": "a", "caption": "x", "status": "failed", "reason": "dns"}])
    with pytest.raises(InputError, match=r"training pairs: none found in .*failed\.parquet"):
        next(PairStream(web_sources([failed]), 2, PLAIN, seed=0).batches())
    with pytest.raises(InputError, match="none found in no file"):
        next(PairStream([], 2, PLAIN, seed=0).batches())


def test_a_pair_without_image_bytes_is_named(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([png(1), None], pa.binary()), "caption": ["one", "two"]})
    pq.write_table(table, tmp_path / "hole.parquet")
    stream = PairStream([human_source(PairTable(str(tmp_path / "hole.parquet")))], 2, PLAIN, seed=0)
    with pytest.raises(InputError, match=r"hole\.parquet: .*no bytes in column 'image'"):
        next(stream.batches())


def test_a_torn_file_is_named(tmp_path: Path, sources: list[PairSource]) -> None:
    path = sources[0].path
    data = path.read_bytes()
    stream = PairStream(sources, 2, PLAIN, seed=0)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ShardError, match=r"a\.parquet"):
        epoch(stream, 10)
    with pytest.raises(ShardError, match=r"a\.parquet"):
        PairStream(sources, 2, PLAIN, seed=0)
