"""Reading the user's tables: formats, uids, and what bad input gets."""

import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_core.data.pairs import human_sources
from blip_core.data.tables import Pair, PairTable, WebTable, check_pair_table, iterate_pairs
from blip_core.data.web_rows import read_web_table
from blip_core.errors import InputError

ROWS = [
    {"url": "http://a/1.jpg", "caption": 'a "red" circle, left of a square'},
    {"url": "http://a/2.jpg", "caption": '"unbalanced'},
    {"url": "http://a/3.jpg", "caption": "20190101"},
]
PARQUET = pa.table({"url": [row["url"] for row in ROWS], "caption": [row["caption"] for row in ROWS]})


def _uid(url: str, caption: str, occurrence: int = 0) -> str:
    return hashlib.sha256(b"\0".join([url.encode(), caption.encode(), str(occurrence).encode()])).hexdigest()[:20]


def _csv() -> str:
    quoted = [row["url"] + ',"' + row["caption"].replace('"', '""') + '"' for row in ROWS]
    return "url,caption\n" + "\n".join(quoted) + "\n"


def _write(path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    texts = {
        ".csv": _csv(),
        ".tsv": "url\tcaption\n" + "\n".join(f"{row['url']}\t{row['caption']}" for row in ROWS),
        ".json": json.dumps(ROWS),
        ".jsonl": lines,
    }
    if path.suffix == ".parquet":
        pq.write_table(PARQUET, path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(texts[path.suffix])


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.tsv", "t.json", "t.jsonl", "t.jsonl.gz"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    _write(tmp_path / name)
    expected = sorted((_uid(row["url"], row["caption"]), row["url"], row["caption"], False) for row in ROWS)
    table = read_web_table(WebTable(str(tmp_path / name)))
    assert [tuple(row.values()) for row in table.to_pylist()] == expected


def test_a_table_may_be_an_fsspec_url(tmp_path: Path) -> None:
    _write(tmp_path / "t.csv")
    assert read_web_table(WebTable(f"file://{tmp_path}/t.csv")).num_rows == len(ROWS)


def test_a_list_of_lines_in_a_json_file_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    assert read_web_table(WebTable(str(tmp_path / "t.json"))).num_rows == len(ROWS)


def test_repeated_pairs_get_their_own_uids_and_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"url": ["u", "v", "u", "u", None], "caption": ["c", "c", "c", "d", None]}), path)
    rows = {row.pop("uid"): row for row in read_web_table(WebTable(str(path))).to_pylist()}
    assert rows == {
        _uid("u", "c", 0): {"url": "u", "caption": "c", "duplicate": False},
        _uid("u", "c", 1): {"url": "u", "caption": "c", "duplicate": True},
        _uid("v", "c"): {"url": "v", "caption": "c", "duplicate": False},
        _uid("u", "d"): {"url": "u", "caption": "d", "duplicate": False},
        _uid("", ""): {"url": None, "caption": "", "duplicate": False},
    }


def test_the_order_of_the_input_does_not_matter(tmp_path: Path) -> None:
    forward = pa.table({"url": ["u", "v", "u", "w"], "caption": ["c", "c", "c", "c"]})
    pq.write_table(forward, tmp_path / "a.parquet")
    pq.write_table(forward.take([3, 2, 1, 0]), tmp_path / "b.parquet")
    tables = [read_web_table(WebTable(str(tmp_path / name))) for name in ("a.parquet", "b.parquet")]
    assert tables[0].equals(tables[1])
    assert tables[0]["uid"].to_pylist() == sorted(tables[0]["uid"].to_pylist())


def test_the_users_own_names_and_uids_are_used(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"URL": ["u", "u"], "TEXT": ["c", "c"], "id": [10, 9]}), path)
    rows = read_web_table(WebTable(str(path), url="URL", caption="TEXT", uid="id")).to_pylist()
    assert [(row["uid"], row["duplicate"]) for row in rows] == [("10", False), ("9", False)]


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.parquet: not found"):
        read_web_table(WebTable(str(tmp_path / "gone.parquet")))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("noise.parquet", bytes(range(256)) * 8),
        ("noise.csv", b"\xff\xfe\x00\x01,\n\x80\x81\n"),
        ("noise.tsv", b"\xff\xfe\t\x80\nurl\tcaption\n"),
        ("noise.json", b'[{"url": '),
        ("noise.jsonl", b'{"url": "u", '),
        ("number.json", b"[1, 2]"),
        ("noise.jsonl.gz", b"\x1f\x8b\x08\x00garbage"),
        ("folder.csv", None),
        ("empty.csv", b""),
        ("empty.jsonl", b""),
        ("header.csv", b"url,caption\n"),
        ("empty.json", b"[]"),
        ("table.xlsx", b"PK"),
    ],
)
def test_an_unusable_table_is_an_input_error_that_names_it(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=name):
        read_web_table(WebTable(str(path)))


def test_a_parquet_cut_short_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "torn.parquet"
    pq.write_table(PARQUET, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"torn\.parquet: cannot be read"):
        read_web_table(WebTable(str(path)))


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.tsv", "t.json", "t.jsonl"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, name: str) -> None:
    _write(tmp_path / name)
    with pytest.raises(InputError, match="no column 'text'; its columns are") as caught:
        read_web_table(WebTable(str(tmp_path / name), caption="text"))
    assert "url" in str(caught.value).split("its columns are")[1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"url": ["u", "v"], "caption": ["c", "d"], "id": ["x", "x"]}, "'id' has 'x' more than once"),
        ({"url": ["u", "v"], "caption": ["c", "d"], "id": ["x", None]}, "row 1 has no uid"),
        ({"url": ["u", "v"], "caption": ["c", "d"], "id": [0.5, 1.5]}, "'id' is double"),
        ({"url": [1, 2], "caption": ["c", "d"], "id": ["x", "y"]}, "'url' is int64; it must be string"),
        ({"url": [], "caption": [], "id": []}, "has no rows"),
    ],
)
def test_a_column_that_cannot_be_used_is_named(tmp_path: Path, columns: dict[str, list], message: str) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(InputError, match=message):
        read_web_table(WebTable(str(path), uid="id"))


def test_pairs_come_in_file_order_from_either_kind_of_columns(tmp_path: Path) -> None:
    images = [bytes([index]) * 4 for index in range(200)]
    flat = pa.table({"image": images, "caption": [f"text {index}" for index in range(200)]})
    nested = pa.table(
        {
            "photo": [{"bytes": data, "path": None} for data in images],
            "texts": [[f"text {index}", None, ""] for index in range(200)],
            "id": list(range(200)),
        }
    )
    pq.write_table(flat, tmp_path / "flat.parquet")
    pq.write_table(nested, tmp_path / "nested.parquet")
    table = PairTable(str(tmp_path / "flat.parquet"))
    assert check_pair_table(table) == 200
    assert list(iterate_pairs(table)) == [
        Pair(hashlib.sha256(data).hexdigest(), data, [f"text {index}"]) for index, data in enumerate(images)
    ]
    named = PairTable(str(tmp_path / "nested.parquet"), image="photo", caption="texts", uid="id")
    assert list(iterate_pairs(named)) == [Pair(str(i), data, [f"text {i}"]) for i, data in enumerate(images)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["a.jpg"], "caption": ["c"]}, "'image' is string; it must be binary"),
        ({"image": [{"path": "a.jpg"}], "caption": ["c"]}, "'image' is struct"),
        ({"image": [b"i"], "caption": [3]}, "'caption' is int64; it must be string"),
        ({"image": [b"i"], "text": ["c"]}, "no column 'caption'; its columns are image, text"),
        ({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}, "has no rows"),
    ],
)
def test_a_pair_table_that_cannot_be_used_says_why(tmp_path: Path, columns: dict, message: str) -> None:
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(InputError, match=message):
        check_pair_table(PairTable(str(path)))


def test_human_pairs_may_lie_in_many_files(tmp_path: Path) -> None:
    for name, images in (("b", [b"3"]), ("a", [b"1", b"2"])):
        pq.write_table(pa.table({"image": images, "caption": ["c"] * len(images)}), tmp_path / f"{name}.parquet")
    for path in (tmp_path, tmp_path / "*.parquet"):
        table = PairTable(str(path))
        assert check_pair_table(table) == 3
        assert [pair.image for pair in iterate_pairs(table)] == [b"1", b"2", b"3"]
        assert [source.path.name for source in human_sources(table)] == ["a.parquet", "b.parquet"]
    pq.write_table(pa.table({"image": [b"4"], "text": ["c"]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet: has no column 'caption'"):
        check_pair_table(table)


def test_a_missing_or_torn_pair_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.parquet: not found"):
        check_pair_table(PairTable(str(tmp_path / "gone.parquet")))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match=r"torn\.parquet: cannot be read"):
        check_pair_table(PairTable(str(tmp_path / "torn.parquet")))


@pytest.mark.parametrize(
    ("image", "caption", "message"), [(None, "c", "row 1 has no bytes"), (b"i", None, "row 1 has no text")]
)
def test_a_pair_without_image_or_caption_is_named(
    tmp_path: Path, image: bytes | None, caption: str | None, message: str
) -> None:
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"image": [b"j", image], "caption": ["d", caption]}), path)
    with pytest.raises(InputError, match=message):
        list(iterate_pairs(PairTable(str(path))))


def test_a_limit_keeps_the_first_rows_in_the_order_of_uid(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"url": list("edcba"), "caption": ["t"] * 5, "key": [4, 1, 5, 2, 3]}), tmp_path / "t.parquet"
    )
    table = WebTable(str(tmp_path / "t.parquet"), uid="key")
    limited = read_web_table(replace(table, limit=2))
    assert list(zip(limited["uid"].to_pylist(), limited["url"].to_pylist(), strict=True)) == [("1", "d"), ("2", "b")]
    assert read_web_table(replace(table, limit=9)).equals(read_web_table(table))
