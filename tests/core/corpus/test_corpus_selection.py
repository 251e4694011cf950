"""Publishing: what is kept, what is counted, what a bad predicate gets."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip_core.corpus.schemas import CORPUS_SCHEMA
from blip_core.corpus.selection import PREDICATE_SCHEMA, PublishSummary, check_predicate, publish_human, publish_shard
from blip_core.data.tables import PairTable
from blip_core.errors import ConfigError, InputError, QueryError, ShardError
from blip_core.workspace import Workspace

SHARD = "aaaa000000000001"


def publish(workspace: Workspace, where: str, round: int = 1, best_of: bool = False) -> tuple[PublishSummary, Path]:
    paths = workspace.round(1)
    target = paths.corpus / f"{SHARD}.parquet"
    part = paths.annotations / f"{SHARD}.parquet"
    return publish_shard(part, workspace.shard(SHARD), target, where, round, best_of), target


def annotate_again(workspace: Workspace, scores: dict[str, list[float | None]]) -> list[dict]:
    """Annotations of these scores for each image: of the web text, then of the synthetic ones; None: not scored."""
    part = workspace.round(1).annotations / f"{SHARD}.parquet"
    table = pq.read_table(part)
    first = {row["uid"]: row for row in table.to_pylist() if row["candidate"] == 0}
    rows = []
    for uid, each in scores.items():
        for candidate, score in enumerate(each):
            row = first[uid] | {"text": f"text {candidate}", "candidate": candidate, "itm_score": score}
            row |= {"source": "synthetic" if candidate else "web", "reason": "empty_text" if score is None else None}
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), part)
    return rows


@pytest.mark.parametrize(
    ("where", "keeps"),
    [
        ("itm_score > 0.5", lambda row: row["itm_score"] > 0.5),
        ("itm_score > 0.25 AND width >= 42", lambda row: row["itm_score"] > 0.25 and row["width"] >= 42),
        ("source = 'web' -- of people", lambda row: row["source"] == "web"),
        ("logprob < 0", lambda row: row["logprob"] is not None),
        ("itm_score >= 0 OR itm_score < 0", lambda row: True),
        ("false", lambda row: False),
        (
            "itm_score >= (SELECT max(itm_score) FROM annotations AS other WHERE other.uid = annotations.uid)",
            lambda row: row["candidate"] == 1 or row["uid"] == "aaaa-4",
        ),
    ],
)
def test_corpus_holds_exactly_the_scored_rows_that_an_independent_filter_keeps(
    workspace: Workspace, where: str, keeps: Callable[[dict], bool]
) -> None:
    summary, target = publish(workspace, where)
    widths = {row["uid"]: row["width"] for row in pq.read_table(workspace.shard(SHARD)).to_pylist()}
    annotations = pq.read_table(workspace.round(1).annotations / f"{SHARD}.parquet").to_pylist()
    rows = [{**row, "width": widths[row["uid"]]} for row in annotations]
    expected = [row for row in rows if row["reason"] is None and keeps(row)]
    corpus = pq.read_table(target).to_pylist()
    assert [(row["uid"], row["candidate"]) for row in corpus] == [(row["uid"], row["candidate"]) for row in expected]
    for name in set(CORPUS_SCHEMA.names) - {"round", "height"}:
        assert [row[name] for row in corpus] == [row[name] for row in expected], name
    assert (summary.kept, summary.rejected) == (len(expected), len(annotations) - len(expected))
    assert sum(summary.by_source.values()) == summary.kept


def test_part_has_the_corpus_schema_its_round_and_its_counts_in_the_metadata(workspace: Workspace) -> None:
    summary, target = publish(workspace, "itm_score > 0.5", round=3)
    table = pq.read_table(target)
    assert table.schema.equals(CORPUS_SCHEMA)
    assert set(table["round"].to_pylist()) == {3}
    assert set(table["height"].to_pylist()) == {30}
    metadata = pq.read_schema(target).metadata
    assert metadata[b"capfilt.schema"] == b"corpus/1"
    assert (int(metadata[b"capfilt.kept"]), int(metadata[b"capfilt.rejected"])) == (summary.kept, summary.rejected)
    assert summary.kept + summary.rejected == 10
    assert pq.ParquetFile(target).metadata.row_group(0).column(0).compression == "ZSTD"


def test_published_twice_gives_the_same_bytes(workspace: Workspace) -> None:
    _, target = publish(workspace, "itm_score > 0.3")
    first = target.read_bytes()
    target.unlink()
    summary, _ = publish(workspace, "itm_score > 0.3")
    assert not summary.skipped
    assert target.read_bytes() == first


def test_standing_part_is_skipped_until_predicate_round_or_annotations_change(workspace: Workspace) -> None:
    first, target = publish(workspace, "itm_score > 0.3")
    stamp = target.stat().st_mtime_ns
    again, _ = publish(workspace, "itm_score > 0.3")
    assert (first.skipped, again.skipped) == (False, True)
    assert (again.kept, again.rejected, again.by_source) == (first.kept, first.rejected, first.by_source)
    assert target.stat().st_mtime_ns == stamp
    assert not publish(workspace, "itm_score > 0.4")[0].skipped
    assert not publish(workspace, "itm_score > 0.4", round=2)[0].skipped
    part = workspace.round(1).annotations / f"{SHARD}.parquet"
    table = pq.read_table(part)
    pq.write_table(table.slice(0, 4), part, compression="zstd")
    changed, _ = publish(workspace, "itm_score > 0.4", round=2)
    assert not changed.skipped
    assert changed.kept + changed.rejected == 4


@pytest.mark.parametrize("where", ["itm_score > 0.5", "itm_score > 0.85", "candidate <> 2", "true", "false"])
def test_best_of_keeps_the_best_synthetic_text_of_those_that_pass_and_every_web_text(
    workspace: Workspace, where: str
) -> None:
    rows = annotate_again(
        workspace,
        {
            "aaaa-0": [0.9, 0.6, 0.8, 0.7],
            "aaaa-1": [0.1, 0.75, 0.75, 0.2],  # the first of equal ones
            "aaaa-2": [0.9, 0.4, None, 0.3],
            "aaaa-3": [0.6, None, None, None],
            "aaaa-4": [0.2, 0.55, 0.95, 0.9],
        },
    )
    passing, _ = publish(workspace, where)
    passed = pq.read_table(workspace.round(1).corpus).select(["uid", "candidate", "itm_score"]).to_pylist()
    expected = []
    for row in passed:
        rivals = [other for other in passed if other["uid"] == row["uid"] and other["candidate"] > 0]
        best = max(rivals, key=lambda other: (other["itm_score"], -other["candidate"])) if rivals else None
        if row["candidate"] == 0 or row == best:
            expected.append((row["uid"], row["candidate"]))
    summary, target = publish(workspace, where, best_of=True)
    kept = [(row["uid"], row["candidate"]) for row in pq.read_table(target).to_pylist()]
    assert kept == expected
    assert (summary.kept, summary.rejected) == (len(expected), len(rows) - len(expected))
    assert summary.by_source.get("web", 0) == passing.by_source.get("web", 0)
    if where == "itm_score > 0.5":
        assert kept == [("aaaa-0", 0), ("aaaa-0", 2), ("aaaa-1", 1), ("aaaa-2", 0), ("aaaa-3", 0), ("aaaa-4", 2)]


def test_a_standing_part_says_whether_it_is_best_of_and_is_written_anew_when_that_changes(workspace: Workspace) -> None:
    annotate_again(workspace, {"aaaa-0": [0.9, 0.6, 0.8]})
    for best_of, kept in ((False, 3), (True, 2), (False, 3)):
        summary, target = publish(workspace, "true", best_of=best_of)
        assert (summary.skipped, summary.kept, summary.rejected) == (False, kept, 3 - kept)
        assert pq.read_schema(target).metadata[b"capfilt.best_of"] == str(best_of).lower().encode()
        again, _ = publish(workspace, "true", best_of=best_of)
        assert (again.skipped, again.kept, again.rejected) == (True, kept, 3 - kept)


def test_torn_corpus_part_is_written_anew(workspace: Workspace) -> None:
    _first, target = publish(workspace, "itm_score > 0.3")
    whole = target.read_bytes()
    target.write_bytes(whole[: len(whole) // 2])
    again, _ = publish(workspace, "itm_score > 0.3")
    assert not again.skipped
    assert target.read_bytes() == whole


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("itm_skore > 0.5", "itm_skore"),
        ("itm_score >", "syntax error"),
        ("itm_score > 0.5, true", "2 expressions"),
        ("true; DROP TABLE annotations", "more than one statement"),
        ("true) FROM annotations, (SELECT 1", "syntax error"),
        ("", "publish.where"),
        ("itm_score", "FLOAT"),
        ("avg(itm_score) > 0.5", "aggregates"),
        ("row_number() OVER () < 3", "window functions"),
        ("random() < 0.1", "hash(uid)"),
        ("text IN (SELECT content FROM read_text('/etc/hostname'))", "disabled by configuration"),
        ("text IN (WITH a AS (COPY (SELECT 'x') TO 'evil.csv') FROM a)", "WITH clause"),
    ],
)
def test_bad_predicate_is_one_line_that_names_the_setting_and_the_columns(
    where: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_predicate(where)
    message = str(caught.value)
    assert says in message
    assert "publish.where" in message
    assert "\n" not in message
    assert all(name in message for name in PREDICATE_SCHEMA.names)
    assert list(tmp_path.iterdir()) == []


def test_predicate_that_fails_on_a_row_names_the_part_and_leaves_none(workspace: Workspace) -> None:
    with pytest.raises(QueryError, match=rf"publish\.where .*{SHARD}"):
        publish(workspace, "text::INTEGER > 3")
    assert not list(workspace.round(1).corpus.glob("*"))


def test_annotation_of_an_image_that_the_shard_lacks_is_an_error(workspace: Workspace) -> None:
    other = workspace.shard("bbbb000000000002")
    paths = workspace.round(1)
    with pytest.raises(ShardError, match="aaaa-0"):
        publish_shard(paths.annotations / f"{SHARD}.parquet", other, paths.corpus / "x.parquet", "true", 1)


def test_missing_and_torn_annotations_are_named(workspace: Workspace) -> None:
    part = workspace.round(1).annotations / f"{SHARD}.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ShardError, match=SHARD):
        publish(workspace, "true")
    part.unlink()
    with pytest.raises(ShardError, match=SHARD):
        publish(workspace, "true")


def human_table(path: Path, pairs: list[tuple[bytes, list[str]]]) -> PairTable:
    table = pa.table({"image": [image for image, _ in pairs], "caption": [texts for _, texts in pairs]})
    pq.write_table(table, path)
    return PairTable(str(path))


def jpeg(width: int, height: int, orientation: int = 1) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), "teal").save(file, "JPEG", exif=exif)
    return file.getvalue()


def test_human_pairs_enter_whole_one_row_a_caption(tmp_path: Path) -> None:
    upright, turned = jpeg(20, 10), jpeg(20, 10, orientation=6)
    human = human_table(tmp_path / "human.parquet", [(upright, ["a teal box", "a box"]), (turned, ["a tall box"])])
    summary = publish_human(human, tmp_path / "corpus", 1)
    assert (summary.kept, summary.rejected, summary.by_source) == (3, 0, {"human": 3})
    [part] = (tmp_path / "corpus").glob("*.parquet")
    assert part.name.startswith("human-")
    table = pq.read_table(part)
    assert table.schema.equals(CORPUS_SCHEMA)
    found = {
        (row["image_sha256"], row["candidate"], row["text"], row["width"], row["height"]) for row in table.to_pylist()
    }
    first, second = (hashlib.sha256(image).hexdigest() for image in (upright, turned))
    assert found == {(first, 0, "a teal box", 20, 10), (first, 1, "a box", 20, 10), (second, 0, "a tall box", 10, 20)}
    for name in ("shard", "url", "itm_score", "itc_score", "logprob", "captioner", "filter", "seed"):
        assert table[name].null_count == 3


def test_human_pairs_that_cannot_be_used_are_counted_as_rejected(tmp_path: Path) -> None:
    human = human_table(tmp_path / "human.parquet", [(b"<html>", ["a page"]), (jpeg(9, 9), ["a box", "  "])])
    summary = publish_human(human, tmp_path / "corpus", 1)
    assert (summary.kept, summary.rejected) == (1, 2)


def test_rows_that_repeat_an_image_number_their_captions_on(tmp_path: Path) -> None:
    image = jpeg(9, 9)
    human = human_table(tmp_path / "human.parquet", [(image, ["one"]), (image, ["two"])])
    publish_human(human, tmp_path / "corpus", 1)
    [part] = (tmp_path / "corpus").glob("*.parquet")
    assert [(row["text"], row["candidate"]) for row in pq.read_table(part).to_pylist()] == [("one", 0), ("two", 1)]


def test_image_with_more_captions_than_a_candidate_can_number_is_named(tmp_path: Path) -> None:
    human = human_table(tmp_path / "human.parquet", [(jpeg(9, 9), [f"text {number}" for number in range(129)])])
    with pytest.raises(InputError, match=r"human\.parquet.*more than 128"):
        publish_human(human, tmp_path / "corpus", 1)
    assert not list((tmp_path / "corpus").glob("*"))


def test_same_human_table_is_skipped_and_a_changed_one_takes_its_place(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    human = human_table(tmp_path / "human.parquet", [(jpeg(9, 9), ["a box"])])
    assert not publish_human(human, corpus, 1).skipped
    [part] = corpus.glob("*.parquet")
    before = part.read_bytes()
    assert publish_human(human, corpus, 1).skipped
    assert part.read_bytes() == before
    human = human_table(tmp_path / "human.parquet", [(jpeg(9, 9), ["a teal box"])])
    assert not publish_human(human, corpus, 1).skipped
    assert pq.read_table(corpus)["text"].to_pylist() == ["a teal box"]
