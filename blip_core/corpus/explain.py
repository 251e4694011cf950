"""One image's story: where it came from, what was said of it, who made and judged that, and why it was kept or not."""

from pathlib import Path
from typing import Any

import duckdb

from blip_core.corpus.query import reading
from blip_core.corpus.reasons import published_image, verdict_of
from blip_core.corpus.rules import further_rules
from blip_core.corpus.sql import one_line
from blip_core.corpus.trained import MODELS, Traces, trained_on
from blip_core.errors import CheckpointError, InputError, QueryError
from blip_core.med.description import read_checkpoint_config
from blip_core.workspace import Round, Workspace

# What config.json tells of how a model came to be.
ORIGIN = ("seed", "steps", "data", "start", "fingerprint", "format")

IMAGE = """SELECT shard, url, caption, status, reason, width, height, original_width, original_height, sha256
FROM images WHERE uid = ? ORDER BY shard"""

CANDIDATES = """SELECT round, uid, shard, source, candidate, text, itm_score, itc_score, logprob, seed, captioner,
    filter, reason
FROM annotations WHERE uid = ? ORDER BY round, shard, candidate"""

HUMAN = "SELECT text, image_sha256 FROM corpus WHERE uid = ? AND source = 'human' ORDER BY candidate"


def explain(workspace: Workspace, uid: str) -> dict[str, Any]:
    """What the workspace knows of an image, JSON-like.

    Returns {"uid", "images": [a row of `images`, without the bytes, for each shard that has it], "human": [{"text",
    "image_sha256"}], "rounds": [{"round", "promoted", "where", "rules", "candidates": [a row of `annotations` with
    "kept" (None before the round was published), "rejected_by" (a key of REJECTIONS, None where none did) and "why"]}],
    "models": {digest: {"kind", "folder", "round", and what its config.json tells of ORIGIN}}, "trained": {digest: how
    that model was trained on the image}}; a model that lies in no round of the workspace has none of those. Raises
    InputError where nothing has that uid, and QueryError where the files cannot be read.
    """
    try:
        with reading(workspace) as connection:
            images, candidates, human = (_rows(connection, query, uid) for query in (IMAGE, CANDIDATES, HUMAN))
            if not images and not human:
                raise InputError(
                    f"uid {uid!r}: no image of {workspace.root} has it; capfilt query finds one by its URL"
                )
            numbers = sorted({row["round"] for row in candidates})
            rounds = [
                _round(workspace, workspace.round(number), [row for row in candidates if row["round"] == number])
                for number in numbers
            ]
            shown = dict(connection.execute("SELECT round, promoted FROM rounds").fetchall())
    except duckdb.Error as error:
        raise QueryError(f"explain: {one_line(error)}") from error
    rounds = [{"promoted": bool(shown.get(made["round"])), **made} for made in rounds]
    trained = trained_on(
        workspace, _traces(images, rounds, {number for number, promoted in shown.items() if promoted and human})
    )
    digests = set(trained) | {row[kind] for row in candidates for kind in ("captioner", "filter")} - {None}
    return {
        "uid": uid,
        "images": images,
        "human": human,
        "rounds": rounds,
        "models": describe_models(workspace, digests),
        "trained": trained,
    }


def _traces(images: list[dict[str, Any]], rounds: list[dict[str, Any]], human: set[int]) -> Traces:
    """Where a training may have met the image. `human`: the rounds whose human pairs are known to have it."""
    kept = {(made["round"], row["shard"]) for made in rounds for row in made["candidates"] if row["kept"]}
    return Traces(
        frozenset(row["shard"] for row in images if row["status"] == "ok"),
        frozenset(kept),
        frozenset(human),
    )


def _rows(connection: duckdb.DuckDBPyConnection, query: str, uid: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = connection.sql(query, params=[uid]).to_arrow_table().to_pylist()
    return rows


def _round(workspace: Workspace, made: Round, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """The candidates of one round with their verdicts."""
    images = {(row["shard"], row["uid"]) for row in candidates}
    parts = {shard: published_image(workspace, made, shard, uid) for shard, uid in sorted(images)}
    rows = [{**row, **verdict_of(row, parts[row["shard"]])} for row in candidates]
    rules = next((part.rules for part in parts.values() if part is not None), None)
    where, others = (None, {}) if rules is None else (rules.where, further_rules(rules))
    return {"round": made.number, "where": where, "rules": others, "candidates": rows}


def describe_models(workspace: Workspace, digests: set[str]) -> dict[str, dict[str, Any]]:
    """What the rounds know of the models with these digests, and of those that they began with: by digest, `kind`,
    `folder`, `round` (the newest that has it) and ORIGIN; empty for one that lies in none."""
    found: dict[str, dict[str, Any]] = {}
    wanted = set(digests)
    for number in reversed(workspace.round_numbers()):
        for kind in reversed(MODELS):
            folder: Path = getattr(workspace.round(number), kind)
            config = _config(folder)
            digest = config.get("digest")
            if digest in wanted and digest not in found:
                origin = {key: config[key] for key in ORIGIN if key in config}
                found[digest] = {"kind": kind, "folder": str(folder), "round": number, **origin}
                wanted |= {config["start"]} if isinstance(config.get("start"), str) else set()
    return {digest: found.get(digest, {}) for digest in sorted(wanted)}


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_checkpoint_config(folder) if folder.exists() else {}
    except CheckpointError:
        return {}  # a torn one is no reason to tell nothing
