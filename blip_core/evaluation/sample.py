"""The sample that a person judges: candidates of a round, drawn at random from strata of verdict, source and score.

A candidate's place in the draw is the md5 of the seed and its key, and the first of each stratum are taken: the same
seed draws the same pairs on any machine, however the parts are cut or read. A drawn pair has one chance in
size / drawn of its stratum, which blip_core/evaluation/estimates.py weighs it by.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from blip_core.corpus.rules import further_rules
from blip_core.errors import WorkspaceError
from blip_core.evaluation.audit import MATCH
from blip_core.evaluation.tables import RoundTables
from blip_core.files import fingerprint
from blip_core.workspace import Workspace

SAMPLE_VERSION = "audit-sample/1"
PAIRS, MOST_PAIRS = 400, 10_000
EDGES = (0.1, MATCH, 0.9)  # a score lies in the bin above an edge where it is greater; MATCH makes the verdict a union
LEAST = 10  # of each stratum, as far as it has so many

_BIN = " + ".join(f"(itm_score::DOUBLE > {edge}::DOUBLE)::INTEGER" for edge in EDGES)
_KEY = "md5(concat_ws(chr(10), ?::VARCHAR, shard, candidate::VARCHAR, uid))"
_JUDGED = f"""
    SELECT judged.*, {_BIN} AS bin, EXISTS (
        FROM corpus WHERE corpus.uid = judged.uid AND corpus.shard = judged.shard
            AND corpus.candidate = judged.candidate) AS kept
    FROM annotations AS judged
    WHERE itm_score IS NOT NULL
"""  # noqa: S608  (the edges are numbers of ours)

_Cell = tuple[bool, str, int]


@dataclass(frozen=True)
class Stratum:
    """Candidates that have verdict, source and a range of scores in common.

    `low` < itm_score <= `high`; `size` is how many there are, `drawn` how many of them are in the sample.
    """

    kept: bool
    source: str
    low: float
    high: float
    size: int
    drawn: int

    @property
    def matched(self) -> bool:
        """Whether the Filter says 'match'."""
        return self.low >= MATCH


class Pair(NamedTuple):
    """A drawn candidate, and the place of its stratum."""

    uid: str
    shard: str
    candidate: int
    text: str
    image_sha256: str
    stratum: int


@dataclass(frozen=True)
class Sample:
    """What was drawn, in the order in which it is judged; `name` changes with anything that it depends on."""

    name: str
    round: int
    seed: int
    pairs: int
    where: str
    rules: dict[str, Any]  # further_rules
    strata: tuple[Stratum, ...]
    drawn: tuple[Pair, ...]


def draw_sample(workspace: Workspace, round: int, pairs: int = PAIRS, seed: int = 0) -> Sample:
    """Draws `pairs` scored candidates of a round, or all where it has fewer: half kept ones, half rejected ones.

    Within a verdict each stratum gets its share by size, but LEAST at least. Raises WorkspaceError where there is no
    such round or nothing is kept or rejected in it yet.
    """
    if round not in workspace.round_numbers():
        there = ", ".join(map(str, workspace.round_numbers())) or "none"
        raise WorkspaceError(f"{workspace.round(round).root}: there is no round {round}; the rounds are: {there}")
    with RoundTables.open(workspace, round) as tables:
        rules = tables.rules()
        if rules is None:
            raise WorkspaceError(f"{workspace.round(round).corpus}: round {round} has no corpus to audit; publish it")
        sizes = _sizes(tables)
        if not sizes:
            raise WorkspaceError(f"{workspace.round(round).annotations}: no candidate of round {round} has a score")
        numbers = _numbers(sizes, pairs)
        drawn = _draw(tables, numbers, seed)
    strata = tuple(_stratum(cell, size, numbers[cell]) for cell, size in sizes.items())
    further = further_rules(rules)
    content = [[list(pair) for pair in drawn], [asdict(stratum) for stratum in strata]]
    name = fingerprint(SAMPLE_VERSION, round, seed, pairs, rules.where, further, content)
    return Sample(name, round, seed, pairs, rules.where, further, strata, drawn)


def allocate(sizes: Sequence[int], pairs: int, least: int = LEAST) -> list[int]:
    """How many of each stratum are drawn: in proportion to its size, `least` or all at least, never more than all.

    The sum is `pairs`, or all there are; where even `least` of each are too many, it is shared out evenly.
    """
    size = np.asarray(sizes, np.int64)
    total = min(pairs, int(size.sum()))
    drawn = np.minimum(size, max(0, min(least, total // max(1, len(size)))))
    while (left := total - int(drawn.sum())) > 0:
        lacking = np.where(drawn < size, np.maximum(size * total / size.sum() - drawn, 1e-9), 0.0)
        wanted = left * lacking / lacking.sum()
        given = np.minimum(np.floor(wanted).astype(np.int64), size - drawn)
        if not given.any():  # fewer are left than strata: one each to those that lack most
            given[np.argsort(-wanted, kind="stable")[:left]] = 1
            given = np.minimum(given, size - drawn)
        drawn = drawn + given
    return drawn.tolist()


def _sizes(tables: RoundTables) -> dict[_Cell, int]:
    """How many candidates have each verdict, source and bin that any has, kept ones first."""
    query = f"SELECT kept, source, bin, count(*) FROM ({_JUDGED}) GROUP BY ALL ORDER BY kept DESC, source DESC, bin"  # noqa: S608
    return {(kept, source, place): size for kept, source, place, size in tables.connection.execute(query).fetchall()}


def _numbers(sizes: Mapping[_Cell, int], pairs: int) -> dict[_Cell, int]:
    """How many are drawn of each."""
    verdicts = {kept: {cell: size for cell, size in sizes.items() if cell[0] == kept} for kept in (True, False)}
    there = {kept: sum(cells.values()) for kept, cells in verdicts.items()}
    wanted = {True: max(pairs // 2, pairs - there[False]), False: max(pairs - pairs // 2, pairs - there[True])}
    return {
        cell: drawn
        for kept, cells in verdicts.items()
        for cell, drawn in zip(cells, allocate(list(cells.values()), wanted[kept]), strict=True)
    }


def _stratum(cell: _Cell, size: int, drawn: int) -> Stratum:
    kept, source, place = cell
    bounds = (0.0, *EDGES, 1.0)
    return Stratum(kept, source, bounds[place], bounds[place + 1], size, drawn)


def _draw(tables: RoundTables, numbers: Mapping[_Cell, int], seed: int) -> tuple[Pair, ...]:
    """The first of each stratum by the md5 of seed and key, in the order of another one: the marks of whoever stops
    early are a random part of the sample."""
    row = "{uid: uid, shard: shard, candidate: candidate, text: text, image_sha256: image_sha256}"
    query = f"SELECT kept, source, bin, min_by({row}, {_KEY}, ?) FROM ({_JUDGED}) GROUP BY ALL"  # noqa: S608
    found = tables.connection.execute(query, [seed, max(1, *numbers.values())]).fetchall()
    rows = {(kept, source, place): first for kept, source, place, first in found}
    drawn = [
        Pair(**row, stratum=stratum)
        for stratum, (cell, number) in enumerate(numbers.items())
        for row in rows[cell][:number]
    ]
    return tuple(sorted(drawn, key=lambda pair: _place(seed, pair)))


def _place(seed: int, pair: Pair) -> str:
    return hashlib.md5(f"order\n{seed}\n{pair.shard}\n{pair.candidate}\n{pair.uid}".encode()).hexdigest()
