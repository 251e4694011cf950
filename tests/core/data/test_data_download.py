"""Downloading from a loopback web: every kind of answer, resuming, and what kills and outages leave behind."""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip_core.data.download import (
    DownloadConfig,
    DownloadPlan,
    ShardSummary,
    download_shard,
    plan_shards,
    preview_plan,
    settings_hash,
)
from blip_core.data.fetch import Fetcher, _results, fetch_urls, temporary_folder
from blip_core.data.guard import Limits
from blip_core.data.shards import REASONS, SHARD_SCHEMA, check_part, read_shard, write_shard
from blip_core.data.tables import WebTable
from blip_core.errors import DownloadError, ShardError
from blip_core.workspace import Workspace

LOOPBACK = partial(DownloadConfig, allow_private_networks=True)
CONFIG = LOOPBACK(image_size=64, timeout_s=5)
FETCHER = Fetcher(processes=2, threads=4, timeout_s=5, user_agent="capfilt", limits=Limits(allow_private_networks=True))
CLOSED_PORT = "http://127.0.0.1:1"
RED, BLUE = (255, 0, 0), (0, 0, 255)


def _encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _noise(seed: int, width: int = 48, height: int = 40) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return _encoded(Image.fromarray(values))


def _lying(width: int, height: int) -> bytes:
    """Stored with red left and blue right, tagged to be shown turned clockwise: red above blue."""
    image = Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (0, 0, width // 2, height))
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encoded(image, exif=exif)


PAGES = {f"/ok{index}.jpg": _noise(index) for index in range(4)} | {
    "/picture.png": _encoded(Image.new("RGB", (30, 20), RED), "PNG"),
    "/large.jpg": _noise(9, 300, 200),
    "/lying-small.jpg": _lying(60, 40),
    "/lying-large.jpg": _lying(600, 400),
    "/flaky.jpg": _noise(10),
    "/page.jpg": b"<html><body>Buy now!</body></html>",
    "/cut-small.jpg": _noise(11)[:-500],
    "/cut-large.jpg": _noise(12, 300, 200)[:-500],
    "/bomb.png": _encoded(Image.new("1", (16_000, 16_000)), "PNG"),
    "/tiny.jpg": _noise(13, 9, 40),
    "/declined0.jpg": _noise(14),
    "/declined1.jpg": _noise(15),
    "/declined2.jpg": _noise(16),
    "/declined3.jpg": _noise(17),
    "/declined4.jpg": _noise(18),
    "/declined5.jpg": _noise(19),
}
DECLINED = [path for path in PAGES if path.startswith("/declined")]
ROBOTS = dict(
    zip(DECLINED, ("noai", "noimageai", "NoIndex", "noarchive, noimageindex", "noml", "capfilt: noai"), strict=True)
) | {"/ok0.jpg": "otherbot: noai", "/ok1.jpg": "noarchive, nosnippet"}
STATUSES = {"/error.jpg": 500, "/forbidden.jpg": 403, "/retired.jpg": 410}
BUSY = {"/busy.jpg": "3", "/busy-for-long.jpg": "3600"}  # 429 at first, with this Retry-After; then a picture


class _Handler(BaseHTTPRequestHandler):
    server: "Site"

    def do_GET(self) -> None:
        self.server.hits[self.path] += 1
        self.server.moments.setdefault(self.path, []).append(time.monotonic())
        self.server.agents.add(self.headers["User-Agent"])
        if self.path.startswith("/hang"):
            self.server.reached.set()
            self.connection.recv(1)  # nothing comes: this returns when the client's process is gone
            self.server.left.set()
        elif self.path != "/flaky.jpg" or self.server.hits[self.path] > 1:
            self._answer()

    def _answer(self) -> None:
        body = PAGES.get(self.path, b"")
        if self.path in BUSY and self.server.hits[self.path] == 1:
            body = b""
            self.send_response(429)
            self.send_header("Retry-After", BUSY[self.path])
        elif self.path in BUSY:
            body = PAGES["/ok0.jpg"]
            self.send_response(200)
        elif self.path == "/away.jpg":
            self.send_response(302)
            self.send_header("Location", Path(__file__).as_uri())
        else:
            self.send_response(200 if body else STATUSES.get(self.path, 404))
        if self.path in ROBOTS:
            self.send_header("X-Robots-Tag", ROBOTS[self.path])
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


class Site(ThreadingHTTPServer):
    """The loopback web, which counts how often each path was asked for."""

    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hits: Counter[str] = Counter()
        self.moments: dict[str, list[float]] = {}
        self.agents: set[str] = set()
        self.reached, self.left = threading.Event(), threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as environment, Site() as server:
        environment.setenv("no_proxy", "127.0.0.1")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def _rows(site: Site, folder: Path) -> list[tuple[str | None, str]]:
    """Every kind of row, with its text; the text says what should become of it."""
    local = folder / "local.jpg"
    local.write_bytes(_noise(20))
    rows: list[tuple[str | None, str]] = [(site.url(path), "ok") for path in list(PAGES)[:9]]
    rows += [
        (site.url("/page.jpg"), "not_an_image"),
        (site.url("/cut-small.jpg"), "truncated"),
        (site.url("/cut-large.jpg"), "truncated"),
        (site.url("/bomb.png"), "too_large"),
        (site.url("/tiny.jpg"), "too_small"),
        *((site.url(path), "refused_by_robots") for path in DECLINED),
        (site.url("/gone.jpg"), "not_found"),
        (site.url("/retired.jpg"), "not_found"),
        (site.url("/error.jpg"), "overloaded"),
        (site.url("/forbidden.jpg"), "http_error"),
        (site.url("/away.jpg"), "scheme_refused"),
        (f"{CLOSED_PORT}/x.jpg", "connection"),
        ("http://nowhere.invalid/x.jpg", "dns"),
        ("http:///x.jpg", "bad_url"),
        (local.as_uri(), "scheme_refused"),
        (str(local), "scheme_refused"),
        ("ftp://127.0.0.1/x.jpg", "scheme_refused"),
        ("http://someone@example.com/x.jpg", "credentials_refused"),
        (f"<URL:{local.as_uri()}>", "scheme_refused"),
        (None, "no_url"),
        (" ", "no_url"),
        (site.url("/ok1.jpg"), "ok"),
        (site.url("/ok1.jpg"), "ok, another text for the same URL"),
    ]
    return rows


def _write_table(path: Path, rows: list[tuple[str | None, str]]) -> WebTable:
    urls, captions = [url for url, _ in rows], [caption for _, caption in rows]
    pq.write_table(pa.table({"url": pa.array(urls, pa.string()), "caption": captions}), path)
    return WebTable(str(path))


class Downloaded(NamedTuple):
    """A finished download, and the hits on the site that it took."""

    workspace: Workspace
    web: WebTable
    rows: list[tuple[str | None, str]]
    plan: DownloadPlan
    summary: ShardSummary
    hits: Counter[str]


@pytest.fixture(scope="module")
def downloaded(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Downloaded:
    folder = tmp_path_factory.mktemp("downloaded")
    rows = _rows(site, folder)
    workspace, web = Workspace.open(folder / "workspace"), _write_table(folder / "web.parquet", rows)
    plan = plan_shards(web, CONFIG, workspace)
    summary = download_shard(workspace, plan.names[0], CONFIG)
    return Downloaded(workspace, web, rows, plan, summary, Counter(site.hits))


def _shard_rows(downloaded: Downloaded) -> list[dict]:
    return read_shard(downloaded.workspace.shard(downloaded.summary.name)).to_pylist()


def _image_at(downloaded: Downloaded, path: str) -> dict:
    return next(row for row in _shard_rows(downloaded) if row["url"] and row["url"].endswith(path))


def test_every_row_comes_back_with_an_image_or_the_right_reason(downloaded: Downloaded) -> None:
    duplicates = 1
    rows = _shard_rows(downloaded)
    assert len(rows) == len(downloaded.rows) == downloaded.summary.rows == downloaded.plan.rows
    wrong = [
        (row["url"], row["caption"], row["reason"])
        for row in rows
        if (row["reason"] or "ok") != row["caption"].split(",")[0] and row["reason"] != "duplicate_row"
    ]
    assert wrong == []
    assert [row["reason"] for row in rows].count("duplicate_row") == duplicates
    assert {row["reason"] for row in rows} - {None} <= set(REASONS)


def test_the_shard_is_sorted_typed_and_says_its_schema(downloaded: Downloaded) -> None:
    path = downloaded.workspace.shard(downloaded.summary.name)
    table = read_shard(path)
    assert table.schema.equals(SHARD_SCHEMA)
    assert table["uid"].to_pylist() == sorted(table["uid"].to_pylist())
    assert check_part(path, "shard/1")["capfilt.settings"] == settings_hash(CONFIG)


def test_the_summary_counts_what_the_shard_holds(downloaded: Downloaded) -> None:
    reasons = Counter(row["reason"] for row in _shard_rows(downloaded))
    ok = reasons.pop(None)
    summary = downloaded.summary
    assert (summary.ok, summary.reasons, summary.skipped) == (ok, dict(reasons), False)
    assert summary.rows == summary.ok + summary.failed


def test_stored_bytes_fit_their_hash_and_sizes(downloaded: Downloaded) -> None:
    for row in _shard_rows(downloaded):
        assert (row["status"] == "ok") == (row["image"] is not None) == (row["reason"] is None)
        if row["image"]:
            assert row["sha256"] == hashlib.sha256(row["image"]).hexdigest()
            assert Image.open(io.BytesIO(row["image"])).size == (row["width"], row["height"])


def test_small_jpegs_are_stored_as_served_and_large_ones_shrunk(downloaded: Downloaded) -> None:
    assert _image_at(downloaded, "/ok0.jpg")["image"] == PAGES["/ok0.jpg"]
    large = _image_at(downloaded, "/large.jpg")
    assert [large[name] for name in ("width", "height", "original_width", "original_height")] == [96, 64, 300, 200]


@pytest.mark.parametrize(
    ("path", "sizes"), [("/lying-small.jpg", [40, 60, 40, 60]), ("/lying-large.jpg", [64, 96, 400, 600])]
)
def test_a_photograph_lying_on_its_side_is_stored_upright(downloaded: Downloaded, path: str, sizes: list[int]) -> None:
    row = _image_at(downloaded, path)
    assert [row[name] for name in ("width", "height", "original_width", "original_height")] == sizes
    image = Image.open(io.BytesIO(row["image"]))
    above = image.getpixel((image.width // 2, image.height // 4))
    below = image.getpixel((image.width // 2, 3 * image.height // 4))
    assert above[0] > 200 > 50 > above[2]
    assert below[2] > 200 > 50 > below[0]


def test_each_url_is_asked_for_once_and_only_passing_failures_twice(downloaded: Downloaded) -> None:
    expected = Counter([*PAGES, *STATUSES, "/gone.jpg", "/away.jpg", "/flaky.jpg", "/error.jpg"])
    assert (downloaded.hits, downloaded.hits["/flaky.jpg"]) == (expected, 2)


def test_a_busy_server_is_asked_again_when_it_said_and_not_at_all_when_that_is_too_long(
    site: Site, tmp_path: Path
) -> None:
    urls = [site.url(path) for path in (*BUSY, "/ok1.jpg")]
    workspace, name = _single_plan(tmp_path, urls, CONFIG)
    assert download_shard(workspace, name, CONFIG).reasons == {"overloaded": 1}
    first, second = site.moments["/busy.jpg"]
    assert second - first >= float(BUSY["/busy.jpg"])
    assert site.hits["/busy-for-long.jpg"] == 1


def test_servers_see_who_asks(downloaded: Downloaded, site: Site) -> None:
    assert downloaded.summary.rows
    assert all("capfilt" in agent for agent in site.agents)


def test_a_second_run_downloads_nothing(downloaded: Downloaded, site: Site) -> None:
    before = Counter(site.hits)
    plan = plan_shards(downloaded.web, CONFIG, downloaded.workspace)
    assert (plan.names, plan.done) == ([], downloaded.plan.names)
    again = download_shard(downloaded.workspace, downloaded.summary.name, CONFIG)
    assert again.skipped
    assert (again.ok, again.reasons) == (downloaded.summary.ok, downloaded.summary.reasons)
    assert site.hits == before


def test_nothing_but_the_shard_is_left(downloaded: Downloaded) -> None:
    left = [path for path in downloaded.workspace.root.rglob("*") if path.is_file()]
    assert left == [downloaded.workspace.shard(downloaded.summary.name)]


def test_the_same_download_elsewhere_gives_the_same_bytes(downloaded: Downloaded, tmp_path: Path) -> None:
    elsewhere = Workspace.open(tmp_path)
    web = _write_table(tmp_path / "web.parquet", downloaded.rows[::-1])
    plan = plan_shards(web, CONFIG, elsewhere)
    assert plan.names == downloaded.plan.names
    download_shard(elsewhere, plan.names[0], CONFIG)
    first, second = (space.shard(plan.names[0]).read_bytes() for space in (downloaded.workspace, elsewhere))
    assert first == second


def test_added_rows_are_all_that_is_downloaded(downloaded: Downloaded, site: Site, tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path / "workspace")
    workspace.shards.mkdir()
    standing = downloaded.workspace.shard(downloaded.summary.name)
    workspace.shard(downloaded.summary.name).write_bytes(standing.read_bytes())
    added = [(site.url("/ok3.jpg"), "a text that was not there"), (site.url("/ok2.jpg?new"), "a new URL")]
    before = Counter(site.hits)
    plan = plan_shards(_write_table(tmp_path / "web.parquet", added + downloaded.rows), CONFIG, workspace)
    assert plan.done == [downloaded.summary.name]
    summary = download_shard(workspace, plan.names[0], CONFIG)
    assert (len(plan.names), summary.rows) == (1, 2)
    assert site.hits - before == Counter({"/ok3.jpg": 1, "/ok2.jpg?new": 1})


def test_plans_cover_each_missing_row_once_and_follow_the_settings(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path)
    web = _write_table(tmp_path / "web.parquet", [(f"http://h/{index}", "t") for index in range(25)])
    config = DownloadConfig(rows_per_shard=10)
    plan = plan_shards(web, config, workspace)
    tables = [pq.read_table(workspace.plans / f"{name}.parquet") for name in plan.names]
    assert sorted(table.num_rows for table in tables) == [5, 10, 10]
    assert len({uid for table in tables for uid in table["uid"].to_pylist()}) == 25
    assert plan_shards(web, config, workspace) == plan
    other = plan_shards(web, DownloadConfig(rows_per_shard=10, image_size=100), workspace)
    assert not set(other.names) & set(plan.names)
    assert sorted(path.stem for path in workspace.plans.glob("*.parquet")) == other.names
    with pytest.raises(DownloadError, match="plan the shards again"):
        download_shard(workspace, plan.names[0], config)
    with pytest.raises(DownloadError, match="other download settings"):
        download_shard(workspace, other.names[0], config)


def test_a_trials_shards_are_those_of_the_full_run_and_no_row_is_planned_twice(tmp_path: Path) -> None:
    web = _write_table(tmp_path / "web.parquet", [(f"http://h/{index}", "t") for index in range(25)])
    config = DownloadConfig(rows_per_shard=10)
    full = plan_shards(web, config, Workspace.open(tmp_path / "full"))
    workspace = Workspace.open(tmp_path / "trial")
    trial = plan_shards(replace(web, limit=10), config, workspace)
    assert (trial.rows, trial.missing, len(trial.names)) == (10, 10, 1)
    assert set(trial.names) < set(full.names)

    _stand_in(workspace, trial.names[0])
    larger = plan_shards(replace(web, limit=13), config, workspace)
    assert (larger.done, larger.rows, larger.missing, len(larger.names)) == (trial.names, 13, 3, 1)
    _stand_in(workspace, larger.names[0])
    rest = plan_shards(web, config, workspace)
    assert (rest.done, rest.rows, rest.missing) == (sorted([*trial.names, *larger.names]), 25, 12)
    plans = [pq.read_table(workspace.plans / f"{name}.parquet")["uid"].to_pylist() for name in rest.names]
    standing = [read_shard(path, ["uid"])["uid"].to_pylist() for path in workspace.shard_paths()]
    uids = [uid for part in [*plans, *standing] for uid in part]
    assert (len(uids), len(set(uids))) == (25, 25)
    assert sorted(len(part) for part in plans) == [2, 10]


def _stand_in(workspace: Workspace, name: str) -> None:
    """Writes a planned shard as if every download had failed."""
    rows = pq.read_table(workspace.plans / f"{name}.parquet").select(["uid", "url", "caption"]).to_pylist()
    table = pa.Table.from_pylist([row | {"status": "failed", "reason": "dns"} for row in rows], schema=SHARD_SCHEMA)
    write_shard(workspace.shard(name), [table], settings_hash(DownloadConfig()), len(rows))


def test_a_preview_is_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "none")
    web = _write_table(tmp_path / "web.parquet", [(f"http://h/{index}", "t") for index in range(25)])
    config = DownloadConfig(rows_per_shard=10)
    preview = preview_plan(web, config, workspace)
    assert not workspace.root.exists()
    assert preview == plan_shards(web, config, workspace)


def test_progress_counts_the_images_that_arrive_while_others_are_waited_for(site: Site, tmp_path: Path) -> None:
    urls = [site.url(f"/ok{index}.jpg") for index in range(4)] + [site.url("/hang/progress")]
    told: list[int] = []
    config = LOOPBACK(timeout_s=3, retries=0)
    workspace, name = _single_plan(tmp_path, urls, config)
    summary = download_shard(workspace, name, config, told.append)
    assert (summary.ok, summary.failed) == (4, 1)
    assert told == sorted(told)
    assert told[-1] == 4


def _single_plan(folder: Path, urls: list[str], config: DownloadConfig) -> tuple[Workspace, str]:
    workspace = Workspace.open(folder / "workspace")
    web = _write_table(folder / "web.parquet", [(url, "text") for url in urls])
    return workspace, plan_shards(web, config, workspace).names[0]


def _assert_only_the_plan_is_left(workspace: Workspace, name: str) -> None:
    assert [path for path in workspace.root.rglob("*") if path.is_file()] == [workspace.plans / f"{name}.parquet"]


def test_a_network_that_is_down_leaves_no_shard(tmp_path: Path) -> None:
    config = LOOPBACK(retries=0)
    workspace, name = _single_plan(tmp_path, [f"{CLOSED_PORT}/1.jpg", f"{CLOSED_PORT}/2.jpg"], config)
    with pytest.raises(DownloadError, match=r"none of its 2 URLs could be fetched \(connection 2.*refused"):
        download_shard(workspace, name, config)
    _assert_only_the_plan_is_left(workspace, name)


def test_the_wall_clock_limit_leaves_no_shard(site: Site, tmp_path: Path) -> None:
    config = LOOPBACK(wall_clock_s=1)
    workspace, name = _single_plan(tmp_path, [site.url("/hang/limit")], config)
    with pytest.raises(DownloadError, match=r"interrupted 1"):
        download_shard(workspace, name, config)
    _assert_only_the_plan_is_left(workspace, name)


def test_a_fetcher_that_breaks_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "img2dataset.py").write_text("raise RuntimeError('no such luck')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = DownloadConfig()
    workspace, name = _single_plan(tmp_path, ["http://127.0.0.1:1/1.jpg"], config)
    with pytest.raises(DownloadError, match=r"img2dataset wrote no result for 1 URLs.*no such luck"):
        download_shard(workspace, name, config)
    _assert_only_the_plan_is_left(workspace, name)


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are killed by the Linux kernel")
def test_a_killed_run_leaves_no_process_and_its_folder_goes_with_the_next(site: Site, tmp_path: Path) -> None:
    workspace, name = _single_plan(tmp_path, [site.url("/hang/killed")], DownloadConfig())
    program = (
        "from blip_core.data.download import *; from blip_core.workspace import Workspace\n"
        "config = DownloadConfig(timeout_s=100, allow_private_networks=True)\n"
        f"download_shard(Workspace.open({str(workspace.root)!r}), {name!r}, config)"
    )
    site.reached.clear()
    site.left.clear()
    run = subprocess.Popen([sys.executable, "-c", program])
    try:
        assert site.reached.wait(60)
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    assert site.left.wait(30), "img2dataset outlived the run that started it"
    assert len(list((workspace.root / ".tmp").iterdir())) == 1
    assert workspace.shard_paths() == []
    left = workspace.root / ".tmp"
    copy = shutil.copytree(next(left.iterdir()), left / f"copy.{next(left.iterdir()).name}")
    with temporary_folder(left, name) as folder:
        assert list(left.iterdir()) == [folder]
        shutil.copytree(folder, copy)
        plan_shards(WebTable(str(tmp_path / "web.parquet")), DownloadConfig(), workspace)
        assert list(left.iterdir()) == [folder]


def test_images_are_rescued_where_the_table_of_results_is_torn(site: Site, tmp_path: Path) -> None:
    urls = [site.url(path) for path in ("/ok0.jpg", "/ok1.jpg", "/gone.jpg")]
    results = fetch_urls(urls, tmp_path / "fetch", FETCHER, 60)
    assert results[urls[2]].reason == "not_found"
    for path in (tmp_path / "fetch" / "output").glob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-8])
    rescued = dict(_results(tmp_path / "fetch" / "output"))
    assert rescued == {url: results[url] for url in urls[:2]}
    assert [rescued[url].path.read_bytes() for url in urls[:2]] == [PAGES["/ok0.jpg"], PAGES["/ok1.jpg"]]


def test_a_shard_cut_short_is_named(downloaded: Downloaded, tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path / "workspace")
    workspace.shards.mkdir()
    torn = workspace.shard(downloaded.summary.name)
    torn.write_bytes(downloaded.workspace.shard(downloaded.summary.name).read_bytes()[:-100])
    for act in (lambda: read_shard(torn), lambda: plan_shards(downloaded.web, CONFIG, workspace)):
        with pytest.raises(ShardError, match=rf"{torn.name}: is torn"):
            act()
