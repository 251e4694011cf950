"""What `capfilt query` prints, and its shell."""

import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_core.corpus.schemas import CORPUS_SCHEMA, CORPUS_VERSION, write_part
from blip_core.workspace import Workspace

Capfilt = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A corpus of two rows, one with a text that no format may trip over."""
    made = Workspace.open(tmp_path / "workspace")
    texts = ["a red bus", 'she said "no",\nand [bold]left[/bold] Ü']
    rows = [
        {"uid": f"u{place}", "text": text, "source": "web", "candidate": 0, "itm_score": 0.5 + place / 4}
        for place, text in enumerate(texts)
    ]
    counts = {"capfilt.kept": "2", "capfilt.rejected": "0"}
    table = pa.Table.from_pylist(rows, CORPUS_SCHEMA)
    write_part(made.round(1).corpus / "0123456789abcdef.parquet", table, CORPUS_VERSION, "mark", counts)
    return made


SQL = "SELECT uid, text, itm_score, [1, 2] AS list, 'ab'::BLOB AS bytes, NULL AS nothing FROM corpus ORDER BY uid"
TEXT = 'she said "no",\nand [bold]left[/bold] Ü'


def asked(workspace: Workspace, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "flows", "query", "--workspace", str(workspace.root), *arguments]
    return subprocess.run(command, cwd=ROOT, input=given, capture_output=True, check=False)


def test_csv_is_read_back_by_the_standard_reader(capfilt: Capfilt, workspace: Workspace) -> None:
    status, out, _ = capfilt("query", SQL, "--workspace", str(workspace.root), "--format", "csv")
    assert status == 0
    assert list(csv.reader(io.StringIO(out))) == [
        ["uid", "text", "itm_score", "list", "bytes", "nothing"],
        ["u0", "a red bus", "0.5", "[1, 2]", "YWI=", ""],
        ["u1", TEXT, "0.75", "[1, 2]", "YWI=", ""],
    ]


def test_json_has_the_values_by_name(capfilt: Capfilt, workspace: Workspace) -> None:
    for flags in (("--format", "json"), ("--json",)):
        status, out, _ = capfilt("query", SQL, "--workspace", str(workspace.root), *flags)
        assert status == 0
        assert json.loads(out)[1] == {
            "uid": "u1", "text": TEXT, "itm_score": 0.75, "list": [1, 2], "bytes": "YWI=", "nothing": None
        }  # fmt: skip


def test_sums_and_decimals_are_numbers(capfilt: Capfilt, workspace: Workspace) -> None:
    sql = "SELECT sum(length(text)) AS letters, 1.5 AS half FROM corpus"
    status, out, _ = capfilt("query", sql, "--workspace", str(workspace.root), "--json")
    assert (status, json.loads(out)) == (0, [{"letters": len("a red bus") + len(TEXT), "half": 1.5}])
    status, out, _ = capfilt("query", sql, "--workspace", str(workspace.root))
    assert re.search(r"│ +47 │ +1\.5 │", out)


def test_parquet_goes_to_stdout_with_its_types(workspace: Workspace) -> None:
    done = asked(workspace, SQL, "--format", "parquet")
    assert done.returncode == 0
    table = pq.read_table(io.BytesIO(done.stdout))
    assert table["text"].to_pylist() == ["a red bus", TEXT]
    assert str(table.schema.field("bytes").type) == "binary"
    assert str(table.schema.field("itm_score").type) == "float"


def test_a_pipe_is_a_shell_whose_statements_may_have_many_lines(workspace: Workspace) -> None:
    done = asked(
        workspace, "--format", "csv", given=b"SELECT count(*) AS n\nFROM corpus;\n\nSELECT max(uid) AS last FROM corpus"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"n\n2\nlast\nu1\n", b"")


def test_a_statement_of_a_pipe_that_fails_ends_it(workspace: Workspace) -> None:
    done = asked(workspace, given=b"SELECT nothing FROM nowhere;\nSELECT 1;\n")
    assert (done.returncode, done.stdout) == (1, b"")
    (line,) = done.stderr.decode().splitlines()
    assert "nowhere" in line


def test_on_a_terminal_a_statement_that_fails_or_writes_is_told_and_the_next_one_answered(workspace: Workspace) -> None:
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "flows", "query", "--workspace", str(workspace.root), "--format", "csv"]
    shell = subprocess.Popen(command, cwd=ROOT, stdin=end, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.close(end)
    os.write(terminal, b"COPY corpus TO 'x.csv';\nSELECT count(*) AS n FROM corpus;\nexit\n")
    out, err = shell.communicate(timeout=120)
    os.close(terminal)
    assert shell.returncode == 0
    assert b"n\n2\n" in out
    assert b"error: query: a statement of the kind COPY" in err
    assert not (ROOT / "x.csv").exists()
