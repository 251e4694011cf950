"""A web that is down half-way, as the flow meets it: no shard of the outage, and a later run goes on."""

import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from services.web import serving

import flows.download
import flows.run
from blip_core.config import BootstrapConfig, load_config
from blip_core.corpus.query import run_query
from blip_core.data.shards import RETRY_PREFIX, read_shard
from blip_core.errors import CapfiltError
from blip_core.workspace import Workspace
from flows.download import download
from tasks.workplace import shard_names

ROWS, SHARD = 120, 40
LATE = {"/7.png", "/50.png", "/99.png"}

Configure = Callable[..., Path]


class _Handler(BaseHTTPRequestHandler):
    server: "Site"

    def do_GET(self) -> None:
        site = self.server
        with site.lock:
            site.asked[self.path] += 1
            busy = (site.asked.total() > site.lasts and site.asked.total() % 20 > 0) or self.path in site.late
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (int(self.path[1:-4]), 0, 0)).save(buffer, "PNG")
        self.send_response(503 if busy else 200)
        self.send_header("Content-Length", str(0 if busy else len(buffer.getvalue())))
        self.end_headers()
        self.wfile.write(b"" if busy else buffer.getvalue())

    def log_message(self, *_: object) -> None:
        """Silent."""


class Site(ThreadingHTTPServer):
    """Pictures; after `lasts` requests it is too busy for 19 of 20, and for those of `late` at any time."""

    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.lasts = SHARD
        self.late = set(LATE)

    def recover(self) -> None:
        """Answers for good, and counts anew."""
        self.lasts, self.asked = ROWS * 10, Counter()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Site()) as server:
        yield server


@pytest.fixture
def config(site: Site, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BootstrapConfig:
    """One shard at a time, each tried once."""
    monkeypatch.setattr(flows.download, "_WINDOW", 1)
    monkeypatch.setattr(flows.download, "download_shard", flows.download.download_shard.with_options(retries=0))
    urls = [f"http://127.0.0.1:{site.server_port}/{number}.png" for number in range(ROWS)]
    columns = {"uid": [f"{number:03}" for number in range(ROWS)], "url": urls, "caption": ["text"] * ROWS}
    pq.write_table(pa.table(columns), tmp_path / "urls.parquet")
    values = {"rows_per_shard": SHARD, "processes": 1, "threads": 8, "retries": 0, "timeout_s": 5}
    path = configure(
        web={"path": str(tmp_path / "urls.parquet")}, truth=None, download=values | {"allow_private_networks": True}
    )
    return load_config(path)


def shown(config: BootstrapConfig) -> dict[str, int]:
    """Images by reason, 'ok' where there is one, as a user asks for them."""
    sql = "SELECT coalesce(reason, 'ok') AS reason, count(*) AS images FROM images GROUP BY ALL"
    rows = run_query(Workspace.existing(config.workspace), sql).to_pylist()
    return {row["reason"]: row["images"] for row in rows}


@pytest.mark.usefixtures("prefect_server")
def test_an_outage_leaves_its_shards_to_a_later_run_and_a_retry_brings_what_was_late(
    site: Site, config: BootstrapConfig
) -> None:
    with pytest.raises(CapfiltError, match=r"2 of 3 shards failed, the others stand; the same command.*an outage"):
        download(config)
    workspace = Workspace.existing(config.workspace)
    (first,) = workspace.shard_paths()
    stands, reasons = first.read_bytes(), Counter(read_shard(first)["reason"].to_pylist())
    assert reasons[None] > SHARD - len(LATE) - 1
    site.recover()
    download(config)
    assert (len(workspace.shard_paths()), first.read_bytes()) == (3, stands)
    assert site.asked.total() == ROWS - SHARD
    assert shown(config) == {"ok": ROWS - len(LATE), "overloaded": len(LATE)}
    site.recover()
    download(config)
    assert site.asked.total() == 0
    site.late.remove("/7.png")
    download(config, retry_failed=True)
    assert site.asked == Counter(LATE)
    assert shown(config) == {"ok": ROWS - 2, "overloaded": 2}
    (retried,) = {path.stem for path in workspace.shard_paths() if path.stem.startswith(RETRY_PREFIX)}
    assert retried in shard_names(config)
    trial = config.model_copy(update={"web": replace(config.web, limit=8)})  # rows 0 to 7
    assert retried in shard_names(trial)
    assert len(shard_names(config.model_copy(update={"web": replace(config.web, limit=5)}))) == 1


def test_the_command_line_asks_for_a_retry(
    monkeypatch: pytest.MonkeyPatch, capfilt: Callable[..., tuple[int, str, str]], configure: Configure
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(flows.run, "run_flow", lambda name, *_, **parameters: asked.append((name, parameters)))
    for arguments in ([], ["--retry-failed"]):
        assert capfilt("download", str(configure()), *arguments)[0] == 0
    assert asked == [("download", {"retry_failed": False}), ("download", {"retry_failed": True})]
