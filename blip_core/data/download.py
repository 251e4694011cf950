"""Download: from a table of URLs to shards.

A shard is named by the hash of its rows and of the settings that its bytes depend on, so a second run, or one
with added rows, fetches exactly what is missing. Every row goes into its shard, failed ones with a reason. A round
that has shards before it takes in neither their URLs nor their images.
"""

import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blip_core import stores
from blip_core.data.cutting import DownloadPlan, cut_table
from blip_core.data.denied import DENIED_IMAGE, Denied, read_denied, veil_rows
from blip_core.data.fetch import (
    Fetched,
    Fetcher,
    Progress,
    fetch_urls,
    remove_left_folders,
    retry_after,
    temporary_folder,
)
from blip_core.data.guard import Limits
from blip_core.data.images import MAX_PIXELS, StoredImage, UnreadableImage, store_image
from blip_core.data.known import KnownImages, known_images
from blip_core.data.outage import check_network
from blip_core.data.shards import (
    RETRY_PREFIX,
    ROW_GROUP_ROWS,
    SETTINGS_KEY,
    SHARD_SCHEMA,
    SHARD_VERSION,
    TRANSIENT,
    read_shard,
    settings_of,
    write_shard,
)
from blip_core.data.tables import WebTable
from blip_core.errors import DownloadError
from blip_core.files import atomic_file, fingerprint
from blip_core.settings import Settings, setting
from blip_core.workspace import Workspace

TEMPORARY = ".tmp"
# Before a URL is tried again: twice as long every time, and as long as its server asks; one that asks for more than
# LONGEST_PAUSE is not tried again.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
WEB_SCHEME = re.compile(r"https?://", re.IGNORECASE)
CREDENTIALS = re.compile(r"https?://[^/?#]*@", re.IGNORECASE)


@dataclass(frozen=True)
class DownloadConfig(Settings):
    """How the URLs of a web table are fetched and its images stored."""

    image_size: int = setting(384, "larger images are shrunk until their shorter side has this many pixels", ge=16)
    rows_per_shard: int = setting(1000, "rows of the table in a shard, the unit of work and of resuming", ge=1)
    processes: int = setting(0, "processes that fetch, and threads that decode; 0 = one for each core", ge=0)
    threads: int = setting(64, "connections open at a time, shared out over the processes", ge=1)
    timeout_s: int = setting(10, "seconds to wait for a connection, and for each read from it", ge=1)
    wall_clock_s: int = setting(3600, "seconds for the fetching of one shard; what is missing then has failed", ge=1)
    url_s: int = setting(60, "seconds for one URL, however slowly it is sent, redirects included", ge=1)
    max_bytes: int = setting(20_000_000, "bytes that are read for one URL, redirects included", ge=1)
    max_redirects: int = setting(10, "redirects of one URL that are followed", ge=0)
    per_host: int = setting(16, "connections to one host at a time; 0: any number", ge=0)
    host_pause_s: float = setting(0.0, "seconds between the beginnings of two requests to one host, at least", ge=0)
    allow_private_networks: bool = setting(
        False, "ask loopback, private, link-local and other addresses that are not public too: for tests and intranets"
    )
    retries: int = setting(1, "how often URLs that failed for a passing reason are tried again", ge=0)
    outage_below: float = setting(
        0.5,
        "a shard is not written, and tried again later, where the share of its URLs that are answered is surely below "
        "this part of that of the shards before it; 0: it is written",
        ge=0,
        le=1,
    )
    robots_txt: bool = setting(False, "ask each host for its robots.txt, and for no URL that it forbids user_agent")
    min_side: int = setting(10, "images with a shorter side of fewer pixels are refused", ge=1)
    max_pixels: int = setting(MAX_PIXELS, "images of more pixels are refused before they are decoded", ge=1)
    user_agent: str = setting(
        "capfilt",
        "the name that servers, their X-Robots-Tag and their robots.txt see",
        pattern="^[A-Za-z][A-Za-z0-9._-]*$",
    )


@dataclass(frozen=True)
class ShardSummary:
    """What one shard holds, and whether it stood already. rows = ok + failed."""

    name: str
    rows: int
    ok: int
    failed: int
    reasons: dict[str, int]
    seconds: float
    skipped: bool


def settings_hash(config: DownloadConfig) -> str:
    """Changes with every setting that the stored bytes depend on, and with no other."""
    return fingerprint(SHARD_VERSION, config.image_size, config.min_side, config.max_pixels)


def plan_shards(
    web: WebTable, config: DownloadConfig, workspace: Workspace, before: Sequence[str] = ()
) -> DownloadPlan:
    """Cuts the rows of the table that stand in no shard of these settings into shards, and writes their plans.

    Plans of an earlier table or of other settings are removed, so that no row can come into two shards; and so is what
    killed downloads left.

    Args:
        before: the shards that stood when the round began; rows whose URL one of them has, whatever the row's uid and
            the shard's settings, are left out.

    Raises:
        InputError: the table cannot be used.
        ShardError: a shard of the workspace is torn.
    """
    remove_left_folders(workspace.scratch / TEMPORARY)
    settings = settings_hash(config)

    def put(name: str, rows: pa.Table) -> None:
        write_plan(workspace, name, rows, settings)

    plan = cut_table(web, config.rows_per_shard, settings, workspace, before, put)
    remove_other_plans(workspace, plan.names, retried=False)
    return plan


def write_plan(workspace: Workspace, name: str, rows: pa.Table, settings: str) -> None:
    """Writes the rows of a shard that is to be fetched."""
    with atomic_file(workspace.plans / f"{name}.parquet") as temporary:
        pq.write_table(rows.replace_schema_metadata({SETTINGS_KEY: settings}), temporary)


def remove_other_plans(workspace: Workspace, names: Sequence[str], retried: bool) -> None:
    """Removes the plans of other shards than these, of one kind: of retries, or not."""
    kept = set(names)
    for path in workspace.plans.glob("*.parquet"):
        if path.stem not in kept and path.stem.startswith(RETRY_PREFIX) == retried:
            path.unlink(missing_ok=True)


def preview_plan(
    web: WebTable, config: DownloadConfig, workspace: Workspace, before: Sequence[str] = ()
) -> DownloadPlan:
    """What plan_shards would return, with nothing written. Raises as it does."""
    return cut_table(web, config.rows_per_shard, settings_hash(config), workspace, before, lambda name, rows: None)


def download_shard(
    workspace: Workspace,
    name: str,
    config: DownloadConfig,
    progress: Progress | None = None,
    before: Sequence[str] = (),
    ray_address: str | None = None,
) -> ShardSummary:
    """Fetches the rows that plan_shards put into the shard `name`; does nothing where the shard stands.

    Args:
        progress: is told about once a second how many images have arrived so far.
        before: the shards that stood when the round began; an image that one of them has fails as duplicate_image.
        ray_address: of the Ray cluster whose nodes fetch, in `config.processes` tasks; all of them must reach the
            workspace's folder under the same name. None: this machine fetches.

    Raises:
        DownloadError: there is no plan of that name with these settings, img2dataset did not run, or so many URLs
            failed for a reason that may pass that the network is down (check_network). No shard is left then; try
            again later.
    """
    started = time.monotonic()
    target, plan = workspace.shard(name), workspace.plans / f"{name}.parquet"
    skipped = target.exists()
    if not skipped:
        denied = read_denied(workspace)
        rows = veil_rows(read_plan(plan, name, config), denied).sort_by("uid")
        with temporary_folder(workspace.scratch / TEMPORARY, name) as folder:
            answers = fetch(web_urls(rows), folder, config, progress, ray_address)
            check_network(name, answers, workspace, config.outage_below)
            groups = row_groups(rows, answers, config, known_images(workspace, before), denied)
            write_shard(target, groups, settings_hash(config), rows.num_rows)
    plan.unlink(missing_ok=True)
    return read_summary(name, target, time.monotonic() - started, skipped)


def read_plan(path: Path, name: str, config: DownloadConfig) -> pa.Table:
    """The rows of a shard that is to be fetched. Raises DownloadError where there is no such plan."""
    try:
        rows = pq.read_table(stores.readable(path), partitioning=None)
    except stores.errors(pa.ArrowException) as error:
        raise DownloadError(f"shard {name}: {path} is no plan of a shard ({error}); plan the shards again") from error
    if settings_of(rows) != settings_hash(config):
        raise DownloadError(f"shard {name}: was planned with other download settings; plan the shards again")
    return rows


def web_urls(rows: pa.Table) -> list[str]:
    """The distinct URLs that may be fetched, sorted."""
    values = rows.drop_columns(["uid", "caption"]).to_pylist()
    return sorted({row["url"].strip() for row in values if _refusal(row) is None})


def _refusal(row: dict[str, Any]) -> str | None:
    """Why a row is not fetched at all, or None."""
    if (denied := row.get("denied")) is not None:
        return str(denied)
    url = row["url"]
    if row["duplicate"]:
        return "duplicate_row"
    if not url or not url.strip():
        return "no_url"
    if not WEB_SCHEME.match(url.strip()):
        return "scheme_refused"
    return "credentials_refused" if CREDENTIALS.match(url.strip()) else None


def fetch(
    urls: list[str], folder: Path, config: DownloadConfig, progress: Progress | None, ray_address: str | None
) -> dict[str, Fetched]:
    """One attempt for all URLs, and `retries` more for those that failed for a reason that may pass."""
    deadline = time.monotonic() + config.wall_clock_s
    answers: dict[str, Fetched] = {}
    pending = urls
    for attempt in range(config.retries + 1):
        if attempt:
            pending = [url for url in pending if retry_after(answers[url].message) <= LONGEST_PAUSE]
            _rest([answers[url] for url in pending], attempt, deadline)
        left = deadline - time.monotonic()
        if not pending or left <= 0:
            break
        processes = min(config.processes or os.cpu_count() or 1, len(pending))
        threads = -(-config.threads // processes)
        fetcher = Fetcher(processes, threads, config.timeout_s, config.user_agent, _limits(config), ray_address)
        answers |= fetch_urls(pending, folder / str(attempt), fetcher, left, _further(answers, progress))
        pending = [url for url in pending if answers[url].reason in TRANSIENT]
    return answers


def _limits(config: DownloadConfig) -> Limits:
    """What the guard is told of the settings."""
    return Limits(**{name: getattr(config, name) for name in Limits._fields})


def _rest(failed: list[Fetched], attempt: int, deadline: float) -> None:
    """Waits before the URLs that failed so are tried again, until the deadline at most."""
    pause = min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)
    if failed:
        pause = max([pause, *(retry_after(answer.message) for answer in failed)])
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))


def _further(answers: dict[str, Fetched], progress: Progress | None) -> Progress | None:
    """Counts on from the images that earlier attempts brought."""
    arrived = sum(answer.path is not None for answer in answers.values())
    return None if progress is None else lambda images: progress(arrived + images)


def row_groups(
    rows: pa.Table, answers: dict[str, Fetched], config: DownloadConfig, known: KnownImages, denied: Denied
) -> Iterator[pa.Table]:
    """The shard's row groups, decoded one after the other so that memory stays bounded."""
    with ThreadPoolExecutor(config.processes or os.cpu_count() or 1) as pool:
        for start in range(0, rows.num_rows, ROW_GROUP_ROWS):
            group = rows.slice(start, ROW_GROUP_ROWS)
            urls = web_urls(group)
            images = dict(zip(urls, pool.map(lambda url: _image(answers[url], config), urls), strict=True))
            shown = [_row(row, images, known, denied) for row in group.to_pylist()]
            yield pa.Table.from_pylist(shown, schema=SHARD_SCHEMA)


def _image(answer: Fetched, config: DownloadConfig) -> StoredImage | str:
    """The image, or the reason why there is none."""
    if answer.path is None:
        return answer.reason or "interrupted"
    try:
        return store_image(answer.path.read_bytes(), config.image_size, config.min_side, config.max_pixels)
    except UnreadableImage as error:
        return error.reason


def _row(
    row: dict[str, Any], images: dict[str, StoredImage | str], known: KnownImages, denied: Denied
) -> dict[str, Any]:
    result = {"uid": row["uid"], "url": row["url"], "caption": row["caption"]}
    image = _refusal(row) or images[row["url"].strip()]
    if isinstance(image, str):
        return result | {"status": "failed", "reason": image}
    sha256 = hashlib.sha256(image.data).hexdigest()
    if sha256 in denied.images:  # the uid stays, or the row would be fetched again and again
        return {"uid": row["uid"], "status": "failed", "reason": DENIED_IMAGE}
    if sha256 in known:
        return result | {"status": "failed", "reason": "duplicate_image"}
    return result | {
        "status": "ok",
        "width": image.width,
        "height": image.height,
        "original_width": image.original_width,
        "original_height": image.original_height,
        "sha256": sha256,
        "image": image.data,
    }


def read_summary(name: str, path: Path, seconds: float, skipped: bool) -> ShardSummary:
    """What a shard that stands holds."""
    reasons = Counter(read_shard(path, ["reason"])["reason"].to_pylist())
    ok = reasons.pop(None, 0)
    failed = sum(reasons.values())
    return ShardSummary(name, ok + failed, ok, failed, dict(sorted(reasons.items())), round(seconds, 3), skipped)
