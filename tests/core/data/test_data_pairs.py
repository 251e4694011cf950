"""Where pairs come from: which rows of human tables, shards and corpora count, and what identifies them all."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip_core.corpus.schemas import CORPUS_SCHEMA, CORPUS_VERSION, write_part
from blip_core.data.pairs import (
    PairSource,
    corpus_sources,
    count_pairs,
    human_sources,
    iterate_texts,
    pairs_digest,
    read_pairs,
    row_groups,
    web_sources,
)
from blip_core.data.shards import SHARD_SCHEMA, write_shard
from blip_core.data.stream import PairStream
from blip_core.data.tables import PairTable
from blip_core.data.transforms import eval_transform
from blip_core.errors import InputError, ShardError


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (number, 255 - number, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def pairs_of(sources: list[PairSource]) -> list[tuple[int, str]]:
    """All pairs of the sources: which picture it is, read back from its colour, and the text."""
    pairs = [
        pair for source in sources for group in range(len(row_groups(source))) for pair in read_pairs(source, group)
    ]
    return [(Image.open(io.BytesIO(pair.image or b"")).getpixel((0, 0))[0], pair.text) for pair in pairs]


def human(path: Path, numbers: range, **options: Any) -> PairSource:
    rows = [{"image": png(number), "caption": f"picture {number}"} for number in numbers]
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return human_sources(PairTable(str(path)))[0]


def shard(path: Path, rows: list[dict[str, Any]]) -> Path:
    write_shard(path, [pa.Table.from_pylist(rows, SHARD_SCHEMA)], "settings", len(rows))
    return path


def test_each_text_of_an_image_is_a_pair_with_the_same_image_id(tmp_path: Path) -> None:
    rows = [
        {"image": png(1), "caption": ["one", "uno", " "]},
        {"image": png(2), "caption": ["two"]},
        {"image": png(3), "caption": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "lists.parquet")
    source = human_sources(PairTable(str(tmp_path / "lists.parquet")))[0]
    assert pairs_of([source]) == [(1, "one"), (1, "uno"), (2, "two")]
    batch = next(PairStream([source], 3, eval_transform(4), seed=0, lanes=1).batches())
    by_text = dict(zip(batch.texts, batch.image_ids.tolist(), strict=True))
    assert by_text["one"] == by_text["uno"] != by_text["two"]
    assert min(by_text.values()) >= 0


def test_images_may_be_structs_and_columns_have_other_names(tmp_path: Path) -> None:
    rows = [{"picture": {"bytes": png(number), "path": "x.png"}, "text": f"p{number}"} for number in (5, 6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "structs.parquet")
    source = human_sources(PairTable(str(tmp_path / "structs.parquet"), image="picture", caption="text"))[0]
    assert pairs_of([source]) == [(5, "p5"), (6, "p6")]
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
    assert pairs_of(sources) == [(1, "here"), (4, "there")]


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
    assert sorted(pairs_of(sources)) == [(1, "web 1"), (1, "written 1"), (3, "written 3"), (5, "web 5")]
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
        assert pairs_of(one) == pairs_of(other)


def test_the_digest_changes_with_texts_and_images_and_nothing_else(tmp_path: Path) -> None:
    digest = pairs_digest([human(tmp_path / "a.parquet", range(4))])
    assert pairs_digest([human(tmp_path / "moved.parquet", range(4), row_group_size=1)]) == digest
    assert pairs_digest([human(tmp_path / "b.parquet", range(1, 5))]) != digest
    rows = [{"image": png(number), "caption": f"Picture {number}"} for number in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    assert pairs_digest(human_sources(PairTable(str(tmp_path / "c.parquet")))) != digest


def test_shares_of_a_row_group_part_its_rows_and_their_counts(tmp_path: Path) -> None:
    captions = [["a", "b"], ["c"], [], ["d"], ["e", "f", "g"], ["h"], ["i"]]
    rows = [{"image": png(number), "caption": texts} for number, texts in enumerate(captions)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "lists.parquet")
    source = PairSource(tmp_path / "lists.parquet")
    assert row_groups(source) == [7]
    assert count_pairs(source, 0) == [9]
    assert count_pairs(source, 0, 3) == [4, 4, 1]
    shares = [[pair.text for pair in read_pairs(source, 0, [share], 3)] for share in range(3)]
    assert shares == [["a", "b", "d", "i"], ["c", "e", "f", "g"], ["h"]]
    assert read_pairs(source, 0, [0, 2], 3) == [pair for pair in read_pairs(source, 0) if pair.text in "abdhi"]


def test_more_rows_than_are_decoded_at_once_keep_their_images(tmp_path: Path) -> None:
    source = human(tmp_path / "long.parquet", range(200))
    assert pairs_of([source]) == [(number, f"picture {number}") for number in range(200)]
    kept = [pair.text for pair in read_pairs(source, 0, [5], 50)]
    assert kept == [f"picture {number}" for number in (5, 55, 105, 155)]


def test_a_row_without_bytes_is_a_pair_without_an_image(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([png(1), None], pa.binary()), "caption": ["one", "two"]})
    pq.write_table(table, tmp_path / "hole.parquet")
    assert read_pairs(PairSource(tmp_path / "hole.parquet"), 0) == [(png(1), "one"), (None, "two")]


def test_counting_reads_no_image(tmp_path: Path) -> None:
    path = tmp_path / "counted.parquet"
    source = human(path, range(5), compression=None, use_dictionary=False)
    data = path.read_bytes()
    start = pq.read_metadata(path).row_group(0).column(0).data_page_offset
    path.write_bytes(data[:start] + bytes(200) + data[start + 200 :])
    with pytest.raises(ShardError, match=r"counted\.parquet: row group 0 cannot be read"):
        read_pairs(source, 0)
    assert count_pairs(source, 0, 2) == [3, 2]


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    source = human(tmp_path / "a.parquet", range(12), row_group_size=3)
    data = source.path.read_bytes()
    source.path.write_bytes(data[: len(data) // 2])
    for use in (row_groups, lambda torn: read_pairs(torn, 0), lambda torn: count_pairs(torn, 0)):
        with pytest.raises(ShardError, match=r"a\.parquet: cannot be read as Parquet"):
            use(source)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    source = human(tmp_path / "a.parquet", range(2))
    with pytest.raises(InputError, match=r"a\.parquet: has no column 'text'; its columns are image, caption"):
        row_groups(PairSource(source.path, caption="text"))
