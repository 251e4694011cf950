"""`capfilt export`: what it prints and refuses, and that docs/export.md is true: its examples run as they stand."""

import hashlib
import io
import json
import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from PIL import Image

from blip_core.corpus.export_format import LEFT_OUT
from blip_core.corpus.schemas import CORPUS_SCHEMA, CORPUS_VERSION, write_part
from blip_core.corpus.selection import publish_human
from blip_core.data.shards import SHARD_SCHEMA, write_shard
from blip_core.data.tables import PairTable
from blip_core.workspace import Workspace
from flows.cli import app

Capfilt = Callable[..., tuple[int, str, str]]

DOCUMENT = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
EXAMPLES = re.findall(
    r"^```bash\n(capfilt export [^\n]+)\n```\n\n```python\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE
)
COMMANDS = re.findall(r"^capfilt export [^\n]+", DOCUMENT, re.MULTILINE)


def picture(number: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64 + number, 64), (number, 20, 30)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The workspace `work` in the current folder: five web pairs and a human one, of round.yaml beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    made = Workspace.open("work")
    images = [picture(number) for number in range(5)]
    uids = sorted(hashlib.sha256(image).hexdigest()[:20] for image in images)
    size = {"width": 64, "height": 64}
    rows = [
        {"uid": uid, "url": f"http://web.test/{uid}.jpg", "status": "ok", "image": image, **size}
        for uid, image in zip(uids, images, strict=True)
    ]
    write_shard(made.shard("0" * 16), [pa.Table.from_pylist(rows, SHARD_SCHEMA)], "settings", 5)
    kept = [
        {"uid": row["uid"], "shard": "0" * 16, "url": row["url"], "text": f"text {place}", "source": "web"}
        | {"candidate": 0, "itm_score": 0.95, "round": 1, **size}
        for place, row in enumerate(rows)
    ]
    part = made.round(1).corpus / f"{'0' * 16}.parquet"
    write_part(part, pa.Table.from_pylist(kept, CORPUS_SCHEMA), CORPUS_VERSION, "mark")
    pq.write_table(pa.table({"image": [picture(9, "PNG")], "caption": ["a human text"]}), "human.parquet")
    publish_human(PairTable("human.parquet"), made.round(1).corpus, 1)
    config = {"workspace": "work", "web": {"path": "urls.parquet"}, "human": {"path": "human.parquet"}}
    Path("round.yaml").write_text(yaml.safe_dump(config))
    return made


def test_every_format_has_an_example() -> None:
    formats = {re.search(r"--format (\w+)", command) for command, _ in EXAMPLES}
    assert {found[1] if found else "parquet" for found in formats} == {
        *("parquet", "webdataset", "uids", "blip", "coco", "csv")
    }


def test_documented_options_and_reasons_are_those_that_there_are() -> None:
    parameters = typer.main.get_command(app).commands["export"].params  # type: ignore[attr-defined]
    options = [option for parameter in parameters for option in parameter.opts if option.startswith("--")]
    assert re.findall(r"^\| `(--[a-z-]+)` \|", DOCUMENT, re.MULTILINE) == options
    assert dict(re.findall(r"^\| `(no_\w+)` \| (.*) \|$", DOCUMENT, re.MULTILINE)) == LEFT_OUT


@pytest.mark.parametrize(("command", "code"), EXAMPLES)
def test_a_documented_example_runs(
    command: str, code: str, work: Workspace, capfilt: Capfilt, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = capfilt(*shlex.split(command)[1:])
    assert (status, err.count("error")) == (0, 0), err
    assert str(Path(shlex.split(command)[2]).absolute()) in out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries' own
        exec(compile(code, "docs/export.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_is_accepted_and_goes_on_when_it_is_repeated(
    command: str, work: Workspace, capfilt: Capfilt
) -> None:
    words = [*shlex.split(command, comments=True)[1:], "--json"]
    status, out, _ = capfilt(*words)
    first = json.loads(out)
    assert (status, first["written"]) == (0, first["files"])
    assert first["pairs"] == 5 + ("--config" in words or "csv" in words)
    status, out, _ = capfilt(*words)
    assert (status, json.loads(out)) == (0, first | {"written": 0})


def test_what_was_left_out_is_told(work: Workspace, capfilt: Capfilt) -> None:
    status, out, _ = capfilt("export", "out", "--workspace", "work")
    assert status == 0
    told, left_out = out.splitlines()
    assert told.startswith("5 pairs of round 1 in 1 files, ")
    assert left_out.startswith("1 left out, no_human_table: a human pair")


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (("--where", "itm_skore > 1"), 2, "itm_skore"),
        (("--shard-size", "5 apples"), 2, "5 apples"),
        (("--round", "3"), 1, "round 3 has no corpus"),
        (("--config", "none.yaml"), 2, "none.yaml"),
        (("--workspace", "nowhere"), 1, "nowhere"),
    ],
)
def test_what_cannot_be_exported_gets_one_line_and_makes_no_folder(
    arguments: tuple[str, ...], status: int, named: str, work: Workspace, capfilt: Capfilt
) -> None:
    found, out, err = capfilt("export", "out", "--workspace", "work", *arguments)
    assert (found, out, err.count("\n")) == (status, "", 1)
    assert named in err
    assert not Path("out").exists()


def test_a_folder_of_the_users_own_is_refused(work: Workspace, capfilt: Capfilt) -> None:
    Path("out").mkdir()
    Path("out", "mine.txt").write_text("mine")
    status, _, err = capfilt("export", "out", "--workspace", "work")
    assert status == 1
    assert "mine.txt" in err
    assert [path.name for path in Path("out").iterdir()] == ["mine.txt"]
