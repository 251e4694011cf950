"""The flows under Prefect's test server: they make what is missing, try again what may pass, and lose nothing."""

import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard
from prefect import flow, task
from prefect.artifacts import Artifact
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from blip_core.config import BootstrapConfig, load_config
from blip_core.corpus.explain import explain
from blip_core.errors import CapfiltError, CheckpointError, ShardError
from blip_core.files import read_json
from blip_core.scenes.server import serve_scenes
from blip_core.scenes.web import ScenesConfig, make_scenes, url_table
from blip_core.workspace import Workspace
from flows.annotate import annotate
from flows.bootstrap import bootstrap
from flows.clean import clean
from flows.demo import demo
from flows.download import download
from flows.replay import replay_story
from flows.server import free_port
from flows.shards import over_batches, over_shards
from tasks.download import download_shard, network_failed, plan_shards

pytestmark = pytest.mark.usefixtures("prefect_server")

Configure = Callable[..., Path]


@pytest.fixture(scope="module")
def finished(tiny_web: Path, tmp_path_factory: pytest.TempPathFactory) -> BootstrapConfig:
    """The configuration of a round that one `bootstrap` made."""
    values = {
        "workspace": str(tmp_path_factory.mktemp("finished")),
        "web": {"path": str(tiny_web / "urls.parquet"), "caption": "alt", "uid": "uid"},
        "human": {"path": str(tiny_web / "human.parquet")},
        "held_out": {"path": str(tiny_web / "held_out.parquet")},
        "truth": str(tiny_web / "truth.parquet"),
    }
    config = load_config(Path(__file__).with_name("tiny.yaml"), values)
    bootstrap(config)
    return config


def files_of(config: BootstrapConfig) -> dict[str, tuple[int, int]]:
    """Inode and time of writing of every file of the workspace; the catalog is views, made anew each time."""
    root = Path(config.workspace)
    return {
        str(path.relative_to(root)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file() and path.name != "catalog.duckdb"
    }


def test_bootstrap_makes_every_part_of_the_round(finished: BootstrapConfig) -> None:
    workspace = Workspace.existing(finished.workspace)
    made = workspace.round(1)
    shards = [path.name for path in workspace.shard_paths()]
    assert len(shards) == 2
    assert sorted(path.name for path in made.annotations.iterdir()) == shards
    assert sorted(path.name for path in made.embeddings.iterdir()) == shards
    assert sorted(path.name for path in made.corpus.glob("[!h]*.parquet")) == shards
    assert (made.corpus / "README.md").is_file()
    for folder in (made.med, made.captioner, made.filter, made.retrained, made.retrained_raw):
        assert (folder / "model.safetensors").is_file()
        assert ModelCard.load(folder / "README.md").data.library_name == "capfilt"
    assert "text to image, R@1" in (made.retrained / "README.md").read_text()
    assert {"retrieval", "captioning", "audit"} <= read_json(made.evaluation).keys()
    assert "data:image/" in made.report.read_text()
    assert workspace.catalog.is_file()
    steps = ("download", "pretrain", "finetune_captioner", "finetune_filter", "annotate", "publish", "retrain")
    assert {*steps, "retrain_raw", "evaluation", "report"} == read_json(made.seconds).keys()


def test_no_row_is_lost_between_table_and_corpus(finished: BootstrapConfig, tiny_web: Path) -> None:
    workspace = Workspace.existing(finished.workspace)
    uids = [uid for path in workspace.shard_paths() for uid in pq.read_table(path)["uid"].to_pylist()]
    assert sorted(uids) == sorted(pq.read_table(tiny_web / "urls.parquet")["uid"].to_pylist())
    for shard in workspace.shard_paths():
        images = pq.read_table(shard)["status"].to_pylist().count("ok")
        assert pq.read_metadata(workspace.round(1).annotations / shard.name).num_rows == 3 * images
        metadata = pq.read_schema(workspace.round(1).corpus / shard.name).metadata
        assert int(metadata[b"capfilt.kept"]) + int(metadata[b"capfilt.rejected"]) == 3 * images


def test_a_second_bootstrap_does_no_step_again(finished: BootstrapConfig) -> None:
    before = files_of(finished)
    bootstrap(finished)
    assert files_of(finished) == before


def test_the_round_is_shown_in_the_ui_as_a_table_and_as_pictures(finished: BootstrapConfig) -> None:
    numbers, pictures = Artifact.get("round-numbers"), Artifact.get("round-pictures")
    assert numbers is not None
    assert '"filter_auc"' in numbers.data
    assert pictures is not None
    assert "](data:image/svg+xml;base64," in pictures.data


def test_every_candidate_of_the_round_comes_out_again_from_what_is_recorded(finished: BootstrapConfig) -> None:
    workspace = Workspace.existing(finished.workspace)
    rows = [row for part in workspace.shard_paths() for row in pq.read_table(part).to_pylist()]
    some = [row["uid"] for row in rows if row["status"] == "ok"][::9]
    assert len(some) > 4
    for uid in some:
        (made,) = replay_story(workspace, explain(workspace, uid))
        assert made["agrees"], made
        assert made["models"]["captioner"]["source"] == str(workspace.round(1).captioner)


def test_clean_makes_a_corpus_with_given_models_and_trains_nothing(
    finished: BootstrapConfig, configure: Configure
) -> None:
    trained = Workspace.existing(finished.workspace).round(1)
    given = {"captioner": str(trained.captioner), "filter": str(trained.filter)}
    config = load_config(configure(checkpoints=given))
    clean(config)
    made = Workspace.existing(config.workspace).round(1)
    for part in sorted(trained.corpus.glob("*.parquet")):
        assert (made.corpus / part.name).read_bytes() == part.read_bytes()
    assert not made.med.exists()
    assert not made.metrics.exists()


def test_a_torn_shard_is_named_and_leaves_no_annotation(finished: BootstrapConfig, configure: Configure) -> None:
    trained = Workspace.existing(finished.workspace)
    given = {"captioner": str(trained.round(1).captioner), "filter": str(trained.round(1).filter)}
    config = load_config(configure(checkpoints=given))
    workspace = Workspace.open(config.workspace)
    workspace.shards.mkdir()
    whole, torn = (workspace.shards / path.name for path in trained.shard_paths())
    whole.write_bytes(trained.shard(whole.stem).read_bytes())
    torn.write_bytes(trained.shard(torn.stem).read_bytes()[:-1000])
    with pytest.raises(CapfiltError, match=torn.stem):
        annotate(config)
    assert [path.name for path in workspace.round(1).annotations.iterdir()] == [whole.name]
    assert [path.name for path in workspace.round(1).embeddings.iterdir()] == [whole.name]


def test_a_checkpoint_of_another_shape_is_named_and_leaves_no_annotation(
    finished: BootstrapConfig, configure: Configure, tmp_path: Path
) -> None:
    trained = Workspace.existing(finished.workspace)
    strange = tmp_path / "strange"
    strange.mkdir()
    for file in trained.round(1).filter.iterdir():
        (strange / file.name).write_bytes(file.read_bytes())
    text = (strange / "config.json").read_text()
    (strange / "config.json").write_text(text.replace('"projection": 16', '"projection": 24'))
    config = load_config(configure(checkpoints={"captioner": str(trained.round(1).captioner), "filter": str(strange)}))
    workspace = Workspace.open(config.workspace)
    workspace.shards.mkdir()
    for shard in trained.shard_paths():
        workspace.shard(shard.stem).write_bytes(shard.read_bytes())
    with pytest.raises(CapfiltError, match=str(strange)) as caught:
        annotate(config)
    assert isinstance(caught.value.__cause__, CheckpointError)
    assert not list(workspace.round(1).annotations.glob("*"))
    assert not list(workspace.round(1).embeddings.glob("*"))


def test_a_shard_is_tried_again_until_the_network_is_back(configure: Configure, tmp_path: Path) -> None:
    paths = make_scenes(
        tmp_path / "late",
        ScenesConfig(
            web_images=4, human_pairs=1, held_out=1, dead_links=0, non_images=0, truncated=0, oversized=0, duplicates=0
        ),
    )
    port = free_port()
    urls = url_table(paths, f"http://127.0.0.1:{port}", tmp_path / "late.parquet")
    config = load_config(configure(web={"path": str(urls), "caption": "alt", "uid": "uid"}))
    web = serve_scenes(paths.folder, port)
    failures = []

    def comes_back(*failure: Any) -> bool:
        again = network_failed(*failure)
        failures.append(again)
        web.__enter__()
        return again

    patient = download_shard.with_options(retry_delay_seconds=0, retry_jitter_factor=0, retry_condition_fn=comes_back)

    @flow
    def download_late() -> None:
        over_shards("download", patient, config, plan_shards(config).names, 1)

    try:
        download_late()
    finally:
        if failures:
            web.__exit__(None, None, None)
    assert failures == [True]
    (shard,) = Workspace(Path(config.workspace)).shard_paths()
    assert pq.read_table(shard)["status"].to_pylist() == ["ok"] * 4


def test_what_stands_is_not_handed_to_prefect_at_all(
    finished: BootstrapConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[str] = []
    monkeypatch.setattr("flows.download.over_shards", lambda *arguments: handed.extend(arguments[3]))
    monkeypatch.setattr("flows.annotate.over_batches", lambda *arguments: handed.extend(arguments[3]))
    download(finished)
    annotate(finished)
    assert handed == []


def test_demo_serves_the_web_it_makes_while_the_cycle_runs(
    monkeypatch: pytest.MonkeyPatch, configure: Configure, tmp_path: Path
) -> None:
    fetched: list[bytes] = []

    def cycle(config: BootstrapConfig) -> None:
        rows = pq.read_table(config.web.path).to_pylist()
        truth = {row["uid"]: row["scene"] for row in pq.read_table(str(config.truth)).to_pylist()}
        url = next(row["url"] for row in rows if truth[row["uid"]] is not None)
        with urllib.request.urlopen(url, timeout=10) as answer:
            fetched.append(answer.read())

    monkeypatch.setattr("flows.demo.bootstrap", cycle)
    tables = tmp_path / "workspace" / "scenes"
    config = load_config(configure(web={"path": str(tables / "urls.parquet")}, truth=str(tables / "truth.parquet")))
    demo(config, ScenesConfig(web_images=4, human_pairs=1, held_out=1, oversized=0))
    assert fetched[0].startswith(b"\xff\xd8")


class TestOverShards:
    """The window, on tasks that need no data."""

    def test_a_failed_shard_is_named_and_the_others_are_done(self, configure: Configure) -> None:
        done: list[str] = []

        @task(cache_policy=NO_CACHE)
        def work(config: BootstrapConfig, name: str) -> None:
            if name == "b":
                raise ShardError("b.parquet: torn")
            done.append(name)

        with pytest.raises(CapfiltError, match=r"1 of 4 shards failed.*b: b\.parquet: torn"):
            self.run(work, list("abcd"), 2, configure)
        assert sorted(done) == ["a", "c", "d"]

    def test_a_task_is_not_tried_again_for_another_reason_than_the_network(self, configure: Configure) -> None:
        tries: list[str] = []

        @task(cache_policy=NO_CACHE, retries=3, retry_condition_fn=network_failed)
        def work(config: BootstrapConfig, name: str) -> None:
            tries.append(name)
            raise ShardError("torn")

        with pytest.raises(CapfiltError, match="1 of 1 shards failed"):
            self.run(work, ["a"], 1, configure)
        assert tries == ["a"]

    def test_no_more_shards_run_at_a_time_than_the_window_is_wide(self, configure: Configure) -> None:
        lock, running, most, done = threading.Lock(), [0], [0], list[str]()
        both = threading.Barrier(2, timeout=60)

        @task(cache_policy=NO_CACHE)
        def work(config: BootstrapConfig, name: str) -> None:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            both.wait()
            with lock:
                running[0] -= 1
                done.append(name)

        self.run(work, list("abcdef"), 2, configure)
        assert sorted(done) == list("abcdef")
        assert most == [2]

    def test_very_many_shards_are_a_bounded_number_of_tasks(
        self, configure: Configure, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("flows.shards.MOST_TASKS", 3)
        batches: list[list[str]] = []

        @task(cache_policy=NO_CACHE)
        def work(config: BootstrapConfig, name: str) -> None:
            raise AssertionError(f"a task for {name} alone")

        @task(cache_policy=NO_CACHE)
        def together(config: BootstrapConfig, names: list[str]) -> dict[str, CapfiltError]:
            batches.append(names)
            return {"c": ShardError("c.parquet: torn")} if "c" in names else {}

        with pytest.raises(CapfiltError, match=r"1 of 8 shards failed.*c: c\.parquet: torn"):
            self.run(work, list("abcdefgh"), 2, configure, together)
        assert sorted(batches) == [["a", "b", "c"], ["d", "e", "f"], ["g", "h"]]

    @staticmethod
    def run(work: Any, names: list[str], window: int, configure: Configure, together: Any = None) -> None:
        config = load_config(configure())

        @flow(task_runner=ThreadPoolTaskRunner(max_workers=8))
        def step() -> None:
            over_shards("step", work, config, names, window, together)

        step()


class TestOverBatches:
    """Batches of shards, on tasks that need no data."""

    def test_failures_of_single_shards_are_collected_and_named_when_all_others_are_done(
        self, configure: Configure
    ) -> None:
        batches: list[list[str]] = []

        @task(cache_policy=NO_CACHE)
        def work(config: BootstrapConfig, names: list[str]) -> dict[str, CapfiltError]:
            batches.append(names)
            return {name: ShardError(f"{name}.parquet: torn") for name in names if name in "bcfg"}

        with pytest.raises(CapfiltError, match=r"4 of 7 shards failed.*b: b\.parquet: torn; c: .*; f: .*; and 1 more"):
            self.run(work, list("abcdefg"), 3, configure)
        assert batches == [["a", "b", "c"], ["d", "e", "f"], ["g"]]

    def test_a_batch_that_fails_as_a_whole_ends_the_step_with_its_cause(self, configure: Configure) -> None:
        batches: list[list[str]] = []

        @task(cache_policy=NO_CACHE)
        def work(config: BootstrapConfig, names: list[str]) -> dict[str, CapfiltError]:
            batches.append(names)
            if "c" in names:
                raise CheckpointError("captioner: not found")
            return {}

        with pytest.raises(CapfiltError, match=r"4 of 6 shards failed.*c: captioner: not found") as caught:
            self.run(work, list("abcdef"), 2, configure)
        assert isinstance(caught.value.__cause__, CheckpointError)
        assert batches == [["a", "b"], ["c", "d"]]

    def test_without_a_failure_nothing_is_raised(self, configure: Configure) -> None:
        @task(cache_policy=NO_CACHE)
        def work(config: BootstrapConfig, names: list[str]) -> dict[str, CapfiltError]:
            return {}

        self.run(work, list("ab"), 2, configure)

    @staticmethod
    def run(work: Any, names: list[str], size: int, configure: Configure) -> None:
        config = load_config(configure())

        @flow(task_runner=ThreadPoolTaskRunner(max_workers=1))
        def step() -> None:
            over_batches("step", work, config, names, size)

        step()
