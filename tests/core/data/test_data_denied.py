"""What is denied does not come in again, under no spelling of its URL and from no other address."""

import hashlib
import io
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip_core.corpus.names import parse_names, read_names
from blip_core.data.denied import Denied, deny, read_denied, refuse_denied, veil
from blip_core.data.download import DownloadConfig, download_shard, plan_shards, preview_plan
from blip_core.data.shards import read_shard
from blip_core.data.tables import PairTable, WebTable
from blip_core.errors import ConfigError, InputError, WorkspaceError
from blip_core.workspace import Workspace

CONFIG = DownloadConfig(rows_per_shard=20, processes=1, threads=4, retries=0, timeout_s=5, allow_private_networks=True)


def picture(number: int) -> bytes:
    values = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """The paths that the site was asked for."""
    return []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, asked: list[str]) -> Iterator[int]:
    """The port of a site of pictures 0.jpg ... 4.jpg."""
    folder = tmp_path_factory.mktemp("site")
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(picture(number))

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def table(folder: Path, rows: dict[str, str | None]) -> WebTable:
    columns = {"uid": list(rows), "url": list(rows.values()), "caption": [f"text of {uid}" for uid in rows]}
    pq.write_table(pa.table(columns), folder / "web.parquet")
    return WebTable(str(folder / "web.parquet"), uid="uid")


def test_a_denied_row_is_not_asked_for_and_leaves_its_reason_alone(site: int, asked: list[str], tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path / "workspace")
    here, other = f"http://127.0.0.1:{site}", f"http://localhost:{site}"
    web = table(tmp_path, {"a": f"{here}/0.jpg", "b": f"{here}/1.jpg", "c": f"{other}/2.jpg", "d": f"{here}/3.jpg"})
    denied = parse_names([f"{here}/1.jpg", hashlib.sha256(picture(3)).hexdigest()])
    deny(workspace, denied | Denied(domains=frozenset({"localhost"})))
    plan = plan_shards(web, CONFIG, workspace)
    (name,) = plan.names
    planned = (workspace.plans / f"{name}.parquet").read_bytes()
    assert b"text of b" not in planned
    assert b"localhost" not in planned
    summary = download_shard(workspace, name, CONFIG)
    assert summary.reasons == {"denied_domain": 1, "denied_image": 1, "denied_url": 1}
    rows = {row["uid"]: row for row in read_shard(workspace.shard(name)).to_pylist()}
    assert {uid: row["reason"] for uid, row in rows.items()} == {
        "a": None, "d": "denied_image", veil("b"): "denied_url", veil("c"): "denied_domain",
    }  # fmt: skip
    for uid in ("d", veil("b"), veil("c")):
        assert {name for name, value in rows[uid].items() if value is not None} == {"uid", "status", "reason"}
    assert set(asked) == {"/0.jpg", "/3.jpg"}
    again = preview_plan(web, CONFIG, workspace)
    assert (again.names, again.done, again.missing) == ([], [name], 0)


def test_what_is_denied_between_plan_and_download_is_not_stored(site: int, asked: list[str], tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path / "workspace")
    web = table(tmp_path, {"a": f"http://127.0.0.1:{site}/0.jpg", "b": f"http://127.0.0.1:{site}/4.jpg"})
    (name,) = plan_shards(web, CONFIG, workspace).names
    deny(workspace, parse_names([f"https://127.0.0.1:{site}/4.jpg"]))
    download_shard(workspace, name, CONFIG)
    assert read_shard(workspace.shard(name))["uid"].to_pylist() == ["a", veil("b")]
    assert "/4.jpg" not in asked


@pytest.mark.parametrize(
    "url",
    [
        "http://Example.org/a/b.jpg?x=1",
        "https://example.org/a/b.jpg?x=1#part",
        "  HTTPS://EXAMPLE.ORG/a/b.jpg?x=1\n",
        "//example.org/a/b.jpg?x=1",
    ],
)
def test_spellings_of_one_url_are_one(url: str) -> None:
    denied = parse_names(["http://example.org/a/b.jpg?x=1"])
    others = ["http://example.org/a/B.jpg?x=1", "http://example.org/a/b.jpg", "http://example.org.test/a/b.jpg?x=1"]
    assert denied.reasons([url, *others, None, ""]) == ["denied_url", None, None, None, None, None]


def test_a_domain_is_its_hosts_and_theirs_below() -> None:
    denied = parse_names(["Müller.example", "192.0.2.7"])
    inside = ["http://xn--mller-kva.example/a", "https://a.b.MÜLLER.example.:81/a", "http://user@müller.example?q"]
    outside = ["http://notmüller.example/", "http://example/", "http://müller.example.org/", "http://a/müller.example"]
    assert denied.reasons([*inside, "http://192.0.2.7:8/x"]) == ["denied_domain"] * 4
    assert denied.reasons([*outside, "http://192.0.2.70/x", "not a url"]) == [None] * 6


@pytest.mark.parametrize("name", ["com", "", "a b.org", "-a.org", "0" * 63, "example.org/a.jpg", "://x", "uid-7"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected a URL"):
        parse_names([name])


def test_a_list_of_names_may_have_comments(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# taken down\n\n example.org \nhttp://a.test/#x\n")
    assert read_names(tmp_path / "list.txt") == ["example.org", "http://a.test/#x"]
    with pytest.raises(InputError, match=r"none\.txt"):
        read_names(tmp_path / "none.txt")


def test_the_deny_list_grows_and_a_torn_one_is_named(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path)
    assert not read_denied(workspace)
    deny(workspace, parse_names(["b.test"]))
    every = deny(workspace, parse_names(["a.test", "http://c.test/"]))
    assert every == read_denied(workspace)
    assert every.domains == {"a.test", "b.test"}
    workspace.denied.write_text('{"domain": "a.test"}\n{"do')
    with pytest.raises(WorkspaceError, match=r"denied\.jsonl"):
        read_denied(workspace)


def test_a_table_of_human_pairs_with_a_denied_image_trains_nothing(tmp_path: Path) -> None:
    rows = [{"id": f"h{number}", "image": picture(number), "caption": "a"} for number in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "human.parquet")
    human = PairTable(str(tmp_path / "human.parquet"), uid="id")
    refuse_denied(human, parse_names([hashlib.sha256(picture(7)).hexdigest()]))
    with pytest.raises(InputError, match=r"human\.parquet: the image of 'h1' .* deny list"):
        refuse_denied(human, parse_names([hashlib.sha256(picture(1)).hexdigest()]))
