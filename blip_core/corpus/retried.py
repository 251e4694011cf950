"""Rows that were tried again, in SQL: each counts once, as the shard of the retry has it (blip_core.data.retry)."""

# ruff: noqa: S608  (what is put in is a table function of ours, and a prefix)

from blip_core.data.shards import RETRY_PREFIX
from blip_core.workspace import Workspace


def any_retried(workspace: Workspace) -> bool:
    """Whether shards of retries stand, or are to be made while the views of now are asked."""
    folders = (workspace.shards, workspace.plans)
    return any(next(folder.glob(f"{RETRY_PREFIX}*.parquet"), None) is not None for folder in folders)


def settled_once(read: str) -> str:
    """The condition by which a row of `read`, a scan of shards with their `filename`, is no failure that was settled.

    No file but those of retries is read for it.
    """
    retried = f"parse_filename(filename) LIKE '{RETRY_PREFIX}%'"
    return f"(status = 'ok' OR {retried} OR uid NOT IN (SELECT uid FROM {read} WHERE {retried}))"
