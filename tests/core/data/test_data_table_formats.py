"""One file of a table: what each format allows, what is recognised, and how what is broken is named."""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_core.data import table_formats
from blip_core.data.tables import WebTable
from blip_core.data.web_rows import read_web_table
from blip_core.errors import InputError


def pairs(path: Path, **settings: Any) -> list[tuple[str | None, str]]:
    """URL and text of every row, sorted."""
    rows = read_web_table(WebTable(str(path), **settings)).to_pylist()
    return sorted(((row["url"], row["caption"]) for row in rows), key=str)


def zstd(data: bytes) -> bytes:
    """Two frames, as parallel compressors write them."""
    result = b""
    for part in (data[:20], data[20:]):
        buffer = pa.BufferOutputStream()
        with pa.CompressedOutputStream(buffer, "zstd") as stream:
            stream.write(part)
        result += buffer.getvalue().to_pybytes()
    return result


def two_members(data: bytes) -> bytes:
    return gzip.compress(data[:20]) + gzip.compress(data[20:])


PACKINGS = {"gz": two_members, "zst": zstd, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json"])
def test_text_may_be_packed(tmp_path: Path, name: str, packing: str) -> None:
    texts = {
        "t.csv": "url,caption\nu,one\nv,two\n",
        "t.tsv": "url\tcaption\nu\tone\nv\ttwo\n",
        "t.jsonl": '{"url": "u", "caption": "one"}\n{"url": "v", "caption": "two"}\n',
        "t.json": '[{"url": "u", "caption": "one"},\n {"url": "v", "caption": "two"}]',
    }
    path = tmp_path / f"{name}.{packing}"
    path.write_bytes(PACKINGS[packing](texts[name].encode()))
    assert pairs(path) == [("u", "one"), ("v", "two")]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=rf"{path.name}: "):
        read_web_table(WebTable(str(path)))


def test_csv_is_read_as_spreadsheets_write_it(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbfurl,caption\r\nu,"a ""red""\r\nbus, parked"\r\n\r\nv,  \r\nw,NULL\r\n')
    assert pairs(path) == [("u", 'a "red"\r\nbus, parked'), ("v", "  "), ("w", "NULL")]


def test_any_text_comes_through_csv_and_json_lines(tmp_path: Path) -> None:
    texts = ['"', "a,b", "\u2028", "é\u200b", "x" * 1_000_000, "\t", "line\nbreak", "\0", "'", "\\", "🚌"]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("url", "caption"), *((f"u{place}", text) for place, text in enumerate(texts))])
    lines = (json.dumps({"url": f"u{place}", "caption": text}) for place, text in enumerate(texts))
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    expected = sorted((f"u{place}", text) for place, text in enumerate(texts))
    assert pairs(tmp_path / "t.csv") == pairs(tmp_path / "t.jsonl") == expected


def test_half_a_character_in_json_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"url": "u", "caption": "a \\ud83d bus \\ud83d\\ude8c"}')
    assert pairs(tmp_path / "t.jsonl") == [("u", "a \ufffd bus 🚌")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"url,caption\nu,c\n\nv,d,e\n", "line 4 has 3 fields, and the table has 2 columns"),
        ("t.csv", b'url,caption\nu,"two\nlines"\nv\n', "line 4 has 1 fields"),
        ("t.csv", b'url,caption\nu,c\nv,"never closed\nw,d\n', "line 3: the row that begins there is broken"),
        ("t.csv", b'url,caption\nu,"closed "too early"\n', "line 2: the row that begins there is broken"),
        ("t.csv", "url,caption\nu,c\n".encode("utf-16"), "line 1 is not UTF-8"),
        ("t.tsv", b"url\tcaption\nu\tc\nv\td\te\n", "line 3 has 3 fields"),
        ("t.jsonl", b'{"url": "u", "caption": "c"}\n\n{"url": "v", \n', "line 3 is no JSON"),
        ("t.jsonl", b'{"url": "u", "caption": "c"}\n"v"\n', "line 2 is no object"),
        ("t.jsonl", b'{"url": "u", "caption": "c"}\n{"url": "v", "caption": ["d"]}\n', r"line 2: 'caption' is \['d'\]"),
        (
            "t.jsonl",
            b'{"url": "u", "caption": "c"}\n{"url": 7, "caption": "d"}\n',
            "line 2: 'url' is 7; it must be text",
        ),
        ("t.jsonl", b'{"uid": 1, "url": "u", "caption": "c"}\n{"url": "v"}\n', "line 2 has no 'uid'"),
        (
            "t.jsonl",
            b'{"uid": true, "url": "u", "caption": "c"}\n',
            "line 1: 'uid' is True; it must be text or an integer",
        ),
        ("t.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("t.json", b'[{"url": "u", "caption": "c"}, {"url": }]', "row 1 is no JSON"),
        ("t.json", b'[{"url": "u", "caption": "c"}', "row 1 is no JSON"),
    ],
)
def test_what_is_broken_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: {message}"):
        read_web_table(WebTable(str(tmp_path / name)))


def test_a_long_list_is_read_some_items_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"url": f"http://web.test/{row}", "caption": f"text, ] {row}"} for row in range(300)]
    (tmp_path / "t.json").write_text(f"\n {json.dumps(rows, indent=1)}\n")
    monkeypatch.setattr(table_formats, "JSON_CHARACTERS", 50)
    assert pairs(tmp_path / "t.json") == sorted((row["url"], row["caption"]) for row in rows)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (pa.large_string(), lambda texts: texts),
        (pa.dictionary(pa.int32(), pa.string()), lambda texts: texts),
        (pa.dictionary(pa.int8(), pa.large_string()), lambda texts: texts),
        (pa.string_view(), lambda texts: texts),
        (pa.binary(), lambda texts: [text and text.encode() for text in texts]),
    ],
)
def test_texts_may_be_of_any_kind_of_string(tmp_path: Path, kind: pa.DataType, make: Callable) -> None:
    columns = {name: pa.array(make(texts), kind) for name, texts in (("url", ["u", None]), ("caption", ["é", None]))}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert pairs(tmp_path / "t.parquet") == [("u", "é"), (None, "")]


def test_a_nested_column_is_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["u"], "caption": [["c", "d"]]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"'caption' is list<.*>; it must be string"):
        pairs(tmp_path / "t.parquet")


PUBLISHED = {
    "LAION-400M": {
        "SAMPLE_ID": 1.0,
        "URL": "u",
        "TEXT": "t",
        "HEIGHT": 1,
        "WIDTH": 1,
        "LICENSE": "?",
        "NSFW": "UNLIKELY",
    },
    "LAION-5B": {"URL": "u", "TEXT": "t", "WIDTH": 1, "HEIGHT": 1, "similarity": 0.3, "hash": 1, "punsafe": 0.1},
    "LAION-COCO": {"URL": "u", "TEXT": "t", "top_caption": "no", "all_captions": ["no"]},
    "DataComp": {"uid": "00ab", "url": "u", "text": "t", "original_width": 1, "sha256": "no"},
    "COYO": {"id": 1, "url": "u", "text": "t", "width": 1, "image_phash": "no"},
    "Conceptual Captions": {"image_url": "u", "caption": "t"},
    "RedCaps": {"image_id": "no", "image_url": "u", "caption": "t", "raw_caption": "no"},
    "ours": {"url": "u", "caption": "t", "URL": "no", "TEXT": "no", "alt": "no"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_columns_of_published_tables_are_recognised(tmp_path: Path, name: str) -> None:
    row = PUBLISHED[name]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
    (found,) = read_web_table(WebTable(str(tmp_path / "t.parquet"))).to_pylist()
    assert (found["url"], found["caption"]) == ("u", "t")
    assert (found["uid"] == row.get("uid")) == (name == "DataComp")


def test_sbu_is_read_as_it_is_published(tmp_path: Path) -> None:
    columns = {"image_urls": ["u", "v"], "user_ids": ["x", "y"], "captions": ["one", "two"]}
    (tmp_path / "sbu-captions-all.json").write_text(json.dumps(columns))
    assert pairs(tmp_path / "sbu-captions-all.json") == [("u", "one"), ("v", "two")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["URL", "image_url", "text"], r"URL and image_url may each be .* image URLs; name one by web\.url"),
        (["url", "TEXT", "alt"], r"TEXT and alt may each be .* web texts; name one by web\.caption"),
        (
            ["link", "text"],
            r"no column of image URLs, such as url, .*; its columns are link, text\. Name it by web\.url",
        ),
    ],
)
def test_columns_that_cannot_be_told_are_asked_for(tmp_path: Path, columns: list[str], message: str) -> None:
    (tmp_path / "t.csv").write_text(f"{','.join(columns)}\n{','.join('abc'[: len(columns)])}\n")
    with pytest.raises(InputError, match=message):
        read_web_table(WebTable(str(tmp_path / "t.csv")))


@pytest.mark.parametrize(
    ("columns", "line"), [(("caption", "url"), "a bus\thttp://u"), (("url", "caption"), "http://u\ta bus")]
)
def test_a_file_without_a_line_of_names_has_those_that_are_given(
    tmp_path: Path, columns: tuple[str, ...], line: str
) -> None:
    (tmp_path / "cc.tsv").write_text(f"{line}\n")
    assert pairs(tmp_path / "cc.tsv", columns=columns) == [("http://u", "a bus")]
    with pytest.raises(InputError, match=r"no column of image URLs.*its columns are .*http://u.*web\.columns"):
        pairs(tmp_path / "cc.tsv")


def test_a_column_that_comes_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("url,caption,url\nu,c,v\n")
    with pytest.raises(InputError, match="has 2 columns 'url'"):
        pairs(tmp_path / "t.csv")
