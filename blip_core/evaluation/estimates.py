"""From marks of a stratified sample to shares of a whole round, with 95% intervals.

The value is the stratified estimate: each stratum's share of right ones, weighed by its size (Cochran, Sampling
Techniques, 1977, chapter 5). The interval is that of a posterior, drawn at random: how many of a stratum's unseen
candidates are right is beta-binomial (Ericson, JRSS B 31, 1969; Meeden, A Bayesian solution for a statistical auditing
problem, 2002), so that a stratum of which all were marked is certain, and one with 0 or n right ones is not.
docs/audit.md says why the prior is shared out over the strata.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blip_core.evaluation.sample import Stratum

MEASURES = ("candidate_noise", "corpus_noise", "filter_precision", "filter_recall")
LEVEL = 0.95
DRAWS = 20_000
# Right and wrong pairs that are thought of before any is seen: Jeffreys'; and of a kind that was not seen at all, where
# Jeffreys' interval is too short: the modified one of Brown, Cai and DasGupta, Statistical Science 16, 2001.
PRIOR, PRIOR_OF_NONE = 0.5, 1.0
AT_ONCE = 2_000_000  # numbers drawn at a time, for memory

_Array = NDArray[np.float64]


class Interval(NamedTuple):
    """A share, 0..1, and its 95% interval; each has the shape of the audits, and NaN where there is nothing to tell."""

    value: _Array
    low: _Array
    high: _Array


class _Totals(NamedTuple):
    """Right candidates by (verdict of the corpus, verdict of the Filter), and all of them. Last axis: the 4 groups."""

    right: _Array
    size: _Array


KEPT = np.array([True, True, False, False])
MATCHED = np.array([True, False, True, False])


def estimate(
    strata: Sequence[Stratum], right: ArrayLike, wrong: ArrayLike, draws: int = DRAWS, seed: int = 0
) -> dict[str, Interval]:
    """What the marks say of all candidates of the strata: MEASURES, each with its interval.

    `candidate_noise` is the share of wrong ones among all, `corpus_noise` among the kept; `filter_precision` is the
    share of right ones among those that the Filter matched, `filter_recall` the share of matched ones among the right.

    Args:
        right: pairs marked right, (..., strata): of one audit, or of many at once.
        wrong: pairs marked wrong, of the same shape.
        draws: of the posterior; the interval ends at its quantiles.
        seed: of those draws.
    """
    marks = np.stack(np.broadcast_arrays(np.asarray(right, float), np.asarray(wrong, float)))
    groups = _groups(strata)
    size = np.array([stratum.size for stratum in strata], float)
    drawn = list(_draw_totals(marks, size, groups, draws, np.random.default_rng(seed)))
    values = _measures(_Totals(_value(marks, size) @ groups, size @ groups))
    spread = [_measures(totals) for totals in drawn]
    tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    known = _known(marks, groups)
    found = {}
    for name, value in values.items():
        low, high = np.quantile(np.concatenate([part[name] for part in spread]), tails, axis=0)
        ends = (value, np.fmin(low, value), np.fmax(high, value))
        found[name] = Interval(*(np.where(known[name], end, np.nan) for end in ends))
    return found


def _groups(strata: Sequence[Stratum]) -> _Array:
    """Which of the 4 groups a stratum is of, (strata, 4)."""
    kept = np.array([stratum.kept for stratum in strata], bool)
    matched = np.array([stratum.matched for stratum in strata], bool)
    return ((kept[:, None] == KEPT) & (matched[:, None] == MATCHED)).astype(float)


def _value(marks: _Array, size: _Array) -> _Array:
    """Right candidates of each stratum, as the marks have it: half of one of which nothing is marked."""
    right, marked = marks[0], marks.sum(axis=0)
    return size * np.divide(right, marked, out=np.full_like(right, 0.5), where=marked > 0)


def _draw_totals(
    marks: _Array, size: _Array, groups: _Array, draws: int, generator: np.random.Generator
) -> Iterator[_Totals]:
    """`draws` in all, (part of the draws, ..., 4)."""
    marked = marks.sum(axis=0)
    # n marks tell as much as n - 1, as in a bootstrap of strata (Rao and Wu, JASA 83, 1988): small strata vary more.
    told = np.maximum(marked - 1, 1) / np.maximum(marked, 1)
    weights = groups * size[:, None] / np.maximum(size @ groups, 1)
    shared = np.where(marks @ groups > 0, PRIOR, PRIOR_OF_NONE) @ weights.T
    prior = np.where(marked > 0, shared, 1.0)  # anything may be in a stratum of which nothing is marked
    alpha, beta = marks * told + prior
    unseen = (size - marked).astype(np.int64)
    at_once = max(1, AT_ONCE // max(1, alpha.size))
    for first in range(0, draws, at_once):
        shape = (min(at_once, draws - first), *alpha.shape)
        right = marks[0] + generator.binomial(unseen, generator.beta(alpha, beta, shape))
        yield _Totals(right @ groups, size @ groups)


def _measures(totals: _Totals) -> dict[str, _Array]:
    right, size = totals
    matched = right[..., MATCHED].sum(axis=-1)
    return {
        "candidate_noise": 1 - _share(right.sum(axis=-1), size.sum()),
        "corpus_noise": 1 - _share(right[..., KEPT].sum(axis=-1), size[KEPT].sum()),
        "filter_precision": _share(matched, size[MATCHED].sum()),
        "filter_recall": _share(matched, right.sum(axis=-1)),
    }


def _share(part: _Array, whole: ArrayLike) -> _Array:
    """NaN of nothing."""
    part, whole = np.broadcast_arrays(np.asarray(part, float), np.asarray(whole, float))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _known(marks: _Array, groups: _Array) -> dict[str, NDArray[np.bool_]]:
    """Whether there is a mark to tell each measure by; of the recall, that of a right pair."""
    right, marked = marks[0], marks.sum(axis=0) @ groups
    return {
        "candidate_noise": marked.sum(axis=-1) > 0,
        "corpus_noise": marked[..., KEPT].sum(axis=-1) > 0,
        "filter_precision": marked[..., MATCHED].sum(axis=-1) > 0,
        "filter_recall": right.sum(axis=-1) > 0,
    }
