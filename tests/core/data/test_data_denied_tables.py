"""A deny list and a table that is streamed: how many rows come at a time decides nothing, and nothing denied stays."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from services.web import serving

from blip_core.data import sorting, table_formats
from blip_core.data.cutting import DownloadPlan
from blip_core.data.denied import Denied, deny, url_key, veil
from blip_core.data.download import DownloadConfig, download_shard, plan_shards, settings_hash
from blip_core.data.shards import read_shard
from blip_core.data.tables import WebTable
from blip_core.data.web_rows import open_web_table
from blip_core.files import fingerprint
from blip_core.workspace import Workspace

ROWS = 60
CONFIG = DownloadConfig(rows_per_shard=7, processes=1, threads=8, retries=0, timeout_s=5, allow_private_networks=True)
DOMAIN = "secret.test"
# By the number of the row: many of a domain, some of single URLs, among them neighbours, and the first and the last.
OF_DOMAIN = frozenset({0, 8, 9, 10, 11, 12, 13, 14, 15, 30, 45})
OF_URL = frozenset({3, 16, 44, ROWS - 1})
HIDDEN = OF_DOMAIN | OF_URL


class _Handler(BaseHTTPRequestHandler):
    server: "Site"

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (int(self.path.rpartition("-")[2]), 0, 0)).save(buffer, "PNG")
        self.send_response(200)
        self.send_header("Content-Length", str(len(buffer.getvalue())))
        self.end_headers()
        self.wfile.write(buffer.getvalue())

    def log_message(self, *_: object) -> None:
        """Silent."""


class Site(ThreadingHTTPServer):
    """Has a picture for every path that ends with a number, and counts."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Counter[str] = Counter()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Site()) as server:
        yield server


class Table(NamedTuple):
    """A table in a shuffled order, its rows in the order of uid, and what is denied of them."""

    web: WebTable
    rows: list[dict[str, Any]]
    denied: Denied

    def shards(self, count: int = ROWS) -> dict[str, list[dict[str, Any]]]:
        """What is planned of the first rows: cut in the order of uid, then veiled, and sorted by their new names."""
        size = CONFIG.rows_per_shard
        cuts = [self.rows[start : min(start + size, count)] for start in range(0, count, size)]
        shards = [sorted((self._planned(row) for row in cut), key=lambda row: row["uid"]) for cut in cuts]
        keys = ("uid", "url", "caption")
        return {
            fingerprint(settings_hash(CONFIG), *([row[key] for row in shard] for key in keys)): shard
            for shard in shards
        }

    def _planned(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["uid"][1:4])
        if number not in HIDDEN:
            return row | {"denied": None}
        reason = "denied_domain" if number in OF_DOMAIN else "denied_url"
        return {"uid": veil(row["uid"]), "url": None, "caption": None, "denied": reason}


@pytest.fixture
def table(site: Site, tmp_path: Path) -> Table:
    rows = []
    for number in range(ROWS):
        what = "hidden" if number in HIDDEN else "shown"
        host = DOMAIN if number in OF_DOMAIN else f"127.0.0.1:{site.server_port}"
        uid = f"{'a' if number < 20 else 'z'}{number:03}-{what}"  # a veil begins with "denied-"
        rows.append({"uid": uid, "url": f"http://{host}/{what}-{number}", "caption": f"a {what} text"})
    shuffled = [rows[number * 37 % ROWS] for number in range(ROWS)]
    pq.write_table(pa.Table.from_pylist(shuffled), tmp_path / "web.parquet")
    urls = frozenset(url_key(rows[number]["url"]) for number in OF_URL)
    return Table(WebTable(str(tmp_path / "web.parquet"), uid="uid"), rows, Denied(urls, domains=frozenset({DOMAIN})))


@pytest.fixture(params=[1, 4, 11, ROWS], ids=lambda rows: f"{rows} rows at a time")
def workspace(
    request: pytest.FixtureRequest, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Workspace:
    """A workspace with the deny list, where the table comes in batches of about so many rows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param < ROWS:
        bytes_of_row = 60
        monkeypatch.setattr(table_formats, "ROWS_AT_ONCE", request.param)
        monkeypatch.setattr(sorting, "RUN_BYTES", 1)
        monkeypatch.setattr(sorting, "BLOCK_BYTES", bytes_of_row * request.param)
    with open_web_table(table.web) as rows:
        sizes = [batch.num_rows for batch in rows.batches() if batch.num_rows]
    assert len(sizes) >= ROWS // request.param // 2
    made = Workspace.open(tmp_path / "workspace")
    deny(made, table.denied)
    return made


def planned(workspace: Workspace, plan: DownloadPlan) -> dict[str, list[dict[str, Any]]]:
    shards = {name: pq.read_table(workspace.plans / f"{name}.parquet").to_pylist() for name in plan.names}
    keys = ("uid", "url", "caption", "denied")
    return {name: [{key: row.get(key) for key in keys} for row in rows] for name, rows in shards.items()}


def traces(workspace: Workspace) -> list[str]:
    """Files that have something of a denied row, in their bytes or in a value."""
    found = []
    for path in sorted(path for path in workspace.root.rglob("*") if path.is_file()):
        values = repr(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else ""
        if b"hidden" in path.read_bytes() or "hidden" in values:
            found.append(path.name)
    return found


def test_names_and_rows_of_the_plans_follow_from_the_table_alone(table: Table, workspace: Workspace) -> None:
    plan = plan_shards(table.web, CONFIG, workspace)
    expected = table.shards()
    assert (plan.names, plan.missing, plan.rows) == (sorted(expected), ROWS, ROWS)
    assert planned(workspace, plan) == expected
    assert traces(workspace) == []
    assert any(rows[0]["uid"] != veil(rows[0]["uid"]) and rows[0]["denied"] for rows in expected.values())


def test_a_trial_has_the_first_shards_of_the_full_run(table: Table, workspace: Workspace) -> None:
    count = 2 * CONFIG.rows_per_shard
    plan = plan_shards(replace(table.web, limit=count), CONFIG, workspace)
    assert planned(workspace, plan) == table.shards(count)
    assert {*plan.names} < {*table.shards()}


@pytest.mark.parametrize("workspace", [4], indirect=True)
def test_denied_rows_are_asked_for_by_nobody_and_stand_once_for_good(
    site: Site, table: Table, workspace: Workspace
) -> None:
    first = plan_shards(table.web, CONFIG, workspace)
    for name in first.names[: len(first.names) // 2]:
        download_shard(workspace, name, CONFIG)
    rest = plan_shards(table.web, CONFIG, workspace)  # as after a run that was stopped half-way
    assert sorted([*rest.names, *rest.done]) == first.names
    for name in rest.names:
        download_shard(workspace, name, CONFIG)
    assert site.asked == Counter(f"/shown-{number}" for number in range(ROWS) if number not in HIDDEN)
    shards = {name: read_shard(workspace.shard(name), ["uid", "url", "caption", "reason"]) for name in first.names}
    found = {name: [{**row, "denied": row["reason"]} for row in rows.to_pylist()] for name, rows in shards.items()}
    for rows in found.values():
        for row in rows:
            del row["reason"]
    assert found == table.shards()
    assert traces(workspace) == []
    again = plan_shards(table.web, CONFIG, workspace)
    assert (again.names, again.missing, again.done) == ([], 0, first.names)
