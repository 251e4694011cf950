"""What failed for a passing reason is tried again later: what is settled comes in once, and nothing else changes."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from services.web import serving

from blip_core.corpus.catalog import build_catalog
from blip_core.corpus.forget import forget
from blip_core.corpus.query import run_query
from blip_core.data.denied import Denied, deny, url_key, veil
from blip_core.data.download import DownloadConfig, download_shard, plan_shards
from blip_core.data.retry import plan_retry, retry_shard
from blip_core.data.shards import read_shard
from blip_core.data.tables import WebTable
from blip_core.errors import DownloadError
from blip_core.evaluation.tables import RoundTables
from blip_core.workspace import Workspace

CONFIG = DownloadConfig(rows_per_shard=5, processes=1, threads=8, retries=0, timeout_s=5, allow_private_networks=True)
CLOSED = "http://127.0.0.1:1/dead.jpg"
# Path: the statuses of the answers, one after the other; the last one repeats.
ANSWERS = {
    **{f"/well{number}": [200] for number in range(5)},
    "/gone": [404],
    "/late0": [503, 200],
    "/late1": [429, 200],
    "/later": [503, 503, 200],
    "/left": [500, 404],
}


class _Handler(BaseHTTPRequestHandler):
    server: "Site"

    def do_GET(self) -> None:
        statuses = ANSWERS[self.path]
        status = statuses[min(self.server.hits[self.path], len(statuses) - 1)]
        self.server.hits[self.path] += 1
        body = picture(self.path) if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


class Site(ThreadingHTTPServer):
    """Answers as ANSWERS says, and counts."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hits: Counter[str] = Counter()


def picture(path: str) -> bytes:
    values = np.random.default_rng(list(path.encode())).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def site() -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as environment, serving(Site()) as server:
        environment.setenv("no_proxy", "127.0.0.1")
        yield server


@pytest.fixture
def table(site: Site, tmp_path: Path) -> WebTable:
    """The site's paths and a host that is dead; the uid is the path."""
    urls = {path: f"http://127.0.0.1:{site.server_port}{path}" for path in ANSWERS} | {"/dead": CLOSED}
    columns = {"uid": [*urls], "url": [*urls.values()], "caption": [f"text of {path}" for path in urls]}
    pq.write_table(pa.table(columns), tmp_path / "web.parquet")
    return WebTable(str(tmp_path / "web.parquet"), uid="uid")


@pytest.fixture
def workspace(table: WebTable, tmp_path: Path) -> Workspace:
    """All downloaded once."""
    made = Workspace.open(tmp_path / "workspace")
    for name in plan_shards(table, CONFIG, made).names:
        download_shard(made, name, CONFIG)
    assert len(made.shard_paths()) == 3
    return made


def images(workspace: Workspace) -> dict[str, str]:
    """Reason by uid, 'ok' where there is none, as the catalog shows them; every uid stands there once."""
    rows = run_query(workspace, "SELECT uid, coalesce(reason, status) AS reason FROM images").to_pylist()
    assert len({row["uid"] for row in rows}) == len(rows)
    return {row["uid"]: row["reason"] for row in rows}


def retry_all(table: WebTable, workspace: Workspace) -> dict[str, int]:
    """Tries again, and counts the outcomes."""
    counts: Counter[str] = Counter()
    for name in plan_retry(table, CONFIG, workspace).names:
        summary = retry_shard(workspace, name, CONFIG)
        counts += Counter({"ok": summary.ok, **summary.reasons})
    return dict(counts)


AT_FIRST = {
    **{f"/well{number}": "ok" for number in range(5)},
    **{"/gone": "not_found", "/dead": "connection"},
    **dict.fromkeys(("/late0", "/late1", "/later", "/left"), "overloaded"),
}


def test_only_what_failed_for_a_passing_reason_is_asked_for_again_and_what_arrives_is_added(
    site: Site, table: WebTable, workspace: Workspace
) -> None:
    assert images(workspace) == AT_FIRST
    before, asked = {path: path.read_bytes() for path in workspace.shard_paths()}, Counter(site.hits)
    assert retry_all(table, workspace) == {"ok": 2, "not_found": 1, "again": 2}
    assert Counter(site.hits) - asked == Counter(["/late0", "/late1", "/later", "/left"])
    assert images(workspace) == AT_FIRST | {"/late0": "ok", "/late1": "ok", "/left": "not_found"}
    assert {path: path.read_bytes() for path in before} == before
    (added,) = {*workspace.shard_paths()} - {*before}
    assert read_shard(added)["image"].to_pylist() == [picture("/late0"), picture("/late1"), None]
    assert list(workspace.plans.iterdir()) == []


def test_every_try_takes_what_the_last_one_left_until_nothing_comes_any_more(
    table: WebTable, workspace: Workspace
) -> None:
    retry_all(table, workspace)
    assert retry_all(table, workspace) == {"ok": 1, "again": 1}
    found, shards = images(workspace), workspace.shard_paths()
    assert found == AT_FIRST | {"/late0": "ok", "/late1": "ok", "/left": "not_found", "/later": "ok"}
    assert retry_all(table, workspace) == {"again": 1}
    assert (images(workspace), workspace.shard_paths()) == (found, shards)
    with RoundTables.open(workspace, 1) as tables:
        assert tables.download() == {
            "rows": 11,
            "ok": 8,
            "failed": 3,
            "reasons": {"connection": 1, "not_found": 2},
        }


def test_a_download_after_a_retry_fetches_nothing_and_its_plans_are_left_alone(
    site: Site, table: WebTable, workspace: Workspace
) -> None:
    planned = plan_retry(table, CONFIG, workspace)
    assert plan_shards(table, CONFIG, workspace).names == []
    assert [path.stem for path in workspace.plans.iterdir()] == planned.names
    retry_shard(workspace, planned.names[0], CONFIG)
    plan = plan_shards(table, CONFIG, workspace)
    assert (plan.names, plan.missing) == ([], 0)
    assert {*plan.done} == {path.stem for path in workspace.shard_paths()}


def test_a_retry_that_was_killed_after_it_wrote_its_shard_has_nothing_left_to_do(
    site: Site, table: WebTable, workspace: Workspace
) -> None:
    (name,) = plan_retry(table, CONFIG, workspace).names
    plan = workspace.plans / f"{name}.parquet"
    rows = plan.read_bytes()
    retry_shard(workspace, name, CONFIG)
    plan.write_bytes(rows)  # as when it ended between the shard and its plan
    shown, asked, bytes_of_it = images(workspace), Counter(site.hits), workspace.shard(name).read_bytes()
    summary = retry_shard(workspace, name, CONFIG)
    assert (summary.skipped, summary.rows, plan.exists()) == (True, 3, False)
    assert (images(workspace), site.hits, workspace.shard(name).read_bytes()) == (shown, asked, bytes_of_it)


def test_a_retry_that_was_killed_before_is_planned_with_the_same_rows_under_the_same_names(
    table: WebTable, workspace: Workspace
) -> None:
    first = plan_retry(table, CONFIG, workspace)
    assert plan_retry(table, CONFIG, workspace) == first
    assert (first.missing, len(first.names)) == (5, 1)
    assert images(workspace) == AT_FIRST


def test_a_catalog_made_when_the_retry_was_planned_shows_each_image_once_all_the_time(
    table: WebTable, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = plan_retry(table, CONFIG, workspace).names
    build_catalog(workspace)
    monkeypatch.chdir(workspace.root)
    counts = []
    for step in (lambda: None, lambda: retry_shard(workspace, name, CONFIG)):
        step()
        with duckdb.connect("catalog.duckdb", read_only=True) as connection:
            counts += connection.sql(
                "SELECT count(*), count(DISTINCT uid), count(*) FILTER (status = 'ok') FROM images"
            ).fetchall()
            [(rows, failed)] = connection.sql("SELECT sum(rows), sum(failed) FROM shards").fetchall()
            assert (rows, failed) == (11, 11 - counts[-1][2])
    assert counts == [(11, 11, 5), (11, 11, 7)]


def test_a_trial_tries_again_no_other_rows_than_its_own(table: WebTable, workspace: Workspace) -> None:
    trial = WebTable(table.path, uid="uid", limit=3)  # /dead, /gone, /late0
    assert plan_retry(trial, CONFIG, workspace).missing == 2


def test_shards_of_other_settings_are_left_to_those(table: WebTable, workspace: Workspace) -> None:
    other = DownloadConfig(image_size=32, rows_per_shard=5)
    assert plan_retry(table, other, workspace).names == []
    assert plan_retry(table, CONFIG, workspace).missing == 5


def test_what_was_forgotten_after_the_retry_was_planned_is_not_asked_for(
    site: Site, table: WebTable, workspace: Workspace
) -> None:
    (name,) = plan_retry(table, CONFIG, workspace).names
    deny(workspace, Denied(urls=frozenset({url_key(f"http://127.0.0.1:{site.server_port}/late0")})))
    retry_shard(workspace, name, CONFIG)
    assert site.hits["/late0"] == 1
    settled = read_shard(workspace.shard(name), ["uid"])["uid"].to_pylist()
    assert settled == ["/late1", "/left"]
    assert veil("/late0") not in images(workspace)


def test_a_plan_of_other_settings_is_refused_as_that_of_any_shard_is(table: WebTable, workspace: Workspace) -> None:
    (name,) = plan_retry(table, CONFIG, workspace).names
    with pytest.raises(DownloadError, match="planned with other download settings"):
        retry_shard(workspace, name, DownloadConfig(image_size=32))


def named(site: Site, path: str) -> Denied:
    return Denied(urls=frozenset({url_key(f"http://127.0.0.1:{site.server_port}{path}")}))


def told_of(workspace: Workspace, what: str) -> list[str]:
    """Files below the workspace that have this in their bytes or in a value."""
    paths = [path for path in sorted(workspace.root.rglob("*")) if path.is_file()]
    values = {path: repr(pq.read_table(path).to_pylist()) for path in paths if path.suffix == ".parquet"}
    return [path.name for path in paths if what.encode() in path.read_bytes() or what in values.get(path, "")]


def test_what_is_forgotten_before_it_is_tried_again_is_in_no_plan_and_asked_for_no_more(
    site: Site, table: WebTable, workspace: Workspace
) -> None:
    plan_retry(table, CONFIG, workspace)
    assert len(told_of(workspace, "/late0")) == 2  # shard and plan
    forget(workspace, named(site, "/late0"))
    assert told_of(workspace, "/late0") == []
    assert plan_retry(table, CONFIG, workspace).missing == 4
    assert told_of(workspace, "/late0") == []
    retry_all(table, workspace)
    expected = AT_FIRST | {"/late1": "ok", "/left": "not_found", veil("/late0"): "denied_url"}
    assert images(workspace) == {uid: reason for uid, reason in expected.items() if uid != "/late0"}
    assert (site.hits["/late0"], told_of(workspace, "/late0")) == (1, [])


def test_what_is_forgotten_after_it_was_tried_again_goes_from_both_shards_and_comes_no_more(
    site: Site, table: WebTable, workspace: Workspace
) -> None:
    retry_all(table, workspace)
    shards = told_of(workspace, "/late0")
    assert len(shards) == 2
    forget(workspace, named(site, "/late0"))
    assert told_of(workspace, "/late0") == []
    for name in shards:
        rows = read_shard(workspace.shards / name, ["uid", "reason"]).to_pylist()
        assert {"uid": veil("/late0"), "reason": "denied_url"} in rows
    shown, asked = images(workspace), Counter(site.hits)
    assert shown[veil("/late0")] == "denied_url"
    assert plan_shards(table, CONFIG, workspace).names == []
    assert plan_retry(table, CONFIG, workspace).missing == 2  # /dead and /later
    assert (images(workspace), site.hits) == (shown, asked)


def test_a_trial_is_told_of_the_shards_that_its_rows_were_settled_in(table: WebTable, workspace: Workspace) -> None:
    trial = replace(table, limit=4)  # /dead, /gone, /late0, /late1
    before = plan_shards(trial, CONFIG, workspace).done
    (name,) = plan_retry(trial, CONFIG, workspace).names
    retry_shard(workspace, name, CONFIG)
    assert read_shard(workspace.shard(name))["uid"].to_pylist() == ["/late0", "/late1"]
    assert plan_shards(trial, CONFIG, workspace).done == [*before, name]
