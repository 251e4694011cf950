"""`capfilt clean` from a URL table to the corpus, with models as others publish them, through the command line."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest

import flows.run
from blip_core.config import BootstrapConfig
from blip_core.med.checkpoint import load_med
from blip_core.med.convert import Kind, write_release
from blip_core.med.description import read_checkpoint_config
from blip_core.workspace import Workspace
from flows.clean import clean

Capfilt = Callable[..., tuple[int, str, str]]

PRESET = Path(__file__).parents[2] / "deployments" / "presets" / "clean.yaml"
SMALL = ("annotate.precision=fp32", "annotate.candidates=2", "annotate.workers=0", "annotate.batch_size=8")
SMALL += ("download.rows_per_shard=20", "download.processes=1", "download.threads=8", "download.retries=0")
SMALL += ("download.allow_private_networks=true",)
SMALL += ("web.caption=alt", "web.uid=uid")


def arguments(table: Path, workspace: Path, models: dict[str, Path], *more: str) -> list[str]:
    """Of `capfilt clean` with the preset, whose models are replaced and whose work is made small."""
    named = [word for name, path in models.items() for word in (f"--{name}", str(path))]
    settings = [word for setting in SMALL for word in ("--set", setting)]
    return ["clean", str(PRESET), "--urls", str(table), "--workspace", str(workspace), *named, *settings, *more]


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.parquet")}


class Cleaned(NamedTuple):
    """A trial and the full run after it, each by a process of its own."""

    workspace: Workspace
    trial: str
    after_trial: dict[str, dict[str, tuple[int, int]]]
    numbers: dict[str, Any]
    log: str


@pytest.fixture(scope="module")
def models(published: Path) -> dict[str, Path]:
    return {"captioner": published / "captioner", "filter": published / "filter"}


@pytest.fixture(scope="module")
def cleaned(models: dict[str, Path], tiny_web: Path, tmp_path_factory: pytest.TempPathFactory) -> Cleaned:
    folder = tmp_path_factory.mktemp("cleaned")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment["PYTHONPATH"] = str(PRESET.parents[2])
    # the current folder is that of the table, which is then named as a user there would
    table = Path("urls.parquet")

    def run(*more: str) -> tuple[str, str]:
        command = [sys.executable, "-m", "flows", *arguments(table, folder / "work", models, *more)]
        path = {"PYTHONPATH": str(PRESET.parents[2])}
        answer = subprocess.run(
            command, capture_output=True, text=True, cwd=tiny_web, env=environment | path, check=False
        )
        assert answer.returncode == 0, answer.stderr
        return answer.stdout, answer.stderr

    workspace = Workspace(folder / "work")
    made = workspace.round(1)
    trial, _ = run("--limit", "30")
    folders = (workspace.shards, made.annotations, made.embeddings, made.corpus)
    after_trial = {path.name: state(path) for path in folders}
    numbers, log = run("--json")
    return Cleaned(workspace, trial, after_trial, json.loads(numbers), log)


def test_a_trial_takes_exactly_so_many_rows_and_the_full_run_finds_its_parts_standing(
    cleaned: Cleaned, tiny_web: Path
) -> None:
    made = cleaned.workspace.round(1)
    every = sorted(pq.read_table(tiny_web / "urls.parquet")["uid"].to_pylist())
    assert [len(parts) for parts in cleaned.after_trial.values()] == [2, 2, 2, 2]
    trial = [cleaned.workspace.shards / name for name in cleaned.after_trial["shards"]]
    assert sorted(uid for path in trial for uid in pq.read_table(path)["uid"].to_pylist()) == every[:30]
    for folder in (cleaned.workspace.shards, made.annotations, made.embeddings, made.corpus):
        now, before = state(folder), cleaned.after_trial[folder.name]
        assert {name: now[name] for name in before} == before
        assert len(now) == 2 + -(-(len(every) - 30) // 20)
    rows = [uid for path in cleaned.workspace.shard_paths() for uid in pq.read_table(path)["uid"].to_pylist()]
    assert sorted(rows) == every


def test_the_summary_of_the_trial_and_the_numbers_of_the_full_run_are_those_of_the_parts(cleaned: Cleaned) -> None:
    made, numbers = cleaned.workspace.round(1), cleaned.numbers
    shards = pq.read_table(cleaned.workspace.shards, partitioning=None).to_pylist()
    annotations = pq.read_table(made.annotations, partitioning=None).to_pylist()
    corpus = pq.read_table(sorted(made.corpus.glob("*.parquet")), partitioning=None).to_pylist()
    images = sum(row["status"] == "ok" for row in shards)
    assert numbers["download"]["rows"] == len(shards)
    assert (numbers["images"], numbers["candidates"]) == (images, len(annotations))
    assert len(annotations) == 3 * images
    assert sum(numbers["download"]["reasons"].values()) == len(shards) - images > 0
    for source in ("web", "synthetic"):
        of_source = [row for row in annotations if row["source"] == source]
        kept = [row for row in of_source if (row["itm_score"] or 0) > 0.5]
        assert numbers["by_source"][source] == {"candidates": len(of_source), "accepted": len(kept)}
        scores = [row["itm_score"] for row in of_source if row["reason"] is None]
        assert numbers["scores"][source]["itm_score"] == pytest.approx(sum(scores) / len(scores))
    assert 0 < len(corpus) < len(annotations)
    assert numbers["images_per_second"] > 0
    assert {"download", "annotate", "publish", "report"} <= numbers["seconds"].keys()
    assert Path(numbers["corpus"]) == made.corpus
    assert "data:image/" in Path(numbers["html"]).read_text()
    for word in (
        "rows",
        "images",
        "failed, not_found",
        "web texts kept",
        "synthetic texts, mean itm_score",
        "images/s",
    ):
        assert f" {word} " in cleaned.trial.replace("images/s, annotation", "images/s")


def test_the_example_query_of_the_summary_runs(cleaned: Cleaned, capfilt: Capfilt) -> None:
    line = next(line for line in cleaned.trial.splitlines() if line.startswith("capfilt query"))
    status, out, _ = capfilt(*shlex.split(line)[1:], "--json")
    assert status == 0
    assert len(json.loads(out)) == 10


def test_progress_counts_images_and_says_how_fast(cleaned: Cleaned) -> None:
    rows, images = cleaned.numbers["download"]["rows"], cleaned.numbers["images"]
    assert f"download: {rows} of {rows}" in cleaned.log
    assert f"annotate: {images} of {images}" in cleaned.log
    assert "images/s" in cleaned.log


def test_a_pictures_caption_is_what_annotation_writes_for_the_same_bytes(
    cleaned: Cleaned, models: dict[str, Path], capfilt: Capfilt, tmp_path: Path
) -> None:
    shard = cleaned.workspace.shard_paths()[0]
    images = [row for row in pq.read_table(shard).to_pylist() if row["status"] == "ok"][:3]
    annotations = pq.read_table(cleaned.workspace.round(1).annotations / shard.name).to_pylist()
    for row in images:
        (tmp_path / f"{row['uid']}.jpg").write_bytes(row["image"])
    names = [str(tmp_path / f"{row['uid']}.jpg") for row in images]
    generation = ("--prompt", "a picture of", "--top-k", "50", "--repetition-penalty", "1.1")
    generation += ("--max-length", "19", "--min-length", "4")
    status, out, _ = capfilt(
        "caption", *names, "--captioner", str(models["captioner"]), "--candidates", "2", *generation,
        "--filter", str(models["filter"]), "--json",
    )  # fmt: skip
    assert status == 0
    found = json.loads(out)
    expected = [row for image in images for row in annotations if row["uid"] == image["uid"] and row["candidate"]]
    assert [row["caption"] for row in found] == [row["text"] for row in expected]
    assert [row["image"] for row in found] == [name for name in names for _ in range(2)]
    for key in ("logprob", "itm_score", "itc_score"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], abs=1e-5)


@pytest.fixture
def in_process(capfilt: Capfilt, monkeypatch: pytest.MonkeyPatch, prefect_server: None) -> None:
    """Lets the command run the flow under the tests' own Prefect server."""

    def run(name: str, config: BootstrapConfig, verbose: bool) -> None:
        assert name == "clean"
        clean(config)

    monkeypatch.setattr(flows.run, "run_flow", run)


@pytest.mark.usefixtures("in_process")
def test_files_of_the_original_release_go_through_the_whole_flow(
    models: dict[str, Path], tiny_web: Path, capfilt: Capfilt, tmp_path: Path
) -> None:
    kinds: tuple[Kind, ...] = ("captioner", "filter")
    files = {kind: tmp_path / f"{kind}.pth" for kind in kinds}
    for kind, path in files.items():
        write_release(path, load_med(models[kind]), kind)
    status, out, err = capfilt(
        *arguments(tiny_web / "urls.parquet", tmp_path / "work", files, "--limit", "15", "--json"),
        "--tokenizer", str(models["filter"]),
    )  # fmt: skip
    assert status == 0, err
    digests = {kind: [read_checkpoint_config(path)["digest"]] for kind, path in files.items()}
    assert json.loads(out)["models"] == digests


@pytest.mark.usefixtures("in_process")
def test_names_on_the_hub_go_through_the_whole_flow_with_their_weights_digests(
    models: dict[str, Path], tiny_web: Path, capfilt: Capfilt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = {f"someone/{kind}": path for kind, path in models.items()}
    monkeypatch.setattr("blip_core.med.sources.snapshot_download", lambda name, **_: str(hub[name]))
    names = {kind: Path(f"someone/{kind}") for kind in models}
    status, out, err = capfilt(
        *arguments(tiny_web / "urls.parquet", tmp_path / "work", names, "--limit", "15", "--json")
    )
    assert status == 0, err
    digests = {kind: [read_checkpoint_config(path)["digest"]] for kind, path in models.items()}
    assert json.loads(out)["models"] == digests


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of writing of all that lies there."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def test_a_dry_run_plans_a_fresh_workspace_measures_and_makes_nothing(
    models: dict[str, Path], tiny_web: Path, capfilt: Capfilt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("flows.plan.SECONDS", 0.1)
    table, work = tiny_web / "urls.parquet", tmp_path / "deep" / "work"
    rows = pq.read_metadata(table).num_rows
    status, out, err = capfilt(
        *arguments(table, work, models, "--dry-run", "--limit", "30", "--price-per-hour", "3.6", "--json")
    )
    assert status == 0, err
    plan = json.loads(out)
    assert list(tmp_path.iterdir()) == []
    assert plan["table"] == {"path": str(table), "rows": rows, "limit": 30, "taken": 30}
    assert plan["download"] == {
        "rows_to_fetch": 30, "rows_standing": 0, "shards_to_fetch": 2, "shards_standing": 0
    }  # fmt: skip
    assert plan["annotate"]["shards_to_annotate"] == 2
    for kind, path in models.items():
        digest = read_checkpoint_config(path)["digest"]
        assert plan["models"][kind] == {"source": str(path), "digest": digest}
    settings = plan["settings"]
    assert (settings["precision"], settings["images_a_batch"], settings["candidates"]) == ("fp32", 8, 2)
    assert plan["writes"]["embeddings"] == str(work / "rounds" / "0001" / "embeddings")
    assert plan["writes"]["corpus"] == str(work / "rounds" / "0001" / "corpus")
    estimate = plan["estimate"]
    speed = estimate["images_per_second"]
    assert speed == pytest.approx(estimate["probe_images"] / estimate["probe_seconds"], rel=0.01)
    assert estimate["hours_of_this_run"] == pytest.approx(30 / speed / 3600)
    assert estimate["hours_of_the_whole_table"] == pytest.approx(rows / speed / 3600)
    assert estimate["cost_per_1000_images"] == pytest.approx(1000 / speed * 0.001)  # 3.6 an hour, 0.001 a second
    assert estimate["cost_of_the_whole_table"] == pytest.approx(rows / speed * 0.001)


def test_a_dry_run_finds_what_stands_and_leaves_it_as_it_is(
    cleaned: Cleaned, models: dict[str, Path], tiny_web: Path, capfilt: Capfilt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.plan.SECONDS", 0.1)
    table, root = tiny_web / "urls.parquet", cleaned.workspace.root
    before = everything(root)

    def plan(*more: str) -> dict[str, Any]:
        status, out, err = capfilt(*arguments(table, root, models, "--dry-run", "--json", *more))
        assert status == 0, err
        return json.loads(out)

    standing, images = len(cleaned.workspace.shard_paths()), cleaned.numbers["images"]
    same, other, trial = plan(), plan("--seed", "1"), plan("--limit", "30")
    assert (same["download"]["shards_standing"], same["download"]["rows_to_fetch"]) == (standing, 0)
    assert (same["annotate"]["shards_standing"], same["annotate"]["images_to_annotate_at_most"]) == (standing, 0)
    assert (other["annotate"]["shards_to_annotate"], other["annotate"]["images_to_annotate_at_most"]) == (
        standing,
        images,
    )
    assert trial["annotate"]["shards_standing"] == 2
    assert other["estimate"]["cost_per_1000_images"] is None
    assert everything(root) == before


def test_a_dry_run_is_shown_as_a_table_and_names_what_is_wrong_as_a_run_does(
    cleaned: Cleaned, models: dict[str, Path], tiny_web: Path, capfilt: Capfilt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.plan.SECONDS", 0.1)
    table, root = tiny_web / "urls.parquet", cleaned.workspace.root
    status, out, _ = capfilt(*arguments(table, root, models, "--dry-run"))
    assert status == 0
    for name in ("table: rows", "models: captioner", "settings: precision", "estimate: images per second"):
        assert f" {name} " in out
    status, out, err = capfilt(*arguments(table, root, models, "--dry-run", "--set", "publish.where=itm_scor > 1"))
    assert (status, out) == (2, "")
    assert "itm_scor" in err


def test_a_release_file_without_word_pieces_and_a_name_without_a_network_are_told_before_anything_is_made(
    models: dict[str, Path], tiny_web: Path, capfilt: Capfilt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_release(tmp_path / "filter.pth", load_med(models["filter"]), "filter")
    table = tiny_web / "urls.parquet"
    for source, named in (
        (tmp_path / "filter.pth", "tokenizer bert-base-uncased"),
        (Path("someone/no-such-filter"), "checkpoint someone/no-such-filter"),
    ):
        status, out, err = capfilt(*arguments(table, tmp_path / "work", {**models, "filter": source}))
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert named in err
        assert "give the path of a folder" in err
        assert not (tmp_path / "work").exists()


def test_a_table_may_be_left_to_the_configuration_but_not_left_out(capfilt: Capfilt, models: dict[str, Path]) -> None:
    status, _, err = capfilt("clean", str(PRESET), "--captioner", str(models["captioner"]))
    assert (status, err.count("\n")) == (2, 1)
    assert "--urls TABLE" in err


def test_a_price_is_for_the_dry_run(capfilt: Capfilt) -> None:
    status, _, err = capfilt("clean", str(PRESET), "--urls", "urls.parquet", "--price-per-hour", "2")
    assert (status, err.count("\n")) == (2, 1)
    assert "--dry-run" in err
