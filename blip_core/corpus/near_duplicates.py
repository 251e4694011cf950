"""Which images look the same: a cosine of their embeddings at or above a threshold.

The images come in an order of preference. One is kept where no kept one before it looks the same, so that no two kept
images do, and each one that is left out has a kept one that it looks like. That is found in rounds: an image without
any likeness before it is kept, every later likeness of a kept one is left out, and what is still open has the same
asked of it. Numbers are compared in float32 first; a cosine near the threshold is computed again in float64, where
the products of float16 numbers sum up exactly, so that every machine gives the same answer.

Up to EXACT_IMAGES, all pairs are compared. Above, those whose embeddings lie on the same side of some random
hyperplanes in at least one of many draws (Charikar, STOC 2002): a pair at the very threshold is met with a probability
of at least RECALL, a closer one with a higher one, and none is taken for the same that is not.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float16]  # (images, width), of length 1 each but for rounding; may lie in a file
Places = npt.NDArray[np.int64]
# (vectors, places asked about, places to be looked among, threshold) -> for each one asked about, a place among those,
# before it, that looks the same; -1 where there is none. Both lists of places ascend.
Search = Callable[[Vectors, Places, Places, float], Places]

EXACT_IMAGES = 300_000
RECALL = 0.99
MARGIN = 1e-4  # what float32 may be wrong by, with room
QUERY_ROWS, POOL_ROWS = 2048, 8192  # of a block of products, 64 MiB
PAIRS = 2**16  # compared at a time, outside of blocks
SAMPLE = 2000  # images whose pairs say how many bits are best


def leaders(vectors: Vectors, threshold: float, search: Search | None = None) -> Places:
    """For each image the place of a kept one before it that it looks like; its own place where it is kept itself.

    Args:
        vectors: one embedding an image, in the order of preference.
        threshold: the cosine from which on two images look the same, 0..1.
        search: how likenesses are found; None: by the number of images.
    """
    found = np.arange(len(vectors))
    open_ones = np.arange(len(vectors))
    while len(open_ones):
        look = search or (every_pair if len(open_ones) <= EXACT_IMAGES else by_hyperplanes)
        before = look(vectors, open_ones, open_ones, threshold)
        kept, others = open_ones[before < 0], open_ones[before >= 0]
        like = look(vectors, others, kept, threshold)
        found[others[like >= 0]] = like[like >= 0]
        open_ones = others[like < 0]
    return found


def every_pair(vectors: Vectors, asked: Places, among: Places, threshold: float) -> Places:
    """A Search that compares all pairs, in blocks of products; it finds the first likeness of each."""
    found = np.full(len(asked), -1)
    for start in range(0, len(asked), QUERY_ROWS):
        left = np.arange(start, min(start + QUERY_ROWS, len(asked)))
        queries = _unit(vectors, asked[left])
        reach = int(np.searchsorted(among, asked[left[-1]]))
        for begin in range(0, reach, POOL_ROWS):
            pool = among[begin : min(begin + POOL_ROWS, reach)]
            first = _first_alike(vectors, asked[left], queries, pool, threshold)
            found[left[first >= 0]] = first[first >= 0]
            left, queries = left[first < 0], queries[first < 0]
            if not len(left):
                break
    return found


def _first_alike(
    vectors: Vectors, asked: Places, queries: npt.NDArray[np.float32], pool: Places, threshold: float
) -> Places:
    """The first of `pool` before each one that looks like it; -1 where none does."""
    found = np.full(len(asked), -1)
    cosines = queries @ _unit(vectors, pool).T  # (queries, pool)
    if pool[-1] >= asked[0]:
        cosines[pool[None, :] >= asked[:, None]] = -2
    some = np.flatnonzero(cosines.max(axis=1) >= threshold - MARGIN)  # few, as a rule
    cosines, asked = cosines[some], asked[some]
    sure = cosines >= threshold + MARGIN
    first = np.where(sure.any(axis=1), sure.argmax(axis=1), len(pool))
    rows, columns = np.nonzero((cosines >= threshold - MARGIN) & ~sure)
    near = columns < first[rows]
    rows, columns = rows[near], columns[near]
    for start in range(0, len(rows), PAIRS):
        row, column = rows[start : start + PAIRS], columns[start : start + PAIRS]
        alike = _exactly(vectors, asked[row], pool[column]) >= threshold
        np.minimum.at(first, row[alike], column[alike])
    found[some] = np.where(first < len(pool), pool[np.minimum(first, len(pool) - 1)], -1)
    return found


class Draws(NamedTuple):
    """How often hyperplanes are drawn, and how many each time."""

    times: int
    bits: int


def by_hyperplanes(vectors: Vectors, asked: Places, among: Places, threshold: float) -> Places:
    """A Search that compares the pairs on one side of all hyperplanes of a draw; it finds some likeness of each."""
    found = np.full(len(asked), -1)
    draws = best_draws(vectors, among, threshold)
    for number in range(draws.times):
        left = np.flatnonzero(found < 0)
        normals = np.random.default_rng(number).standard_normal((vectors.shape[1], draws.bits)).astype(np.float32)
        buckets = _buckets(vectors, among, normals)
        order = np.argsort(buckets, kind="stable")  # of one bucket: in the order of preference
        theirs = buckets[order]
        mine = _buckets(vectors, asked[left], normals)
        first = np.searchsorted(theirs, mine, "left")
        last = _before(theirs, among[order], mine, asked[left], first)
        found[left] = _walk(vectors, asked[left], among[order], first, last, threshold)
    return found


def best_draws(vectors: Vectors, among: Places, threshold: float) -> Draws:
    """The number of bits that is likely to take the least time, and of draws that gives RECALL at the threshold.

    Two embeddings at an angle are on one side of a random hyperplane with the probability 1 - angle / pi.
    """
    sample = _unit(vectors, among[:: max(1, len(among) // SAMPLE)])
    cosines = np.clip((sample @ sample.T)[np.triu_indices(len(sample), 1)], -1, 1)
    together = 1 - np.arccos(cosines) / np.pi
    meets = 1 - np.arccos(min(threshold, 1.0 - 1e-6)) / np.pi
    options = []
    for bits in range(8, 63, 2):
        times = max(1, int(np.ceil(np.log(1 - RECALL) / np.log1p(-(meets**bits)))))
        pairs = len(among) ** 2 / 2 * float(np.mean(together**bits))
        hashed = len(among) * (0.5 + bits / 50)  # in the time that one pair takes, as measured
        options.append((times * (pairs + hashed), Draws(times, bits)))
    return min(options)[1]


def _buckets(vectors: Vectors, places: Places, normals: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The sides of the hyperplanes, (width, bits), as the bits of a number."""
    powers = 2 ** np.arange(normals.shape[1], dtype=np.int64)
    buckets = np.empty(len(places), np.int64)
    for start in range(0, len(places), PAIRS):
        some = slice(start, start + PAIRS)
        buckets[some] = (vectors[places[some]].astype(np.float32) @ normals > 0) @ powers
    return buckets


def _before(
    theirs: npt.NDArray[np.int64], places: Places, mine: npt.NDArray[np.int64], asked: Places, first: Places
) -> Places:
    """Where in the bucket of each one asked about those end that come before it, by bisection in all at once."""
    low, high = first.copy(), np.searchsorted(theirs, mine, "right")
    while (active := np.flatnonzero(low < high)).size:
        middle = (low[active] + high[active]) // 2
        earlier = places[middle] < asked[active]
        low[active[earlier]] = middle[earlier] + 1
        high[active[~earlier]] = middle[~earlier]
    return low


def _walk(vectors: Vectors, asked: Places, among: Places, first: Places, last: Places, threshold: float) -> Places:
    """Compares each one asked about with among[first:last], one after the other until one looks the same."""
    found = np.full(len(asked), -1)
    active, at = np.arange(len(asked)), first.copy()
    while (active := active[at[active] < last[active]]).size:
        for start in range(0, len(active), PAIRS):
            some = active[start : start + PAIRS]
            other = among[at[some]]
            alike = _alike(vectors, asked[some], other, threshold)
            found[some[alike]] = other[alike]
        at[active] = np.where(found[active] < 0, at[active] + 1, last[active])
    return found


def _alike(vectors: Vectors, left: Places, right: Places, threshold: float) -> npt.NDArray[np.bool_]:
    """Of each pair whether it looks the same; no more than PAIRS."""
    cosines = np.einsum("ij,ij->i", _unit(vectors, left), _unit(vectors, right))
    alike: npt.NDArray[np.bool_] = cosines >= threshold
    near = np.flatnonzero(np.abs(cosines - threshold) < MARGIN)
    alike[near] = _exactly(vectors, left[near], right[near]) >= threshold
    return alike


def _unit(vectors: Vectors, places: Places) -> npt.NDArray[np.float32]:
    rows = vectors[places].astype(np.float32)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return rows


def _exactly(vectors: Vectors, left: Places, right: Places) -> npt.NDArray[np.float64]:
    """Cosines of pairs. Up to the division nothing is rounded, in whatever order it is summed up."""
    ours, theirs = vectors[left].astype(np.float64), vectors[right].astype(np.float64)
    norms = np.sqrt((ours * ours).sum(axis=1)) * np.sqrt((theirs * theirs).sum(axis=1))
    cosines: npt.NDArray[np.float64] = (ours * theirs).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return cosines
