"""One publication in a process of its own, as the flow `publish` makes it, without Prefect: for corpus.py.

Two shards at a time, as the flow does, and the catalog. Prints what it kept, its seconds and its peak memory as JSON.
"""

import json
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from blip_core.corpus.catalog import build_catalog
from blip_core.corpus.left_out import compare_round, part_of, read_left_out
from blip_core.corpus.rules import PublishConfig, looks_across
from blip_core.corpus.selection import PublishSummary, publish_shard
from blip_core.data.denied import read_denied
from blip_core.workspace import Workspace

ROUND = 1
WINDOW = 2  # shards at a time, as in flows/publish.py


def publish(workspace: Workspace, config: PublishConfig) -> dict[str, Any]:
    """Publishes all shards that are annotated."""
    began = time.monotonic()
    names = sorted(part.stem for part in workspace.round(ROUND).annotations.glob("*.parquet"))
    if looks_across(config.images):
        compare_round(workspace, ROUND, names, config)
    compared = time.monotonic()
    with ThreadPoolExecutor(WINDOW) as pool:
        done = list(pool.map(partial(publish_one, workspace, config), names))
    build_catalog(workspace)
    reasons = sum((Counter(summary.by_reason) for summary in done), Counter[str]())
    return {
        "shards": len(done),
        "kept": sum(summary.kept for summary in done),
        "rejected": sum(summary.rejected for summary in done),
        "by_reason": dict(sorted(reasons.items())),
        "seconds": round(time.monotonic() - began, 1),
        "compare_seconds": round(compared - began, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_memory_mb": peak_memory(),
    }


def publish_one(workspace: Workspace, config: PublishConfig, name: str) -> PublishSummary:
    """The corpus part of one shard."""
    made = workspace.round(ROUND)
    return publish_shard(
        made.annotations / f"{name}.parquet",
        workspace.shard(name),
        made.corpus / f"{name}.parquet",
        config.where,
        ROUND,
        config.best_of,
        config.text,
        config.images,
        read_left_out(part_of(made, name)) if looks_across(config.images) else None,
        read_denied(workspace),
    )


def peak_memory() -> int:
    """MB that this process held at most, files that were mapped included."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) // 1000


if __name__ == "__main__":
    rules = TypeAdapter(PublishConfig).validate_python(json.loads(sys.argv[2]))
    sys.stdout.write(json.dumps(publish(Workspace.existing(sys.argv[1]), rules)))
