"""One image's story: where it came from, what was said of it, who made and judged that, and why it was kept or not."""

# ruff: noqa: S608  (paths are quoted, and a predicate has been parsed as one expression)

from pathlib import Path
from typing import Any

import duckdb

from blip_core.corpus.catalog import quoted
from blip_core.corpus.query import reading
from blip_core.corpus.schemas import CORPUS_VERSION
from blip_core.corpus.selection import BEST_OF_KEY, WHERE_KEY, check_predicate
from blip_core.corpus.sql import one_line
from blip_core.corpus.trained import MODELS, Traces, trained_on
from blip_core.data.shards import check_part
from blip_core.errors import CheckpointError, InputError, QueryError, ShardError
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
    "image_sha256"}], "rounds": [{"round", "promoted", "where", "best_of", "candidates": [a row of `annotations` with
    "kept" (None before the round was published) and "why"]}], "models": {digest: {"kind", "folder", "round", and what
    its config.json tells of ORIGIN}}, "trained": {digest: how that model was trained on the image}}; a model that lies
    in no round of the workspace has none of those. Raises InputError where nothing has that uid, and QueryError where
    the files cannot be read.
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
                _round(connection, workspace.round(number), [row for row in candidates if row["round"] == number])
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


def _round(connection: duckdb.DuckDBPyConnection, made: Round, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """The candidates of one round with their verdicts."""
    parts = {row["shard"]: _published(made.corpus / f"{row['shard']}.parquet") for row in candidates}
    rows = []
    for row in candidates:
        published = parts[row["shard"]]
        kept = None if published is None else _is_in(connection, made.corpus / f"{row['shard']}.parquet", row)
        rows.append({**row, "kept": kept, "why": _why(connection, row, published, kept)})
    published = next((part for part in parts.values() if part is not None), None)
    where, best_of = published or (None, None)
    return {"round": made.number, "where": where, "best_of": best_of, "candidates": rows}


def _published(part: Path) -> tuple[str, bool] | None:
    """Predicate and best_of of a corpus part; None where it does not stand whole."""
    try:
        found = check_part(part, CORPUS_VERSION) if part.exists() else {}
    except ShardError:
        found = {}
    return (found[WHERE_KEY], found[BEST_OF_KEY] == "true") if WHERE_KEY in found else None


def _is_in(connection: duckdb.DuckDBPyConnection, part: Path, row: dict[str, Any]) -> bool:
    query = f"SELECT count(*) FROM read_parquet({quoted(str(part))}) WHERE uid = ? AND source = ? AND candidate = ?"
    [(found,)] = connection.execute(query, [row["uid"], row["source"], row["candidate"]]).fetchall()
    return bool(found)


def _why(
    connection: duckdb.DuckDBPyConnection, row: dict[str, Any], published: tuple[str, bool] | None, kept: bool | None
) -> str:
    if row["reason"] is not None:
        return f"it has no scores: {row['reason']}"
    if published is None:
        return "its shard is not published in this round yet"
    where, best_of = published
    if kept:
        return f"{where} is true"
    if not _passes(connection, row, where):
        return f"{where} is not true"
    if best_of and row["source"] == "synthetic":
        return "another synthetic text of the image is better, and best_of keeps one"
    return "the part was published from other annotations; capfilt publish makes it anew"


def _passes(connection: duckdb.DuckDBPyConnection, row: dict[str, Any], where: str) -> bool:
    check_predicate(where)  # it is read from a file of the workspace
    query = (
        f"SELECT coalesce(({where}), false) FROM (SELECT * FROM annotations WHERE round = ? AND uid = ? AND shard = ? "
        "AND candidate = ?) JOIN (SELECT uid, shard, width, height FROM images) USING (uid, shard)"
    )
    found = connection.execute(query, [row["round"], row["uid"], row["shard"], row["candidate"]]).fetchall()
    return bool(found and found[0][0])


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
