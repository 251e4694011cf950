"""What other predicates would keep of a round's annotations, with no model run and nothing written.

The Filter has scored every candidate once; where the corpus begins is a question of SQL (BLIP, section 3.3).
"""

# ruff: noqa: S608  (the predicates have been parsed, each as one expression, in a connection that reaches no file)

from collections.abc import Sequence
from typing import Any

import duckdb

from blip_core.corpus.query import reading
from blip_core.corpus.rules import WHERE, PublishConfig, rules_of
from blip_core.corpus.sql import nodes, one_line, syntax_tree
from blip_core.corpus.verdicts import check_predicate
from blip_core.errors import QueryError, WorkspaceError
from blip_core.workspace import Workspace

THRESHOLDS = ("0.1", "0.3", "0.5", "0.7", "0.9", "0.95", "0.99")
SHOWN = ("uid", "url", "source", "text", "itm_score", "itc_score")
OF_IMAGES = {"width", "height"}  # what a predicate may name and an annotation does not have


def predicate_of(given: str) -> str:
    """The predicate that is meant: a bare number is a threshold of itm_score. Raises ConfigError for a bad one."""
    try:
        where = f"itm_score > {float(given)}"
    except ValueError:
        where = given
    check_predicate(where)
    return where


def not_asked(rules: PublishConfig) -> list[str]:
    """The keys of those rules that a sweep does not ask: they take longer than a look at the scores."""
    asked = {
        "publish.text.languages": rules.text.languages is not None,
        "publish.images.unique": rules.images.unique,
        "publish.images.near_duplicates": rules.images.near_duplicates is not None,
        "publish.images.per_domain": rules.images.per_domain is not None,
    }
    return [key for key, there in asked.items() if there]


def sweep(
    workspace: Workspace,
    round: int,
    predicates: Sequence[str],
    best_of: bool = False,
    examples: int = 0,
    rules: PublishConfig | None = None,
) -> list[dict[str, Any]]:
    """What each predicate would keep, as `publish` would with it.

    Args:
        round: its annotations are asked.
        predicates: SQL over the columns of an annotation, width and height, as `predicate_of` gives them.
        best_of: keeps the best synthetic text of an image alone, as `publish.best_of` does.
        examples: pairs to show of each predicate's edge.
        rules: what is asked beside each predicate, but for its own predicate and best_of, and those of `not_asked`.

    Returns:
        One JSON-like row for each: where; images, web, synthetic (kept); rejected; estimated_noise (1 - the mean
        itm_score of what is kept, None where nothing is); least_kept and most_rejected, `examples` candidates each by
        itm_score.

    Raises WorkspaceError where the round has no annotations, and QueryError where a predicate fails on a row.
    """
    if not any(workspace.round(round).annotations.glob("*.parquet")):
        raise WorkspaceError(f"{workspace.root}: round {round} has no annotations; capfilt annotate makes them")
    try:
        with reading(workspace) as connection:
            others = [rule.passes for rule in rules_of(rules or PublishConfig()) if rule.reason != WHERE]
            candidates = _candidates(connection, round, predicates, others, best_of)
            rows = _counts(connection, candidates, predicates)
            for number, row in enumerate(rows if examples else []):
                row["least_kept"] = _edge(connection, candidates, f"keep{number}", "ASC", examples)
                row["most_rejected"] = _edge(connection, candidates, f"NOT keep{number}", "DESC", examples)
    except duckdb.Error as error:
        raise QueryError(f"sweep: {one_line(error)}") from error
    return rows


def _candidates(
    connection: duckdb.DuckDBPyConnection, round: int, predicates: Sequence[str], others: Sequence[str], best_of: bool
) -> str:
    """A SELECT of the round's candidates with a column keep0, keep1, ... for each predicate; `others` hold for all."""
    tree = syntax_tree(connection, f"SELECT {', '.join([*predicates, *others])}")
    named = {node["column_names"][-1].lower() for node in nodes(tree) if node.get("type") == "COLUMN_REF"}
    source = f"(SELECT * FROM annotations WHERE round = {round})"
    if OF_IMAGES & named:
        source += " JOIN (SELECT uid, shard, width, height FROM images) USING (uid, shard)"
    always = " AND ".join(f"({passes})" for passes in ("reason IS NULL", *others))
    passes = [f"coalesce(({where}) AND {always}, false) AS keep{n}" for n, where in enumerate(predicates)]
    judged = f"SELECT {', '.join([*SHOWN, 'shard', 'candidate', *passes])} FROM {source}"
    if not best_of:
        return judged
    best = [
        f"keep{n} AND (source <> 'synthetic' OR 1 = row_number() OVER "
        f"(PARTITION BY shard, uid, source, keep{n} ORDER BY itm_score DESC, candidate)) AS keep{n}"
        for n in range(len(predicates))
    ]
    return f"SELECT {', '.join([*SHOWN, *best])} FROM ({judged})"


def _counts(connection: duckdb.DuckDBPyConnection, candidates: str, predicates: Sequence[str]) -> list[dict[str, Any]]:
    """All predicates are counted in one reading of the annotations."""
    names = ("images", "web", "synthetic", "rejected", "estimated_noise")
    columns = [
        column
        for n in range(len(predicates))
        for column in (
            f"count(DISTINCT uid) FILTER (WHERE keep{n})",
            f"count(*) FILTER (WHERE keep{n} AND source = 'web')",
            f"count(*) FILTER (WHERE keep{n} AND source = 'synthetic')",
            f"count(*) FILTER (WHERE NOT keep{n})",
            f"1 - avg(itm_score::DOUBLE) FILTER (WHERE keep{n})",
        )
    ]
    [values] = connection.sql(f"SELECT {', '.join(columns)} FROM ({candidates})").fetchall()
    size = len(names)
    return [
        {"where": where, **dict(zip(names, values[n * size : (n + 1) * size], strict=True))}
        for n, where in enumerate(predicates)
    ]


def _edge(
    connection: duckdb.DuckDBPyConnection, candidates: str, which: str, order: str, count: int
) -> list[dict[str, Any]]:
    """The first candidates of one side by itm_score, those of one score by uid, source and text."""
    query = (
        f"SELECT {', '.join(SHOWN)} FROM ({candidates}) WHERE {which} AND itm_score IS NOT NULL "
        f"ORDER BY itm_score {order}, uid, source, text LIMIT {count}"
    )
    rows: list[dict[str, Any]] = connection.sql(query).to_arrow_table().to_pylist()
    return rows
