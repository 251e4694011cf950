"""Why a published round kept a candidate or not: the rules that its part names, asked again.

They are asked of the whole annotation part, as publishing asked them: a predicate may look at other candidates.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip_core import stores
from blip_core.corpus.left_out import part_of, read_left_out
from blip_core.corpus.rules import BEST_OF, REJECTIONS, WHERE, PublishConfig, looks_across
from blip_core.corpus.schemas import CORPUS_VERSION
from blip_core.corpus.selection import count_reasons, read_candidates, read_rules
from blip_core.corpus.verdicts import check_publish, judge
from blip_core.data.denied import NOTHING, Denied, read_denied
from blip_core.data.shards import check_part
from blip_core.errors import ShardError
from blip_core.workspace import Round, Workspace


class Published(NamedTuple):
    """What a corpus part says of one image: its candidates that are in it, and why the others are not."""

    rules: PublishConfig
    kept: set[int]
    reasons: dict[int, str | None]  # by candidate, as the rules give them now
    likeness: str  # the image that is kept in its place


def published_image(workspace: Workspace, made: Round, shard: str, uid: str) -> Published | None:
    """What a shard's corpus part says of one image; None where the part does not stand whole."""
    part = made.corpus / f"{shard}.parquet"
    try:
        rules = read_rules(check_part(part, CORPUS_VERSION)) if part.exists() else None
    except ShardError:
        rules = None
    if rules is None:
        return None
    table = pq.read_table(stores.readable(part), columns=["uid", "candidate"], partitioning=None)
    kept = set(table.filter(pc.equal(table["uid"], uid))["candidate"].to_pylist())
    left_out = _left_out(made, shard) if looks_across(rules.images) else None
    judged = _judged(workspace, made, shard, rules, left_out)
    mine = judged.filter(pc.equal(judged["uid"], uid))
    reasons = dict(zip(mine["candidate"].to_pylist(), mine["verdict"].to_pylist(), strict=True))
    return Published(rules, kept, reasons, _likeness(left_out, uid))


def rejections(
    workspace: Workspace, made: Round, shard: str, rules: PublishConfig, gone: Sequence[bool]
) -> dict[str, int]:
    """How many candidates of a shard each rule rejected, but for those rows of its annotations that are `gone`."""
    left_out = _left_out(made, shard) if looks_across(rules.images) else None
    verdicts = _judged(workspace, made, shard, rules, left_out, NOTHING)["verdict"].combine_chunks()
    return count_reasons(verdicts.filter(pa.array([not out for out in gone], pa.bool_())))


def _judged(
    workspace: Workspace,
    made: Round,
    shard: str,
    rules: PublishConfig,
    left_out: pa.Table | None,
    denied: Denied | None = None,
) -> pa.Table:
    """The candidates of a shard with a column `verdict`; without those that are denied now, unless others are given."""
    check_publish(rules)  # they are read from a file of the workspace
    annotation = made.annotations / f"{shard}.parquet"
    candidates = read_candidates(
        annotation, workspace.shard(shard), read_denied(workspace) if denied is None else denied
    )
    return candidates.append_column("verdict", judge(candidates, rules, left_out, annotation))


def _left_out(made: Round, shard: str) -> pa.Table | None:
    try:
        return read_left_out(part_of(made, shard))
    except ShardError:
        return None


def _likeness(left_out: pa.Table | None, uid: str) -> str:
    rows = [] if left_out is None else left_out.filter(pc.equal(left_out["uid"], uid)).to_pylist()
    return next((f"; that one is {row['of_uid']!r} of shard {row['of_shard']}" for row in rows if row["of_uid"]), "")


def verdict_of(row: dict[str, Any], published: Published | None) -> dict[str, Any]:
    """Whether a candidate was kept, the rule that rejected it, and why in words."""
    kept = None if published is None else row["candidate"] in published.kept
    reason = None if published is None or kept else published.reasons.get(row["candidate"])
    return {"kept": kept, "rejected_by": reason, "why": _why(row, published, kept, reason)}


def _why(row: dict[str, Any], published: Published | None, kept: bool | None, reason: str | None) -> str:
    if row["reason"] is not None:
        return f"it has no scores: {row['reason']}"
    if published is None:
        return "its shard is not published in this round yet"
    if kept:
        return f"{published.rules.where} is true"
    if reason is None:
        return "the part was published from other annotations; capfilt publish makes it anew"
    if reason == WHERE:
        return f"{published.rules.where} is not true"
    if reason == BEST_OF:
        return REJECTIONS[reason]
    return f"{reason}: {REJECTIONS[reason]}{published.likeness}"
