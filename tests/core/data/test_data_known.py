"""A round that has shards before it takes in neither their URLs nor their images, in any order and after any crash."""

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

from blip_core.data.download import DownloadConfig, DownloadPlan, download_shard, plan_shards, preview_plan
from blip_core.data.known import KnownTexts, known_images, known_urls, trimmed
from blip_core.data.shards import SHARD_SCHEMA, read_shard, write_shard
from blip_core.data.tables import WebTable
from blip_core.workspace import Workspace

CONFIG = DownloadConfig(rows_per_shard=2, processes=1, threads=4, retries=0, timeout_s=5, allow_private_networks=True)


def picture(number: int) -> bytes:
    values = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG")
    return buffer.getvalue()


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Pictures 0.jpg ... 7.jpg, and copy.jpg, the bytes of 1.jpg at another address."""
    folder = tmp_path_factory.mktemp("site")
    for number in range(8):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    (folder / "copy.jpg").write_bytes(picture(1))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def table(folder: Path, name: str, rows: list[tuple[str, str | None]]) -> WebTable:
    path = folder / f"{name}.parquet"
    columns = {
        "uid": [uid for uid, _ in rows],
        "url": pa.array([url for _, url in rows], pa.string()),
        "caption": [f"text of {uid}" for uid, _ in rows],
    }
    pq.write_table(pa.table(columns), path)
    return WebTable(str(path), uid="uid")


def stand(workspace: Workspace, name: str, rows: list[tuple[str, str | None, bytes | None]], settings: str) -> str:
    """A shard of some settings: uid, URL and stored bytes."""
    workspace.shards.mkdir(exist_ok=True)
    values = [
        {"uid": uid, "url": url, "caption": "", "status": "ok", "sha256": hashlib.sha256(image).hexdigest()}
        | {"image": image}
        if image
        else {"uid": uid, "url": url, "caption": "", "status": "failed", "reason": "not_found"}
        for uid, url, image in rows
    ]
    write_shard(workspace.shard(name), [pa.Table.from_pylist(values, schema=SHARD_SCHEMA)], settings, len(values))
    return name


@pytest.fixture
def before(site: str, tmp_path: Path) -> tuple[Workspace, list[str]]:
    """Two shards of settings that are not CONFIG's: pictures 0 and 1, and a URL that was not found."""
    workspace = Workspace.open(tmp_path / "workspace")
    first = stand(workspace, "aa", [("u0", f"{site}/0.jpg", picture(0)), ("u9", None, None)], "other")
    second = stand(workspace, "bb", [("u1", f"{site}/1.jpg", picture(1)), ("u8", f"{site}/gone.jpg", None)], "other")
    return workspace, [first, second]


def new_table(site: str, folder: Path) -> WebTable:
    rows: list[tuple[str, str | None]] = [
        ("n0", f"{site}/2.jpg"),
        ("n1", f"{site}/0.jpg"),  # known, under another uid
        ("n2", f" {site}/1.jpg\n"),  # the same address, as it is fetched
        ("n3", f"{site}/gone.jpg"),  # known to fail
        ("n4", f"{site}/copy.jpg"),  # a new address of a known image
        ("n5", f"{site}/3.jpg"),
        ("n6", None),
        ("n7", f"{site}/4.jpg"),
        ("n8", f"{site}/4.jpg"),  # twice in this round, known to none before it
    ]
    return table(folder, "new", rows)


def download_all(workspace: Workspace, plan: DownloadPlan, before: list[str], order: list[int] | None = None) -> None:
    for place in order if order is not None else range(len(plan.names)):
        download_shard(workspace, plan.names[place], CONFIG, before=before)


def rows_of(workspace: Workspace, names: list[str]) -> dict[str, str | None]:
    """Reason by uid."""
    rows = [row for name in names for row in read_shard(workspace.shard(name)).to_pylist()]
    return {row["uid"]: row["reason"] for row in rows}


def test_only_new_urls_are_planned_and_the_others_are_counted(
    before: tuple[Workspace, list[str]], site: str, tmp_path: Path
) -> None:
    workspace, names = before
    web = new_table(site, tmp_path)
    preview = preview_plan(web, CONFIG, workspace, names)
    plan = plan_shards(web, CONFIG, workspace, names)
    assert preview == plan
    assert (plan.rows, plan.missing, plan.known_url) == (9, 6, 3)
    assert plan.done == ["aa", "bb"]
    planned = [pq.read_table(workspace.plans / f"{name}.parquet")["uid"].to_pylist() for name in plan.names]
    assert sorted(uid for part in planned for uid in part) == ["n0", "n4", "n5", "n6", "n7", "n8"]


def test_without_shards_before_it_every_row_of_other_settings_is_planned(
    before: tuple[Workspace, list[str]], site: str, tmp_path: Path
) -> None:
    plan = plan_shards(new_table(site, tmp_path), CONFIG, before[0])
    assert (plan.missing, plan.known_url, plan.done) == (9, 0, [])


def test_a_known_image_at_a_new_url_is_a_failed_row_with_its_reason(
    before: tuple[Workspace, list[str]], site: str, tmp_path: Path
) -> None:
    workspace, names = before
    plan = plan_shards(new_table(site, tmp_path), CONFIG, workspace, names)
    download_all(workspace, plan, names)
    reasons = {"n0": None, "n4": "duplicate_image", "n5": None, "n6": "no_url", "n7": None, "n8": None}
    assert rows_of(workspace, plan.names) == reasons
    copy = next(
        row
        for name in plan.names
        for row in read_shard(workspace.shard(name)).to_pylist()
        if row["reason"] == "duplicate_image"
    )
    assert (copy["status"], copy["image"], copy["sha256"], copy["width"]) == ("failed", None, None, None)


def test_shards_are_the_same_in_another_order_and_after_a_crash(
    before: tuple[Workspace, list[str]], site: str, tmp_path: Path
) -> None:
    workspace, names = before
    web = new_table(site, tmp_path)
    made: set[tuple[tuple[str, str], ...]] = set()
    for order in ((0, 1, 2), (2, 1, 0)):
        plan = plan_shards(web, CONFIG, workspace, names)
        assert len(plan.names) == 3
        all_names = plan.names
        download_all(workspace, plan, names, [order[0]])
        again = plan_shards(web, CONFIG, workspace, names)  # as after a crash
        assert set(again.names) == set(all_names) - {all_names[order[0]]}
        assert again.known_url == 3
        download_all(workspace, plan, names, list(order[1:]))
        digests = [hashlib.sha256(workspace.shard(name).read_bytes()).hexdigest() for name in all_names]
        made.add(tuple(zip(all_names, digests, strict=True)))
        for name in all_names:
            workspace.shard(name).unlink()
    assert len(made) == 1


def test_where_nothing_is_known_the_shards_have_the_bytes_of_a_round_without_any_before(
    before: tuple[Workspace, list[str]], site: str, tmp_path: Path
) -> None:
    workspace, names = before
    web = table(tmp_path, "fresh", [("n0", f"{site}/2.jpg"), ("n5", f"{site}/3.jpg")])
    plain = Workspace.open(tmp_path / "plain")
    for space, standing in ((workspace, names), (plain, [])):
        plan = plan_shards(web, CONFIG, space, standing)
        download_all(space, plan, standing)
    (name,) = plan.names
    assert workspace.shard(name).read_bytes() == plain.shard(name).read_bytes()


def test_urls_are_found_with_the_shards_that_have_them(before: tuple[Workspace, list[str]], site: str) -> None:
    workspace, names = before
    urls = pa.chunked_array([[f"{site}/1.jpg", None, " "], [f"{site}/7.jpg", f"{site}/gone.jpg "]], pa.string())
    found, owners = known_urls(workspace, [*names, "not-there-any-more"]).find(trimmed(urls))
    assert found.to_pylist() == [True, False, False, False, True]
    assert owners == {"bb"}


def test_a_text_that_stands_in_several_shards_is_found_in_all_of_them() -> None:
    shards = {"aa": ["one", "two", None], "bb": ["two", "two", "three"], "cc": [], "dd": ["two", "one", "four"]}
    known = KnownTexts([*shards], [pa.chunked_array([texts], pa.string()) for texts in shards.values()])
    for asked in (["two"], ["one", "one"], ["four"], ["three", "one"], ["five"], ["two", None, "five"], []):
        found, owners = known.find(pa.chunked_array([asked], pa.string()))
        assert found.to_pylist() == [any(text and text in texts for texts in shards.values()) for text in asked]
        assert owners == {name for name, texts in shards.items() if {*asked} & {*texts} - {None}}


def test_images_are_known_by_their_own_digest_alone(before: tuple[Workspace, list[str]]) -> None:
    workspace, names = before
    known = known_images(workspace, names)
    digests = [hashlib.sha256(picture(number)).hexdigest() for number in range(8)]
    assert [digest in known for digest in digests] == [True, True, *[False] * 6]
    assert digests[0] not in known_images(workspace, [names[1]])
    assert digests[0] not in known_images(workspace, [])
