"""What is forgotten is nowhere in the workspace any more, and all the rest is as if it had never been there."""

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip_core.capfilt.parts import AnnotateConfig, ShardJob, mark_of, standing_part
from blip_core.corpus.catalog import build_catalog
from blip_core.corpus.forget import forget
from blip_core.corpus.names import parse_names
from blip_core.corpus.query import run_query
from blip_core.corpus.schemas import (
    ANNOTATION_SCHEMA,
    ANNOTATION_VERSION,
    EMBEDDING_VERSION,
    embedding_schema,
    part_writer,
)
from blip_core.corpus.selection import publish_human, publish_shard
from blip_core.data.denied import NOTHING, read_denied, veil
from blip_core.data.shards import SHARD_SCHEMA, read_shard, write_shard
from blip_core.data.tables import PairTable
from blip_core.evaluation.audit_page import write_page
from blip_core.evaluation.card import write_card
from blip_core.evaluation.pictures import thumbnail
from blip_core.evaluation.report import write_report
from blip_core.evaluation.sample import draw_sample
from blip_core.files import write_json
from blip_core.med.decoding import GenerationConfig
from blip_core.workspace import Workspace

SHARDS = ("aaaa000000000001", "bbbb000000000002")
ROWS = 70  # more than are read at once
FAILED = 69
GONE = "aaaa-07"
PAGE = "http://pictures.example.test/aaaa/07.jpg"
MODELS = ("c0ffee", "f11733")
SETTINGS = (*MODELS, AnnotateConfig(), GenerationConfig(), 3)
WHERE = "itm_score > 0.4"


class KilledError(BaseException):
    """Stands for the signal that ends the process."""


class Stage(NamedTuple):
    """A workspace in which everything that can show an image stands."""

    workspace: Workspace
    human: PairTable


def picture(seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG")
    return file.getvalue()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def shard_rows(shard: str) -> list[dict[str, Any]]:
    """Row 9 has the image of row 8 at another domain; the last one failed."""
    rows = []
    for number in range(ROWS):
        host = "mirror.test" if number == 9 else "pictures.example.test"
        row = {"uid": f"{shard[:4]}-{number:02d}", "url": f"http://{host}/{shard[:4]}/{number:02d}.jpg"}
        row |= {"caption": f"web caption {number} of {shard}"}
        if number == FAILED:
            rows.append(row | {"status": "failed", "reason": "not_found"})
            continue
        image = picture((8 if number == 9 else number) + 1000 * SHARDS.index(shard))
        size = {"width": 24, "height": 20, "original_width": 240, "original_height": 200}
        rows.append(row | size | {"status": "ok", "sha256": digest(image), "image": image})
    return rows


def write_images(workspace: Workspace, shard: str, rows: list[dict[str, Any]]) -> None:
    workspace.shards.mkdir(exist_ok=True)
    write_shard(workspace.shard(shard), [pa.Table.from_pylist(rows, SHARD_SCHEMA)], "0", len(rows))


def write_annotations(workspace: Workspace, number: int, shard: str, rows: list[dict[str, Any]]) -> Path:
    """What an annotation of these rows is; every seventh synthetic text is empty."""
    found = []
    for row in (row for row in rows if row["status"] == "ok"):
        shared = {"uid": row["uid"], "shard": shard, "url": row["url"], "image_sha256": row["sha256"]}
        shared |= dict(zip(("captioner", "filter"), MODELS, strict=True))
        score = int(row["uid"][-2:]) / 70
        found.append({**shared, "text": row["caption"], "source": "web", "candidate": 0, "itm_score": score})
        empty = int(row["uid"][-2:]) % 7 == 0
        own = {"reason": "empty_text", "text": ""} if empty else {"itm_score": 1 - score}
        text = f"synthetic text of {row['uid']}"
        found.append({**shared, "text": text, "source": "synthetic", "candidate": 1, "seed": 5} | own)
    path = workspace.round(number).annotations / f"{shard}.parquet"
    mark = mark_of(ShardJob(workspace.shard(shard), path), *SETTINGS)
    with part_writer(path, ANNOTATION_SCHEMA, ANNOTATION_VERSION, mark, {"capfilt.filter": MODELS[1]}) as part:
        part.write(pa.Table.from_pylist(found, ANNOTATION_SCHEMA))
        images, unscored = len(found) // 2, sum(row.get("reason") is not None for row in found)
        counts = (images, len(found), unscored)
        part.describe({f"capfilt.{key}": str(n) for key, n in zip(("images", "rows", "unscored"), counts, strict=True)})
    return path


def write_embeddings(workspace: Workspace, number: int, shard: str, rows: list[dict[str, Any]]) -> None:
    uids = [row["uid"] for row in rows if row["status"] == "ok"]
    values = np.array([[int(uid[-2:]), 1, 2, 3] for uid in uids], np.float16)
    table = pa.table({"uid": uids, "embedding": list(values)}, schema=embedding_schema(4))
    path = workspace.round(number).embeddings / f"{shard}.parquet"
    with part_writer(path, embedding_schema(4), EMBEDDING_VERSION, "e", {"capfilt.filter": MODELS[1]}) as part:
        part.write(table)


def publish(workspace: Workspace, denied: Any = NOTHING) -> list[bool]:
    """Publishes all rounds; says of each part whether it stood already."""
    skipped = []
    for number in workspace.round_numbers():
        made = workspace.round(number)
        for part in sorted(made.annotations.glob("*.parquet")):
            target = made.corpus / part.name
            summary = publish_shard(part, workspace.shard(part.stem), target, WHERE, number, denied=denied)
            skipped.append(summary.skipped)
    return skipped


def human_pairs(folder: Path) -> PairTable:
    rows = [{"image": picture(5000 + n), "caption": [f"human caption {n}", f"another of {n}"]} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "human.parquet")
    return PairTable(str(folder / "human.parquet"))


def checkpoint(folder: Path, digest: str, start: str | None, number: int, sources: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    write_json(
        folder / "config.json", {"med": {}, "faces": ["encoder"], "vocabulary": 9, "digest": digest, "start": start}
    )
    write_json(folder / "data.json", {"schema": "data/1", "round": number, "digest": "", "sources": sources})


def make(root: Path) -> Stage:
    """Two shards in two rounds with all that is made of them; the checkpoints' records are made up."""
    workspace, human = Workspace.open(root / "workspace"), human_pairs(root)
    for shard in SHARDS:
        rows = shard_rows(shard)
        write_images(workspace, shard, rows)
        for number in (1, 2):
            write_annotations(workspace, number, shard, rows)
            write_embeddings(workspace, number, shard, rows)
    publish(workspace)
    publish_human(human, workspace.round(1).corpus, 1)
    held = [
        {
            "uid": uid,
            "image": thumbnail(picture(n)),
            "image_sha256": digest(picture(n)),
            "text": "t",
            "references": ["r"],
        }
        for n, uid in ((7, GONE), (8, "held-8"), (10, "held-10"))
    ]
    write_json(workspace.round(1).evaluation, {"fingerprint": "f", "examples": {"med": held}})
    for number in (1, 2):
        write_report(workspace, number, examples=140)
        write_card(workspace, number)
    write_page(workspace, draw_sample(workspace, 1, 400))
    plan = pa.table({"uid": [GONE], "url": [PAGE], "caption": ["c"], "duplicate": [False]})
    workspace.plans.mkdir()
    pq.write_table(plan, workspace.plans / "cccc.parquet")
    workspace.prefect_home.mkdir()
    (workspace.prefect_home / "prefect.db").write_text(PAGE)
    build_catalog(workspace)
    shard = [{"kind": "shard", "name": SHARDS[0], "digest": "1", "images": 69}]
    other = [{"kind": "shard", "name": SHARDS[1], "digest": "1", "images": 69}]
    pairs = [{"kind": "human", "name": "human.parquet", "digest": "9", "images": 3}]
    checkpoint(workspace.round(1).med, "aa11", None, 1, [*shard, *pairs])
    checkpoint(workspace.round(1).filter, "bb22", "aa11", 1, pairs)
    checkpoint(workspace.round(2).retrained_raw, "cc33", None, 2, other)
    return Stage(workspace, human)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make(folder)
    return folder


@pytest.fixture
def stage(made: Path, tmp_path: Path) -> Stage:
    shutil.copytree(made, tmp_path / "stage")
    return Stage(Workspace.open(tmp_path / "stage" / "workspace"), PairTable(str(tmp_path / "stage" / "human.parquet")))


def contents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Every file as it is; and of Parquet every value and all metadata, of HTML what its data URIs hold, of the
    catalog its statements."""
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name, data = str(path.relative_to(root)), path.read_bytes()
        yield name, data
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            yield name, str(file.metadata.metadata).encode()
            for column in file.read().columns:
                for value in column.to_pylist():
                    yield name, value if isinstance(value, bytes) else str(value).encode()
        elif path.suffix == ".html":
            for found in re.findall(rb"base64,([A-Za-z0-9+/=]+)", data):
                yield name, base64.b64decode(found)
        elif path.suffix == ".duckdb":
            with duckdb.connect(path, read_only=True) as connection:
                connection.execute("SET file_search_path = ?", [str(root)])
                yield name, str(connection.execute("SELECT * FROM duckdb_views()").fetchall()).encode()


def found_in(root: Path, needle: bytes) -> set[str]:
    return {name for name, data in contents(root) if needle in data}


def small(data: bytes) -> bytes:
    """The picture as a page shows it."""
    return base64.b64decode(thumbnail(data).partition(",")[2])


def traces(number: int, shard: str = SHARDS[0]) -> dict[str, bytes]:
    row = shard_rows(shard)[number]
    texts = {"uid": row["uid"], "url": row["url"], "caption": row["caption"], "text": f"synthetic text of {row['uid']}"}
    image = {"image": row["image"], "thumbnail": small(row["image"])}
    return {name: value.encode() for name, value in texts.items()} | image


def test_no_trace_of_a_forgotten_image_is_left_in_any_byte_of_the_workspace(stage: Stage) -> None:
    root = stage.workspace.root
    shown = {name: found_in(root, needle) for name, needle in traces(8).items()}
    everywhere = {f"rounds/{n:04d}/{step}/{SHARDS[0]}.parquet" for n in (1, 2) for step in ("annotations", "corpus")}
    assert shown["url"] >= {*everywhere, f"shards/{SHARDS[0]}.parquet"}
    assert shown["image"] == {f"shards/{SHARDS[0]}.parquet"}
    assert shown["thumbnail"] >= {"rounds/0001/report.html", "rounds/0002/report.html"}
    assert f"rounds/0002/embeddings/{SHARDS[0]}.parquet" in shown["uid"]
    assert found_in(root, PAGE.encode()) >= {".plans/cccc.parquet", ".prefect/prefect.db"}
    found = forget(stage.workspace, parse_names([PAGE, shard_rows(SHARDS[0])[8]["sha256"]]))
    assert (found.rows, found.images, found.plans, found.history) == (3, 3, 1, True)
    for number in found.rounds:
        write_report(stage.workspace, number, examples=140)
        write_card(stage.workspace, number)
    for number in (7, 8, 9):
        for what, needle in traces(number).items():
            assert found_in(root, needle) == set(), what
    assert found_in(root, b"mirror.test/aaaa") == set()
    assert found_in(root, b"mirror.test/bbbb") != set()  # the search does find what is there
    assert found_in(root, traces(10)["thumbnail"]) >= {"rounds/0001/report.html"}


def test_the_rest_is_what_the_steps_make_where_the_image_never_was(stage: Stage, tmp_path: Path) -> None:
    before = stage.workspace.shard(SHARDS[1]).read_bytes()
    forget(stage.workspace, parse_names([PAGE]))
    rows = [row for row in shard_rows(SHARDS[0]) if row["uid"] != GONE]
    veiled = {"uid": veil(GONE), "status": "failed", "reason": "denied_url"}
    never = Workspace.open(tmp_path / "never")
    write_images(never, SHARDS[0], sorted([*rows, veiled], key=lambda row: row["uid"]))
    assert stage.workspace.shard(SHARDS[0]).read_bytes() == never.shard(SHARDS[0]).read_bytes()
    assert stage.workspace.shard(SHARDS[1]).read_bytes() == before
    for number in (1, 2):
        write_annotations(never, number, SHARDS[0], rows)
        write_embeddings(never, number, SHARDS[0], rows)
    publish(never)
    for number in (1, 2):
        ours, theirs = (each.round(number) for each in (stage.workspace, never))
        for step in ("annotations", "embeddings", "corpus"):
            parts = [getattr(each, step) / f"{SHARDS[0]}.parquet" for each in (ours, theirs)]
            tables = [pq.read_table(part) for part in parts]
            assert tables[0].equals(tables[1])
            found, expected = ({k: v for k, v in pq.read_metadata(part).metadata.items() if k != b"ARROW:schema"}
                               for part in parts)  # fmt: skip
            own = {b"capfilt.before", b"capfilt.fingerprint"}  # the corpus is known by the annotations as they were
            assert {k: v for k, v in found.items() if k not in own} == {
                k: v for k, v in expected.items() if k not in own
            }


def test_nothing_is_scored_or_published_again(stage: Stage) -> None:
    forget(stage.workspace, parse_names([PAGE]))
    denied = read_denied(stage.workspace)
    assert publish(stage.workspace, denied) == [True] * 4
    job = ShardJob(stage.workspace.shard(SHARDS[0]), stage.workspace.round(1).annotations / f"{SHARDS[0]}.parquet")
    standing = standing_part(job, *SETTINGS)
    assert standing is not None
    assert (standing.images, standing.candidates, standing.unscored) == (68, 136, 9)
    (stage.workspace.round(1).corpus / job.target.name).unlink()
    kept = pq.read_table(stage.workspace.round(2).corpus / job.target.name).drop_columns("round")
    assert publish(stage.workspace, denied) == [False, True, True, True]
    assert pq.read_table(stage.workspace.round(1).corpus / job.target.name).drop_columns("round").equals(kept)


def test_rows_in_are_still_rows_out(stage: Stage) -> None:
    forget(stage.workspace, parse_names([PAGE]))
    (row,) = run_query(stage.workspace, f"FROM shards WHERE shard = '{SHARDS[0]}'").to_pylist()
    assert (row["rows"], row["images"], row["failed"]) == (70, 68, 2)
    reasons = run_query(stage.workspace, "SELECT reason FROM failures WHERE url IS NULL").to_pylist()
    assert reasons == [{"reason": "denied_url"}]


def test_a_domain_takes_its_subdomains_and_not_the_same_pictures_elsewhere(stage: Stage) -> None:
    found = forget(stage.workspace, parse_names(["Example.TEST."]))
    assert found.rows == 2 * (ROWS - 1)
    left = [row for path in stage.workspace.shard_paths() for row in read_shard(path).to_pylist() if row["url"]]
    assert [row["url"] for row in left] == [f"http://mirror.test/{name}/09.jpg" for name in ("aaaa", "bbbb")]
    assert found_in(stage.workspace.root, b"pictures.example") == set()


def test_a_human_pair_is_forgotten_by_its_sha256(stage: Stage) -> None:
    found = forget(stage.workspace, parse_names([digest(picture(5001)).upper()]))
    assert (found.human, found.rows, found.rounds) == (2, 0, [1])
    (part,) = stage.workspace.round(1).corpus.glob("human-*.parquet")
    assert sorted(pq.read_table(part)["text"].to_pylist()) == [
        "another of 0", "another of 2", "human caption 0", "human caption 2",
    ]  # fmt: skip
    assert found_in(stage.workspace.root, digest(picture(5001)).encode()) == {"denied.jsonl"}
    data, denied = part.read_bytes(), read_denied(stage.workspace)
    assert publish_human(stage.human, part.parent, 1, denied).skipped
    part.unlink()
    publish_human(stage.human, part.parent, 1, denied)
    assert part.read_bytes() == data
    assert {model["kind"]: model["how"] for model in found.checkpoints} == {
        "med": "human pairs",
        "filter": "human pairs",
    }


def test_the_checkpoints_that_saw_it_are_listed_now_and_later(stage: Stage) -> None:
    seen = {"aa11": "web pairs", "bb22": "began with aa11"}
    looked = forget(stage.workspace, parse_names([PAGE]), dry_run=True)
    assert {model["digest"]: model["how"] for model in looked.checkpoints} == seen
    forget(stage.workspace, parse_names([PAGE]))
    again = forget(stage.workspace)
    assert (again.rows, again.pages) == (0, [])
    assert {model["digest"]: model["how"] for model in again.checkpoints} == seen
    shutil.rmtree(stage.workspace.round(1).filter)
    assert [model["digest"] for model in forget(stage.workspace).checkpoints] == ["aa11"]


def test_a_dry_run_counts_and_changes_nothing(stage: Stage) -> None:
    before = {name: digest(data) for name, data in files(stage.workspace.root).items()}
    looked = forget(stage.workspace, parse_names([PAGE]), dry_run=True)
    assert {name: digest(data) for name, data in files(stage.workspace.root).items()} == before
    done = forget(stage.workspace, parse_names([PAGE]))
    assert looked._replace(history=True) == done
    assert sorted(done.pages) == [
        "rounds/0001/audit.html", "rounds/0001/corpus/README.md", "rounds/0001/report.html",
        "rounds/0002/corpus/README.md", "rounds/0002/report.html",
    ]  # fmt: skip
    assert (done.annotations, done.embeddings, done.corpus) == (4, 2, 0)


def files(root: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != "catalog.duckdb"}


def killed_at(step: int, after: bool, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> bool:
    """Runs `act`, killed before or after its n-th change of a file; False where it has fewer."""
    done = 0

    def counting(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == step and not after:
                raise KilledError
            result = change(*arguments, **options)
            if done == step:
                raise KilledError
            return result

        return changed

    with monkeypatch.context() as patched:
        for name in ("replace", "unlink"):
            patched.setattr(Path, name, counting(getattr(Path, name)))
        try:
            act()
        except KilledError:
            return True
    return False


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_step_it_ends_as_unbroken_when_it_is_run_again(
    after: bool, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = parse_names([PAGE, digest(picture(5001))])

    def copied(name: str) -> Workspace:
        shutil.copytree(made / "workspace", tmp_path / name)
        return Workspace.open(tmp_path / name)

    unbroken = copied("unbroken")
    expected = forget(unbroken, names)
    step = 0
    while True:
        step += 1
        workspace = copied(f"killed-{step}")
        if not killed_at(step, after, monkeypatch, lambda: forget(workspace, names)):  # noqa: B023
            break
        for path in workspace.root.rglob("*.parquet"):
            pq.read_table(path)
        again = forget(workspace, names if not workspace.denied.exists() else NOTHING)
        assert files(workspace.root) == files(unbroken.root), step
        how = [{**model, "folder": ""} for model in again.checkpoints]
        assert how == [{**model, "folder": ""} for model in expected.checkpoints]
        shutil.rmtree(workspace.root)
    assert step > 18  # deny list, note, pages, every part


def test_what_a_killed_forgetting_has_left_is_not_published(stage: Stage) -> None:
    workspace = stage.workspace
    shutil.copytree(workspace.root, workspace.root.parent / "copy")
    forget(workspace, parse_names([PAGE, digest(picture(5001))]))
    killed = Workspace.open(workspace.root.parent / "copy")
    shutil.copy(workspace.denied, killed.denied)  # killed right after the deny list
    denied = read_denied(killed)
    publish(killed, denied)
    publish_human(stage.human, killed.round(1).corpus, 1, denied)
    for part in sorted(workspace.round(1).corpus.glob("*.parquet")):
        assert pq.read_table(killed.round(1).corpus / part.name).equals(pq.read_table(part))


def test_in_an_object_store_it_is_as_in_a_folder(stage: Stage, bucket: str) -> None:
    fs = fsspec.filesystem("s3")
    fs.put(str(stage.workspace.root), f"{bucket}/work", recursive=True)
    stored = Workspace.existing(f"{bucket}/work")
    names = parse_names([PAGE, digest(picture(5001))])
    there, here = forget(stored, names), forget(stage.workspace, names)
    keep = {"history", "checkpoints"}
    assert {k: v for k, v in there._asdict().items() if k not in keep} == {
        k: v for k, v in here._asdict().items() if k not in keep
    }
    local = {name: data for name, data in files(stage.workspace.root).items() if not name.startswith(".")}
    root = bucket.removeprefix("s3://") + "/work/"
    found = {name.removeprefix(root): fs.cat_file(name) for name in fs.find(root)}
    assert {n: d for n, d in found.items() if not n.startswith(".") and n != "catalog.duckdb"} == local


def test_the_deny_list_names_no_url(stage: Stage) -> None:
    forget(stage.workspace, parse_names([PAGE, "mirror.test"]))
    lines = [json.loads(line) for line in stage.workspace.denied.read_text().splitlines()]
    assert {"domain": "mirror.test"} in lines
    assert {"image": shard_rows(SHARDS[0])[7]["sha256"]} in lines
    assert {"url": hashlib.sha256(PAGE.removeprefix("http://").encode()).hexdigest()} in lines
    assert len(lines) == 3
