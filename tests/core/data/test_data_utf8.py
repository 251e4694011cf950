"""Stray bytes in a table's texts: its rows come in all the same, in every format, and no later step breaks on them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip_core.data.tables import WebTable
from blip_core.data.utf8 import as_texts, without_surrogates
from blip_core.data.web_rows import read_web_table

BROKEN = b"caf\xe9 \xff\xed\xa0\x80"
READ = BROKEN.decode("utf-8", "replace")


def table(folder: Path, kind: str) -> WebTable:
    """Two rows, of which the first has bytes in URL and text that are no UTF-8."""
    path = folder / f"web.{kind}"
    url, text = b"http://h/" + BROKEN, BROKEN
    if kind == "parquet":
        columns = {
            name: pa.StringArray.from_buffers(*_buffers([first, b"ok"]))
            for name, first in (("url", url), ("caption", text))
        }
        pq.write_table(pa.table(columns), path)
    elif kind in ("csv", "tsv"):
        between = b"," if kind == "csv" else b"\t"
        path.write_bytes(b"url%bcaption\n%b%b%b\nok%bok\n" % (between, url, between, text, between))
    else:
        rows = [b'{"url": "%b", "caption": "%b"}' % (url, text), b'{"url": "ok", "caption": "ok"}']
        path.write_bytes(b"\n".join(rows) if kind == "jsonl" else b"[" + b",".join(rows) + b"]")
    return WebTable(str(path))


def _buffers(values: list[bytes]) -> tuple[int, pa.Buffer, pa.Buffer]:
    made = pa.array(values, pa.binary())
    return len(made), made.buffers()[1], made.buffers()[2]


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl", "json"])
def test_a_row_with_stray_bytes_is_a_row_like_any_other(kind: str, tmp_path: Path) -> None:
    rows = read_web_table(table(tmp_path, kind)).to_pylist()
    found = {(row["url"], row["caption"]) for row in rows}
    assert found == {("ok", "ok"), (f"http://h/{READ}", READ)}
    assert len({row["uid"] for row in rows}) == 2


def test_halves_of_characters_in_a_list_of_json_are_no_end_of_it(tmp_path: Path) -> None:
    (tmp_path / "web.json").write_text(json.dumps([{"url": "http://h/\ud83d", "caption": "x\udc00"}]))
    (row,) = read_web_table(WebTable(str(tmp_path / "web.json"))).to_pylist()
    assert (row["url"], row["caption"]) == ("http://h/\ufffd", "x\ufffd")


@given(st.lists(st.none() | st.binary(max_size=20), max_size=20), st.lists(st.none() | st.text(max_size=9), max_size=9))
def test_any_bytes_become_the_text_that_python_reads_in_them(raw: list[bytes | None], texts: list[str | None]) -> None:
    expected = [None if value is None else value.decode("utf-8", "replace") for value in raw]
    assert as_texts(pa.array(raw, pa.binary())).to_pylist() == expected
    assert as_texts(pa.array(texts, pa.string())).to_pylist() == texts


@given(st.text())
def test_whole_characters_stay_as_they_are(text: str) -> None:
    assert without_surrogates(text) == text
