"""The catalog's SQL macros: noise and agreement of a selection, search among the images of the promoted round, hosts
and files.

They stand in catalog.duckdb, so that any DuckDB client has them. Only `embed_text` needs the Filter: `capfilt query`
has it as a function (embed_text.py), and every other client this macro in its place, which says where to go.
"""

from typing import NamedTuple

import duckdb

from blip_core.corpus.sql import HOST, quoted

NEIGHBOURS = 20  # what a search gives where no number is said


class Macro(NamedTuple):
    """A macro: its parameters, its SQL, and what it gives; `rows` says whether that are rows or a value."""

    parameters: str
    sql: str
    meaning: str
    rows: bool = False


EMBED_TEXT = "embed_text"
ELSEWHERE = (
    "embed_text is known to `capfilt query` alone, which runs the text encoder of the round's Filter; there, SELECT "
    "embed_text('a red bus') gives a list of numbers that nearest(list, 20) takes everywhere"
)

_BOTH = "FILTER (a IS NOT NULL AND b IS NOT NULL)"
_AGREED = "avg((a = b)::INTEGER)"
_BY_CHANCE = (
    f"(avg(a::INTEGER) {_BOTH} * avg(b::INTEGER) {_BOTH} + avg((NOT a)::INTEGER) {_BOTH} * avg((NOT b)::INTEGER) "
    f"{_BOTH})"
)

# `{round}` is the promoted round, `{folder}` what stands before every path, and `{searched}` brings the round's
# embeddings under the name `searched`. The address of an image is read beside its scores: files of images are large.
MACROS = {
    "noise_rate": Macro(
        "score",
        "1 - avg(score)",
        "of the texts with these itm_scores, the share that is wrong, 0..1: the Filter's own estimate, 1 - their mean",
    ),
    "agreement": Macro(
        "a, b",
        _AGREED,
        "of the rows where two verdicts are both known, the share in which they are the same, 0..1",
    ),
    "kappa": Macro(
        "a, b",
        f"({_AGREED} - {_BY_CHANCE}) / nullif(1 - {_BY_CHANCE}, 0)",
        "Cohen's kappa of two verdicts, true or false: their agreement beyond chance, 1 at most; null where both "
        "always give one and the same answer",
    ),
    EMBED_TEXT: Macro(
        "text",
        f"error({quoted(ELSEWHERE)})",
        "the ITC embedding of a text, by the Filter of the promoted round; a function of `capfilt query`",
    ),
    "nearest": Macro(
        f"vector, k := {NEIGHBOURS}",
        """{searched}
SELECT found.uid, web.url, web.text AS caption, found.similarity, found.shard
FROM (
    SELECT * FROM (
        SELECT shard, uid, list_cosine_similarity(embedding, (SELECT vector::FLOAT[])) AS similarity FROM searched
    ) WHERE similarity IS NOT NULL ORDER BY similarity DESC, uid LIMIT k
) AS found LEFT JOIN annotations AS web
    ON web.round = {round} AND web.candidate = 0 AND web.shard = found.shard AND web.uid = found.uid
ORDER BY found.similarity DESC, found.uid""",
        "the k images of the promoted round whose embeddings are the nearest to a vector, by cosine",
        rows=True,
    ),
    "image_search": Macro(
        f"text, k := {NEIGHBOURS}",
        "SELECT * FROM nearest(embed_text(text), k)",
        "the k images of the promoted round that are the most like a text: nearest(embed_text(text), k)",
        rows=True,
    ),
    "near_duplicates": Macro(
        "threshold := 0.95",
        """{searched}
SELECT a.uid, b.uid AS other, list_cosine_similarity(a.embedding, b.embedding) AS similarity
FROM searched AS a JOIN searched AS b ON a.uid < b.uid
    AND list_cosine_similarity(a.embedding, b.embedding) >= threshold
ORDER BY similarity DESC, a.uid, b.uid""",
        "all pairs of images of the promoted round whose embeddings have at least that cosine; every image is compared "
        "with every other one, so it is for some ten thousand",
        rows=True,
    ),
    "host_of": Macro(
        "url",
        HOST,
        "the host of a URL in lower case, without user name and port; empty where it has none",
    ),
    "in_workspace": Macro(
        "path",
        "{folder} || path",
        "the full name of a file of the workspace, to be read by read_csv, read_parquet, read_json and their like",
    ),
}

ROW_MACROS = frozenset(name for name, macro in MACROS.items() if macro.rows)


def create_macros(
    connection: duckdb.DuckDBPyConnection, folder: str, promoted: int | None, searchable: bool, embeds: bool
) -> None:
    """Makes the macros over the catalog's views, and their comments.

    Args:
        folder: stands before every path, as in the views; signs of a glob in it are escaped.
        promoted: the round that is searched; None: there is none, and nothing is found.
        searchable: whether that round has embeddings; without them a search is an error, not an empty answer.
        embeds: whether the connection has a function `embed_text` of its own.
    """
    number = "NULL" if promoted is None else str(promoted)
    source = f"SELECT shard, uid, embedding FROM embeddings WHERE round = {number}"  # noqa: S608  (a number of ours)
    if promoted is not None and not searchable:
        why = quoted(no_embeddings(promoted))
        source = f"SELECT NULL AS shard, error({why})::VARCHAR AS uid, NULL::FLOAT[] AS embedding"
    for name, macro in MACROS.items():
        if embeds and name == EMBED_TEXT:
            continue
        kind = "MACRO TABLE" if macro.rows else "MACRO"
        sql = macro.sql.replace("{searched}", f"WITH searched AS ({source})").replace("{round}", number)
        sql = sql.replace("{folder}", quoted(folder))
        body = f"TABLE {sql}" if macro.rows else f"({sql})"
        connection.execute(f"CREATE MACRO {name}({macro.parameters}) AS {body}")
        connection.execute(f"COMMENT ON {kind} {name} IS {quoted(macro.meaning)}")


def no_embeddings(round: int) -> str:
    """Why the images of a round cannot be searched, and what helps."""
    return (
        f"round {round} has no embeddings; `capfilt annotate CONFIG.yaml --round {round}` adds them, and makes no text "
        "or score anew"
    )
