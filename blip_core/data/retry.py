"""Another try, later, for what failed in written shards for a passing reason; what is settled then is a shard more.

The shard in which a row failed stays as it is, and so do its annotations. The further shard has only rows that were
settled, by an image or by a failure for good: a row is in one such shard at most, and where it is, its old failure no
longer counts. One atomic file says so, so that no crash can lose a row or count it twice.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from blip_core import stores
from blip_core.data.cutting import DownloadPlan, cut_rows
from blip_core.data.denied import read_denied, veil, veil_rows
from blip_core.data.download import (
    TEMPORARY,
    DownloadConfig,
    ShardSummary,
    fetch,
    read_plan,
    read_summary,
    remove_other_plans,
    row_groups,
    settings_hash,
    web_urls,
    write_plan,
)
from blip_core.data.fetch import Fetched, Progress, remove_left_folders, temporary_folder
from blip_core.data.known import known_images
from blip_core.data.shards import RETRY_PREFIX, TRANSIENT, read_shard, settings_of, write_shard
from blip_core.data.tables import WebTable
from blip_core.data.web_rows import read_web_table
from blip_core.workspace import Workspace

# In a summary, the rows that failed for a passing reason again.
LEFT = "again"
COLUMNS = ["uid", "url", "caption", "reason"]


def plan_retry(web: WebTable, config: DownloadConfig, workspace: Workspace) -> DownloadPlan:
    """Cuts the rows of standing shards that failed for a passing reason into shards, and writes their plans.

    They are those of shards of these settings, whichever table they came from; in a trial (`web.limit`) those of the
    table alone. `done` are the shards that stand.

    Raises:
        InputError: in a trial, the table cannot be used.
        ShardError: a shard of the workspace is torn.
    """
    remove_left_folders(workspace.scratch / TEMPORARY)
    settings = settings_hash(config)
    failed = failed_rows(workspace, settings)
    if web.limit is not None:
        failed = failed.filter(pc.is_in(failed["uid"], value_set=read_web_table(web)["uid"].combine_chunks()))
    missing = cut_rows(failed, config.rows_per_shard, settings, RETRY_PREFIX)
    for name, rows in missing.items():
        write_plan(workspace, name, rows, settings)
    remove_other_plans(workspace, list(missing), retried=True)
    done = [path.stem for path in workspace.shard_paths()]
    return DownloadPlan(sorted(missing), done, failed.num_rows, failed.num_rows)


def failed_rows(workspace: Workspace, settings: str) -> pa.Table:
    """The rows of shards of these settings that failed for a passing reason and were not settled since.

    Returns uid, url, caption and duplicate, as a table of web pairs has them, sorted by uid.
    """
    paths = workspace.shard_paths()
    parts = stores.each(paths, lambda path: _failed(path, settings))
    rows = pa.concat_tables([pa.table({name: pa.array([], pa.string()) for name in COLUMNS}), *parts])
    settled = settled_uids(paths)
    left = [uid not in settled and veil(uid) not in settled for uid in rows["uid"].to_pylist()]
    rows = rows.filter(pa.array(left, pa.bool_())).sort_by("uid").drop_columns("reason")
    return rows.append_column("duplicate", pa.array([False] * rows.num_rows)).combine_chunks()


def settled_uids(paths: Sequence[Path]) -> set[str]:
    """The rows that shards of retries have."""
    retried = [path for path in paths if path.stem.startswith(RETRY_PREFIX)]
    parts = stores.each(retried, lambda path: read_shard(path, ["uid"])["uid"].to_pylist())
    return {uid for uids in parts for uid in uids}


def _failed(path: Path, settings: str) -> pa.Table:
    table = read_shard(path, COLUMNS)
    failed = table.filter(pc.is_in(table["reason"], value_set=pa.array(sorted(TRANSIENT))))
    return failed.slice(0, failed.num_rows if settings_of(table) == settings else 0).replace_schema_metadata(None)


def retry_shard(
    workspace: Workspace,
    name: str,
    config: DownloadConfig,
    progress: Progress | None = None,
    before: Sequence[str] = (),
    ray_address: str | None = None,
) -> ShardSummary:
    """Fetches the rows that plan_retry put into the shard `name`, and writes those that are settled, if any are.

    Arguments and errors are those of download_shard, but that URLs which fail again for a passing reason are no error:
    their rows stay where they are, and count in the summary.
    """
    started = time.monotonic()
    target, plan = workspace.shard(name), workspace.plans / f"{name}.parquet"
    if target.exists():
        plan.unlink(missing_ok=True)
        return read_summary(name, target, time.monotonic() - started, skipped=True)
    denied = read_denied(workspace)
    rows = read_plan(plan, name, config)
    with temporary_folder(workspace.scratch / TEMPORARY, name) as folder:
        answers = fetch(web_urls(veil_rows(rows, denied)), folder, config, progress, ray_address)
        settled = rows.filter(pa.array([_is_settled(url, answers) for url in rows["url"].to_pylist()], pa.bool_()))
        if settled.num_rows and not target.exists():  # another machine may have been faster
            groups = row_groups(settled, answers, config, known_images(workspace, before), denied)
            write_shard(target, groups, settings_hash(config), settled.num_rows)
    plan.unlink(missing_ok=True)
    return _summary(name, target, rows.num_rows - settled.num_rows, time.monotonic() - started)


def _is_settled(url: str, answers: Mapping[str, Fetched]) -> bool:
    """Whether there is an answer that is for good. There is none to what came onto the deny list in between."""
    answer = answers.get(url.strip())
    return answer is not None and answer.reason not in TRANSIENT


def _summary(name: str, path: Path, left: int, seconds: float) -> ShardSummary:
    """Of the rows that were tried: those that were settled, and those that are left where they are."""
    if not path.exists():
        return ShardSummary(name, left, 0, left, {LEFT: left}, round(seconds, 3), skipped=False)
    made = read_summary(name, path, seconds, skipped=False)
    reasons = made.reasons | ({LEFT: left} if left else {})
    return replace(made, rows=made.rows + left, failed=made.failed + left, reasons=reasons)
