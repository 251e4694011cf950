"""The verdict over every candidate of a part: the reason of the first rule that it fails, or none.

DuckDB evaluates predicate and rules in a connection that can reach no file. What a verdict depends on is in its
arguments alone, so that publishing, `capfilt explain` and the look across shards give the same one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip_core.corpus.languages import check_languages, in_other_language
from blip_core.corpus.rules import BEST_OF, NO_SCORES, OTHER_LANGUAGE, PublishConfig, check_limits, rules_of
from blip_core.corpus.schemas import ANNOTATION_SCHEMA
from blip_core.corpus.sql import one_line, unstable_functions
from blip_core.errors import ConfigError, QueryError

# What a predicate may name: every column of an annotation, and the size of its image.
PREDICATE_SCHEMA = pa.schema([*ANNOTATION_SCHEMA, pa.field("width", pa.int32()), pa.field("height", pa.int32())])

LEFT_OUT_SCHEMA = pa.schema(
    {
        "uid": pa.string(),
        "reason": pa.string(),  # SAME_IMAGE, NEAR_DUPLICATE or DOMAIN_FULL
        "of_shard": pa.string(),  # the image that is kept in its place; null for a full domain
        "of_uid": pa.string(),
    }
)


def check_publish(config: PublishConfig) -> None:
    """Raises ConfigError where predicate or rules cannot be used, before anything is read."""
    check_predicate(config.where)
    check_limits(config)
    if config.text.languages is not None:
        check_languages(config.text.languages)


@lru_cache  # it is asked for every shard, and takes as long as judging one
def check_predicate(where: str) -> None:
    """Raises ConfigError where `where` is not one true-or-false expression over the columns of a candidate."""
    with _locked_connection(PREDICATE_SCHEMA.empty_table()) as connection:
        try:
            predicate = duckdb.SQLExpression(where)  # parses exactly one expression
            candidates = connection.table("annotations")
            candidates.filter(predicate)  # WHERE refuses aggregates and window functions, SELECT would not
            kind = str(candidates.select(predicate).types[0])
            unstable = unstable_functions(connection, where)
        except duckdb.Error as error:
            raise ConfigError(_predicate_error(where, one_line(error))) from error
    if kind != "BOOLEAN":
        raise ConfigError(_predicate_error(where, f"the expression is {kind}, not true or false"))
    if unstable:
        what = f"{unstable[0]}() differs from run to run; to draw a sample, use hash(uid)"
        raise ConfigError(_predicate_error(where, what))


def judge(candidates: pa.Table, config: PublishConfig, left_out: pa.Table | None, origin: object) -> pa.Array:
    """Why each candidate is rejected: a key of REJECTIONS, null where it is kept.

    Args:
        candidates: all of one part, of PREDICATE_SCHEMA.
        config: its predicate has been checked by check_predicate.
        left_out: the part's images that lost against others, of LEFT_OUT_SCHEMA; None where none were compared.
        origin: where the candidates come from, to be named when the predicate fails on one of them.

    Raises QueryError where the predicate fails on a row.
    """
    reasons = judge_alone(candidates, config, origin)
    if left_out is not None and left_out.num_rows:
        found = pc.index_in(candidates["uid"], value_set=left_out["uid"].combine_chunks()).combine_chunks()
        reasons = pc.coalesce(reasons, left_out["reason"].combine_chunks().take(found))
    return _only_the_best(candidates, reasons) if config.best_of else reasons


def judge_alone(candidates: pa.Table, config: PublishConfig, origin: object) -> pa.Array:
    """The same, by the rules alone that see no other candidate than the one they judge."""
    case = duckdb.CaseExpression(duckdb.SQLExpression("reason IS NOT NULL"), duckdb.ConstantExpression(NO_SCORES))
    for reason, passes in rules_of(config):
        fails = ~duckdb.CoalesceOperator(duckdb.SQLExpression(passes), duckdb.ConstantExpression(False))
        case = case.when(fails, duckdb.ConstantExpression(reason))
    with _locked_connection(candidates) as connection:
        try:
            asked = connection.table("annotations").select(duckdb.ColumnExpression("place"), case.alias("verdict"))
            verdicts = asked.to_arrow_table()
        except duckdb.Error as error:
            raise QueryError(f"publish.where {config.where!r} fails on {origin}: {one_line(error)}") from error
    if verdicts.num_rows != candidates.num_rows:
        raise QueryError(f"publish.where {config.where!r}: {verdicts.num_rows} verdicts for {candidates.num_rows}")
    reasons = verdicts.sort_by("place")["verdict"].combine_chunks().cast(pa.string())
    return reasons if config.text.languages is None else _by_language(candidates, reasons, config.text.languages)


def _by_language(candidates: pa.Table, reasons: pa.Array, allowed: tuple[str, ...]) -> pa.Array:
    """Asks only of what the rules before have let through: telling a language takes longer than all of them."""
    left = pc.is_null(reasons)
    other = in_other_language(candidates["text"].combine_chunks().filter(left), allowed)
    verdicts = pc.if_else(other, OTHER_LANGUAGE, pa.scalar(None, pa.string()))
    return pc.replace_with_mask(reasons, left, verdicts)


def _only_the_best(candidates: pa.Table, reasons: pa.Array) -> pa.Array:
    """Rejects the synthetic texts of an image that another one of it beats: by itm_score, of equal ones the first."""
    rivals = pc.and_(pc.is_null(reasons), pc.equal(candidates["source"], "synthetic").combine_chunks())
    columns = candidates.select(["uid", "itm_score", "candidate"]).append_column(
        "place", pa.array(np.arange(candidates.num_rows))
    )
    order = [("uid", "ascending"), ("itm_score", "descending"), ("candidate", "ascending"), ("place", "ascending")]
    ranked = columns.filter(rivals).sort_by(order)
    if ranked.num_rows < 2:
        return reasons
    uids = ranked["uid"].combine_chunks()
    beaten = ranked["place"].combine_chunks().slice(1).filter(pc.equal(uids.slice(1), uids.slice(0, len(uids) - 1)))
    mask = np.zeros(candidates.num_rows, bool)
    mask[beaten.to_numpy()] = True
    return pc.if_else(pa.array(mask), BEST_OF, reasons)


@contextmanager
def _locked_connection(candidates: pa.Table) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection whose one table is `annotations`, with a column `place`; it can open no file."""
    with _locked_database(os.getpid()).cursor() as connection:
        places = pa.array(np.arange(candidates.num_rows))
        connection.register("annotations", candidates.append_column("place", places))
        yield connection


@lru_cache(maxsize=1)
def _locked_database(process: int) -> duckdb.DuckDBPyConnection:
    """An empty database of this process, which can open no file. To start one takes longer than to judge a shard."""
    database = duckdb.connect()
    database.execute("SET enable_external_access = false")
    database.execute("SET lock_configuration = true")
    return database


def _predicate_error(where: str, what: str) -> str:
    return f"publish.where {where!r}: {what}; the columns are {', '.join(PREDICATE_SCHEMA.names)}"
