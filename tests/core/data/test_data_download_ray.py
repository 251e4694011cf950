"""Downloading by a Ray cluster's workers: the same shard, and none of them at work when the fetching has ended."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from services.ray import Ray, ray

from blip_core.data.download import DownloadConfig, download_shard, plan_shards
from blip_core.data.fetch import Fetcher, fetch_urls
from blip_core.data.guard import Limits
from blip_core.data.tables import WebTable
from blip_core.scenes.server import serve_scenes
from blip_core.scenes.web import ScenesConfig, make_scenes, url_table
from blip_core.workspace import Workspace

pytestmark = pytest.mark.timeout(600)
SECONDS = 240


class Stop(Exception):
    """Ends the fetching as its wall-clock limit does."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Ray]:
    with ray(2) as head, pytest.MonkeyPatch.context() as environment:
        for name, value in head.secret.items():
            environment.setenv(name, value)
        yield head


def test_a_cluster_fetches_the_same_shard_as_this_machine(cluster: Ray, tmp_path: Path) -> None:
    scenes = ScenesConfig(
        web_images=12, human_pairs=1, held_out=1, dead_links=2, non_images=1, truncated=1, oversized=0, duplicates=1
    )
    paths = make_scenes(tmp_path / "scenes", scenes)
    config = DownloadConfig(image_size=64, processes=2, retries=0, allow_private_networks=True)
    with serve_scenes(paths.folder) as address:
        table = WebTable(str(url_table(paths, address, tmp_path / "urls.parquet")), caption="alt", uid="uid")
        shards = {}
        for address_of in (None, cluster.address):
            workspace = Workspace.open(tmp_path / f"work-{address_of}")
            (name,) = plan_shards(table, config, workspace).names
            summary = download_shard(workspace, name, config, ray_address=address_of)
            assert summary.reasons.keys() >= {"not_found", "not_an_image", "truncated"}
            shards[address_of] = workspace.shard(name).read_bytes()
    assert shards[None] == shards[cluster.address]


def test_when_the_fetching_is_ended_the_clusters_workers_leave_the_web_alone(cluster: Ray, tmp_path: Path) -> None:
    reached, left = threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reached.set()
            self.connection.recv(1)  # nothing comes: this returns when the client's process is gone
            left.set()

    def stop_when_reached(images: int) -> None:
        if reached.is_set():
            raise Stop

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fetcher = Fetcher(
        processes=1,
        threads=1,
        timeout_s=2 * SECONDS,
        user_agent="capfilt",
        ray_address=cluster.address,
        limits=Limits(allow_private_networks=True),
    )
    try:
        with pytest.raises(Stop):
            fetch_urls(
                [f"http://127.0.0.1:{server.server_port}/hang.jpg"],
                tmp_path / "fetch",
                fetcher,
                SECONDS,
                stop_when_reached,
            )
        assert left.wait(SECONDS)
    finally:
        server.shutdown()
