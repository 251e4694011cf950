"""An export: which rows go out, in files of which size, and what a killed, repeated or misdirected one does."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import webdataset

from blip_core.corpus.export import FORMATS, ExportSummary, export_corpus
from blip_core.corpus.export_format import LEFT_OUT, parse_size
from blip_core.corpus.rounds import promote
from blip_core.corpus.selection import publish_shard
from blip_core.errors import CapfiltError, ConfigError, InputError, ShardError, WorkspaceError
from blip_core.workspace import Workspace

if TYPE_CHECKING:
    from conftest import Published

SIZES = {"parquet": 4_000, "webdataset": 40_000, "blip": 300, "coco": 700, "csv": 2_000}


def export(published: "Published", folder: Path, format: str = "csv", **options: Any) -> ExportSummary:
    options = {"human": published.human, "shard_size": SIZES[format], **options}
    return export_corpus(published.workspace, folder, format, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def lines(folder: Path) -> list[str]:
    """The uids and sources of a CSV export, in its order."""
    return [line for path in sorted(folder.glob("*.csv")) for line in path.read_text().splitlines()[1:]]


@pytest.mark.parametrize("format", FORMATS)
def test_files_hold_no_more_than_the_size_and_are_not_smaller_than_need_be(
    format: str, shared_published: "Published", tmp_path: Path
) -> None:
    summary = export(shared_published, tmp_path / "out", format)
    pattern = f"*{Path(FORMATS[format].name).suffix}"
    files = sorted(path for path in (tmp_path / "out").glob(pattern) if path.name not in ("export.json", "sizes.json"))
    assert [path.name for path in files] == [FORMATS[format].name.format(number) for number in range(summary.files)]
    assert summary.bytes == sum(path.stat().st_size for path in files)
    assert summary.files > 1
    if format != "parquet":  # whose size is that of the pairs before they are compressed
        assert max(path.stat().st_size for path in files) <= SIZES[format]
    export(shared_published, tmp_path / "one", format, shard_size=10**9)
    assert len(list((tmp_path / "one").glob(FORMATS[format].name.replace("{:05d}", "*").replace("{:08d}", "*")))) == 1


def test_a_pair_that_is_larger_than_the_size_has_a_file_of_its_own(
    shared_published: "Published", tmp_path: Path
) -> None:
    summary = export(shared_published, tmp_path / "out", "webdataset", shard_size=1)
    assert summary.files == summary.pairs == len(shared_published.rows)


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_corpus_gives_the_same_bytes(format: str, shared_published: "Published", tmp_path: Path) -> None:
    export(shared_published, tmp_path / "one", format)
    export(shared_published, tmp_path / "two", format)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_that_is_complete_is_not_written_again(
    format: str, shared_published: "Published", tmp_path: Path
) -> None:
    first = export(shared_published, tmp_path / "out", format)
    before = stamps(tmp_path / "out")
    again = export(shared_published, tmp_path / "out", format)
    assert stamps(tmp_path / "out") == before
    assert (first.written, again.written) == (first.files, 0)
    assert (again.pairs, again.files, again.bytes, again.left_out) == (
        *(first.pairs, first.files, first.bytes),
        first.left_out,
    )


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_that_was_interrupted_anywhere_goes_on_and_ends_with_the_same_bytes(
    format: str, shared_published: "Published", tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    total = export(shared_published, tmp_path / "whole", format).pairs
    for stop in range(1, total + 1):
        folder = tmp_path / str(stop)

        def progress(done: int, _: int, stop: int = stop) -> None:
            if done == stop:
                raise Stopped

        with pytest.raises(Stopped):
            export(shared_published, folder, format, progress=progress)
        before = {name: stamp for name, stamp in stamps(folder).items() if name[0] != "." and name != "export.json"}
        assert not (folder / "SHA256SUMS").exists()
        summary = export(shared_published, folder, format)
        assert contents(folder) == contents(tmp_path / "whole")
        assert {name: stamps(folder)[name] for name in before} == before
        assert summary.written == summary.files - len(before)


KILLED = """
    import sys
    from pathlib import Path
    from blip_core import files
    from blip_core.corpus.export import export_corpus
    from blip_core.workspace import Workspace
    def progress(done, total):
        if done == int(sys.argv[4]):
            print("here", flush=True)
            sys.stdin.read()
    export_corpus(Workspace.existing(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], shard_size=40_000, progress=progress)
"""


def test_a_killed_export_leaves_no_half_a_file_and_goes_on(shared_published: "Published", tmp_path: Path) -> None:
    options: dict[str, Any] = {"human": None}
    whole = export(shared_published, tmp_path / "whole", "webdataset", **options)
    arguments = [str(shared_published.workspace.root), str(tmp_path / "out"), "webdataset", str(whole.pairs - 2)]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    tars = list((tmp_path / "out").glob("*.tar"))
    assert 0 < len(tars) < whole.files
    assert all((tmp_path / "whole" / tar.name).read_bytes() == tar.read_bytes() for tar in tars)
    assert any(path.name.endswith(".tmp") for path in (tmp_path / "out").iterdir())
    before = {tar.name: stamps(tmp_path / "out")[tar.name] for tar in tars}
    export(shared_published, tmp_path / "out", "webdataset", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {name: stamps(tmp_path / "out")[name] for name in before} == before


@pytest.mark.parametrize("note", ["torn", "of a file that has no name yet"])
def test_a_note_that_a_killed_export_left_is_passed_over(
    note: str, shared_published: "Published", tmp_path: Path
) -> None:
    export(shared_published, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        export(shared_published, tmp_path / "out", progress=interrupt_at(8))
    notes = tmp_path / "out" / ".progress.jsonl"
    standing = len(list((tmp_path / "out").glob("*.csv")))
    torn = '{"name": "corpus-0000'
    missing = f'{{"name": "corpus-{standing:05}.csv", "pairs": 3, "bytes": 5, "sha256": "0"}}\n'
    with notes.open("a") as file:
        file.write(torn if note == "torn" else missing)
    export(shared_published, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def interrupt_at(stop: int) -> Any:
    def progress(done: int, _: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    return progress


def test_a_file_that_was_taken_away_is_written_again_and_no_other(
    shared_published: "Published", tmp_path: Path
) -> None:
    export(shared_published, tmp_path / "out")
    before, stamped = contents(tmp_path / "out"), stamps(tmp_path / "out")
    (tmp_path / "out" / "corpus-00001.csv").unlink()
    assert export(shared_published, tmp_path / "out").written == 1
    assert contents(tmp_path / "out") == before
    after = stamps(tmp_path / "out")
    assert {name for name in after if after[name] != stamped[name]} == {"corpus-00001.csv"}


@pytest.mark.parametrize(
    ("where", "keeps"),
    [
        ("itm_score > 0.65 AND source = 'web'", lambda row, _: row["source"] == "web" and row["itm_score"] > 0.65),
        ("source = 'human' -- of people", lambda row, _: row["source"] == "human"),
        (
            "itm_score = (SELECT max(itm_score) FROM corpus AS other WHERE other.shard = corpus.shard)",
            lambda row, rows: row["itm_score"] and row["itm_score"] == max(other["itm_score"] or 0 for other in rows),
        ),
    ],
)
def test_a_predicate_chooses_the_rows_that_an_independent_filter_does(
    where: str, keeps: Callable[[dict, list[dict]], bool], shared_published: "Published", tmp_path: Path
) -> None:
    export(shared_published, tmp_path / "out", where=where, shard_size=10**9)
    rows = shared_published.rows
    expected = [(row["uid"], row["candidate"]) for row in rows if keeps(row, rows)]
    assert expected
    assert exported(tmp_path / "out" / "corpus-00000.csv") == expected


def exported(path: Path) -> list[tuple[str, int]]:
    table = pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
    return list(zip(table["uid"].to_pylist(), table["candidate"].to_pylist(), strict=True))


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("itm_skore > 0.5", "itm_skore"),
        ("itm_score", "FLOAT"),
        ("itm_score > 0.5, true", "2 expressions"),
        ("true; DROP TABLE corpus", "more than one statement"),
        ("true) FROM corpus, (SELECT 1", "syntax error"),
        ("avg(itm_score) > 0.5", "aggregates"),
        ("random() < 0.1", "hash(uid)"),
        ("text IN (SELECT content FROM read_text('/etc/hostname'))", "disabled by configuration"),
        ("text IN (WITH a AS (COPY (SELECT 'x') TO '{corpus}/evil.csv') FROM a)", "COPY"),
        ("itm_score > 2", "no row"),
    ],
)
def test_a_bad_predicate_is_one_line_and_nothing_is_written(
    where: str, says: str, shared_published: "Published", tmp_path: Path
) -> None:
    corpus = shared_published.workspace.round(1).corpus
    before = sorted(corpus.iterdir())
    with pytest.raises(CapfiltError) as caught:
        export(shared_published, tmp_path / "out", where=where.replace("{corpus}", str(corpus)))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert sorted(corpus.iterdir()) == before


def test_a_round_can_be_named_and_the_promoted_one_is_taken_else(published: "Published", tmp_path: Path) -> None:
    workspace = published.workspace
    for annotation in sorted(workspace.round(1).annotations.glob("*.parquet")):
        target = workspace.round(2).corpus / annotation.name
        publish_shard(annotation, workspace.shard(annotation.stem), target, "itm_score > 0.75", 2)
    promote(workspace, 1)
    assert export(published, tmp_path / "promoted").round == 1
    second = export(published, tmp_path / "named", round=2)
    assert second.round == 2
    assert {line.rsplit(",", 1)[1] for line in lines(tmp_path / "named")} == {"2"}
    with pytest.raises(WorkspaceError, match="round 7 has no corpus"):
        export(published, tmp_path / "none", round=7)
    with pytest.raises(WorkspaceError, match="no round has a corpus"):
        export_corpus(Workspace.open(tmp_path / "empty"), tmp_path / "none", "csv")


@pytest.mark.parametrize("format", ["parquet", "webdataset", "coco"])
def test_human_pairs_without_a_table_are_left_out_and_counted(
    format: str, shared_published: "Published", tmp_path: Path
) -> None:
    summary = export(shared_published, tmp_path / "out", format, human=None)
    assert summary.left_out == {"no_human_table": 3}
    assert set(summary.left_out) <= set(LEFT_OUT)
    assert summary.pairs == len(shared_published.rows) - 3


def test_a_table_that_the_human_pairs_are_not_from_is_named(published: "Published", tmp_path: Path) -> None:
    table = pq.read_table(published.human.path)
    pq.write_table(table.slice(1), published.human.path)
    with pytest.raises(InputError, match=r"human\.parquet: has no human pair"):
        export(published, tmp_path / "out", "webdataset")


def test_an_image_that_its_shard_has_no_more_is_named(published: "Published", tmp_path: Path) -> None:
    shard = published.workspace.shard("bbbb000000000002")
    table = pq.read_table(shard)
    pq.write_table(table.filter(table["uid"].to_numpy() != "bbbb-3"), shard)
    with pytest.raises(ShardError, match=r"bbbb0.*has no uid 'bbbb-3'"):
        export(published, tmp_path / "out", "webdataset")
    shard.unlink()
    with pytest.raises(ShardError, match="bbbb0"):
        export(published, tmp_path / "out", "webdataset")


@pytest.mark.parametrize("standing", ["a file of the user's", "another format", "another predicate", "a file"])
def test_a_target_that_holds_something_else_is_refused_and_left_as_it_is(
    standing: str, shared_published: "Published", tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    if standing == "a file":
        folder.write_text("mine")
        with pytest.raises(WorkspaceError, match="is a file"):
            export(shared_published, folder)
        assert folder.read_text() == "mine"
        return
    if standing == "a file of the user's":
        folder.mkdir()
        (folder / "corpus-00000.csv").write_text("mine")
    elif standing == "another format":
        export(shared_published, folder, "blip")
    else:
        export(shared_published, folder, where="itm_score > 0.5")
    before = contents(folder)
    with pytest.raises(WorkspaceError, match="holds"):
        export(shared_published, folder)
    assert contents(folder) == before


def test_a_file_that_came_into_the_folder_from_elsewhere_is_not_overwritten(
    shared_published: "Published", tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(shared_published, tmp_path / "out", progress=interrupt_at(1))
    (tmp_path / "out" / "corpus-00000.csv").write_text("mine")
    with pytest.raises(WorkspaceError, match=r"corpus-00000\.csv: stands"):
        export(shared_published, tmp_path / "out")
    assert (tmp_path / "out" / "corpus-00000.csv").read_text() == "mine"


def test_a_corpus_that_has_changed_does_not_go_on_into_the_same_folder(published: "Published", tmp_path: Path) -> None:
    export(published, tmp_path / "out")
    part = published.workspace.round(1).annotations / "aaaa000000000001.parquet"
    target = published.workspace.round(1).corpus / part.name
    publish_shard(part, published.workspace.shard(part.stem), target, "itm_score > 0.6", 1)
    with pytest.raises(WorkspaceError, match="has changed"):
        export(published, tmp_path / "out")


def test_uids_that_cannot_be_names_of_files_have_keys_that_can(published: "Published", tmp_path: Path) -> None:
    odd = {"aaaa-2": "../../etc/passwd", "aaaa-3": "a.b c/ü" * 40, "aaaa-4": "aaaa-4"}
    for path in (
        published.workspace.shard("aaaa000000000001"),
        published.workspace.round(1).corpus / "aaaa000000000001.parquet",
    ):
        table = pq.read_table(path)
        uids = [odd.get(uid, uid) for uid in table["uid"].to_pylist()]
        pq.write_table(table.set_column(0, "uid", [uids]), path)
    export(published, tmp_path / "out", "webdataset", shard_size=10**9)
    tar = str(tmp_path / "out" / "00000000.tar")
    keys = {sample["__key__"] for sample in webdataset.WebDataset(tar, shardshuffle=False)}
    assert len(keys) == len(published.rows)
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for key in keys)


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MB", 500_000_000), ("1GiB", 2**30), ("1.5 kB", 1500), ("7", 7), ("2m", 2_000_000), ("3 TiB", 3 * 2**40)],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "5 apples", "0", "0.1", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_size(text)
