"""A web that means harm, downloaded as any table is, by img2dataset: nothing gets through, and every row says why."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import services
from services.hostile import FORBIDDEN, REDIRECTS, TRICKS, Stage, hostile
from services.ray import ray

from blip_core.data.download import DownloadConfig, download_shard, plan_shards
from blip_core.data.shards import REASONS, read_shard
from blip_core.data.tables import WebTable
from blip_core.workspace import Workspace

CONFIG = DownloadConfig(
    processes=1,
    threads=48,
    per_host=0,
    timeout_s=2,
    url_s=4,
    max_bytes=300_000,
    max_redirects=3,
    retries=0,
    wall_clock_s=120,
)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """The servers, and downloads that take place in their false internet."""
    with hostile(tmp_path) as running:
        (tmp_path / "world.json").write_text(json.dumps(running.world))
        monkeypatch.setenv("SSL_CERT_FILE", str(running.certificate))
        monkeypatch.setenv("CAPFILT_TEST_NAMES", str(tmp_path / "world.json"))
        names = Path(services.__file__).with_name("names")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(names), os.environ.get("PYTHONPATH")])))
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield running


class Downloaded(NamedTuple):
    """Reasons by URL, 'ok' where there is a picture."""

    found: dict[str, str]
    expected: dict[str, str]


def downloaded(stage: Stage, folder: Path, config: DownloadConfig) -> Downloaded:
    expected = stage.rows()
    pq.write_table(pa.table({"url": [*expected], "caption": ["text"] * len(expected)}), folder / "web.parquet")
    workspace = Workspace.open(folder / "workspace")
    (name,) = plan_shards(WebTable(str(folder / "web.parquet")), config, workspace).names
    download_shard(workspace, name, config)
    rows = read_shard(workspace.shard(name), ["url", "reason"]).to_pylist()
    return Downloaded({row["url"]: row["reason"] or "ok" for row in rows}, expected)


def test_nothing_gets_through_and_every_row_says_why(stage: Stage, tmp_path: Path) -> None:
    found, expected = downloaded(stage, tmp_path, CONFIG)
    assert stage.inner.asked["connections"] == 0
    wrong = {url: (reason, expected[url]) for url, reason in found.items() if reason != expected[url]}
    assert (wrong, len(found)) == ({}, len(expected))
    assert {*found.values()} - {"ok"} <= {*REASONS}
    assert len(TRICKS) + len(REDIRECTS) + len(FORBIDDEN) >= 25


def test_the_same_tricks_reach_what_is_inside_where_private_networks_are_allowed(stage: Stage, tmp_path: Path) -> None:
    found, expected = downloaded(stage, tmp_path, replace(CONFIG, allow_private_networks=True))
    led = [url for url, reason in expected.items() if reason == "forbidden_address" and found[url] == "ok"]
    assert min(len(led), stage.inner.asked["connections"]) >= 30
    other = {url: reason for url, reason in found.items() if expected[url] not in ("forbidden_address", "ok")}
    assert [url for url, reason in other.items() if reason == "ok"] == []


def test_workers_of_a_ray_cluster_reach_no_more_than_this_machines(stage: Stage, tmp_path: Path) -> None:
    with ray(1) as head, pytest.MonkeyPatch.context() as environment:
        for name, value in head.secret.items():
            environment.setenv(name, value)
        inner = f"http://127.0.0.1:{stage.inner.port}/picture"
        pq.write_table(pa.table({"url": [inner], "caption": ["text"]}), tmp_path / "web.parquet")
        reasons = []
        for allowed in (False, True):
            config = replace(CONFIG, allow_private_networks=allowed)
            workspace = Workspace.open(tmp_path / str(allowed))
            (name,) = plan_shards(WebTable(str(tmp_path / "web.parquet")), config, workspace).names
            download_shard(workspace, name, config, ray_address=head.address)
            reasons += read_shard(workspace.shard(name), ["reason"])["reason"].to_pylist()
            assert stage.inner.asked["connections"] == allowed
        assert reasons == ["forbidden_address", None]
